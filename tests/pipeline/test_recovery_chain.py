"""Every way to recover through the command's own path: store, mask, plan, packed file, chip, and PEFT's reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.pipeline

FLAGS: dict[str, Any] = {
    "depth.remove": 0, "wanda.pattern": "2:4", "gptq.group": 32, "lora.targets": "all", "lora.steps": 2,
    "lora.held_out": 0, "lora.learning_rate": 0.01,
}  # fmt: skip
MERGED = ["rslora", "dora", "ia3", "dora+rslora"]
BESIDE = ["qlora", "qlora+dora", "qlora+ia3", "rslora+loftq", "dora+loftq"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all methods: what comes before lora is computed once."""
    out: Path = tmp_path_factory.mktemp("recovery") / "out"
    return out


@pytest.mark.parametrize("method", [*MERGED, *BESIDE])
def test_a_method_runs_through_the_pipeline(
    method: str, store: Path, tiny_llama: Path, run_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    flags = FLAGS | {"lora.method": method}
    given = {key.replace(".", "__"): value for key, value in flags.items()}
    result = run_recipe(store, tiny_llama, skip="eora" if method in BESIDE else "gptq,eora", **given)
    print(result.report["stages"][-1])
