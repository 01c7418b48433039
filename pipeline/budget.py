"""`--budget`: the settings of every layer with the least predicted loss that fit into so many bytes.

An exact integer program (a multiple-choice knapsack): one way to quantise for each layer and one for the embedding, the
least sum of predicted losses (stages/sensitivity.py) under the bytes. The chosen plan runs and is measured like any
recipe; what the solver then left of each layer corrects the prediction for the next round.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.manifest import sealed, write_json
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.packed_sizes import block_records, packed_sizes, place
from edgepress.checkpoints.shape import BlockShape, ModelShape
from edgepress.hardware.needs import room_for
from edgepress.hardware.placement import weight_bytes
from edgepress.hardware.soc import Soc, load_soc, shipped_socs
from edgepress.pipeline.plan import plan as planned
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.tables import print_whole
from edgepress.stages import gptq
from edgepress.stages.options import Gptq
from edgepress.stages.quantisers import METHODS

if TYPE_CHECKING:
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.run import RunResult
    from edgepress.stages.sensitivity import Layer, Sensitivity, Way

GROUPS = (32, 64, 128)
WINDOWS = 8  # of calibration, at most, that the sensitivities are measured on
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TURNS = 12  # of the program, until the bytes of the whole file are below the budget too


@dataclass(frozen=True)
class Budget:
    """Bytes, and how a model's are counted."""

    text: str
    nbytes: int
    soc: Soc | None = None  # its memory for weights, in its own layout; None: the packed file

    @classmethod
    def parse(cls, text: str, shape: ModelShape) -> Budget:
        """Read `60MiB`, `4.5bits` a parameter of the whole model, or a chip. Raises PlanError for anything else."""
        match = re.fullmatch(r"([\d.,]+)\s*([A-Za-z]*)", text.strip())
        if match is None:
            if text.partition(":")[0].lower() not in shipped_socs() and not Path(text).is_file():
                raise PlanError(
                    f"--budget {text}: neither bytes (60MiB, 60MB), nor bits (4.5bits), nor a chip; shipped chips are "
                    f"{', '.join(shipped_socs())}"
                )
            soc = load_soc(text)
            return cls(text, room_for(soc, "weights"), soc)
        try:
            number, unit = float(match[1]), match[2].lower()
        except ValueError:
            raise PlanError(f"--budget {text}: {match[1]} is no number") from None
        if unit in ("bit", "bits"):
            return cls(text, int(number * shape.parameters_total / 8))
        if unit not in _UNITS:
            raise PlanError(
                f"--budget {text}: there is no unit {match[2]}; write 60MiB, 60MB, 4.5bits or a chip's name"
            )
        return cls(text, int(number * _UNITS[unit]))

    def size(self, shape: ModelShape) -> int:
        """Bytes of the whole model, exactly as they will be."""
        return packed_sizes(shape).total if self.soc is None else weight_bytes(shape, self.soc.layout).total

    def of_layer(self, shape: ModelShape, block: BlockShape) -> int:
        """Bytes of one layer, in a block of its own."""
        if self.soc is None:
            return place(block_records(block))[1]
        return weight_bytes(replace(shape, blocks=(block,), outer=()), self.soc.layout).total


def family(quant: str) -> tuple[str, ...]:
    """The quantisers that may stand beside this one in one model. Raises PlanError where there is no choice."""
    ends = next((end for end in ("-s", "_k") if quant.endswith(end)), "")
    same = tuple(n for n in METHODS if METHODS[n][0] == METHODS.get(quant, ("",))[0] and n.endswith(ends))
    if len(same) < 2 or not quant.startswith(("gptq", "q")):
        raise PlanError(
            f"--budget chooses each layer's bits, and {quant} has no others beside it; give --quant gptq4-s, gptq4 or "
            "q4_k for the family to choose from"
        )
    return same


# --- the integer program ----------------------------------------------------------------------------------------------


