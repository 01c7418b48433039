"""Half-quadratic quantisation with real zero points: against the published loop, and through the stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import Grid, RealGrid
from edgepress.checkpoints.image import pack_checkpoint, unpack_checkpoint
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import Pattern, with_pattern
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import eora, gptq, lora
from edgepress.stages.options import Eora, Gptq, Lora
from edgepress.stages.quantisers import hqq
from edgepress.stages.quantisers.codes import fit_grid, nearest
from tests.stages.lora_help import options as lora_options
from tests.stages.lora_help import text

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)


def published(weight: NDArray[Any], bits: int, group: int, stored: bool) -> NDArray[Any]:
    """The authors' loop in numpy's float64, with the reciprocal of the scale as they have it.

    stored: scale and zero point as float16 holds them.
    """
    w = weight.astype(np.float64).reshape(-1, group)
    low, high, top = w.min(1, keepdims=True), w.max(1, keepdims=True), 2**bits - 1
    scale = np.minimum(top / (high - low), 2e4)
    if stored:
        scale = 1 / (1 / scale).astype(np.float16).astype(np.float64)
    zero, beta, best = -low * scale, 10.0, 1e4
    if bits == 4:
        zero = np.rint(zero)
    for _ in range(20):
        q = np.clip(np.rint(w * scale + zero), 0, top)
        left = w - (q - zero) / scale
        with np.errstate(divide="ignore"):
            e = np.sign(left) * np.maximum(np.abs(left) - np.abs(left) ** -0.3 / beta, 0)
        zero = (q - (w - e) * scale).mean(1, keepdims=True)
        beta *= 1.01
        if np.abs(left).mean() >= best:
            break
        best = np.abs(left).mean()
    if stored:
        zero = zero.astype(np.float16).astype(np.float64)
    q = np.clip(np.rint(w * scale + zero), 0, top)
    return ((q - zero) / scale).reshape(weight.shape)


def laplace(seed: int, rows: int = 48, columns: int = 256, size: float = 0.05) -> Tensor:
    """Heavy tails, as trained weights have them, and a mean that is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn: Tensor = torch.distributions.Laplace(0.1, 1.0).sample((rows, columns))
    return size * drawn


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("size", [1.0, 0.05])
@pytest.mark.parametrize("group", [64, 32, -1])
def test_weights_are_those_of_the_published_loop(bits: int, size: float, group: int) -> None:
    weight = laplace(bits, size=size)
    found = hqq.solve_real(weight, RealGrid(bits, group)).weight.numpy()
    width = weight.shape[1] if group == -1 else group
    step = np.ptp(weight.numpy().reshape(-1, width), axis=1) / (2**bits - 1)
    step = step.repeat(width).reshape(weight.shape)
    off = np.abs(found - published(weight.numpy(), bits, width, stored=True)) / step
    # near a tie, and where a zero point's last bit of float16 differs, the two arithmetics may part
    assert np.median(off) < 1e-3
    assert (off > 0.02).mean() < 2e-3
    exact = published(weight.numpy(), bits, width, stored=False)

    def error(approximation: NDArray[Any]) -> float:
        return float((np.abs(approximation - weight.numpy()) ** 0.7).mean())

    assert error(found) == pytest.approx(error(exact), rel=5e-3)  # float16 costs next to nothing


@pytest.mark.parametrize("size", [1.0, 0.05])
def test_4_bits_beat_plain_rounding_by_their_own_measure(size: float) -> None:
    weight, grid = laplace(7, size=size), Grid(4, 64)
    plain = nearest(weight, *fit_grid(weight, torch.ones(weight.shape[1]), grid, False), grid).weight
    found = hqq.solve_real(weight, RealGrid(4, 64)).weight
    ours, theirs = ((x - weight).abs().pow(0.7).mean() for x in (found, plain))
    assert float(ours) < 0.99 * float(theirs)


@pytest.mark.parametrize("value", [0.0, 1e-6, -0.3, 7.0, -3e4])
def test_groups_without_a_range_are_kept(value: float) -> None:
    """All weights alike, and none may become infinite; as near as float16 holds the number."""
    solved = hqq.solve_real(torch.full((4, 64), value), RealGrid(2, 32))
    torch.testing.assert_close(solved.weight, torch.full((4, 64), value), rtol=2e-3, atol=1e-5)
    assert all(torch.isfinite(x).all() for x in solved.stored().values())


