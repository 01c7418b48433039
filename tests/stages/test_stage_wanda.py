"""WANDA against the published per-group loop and against a whole model with hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.masks import holds
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import Pattern
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.walk import Walk
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import gptq, wanda
from edgepress.stages.options import Gptq, Wanda
from edgepress.stages.pruning.select import lost_share
from edgepress.stages.pruning.wanda import input_norms, prune_n_of_m

pytestmark = pytest.mark.unit

PATTERNS = [(1, 8), (2, 4), (3, 4), (4, 8), (1, 16), (12, 16)]
RUNTIME = Runtime(chunk_tokens=48)


def loop(score: np.ndarray, n: int, m: int) -> np.ndarray:
    """Group by group as in the published code; of equal scores the first column goes. True is kept."""
    mask = np.ones(score.shape, dtype=bool)
    for row in range(score.shape[0]):
        for start in range(0, score.shape[1], m):
            columns = sorted(range(start, start + m), key=lambda c: (score[row, c], c))
            mask[row, columns[:n]] = False
    return mask


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_mask_equals_the_per_group_loop(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n * m)
    weight = torch.randn(24, 96, generator=generator)
    norm = torch.rand(96, generator=generator) + 0.01
    mask = prune_n_of_m(weight, norm, n, m)
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.numpy(), loop((weight.abs() * norm).numpy(), n, m))


@given(data=st.data(), pattern=st.sampled_from(PATTERNS), groups=st.integers(1, 6), rows=st.integers(1, 8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ties_fall_to_the_lower_column(data: Any, pattern: tuple[int, int], groups: int, rows: int) -> None:
    n, m = pattern
    values = data.draw(st.lists(st.integers(-2, 2), min_size=rows * groups * m, max_size=rows * groups * m))
    norms = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=groups * m, max_size=groups * m))
    weight, norm = torch.tensor(values).float().view(rows, -1), torch.tensor(norms)
    mask = prune_n_of_m(weight, norm, n, m)
    assert np.array_equal(mask.numpy(), loop((weight.abs() * norm).numpy(), n, m))
    assert bool(((~mask).view(rows, groups, m).sum(-1) == n).all())


def test_half_precision_weights_are_scored_in_float32() -> None:
    # in bfloat16 both products would round to the same number and the lower column would go
    weight = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    norm = torch.tensor([1.0001, 1.0])
    assert prune_n_of_m(weight, norm, 1, 2).tolist() == [[True, False]]


def test_width_that_the_group_does_not_divide() -> None:
    with pytest.raises(PlanError, match="2:5 needs an input width divisible by 5; this layer has 64"):
        prune_n_of_m(torch.ones(2, 64), torch.ones(64), 2, 5)


def n_of_m(pattern: str, width: int) -> tuple[int, int]:
    """A fraction is the published code's int(width * fraction) of a whole row."""
    if ":" in pattern:
        n, m = pattern.split(":")
        return int(n), int(m)
    return int(width * float(pattern)), width


