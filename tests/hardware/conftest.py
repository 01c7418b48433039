"""Shapes that the tests of `hardware` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.shape import ModelShape

Make = Callable[..., ModelShape]


def _make(config: str | dict[str, Any], embedding_bits: int | None = None, **linear: Any) -> ModelShape:
    shape = shape_from_config(PRESETS[config] if isinstance(config, str) else config)
    blocks = tuple(replace(b, linears=tuple(replace(x, **linear) for x in b.linears)) for b in shape.blocks)
    return replace(shape, blocks=blocks, embedding_bits=embedding_bits)


@pytest.fixture
def make() -> Make:
    """A preset's or configuration's shape, with the given fields of every linear layer replaced."""
    return _make
