"""`--budget`: the settings of every layer with the least predicted loss that fit into so many bytes.

An exact integer program (a multiple-choice knapsack): one way to quantise for each layer and one for the embedding, or
none for the layers of a block that is removed, the least sum of predicted losses (stages/sensitivity.py) under the
bytes; once without and once with each adapter of EoRA. The chosen plan runs and is measured like any recipe; what the
solver then left of each layer, and what the removed blocks and the adapter really did, corrects the prediction for the
next round.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, cast

from rich import box
from rich.console import Console
from rich.table import Table

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.errors import PlanError, near
from edgepress.checkpoints.manifest import sealed, write_json
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.packed_sizes import block_records, packed_sizes, place
from edgepress.checkpoints.shape import BlockShape, ModelShape
from edgepress.hardware.needs import room_for
from edgepress.hardware.placement import weight_bytes
from edgepress.hardware.soc import Soc, load_soc, shipped_socs
from edgepress.pipeline.formats import FORMATS, module_of
from edgepress.pipeline.plan import plan as planned
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.store import Store, open_model
from edgepress.pipeline.tables import print_whole
from edgepress.stages import depth as depth_stage
from edgepress.stages import eora as eora_stage
from edgepress.stages import gptq
from edgepress.stages.options import STAGES, Depth, Eora, Gptq, Options
from edgepress.stages.quantisers import METHODS

if TYPE_CHECKING:
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.pipeline.formats.gguf import FileBytes
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.run import Conditions, RunResult
    from edgepress.stages.sensitivity import Layer, Sensitivity, Way

PACKED, GGUF = "packed", "gguf"  # whose bytes are counted
TRIED = ("vocabulary", "wanda")  # stages that --budget may do without
DEFAULT = {PACKED: "gptq4-s", GGUF: "q4_k"}  # the quantiser's family where none is asked for
GROUPS = (32, 64, 128)
RANKS = (8, 16, 32)  # of EoRA where none is asked for, at 8 bits: as good as 16 by prediction, and half the bytes
WINDOWS = 8  # of calibration, at most, that the sensitivities are measured on
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
Stages = tuple[tuple[str, Options], ...]
_TURNS = 12  # of the program, until the bytes of the whole file are below the budget too


@dataclass(frozen=True)
class Budget:
    """Bytes, and how a model's are counted."""

    text: str
    nbytes: int
    soc: Soc | None = None  # its memory for weights, in its own layout
    file: FileBytes | None = None  # of a GGUF file; without this and a chip: the packed file

    @classmethod
    def parse(cls, text: str, shape: ModelShape, file: FileBytes | None = None) -> Budget:
        """Read `60MiB`, `4.5bits` a parameter of the whole model, or a chip. Raises PlanError for anything else."""
        match = re.fullmatch(r"([\d.,]+)\s*([A-Za-z]*)", text.strip())
        if match is None:
            if text.partition(":")[0].lower() not in shipped_socs() and not Path(text).is_file():
                raise PlanError(
                    f"--budget {text}: neither bytes (60MiB, 60MB), nor bits (4.5bits), nor a chip; shipped chips are "
                    f"{', '.join(shipped_socs())}"
                )
            soc = load_soc(text)
            if file is not None:
                raise PlanError(
                    f"--budget {text} is a chip's memory, in the chip's own layout; --budget-as gguf counts a file: "
                    "give bytes, or leave it out"
                )
            return cls(text, room_for(soc, "weights"), soc)
        try:
            number, unit = float(match[1]), match[2].lower()
        except ValueError:
            raise PlanError(f"--budget {text}: {match[1]} is no number") from None
        if unit in ("bit", "bits"):
            return cls(text, int(number * shape.parameters_total / 8), file=file)
        if unit not in _UNITS:
            raise PlanError(
                f"--budget {text}: there is no unit {match[2]}; write 60MiB, 60MB, 4.5bits or a chip's name"
            )
        return cls(text, int(number * _UNITS[unit]), file=file)

    def size(self, shape: ModelShape, name: str) -> int:
        """Bytes of the whole model, exactly as they will be. name: its folder's, which a GGUF file holds."""
        if self.file is not None:
            return self.file.of(shape, name)
        return packed_sizes(shape).total if self.soc is None else weight_bytes(shape, self.soc.layout).total

    def of_layer(self, shape: ModelShape, block: BlockShape) -> int:
        """Bytes of one layer, in a block of its own."""
        if self.file is not None:
            return self.file.of_block(shape, block)
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


@dataclass(frozen=True)
class Removal:
    """A block that may go: what its absence costs, and the choices that there are no more without it."""

    loss: float
    freed: int  # bytes beside those of its choices
    members: frozenset[int]  # places in the list of choices


