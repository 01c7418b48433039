"""What every method of `--prune` keeps to, two of them against brute force, and the page that shows how to add one."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import ModelShape, Pattern, Unstructured, Within
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.walk import Walk
from edgepress.checkpoints.writer import CheckpointWriter, prove_pattern
from edgepress.stages import gptq, options, pruning, wanda
from edgepress.stages.options import Gptq, Wanda
from edgepress.stages.pruning import METHODS

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)
GATE = "mlp.gate_proj"
Seal = Callable[..., Checkpoint]
Run = Callable[..., Checkpoint]


@pytest.fixture
def run(build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches], seal: Seal, tmp_path: Path) -> Run:
    """The stage on three random blocks, sealed with the pattern it planned."""

    def run(source: Checkpoint | None = None, **settings: Any) -> Checkpoint:
        source, wanted = source or build("llama", blocks=3), Wanda(**settings)
        target = CheckpointWriter(tmp_path / wanted.label)
        facts = wanda.run(source, target, tokens(5), wanted, RUNTIME)
        planned = wanda.plan(source.shape, wanted)
        assert facts["pattern"] == str(planned.pattern)
        made = seal(target, source, pattern=facts["pattern"])
        assert made.shape.pattern == planned.pattern
        assert made.facts()["packed_bytes"] == packed_sizes(planned).total
        assert made.facts()["parameters_nonzero"] == planned.parameters_nonzero
        return made

    return run


def lowest(weight: Tensor, n: int, m: int) -> Tensor:
    """The weights without the n smallest of every m, by one sorted list a group; of equals the first goes."""
    flat = weight.flatten().tolist()
    for start in range(0, len(flat), m):
        for place in sorted(range(start, start + m), key=lambda i: (abs(flat[i]), i))[:n]:
            flat[place] = 0.0
    return torch.tensor(flat).view_as(weight)


@pytest.mark.parametrize(("amount", "n_of_m"), [("2:4", (2, 4)), ("1:8", (1, 8)), ("0.3", None)])
def test_magnitude_equals_brute_force(run: Run, amount: str, n_of_m: tuple[int, int] | None) -> None:
    pruned = run(pattern=amount, method="magnitude")
    source = pruned.parent()
    for index, block in enumerate(pruned.shape.blocks):
        for x in block.linears:
            n, m = n_of_m or (int(0.3 * x.in_features), x.in_features)
            assert torch.equal(pruned.base_weight(index, x), lowest(source.base_weight(index, x), n, m)), x.name


def test_equal_magnitudes_fall_to_the_lower_column(build: Callable[..., Checkpoint], run: Run) -> None:
    def ones(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(torch.where(torch.arange(parameter.shape[1]) % 2 == 0, 1.0, -1.0).expand_as(parameter))

    pruned = run(build("llama", blocks=3, edit=ones), pattern="2:4", method="magnitude")
    for x in pruned.shape.blocks[1].linears:
        expected = torch.tensor([0.0, 0.0, 1.0, -1.0]).repeat(x.in_features // 4).expand(x.out_features, -1)
        assert torch.equal(pruned.base_weight(1, x), expected)


@pytest.mark.parametrize("fraction", ["0.05", "0.5"])
def test_gate_l1_is_torchs_l1_unstructured_on_the_gates_alone(run: Run, fraction: str) -> None:
    from torch.nn.utils import prune

    pruned = run(pattern=fraction, method="gate-l1")
    source = pruned.parent()
    rows = set()
    for index, block in enumerate(pruned.shape.blocks):
        for x in block.linears:
            weight = source.base_weight(index, x)
            if x.name != GATE:
                assert torch.equal(pruned.base_weight(index, x), weight)
                assert x.pattern is None
                continue
            linear = torch.nn.Linear(x.in_features, x.out_features, bias=False)
            linear.weight.data.copy_(weight)
            prune.l1_unstructured(linear, name="weight", amount=float(fraction))
            assert torch.equal(pruned.base_weight(index, x), linear.weight.detach())
            rows |= set((linear.weight == 0).sum(1).tolist())
    assert len(rows) > 3  # one threshold for the layer, not one a row
    facts = prove_pattern(pruned, Within(Unstructured(float(fraction)), "gate_proj"))
    gate = 64 * 128
    assert (facts["expected_zeros"], facts["holds"]) == (3 * round(float(fraction) * gate), True)
    assert not prove_pattern(source, Within(Unstructured(0.05), "gate_proj"))["holds"]


def test_gate_l1_takes_whole_rows_and_n_of_m_too(build: Callable[..., Checkpoint], run: Run, tmp_path: Path) -> None:
    def faint(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[:64] *= 1e-6

    rows = run(build("llama", blocks=3, edit=faint), pattern="0.5", method="gate-l1")
    gate = next(x for x in rows.shape.blocks[0].linears if x.name == GATE)
    assert bool((rows.base_weight(0, gate)[:64] == 0).all())
    assert bool((rows.base_weight(0, gate)[64:] != 0).all())
    assert prove_pattern(rows, rows.shape.pattern or Pattern(1, 2))["holds"]
    halves = run(pattern="2:4", method="gate-l1")
    assert str(halves.shape.pattern) == "2:4 in gate_proj"
    assert torch.equal(halves.base_weight(1, gate), lowest(halves.parent().base_weight(1, gate), 2, 4))


@pytest.mark.parametrize("method", METHODS)
def test_gptq_holds_every_methods_mask(
    run: Run, tokens: Callable[..., TokenBatches], seal: Seal, tmp_path: Path, method: str
) -> None:
    pruned = run(pattern="0.5" if method == "gate-l1" else "2:4", method=method)
    target = CheckpointWriter(tmp_path / "gptq")
    gptq.run(pruned, target, tokens(5), Gptq(group=32), RUNTIME)
    pattern = pruned.shape.pattern
    assert pattern is not None
    coded = seal(target, pruned, pattern=str(pattern))
    assert coded.shape.grid is not None
    facts = prove_pattern(coded, pattern, pruned)
    assert facts["holds"]
    assert facts["kept_zeros"] == facts["expected_zeros"] > 0
    assert coded.facts()["packed_bytes"] == packed_sizes(gptq.plan(pruned.shape, Gptq(group=32))).total


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_verbs(method: str) -> None:
    module = pruning.method(method)
    assert module.NEEDS in (pruning.NOTHING, pruning.NORMS, pruning.HESSIANS, pruning.GRADIENTS)
    for verb in ("sparsity", "prune"):
        declared = inspect.signature(getattr(pruning.Method, verb))
        assert list(inspect.signature(getattr(module, verb)).parameters) == list(declared.parameters)[1:]


def test_sparsegpt_sees_the_inputs_that_the_pruned_prefix_gives(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches], run: Run
) -> None:
    """Block by block by hand: Hessians of a whole model in memory whose earlier blocks are pruned already."""
    from edgepress.stages.pruning.sparsegpt import solve

    source, pruned = build("llama", blocks=3), run(pattern="2:4", method="sparsegpt")
    model = source.model().float()
    for index, layer in enumerate(model.model.layers):
        arriving: dict[str, Tensor] = {}
        for name, linear in layer.named_modules():
            if isinstance(linear, torch.nn.Linear):
                linear.register_forward_pre_hook(lambda _, x, n=name, a=arriving: a.update({n: x[0].flatten(0, 1)}))
        with torch.no_grad():
            model(input_ids=tokens(5).ids)
        for x in pruned.shape.blocks[index].linears:
            H = arriving[x.name].T @ arriving[x.name]
            solved = solve(layer.get_submodule(x.name).weight.float(), H, Pattern(2, 4)).weight
            found = pruned.base_weight(index, x)
            same = ((found == 0) == (solved == 0)).float().mean()
            assert same > 0.999  # sums in another order may turn a tie
            assert (found - solved).norm() < 1e-2 * solved.norm()
            layer.get_submodule(x.name).weight.data.copy_(found)


def test_methods_that_need_no_statistics_run_no_block(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a block was run")

    monkeypatch.setattr("edgepress.checkpoints.checkpoint.Skeleton.run", never)
    run(pattern="2:4", method="magnitude")
    with pytest.raises(AssertionError, match="a block was run"):
        run(pattern="2:4", method="wanda")


# --- what is refused, and what is forecast ---------------------------------------------------------------------------


def smollm() -> ModelShape:
    return shape_from_config(PRESETS["smollm2-135m"])


def test_plan_refuses_what_makes_no_sense() -> None:
    attention = tuple(replace(block, linears=block.linears[:4]) for block in smollm().blocks)
    with pytest.raises(PlanError, match="--prune gate-l1 prunes gate_proj, which this model has not; it has self_attn"):
        wanda.plan(replace(smollm(), blocks=attention), Wanda("0.05", method="gate-l1"))
    masked = wanda.plan(smollm(), Wanda("2:4"))
    with pytest.raises(PlanError, match="on a model pruned at 2:4 already would leave two patterns"):
        wanda.plan(masked, Wanda("0.05", method="gate-l1"))
    again = wanda.plan(smollm(), Wanda("0.05", method="gate-l1"))
    assert wanda.plan(again, Wanda("0.05", method="gate-l1")) == again
    assert wanda.plan(again, Wanda("2:4", method="sparsegpt")).pattern == Pattern(2, 4)
    with pytest.raises(PlanError, match=r"--wanda 0.001 is less than one weight and removes nothing in .*q_proj"):
        wanda.plan(smollm(), Wanda("0.001", method="magnitude"))
    with pytest.raises(PlanError, match="--wanda 1:7 needs input widths divisible by 7"):
        wanda.plan(smollm(), Wanda("1:7", method="gate-l1"))
    with pytest.raises(PlanError, match="Put wanda before gptq"):
        wanda.plan(gptq.plan(smollm(), Gptq()), Wanda("2:4", method="sparsegpt"))


def test_hessians_count_in_the_memory_forecast() -> None:
    norms, hessians = (wanda.cost(smollm(), Wanda("2:4", method=x)).peak_memory_bytes for x in ("wanda", "sparsegpt"))
    assert hessians - norms > 2 * 4 * (576**2 + 1536**2)
    assert hessians == gptq.cost(smollm(), Gptq()).peak_memory_bytes


def test_a_fraction_of_a_layer_counts_as_one_group() -> None:
    shape = wanda.plan(smollm(), Wanda("0.5", method="gate-l1"))
    gates = [x for block in shape.blocks for x in block.linears if x.name == GATE]
    assert all(x.nonzero == 576 * 1536 // 2 for x in gates)
    assert shape.parameters_total - shape.parameters_nonzero == 30 * 576 * 1536 // 2
    # a bitmap of the layer and half of its 16-bit weights
    dense = packed_sizes(smollm()).total
    assert dense - packed_sizes(shape).total == pytest.approx(30 * (576 * 1536 * 7 // 8), rel=0.001)
    few = wanda.plan(smollm(), Wanda("0.05", method="gate-l1"))  # places of 20 bits each: no smaller than a bitmap
    assert packed_sizes(few).total <= dense + 2048


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_on_adding_a_method_can_be_followed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its file and its line, put where it says, give a method that prunes, and is planned and proven."""
    page = (Path(wanda.__file__).parent / "README.md").read_text()
    file = re.search(r"`stages/pruning/(\w+)\.py`:\n\n```python\n(.*?)```", page, re.DOTALL)
    line = re.search(r'\n    ("\S+": "edgepress\.stages\.pruning\.(\w+)",)\n', page)
    assert file and line and file[1] == line[2]
    (tmp_path / f"{file[1]}.py").write_text(file[2])
    monkeypatch.setattr(pruning, "__path__", [*pruning.__path__, str(tmp_path)])
    for name, where in eval("{" + line[1] + "}").items():
        monkeypatch.setitem(METHODS, name, where)
    importlib.invalidate_caches()
    try:
        pruned = run(pattern="2:4", method=name)
    finally:
        sys.modules.pop(where, None)
    assert pruned.shape.pattern == Pattern(2, 4)
    assert prove_pattern(pruned, Pattern(2, 4))["kept_zeros"] > 0
    with pytest.raises(PlanError, match=f"--prune nothing: there are .*{name}"):
        options.Wanda(method="nothing")


def test_walks_of_no_tokens_go_through_every_block(build: Callable[..., Checkpoint]) -> None:
    source = build("llama", blocks=3)
    walk = Walk(source, [], RUNTIME)
    seen = []
    for block in walk:
        seen.append(block.index)
        block.done()
    assert seen == [0, 1, 2]
