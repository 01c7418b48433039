"""`--budget`: run the plan of the least predicted loss, measure it, correct the prediction, and choose again.

pipeline/allocate.py chooses by an exact integer program. The chosen plan runs and is measured like any recipe; what the
solver then left of each layer, and what the removed blocks and the adapter really did, corrects the prediction for the
next round.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from edgepress.pipeline.allocate import (
    GGUF,
    PACKED,
    Accepts,
    Bought,
    Budget,
    Candidates,
    Chooser,
    Plan,
    Stages,
    Wanted,
    bought,
    candidates,
    ranges,
)
from edgepress.pipeline.formats import FORMATS, module_of
from edgepress.pipeline.plan import plan as planned
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.store import Store, open_model
from edgepress.pipeline.tables import print_whole
from edgepress.stages import depth as depth_stage
from edgepress.stages.options import STAGES, Depth, Eora, Gptq

if TYPE_CHECKING:
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.shape import ModelShape
    from edgepress.pipeline.formats.gguf import FileBytes
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.run import Conditions, RunResult
    from edgepress.stages.sensitivity import Layer, Sensitivity, Way

TRIED = ("vocabulary", "wanda")  # stages that --budget may do without
DEFAULT = {PACKED: "gptq4-s", GGUF: "q4_k"}  # the quantiser's family where none is asked for
RANKS = (8, 16, 32)  # of EoRA where none is asked for, at 8 bits: as good as 16 by prediction, and half the bytes
FEW = 8  # layers of a quantiser, below which their errors say little of it
WINDOWS = 8  # of calibration, at most, that the sensitivities are measured on


def corrected(
    losses: Mapping[Layer, Mapping[Way, float]],
    errors: Mapping[Layer, Mapping[Way, float]],
    measured: Sequence[tuple[Plan, Mapping[Layer, float]]],
) -> dict[Layer, dict[Way, float]]:
    """The losses times what GPTQ really left of the layers' outputs over what was predicted.

    measured: each plan that ran with the relative error of every layer. All ways of one quantiser get one factor: the
    median over its layers, and where fewer than FEW had it, the median over all layers. A single layer's relative error
    hangs on a few rows of large outputs, which need not be among those that the prediction solved.
    """
    factors: dict[str, list[float]] = {}
    for plan, found in measured:
        for layer, way in plan.layers.items():
            if layer in found and (predicted := errors[layer][way]) > 0:
                factors.setdefault(way[0], []).append(found[layer] / predicted)
    usual = median([x for own in factors.values() for x in own]) if factors else 1.0

    def times(quant: str) -> float:
        own = factors.get(quant, [])
        return median(own) if len(own) >= FEW else usual

    return {layer: {way: x * times(way[0]) for way, x in ways.items()} for layer, ways in losses.items()}


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
class Offer:
    """A plan that nobody ran."""

    plan: Plan
    stages: Stages  # all that run, those before gptq too
    perplexity: float  # predicted
    loss: float  # the same in nats for a token of the source's, in which plans are compared
    shape: ModelShape  # of the result


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
    beside: Candidates = field(default_factory=Candidates)
    rounds: int = 2
    tried: tuple[str, ...] = ()  # stages before gptq that are tried with and without
    accepts: Accepts | None = None  # of a chip: whether the rest of it suffices too

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
    if options.guidance:
        raise PlanError("--budget predicts and corrects by errors of tokens that count alike; leave --guidance out")
    asked, options = options.quant, replace(options, layers="")
    beside = replace(wish.beside, depth=None) if "depth" in names else wish.beside
    shape = ran.shape if ran else ([source.shape] + [step.shape for step in planned(earlier, source.shape)])[-1]
    least = min(min(x.out_features, x.in_features) for block in shape.blocks for x in block.linears)
    adapters = (o for _, o in recipe.stages if isinstance(o, Eora))
    own = tuple(replace(o, rank=min(o.rank, least)) if o.rank == Eora.rank else o for o in adapters)
    beside = replace(beside, eora=(*wish.beside.eora, *own))
    # Variants must meet the same bytes, also where these are bits for each parameter.
    budget = Budget.parse(wish.text, source.shape if wish.tried else shape, wish.file(ran or source))
    bits = (4, 8) if wish.embedding is None else (wish.embedding,)
    tuned = tuple(s for s in recipe.stages if s[0] == "tune")
    ways = candidates(shape, options, asked)
    chooser = Chooser(shape, budget, options, ways, bits, beside, len(earlier.stages), tuned, wish.accepts)
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

    def offers(self) -> Iterator[Offer]:
        """The plans that the chooser proposes."""
        for plan in self.setting.chooser.proposals(self.predicted):
            stages = (*self.setting.earlier.stages, *plan.stages(*self.setting.tuned))
            loss = self.before + plan.loss
            yield Offer(plan, stages, math.exp(loss), self.rate * loss, self.setting.chooser.after(plan))

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


def run_budget(
    recipe: Recipe, wish: Wish, out: Path, reporter: Reporter, offered: Callable[[Sequence[Offer]], None] | None = None
) -> Outcome:
    """Carry out the recipe with the best layers' settings for a budget. The caller holds the store open.

    Plans are compared without --tune, which changes no byte; the best one is tuned. offered: called with what the first
    prediction proposes, the best first, before any of it runs. Raises PlanError for a budget that cannot be.
    """
    from edgepress.pipeline.run import Conditions, run

    arms = list(_arms(Conditions.prepare(recipe, out, reporter), wish, out, reporter))
    done: list[tuple[Round, RunResult, Arm]] = []
    if offered is not None:
        offered(sorted((offer for arm in arms for offer in arm.offers()), key=lambda offer: offer.loss))
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
    gone = f", blocks {ranges(plan.removed)} removed" if plan.removed else ""
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
    decides += [options.damping, options.symmetric, options.scale_search, options.shrinkage]
    decides += [options.with_embedding(4).embedding_codes, *([ranks] if ranks else [])]
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