def solve(
    choices: Sequence[Sequence[tuple[float, int]]], limit: int, removals: Sequence[Removal] = ()
) -> list[int] | None:
    """Of each list of (loss, bytes) the place of the one to take: least sum of losses, bytes at most `limit`.

    -1 for the choices that a removal takes away: x_1 + ... + x_n = 1 - r. None where even the smallest do not fit.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, hstack

    smallest = [min(size for _, size in options) for options in choices]
    saved = sum(max(0, r.freed + sum(smallest[at] for at in r.members)) for r in removals)
    if sum(smallest) - saved > limit:
        return None
    of = np.repeat(np.arange(len(choices)), [len(options) for options in choices])
    one = csr_matrix((np.ones(len(of)), (of, np.arange(len(of)))))
    of_removal = np.array([[at in r.members for r in removals] for at in range(len(choices))], dtype=float)
    losses = np.array([loss for options in choices for loss, _ in options])
    scale = max(float(np.abs(losses).max()), 1e-30)
    losses = np.concatenate([losses, [r.loss for r in removals]])
    sizes = np.array([size for options in choices for _, size in options] + [-r.freed for r in removals], dtype=float)
    with _printing_nothing():
        found = milp(
            losses / scale,
            integrality=np.ones(len(losses)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(hstack([one, csr_matrix(of_removal)]), 1, 1),
                LinearConstraint(sizes[None] / abs(limit or 1), -np.inf, np.sign(limit)),
            ],
            options={"mip_rel_gap": 1e-6, "time_limit": 60},
        )
    if found.x is None:
        raise PlanError(f"the integer program found no plan: {found.message}")
    starts = np.concatenate([[0], np.cumsum([len(options) for options in choices])])
    gone = {at for r, taken in zip(removals, found.x[len(of) :], strict=True) if taken > 0.5 for at in r.members}
    return [-1 if at in gone else int(found.x[a:b].argmax()) for at, (a, b) in enumerate(pairwise(starts))]


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
    """A way for each layer, blocks that go, bits of the embedding, and what comes of it.

    Layers have the block's number before any is removed; in `options` they have the one after it.
    """

    layers: dict[Layer, Way]
    embedding: int
    options: Gptq
    nbytes: int  # exactly
    loss: float  # predicted, nats a token above the model as it is
    removed: tuple[int, ...] = ()
    depth: Depth | None = None  # the stage that removes them
    eora: Eora | None = None

    def stages(self, *tuned: tuple[str, Options]) -> tuple[tuple[str, Options], ...]:
        """What a recipe has of it. tuned: what comes between gptq and eora."""
        before: Stages = (("depth", self.depth),) if self.depth else ()
        after: Stages = (("eora", self.eora),) if self.eora else ()
        return (*before, ("gptq", self.options), *tuned, *after)


@dataclass(frozen=True)
class Candidates:
    """What there is to choose from besides bits and groups."""

    depth: Depth | None = None  # its limits, where blocks may go
    eora: tuple[Eora, ...] = ()


class Chooser:
    """Plans of one model under one budget."""

    def __init__(
        self,
        shape: ModelShape,
        budget: Budget,
        options: Gptq,
        ways: Sequence[Way],
        embedding: Sequence[int],
        beside: Candidates = Candidates(),
        earlier: int = 0,
        tuned: Stages = (),
    ) -> None:
        """earlier: stages before; tuned: --tune's. Raises PlanError where no plan fits, or there is nothing to do."""
        self.shape, self.budget, self.options, self.depth = shape, budget, options, beside.depth
        self._earlier, self._tuned = earlier, tuned
        self.embedding = tuple(embedding)
        self.sizes = layer_sizes(shape, options, ways, budget)
        self.rest = [self._rest(i, block) for i, block in enumerate(shape.blocks)]
        self.adapters = self._adapters(beside.eora, ways[0])
        coded = {block for block, _ in self.sizes}
        blocks = tuple(i for i in removable(shape, beside.depth) if i in coded)
        self.blocks = blocks if len(blocks) < len(coded) else blocks[1:]  # one at least stays
        ranks = tuple(sorted({eora.rank for eora in self.adapters}))
        self.wanted = Wanted(tuple(ways), self.embedding, self.blocks, ranks)
        self.least = {layer: min(sizes, key=lambda way: sizes[way]) for layer, sizes in self.sizes.items()}
        self.smallest = min((self._plan(self._without(self.blocks), b, self.blocks) for b in self.embedding), key=_size)
        source = budget.size(shape, "")
        if source <= budget.nbytes:
            raise PlanError(
                f"--budget {budget.text}: the model has {size_text(source)} as it is, and {size_text(budget.nbytes)} "
                "hold it: there is nothing to do"
            )
        if self.smallest.nbytes > budget.nbytes:
            ways_ = Counter(f"{quant}, groups of {group}" for quant, group in self.smallest.layers.values())
            said = [ways_.most_common(1)[0][0]]
            said += [f"the embedding at {self.smallest.embedding} bits"] if self.smallest.embedding else []
            said += [f"{len(self.blocks)} of {len(shape.blocks)} blocks removed"] if self.blocks else []
            more = (
                "let more blocks go with --protect-first and --protect-last" if beside.depth else "blocks with --depth"
            )
            raise PlanError(
                f"--budget {budget.text} is {size_text(budget.nbytes)}, and the smallest model that --budget can make "
                f"has {size_text(self.smallest.nbytes)} ({', '.join(said)}). Remove tokens with --trim-vocabulary, "
                f"{more}, or give more"
            )

    def _rest(self, index: int, block: BlockShape) -> int:
        """Bytes of a block beside its layers that have ways."""
        left = tuple(x for x in block.linears if (index, x.name) not in self.sizes)
        return self.budget.of_layer(self.shape, BlockShape(left, block.others))

    def _adapters(self, candidates: Sequence[Eora], way: Way) -> dict[Eora, dict[Layer, int]]:
        found = {eora: adapter_sizes(self.shape, self.options, way, eora, self.budget) for eora in candidates}
        return {
            eora: {layer: size for layer, size in own.items() if layer in self.sizes}
            for eora, own in found.items()
            if own
        }

    def _without(self, removed: Iterable[int]) -> dict[Layer, Way]:
        """Every layer at its fewest bytes, without those of removed blocks."""
        return {layer: way for layer, way in self.least.items() if layer[0] not in set(removed)}

    def _plan(
        self, layers: dict[Layer, Way], embedding: int, removed: Sequence[int] = (), eora: Eora | None = None
    ) -> Plan:
        (quant, group), _ = Counter(layers.values()).most_common(1)[0]
        kept = [i for i in range(len(self.shape.blocks)) if i not in removed]
        stage, shape = None, self.shape
        if removed:
            # Which windows the stage would rank on makes no difference: those of gptq are there.
            assert self.depth is not None
            samples, length = self.options.samples, self.options.length
            stage = replace(self.depth, layers=_ranges(kept), remove=len(removed), samples=samples, length=length)
            shape = depth_stage.plan(shape, stage)
        renumbered = {(kept.index(block), name): way for (block, name), way in layers.items()}
        options = replace(self.options, quant=quant, group=group, quant_embeddings=embedding, layers=rules(renumbered))
        after = gptq.plan(shape, options)
        plan = Plan(layers, embedding, options, 0, math.nan, tuple(removed), stage, eora)
        return replace(plan, nbytes=self.size(plan, after if eora is None else eora_stage.plan(after, eora)))

    def size(self, plan: Plan, shape: ModelShape) -> int:
        """Bytes of a plan's result, which has this shape."""
        stages = plan.stages(*self._tuned)
        folder = Store(Path()).stage_folder(self._earlier + len(stages), stages[-1][1].label, "0" * 8)
        return self.budget.size(shape, folder.name)

    def outer_bytes(self, embedding: int, eora: Eora | None = None) -> int:
        """Bytes of the whole model beside its layers that have ways and their adapters, with no block removed."""
        least = sum(self.sizes[layer][way] for layer, way in self.least.items())
        least += sum(self.adapters[eora].values()) if eora else 0
        return self._plan(self.least, embedding, eora=eora).nbytes - least

    def choose(self, predicted: Sensitivity, room: int = 0) -> Plan:
        """The plan of the least predicted loss. room: more bytes than the budget has."""
        able = [eora for eora in self.adapters if all(eora.rank in own for own in predicted.left.values())]
        plans = [self._chosen(predicted, room, eora) for eora in (None, *(able if predicted.left else ()))]
        found = [plan for plan in plans if plan is not None]
        if not found:
            return replace(self.smallest, loss=self.predicted(self.smallest, predicted))
        return min(found, key=lambda plan: plan.loss)

    def _chosen(self, predicted: Sensitivity, room: int, eora: Eora | None) -> Plan | None:
        """The best with this adapter; None where even the smallest is too large."""
        layers = list(self.sizes)
        outer = {bits: self.outer_bytes(bits, eora) for bits in self.embedding}
        beside = self.adapters[eora] if eora else dict.fromkeys(layers, 0)
        left = {layer: _left(predicted, layer, eora) for layer in layers}
        ways = {layer: [way for way in self.sizes[layer] if way in predicted.losses.get(layer, {})] for layer in layers}
        choices = [
            [(left[x] * predicted.losses[x][way], self.sizes[x][way] + beside[x]) for way in ways[x]] for x in layers
        ]
        choices.append([(predicted.embedding[bits], outer[bits]) for bits in self.embedding])
        blocks = [i for i in self.blocks if i in predicted.blocks]
        own = {i: frozenset(at for at, (block, _) in enumerate(layers) if block == i) for i in blocks}
        removals = [Removal(predicted.blocks[i], self.rest[i], own[i]) for i in blocks]
        goal = self.budget.nbytes + room
        limit = goal
        for turn in range(_TURNS):
            found = solve(choices, limit, removals)
            if found is None:
                return None
            taken = {layer: ways[layer][at] for layer, at in zip(layers, found, strict=False) if at >= 0}
            removed = [i for i in blocks if all(found[at] < 0 for at in own[i])]
            plan = self._plan(taken, self.embedding[found[-1]], removed, eora)
            if plan.nbytes <= goal:
                return replace(plan, loss=self.predicted(plan, predicted))
            # The header lists the blocks that are unlike, and those of the next plan may be more: a growing margin.
            limit -= (plan.nbytes - goal) << turn
        if eora is not None:
            return None  # without one there may be a plan
        raise PlanError(
            f"--budget {self.budget.text}: after {_TURNS} attempts no plan's whole file was small enough, headers "
            "included; give a little more"
        )

    @staticmethod
    def predicted(plan: Plan, by: Sensitivity) -> float:
        """A plan's loss: the sum of its parts'."""
        parts = [_left(by, layer, plan.eora) * by.losses[layer][way] for layer, way in plan.layers.items()]
        return by.embedding[plan.embedding] + sum(parts) + sum(by.blocks[i] for i in plan.removed)