def whole_stage(checkpoint: Checkpoint, chunks: list[torch.Tensor], pattern: str) -> dict[str, np.ndarray]:
    """The stage on a whole model in memory: hooks, the loop above, weights zeroed in place, next block."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    masks = {}
    for index, layer in enumerate(model.model.layers):
        linears = {name: x for name, x in layer.named_modules() if isinstance(x, torch.nn.Linear)}
        squares: dict[str, torch.Tensor] = {}

        def hook(name: str, squares: dict[str, torch.Tensor] = squares) -> Callable[..., None]:
            def record(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                total = inputs[0].flatten(0, 1).square().sum(0)
                squares[name] = squares[name] + total if name in squares else total

            return record

        handles = [x.register_forward_pre_hook(hook(name)) for name, x in linears.items()]
        with torch.no_grad():
            for ids in chunks:
                model(input_ids=ids)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            score = (linear.weight.detach().abs() * squares[name].sqrt()).numpy()
            mask = loop(score, *n_of_m(pattern, score.shape[1]))
            masks[f"{index}.{name}"] = mask
            linear.weight.data *= torch.from_numpy(mask)
    return masks


@pytest.mark.parametrize(
    ("family", "pattern"), [("llama", "1:8"), ("qwen2", "3:4"), ("gemma3", "2:4"), ("llama", "0.3")]
)
def test_the_stage_equals_sequential_pruning_of_a_whole_model(
    family: str,
    pattern: str,
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
) -> None:
    source, ids = build(family), tokens(5)
    facts = wanda.run(source, writer, ids, Wanda(pattern=pattern), RUNTIME)
    expected = whole_stage(source, ids.chunks(48), pattern)
    pruned = seal(writer, source, pattern=pattern)
    assert len(expected) == 6 * 7
    for index, block in enumerate(pruned.shape.blocks):
        before, after = source.block(index), pruned.block(index)
        assert before.keys() == after.keys()
        linears = {x.name for x in block.linears}
        for name, tensor in after.items():
            layer = name.removesuffix(".weight")
            if layer in linears:
                mask = torch.from_numpy(expected[f"{index}.{layer}"])
                assert torch.equal(tensor, before[name] * mask), f"{index}.{layer}"
                assert holds(tensor, Pattern(*n_of_m(pattern, tensor.shape[1])))
            else:
                assert torch.equal(tensor, before[name])
        assert facts["blocks"][index]["lost_score_share"].keys() == linears
    for name, tensor in source.outer().items():
        assert torch.equal(pruned.outer()[name], tensor)
    assert wanda.plan(source.shape, Wanda(pattern=pattern)).parameters_nonzero == pruned.shape.parameters_nonzero
    assert pruned.facts()["parameters_nonzero"] == pruned.shape.parameters_nonzero


def test_statistics_come_once_per_distinct_input_and_equal_a_float64_sum(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    source, ids = build("llama"), tokens(5)
    walk = iter(Walk(source, ids.chunks(48), RUNTIME))
    visit = next(walk)
    groups: list[tuple[str, ...]] = []
    visit.observe(lambda names, x: groups.append(names))
    q, k, v = (f"self_attn.{x}_proj" for x in "qkv")
    per_chunk = [(q, k, v), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    assert groups == per_chunk * 3
    norms = input_norms(visit)
    model = source.model().double()
    arriving: dict[str, torch.Tensor] = {}
    for name, linear in model.model.layers[0].named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(lambda _, x, name=name: arriving.update({name: x[0].flatten(0, 1)}))
    with torch.no_grad():
        model(input_ids=ids.ids)
    assert norms.keys() == arriving.keys()
    for name, x in arriving.items():
        assert norms[name].dtype == torch.float32
        torch.testing.assert_close(norms[name].double(), x.square().sum(0).sqrt(), rtol=1e-5, atol=0)


def test_lost_share_is_the_dropped_part_of_the_score() -> None:
    score = torch.tensor([[2.0, 1.0], [6.0, 2.0]])  # sum 11
    assert lost_share(score, torch.tensor([[False, True], [True, True]])) == pytest.approx(2 / 11)
    assert lost_share(score, torch.tensor([[True, False], [True, False]])) == pytest.approx(3 / 11)
    assert lost_share(score, torch.ones(2, 2, dtype=torch.bool)) == 0
    assert lost_share(score, torch.zeros(2, 2, dtype=torch.bool)) == pytest.approx(1)
    assert lost_share(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool)) == 0


def test_plan_names_every_layer_whose_width_does_not_fit() -> None:
    shape = shape_from_config(PRESETS["stories260k"])  # widths 64 and 172
    with pytest.raises(PlanError) as caught:
        wanda.plan(shape, Wanda(pattern="1:8"))
    assert str(caught.value) == ("--wanda 1:8 needs input widths divisible by 8; these are not: mlp.down_proj (172)")
    with pytest.raises(PlanError) as caught:
        wanda.plan(shape, Wanda(pattern="1:3"))
    for layer in ("q_proj (64)", "k_proj (64)", "v_proj (64)", "o_proj (64)", "up_proj (64)", "down_proj (172)"):
        assert layer in str(caught.value)
    planned = wanda.plan(shape, Wanda(pattern="2:4"))
    assert planned.pattern == Pattern(2, 4)
    weights = sum(x.weights for block in shape.blocks for x in block.linears)
    assert planned.parameters_nonzero == shape.parameters_total - weights // 2


def test_plan_refuses_quantised_weights() -> None:
    quantised = gptq.plan(shape_from_config(PRESETS["smollm2-135m"]), Gptq())
    with pytest.raises(PlanError, match="Put wanda before gptq"):
        wanda.plan(quantised, Wanda(pattern="2:4"))