def solve(choices: Sequence[Sequence[tuple[float, int]]], limit: int) -> list[int] | None:
    """Of each list of (loss, bytes) the place of the one to take: least sum of losses, bytes at most `limit`.

    None where even the smallest do not fit.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    if sum(min(size for _, size in options) for options in choices) > limit:
        return None
    losses = np.array([loss for options in choices for loss, _ in options])
    sizes = np.array([size for options in choices for _, size in options], dtype=float)
    of = np.repeat(np.arange(len(choices)), [len(options) for options in choices])
    one = csr_matrix((np.ones(len(of)), (of, np.arange(len(of)))))
    scale = max(float(np.abs(losses).max()), 1e-30)
    with _printing_nothing():
        found = milp(
            losses / scale,
            integrality=np.ones(len(of)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one, 1, 1), LinearConstraint(sizes[None] / limit, -np.inf, 1)],
            options={"mip_rel_gap": 1e-6, "time_limit": 60},
        )
    if found.x is None:
        raise PlanError(f"the integer program found no plan: {found.message}")
    starts = np.concatenate([[0], np.cumsum([len(options) for options in choices])])
    return [int(found.x[a:b].argmax()) for a, b in pairwise(starts)]


@contextmanager
def _printing_nothing() -> Iterator[None]:
    """HiGHS writes remarks of its own to standard output, past Python, where `--json` is."""
    sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)
        os.close(nowhere)


@dataclass(frozen=True)
class Plan:
    """A way for each layer, bits of the embedding, and what comes of it."""

    layers: dict[Layer, Way]
    embedding: int
    options: Gptq
    nbytes: int  # exactly
    loss: float  # predicted, nats a token above the model as it is


class Chooser:
    """Plans of one model under one budget."""

    def __init__(
        self, shape: ModelShape, budget: Budget, options: Gptq, ways: Sequence[Way], embedding: Sequence[int]
    ) -> None:
        """Raises PlanError where no plan fits, or there is nothing to do."""
        self.shape, self.budget, self.options = shape, budget, options
        self.embedding = tuple(embedding)
        self.sizes = layer_sizes(shape, options, ways, budget)
        self.all_ways = tuple(ways)
        self.smallest = self._least()
        source = budget.size(shape)
        if source <= budget.nbytes:
            raise PlanError(
                f"--budget {budget.text}: the model has {size_text(source)} as it is, and {size_text(budget.nbytes)} "
                "hold it: there is nothing to do"
            )
        if self.smallest.nbytes > budget.nbytes:
            ways_ = Counter(f"{quant}, groups of {group}" for quant, group in self.smallest.layers.values())
            edge = f", the embedding at {self.smallest.embedding} bits" if self.smallest.embedding else ""
            raise PlanError(
                f"--budget {budget.text} is {size_text(budget.nbytes)}, and the smallest model that --budget can make "
                f"has {size_text(self.smallest.nbytes)} ({ways_.most_common(1)[0][0]}{edge}). Remove blocks with "
                "--depth or tokens with --trim-vocabulary, or give more"
            )

    def _least(self) -> Plan:
        layers = {layer: min(sizes, key=lambda way: sizes[way]) for layer, sizes in self.sizes.items()}
        return min((self._plan(layers, bits, math.nan) for bits in self.embedding), key=lambda plan: plan.nbytes)

    def _plan(self, layers: dict[Layer, Way], embedding: int, loss: float) -> Plan:
        (quant, group), _ = Counter(layers.values()).most_common(1)[0]
        options = replace(self.options, quant=quant, group=group, quant_embeddings=embedding, layers=rules(layers))
        return Plan(layers, embedding, options, self.budget.size(gptq.plan(self.shape, options)), loss)

    def choose(
        self, losses: Mapping[Layer, Mapping[Way, float]], embedding: Mapping[int, float], room: int = 0
    ) -> Plan:
        """The plan of the least predicted loss. room: more bytes than the budget has."""
        layers = list(self.sizes)
        outer = {bits: self._plan(self.smallest.layers, bits, math.nan).nbytes for bits in self.embedding}
        least = sum(self.sizes[layer][self.smallest.layers[layer]] for layer in layers)
        ways = {layer: [way for way in self.sizes[layer] if way in losses.get(layer, {})] for layer in layers}
        choices = [[(losses[layer][way], self.sizes[layer][way]) for way in ways[layer]] for layer in layers]
        choices.append([(embedding[bits], outer[bits] - least) for bits in self.embedding])
        goal = self.budget.nbytes + room
        limit = goal
        for turn in range(_TURNS):
            found = solve(choices, limit)
            if found is None:
                return replace(self.smallest, loss=self._sum(self.smallest, losses, embedding))
            taken = {layer: ways[layer][at] for layer, at in zip(layers, found, strict=False)}
            loss = sum(options[at][0] for options, at in zip(choices, found, strict=True))
            plan = self._plan(taken, self.embedding[found[-1]], loss)
            if plan.nbytes <= goal:
                return plan
            # The header lists the blocks that are unlike, and those of the next plan may be more: a growing margin.
            limit -= (plan.nbytes - goal) << turn
        raise PlanError(
            f"--budget {self.budget.text}: after {_TURNS} attempts no plan's whole file was small enough, headers "
            "included; give a little more"
        )

    def _sum(self, plan: Plan, losses: Mapping[Layer, Mapping[Way, float]], embedding: Mapping[int, float]) -> float:
        return embedding[plan.embedding] + sum(losses[layer][way] for layer, way in plan.layers.items())


def rules(layers: Mapping[Layer, Way]) -> str:
    """As `--quant-layers` says it: for each name what most blocks have, then the others."""
    by_name: dict[str, dict[Way, list[int]]] = {}
    for (block, name), way in sorted(layers.items()):
        by_name.setdefault(name, {}).setdefault(way, []).append(block)
    said = []
    for name, ways in by_name.items():
        usual = max(ways, key=lambda way: len(ways[way]))
        said.append(f"{name}={usual[0]}/{usual[1]}")
        said += [f"{_ranges(blocks)}.{name}={q}/{g}" for (q, g), blocks in ways.items() if (q, g) != usual]
    return "; ".join(said)


def _ranges(blocks: Sequence[int]) -> str:
    """0-3,7 of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def layer_sizes(
    shape: ModelShape, options: Gptq, ways: Sequence[Way], budget: Budget | None = None
) -> dict[Layer, dict[Way, int]]:
    """Bytes of each layer that a way's form holds, as the budget counts them, or in the packed file.

    A way that gives a layer the form of an earlier one, since its groups are wider than the layer, is left out there.
    """
    counting, found = budget or Budget("", 0), dict[Any, dict[Any, int]]()
    forms = dict[Any, set[Any]]()
    for quant, group in ways:
        everywhere = replace(options, layers=f"*={quant}/{group}", quant=quant, quant_embeddings=0)
        for i, block in enumerate(gptq.plan(shape, everywhere).blocks):
            for x in block.linears:
                own = forms.setdefault((i, x.name), set())
                if x.grid is not None and x.grid not in own:
                    own.add(x.grid)
                    size = counting.of_layer(shape, BlockShape((x,), ()))
                    found.setdefault((i, x.name), {})[quant, group] = size
    return found