def _size(plan: Plan) -> int:
    return plan.nbytes


def _left(by: Sensitivity, layer: Layer, eora: Eora | None) -> float:
    """Share of a layer's loss that its adapter leaves."""
    return 1.0 if eora is None else by.left.get(layer, {}).get(eora.rank, 1.0)


def removable(shape: ModelShape, depth: Depth | None) -> tuple[int, ...]:
    """The blocks that the stage depth may remove: none that it protects, and none whose weights another runs too."""
    if depth is None or len(shape.own_blocks) < len(shape.blocks):
        return ()
    return tuple(range(depth.protect_first, len(shape.blocks) - depth.protect_last))


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


def adapter_sizes(
    shape: ModelShape, options: Gptq, way: Way, eora: Eora, budget: Budget | None = None
) -> dict[Layer, int]:
    """Bytes of each layer's adapter, whatever its bits; none where some layer does not have the rank."""
    counting, (quant, group) = budget or Budget("", 0), way
    coded = gptq.plan(shape, replace(options, quant=quant, group=group, layers="", quant_embeddings=0))
    try:
        after = eora_stage.plan(coded, eora)
    except PlanError:
        return {}
    found = dict[Any, int]()
    for i, (block, was) in enumerate(zip(after.blocks, coded.blocks, strict=True)):
        for x, before in zip(block.linears, was.linears, strict=True):
            both = (counting.of_layer(shape, BlockShape((own,), ())) for own in (x, before))
            found[i, x.name] = next(both) - next(both)
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


