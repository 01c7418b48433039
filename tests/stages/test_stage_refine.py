"""Stage gptq with `--quant-effort high` on tiny models: its files, its promise, and that it goes on after a kill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.headers import read_header
from edgepress.checkpoints.manifest import Manifest
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.walk import Walk
from edgepress.checkpoints.writer import CheckpointWriter, verify
from edgepress.stages import gptq, refine
from edgepress.stages.options import Gptq
from tests.stages.lora_help import Watcher

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)
SAMPLES = 8
Build = Callable[..., Checkpoint]


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them from 8 x 24 tokens, as a real calibration has."""
    monkeypatch.setattr(gptq, "REFINE_TOKENS", 48)


def high(**changes: Any) -> Gptq:
    return Gptq(**({"quant": "gptq3", "group": 32, "effort": "high", "effort_steps": 8} | changes))


def normal(**changes: Any) -> Gptq:
    return high(effort="normal", **changes)


def outputs(checkpoint: Checkpoint, ids: Tensor) -> list[Tensor]:
    """Hidden states after each block, by transformers' own pass through the whole model."""
    model, found = checkpoint.model(), []
    handles = [
        layer.register_forward_hook(lambda _, __, y: found.append(y[0] if isinstance(y, tuple) else y))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


def block_errors(source: Checkpoint, result: Checkpoint, ids: Tensor) -> list[float]:
    """Of each block: squared error of its output relative to the token's size, mean over tokens."""
    pairs = zip(outputs(source, ids), outputs(result, ids), strict=True)
    return [float(((x - y).square().sum(-1) / x.square().sum(-1)).mean()) for x, y in pairs]


def tell_the_truth(result: Checkpoint) -> Checkpoint:
    """The test's manifest with the numbers that a run writes."""
    manifest = Manifest.read(result.folder)
    for key, value in result.facts().items():
        setattr(manifest, key, value)
    manifest.write(result.folder)
    return Checkpoint.open(result.folder)


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3"])
def test_it_beats_normal_effort_on_the_blocks_outputs_in_files_of_the_same_form(
    family: str, build: Build, tokens: Callable[..., TokenBatches], tmp_path: Path, seal: Callable[..., Checkpoint]
) -> None:
    source, batches, made, facts = build(family, blocks=3), tokens(SAMPLES), {}, {}
    state = torch.random.get_rng_state()
    for options in (normal(), high()):
        writer = CheckpointWriter(tmp_path / options.effort)
        facts[options.effort] = gptq.run(source, writer, batches, options, RUNTIME)
        made[options.effort] = tell_the_truth(seal(writer, source))
    assert torch.equal(torch.random.get_rng_state(), state)
    folders = [made[effort].folder for effort in ("normal", "high")]
    names = [sorted(p.name for p in folder.glob("*.safetensors")) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        assert read_header(folders[0] / name) == read_header(folders[1] / name)
        assert (folders[0] / name).stat().st_size == (folders[1] / name).stat().st_size
    assert made["normal"].config == made["high"].config
    assert packed_sizes(made["normal"].shape) == packed_sizes(made["high"].shape)
    assert len(verify(made["high"])) >= 5

    mine, plain = (block_errors(source, made[effort], batches.ids) for effort in ("high", "normal"))
    assert mine[-1] < 0.95 * plain[-1]
    for index, block_facts in enumerate(facts["high"]["blocks"]):
        said = block_facts["refined"]
        assert said["error_after"] <= said["error_before"]
        # what was measured while tuning is what the files, read back, give
        assert said["error_after"] == pytest.approx(mine[index], rel=2e-3)
        assert "refined" not in facts["normal"]["blocks"][index]


def test_norms_are_written_and_no_norm_s_name_is_missed(
    build: Build, tokens: Callable[..., TokenBatches], writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    source = build("gemma3", blocks=1)
    gptq.run(source, writer, tokens(SAMPLES), high(effort_steps=24), RUNTIME)
    result = seal(writer, source)
    names = {n for n in source.block(0) if "norm" in n}
    assert {n.split(".")[-2] for n in names} == {
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        "q_norm", "k_norm",
    }  # fmt: skip
    for name in names:
        before, after = source.block(0)[name], result.block(0)[name]
        assert not torch.equal(before, after), name
        assert float((after - before).abs().max()) < 0.02 * float((1 + before).abs().mean())


def test_layers_that_the_format_cannot_hold_stay_exact(
    build: Build, tokens: Callable[..., TokenBatches], writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    source = build("llama", blocks=1, intermediate_size=172)
    facts = gptq.run(source, writer, tokens(SAMPLES), high(symmetric=True, effort_steps=24), RUNTIME)
    result, said = seal(writer, source), facts["blocks"][0]["refined"]
    assert said["error_after"] < said["error_before"]
    for linear in result.shape.blocks[0].linears:
        assert (linear.grid is None) == linear.name.startswith("mlp.")
        name = f"{linear.name}.weight"
        assert torch.equal(source.block(0)[name], result.block(0)[name]) == (linear.grid is None)


def test_the_mask_holds_and_verify_says_so(
    masked: Checkpoint, tokens: Callable[..., TokenBatches], writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    gptq.run(masked, writer, tokens(SAMPLES), high(), RUNTIME)
    result = tell_the_truth(seal(writer, masked, pattern="2:4"))
    for index in range(3):
        before, after = masked.block(index), result.block(index)
        for linear in masked.shape.blocks[index].linears:
            name = f"{linear.name}.weight"
            assert not after[name][before[name] == 0].any()
    assert any(line.startswith("2:4: ") for line in verify(result))


# --- what is said before the run -----------------------------------------------------------------------------------


def test_the_forecast_counts_what_tuning_holds_of_one_block() -> None:
    shape = shape_from_config(PRESETS["llama-3.2-1b"])
    effort = {e: gptq.cost(shape, Gptq(effort=e)).peak_memory_bytes for e in ("normal", "high")}
    weights = sum(x.weights for x in shape.blocks[0].linears)
    # position, gradient, two moments, level and weight in float32, and the block itself in 16 bit
    assert effort["high"] > max(effort["normal"], (6 * 4 + 2) * weights)
    assert effort["high"] < effort["normal"] + 48 * weights
    deeper = replace(shape, blocks=shape.blocks * 3)
    assert gptq.cost(deeper, Gptq(effort="high")).peak_memory_bytes == effort["high"]


def test_the_plan_says_that_it_takes_longer() -> None:
    shape = shape_from_config(PRESETS["llama-3.2-1b"])
    (remark,) = gptq.remarks(shape, Gptq(effort="high", effort_steps=40))
    assert "40 gradient steps in each of 16 blocks" in remark
    assert gptq.remarks(shape, Gptq()) == []


# --- the dense blocks beside it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [[0, 1, 2], [2], [1, 2]])
def test_dense_outputs_are_the_models_own_and_leave_no_weights(
    asked: list[int], build: Build, tokens: Callable[..., TokenBatches]
) -> None:
    source, batches = build("qwen2", blocks=3), tokens(SAMPLES)
    chunks, expected = batches.chunks(48), outputs(source, batches.ids)
    dense = refine.DenseOutputs(source, chunks, RUNTIME)
    for index in asked:
        torch.testing.assert_close(torch.cat(list(dense.of(index))), expected[index], rtol=1e-4, atol=1e-4)
        assert all(p.is_meta for block in dense._walk.skeleton.blocks for p in block.parameters())


def test_targets_are_what_the_stage_was_given_whatever_was_quantised_before(
    masked: Checkpoint, tokens: Callable[..., TokenBatches], writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    real = refine.refine

    def spy(block: Any, layers: Any, targets: Any, *rest: Any) -> dict[str, float]:
        seen.append(torch.cat(list(targets)))
        return real(block, layers, targets, *rest)

    monkeypatch.setattr(refine, "refine", spy)
    batches = tokens(SAMPLES)
    gptq.run(masked, writer, batches, high(effort_steps=2), RUNTIME)
    for mine, expected in zip(seen, outputs(masked, batches.ids), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


# --- a kill --------------------------------------------------------------------------------------------------------


class Dies(Watcher):
    """Raises once `block` is through."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self.block = block

    def step(self, **numbers: float | str) -> None:
        if numbers.get("block") == self.block:
            raise KeyboardInterrupt


def test_killed_inside_and_between_blocks_it_ends_with_the_same_bytes(
    masked: Checkpoint, tokens: Callable[..., TokenBatches], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, options = tokens(SAMPLES), high(effort_steps=2)
    undisturbed = CheckpointWriter(tmp_path / "undisturbed")
    facts = gptq.run(masked, undisturbed, batches, options, RUNTIME)

    folder, steps = tmp_path / "killed", 0
    real = torch.optim.Adam.step

    def dying(self: torch.optim.Adam, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2 + 2:  # in the middle of the second block's steps
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            gptq.run(masked, CheckpointWriter(folder), batches, options, RUNTIME)
    with pytest.raises(KeyboardInterrupt):
        gptq.run(masked, CheckpointWriter(folder), batches, options, Runtime(progress=Dies("2/3")))
    visited: list[int] = []
    observe = Walk.advance
    monkeypatch.setattr(Walk, "advance", lambda walk, visit, f: (visited.append(visit.index), observe(walk, visit, f)))
    assert gptq.run(masked, CheckpointWriter(folder), batches, options, RUNTIME) == facts
    assert visited == [0, 1, 2, 2]  # the dense blocks again up to the third, which alone is quantised
    for path in sorted(undisturbed.folder.glob("*.safetensors")):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