# --- predict, run, measure, correct -----------------------------------------------------------------------------------


def candidates(shape: ModelShape, options: Gptq, asked: str) -> list[Way]:
    """The ways that this model and its pattern can take, each once. Raises PlanError where that is none."""
    quants, found, said = family(asked), list[tuple[str, int]](), list[str]()
    seen = set[tuple[Any, ...]]()
    for quant in quants:
        # Those whose groups are the format's own come once.
        groups = GROUPS if not quant.endswith(("_k", "-channel")) else GROUPS[-1:]
        for group in groups:
            try:
                own = gptq.plan(shape, replace(options, quant=quant, group=group, layers=f"*={quant}/{group}"))
            except PlanError as error:
                said.append(str(error))
                break
            forms = tuple(x.grid for block in own.blocks for x in block.linears)
            if forms not in seen:  # groups may be wider than every layer
                seen.add(forms)
                found.append((quant, group))
    if not found:
        raise PlanError(said[0])
    return found


def corrected(
    losses: Mapping[Layer, Mapping[Way, float]],
    errors: Mapping[Layer, Mapping[Way, float]],
    measured: Sequence[tuple[Plan, Mapping[Layer, float]]],
) -> dict[Layer, dict[Way, float]]:
    """The losses times what GPTQ really left of each layer over what was predicted.

    measured: each plan that ran with the relative error of every layer. Where a layer never had a way it gets the
    factor that its other ways had, and where it had none, that of the layers with the way.
    """
    seen: dict[Layer, dict[Way, float]] = {}
    by_way: dict[Way, list[float]] = {}
    for plan, found in measured:
        for layer, way in plan.layers.items():
            if layer in found and (predicted := errors[layer][way]) > 0:
                factor = min(max(found[layer] / predicted, 0.25), 4.0)
                seen.setdefault(layer, {})[way] = factor
                by_way.setdefault(way, []).append(factor)
    usual = {way: median(factors) for way, factors in by_way.items()}

    def times(layer: Layer, way: Way) -> float:
        own = seen.get(layer, {})
        return own.get(way, median(own.values()) if own else usual.get(way, 1.0))

    return {layer: {way: x * times(layer, way) for way, x in ways.items()} for layer, ways in losses.items()}