def corrected_blocks(
    predicted: Mapping[int, float], measured: Sequence[tuple[Sequence[int], float]]
) -> dict[int, float]:
    """The losses of blocks by what removing some of them really cost.

    Each was measured alone, and several together cost another sum: mostly more. measured: the blocks of each plan that
    ran, and the rise of the loss without them. What it is above the sum of their own is shared out evenly, and every
    block gets the mean of these shares, since none that goes in their place would be alone either.
    """
    shares = [(rise - sum(predicted[i] for i in gone)) / len(gone) for gone, rise in measured if gone]
    return {i: x + (fmean(shares) if shares else 0.0) for i, x in predicted.items()}


def corrected_left(
    left: Mapping[Layer, Mapping[int, float]], measured: Sequence[tuple[Eora, Mapping[Layer, float]]]
) -> dict[Layer, dict[int, float]]:
    """The shares that adapters leave, times what those that ran left over what was predicted, for all ranks alike.

    measured: each adapter that ran with the share of every layer's error that it left.
    """
    factors: dict[Layer, list[float]] = {}
    for eora, found in measured:
        for layer, share in found.items():
            if (predicted := left.get(layer, {}).get(eora.rank, 0.0)) > 0:
                factors.setdefault(layer, []).append(share / predicted)
    usual = median([x for own in factors.values() for x in own]) if factors else 1.0
    times = {layer: fmean(factors[layer]) if layer in factors else usual for layer in left}
    return {layer: {rank: min(1.0, x * times[layer]) for rank, x in own.items()} for layer, own in left.items()}


@dataclass(frozen=True)
class Round:
    plan: Plan
    perplexity: float
    nbytes: int  # of the file or on the chip, counted from what lies on the disk
    rise: float  # measured, nats a token above the model before gptq
    bits_per_byte: float
    after: tuple[str, ...] = ()  # stages before gptq


@dataclass(frozen=True)
class Bought:
    """What a part of the model took of the budget, and what it got for it, above the smallest way to store it."""

    part: str  # a kind of layer, the embedding, adapters, or blocks that went
    settings: str
    nbytes: int
    loss: float  # predicted, nats a token
    more: int  # bytes above the smallest; of what went, those that it would have
    less: float  # nats a token that these bytes are predicted to buy


def bought(chooser: Chooser, plan: Plan, by: Sensitivity) -> Iterator[Bought]:
    """By kind of layer; the removed blocks' row has the bytes that it gives back and the nats that it costs."""
    sizes, kinds = chooser.sizes, dict[str, list[Any]]()
    for layer in sizes:
        kinds.setdefault(layer[1].rpartition(".")[2], []).append(layer)

    def loss(layer: Layer) -> float:
        return by.losses[layer][chooser.least[layer]]

    def size(layer: Layer) -> int:
        return sizes[layer][chooser.least[layer]]

    for name, layers in kinds.items():
        ways = {layer: plan.layers[layer] for layer in layers if layer in plan.layers}
        if ways:
            counted = Counter(f"{quant}/{group}" for quant, group in ways.values())
            losses = sum(by.losses[layer][way] for layer, way in ways.items())
            nbytes = sum(sizes[layer][way] for layer, way in ways.items())
            more, less = nbytes - sum(map(size, ways)), sum(map(loss, ways)) - losses
            said = ", ".join(f"{way} ({count})" for way, count in sorted(counted.items()))
            yield Bought(name, said, nbytes, losses, more, less)
    outer = {bits: chooser.outer_bytes(bits) for bits in chooser.embedding}
    few, here = min(outer, key=lambda bits: outer[bits]), plan.embedding
    said = (f"{here} bits" if here else "as it is") + ", with all that has no choice"
    whole = outer[here] - sum(chooser.rest[i] for i in plan.removed)
    more, less = outer[here] - outer[few], by.embedding[few] - by.embedding[here]
    yield Bought("embedding", said, whole, by.embedding[here], more, less)
    if plan.eora:
        own = {layer: chooser.adapters[plan.eora][layer] for layer in plan.layers}
        less = sum((1 - _left(by, layer, plan.eora)) * by.losses[layer][way] for layer, way in plan.layers.items())
        yield Bought("eora", plan.eora.label, sum(own.values()), -less, sum(own.values()), less)
    if plan.removed:
        gone = [layer for layer in sizes if layer[0] in plan.removed]
        freed = sum(map(size, gone)) + sum(chooser.rest[i] for i in plan.removed)
        lost = sum(by.blocks[i] for i in plan.removed)
        said = f"{_ranges(plan.removed)} removed"
        yield Bought("blocks", said, 0, lost, -freed, sum(map(loss, gone)) - lost)


