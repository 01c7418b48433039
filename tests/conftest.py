"""What the tests of every folder share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.installed import Installed, install
from tests.models import save_tiny

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """tiny_model(family="llama", seed=0, **config overrides): the folder of a saved model, made once; never change it.

    Float32, hidden 64, 6 blocks, 512 tokens, random weights, with a tokenizer; families as in tests/models.py.
    """
    made: dict[str, Path] = {}

    def make(family: str = "llama", **overrides: Any) -> Path:
        key = json.dumps([family, overrides], sort_keys=True)
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp(family) / "model", family, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(tmp_path_factory.mktemp("installed"))