@dataclass(frozen=True)
class Round:
    plan: Plan
    perplexity: float
    nbytes: int  # of the file or on the chip, counted from what lies on the disk
    rise: float  # measured, nats a token above the model before gptq


@dataclass(frozen=True)
class Outcome:
    """What a budget gave."""

    result: RunResult  # of the best round
    budget: Budget
    rounds: tuple[Round, ...]
    best: int
    gain: float  # nats a token less that 1 % more bytes would give, by the last prediction

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": self.budget.text,
            "budget_bytes": self.budget.nbytes,
            "best": self.best,
            "nats_for_one_percent_more": self.gain,
            "rounds": [
                {
                    "perplexity": r.perplexity, "bytes": r.nbytes, "predicted_bytes": r.plan.nbytes, "rise": r.rise,
                    "predicted_rise": r.plan.loss, "quant_embeddings": r.plan.embedding,
                    "quant": r.plan.options.quant, "group": r.plan.options.group, "layers": r.plan.options.layers,
                }
                for r in self.rounds
            ],
        }  # fmt: skip


def possible(recipe: Recipe, text: str, source: ModelShape, embedding: int | None) -> tuple[Recipe, Gptq, Chooser]:
    """The recipe up to the stage gptq, that stage's options, and the plans there are.

    Raises PlanError or RecipeError for a budget that cannot be.
    """
    names = [name for name, _ in recipe.stages]
    if "gptq" not in names or recipe.homotopic or names[-1] != "gptq":
        raise PlanError(
            "--budget chooses what the stage gptq does, which must be there and the last one: leave out eora, --tune, "
            "--homotopic and a --recover that trains beside quantised weights"
        )
    options, earlier = recipe.stages[-1][1], replace(recipe, stages=recipe.stages[:-1])
    assert isinstance(options, Gptq)
    asked, options = options.quant, replace(options, layers="")
    shape = ([source] + [step.shape for step in planned(earlier, source)])[-1]
    budget = Budget.parse(text, shape)
    ways = candidates(shape, options, asked)
    return earlier, options, Chooser(shape, budget, options, ways, (4, 8) if embedding is None else (embedding,))