@dataclass(frozen=True)
class Outcome:
    """What a budget gave."""

    result: RunResult  # of the best round
    budget: Budget
    rounds: tuple[Round, ...]
    best: int
    gain: float  # nats a token less that 1 % more bytes would give, by the last prediction
    bought: tuple[Bought, ...] = ()  # by the best round's plan, as the last prediction has it
    tuned: float | None = None  # perplexity of the best round's plan with --tune

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": self.budget.text,
            "budget_bytes": self.budget.nbytes,
            "budget_as": _counted(self.budget),
            "best": self.best,
            "nats_for_one_percent_more": self.gain,
            "perplexity_tuned": self.tuned,
            "bought": [asdict(row) for row in self.bought],
            "rounds": [
                {
                    "perplexity": r.perplexity, "bytes": r.nbytes, "predicted_bytes": r.plan.nbytes, "rise": r.rise,
                    "bits_per_byte": r.bits_per_byte, "predicted_rise": r.plan.loss, "after": list(r.after),
                    "quant_embeddings": r.plan.embedding,
                    "removed_blocks": list(r.plan.removed), "depth_layers": r.plan.depth.layers if r.plan.depth else "",
                    "eora": {"rank": r.plan.eora.rank, "bits": r.plan.eora.bits} if r.plan.eora else None,
                    "quant": r.plan.options.quant, "group": r.plan.options.group, "layers": r.plan.options.layers,
                }
                for r in self.rounds
            ],
        }  # fmt: skip


def candidate_stages(
    flags: Mapping[str, Any], skip: str, counted: str = PACKED, tried: Sequence[str] = ()
) -> tuple[dict[str, Any], str, Candidates]:
    """Flags and --skip of a command with --budget and no recipe file, and what else there is to choose from.

    Nothing runs besides gptq that no flag asks for, since nothing else pays at equal bytes. With --depth N or --layers
    the stage depth runs as ever, before gptq; without them its other flags say which blocks --budget may remove. With
    --eora R or other flags of it, that adapter or none is chosen; without them also its rank. tried: as in a Wish.
    """
    given = {key for key, value in flags.items() if value is not None}
    asked = {key.partition(".")[0] for key in given} | set(tried)
    left_out = {name.strip() for name in skip.split(",")}
    depth, eora = None, tuple[Eora, ...]()
    if not {"depth.remove", "depth.layers"} & given and "depth" not in left_out:
        asked -= {"depth"}
        depth = Depth(**{key.removeprefix("depth."): flags[key] for key in given if key.startswith("depth.")})
    if not {"eora"} & {*asked, *left_out}:  # on windows that are there, since gptq has them
        names = [name for name in ("samples", "length") if f"gptq.{name}" in given]
        windows = {name: flags[f"gptq.{name}"] for name in names}
        eora = tuple(Eora(rank=rank, bits=8, **{"samples": Gptq.samples, **windows}) for rank in RANKS)
    skip = ",".join(filter(None, [skip, *(name for name in STAGES if name not in {"gptq", *asked})]))
    rest = {key: value for key, value in flags.items() if depth is None or not key.startswith("depth.")}
    return rest | {"gptq.quant": flags.get("gptq.quant") or DEFAULT.get(counted)}, skip, Candidates(depth, eora)


@dataclass(frozen=True)
class Setting:
    """A recipe taken apart at what --budget chooses."""

    earlier: Recipe  # up to the stage gptq
    options: Gptq
    tuned: Stages  # --tune, of the best plan alone
    chooser: Chooser


def before_gptq(recipe: Recipe) -> Stages:
    """The stages that run as they are. Raises PlanError where what comes then is not for --budget to choose."""
    names = [name for name, _ in recipe.stages]
    place = names.index("gptq") if "gptq" in names else len(names)
    if not names[place:] or recipe.homotopic or not set(names[place + 1 :]) <= {"tune", "eora"}:
        raise PlanError(
            "--budget chooses what the stage gptq does, which must be there, with --tune and eora alone after it: "
            "leave out --homotopic and a --recover that trains beside quantised weights"
        )
    return recipe.stages[:place]