def test_the_form_follows_the_pattern() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    for quant, bits in (("hqq4", 4), ("hqq2", 2)):
        planned = gptq.plan(shape, Gptq(quant=quant, group=128))
        assert planned.grid == RealGrid(bits, 64)
        assert planned.config["quantization_config"] == {
            "quant_method": "edgepress-real-zeros", "bits": bits, "group_size": 64,
        }  # fmt: skip
        assert gptq.plan(with_pattern(shape, Pattern(2, 4)), Gptq(quant=quant, group=128)).grid == Grid(bits, 64)
    with pytest.raises(PlanError, match=r"already quantised \(4 bits with real zero points\)"):
        gptq.plan(gptq.plan(shape, Gptq(quant="hqq4")), Gptq())


@pytest.fixture(scope="module")
def dense(build: Callable[..., Checkpoint]) -> Checkpoint:
    return build("llama", blocks=3)


@pytest.fixture(scope="module", params=["hqq4", "hqq2"])
def made(
    request: pytest.FixtureRequest, dense: Checkpoint, tmp_path_factory: pytest.TempPathFactory, tokens: Any, seal: Any
) -> Checkpoint:
    target = CheckpointWriter(tmp_path_factory.mktemp(request.param))
    options = Gptq(quant=request.param, group=32)
    gptq.run(dense, target, tokens(2), options, RUNTIME)
    sealed: Checkpoint = seal(target, dense)
    assert sealed.shape == gptq.plan(dense.shape, options)
    return sealed


def test_the_folder_holds_what_was_solved_and_planned(made: Checkpoint, dense: Checkpoint, tmp_path: Path) -> None:
    grid = made.shape.grid
    assert isinstance(grid, RealGrid) and grid.group == 32
    assert made.facts()["file_bytes"] == made.shape.file_bytes
    for index, block in enumerate(made.shape.blocks):
        weights = made.block(index)
        for x, before in zip(block.linears, dense.shape.blocks[index].linears, strict=True):
            solved = hqq.solve_real(dense.base_weight(index, before).float(), grid).weight
            assert torch.equal(made.base_weight(index, x), solved)
            assert torch.equal(weights[f"{x.name}.weight"], solved.to(made.stored_dtype))
    pack_checkpoint(made, tmp_path / "image")
    assert (tmp_path / "image").stat().st_size == packed_sizes(made.shape).total
    back = unpack_checkpoint(tmp_path / "image", tmp_path / "back")
    assert back.shape == made.shape
    for path in made.folder.glob("*.safetensors"):
        assert (back.folder / path.name).read_bytes() == path.read_bytes()


def test_transformers_stops_instead_of_misreading(made: Checkpoint) -> None:
    """It skips a quantisation that it does not know, so the tensors themselves must not pass for weights."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(RuntimeError, match=r"mismatch|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(made.folder)


def test_adapters_go_beside_it(
    made: Checkpoint, dense: Checkpoint, tokens: Callable[..., TokenBatches], tmp_path: Path, seal: Any
) -> None:
    def off(checkpoint: Checkpoint) -> float:
        pairs = [
            (checkpoint.block(i)[f"{x.name}.weight"], dense.block(i)[f"{x.name}.weight"])
            for i, block in enumerate(checkpoint.shape.blocks)
            for x in block.linears
        ]
        return sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)

    plain = off(made)
    target = CheckpointWriter(tmp_path / "eora")
    eora.run(made, target, tokens(4), Eora(rank=8), RUNTIME)
    assert off(seal(target, made)) < plain
    for method in ("qlora", "loftq"):
        options: Lora = lora_options(method=method, targets="all")
        target = CheckpointWriter(tmp_path / method)
        lora.run(made, target, text(), options, RUNTIME)
        trained = seal(target, made)
        assert trained.shape == lora.plan(made.shape, options)
        assert trained.shape.grid == made.shape.grid
        if method == "loftq":
            assert off(trained) < plain
