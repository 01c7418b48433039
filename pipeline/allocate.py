"""Which settings of a model have the least predicted loss within so many bytes: `--budget`'s exact integer program.

A multiple-choice knapsack: one way to quantise for each layer and one for the embedding, or none for the layers of a
block that is removed, the least sum of predicted losses (stages/sensitivity.py) under the bytes; once without and once
with each adapter of EoRA. pipeline/budget.py runs what is chosen here.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.packed_sizes import block_records, packed_sizes, place
from edgepress.checkpoints.shape import BlockShape, ModelShape
from edgepress.hardware.needs import room_for
from edgepress.hardware.placement import weight_bytes
from edgepress.hardware.soc import Soc, load_soc, shipped_socs
from edgepress.pipeline.store import Store
from edgepress.stages import depth as depth_stage
from edgepress.stages import eora as eora_stage
from edgepress.stages import gptq
from edgepress.stages.options import Depth, Eora, Gptq, Options
from edgepress.stages.quantisers import METHODS, smallest_group

if TYPE_CHECKING:
    from edgepress.pipeline.formats.gguf import FileBytes
    from edgepress.stages.sensitivity import Layer, Sensitivity, Way

PACKED, GGUF = "packed", "gguf"  # whose bytes are counted
GROUPS = (16, 32, 64, 128)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
Stages = tuple[tuple[str, Options], ...]
Accepts = Callable[[ModelShape], bool]  # whether a result can be used for what besides its bytes is asked of it
_TURNS = 12  # of the program, until the bytes of the whole file are below the budget too


class TooSmallError(PlanError):
    """Even the smallest plan does not fit."""


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


@dataclass(frozen=True)
class Removal:
    """A block that may go: what its absence costs, and the choices that there are no more without it."""

    loss: float
    freed: int  # bytes beside those of its choices
    members: frozenset[int]  # places in the list of choices


def solve(
    choices: Sequence[Sequence[tuple[float, int]]], limit: int, removals: Sequence[Removal] = (), at_least: int = 0
) -> list[int] | None:
    """Of each list of (loss, bytes) the place of the one to take: least sum of losses, bytes at most `limit`.

    -1 for the choices that a removal takes away: x_1 + ... + x_n = 1 - r. At least `at_least` of the removals are made.
    None where even the smallest do not fit.
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
    removing = (np.arange(len(sizes)) >= len(of)).astype(float)
    with _printing_nothing():
        found = milp(
            losses / scale,
            integrality=np.ones(len(losses)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(hstack([one, csr_matrix(of_removal)]), 1, 1),
                LinearConstraint(sizes[None] / abs(limit or 1), -np.inf, np.sign(limit)),
                *([LinearConstraint(removing[None], at_least, np.inf)] if at_least else []),
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
        accepts: Accepts | None = None,
    ) -> None:
        """earlier: stages before; tuned: --tune's. Raises TooSmallError, or PlanError where there is nothing to do."""
        self.shape, self.budget, self.options, self.depth = shape, budget, options, beside.depth
        self._earlier, self._tuned, self._accepts = earlier, tuned, accepts or (lambda _: True)
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
        if source <= budget.nbytes and self._accepts(shape):
            raise PlanError(
                f"--budget {budget.text}: the model has {size_text(source)} as it is, and {size_text(budget.nbytes)} "
                "hold it: there is nothing to do"
            )
        if self.smallest.nbytes > budget.nbytes or not self._accepts(self.after(self.smallest)):
            ways_ = Counter(f"{quant}, groups of {group}" for quant, group in self.smallest.layers.values())
            said = [ways_.most_common(1)[0][0]]
            said += [f"the embedding at {self.smallest.embedding} bits"] if self.smallest.embedding else []
            said += [f"{len(self.blocks)} of {len(shape.blocks)} blocks removed"] if self.blocks else []
            more = (
                "let more blocks go with --protect-first and --protect-last" if beside.depth else "blocks with --depth"
            )
            lacks = "" if self.smallest.nbytes > budget.nbytes else " and has no room for what is computed with it"
            raise TooSmallError(
                f"--budget {budget.text} is {size_text(budget.nbytes)}, and the smallest model that --budget can make "
                f"has {size_text(self.smallest.nbytes)} ({', '.join(said)}){lacks}. Remove tokens with "
                f"--trim-vocabulary, {more}, or give more"
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
        kept, stage = [i for i in range(len(self.shape.blocks)) if i not in removed], None
        if removed:
            # Which windows the stage would rank on makes no difference: those of gptq are there.
            assert self.depth is not None
            samples, length = self.options.samples, self.options.length
            stage = replace(self.depth, layers=ranges(kept), remove=len(removed), samples=samples, length=length)
        renumbered = {(kept.index(block), name): way for (block, name), way in layers.items()}
        options = self.options.with_embedding(embedding)
        options = replace(options, quant=quant, group=group, layers=rules(renumbered))
        plan = Plan(layers, embedding, options, 0, math.nan, tuple(removed), stage, eora)
        return replace(plan, nbytes=self.size(plan, self.after(plan)))

    def after(self, plan: Plan) -> ModelShape:
        """The shape of a plan's result."""
        shape = depth_stage.plan(self.shape, plan.depth) if plan.depth else self.shape
        shape = gptq.plan(shape, plan.options)
        return eora_stage.plan(shape, plan.eora) if plan.eora else shape

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
        found = self._best(predicted, room, self.embedding, self.blocks)
        return found or replace(self.smallest, loss=self.predicted(self.smallest, predicted))

    def proposals(self, predicted: Sensitivity) -> list[Plan]:
        """The best plan at each of the embedding's bits, with and without removed blocks, the least loss first."""
        limits = [(bits, blocks) for bits in self.embedding for blocks in dict.fromkeys((self.blocks, ()))]
        found = [self._best(predicted, 0, (bits,), blocks) for bits, blocks in limits]
        unlike = {plan.stages(): plan for plan in (*found, self.choose(predicted)) if plan is not None}
        return sorted(unlike.values(), key=lambda plan: plan.loss)

    def _best(self, predicted: Sensitivity, room: int, embedding: Sequence[int], free: Sequence[int]) -> Plan | None:
        """The least loss of the plans that are accepted, with as few of the blocks `free` removed as that takes."""
        able = [eora for eora in self.adapters if all(eora.rank in own for own in predicted.left.values())]
        adapters, gone = (None, *(able if predicted.left else ())), 0
        while gone <= len(free):
            plans = [self._chosen(predicted, room, eora, embedding, free, gone) for eora in adapters]
            found = [plan for plan in plans if plan is not None]
            if fine := [plan for plan in found if self._accepts(self.after(plan))]:
                return min(fine, key=lambda plan: plan.loss)
            if not found:
                return None
            gone = 1 + min(len(plan.removed) for plan in found)
        return None

    def _chosen(
        self, predicted: Sensitivity, room: int, eora: Eora | None, embedding: Sequence[int],
        free: Sequence[int], gone: int,
    ) -> Plan | None:  # fmt: skip
        """The best with this adapter and at least `gone` blocks removed; None where even the smallest is too large."""
        layers = list(self.sizes)
        outer = {bits: self.outer_bytes(bits, eora) for bits in embedding}
        beside = self.adapters[eora] if eora else dict.fromkeys(layers, 0)
        left = {layer: _left(predicted, layer, eora) for layer in layers}
        ways = {layer: [way for way in self.sizes[layer] if way in predicted.losses.get(layer, {})] for layer in layers}
        choices = [
            [(left[x] * predicted.losses[x][way], self.sizes[x][way] + beside[x]) for way in ways[x]] for x in layers
        ]
        choices.append([(predicted.embedding[bits], outer[bits]) for bits in embedding])
        blocks = [i for i in free if i in predicted.blocks]
        if gone > len(blocks):
            return None
        own = {i: frozenset(at for at, (block, _) in enumerate(layers) if block == i) for i in blocks}
        removals = [Removal(predicted.blocks[i], self.rest[i], own[i]) for i in blocks]
        goal = self.budget.nbytes + room
        limit = goal
        for turn in range(_TURNS):
            found = solve(choices, limit, removals, gone)
            if found is None:
                return None
            taken = {layer: ways[layer][at] for layer, at in zip(layers, found, strict=False) if at >= 0}
            removed = [i for i in blocks if all(found[at] < 0 for at in own[i])]
            plan = self._plan(taken, embedding[found[-1]], removed, eora)
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
        said += [f"{ranges(blocks)}.{name}={q}/{g}" for (q, g), blocks in ways.items() if (q, g) != usual]
    return "; ".join(said)


def ranges(blocks: Sequence[int]) -> str:
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
        everywhere = replace(options.with_embedding(0), layers=f"*={quant}/{group}", quant=quant)
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
    coded = gptq.plan(shape, replace(options.with_embedding(0), quant=quant, group=group, layers=""))
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


def candidates(shape: ModelShape, options: Gptq, asked: str) -> list[Way]:
    """The ways that this model and its pattern can take, each once. Raises PlanError where that is none."""
    quants, found, said = family(asked), list[tuple[str, int]](), list[str]()
    seen = set[tuple[Any, ...]]()
    for quant in quants:
        # Those whose groups are the format's own come once.
        groups = GROUPS if not quant.endswith(("_k", "-channel")) else GROUPS[-1:]
        for group in (group for group in groups if group >= smallest_group(quant)):
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
        said = f"{ranges(plan.removed)} removed"
        yield Bought("blocks", said, 0, lost, -freed, sum(map(loss, gone)) - lost)


@dataclass(frozen=True)
class Wanted:
    """What is to be measured."""

    ways: tuple[Way, ...]
    embedding: tuple[int, ...]  # bits
    blocks: tuple[int, ...] = ()  # that may go
    ranks: tuple[int, ...] = ()  # of adapters
