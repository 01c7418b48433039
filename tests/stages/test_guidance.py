"""`--guidance`: tokens weighed by the loss's gradient, against the whole model in memory and sums over tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint, Skeleton
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import gptq
from edgepress.stages.gradients import token_squares
from edgepress.stages.options import Gptq
from tests.stages.lora_help import Watcher

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)  # two windows at once, so that tokens come in several pieces


def seen_by_hand(checkpoint: Checkpoint, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every projection its inputs (tokens, in) and the mean square of the gradient in its outputs (tokens,)."""
    model: Any = checkpoint.model()
    model.requires_grad_(True)
    found: dict[str, tuple[Tensor, Any]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: Any, inputs: Any, output: Any) -> None:
            output.retain_grad()
            found[name] = (inputs[0].detach().flatten(0, 1), output)

        return keep

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(hook(name))
    logits = model(input_ids=ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: (x, output.grad.flatten(0, 1).square().mean(dim=1)) for name, (x, output) in found.items()}


def test_squares_are_those_of_the_whole_models_gradients(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    source, text = build("llama", blocks=3), tokens(5)
    skeleton = Skeleton(source, RUNTIME.device, RUNTIME.dtype)
    found = token_squares(skeleton, text.chunks(RUNTIME.chunk_tokens), RUNTIME)
    wanted = seen_by_hand(source, text.ids)
    assert sum(map(len, found.values())) == len(wanted) == 21
    for index, own in found.items():
        for name, squares in own.items():
            torch.testing.assert_close(squares, wanted[f"model.layers.{index}.{name}"][1], rtol=1e-3, atol=1e-14)


@pytest.mark.parametrize("quant", ["gptq3", "gptq3-s"])
def test_the_first_block_is_solved_on_weighed_tokens(
    quant: str,
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    seal: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    """Whose inputs are the dense model's: what the solver left is less where it was to look, and more elsewhere."""
    source, text = build("llama", blocks=2), tokens(8)
    seen, errors = seen_by_hand(source, text.ids), dict[float, dict[str, tuple[float, float]]]()
    for power in (0.0, 1.0):
        writer = CheckpointWriter(tmp_path / f"{power}")
        facts = gptq.run(source, writer, text, Gptq(quant, group=32, guidance=power, shrinkage=0), RUNTIME)
        made = seal(writer, source)
        for x in source.shape.blocks[0].linears:
            inputs, squares = seen[f"model.layers.0.{x.name}"]
            dense, coded = (c.block(0)[f"{x.name}.weight"].double() for c in (source, made))
            each = (inputs.double() @ (dense - coded).T).square().sum(dim=1)
            whole = (inputs.double() @ dense.T).square().sum(dim=1)
            weighed, alike = float((squares * each).sum() / (squares * whole).sum()), float(each.sum() / whole.sum())
            errors.setdefault(power, {})[x.name] = (weighed, alike)
            told = facts["blocks"][0][x.name]["error"]
            assert told == pytest.approx(weighed if power else alike, rel=2e-2), x.name
    better = [errors[1.0][name][0] < errors[0.0][name][0] for name in errors[0.0]]
    worse = [errors[1.0][name][1] > errors[0.0][name][1] for name in errors[0.0]]
    assert sum(better) >= 6 and sum(worse) >= 6


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"quant": "gptq3", "effort": "high", "effort_steps": 2}),
        ("qwen2", {"quant": "gptq3-s", "layers": "down_proj=gptq2-s/32; 0.q_proj=gptq4-s"}),
        ("gemma3", {"quant": "gptq4", "quant_embeddings": 4}),
    ],
)
def test_it_goes_with_the_solvers_other_options_and_families(
    family: str,
    options: dict[str, Any],
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    seal: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    """Other codes than without, as many bytes, and a model that computes."""
    source, text, made = build(family, blocks=2), tokens(6, seed=3), list[Checkpoint]()
    for power in (0.0, 0.5):
        writer = CheckpointWriter(tmp_path / f"{power}")
        asked = Gptq(**options, group=32, guidance=power)
        gptq.run(source, writer, text, asked, RUNTIME)
        made.append(seal(writer, source))
    assert made[0].facts()["file_bytes"] == made[1].facts()["file_bytes"]
    for index, block in enumerate(source.shape.blocks):
        plain, guided = (c.block(index) for c in made)
        assert any(not torch.equal(plain[f"{x.name}.weight"], guided[f"{x.name}.weight"]) for x in block.linears)
    logits = made[1].model()(input_ids=text.ids).logits
    assert bool(torch.isfinite(logits).all())


def test_a_stage_cut_short_goes_on_to_the_same_codes(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches], tmp_path: Path
) -> None:
    class Dies(Watcher):
        def step(self, **numbers: float | str) -> None:
            if self.planned[-1][0] == "gptq2-s" and numbers.get("block") == "2/3":
                raise KeyboardInterrupt

    source, text, options = build("llama", blocks=3), tokens(4), Gptq("gptq2-s", group=32, guidance=0.5)
    gptq.run(source, CheckpointWriter(tmp_path / "whole"), text, options, RUNTIME)
    with pytest.raises(KeyboardInterrupt):
        gptq.run(source, CheckpointWriter(tmp_path / "cut"), text, options, Runtime(chunk_tokens=48, progress=Dies()))
    gptq.run(source, CheckpointWriter(tmp_path / "cut"), text, options, RUNTIME)
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_the_forecast_counts_the_walk_back() -> None:
    shape = shape_from_config(PRESETS["llama-3.2-1b"])
    plain, guided = (gptq.cost(shape, Gptq(guidance=power)) for power in (0.0, 0.5))
    backwards = 3 * 32 * 512 * (shape.parameters_total - 16 * 2 * 2048 - 2048)  # the head is the embedding
    assert guided.operations == pytest.approx(plain.operations + backwards * 2.1 / 4.5, rel=1e-6)
    assert guided.scratch_bytes == plain.scratch_bytes + 16 * 32 * 512 * 2048 * 2
    small = shape_from_config(PRESETS["smollm2-135m"])  # where the logits' gradient is larger than the Hessians
    peaks = [gptq.cost(small, Gptq(guidance=power)).peak_memory_bytes for power in (0.0, 0.5)]
    assert peaks[1] > peaks[0] + 512 * 49_152 * 4
