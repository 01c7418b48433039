"""GPTQ folders in the libraries that people load them with: their CPU kernels give the logits of our weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.writer import verify
from edgepress.pipeline.formats import FORMATS, Wanted, module_of

pytestmark = pytest.mark.pipeline

IDS = torch.randint(3, 500, (2, 48), generator=torch.Generator().manual_seed(0))
TOLERANCE = 0.04  # relative, of the logits
HIGH = {"gptq__effort": "high", "gptq__effort_steps": 4}
# What is quantised how, and the kernel of GPTQModel that takes it on any CPU.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "4 bits, high effort": ({"skip": "depth,wanda,lora,eora", "gptq__group": 32, **HIGH}, "GPTQ_TORCH_ATEN"),
    "4 bits, 2:4": ({"skip": "depth,lora,eora", "wanda__pattern": "2:4", "gptq__group": 64}, "GPTQ_TORCH_ATEN"),
    "8 bits, 2:4, high effort": (
        {"skip": "depth,lora,eora", "wanda__pattern": "2:4", "gptq__quant": "gptq8", "gptq__group": 32, **HIGH},
        "GPTQ_TORCH",
    ),
    "int8": ({"skip": "depth,wanda,lora,eora", "gptq__quant": "int8"}, "GPTQ_TORCH"),
    "hqq2, 2:4": (
        {"skip": "depth,lora,eora", "wanda__pattern": "2:4", "gptq__quant": "hqq2", "gptq__group": 32},
        "GPTQ_TORCH",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _uncompiled() -> Iterator[None]:
    """GPTQModel has its kernels compiled by torch when they first run, which takes a minute and changes no value."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module", params=list(CASES))
def made(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, run_recipe: Any
) -> tuple[Checkpoint, str]:
    """The quantised checkpoint, bfloat16, and the kernel's name."""
    values, kernel = CASES[request.param]
    result = run_recipe(tmp_path_factory.mktemp("kernels") / "out", tiny_llama, **values)
    checkpoint: Checkpoint = result.stages[-1].checkpoint
    verify(checkpoint)
    return checkpoint, kernel


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found.double()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def assert_ours(checkpoint: Checkpoint, load: Callable[[], Any]) -> None:
    """Within what bfloat16 leaves; the last test shows what that would see."""
    with quiet_import():
        model = load()
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(layers) == 7 * len(checkpoint.shape.blocks)
    assert not any(type(layer) is torch.nn.Linear for layer in layers)  # none was left dense or made so
    assert off(logits(model), logits(checkpoint.model(dtype=torch.float32))) < TOLERANCE


def test_gptqmodel_computes_what_our_effective_weights_do(made: tuple[Checkpoint, str]) -> None:
    checkpoint, kernel = made

    def load() -> Any:
        from gptqmodel import GPTQModel
        from gptqmodel.utils.backend import BACKEND

        return GPTQModel.load(str(checkpoint.folder), backend=BACKEND[kernel], device="cpu", dtype=torch.bfloat16).model

    assert_ours(checkpoint, load)


def test_transformers_computes_what_our_effective_weights_do(made: tuple[Checkpoint, str]) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint, _ = made
    assert_ours(checkpoint, lambda: AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def mixed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, run_recipe: Any) -> Checkpoint:
    """Layers of 3, 4 and 8 bits in groups of 32, 64 and the whole row."""
    values = {"skip": "depth,wanda,lora,eora", "gptq__quant": "gptq8", "gptq__group": 32}
    rules = "down_proj=gptq4/64; v_proj=gptq8/64; 1-5.q_proj=gptq3; 0.q_proj=gptq8-channel"
    result = run_recipe(tmp_path_factory.mktemp("mixed") / "out", tiny_llama, **values, gptq__layers=rules)
    checkpoint: Checkpoint = result.stages[-1].checkpoint
    first = {x.name.rpartition(".")[2]: x.grid for x in checkpoint.shape.blocks[0].linears}
    assert len(set(first.values())) == 4
    return checkpoint


def test_gptqmodel_computes_what_layers_of_unlike_bits_do(mixed: Checkpoint) -> None:
    def load() -> Any:
        from gptqmodel import GPTQModel
        from gptqmodel.utils.backend import BACKEND

        return GPTQModel.load(str(mixed.folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.bfloat16).model

    assert_ours(mixed, load)


def test_transformers_refuses_layers_of_unlike_bits_and_loads_their_export(mixed: Checkpoint, tmp_path: Path) -> None:
    """Optimum, which loads GPTQ's files for it, knows one setting for all layers: no wrong weight is loaded."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    kernel = GPTQConfig(bits=8, backend="gptq_torch")  # one that need not be compiled first; the rest is the folder's
    with quiet_import(), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(mixed.folder, dtype=torch.bfloat16, quantization_config=kernel)
    module_of(FORMATS["hf"]).write(mixed, Wanted(tmp_path / "hf"), Runtime())  # bfloat16, as all is measured
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert off(logits(dense), logits(mixed.model(dtype=torch.float32))) < 1e-6


def test_the_tolerance_would_see_other_zero_points(made: tuple[Checkpoint, str]) -> None:
    """Off by one at 4 bits, and by as much of the range at 8; test_packing.py holds them to the bit."""
    checkpoint, _ = made
    model = checkpoint.model(dtype=torch.float32)
    exact = logits(model)
    grid = checkpoint.shape.grid
    assert grid is not None
    for index, block in enumerate(checkpoint.shape.blocks):
        stored = checkpoint.stored_block(index)
        for linear in block.linears:
            scales = stored[f"{linear.name}.scales"].float().T
            scales = scales.repeat_interleave(linear.in_features // scales.shape[1], 1)
            model.get_submodule(f"model.layers.{index}.{linear.name}").weight.add_(2 ** (grid.bits - 4) * scales)
    assert off(logits(model), exact) > 2 * TOLERANCE