def run_budget(
    recipe: Recipe, text: str, out: Path, reporter: Reporter, *, rounds: int, embedding: int | None
) -> Outcome:
    """Carry out the recipe with the best layers' settings for a budget. The caller holds the store open.

    embedding: its bits where somebody asked for them. Raises PlanError for a budget that cannot be.
    """
    from edgepress.pipeline.run import Conditions, run

    at = Conditions.prepare(recipe, out, reporter)
    earlier, options, chooser = possible(recipe, text, at.source.shape, embedding)
    budget, ways = chooser.budget, chooser.all_ways
    parent, now = at.source, at.measured(at.source)
    if earlier.stages:
        last = run(earlier, out, reporter).stages[-1]
        parent, now = last.checkpoint, last.after
    found = sensitivities(recipe, parent, options, ways, chooser.embedding, out, reporter)
    before = math.log(now["perplexity"])
    measured: list[tuple[Plan, Mapping[Any, float]]] = []
    done: list[tuple[Round, RunResult]] = []
    losses: Mapping[Layer, Mapping[Way, float]] = found.losses
    for number in range(1, rounds + 1):
        plan = chooser.choose(losses, found.embedding)
        if any(plan.options == other.plan.options for other, _ in done):
            reporter.say(f"round {number}: the corrected prediction chooses a plan that has run")
            break
        reporter.say(
            f"round {number}: {size_text(plan.nbytes, decimals=2)} of {size_text(budget.nbytes, decimals=2)}, "
            f"predicted perplexity {math.exp(before + plan.loss):.2f}", style="bold",
        )  # fmt: skip
        result = run(replace(recipe, stages=(*recipe.stages[:-1], ("gptq", plan.options))), out, reporter)
        last = result.stages[-1]
        perplexity = float(last.after["perplexity"])
        done.append(
            (Round(plan, perplexity, budget.size(last.checkpoint.shape), math.log(perplexity) - before), result)
        )
        facts = last.manifest.facts["blocks"]
        errors = {(i, n): f["error"] for i, block in enumerate(facts) for n, f in block.items() if "error" in f}
        measured.append((plan, errors))
        losses = corrected(found.losses, found.errors, measured)
    best = min(range(len(done)), key=lambda i: done[i][0].perplexity)
    if best != len(done) - 1:  # so that `result` leads to it; all of it is in the store
        winner = ("gptq", done[best][0].plan.options)
        done[best] = done[best][0], run(replace(recipe, stages=(*recipe.stages[:-1], winner)), out, reporter)
    here, more = (chooser.choose(losses, found.embedding, room) for room in (0, budget.nbytes // 100))
    outcome = Outcome(done[best][1], budget, tuple(r for r, _ in done), best, here.loss - more.loss)
    write_json(out / "budget.json", sealed(outcome.to_dict()))
    return outcome


def sensitivities(
    recipe: Recipe, parent: Checkpoint, options: Gptq, ways: Sequence[Way], embedding: Sequence[int], out: Path,
    reporter: Reporter,
) -> Sensitivity:  # fmt: skip
    """Measured, or from the store `out` where they were measured of the same checkpoint on the same windows."""
    from edgepress.checkpoints.runtime import Runtime, choose_device, choose_dtype
    from edgepress.pipeline.calibration import Calibration
    from edgepress.pipeline.store import Store, open_model
    from edgepress.pipeline.tree import duration_text, measured_speed
    from edgepress.stages import sensitivity

    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, device, parent.shape.dense_dtype)
    runtime = Runtime(device, dtype, recipe.seed, reporter, spill_bytes=recipe.spill_mib * 2**20)
    source = open_model(recipe.model)
    few = replace(options, samples=min(options.samples, WINDOWS))
    windows = Calibration(recipe, source, out, runtime).windows("gptq", few)
    bits = [b for b in embedding if b]
    decides = [parent.fingerprint, windows.sha256, list(ways), bits, sensitivity.VERSION, str(dtype)]
    decides += [options.damping, options.symmetric, options.scale_search]
    key = "bits-" + hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    known = Store(out).measurement(key, reporter.note)
    if known is None:
        seconds = sensitivity.operations(parent.shape, few, ways) / measured_speed(recipe.device, recipe.dtype)
        reporter.say(
            f"measuring what each of {len(ways)} ways costs every layer, on {len(windows.ids)} windows of {few.length} "
            f"tokens: about {duration_text(max(1.0, seconds * sensitivity.SLOWDOWN))} here"
        )
        with interrupts.meanwhile("the same command measures the layers anew; what was finished before is kept"):
            known = sensitivity.measure(parent, windows, options, ways, bits, runtime).to_dict()
        Store(out).keep_measurement(key, known)
    else:
        reporter.say(f"what each of {len(ways)} ways costs every layer was measured before, and is kept in {out}")
    return sensitivity.Sensitivity.from_dict(known)


# --- words ------------------------------------------------------------------------------------------------------------


def print_outcome(console: Console, outcome: Outcome) -> None:
    """The rounds, what each kind of layer got, and what more bytes would buy."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("round", "bytes", "predicted ppl", "measured ppl"):
        table.add_column(column, justify="right", no_wrap=True)
    first = outcome.rounds[0]
    dense = math.log(first.perplexity) - first.rise
    for number, r in enumerate(outcome.rounds):
        mark = " *" if number == outcome.best else ""
        table.add_row(
            f"{number + 1}{mark}", f"{r.nbytes:,}", f"{math.exp(dense + r.plan.loss):.2f}", f"{r.perplexity:.2f}"
        )
    console.print(f"\nBudget {outcome.budget.text}: {outcome.budget.nbytes:,} bytes; * is the result", highlight=False)
    print_whole(console, table)
    best = outcome.rounds[outcome.best].plan
    bought = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layers", "settings (blocks)"):
        bought.add_column(column)
    by_name: dict[str, Counter[str]] = {}
    for (_, name), (quant, group) in best.layers.items():
        by_name.setdefault(name.rpartition(".")[2], Counter())[f"{quant}/{group}"] += 1
    for name, ways in by_name.items():
        bought.add_row(name, ", ".join(f"{way} ({count})" for way, count in sorted(ways.items())))
    bought.add_row("embedding", f"{best.embedding} bits" if best.embedding else "as it is")
    print_whole(console, bought)
    console.print(
        f"1 % more bytes would lower the loss by {outcome.gain:.4f} nats a token, by prediction.", highlight=False
    )
