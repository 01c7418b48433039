"""`--prune fisher`: against gradients of the whole model in memory, what it is worth, and kills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.runtime import Runtime, Silent
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import depth, wanda
from edgepress.stages.options import Depth, Wanda
from edgepress.stages.pruning import fisher

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)
ASKED = Wanda("2:4", method="fisher")


def fisher_by_hand(checkpoint: Checkpoint, ids: Tensor) -> dict[str, Tensor]:
    """Of every projection the sum over the windows of its squared gradient, each window through the whole model."""
    model: Any = checkpoint.model()
    weights = {n: p for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    found = {n: torch.zeros_like(p) for n, p in weights.items()}
    for parameter in weights.values():
        parameter.requires_grad_(True)
    for row in ids:
        loss = F.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum")
        gradients = torch.autograd.grad(loss / (ids.numel() - len(ids)), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            found[name] += gradient.square()
    return found


def without_two_of_four(weight: Tensor, score: Tensor) -> Tensor:
    flat, scores = weight.flatten().tolist(), score.flatten().tolist()
    for start in range(0, len(flat), 4):
        for place in sorted(range(start, start + 4), key=scores.__getitem__)[:2]:
            flat[place] = 0.0
    return torch.tensor(flat).view_as(weight)


def test_the_masks_are_those_of_the_whole_models_gradients(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
) -> None:
    source, text = build("llama", blocks=3), tokens(5)
    facts = wanda.run(source, writer, text, ASKED, RUNTIME)
    sums, made = fisher_by_hand(source, text.ids), seal(writer, source, pattern="2:4")
    for index, block in enumerate(source.shape.blocks):
        for x in block.linears:
            weight, found = source.base_weight(index, x), made.base_weight(index, x)
            score = weight.square() * sums[f"model.layers.{index}.{x.name}.weight"]
            expected = without_two_of_four(weight, score)
            assert float((found != expected).float().mean()) < 2e-3, x.name  # sums in another order may turn a tie
            lost = float((score * (found == 0)).sum() / score.sum())
            assert facts["blocks"][index]["lost_score_share"][x.name] == pytest.approx(lost, rel=1e-3)


def test_the_loss_rises_less_than_by_magnitude(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    seal: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    source, text = build("llama", blocks=3), tokens(24)

    @torch.no_grad()
    def loss(checkpoint: Checkpoint) -> float:
        logits = checkpoint.model()(input_ids=text.ids).logits
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), text.ids[:, 1:].flatten()))

    losses = {}
    for method in ("fisher", "magnitude"):
        target = CheckpointWriter(tmp_path / method)
        wanda.run(source, target, text, Wanda("1:8", method=method), RUNTIME)
        losses[method] = abs(loss(seal(target, source, pattern="1:8")) - loss(source))
    assert losses["fisher"] < 0.9 * losses["magnitude"]


def test_runs_of_a_shared_block_add_up(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    seal: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    text, target = tokens(4), CheckpointWriter(tmp_path / "layers")
    depth.run(build("llama", blocks=3), target, text, Depth(layers="0-2,1"), RUNTIME)
    source = seal(target, build("llama", blocks=3), blocks=[0, 1, 2, 1])
    assert list(source.shape.firsts) == [0, 1, 2, 1]
    target = CheckpointWriter(tmp_path / "out")
    wanda.run(source, target, text, ASKED, RUNTIME)
    made, sums = seal(target, source, pattern="2:4"), fisher_by_hand(source, text.ids)
    for x in source.shape.blocks[1].linears:
        score = sum(sums[f"model.layers.{i}.{x.name}.weight"] for i in (1, 3))
        weight = source.base_weight(1, x)
        expected = without_two_of_four(weight, weight.square() * score)
        assert float((made.base_weight(1, x) != expected).float().mean()) < 2e-3
        assert torch.equal(made.base_weight(1, x), made.base_weight(3, x))


class Dies(Silent):
    """Raises once a block of a task is through; remembers the tasks."""

    def __init__(self, task: str = "", block: str = "2/3") -> None:
        self.at, self.block, self.tasks = task, block, list[str]()

    def start(self, task: str, steps: int) -> None:
        self.tasks.append(task)

    def step(self, **numbers: float | str) -> None:
        if self.tasks[-1] == self.at and numbers.get("block") == self.block:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("task", "again"), [("gradients", True), ("fisher", False)])
def test_killed_it_ends_with_the_same_bytes(
    task: str, again: bool, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches], tmp_path: Path
) -> None:
    source, text = build("llama", blocks=3), tokens(5)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    facts = wanda.run(source, CheckpointWriter(whole), text, ASKED, RUNTIME)
    for _ in range(2 if again else 1):  # twice in the gradients: nothing of the first time is in the way
        with pytest.raises(KeyboardInterrupt):
            wanda.run(source, CheckpointWriter(killed), text, ASKED, Runtime(chunk_tokens=48, progress=Dies(task)))
    watcher = Dies()
    assert wanda.run(source, CheckpointWriter(killed), text, ASKED, Runtime(chunk_tokens=48, progress=watcher)) == facts
    assert ("gradients" in watcher.tasks) == again
    for path in whole.glob("*.safetensors"):
        assert (killed / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (1, 1)])
def test_a_mask_comes_back_from_its_bits(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = fisher.packed(mask)
    assert bits.dtype == torch.uint8 and len(bits) == -(-mask.numel() // 8)
    assert torch.equal(fisher.unpacked(bits, mask.shape), mask)


def test_the_forecast_counts_every_blocks_inputs_and_the_masks() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    norms, gradients = (wanda.cost(shape, Wanda("2:4", method=name)) for name in ("wanda", "fisher"))
    states = 32 * 512 * 576 * 2
    assert gradients.scratch_bytes == 30 * states + 30 * 3_538_944 // 8
    assert gradients.peak_memory_bytes > norms.peak_memory_bytes
    assert gradients.operations > norms.operations
