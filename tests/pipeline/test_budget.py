"""`--budget` and `rank --metric bits`: the program against brute force, the loss against its formula, the chain."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.image import pack_checkpoint
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import Pattern, with_blocks, with_pattern
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.hardware.needs import room_for
from edgepress.hardware.placement import weight_bytes
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.allocate import (
    Budget,
    Candidates,
    Chooser,
    Plan,
    Removal,
    TooSmallError,
    bought,
    candidates,
    family,
    layer_sizes,
    rules,
    solve,
)
from edgepress.pipeline.budget import (
    RANKS,
    candidate_stages,
    corrected,
    corrected_blocks,
    corrected_left,
    variants,
)
from edgepress.pipeline.formats import FORMATS, Wanted, module_of
from edgepress.pipeline.plan import plan as planned
from edgepress.pipeline.recipe import Recipe, build
from edgepress.stages import depth, eora, sensitivity
from edgepress.stages.options import Depth, Eora, Gptq
from edgepress.stages.quantisers import gptq
from edgepress.stages.sensitivity import Sensitivity

SHAPE = shape_from_config(PRESETS["smollm2-135m"])


@pytest.mark.unit
@pytest.mark.parametrize("seed", range(8))
def test_the_program_finds_what_brute_force_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int) -> int:
        return int(torch.randint(1, high, (1,), generator=generator))

    choices = [[(drawn(10**6) / 10**6, drawn(5000)) for _ in range(2 + seed % 3)] for _ in range(6)]
    sizes = [sum(choice[1] for choice in plan) for plan in itertools.product(*choices)]
    for limit in (min(sizes), (min(sizes) + max(sizes)) // 2, max(sizes)):
        possible = (p for p in itertools.product(*choices) if sum(choice[1] for choice in p) <= limit)
        best = min(sum(choice[0] for choice in plan) for plan in possible)
        found = solve(choices, limit)
        assert found is not None
        taken = [options[at] for options, at in zip(choices, found, strict=True)]
        assert sum(size for _, size in taken) <= limit and sum(loss for loss, _ in taken) == pytest.approx(
            best, abs=1e-5
        )
    assert solve(choices, min(sizes) - 1) is None


@pytest.mark.unit
@pytest.mark.parametrize("seed", range(6))
def test_the_program_removes_the_blocks_that_brute_force_removes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int) -> int:
        return int(torch.randint(1, high, (1,), generator=generator))

    choices = [[(drawn(10**6) / 10**6, drawn(5000)) for _ in range(3)] for _ in range(6)]
    removals = [Removal(drawn(10**6) / 6e5, drawn(900), frozenset({2 * i, 2 * i + 1})) for i in range(2)]
    plans = []
    for gone in itertools.product([False, True], repeat=2):
        left = [at for at in range(6) if not any(g and at in r.members for g, r in zip(gone, removals, strict=True))]
        free = sum(r.freed for g, r in zip(gone, removals, strict=True) if g)
        lost = sum(r.loss for g, r in zip(gone, removals, strict=True) if g)
        for taken in itertools.product(range(3), repeat=len(left)):
            own = [choices[at][way] for at, way in zip(left, taken, strict=True)]
            where = [dict(zip(left, taken, strict=True)).get(at, -1) for at in range(6)]
            plans.append((lost + sum(x for x, _ in own), sum(x for _, x in own) - free, where))
    sizes = [size for _, size, _ in plans]
    seen = set()
    for limit in sorted(sizes)[:: len(sizes) // 5]:
        best, _, where = min(plan for plan in plans if plan[1] <= limit)
        found = solve(choices, limit, removals)
        assert found is not None and [plan[0] for plan in plans if plan[2] == found] == [pytest.approx(best, abs=1e-5)]
        seen.add(where.count(-1))
    assert len(seen) > 1  # with and without removed blocks
    assert solve(choices, min(sizes) - 1, removals) is None
    for count in (1, 2):
        fewer = [plan for plan in plans if plan[2].count(-1) >= 2 * count]
        best, _, where = min(fewer)
        assert solve(choices, max(sizes), removals, count) == where


@pytest.mark.unit
def test_a_plan_without_blocks_is_a_recipe_of_its_bytes() -> None:
    shape, options = with_blocks(SHAPE, range(10)), Gptq(quant="gptq4-s")
    ways = candidates(shape, options, "gptq4-s")
    budget, limits = Budget.parse("27MB", shape), Depth(protect_first=3, protect_last=1)
    chooser = Chooser(shape, budget, options, ways, (4, 8), Candidates(limits))
    assert chooser.smallest.removed == tuple(range(3, 9))
    losses = {layer: {way: (1 + layer[0]) / size for way, size in own.items()} for layer, own in chooser.sizes.items()}
    blocks = {i: 1e-9 if i in (5, 7) else 9.0 for i in range(3, 9)}
    plan = chooser.choose(Sensitivity(losses, {}, {4: 1e-5, 8: 0.0}, 0.0, blocks))
    assert plan.removed == (5, 7) and plan.nbytes <= budget.nbytes
    assert all(block not in (5, 7) for block, _ in plan.layers)
    assert plan.loss == pytest.approx(
        2e-9 + (1e-5 if plan.embedding == 4 else 0) + sum(losses[layer][way] for layer, way in plan.layers.items())
    )
    (_, stage), (_, own) = plan.stages()
    assert isinstance(stage, Depth) and stage.sequence == [i for i in range(10) if i not in (5, 7)]
    recipe = Recipe(model="smollm2-135m", stages=plan.stages())
    last = planned(recipe, shape)[-1].shape
    assert packed_sizes(last).total == plan.nbytes and len(last.blocks) == 8
    assert isinstance(own, Gptq)
    for (block, name), (quant, group) in plan.layers.items():
        after = own.of(stage.sequence.index(block), name)
        assert (after.quant, after.group) == (quant, group)
    rows = list(bought(chooser, plan, Sensitivity(losses, {}, {4: 1e-5, 8: 0.0}, 0.0, blocks)))
    assert rows[-1].settings == "5,7 removed" and rows[-1].more < 0
    assert sum(row.nbytes for row in rows) == pytest.approx(plan.nbytes, abs=2**15)  # the header lists unlike blocks
    assert sum(row.loss for row in rows) == pytest.approx(plan.loss)
    every = Sensitivity(losses, {}, {4: 1e-5, 8: 0.0}, 0.0, dict.fromkeys(range(3, 9), 9.0))
    assert not chooser.choose(every).removed
    bare = Chooser(shape, budget, options, ways, (4, 8), Candidates(Depth(protect_first=0, protect_last=0)))
    assert bare.blocks == tuple(range(1, 10))  # one stays
    offers = chooser.proposals(Sensitivity(losses, {}, {4: 1e-5, 8: 0.0}, 0.0, blocks))
    assert offers[0].stages() == plan.stages() and offers == sorted(offers, key=lambda offer: offer.loss)
    assert {(offer.embedding, bool(offer.removed)) for offer in offers} == {
        (4, True),
        (4, False),
    }  # 8 bits: 28 MB alone
    again = with_blocks(shape, [*range(10), 9])  # its last block runs twice: none goes
    assert not Chooser(again, budget, options, ways, (4, 8), Candidates(limits)).blocks


@pytest.mark.unit
def test_blocks_go_until_the_rest_of_the_chip_suffices() -> None:
    """Bytes alone would keep all blocks; the cheapest go, and no more than must."""
    shape, options = with_blocks(SHAPE, range(8)), Gptq(quant="gptq4-s")
    budget, ways, beside = Budget.parse("27MB", shape), candidates(shape, options, "gptq4-s"), Candidates(Depth())

    def chooser(most: int) -> Chooser:
        accepts = lambda after: len(after.blocks) <= most  # noqa: E731
        limits = replace(beside, depth=Depth(protect_first=1, protect_last=1))
        return Chooser(shape, budget, options, ways, (4,), limits, accepts=accepts)

    own = chooser(6)
    losses = {layer: {way: 1 / size for way, size in sizes.items()} for layer, sizes in own.sizes.items()}
    found = Sensitivity(losses, {}, {4: 0.0}, 0.0, {i: 9.0 - i for i in range(1, 7)})
    assert not chooser(8).choose(found).removed
    assert own.choose(found).removed == (5, 6) and len(own.after(own.choose(found)).blocks) == 6
    assert all(offer.removed for offer in own.proposals(found))
    with pytest.raises(TooSmallError, match=r"has no room for what is computed with it"):
        chooser(1)
    with pytest.raises(PlanError, match="nothing to do"):
        Chooser(shape, Budget("", budget.size(shape, "")), options, ways, (4,), accepts=lambda _: True)


@pytest.mark.unit
def test_an_adapter_is_chosen_where_its_bytes_beat_more_bits() -> None:
    shape, options = with_blocks(SHAPE, range(6)), Gptq(quant="gptq4-s")
    ways = candidates(shape, options, "gptq4-s")
    budget, adapters = Budget.parse("24MB", shape), tuple(Eora(rank=rank, bits=8) for rank in (8, 16, 512))
    chooser = Chooser(shape, budget, options, ways, (4,), Candidates(eora=adapters))
    assert [own.rank for own in chooser.adapters] == [8, 16]  # k_proj has rank 192
    losses = {layer: {way: 1 / size for way, size in own.items()} for layer, own in chooser.sizes.items()}

    def predicted(shares: dict[int, float]) -> Sensitivity:
        return Sensitivity(losses, {}, {4: 0.0}, 0.0, {}, dict.fromkeys(losses, shares))

    assert chooser.choose(predicted({8: 0.99, 16: 0.98})).eora is None
    for shares, rank in (({8: 0.3, 16: 0.299}, 8), ({8: 0.3, 16: 0.05}, 16)):
        plan = chooser.choose(predicted(shares))
        assert plan.eora is not None and plan.eora.rank == rank and plan.nbytes <= budget.nbytes
        last = planned(Recipe(model="smollm2-135m", stages=plan.stages()), shape)[-1].shape
        assert packed_sizes(last).total == plan.nbytes and packed_sizes(last).adapters > 0
        rows = {row.part: row for row in bought(chooser, plan, predicted(shares))}
        assert rows["eora"].nbytes == pytest.approx(packed_sizes(last).adapters, rel=0.01)
        assert sum(row.loss for row in rows.values()) == pytest.approx(plan.loss)


@pytest.mark.unit
def test_what_an_adapter_left_corrects_what_it_would_leave() -> None:
    left = {(0, "q"): {8: 0.8, 16: 0.6}, (1, "q"): {8: 0.9, 16: 0.5}, (2, "q"): {8: 0.4, 16: 0.2}}
    assert corrected_left(left, []) == left
    found = corrected_left(left, [(Eora(rank=8), {(0, "q"): 0.4, (1, "q"): 0.99})])
    assert found[0, "q"] == pytest.approx({8: 0.4, 16: 0.3}) and found[1, "q"] == pytest.approx({8: 0.99, 16: 0.55})
    assert found[2, "q"] == pytest.approx({8: 0.32, 16: 0.16})  # as the median of the others


@pytest.mark.unit
def test_what_blocks_cost_together_corrects_what_each_costs_alone() -> None:
    alone = {4: 0.1, 5: 0.2, 6: 0.3}
    assert corrected_blocks(alone, []) == alone
    found = corrected_blocks(alone, [((4, 5), 0.5)])
    assert found == pytest.approx({4: 0.2, 5: 0.3, 6: 0.4})
    found = corrected_blocks(alone, [((4, 5), 0.5), ((6,), 0.3), ((), 0.0)])
    assert found == pytest.approx({4: 0.15, 5: 0.25, 6: 0.35})


@pytest.mark.unit
@pytest.mark.parametrize(
    ("flags", "skip", "limits", "ranks", "runs"),
    [
        ({}, "", Depth(), RANKS, set()),
        ({"depth.protect_first": 1, "wanda.pattern": "2:4"}, "", Depth(protect_first=1), RANKS, {"wanda"}),
        ({"depth.remove": 2}, "", None, RANKS, {"depth"}),
        ({"depth.remove": 0}, "", None, RANKS, set()),
        ({"depth.layers": "0-3", "tune.steps": 2}, "eora", None, (), {"depth", "tune"}),
        ({"eora.rank": 4}, "", Depth(), (), {"eora"}),
        ({"eora.rank": 0}, "", Depth(), (), set()),
        ({}, "depth, eora", None, (), set()),
    ],
)
def test_which_stages_a_budget_has_to_choose_from(
    flags: dict[str, Any], skip: str, limits: Depth | None, ranks: tuple[int, ...], runs: set[str]
) -> None:
    rest, left_out, found = candidate_stages(flags, skip)
    assert found.depth == limits and tuple(own.rank for own in found.eora) == ranks
    assert {name for name, _ in build(None, rest, left_out).stages} == {*runs, "gptq"}


@pytest.mark.unit
@pytest.mark.parametrize("budget", ["55MiB", "4.5bits", "siracusa:hyperram=64MiB", "siracusa"])
def test_what_a_budget_is_and_what_a_plan_takes_of_it(budget: str) -> None:
    soc = load_soc(budget) if "siracusa" in budget else None
    wanted = {"55MiB": 55 * 2**20, "4.5bits": int(4.5 * SHAPE.parameters_total / 8)}
    found = Budget.parse(budget, SHAPE)
    assert found.nbytes == (wanted[budget] if soc is None else room_for(soc, "weights"))
    options, ways = Gptq(quant="gptq4-s"), candidates(SHAPE, Gptq(quant="gptq4-s"), "gptq4-s")
    if budget == "siracusa" or found.nbytes < 2**24:
        with pytest.raises(PlanError, match=r"the smallest model that --budget can make has .*gptq2-s"):
            Chooser(SHAPE, found, options, ways, (4, 8))
        return
    chooser = Chooser(SHAPE, found, options, ways, (4, 8))
    losses = {
        layer: {way: (1 + layer[0] % 5) / size for way, size in sizes.items()} for layer, sizes in chooser.sizes.items()
    }
    plan = chooser.choose(Sensitivity(losses, {}, {4: 1e-5, 8: 0.0}, 0.0))
    assert found.nbytes - 2**16 < plan.nbytes <= found.nbytes
    from edgepress.stages import gptq as stage

    after = stage.plan(SHAPE, plan.options)
    assert plan.nbytes == (packed_sizes(after).total if soc is None else weight_bytes(after, soc.layout).total)
    for i, block in enumerate(after.blocks):
        for x in block.linears:
            quant, _ = plan.layers[i, x.name]
            assert x.grid is not None and f"gptq{x.grid.bits}-s" == quant


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("60 parsecs", "there is no unit parsecs"),
        ("sixty", "neither bytes"),
        ("-5MiB", "neither bytes"),
        ("1.2.3MiB", "is no number"),
        ("10MiB", "the smallest model that --budget can make has"),
        ("1GiB", "there is nothing to do"),
    ],
)
def test_budgets_that_cannot_be(text: str, said: str) -> None:
    options = Gptq(quant="gptq4-s")
    with pytest.raises(PlanError, match=said):
        Chooser(SHAPE, Budget.parse(text, SHAPE), options, candidates(SHAPE, options, "gptq4-s"), (4, 8))


@pytest.mark.unit
def test_the_family_is_what_one_model_and_its_mask_can_hold() -> None:
    assert family("gptq4-s") == ("gptq2-s", "gptq3-s", "gptq4-s", "gptq5-s")
    assert set(family("q4_k")) == {"q2_k", "q3_k", "q4_k", "q5_k", "q6_k"}
    for quant in ("nf4", "int8", "awq4"):
        with pytest.raises(PlanError, match=f"{quant} has no others beside it"):
            family(quant)
    pruned = with_pattern(SHAPE, Pattern(2, 4))
    assert {quant for quant, _ in candidates(pruned, Gptq(quant="q4_k"), "q4_k")} == {"q3_k", "q6_k"}


@pytest.mark.unit
def test_rules_say_every_layers_way() -> None:
    layers = {
        (i, n): (f"gptq{2 + (i * 7 + len(n)) % 3}-s", 32 << i % 2) for i in range(9) for n in ("a.q", "a.k", "m.up")
    }
    options = Gptq(quant="gptq4-s", layers=rules(layers))
    assert {key: (options.of(*key).quant, options.of(*key).group) for key in layers} == layers


@pytest.mark.unit
def test_what_the_solver_left_corrects_the_prediction() -> None:
    a, b, c = ("gptq2-s", 32), ("gptq2-s", 64), ("gptq3-s", 32)
    losses = {(i, "q"): {a: 8.0 + i, b: 9.0, c: 1.0, ("gptq4-s", 32): 0.5} for i in range(10)}
    errors = {layer: dict.fromkeys(ways, 0.4) for layer, ways in losses.items()}
    ways = [a, b, a, b, a, a, b, a, a, c]
    plan = Plan({(i, "q"): way for i, way in enumerate(ways)}, 8, Gptq(), 0, 0.0)
    factors = [0.5, 1.5, 20.0, 1.5, 1.5, 1.7, 0.9, 1.5, 1.5, 40.0]
    found = corrected(losses, errors, [(plan, {(i, "q"): 0.4 * x for i, x in enumerate(factors)})])
    for layer, own in losses.items():  # neither a layer far off nor a quantiser of one layer steers by itself
        assert found[layer] == pytest.approx({way: x * 1.5 for way, x in own.items()})
    several = {layer: 0.4 * x for layer, x in zip(plan.layers, [2.0] * 9 + [1.0], strict=True)}
    found = corrected(losses, errors, [(plan, several)])
    assert found[0, "q"] == pytest.approx({a: 16.0, b: 18.0, c: 2.0, ("gptq4-s", 32): 1.0})
    assert corrected(losses, errors, []) == losses


@pytest.mark.unit
def test_a_layers_loss_is_half_its_error_under_the_fisher_information(tiny_llama: Path) -> None:
    """Against gradients and inputs of the whole model, and the solver on all rows."""
    source = Checkpoint.open(tiny_llama)
    ids = torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(0))
    options = Gptq(group=32)
    found = sensitivity.measure(
        source, TokenBatches("t", ids), options, [("gptq4", 32)], (4,), Runtime(chunk_tokens=48), ranks=(4, 32)
    )

    model = source.model().float()
    seen: dict[str, Any] = {}

    def keep(_: Any, inputs: Any, output: Any) -> None:
        output.retain_grad()
        seen["x"], seen["y"] = inputs[0].detach().flatten(0, 1), output

    for index, name in ((0, "self_attn.q_proj"), (3, "mlp.down_proj")):
        linear = model.model.layers[index].get_submodule(name)
        handle = linear.register_forward_hook(keep)
        model.requires_grad_(True)
        logits = model(input_ids=ids).logits
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        nll.backward()
        handle.remove()
        x, squares = seen["x"], seen["y"].grad.flatten(0, 1).square().mean(dim=0)
        solved = gptq.solve(linear.weight.detach(), x.T @ x, None, sensitivity.Grid(4, 32), options)
        delta = linear.weight.detach() - solved.weight
        wanted = 0.5 * float((squares * ((delta @ (x.T @ x)) * delta).sum(dim=1)).sum()) / (4 * 23)
        assert found.losses[index, name]["gptq4", 32] == pytest.approx(wanted, rel=0.02)
        assert found.errors[index, name]["gptq4", 32] == pytest.approx(solved.error, rel=0.02)
        S = torch.linalg.svdvals(delta.double() @ x.T.double())  # over tokens: as with the root of x^T x
        for rank in (4, 32):
            left = float(S[rank:].square().sum() / S.square().sum())
            assert found.left[index, name][rank] == pytest.approx(left, rel=0.02, abs=1e-3)
            B, A = eora.compensate(delta, x.T @ x, rank)  # what the stage itself would leave
            after = eora.output_energy(delta - B @ A, x.T @ x) / eora.output_energy(delta, x.T @ x)
            assert found.left[index, name][rank] == pytest.approx(after, rel=0.02, abs=1e-3)
        assert found.loss == pytest.approx(float(nll.detach()) / (4 * 23), rel=1e-3)
    assert sensitivity.Sensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found


FLAGS = ("--data", "embedded", "--window", "64", "--tokens", "512", "--quant-samples", "4", "--quant-length", "64")


@pytest.mark.pipeline
def test_the_best_plan_for_a_budget_runs_and_resumes(
    make_tiny: Callable[..., Path], compress: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_tiny(tmp_path / "model", blocks=2)
    command = (model, *FLAGS, "--quant", "q4_k", "--budget", "75KB", "-o", tmp_path / "out", "--json")
    done = compress("run", *command)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["budget"]
    best = told["rounds"][told["best"]]
    assert best["perplexity"] == min(r["perplexity"] for r in told["rounds"])
    assert best["quant_embeddings"] in (4, 8) and best["predicted_bytes"] == best["bytes"] <= 75_000
    result = Checkpoint.open(tmp_path / "out" / "result")
    assert pack_checkpoint(result, tmp_path / "image").nbytes == best["bytes"]
    assert result.manifest is not None and result.manifest.options["layers"] == best["layers"]
    again = compress("run", *command)
    stages = json.loads(again.stdout)["stages"]
    assert all(stage["reused"] for stage in stages) and json.loads(again.stdout)["budget"] == told
    assert json.loads((tmp_path / "out" / "budget.json").read_text())["rounds"] == told["rounds"]


@pytest.mark.pipeline
def test_where_bits_alone_do_not_fit_a_block_goes(
    make_tiny: Callable[..., Path], compress: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_tiny(tmp_path / "model", blocks=4)
    shape, options, limits = Checkpoint.open(model).shape, Gptq(quant="q4_k"), Depth(protect_first=1, protect_last=1)
    ways, room = candidates(shape, options, "q4_k"), Budget("", packed_sizes(shape).total - 1)
    every = Chooser(shape, room, options, ways, (4, 8)).smallest.nbytes
    fewer = Chooser(shape, room, options, ways, (4, 8), Candidates(limits)).smallest.nbytes
    budget = (every + fewer) // 2
    flags = (*FLAGS, "--protect-first", "1", "--protect-last", "1")
    command = (model, *flags, "--quant", "q4_k", "--budget", f"{budget}B", "-o", tmp_path / "out")
    done = compress("run", *command)
    assert done.returncode == 0, done.stderr
    assert "the absence of each of 2 blocks costs" in done.stdout and "removed" in done.stdout
    told = json.loads((tmp_path / "out" / "budget.json").read_text())
    best = told["rounds"][told["best"]]
    gone = best["removed_blocks"]
    assert gone and set(gone) <= {1, 2} and best["predicted_bytes"] == best["bytes"] <= budget
    assert told["bought"][-1]["part"] == "blocks" and told["bought"][-1]["more"] < 0
    result = Checkpoint.open(tmp_path / "out" / "result")
    assert pack_checkpoint(result, tmp_path / "image").nbytes == best["bytes"]
    assert result.manifest is not None
    assert result.manifest.origin["blocks"] == [i for i in range(4) if i not in gone]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [s["stage"] for s in report["stages"]] == ["depth", "gptq"]
    assert report["recipe"]["stages"][0]["depth"]["layers"] == best["depth_layers"]
    again = compress("run", *command, "--json")
    assert all(s["reused"] for s in json.loads(again.stdout)["stages"])
    refused = compress("run", *command[:-4], "--budget", f"{budget}B", "--skip", "depth", "-o", tmp_path / "out")
    assert refused.returncode == 2 and "the smallest model that --budget can make" in refused.stderr


@pytest.mark.unit
def test_the_loss_without_a_block_is_that_of_the_model_without_it(tiny_llama: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    ids = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(1))

    def loss(kept: list[int]) -> float:
        model = source.model().float()
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
        logits = model(input_ids=ids, use_cache=False).logits
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).detach())

    found = depth.losses_without(source, TokenBatches("t", ids), [2, 4], Runtime(chunk_tokens=24, dtype=torch.float32))
    for block, rise in found.items():
        assert rise == pytest.approx(loss([i for i in range(6) if i != block]) - loss([*range(6)]), abs=1e-4)


@pytest.mark.pipeline
def test_a_pattern_and_a_smaller_vocabulary_are_tried_with_and_without(
    make_tiny: Callable[..., Path], compress: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_tiny(tmp_path / "model", blocks=2)
    command = (
        "run", model, *FLAGS, "--skip", "eora,depth", "--wanda", "2:4", "--wanda-samples", "4", "--wanda-length", "64",
        "--trim-vocabulary", "embedded", "--vocabulary-size", "400", "--budget-with", "wanda,vocabulary",
        "--budget", "75KB", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    done = compress(*command)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    budget, names = report["budget"], [stage["stage"] for stage in report["stages"]]
    best = budget["rounds"][budget["best"]]
    assert best["bits_per_byte"] == min(r["bits_per_byte"] for r in budget["rounds"])
    assert names == [*best["after"], "gptq"] and best["predicted_bytes"] == best["bytes"] <= 75_000
    result = Checkpoint.open(tmp_path / "out" / "result")
    assert pack_checkpoint(result, tmp_path / "image").nbytes == best["bytes"]
    assert (result.shape.pattern is not None) == ("wanda" in best["after"])
    assert (result.shape.vocabulary <= 400) == ("vocabulary" in best["after"])
    measured = [path.name for path in (tmp_path / "out" / "measurements").glob("bits-*")]
    assert len(measured) == 4  # each variant's
    again = json.loads(compress(*command).stdout)
    assert all(stage["reused"] for stage in again["stages"]) and again["budget"] == budget


@pytest.mark.unit
def test_variants_are_every_choice_of_the_stages() -> None:
    recipe = build(None, {"wanda.pattern": "2:4", "vocabulary.size": 400}, "lora,eora")
    found = [[name for name, _ in variant.stages] for variant in variants(recipe, ("wanda", "vocabulary"))]
    assert found == [["vocabulary", "depth", "wanda", "gptq"], ["vocabulary", "depth", "gptq"],
                     ["depth", "wanda", "gptq"], ["depth", "gptq"]]  # fmt: skip
    assert variants(recipe, ()) == [recipe]


@pytest.mark.pipeline
@pytest.mark.parametrize(
    ("family", "form", "bits"), [("qwen2", "packed", 5.5), ("gemma3_text", "packed", 5.5), ("qwen2", "gguf", 8.5)]
)
def test_other_architectures_have_the_predicted_bytes_and_load(
    family: str, form: str, bits: float, tiny_model: Callable[..., Path], compress: Callable[..., Any], tmp_path: Path
) -> None:
    seeing_all = {"use_sliding_window": False, "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
    model = tiny_model(family, **(seeing_all if form == "gguf" else {}))
    command = ("--quant", "q4_k" if form == "gguf" else "gptq4-s", "--budget", f"{bits}bits", "--budget-as", form)
    chain = ("--skip", "depth,wanda,lora,eora", "--budget-rounds", "1", "-o", tmp_path / "out", "--json")
    done = compress("run", model, *FLAGS, *command, *chain)
    assert done.returncode == 0, done.stderr
    budget = json.loads(done.stdout)["budget"]
    (only,) = budget["rounds"]
    result = Checkpoint.open(tmp_path / "out" / "result")
    if form == "gguf":
        size = module_of(FORMATS["gguf"]).write(result, Wanted(tmp_path / "model.gguf"), Runtime()).nbytes
    else:
        size = pack_checkpoint(result, tmp_path / "image").nbytes
    assert only["predicted_bytes"] == only["bytes"] == size <= budget["budget_bytes"]
    assert form == "gguf" or len({x.grid for block in result.shape.blocks for x in block.linears}) > 1
    exported = compress("export", tmp_path / "out" / "result", "--to", "hf", "-o", tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr
    ids = torch.randint(3, result.shape.vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        wanted = result.model("cpu", torch.float32)(input_ids=ids).logits
        assert torch.allclose(theirs(input_ids=ids).logits, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.pipeline
@pytest.mark.parametrize("adapted", [False, True])
def test_bytes_of_a_gguf_file_are_those_that_export_writes(
    adapted: bool, make_tiny: Callable[..., Path], compress: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real = sensitivity.measure

    def as_if_it_paid(*arguments: Any) -> Any:
        found = real(*arguments)
        # Embeddings of so small a model cost more than all layers, and would take the adapter's bytes.
        free = dict.fromkeys(found.embedding, 0.0)
        return replace(found, left={layer: {4: 0.01} for layer in found.left}, embedding=free)

    monkeypatch.setattr(sensitivity, "measure", as_if_it_paid)
    model = make_tiny(tmp_path / "model", blocks=2)
    beside = ("--eora", "4", "--eora-samples", "4", "--eora-length", "64") if adapted else ("--skip", "eora,depth")
    command = (*FLAGS, *beside, "--budget", "8.5bits", "--budget-as", "gguf", "--budget-rounds", "1")
    done = compress("run", model, *command, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    budget = json.loads(done.stdout)["budget"]
    (only,) = budget["rounds"]
    assert budget["budget_as"] == "gguf" and only["quant"].endswith("_k") and (only["eora"] is not None) == adapted
    result = Checkpoint.open(tmp_path / "out" / "result")
    written = module_of(FORMATS["gguf"]).write(result, Wanted(tmp_path / "model.gguf"), Runtime())
    files = sorted(tmp_path.glob("model*.gguf"))
    assert len(files) == 1 + adapted
    size = sum(file.stat().st_size for file in files)
    assert only["predicted_bytes"] == only["bytes"] == written.nbytes == size <= budget["budget_bytes"]


@pytest.mark.pipeline
def test_a_plan_with_an_adapter_is_compared_and_then_tuned(
    make_tiny: Callable[..., Path], compress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, measured = sensitivity.measure, []

    def as_if_it_paid(*arguments: Any) -> Any:
        measured.append(real(*arguments))
        return replace(measured[-1], left={layer: {4: 0.01} for layer in measured[-1].left})

    monkeypatch.setattr(sensitivity, "measure", as_if_it_paid)
    model, tune = make_tiny(tmp_path / "model", blocks=2), ("--tune", "2", "--tune-samples", "8", "--tune-length", "64")
    command = (
        model, *FLAGS, "--quant", "gptq4-s", "--budget", "85KB", "-o", tmp_path / "out", "--budget-rounds", "1", *tune,
        "--tune-batch", "2", "--tune-micro-batch", "1", "--tune-held-out", "2", "--tune-save-steps", "1",
        "--eora", "4", "--eora-bits", "8", "--eora-samples", "4", "--eora-length", "64", "--json",
    )  # fmt: skip
    done = compress("run", *command)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [stage["stage"] for stage in report["stages"]] == ["gptq", "tune", "eora"]
    (only,) = report["budget"]["rounds"]
    assert only["eora"] == {"rank": 4, "bits": 8} and only["predicted_bytes"] == only["bytes"] <= 85_000
    assert all(set(own) == {4} and 0 < own[4] < 1 for own in measured[0].left.values())
    result = Checkpoint.open(tmp_path / "out" / "result")
    assert pack_checkpoint(result, tmp_path / "image").nbytes == only["bytes"]
    assert report["budget"]["perplexity_tuned"] == report["stages"][-1]["perplexity"]["after"]
    assert {row["part"] for row in report["budget"]["bought"]} >= {"q_proj", "embedding", "eora"}
    again = json.loads(compress("run", *command).stdout)
    assert all(stage["reused"] for stage in again["stages"]) and again["budget"] == report["budget"]
    assert len(measured) == 1


@pytest.mark.pipeline
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--budget", "60 parsecs"), "there is no unit parsecs"),
        (("--budget", "1KB"), "the smallest model that --budget can make"),
        (("--budget", "60MiB"), "there is nothing to do"),
        (("--budget", "90KB", "--quant", "nf4"), "nf4 has no others beside it"),
        (("--budget", "90KB", "--budget-as", "zip"), "there are packed and gguf"),
        (("--budget", "siracusa", "--budget-as", "gguf"), "is a chip's memory, in the chip's own layout"),
        (("--budget", "90KB", "--budget-as", "gguf", "--quant", "gptq4"), "depends on its zero points"),
        (("--budget", "90KB", "--budget-with", "wander"), "--budget-with wander (near: wanda)"),
        (("--budget", "90KB", "--budget-with", "vocabulary"), "--budget-with vocabulary: nothing says"),
        (("--budget-with", "wanda"), "there is no --budget; give one"),
        (("--budget-as", "gguf"), "there is no --budget; give one"),
        (("--budget", "90KB", "--eora", "48"), "the smallest quantised layer has rank 32"),
        (("--budget", "90KB", "--guidance", "0.5"), "leave --guidance out"),
        (("--budget", "90KB", "--quant", "gptq4", "--recover", "qlora"), "leave out --homotopic and a --recover"),
        (("--budget", "90KB", "--plan"), "--plan cannot forecast what it chooses"),
        (("--budget", "90KB", "--budget-rounds", "0"), "at least one plan must be run"),
    ],
)
def test_bad_budgets_are_one_message(
    flags: tuple[str, ...], said: str, tiny_llama: Path, compress: Callable[..., Any], tmp_path: Path
) -> None:
    done = compress("run", tiny_llama, *FLAGS, *flags, "-o", tmp_path / "out")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.pipeline
def test_bits_are_ranked_with_table_figure_and_json(
    make_tiny: Callable[..., Path], compress: Callable[..., Any], tmp_path: Path
) -> None:
    model, out = make_tiny(tmp_path / "model", blocks=2), tmp_path / "bits"
    done = compress("rank", model, "--metric", "bits", "--quant", "gptq4", "--data", "embedded", "--samples", "2",
                    "--length", "64", "-o", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "down_proj" in done.stdout and out.with_suffix(".png").stat().st_size > 1000
    ranking = json.loads(out.with_suffix(".json").read_text())
    assert set(ranking["blocks"]) == {"0", "1"} and "block 0" in done.stdout and "EoRA of rank 8" in done.stdout
    assert {row["rank"] for row in ranking["eora"]} == {8, 16, 32} and len(ranking["eora"]) == 3 * 14
    rows = ranking["layers"]
    by = {(r["block"], r["layer"], r["quant"], r["group"]): r for r in rows}
    for (block, layer, quant, group), row in by.items():
        if quant == "gptq3":
            finer = by[block, layer, "gptq8", group]
            assert finer["loss"] < row["loss"] and finer["bytes"] > row["bytes"]


@pytest.mark.unit
def test_a_group_wider_than_a_layer_is_no_way_of_its_own(tiny_llama: Path) -> None:
    """Widths 64 and 128: a group of 128 is one of 64 for all but down_proj."""
    shape, options = Checkpoint(tiny_llama, None).shape, Gptq("gptq4-s")
    ways = candidates(shape, options, "gptq4-s")
    assert ("gptq4-s", 128) in ways
    sizes = layer_sizes(shape, options, ways)
    assert {g for q, g in sizes[0, "mlp.down_proj"] if q == "gptq4-s"} == {16, 32, 64, 128}
    assert {g for q, g in sizes[0, "self_attn.q_proj"] if q == "gptq4-s"} == {16, 32, 64}
    blocks = tuple(
        replace(b, linears=tuple(x for x in b.linears if not x.name.endswith("down_proj"))) for b in shape.blocks
    )
    assert {g for _, g in candidates(replace(shape, blocks=blocks), options, "gptq4-s")} == {16, 32, 64}
    budget = Budget.parse("4.6bits", shape)
    chooser = Chooser(shape, budget, options, ways, (8,))
    losses = {layer: {way: 1 / size for way, size in own.items()} for layer, own in chooser.sizes.items()}
    plan = chooser.choose(Sensitivity(losses, {}, {8: 0.0}, 0.0))
    assert all(way in chooser.sizes[layer] for layer, way in plan.layers.items()) and plan.nbytes <= budget.nbytes


@pytest.mark.pipeline
def test_a_second_ranking_of_bits_measures_nothing(
    make_tiny: Callable[..., Path], compress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    model = make_tiny(tmp_path / "model", blocks=2)
    command = ("rank", model, "--metric", "bits", "--quant", "gptq4", "--data", "embedded", "--samples", "2")
    first = compress(*command, "--length", "32", "--json")
    assert first.returncode == 0, first.stderr
    real, calls = sensitivity.measure, []

    def counted(*arguments: Any) -> Any:
        calls.append(0)
        return real(*arguments)

    monkeypatch.setattr(sensitivity, "measure", counted)
    again = compress(*command, "--length", "32", "--json")
    assert json.loads(again.stdout) == json.loads(first.stdout) and not calls
    assert compress(*command, "--length", "48", "--json").returncode == 0 and len(calls) == 1


@pytest.mark.pipeline
def test_interrupted_while_it_measures_it_says_that_it_begins_anew(
    tiny_llama: Path, compress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> Any:
        progress = arguments[5].progress
        progress.start("forwards", 2)
        signal.raise_signal(signal.SIGINT)  # which lets the step end
        progress.step()

    monkeypatch.setattr(sensitivity, "measure", killed)
    done = compress("run", tiny_llama, *FLAGS, "--budget", "4.6bits", "-o", tmp_path / "out")
    assert done.returncode == 130
    assert "interrupted; the same command measures the layers anew" in done.stdout + done.stderr