@dataclass(frozen=True)
class Wish:
    """What a person asked --budget for."""

    text: str
    counted: str = PACKED  # or GGUF
    embedding: int | None = None  # its bits, where somebody asked for them
    beside: Candidates = Candidates()
    rounds: int = 2
    tried: tuple[str, ...] = ()  # stages before gptq that are tried with and without

    def __post_init__(self) -> None:
        for name in self.tried:
            if name not in TRIED:
                raise PlanError(f"--budget-with {name}{near(name, TRIED)}: there are {' and '.join(TRIED)}")
        if self.rounds < 1:
            raise PlanError(f"--budget-rounds {self.rounds}: at least one plan must be run")
        if self.counted not in (PACKED, GGUF):
            raise PlanError(
                f"--budget-as {self.counted}{near(self.counted, (PACKED, GGUF))}: there are {PACKED} and {GGUF}"
            )

    def file(self, source: Checkpoint) -> FileBytes | None:
        """What counts the bytes of a GGUF file with this checkpoint's tokenizer, where these are counted."""
        if self.counted != GGUF:
            return None
        module = cast("Any", module_of(FORMATS["gguf"]))
        return cast("FileBytes", module.FileBytes(source))


def possible(recipe: Recipe, wish: Wish, source: Checkpoint, ran: Checkpoint | None = None) -> Setting:
    """The recipe's parts and the plans there are. ran: what the stages before gptq gave, where they ran already.

    Raises PlanError or RecipeError for a budget that cannot be.
    """
    names = [name for name, _ in recipe.stages]
    earlier = replace(recipe, stages=before_gptq(recipe))
    options = recipe.stages[len(earlier.stages)][1]
    assert isinstance(options, Gptq)
    asked, options = options.quant, replace(options, layers="")
    beside = replace(wish.beside, eora=(*wish.beside.eora, *(o for _, o in recipe.stages if isinstance(o, Eora))))
    if "depth" in names:
        beside = replace(beside, depth=None)
    shape = ran.shape if ran else ([source.shape] + [step.shape for step in planned(earlier, source.shape)])[-1]
    # Variants must meet the same bytes, also where these are bits for each parameter.
    budget = Budget.parse(wish.text, source.shape if wish.tried else shape, wish.file(ran or source))
    bits = (4, 8) if wish.embedding is None else (wish.embedding,)
    tuned = tuple(s for s in recipe.stages if s[0] == "tune")
    ways = candidates(shape, options, asked)
    chooser = Chooser(shape, budget, options, ways, bits, beside, len(earlier.stages), tuned)
    return Setting(earlier, options, tuned, chooser)


def variants(recipe: Recipe, tried: Sequence[str]) -> list[Recipe]:
    """The recipe with and without each of these stages, the whole one first. Raises PlanError for one it has not."""
    found = [recipe]
    for name in tried:
        if name not in [stage for stage, _ in before_gptq(recipe)]:
            flag = "--wanda 2:4" if name == "wanda" else "--trim-vocabulary TEXT"
            raise PlanError(f"--budget-with {name}: nothing says what the stage would do before gptq; give {flag}")
        found += [replace(r, stages=tuple(s for s in r.stages if s[0] != name)) for r in found]
    return found


@dataclass
class Arm:
    """One variant of the recipe: what runs before gptq, the plans after it, and what they did."""

    setting: Setting
    parent: Checkpoint
    before: float  # nats a token of the model before gptq
    rate: float  # its tokens for one of the source's: a trimmed vocabulary takes more
    found: Sensitivity
    predicted: Sensitivity
    measured: list[tuple[Plan, Mapping[Layer, float]]] = field(default_factory=list)
    shortened: list[tuple[Sequence[int], float]] = field(default_factory=list)
    compensated: list[tuple[Eora, Mapping[Layer, float]]] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """The stages before gptq."""
        return tuple(name for name, _ in self.setting.earlier.stages)

    def recipe(self, stages: Stages) -> Recipe:
        earlier = self.setting.earlier
        return replace(earlier, stages=(*earlier.stages, *stages))

    def choose(self) -> tuple[float, Plan]:
        """The best plan, and its loss in nats for a token of the source's, in which variants are compared."""
        plan = self.setting.chooser.choose(self.predicted)
        return self.rate * (self.before + plan.loss), plan

    def learn(self, plan: Plan, result: RunResult) -> Round:
        """Correct the prediction by what a plan gave."""
        start, count = len(self.setting.earlier.stages), len(self.parent.shape.blocks)
        last, own = result.stages[-1], {r.manifest.stage: r for r in result.stages[start:]}
        self.measured.append((plan, _of_layers(plan, own["gptq"].manifest.facts["blocks"], count, _error)))
        if plan.removed:
            self.shortened.append((plan.removed, math.log(own["depth"].after["perplexity"]) - self.before))
        if plan.eora:
            shares = _of_layers(plan, own["eora"].manifest.facts["blocks"], count, _share)
            self.compensated.append((plan.eora, shares))
        self.predicted = replace(
            self.found,
            losses=corrected(self.found.losses, self.found.errors, self.measured),
            blocks=corrected_blocks(self.found.blocks, self.shortened),
            left=corrected_left(self.found.left, self.compensated),
        )
        perplexity, size = float(last.after["perplexity"]), self.setting.chooser.size(plan, last.checkpoint.shape)
        bits = float(last.after["bits_per_byte"])
        return Round(plan, perplexity, size, math.log(perplexity) - self.before, bits, self.names)


def require_possible(recipe: Recipe, wish: Wish, source: Checkpoint) -> None:
    """Raise PlanError where no variant has a plan, before anything runs."""
    faults = list[PlanError]()
    for variant in variants(recipe, wish.tried):
        if wish.counted == GGUF and any(name == "vocabulary" for name, _ in variant.stages):
            Budget.parse(wish.text, source.shape, wish.file(source))
            return  # the bytes of what is left of the vocabulary are known once the stage ran
        try:
            possible(variant, wish, source)
        except PlanError as error:
            faults.append(error)
        else:
            return
    raise faults[0]


def run_budget(recipe: Recipe, wish: Wish, out: Path, reporter: Reporter) -> Outcome:
    """Carry out the recipe with the best layers' settings for a budget. The caller holds the store open.

    Plans are compared without --tune, which changes no byte; the best one is tuned. Raises PlanError for a budget that
    cannot be.
    """
    from edgepress.pipeline.run import Conditions, run

    arms = list(_arms(Conditions.prepare(recipe, out, reporter), wish, out, reporter))
    done: list[tuple[Round, RunResult, Arm]] = []
    for number in range(1, wish.rounds + 1):
        (_, plan), arm = min(((arm.choose(), arm) for arm in arms), key=lambda found: found[0][0])
        if any(plan.stages() == other.plan.stages() and arm is of for other, _, of in done):
            reporter.say(f"round {number}: the corrected prediction chooses a plan that has run")
            break
        budget = arm.setting.chooser.budget
        reporter.say(
            f"round {number}: {size_text(plan.nbytes, decimals=2)} of {size_text(budget.nbytes, decimals=2)}"
            f"{_beside_bits(plan, arm.names if len(arms) > 1 else ())}, "
            f"predicted perplexity {math.exp(arm.before + plan.loss):.2f}", style="bold",
        )  # fmt: skip
        result = run(arm.recipe(plan.stages()), out, reporter)
        done.append((arm.learn(plan, result), result, arm))
    best = min(range(len(done)), key=lambda i: done[i][0].bits_per_byte)
    (won, result, arm), tuned = done[best], None
    if arm.setting.tuned or best != len(done) - 1:  # so that `result` leads to it; what ran before is in the store
        result = run(arm.recipe(won.plan.stages(*arm.setting.tuned)), out, reporter)
        tuned = float(result.stages[-1].after["perplexity"]) if arm.setting.tuned else None
    chooser = arm.setting.chooser
    here, more = (chooser.choose(arm.predicted, room) for room in (0, chooser.budget.nbytes // 100))
    rows = tuple(bought(chooser, won.plan, arm.predicted))
    rounds = tuple(r for r, _, _ in done)
    outcome = Outcome(result, chooser.budget, rounds, best, here.loss - more.loss, rows, tuned)
    write_json(out / "budget.json", sealed(outcome.to_dict()))
    return outcome


def _arms(at: Conditions, wish: Wish, out: Path, reporter: Reporter) -> Iterator[Arm]:
    """The variants that can meet the budget, run up to gptq. Raises PlanError where there is none."""
    from edgepress.pipeline.run import run

    base, faults, several = at.measured(at.source), list[PlanError](), variants(at.recipe, wish.tried)
    for recipe in several:
        parent, now = at.source, base
        if stages := before_gptq(recipe):
            last = run(replace(recipe, stages=stages), out, reporter).stages[-1]
            parent, now = last.checkpoint, last.after
        try:
            setting = possible(recipe, wish, at.source, parent)
        except PlanError as error:
            faults.append(error)
            if len(several) == 1:
                break
            reporter.note(f"without a plan after {', '.join(s for s, _ in stages) or 'no stage'}: {error}")
            continue
        found = sensitivities(recipe, parent, setting.options, setting.chooser.wanted, out, reporter)
        before = math.log(now["perplexity"])
        rate = now["bits_per_byte"] / before / (base["bits_per_byte"] / math.log(base["perplexity"]))
        yield Arm(setting, parent, before, rate, found, found)
    if len(faults) == len(several):
        raise faults[0]


def _beside_bits(plan: Plan, after: Sequence[str]) -> str:
    gone = f", blocks {_ranges(plan.removed)} removed" if plan.removed else ""
    return gone + (f", {plan.eora.label}" if plan.eora else "") + (f", after {', '.join(after)}" if after else "")


def _error(facts: Mapping[str, float]) -> float | None:
    """What GPTQ's solver left of a layer's outputs."""
    return facts.get("error")


def _share(facts: Mapping[str, float]) -> float | None:
    """What an adapter left of the solver's error."""
    return facts["error_after"] / facts["error_before"] if facts["error_before"] > 0 else None


def _of_layers(
    plan: Plan,
    facts: Sequence[Mapping[str, Any]],
    count: int,
    number: Callable[[Mapping[str, float]], float | None],
) -> dict[Layer, float]:
    """A number of each layer from a stage's facts, by the numbers that blocks had before some went."""
    kept = [i for i in range(count) if i not in plan.removed]
    found = {
        (old, name): number(f)
        for old, block in zip(kept, facts, strict=True)
        for name, f in block.items()
        if isinstance(f, dict)
    }
    return {layer: x for layer, x in found.items() if x is not None}


@dataclass(frozen=True)
class Wanted:
    """What is to be measured."""

    ways: tuple[Way, ...]
    embedding: tuple[int, ...]  # bits
    blocks: tuple[int, ...] = ()  # that may go
    ranks: tuple[int, ...] = ()  # of adapters


def sensitivities(
    recipe: Recipe, parent: Checkpoint, options: Gptq, wanted: Wanted, out: Path, reporter: Reporter
) -> Sensitivity:
    """Measured, or from the store `out` where they were measured of the same checkpoint on the same windows.

    The loss without each block that may go is measured apart, in one walk through the blocks that takes about half a
    forward pass and a head for each of them; what adapters leave takes a solution of all of a layer's rows.
    """
    from edgepress.checkpoints.runtime import Runtime, choose_device, choose_dtype
    from edgepress.pipeline.calibration import Calibration
    from edgepress.pipeline.tree import duration_text, measured_speed
    from edgepress.stages import sensitivity

    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, device, parent.shape.dense_dtype)
    runtime = Runtime(device, dtype, recipe.seed, reporter, spill_bytes=recipe.spill_mib * 2**20)
    source, store = open_model(recipe.model), Store(out)
    few = replace(options, samples=min(options.samples, WINDOWS))
    windows = Calibration(recipe, source, out, runtime).windows("gptq", few)

    def known_or_measured(
        kind: str, decides: list[Any], what: str, seconds: float, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        key = f"{kind}-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()}"
        known = store.measurement(key, reporter.note)
        if known is not None:
            reporter.say(f"what {what} was measured before, and is kept in {out}")
            return known
        reporter.say(
            f"measuring what {what}, on {len(windows.ids)} windows of {few.length} tokens: about "
            f"{duration_text(max(1.0, seconds))} here"
        )
        with interrupts.meanwhile("the same command measures the layers anew; what was finished before is kept"):
            known = measure()
        store.keep_measurement(key, known)
        return known

    speed = measured_speed(recipe.device, recipe.dtype)
    ways, bits, ranks = wanted.ways, [b for b in wanted.embedding if b], list(wanted.ranks)
    decides = [parent.fingerprint, windows.sha256, list(ways), bits, sensitivity.VERSION, str(dtype)]
    decides += [options.damping, options.symmetric, options.scale_search, *([ranks] if ranks else [])]
    found = sensitivity.Sensitivity.from_dict(
        known_or_measured(
            "bits", decides, f"each of {len(ways)} ways costs every layer",
            sensitivity.operations(parent.shape, few, ways, ranks) / speed * sensitivity.SLOWDOWN,
            lambda: sensitivity.measure(parent, windows, options, ways, bits, runtime, ranks).to_dict(),
        )
    )  # fmt: skip
    if not (blocks := wanted.blocks):
        return found
    last = len(parent.shape.blocks) - 1 - blocks[-1]
    limits = Depth(1, protect_first=blocks[0], protect_last=last, samples=few.samples, length=few.length)
    cost = depth_stage.cost(parent.shape, limits)
    losses = known_or_measured(
        "blocks", [parent.fingerprint, windows.sha256, list(blocks), depth_stage.VERSION, str(dtype)],
        f"the absence of each of {len(blocks)} blocks costs", cost.seconds(speed),
        lambda: {str(i): x for i, x in depth_stage.losses_without(parent, windows, blocks, runtime).items()},
    )  # fmt: skip
    return replace(found, blocks={int(i): x for i, x in losses.items()})


# --- words ------------------------------------------------------------------------------------------------------------


def _counted(budget: Budget) -> str:
    return GGUF if budget.file is not None else PACKED if budget.soc is None else budget.soc.name


def print_outcome(console: Console, outcome: Outcome) -> None:
    """The rounds, what each kind of layer got, and what more bytes would buy."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("round", "bytes", "predicted ppl", "measured ppl"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("stages")
    for number, r in enumerate(outcome.rounds):
        mark = " *" if number == outcome.best else ""
        expected = r.perplexity * math.exp(r.plan.loss - r.rise)
        stages = ", ".join((*r.after, *(name for name, _ in r.plan.stages())))
        table.add_row(f"{number + 1}{mark}", f"{r.nbytes:,}", f"{expected:.2f}", f"{r.perplexity:.2f}", stages)
    as_gguf = " of a GGUF file" if outcome.budget.file is not None else ""
    console.print(
        f"\nBudget {outcome.budget.text}: {outcome.budget.nbytes:,} bytes{as_gguf}; * is the result", highlight=False
    )
    print_whole(console, table)
    parts = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("part", "settings (blocks)"):
        parts.add_column(column)
    for column in ("bytes", "loss", "bytes above the smallest", "nats they buy", "a KiB"):
        parts.add_column(column, justify="right", no_wrap=True)
    for row in outcome.bought:
        rate = f"{1024 * row.less / row.more:.2g}" if row.more else ""
        parts.add_row(
            row.part, row.settings, f"{row.nbytes:,}", f"{row.loss:.4f}", f"{row.more:,}", f"{row.less:.4f}", rate
        )
    print_whole(console, parts)
    console.print(
        "Losses are predicted, in nats a token. Above the smallest: than with each part at the fewest bytes that it "
        "can have; a removed block gives bytes back and costs nats.", highlight=False,
    )  # fmt: skip
    if outcome.tuned is not None:
        console.print(f"With --tune the best plan has perplexity {outcome.tuned:.2f}.", highlight=False)
    console.print(
        f"1 % more bytes would lower the loss by {outcome.gain:.4f} nats a token, by prediction.", highlight=False
    )
