"""Every stage's options, one documented field a flag; no torch.

A field's metadata holds its flag on the command line; its name is its key in a recipe. Values that can never
work raise PlanError at once; what depends on the model is checked by the stage's `plan`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from edgepress.checkpoints.errors import PlanError, near
from edgepress.checkpoints.shape import parse_amount
from edgepress.stages import quantisers
from edgepress.stages.pruning import METHODS, NOTHING
from edgepress.stages.recovery import METHODS as RECOVERY
from edgepress.stages.recovery import Recovery, parse


def option(default: Any, flag: str, text: str, later: bool = False, before: Any = None) -> Any:
    """A field. later: it came after stores were written; at its default it is no part of a stage's fingerprint.

    before: a value with which the stage does what it did then, where that is not the default.
    """
    return field(default=default, metadata={"flag": flag, "help": text, "later": later, "before": before})


def flag_of(options: Any, name: str) -> str:
    """The flag of a field of some stage's options."""
    return str(next(f.metadata["flag"] for f in fields(options) if f.name == name))


class _Faults:
    """What cannot be in one stage's options, raised together."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            self.found.append(message)

    def one_of(self, flag: str, value: str, known: tuple[str, ...]) -> None:
        there = ", ".join(known) if len(known) > 2 else " and ".join(known)
        self.require(value in known, f"{flag} {value}{near(value, known)}: there are {there}")

    def of(self, check: Callable[[], object]) -> None:
        """What a check raises."""
        try:
            check()
        except PlanError as error:
            self.found.append(str(error))

    def windows(self, stage: str, samples: int, length: int) -> None:
        self.require(samples > 0, f"{stage}: {samples} calibration windows; at least one is needed")
        self.require(length > 1, f"{stage}: windows of {length} tokens; at least two are needed")

    def training(self, options: Lora | Tune) -> None:
        """Of what every training has."""

        def flag(name: str) -> str:
            return f"{flag_of(options, name)} {getattr(options, name)}"

        batch, samples, held_out = options.batch, options.samples, options.held_out
        sizes = f"{flag_of(options, 'batch')} and {flag_of(options, 'micro_batch')}"
        self.require(batch > 0 and options.micro_batch > 0, f"{sizes} must be positive")
        self.require(
            min(batch, options.micro_batch) < 1 or batch % options.micro_batch == 0,
            f"{flag('batch')} is not a multiple of {flag('micro_batch')}",
        )
        self.require(0 < options.learning_rate < math.inf, f"{flag('learning_rate')}: must be positive and finite")
        self.require(options.save_steps > 0, f"{flag('save_steps')}: must be positive")
        self.require(0 <= options.distill <= 1, f"{flag('distill')}: must be in [0, 1]")
        self.require(held_out >= 0, f"{flag('held_out')}: cannot be negative")
        self.require(options.patience > 0, f"{flag('patience')}: must be positive")
        self.windows(options.stage, samples, options.length)
        self.require(
            min(samples, batch) < 1 or held_out < 0 or samples - held_out >= batch,
            f"{flag('samples')}, less {held_out} held out, fill no batch of {batch}; "
            f"lower {flag_of(options, 'batch')} or raise the samples",
        )

    def raise_all(self) -> None:
        """Raise PlanError, a line a fault, if there are any."""
        if self.found:
            raise PlanError("\n".join(self.found))


QUANTS = (*quantisers.METHODS, "none")
METRICS = ("perplexity", "taylor", "taylor-signed", "magnitude", "influence")
_MOST_BLOCKS = 10_000
TEACHERS = ("auto", "held", "streamed")
LOSSES = ("all", "answers")
PACKINGS = ("windows", "rows", "grouped")
SCHEDULES = ("cosine", "linear", "constant")
EMBEDDING_CODES = ("gptq", "nearest")
SHRINKAGE = 0.2  # gains on text unlike the calibration's, and costs nothing on its own kind (benchmarks/README.md)
LOFTQ_STEPS = 5  # as LoftQ's paper takes


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens stay: those a corpus uses, special ones and every single byte."""

    corpus: str = option("", "--trim-vocabulary", "Text whose tokens are kept, as for --data; default: keep all.")
    size: int = option(0, "--vocabulary-size", "At most so many tokens, those the corpus uses most; 0: all it uses.")

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.require(self.size >= 0, f"--vocabulary-size {self.size}: cannot be negative")
        faults.raise_all()

    @property
    def skipped(self) -> bool:
        return not self.corpus and self.size == 0

    @property
    def label(self) -> str:
        return f"vocabulary-{self.size}" if self.size else "vocabulary"


@dataclass(frozen=True)
class Pad:
    """Channels of zeros that make the feed-forward width a multiple, as GPTQ's file format needs."""

    multiple: int = option(0, "--pad-ffn", "Widen the feed-forward with zeros to a multiple of this, e.g. 32; 0 skips.")

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.require(self.multiple >= 0, f"--pad-ffn {self.multiple}: cannot be negative")
        faults.raise_all()

    @property
    def skipped(self) -> bool:
        return self.multiple == 0

    @property
    def label(self) -> str:
        return f"pad-{self.multiple}"


@dataclass(frozen=True)
class Depth:
    """Which blocks go (Shortened LLaMA, arXiv 2402.02834)."""

    remove: int = option(2, "--depth", "Blocks to remove; 0 skips the stage.")
    layers: str = option("", "--layers", "Blocks to run instead of a ranking, with repeats: 0-22,28-31.")
    metric: str = option("perplexity", "--metric", f"Ranking: {', '.join(METRICS)}.")
    protect_first: int = option(4, "--protect-first", "First blocks that always stay.")
    protect_last: int = option(2, "--protect-last", "Last blocks that always stay.")
    rerank: bool = option(False, "--rerank", "Rank again after each removal instead of once.")
    samples: int = option(10, "--depth-samples", "Calibration windows for the ranking.")
    length: int = option(128, "--depth-length", "Tokens per calibration window.")

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.require(self.remove >= 0, f"--depth {self.remove}: the number of blocks to remove cannot be negative")
        faults.one_of("--metric", self.metric, METRICS)
        faults.require(min(self.protect_first, self.protect_last) >= 0, "protected blocks cannot be negative")
        faults.of(lambda: faults.require(not self.layers or bool(self.sequence), "--layers names no block"))
        faults.windows("depth", self.samples, self.length)
        faults.raise_all()

    @property
    def skipped(self) -> bool:
        return self.remove == 0 and not self.layers

    @property
    def label(self) -> str:
        return f"depth-{self.remove}" if not self.layers else f"layers-{len(self.sequence)}"

    @property
    def sequence(self) -> list[int]:
        """The blocks that `layers` names, in order; empty without it."""
        blocks: list[int] = []
        for part in filter(None, self.layers.replace(" ", "").split(",")):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                raise PlanError(f"--layers: '{part}' is not a block or a range of blocks, e.g. 0-22,28-31")
            if last >= _MOST_BLOCKS or len(blocks) >= _MOST_BLOCKS:
                raise PlanError(f"--layers: '{part}' goes beyond the {_MOST_BLOCKS} blocks that a model may have here")
            blocks += range(first, last + 1)
        return blocks


@dataclass(frozen=True)
class Wanda:
    """Zeroes N of every M weights of a row, by WANDA (arXiv 2306.11695) or another method of stages/pruning."""

    pattern: str = option(
        "1:8", "--wanda", "N:M removes N of every M consecutive weights of a row, 0.5 half of each row; none skips."
    )
    samples: int = option(32, "--wanda-samples", "Calibration windows.")
    length: int = option(512, "--wanda-length", "Tokens per calibration window.")
    method: str = option("wanda", "--prune", f"What chooses the zeros: {', '.join(METHODS)}.")

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.one_of("--prune", self.method, tuple(METHODS))
        faults.require(
            not self.skipped or self.method == "wanda" or self.method not in METHODS,
            f"--prune {self.method} has nothing to prune with --wanda none; give an amount, e.g. --wanda 2:4",
        )
        if not self.skipped:
            faults.of(lambda: parse_amount(self.pattern))
        faults.windows("wanda", self.samples, self.length)
        faults.raise_all()

    @property
    def skipped(self) -> bool:
        return self.pattern == "none"

    @property
    def label(self) -> str:
        return f"{self.method}-{self.pattern.replace(' of ', '-').replace('/', 'in').replace(':', 'of')}"


@dataclass(frozen=True)
class Lora:
    """Recovers quality with adapters that are merged afterwards, by LoRA (arXiv 2106.09685) or stages/recovery."""

    rank: int = option(8, "--lora-rank", "Rank of the adapters.")
    alpha: int = option(16, "--lora-alpha", "Scale of the adapters is alpha / rank.")
    dropout: float = option(0.0, "--lora-dropout", "Dropout on the adapters' inputs.")
    targets: str = option(
        "all", "--lora-targets", "Linear layers to adapt, comma-separated (the thesis: q, k, v and o), or all."
    )
    data: str = option("", "--lora-data", "Training text: wikitext2, trivia_qa, alpaca or a file; default: --data's.")
    samples: int = option(148, "--lora-samples", "Training windows (the thesis: 8192).")
    length: int = option(512, "--lora-length", "Tokens per training window.")
    batch: int = option(8, "--lora-batch", "Windows per optimiser step.")
    micro_batch: int = option(2, "--lora-micro-batch", "Windows that go through the model at once.")
    steps: int = option(0, "--lora-steps", "Optimiser steps; 0 is --lora-epochs passes over the training windows.")
    epochs: int = option(1, "--lora-epochs", "Passes over the training windows.")
    learning_rate: float = option(1e-3, "--lora-lr", "Peak learning rate of AdamW; see --lora-schedule.")
    checkpointing: bool = option(False, "--lora-checkpointing", "Recompute activations to save memory.")
    save_steps: int = option(6, "--lora-save-steps", "Optimiser steps between durable points and held-out checks.")
    held_out: int = option(4, "--lora-held-out", "Training windows kept back to see when to stop; 0 does not look.")
    patience: int = option(2, "--lora-patience", "Stop after this many held-out checks in a row without a new best.")
    distill: float = option(0.0, "--distill", "Share of the loss that is KL to the uncompressed model, 0 to 1.")
    teacher: str = option(
        "auto", "--distill-teacher", "held in memory, streamed to disk before training, or auto: streamed up to 16 GiB."
    )
    method: str = option(
        "lora", "--recover", f"How, joined with +: {', '.join(RECOVERY)}; qlora and loftq come after gptq.", later=True
    )
    loss: str = option("all", "--lora-loss", "Tokens learnt: all, or of questions and instructions the answers.", True)
    packing: str = option(
        "windows", "--lora-packing", "Cut one long text into windows, or rows: each its own; grouped: by length.", True
    )
    schedule: str = option("cosine", "--lora-schedule", "Learning rate after warm-up: cosine, linear, constant.", True)
    warmup: float = option(0.1, "--lora-warmup", "Share of the steps over which the learning rate rises.", True)
    weight_decay: float = option(0.0, "--lora-weight-decay", "AdamW's weight decay.", True)
    noise: float = option(0.0, "--train-noise", "Deviation of noise before the MLP gates while training.", True)
    mask: float = option(0.0, "--train-mask", "Share of attention outputs zeroed while training.", True)
    packed: bool = option(False, "--lora-packed", "Keep quantised weights packed in memory; slower.", True)
    loftq_steps: int = option(
        0, "--loftq-steps", "With loftq, turns of fitting A and B and quantising; 0 is 5; 1 keeps the codes.", True, 1
    )
    distill_hidden: float = option(
        0.0, "--distill-hidden", "Weight in the loss of the teacher's hidden states after each block; 0 is none.", True
    )

    stage, title, trained = "lora", "LoRA training", "the adapter"

    def __post_init__(self) -> None:
        faults = _Faults()
        # What is the same is written the same: in fingerprints, folders' names and manifests.
        faults.of(self._settle)
        rank = f"--lora-rank {self.rank}: must be positive; use --skip lora to leave the stage out"
        faults.require(self.rank > 0, rank)
        faults.require(self.alpha > 0, f"--lora-alpha {self.alpha}: must be positive")
        faults.require(0 <= self.dropout < 1, f"--lora-dropout {self.dropout}: must be in [0, 1)")
        faults.require(self.steps >= 0, f"--lora-steps {self.steps}: cannot be negative")
        faults.require(self.epochs > 0, f"--lora-epochs {self.epochs}: must be positive")
        faults.one_of("--distill-teacher", self.teacher, TEACHERS)
        faults.one_of("--lora-loss", self.loss, LOSSES)
        faults.one_of("--lora-packing", self.packing, PACKINGS)
        faults.one_of("--lora-schedule", self.schedule, SCHEDULES)
        faults.require(0 <= self.warmup < 1, f"--lora-warmup {self.warmup}: a share from 0 to below 1")
        decay = f"--lora-weight-decay {self.weight_decay}: must be 0 or more, and finite"
        faults.require(0 <= self.weight_decay < math.inf, decay)
        faults.require(0 <= self.noise < math.inf, f"--train-noise {self.noise}: must be 0 or more, and finite")
        faults.require(0 <= self.mask < 1, f"--train-mask {self.mask}: must be in [0, 1)")
        hidden = f"--distill-hidden {self.distill_hidden}: must be 0 or more, and finite"
        faults.require(0 <= self.distill_hidden < math.inf, hidden)
        turns = f"--loftq-steps {self.loftq_steps}"
        faults.require(self.loftq_steps >= 0, f"{turns}: cannot be negative")
        faults.require(
            self.loftq_steps <= 0 or "loftq" in self.method.split("+"),
            f"{turns}: --recover {self.method} takes no such turns; give --recover loftq, or leave it out",
        )
        faults.training(self)
        faults.raise_all()

    def _settle(self) -> None:
        object.__setattr__(self, "method", str(self.recovery))
        if self.recovery.begin is not None and self.loftq_steps == 0:
            object.__setattr__(self, "loftq_steps", LOFTQ_STEPS)

    @property
    def skipped(self) -> bool:
        return False

    @property
    def label(self) -> str:
        name = self.method.replace("+", "-")
        return f"{name}-r{self.rank}" if self.recovery.adapter.RANKED else name

    @property
    def recovery(self) -> Recovery:
        return parse(self.method)

    @property
    def lean_loss(self) -> bool:
        """Whether logits have no copies in 32 bits while training, as who saves memory otherwise wants it too."""
        return (self.packed or self.checkpointing) and self.distill == 0

    @property
    def total_steps(self) -> int:
        return self.steps_over(self.samples)

    def steps_over(self, windows: int) -> int:
        """Optimiser steps with this many windows, those held out included: a text may have fewer than asked for."""
        return self.steps or self.epochs * ((windows - self.held_out) // self.batch)


@dataclass(frozen=True)
class LayerRule:
    """How some layers are quantised: those of this name, or its last part, in these blocks; `*` and none are all."""

    name: str
    quant: str
    group: int = 0  # 0: the stage's
    blocks: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, text: str) -> LayerRule:
        """Read `[BLOCKS.]NAME=QUANT[/GROUP]`. Raises PlanError that says what is wrong with it."""
        where = f"--quant-layers: '{text}'"
        match = re.fullmatch(r"(?:([\d,-]+|\*)\.)?([\w.]+|\*)\s*=\s*([\w-]+)(?:/(-?\d+))?", text)
        if match is None:
            raise PlanError(f"{where} is not [BLOCKS.]NAME=QUANT[/GROUP], e.g. 0-3,7.down_proj=gptq5-s/32")
        blocks, name, quant, group = match.groups()
        known = tuple(quantisers.METHODS)
        if quant not in known:
            raise PlanError(f"{where}: there is no quantiser {quant}{near(quant, known)}; there are {', '.join(known)}")
        least = quantisers.smallest_group(quant)
        if group is not None and int(group) != -1 and int(group) < least:
            raise PlanError(f"{where}: a group of {group}; at least {least}, or -1 for whole rows")
        numbers = frozenset(Depth(layers=blocks).sequence) if blocks not in (None, "*") else frozenset()
        return cls(name, quant, int(group or 0), numbers)

    def covers(self, block: int, name: str) -> bool:
        return (not self.blocks or block in self.blocks) and self.name in ("*", name, name.rpartition(".")[2])


@dataclass(frozen=True)
class Gptq:
    """Low-bit weights: GPTQ's (arXiv 2210.17323) unless another method is asked for."""

    quant: str = option("gptq4", "--quant", f"Method and bits: {', '.join(QUANTS)}. -channel is one scale a row.")
    group: int = option(
        32, "--group", "Weights that share a scale (the thesis: 128); the largest that fits all layers is used."
    )
    symmetric: bool = option(False, "--symmetric", "Fix the zero point in the middle of the grid.")
    activation_order: bool = option(True, "--activation-order", "Quantise the most used columns first.")
    scale_search: bool = option(True, "--scale-search", "Search each group's scale for the least error.")
    damping: float = option(0.01, "--damping", "Share of the mean diagonal added to the Hessian.")
    effort: str = option("normal", "--quant-effort", "normal, or high: then tune each block's output by gradient.")
    effort_steps: int = option(60, "--quant-steps", "Gradient steps a block of --quant-effort high.")
    quant_embeddings: int = option(0, "--quant-embeddings", "Also pack embedding and head at 8 or 4 bits; 0 does not.")
    embedding_codes: str = option(
        "", "--embedding-codes", "Of 4-bit embeddings: gptq, by the head's inputs, or nearest; default: gptq if able.",
        True, "nearest",
    )  # fmt: skip
    activation_bits: int = option(
        16, "--activation-bits", "8 rounds the inputs of quantised layers too, in all measurements.", later=True
    )
    samples: int = option(32, "--quant-samples", "Calibration windows.")
    length: int = option(512, "--quant-length", "Tokens per calibration window.")
    layers: str = option(
        "", "--quant-layers", "Settings of single layers: 'down_proj=gptq5-s/32; 0-3,7.q_proj=gptq3-s'.", later=True
    )
    smooth: bool = option(
        False, "--smooth", "With w4a8, QQQ's smoothing: divide outlying input channels, multiply their columns.", True
    )
    shrinkage: float = option(
        -1.0,
        "--hessian-shrinkage",
        "Share of the Hessian off its diagonal left out; -1: 0.2 with GPTQ.",
        True,
        0.0,
    )
    guidance: float = option(
        0.0, "--guidance", "Weigh tokens by the loss's squared gradient in a layer to this power; 0: alike.", True
    )

    def __post_init__(self) -> None:
        faults = _Faults()
        method, _, size = self.quant.rpartition("-g")  # as others name a group's size
        if method in QUANTS and size.isdecimal():
            faults.require(
                False, f"--quant {self.quant}: the group has a flag of its own: --quant {method} --group {size}"
            )
        else:
            faults.one_of("--quant", self.quant, tuple(QUANTS))
        least = quantisers.smallest_group(self.quant)
        faults.require(
            self.group == -1 or self.group >= least, f"--group {self.group}: at least {least}, or -1 for whole rows"
        )
        faults.require(0 < self.damping < 1, f"--damping {self.damping}: must be between 0 and 1")
        faults.of(self._settle_shrinkage)
        faults.of(self._require_guidance)
        faults.one_of("--quant-effort", self.effort, ("normal", "high"))
        faults.require(self.effort_steps > 0, f"--quant-steps {self.effort_steps}: must be positive")
        bits = self.activation_bits
        faults.require(bits in (8, 16), f"--activation-bits {bits}: 8, or 16 to leave them")
        faults.require(
            not self.skipped or bits != 8,
            "--activation-bits 8 rounds inputs of quantised layers, and --quant none leaves none; give --quant int8",
        )
        faults.require(self.quant_embeddings in (0, 4, 8), f"--quant-embeddings {self.quant_embeddings}: 8, 4 or 0")
        faults.of(self._settle_embedding)
        faults.windows("gptq", self.samples, self.length)
        faults.require(
            not self.layers or not self.skipped,
            "--quant-layers says how layers are quantised, and --quant none quantises none",
        )
        faults.require(
            not self.smooth or self.quant == "w4a8",
            "--smooth divides inputs before they are rounded, as QQQ does; give --quant w4a8 with it, not "
            f"{self.quant}. awq4 has scales of its own, searched for the weights",
        )
        faults.of(lambda: self.rules)
        faults.raise_all()

    def _settle_shrinkage(self) -> None:
        """What the default of --hessian-shrinkage means here; raises PlanError for what cannot be."""
        solved = self.quant in quantisers.METHODS and quantisers.method(self.quant).TUNES
        if self.shrinkage == -1:
            object.__setattr__(self, "shrinkage", SHRINKAGE if solved else 0.0)
        if not 0 <= self.shrinkage <= 1:
            raise PlanError(f"--hessian-shrinkage {self.shrinkage}: must be in [0, 1], or -1 for the default")
        if self.shrinkage and not solved:
            raise PlanError(
                f"--hessian-shrinkage is for GPTQ's solver, which --quant {self.quant} does not use; leave it out"
            )

    def _require_guidance(self) -> None:
        if not 0 <= self.guidance <= 1:
            raise PlanError(f"--guidance {self.guidance}: must be in [0, 1]")
        if self.guidance and not (self.quant in quantisers.METHODS and quantisers.method(self.quant).TUNES):
            raise PlanError(f"--guidance is for GPTQ's solver, which --quant {self.quant} does not use; leave it out")
        if self.guidance and self.smooth:
            raise PlanError("--guidance weighs tokens that --smooth looks at alike; leave one of them out")

    def _settle_embedding(self) -> None:
        """What the default of --embedding-codes means here; raises PlanError for what cannot be."""
        asked = self.embedding_codes
        if asked not in ("", *EMBEDDING_CODES):
            raise PlanError(f"--embedding-codes {asked}{near(asked, EMBEDDING_CODES)}: there are gptq and nearest")
        if self.quant_embeddings != 4 or self.quant not in quantisers.METHODS:
            if asked == "gptq":
                raise PlanError("--embedding-codes gptq is for 4 bits; give --quant-embeddings 4 and a --quant with it")
            return
        able = quantisers.method(self.quant).NEEDS != NOTHING
        if asked == "gptq" and not able:
            raise PlanError(
                f"--embedding-codes gptq needs what runs through the model, and --quant {self.quant} looks at weights "
                "alone; give nearest, or a quantiser of GPTQ's family"
            )
        object.__setattr__(self, "embedding_codes", asked or ("gptq" if able else "nearest"))

    @property
    def skipped(self) -> bool:
        return self.quant == "none"

    @property
    def label(self) -> str:
        name = self.quant + "-smooth" * self.smooth + "-mixed" * bool(self.layers)
        return name if self.activation_bits == 16 else f"{name}-a{self.activation_bits}"

    @property
    def rules(self) -> tuple[LayerRule, ...]:
        """What `layers` says, in order."""
        return tuple(LayerRule.parse(part.strip()) for part in self.layers.split(";") if part.strip())

    def with_embedding(self, bits: int) -> Gptq:
        """The same with embedding and head at these bits, 0 for as they are."""
        codes = "" if self.embedding_codes == "gptq" and bits != 4 else self.embedding_codes
        return replace(self, quant_embeddings=bits, embedding_codes=codes)

    def of(self, block: int, name: str) -> Gptq:
        """The settings of one layer, named relative to its block: of the rules for it the last one's."""
        rule = next((r for r in reversed(self.rules) if r.covers(block, name)), None)
        return self if rule is None else replace(self, quant=rule.quant, group=rule.group or self.group, layers="")


@dataclass(frozen=True)
class Tune:
    """Trains a quantised model's scales, minima and norms end to end (EfficientQAT, arXiv 2407.11062, section 3.3)."""

    steps: int = option(
        0, "--tune", "Train the quantised model's scales, minima and norms by so many optimiser steps; 0 skips."
    )
    learning_rate: float = option(3e-3, "--tune-lr", "Peak of its cosine: how far a step may change a scale, relative.")
    distill: float = option(1.0, "--tune-distill", "Share of the loss that is KL to the uncompressed model, 0 to 1.")
    data: str = option("", "--tune-data", "Training text, as for --lora-data; default: --data's.")
    samples: int = option(256, "--tune-samples", "Training windows.")
    length: int = option(512, "--tune-length", "Tokens per training window.")
    batch: int = option(4, "--tune-batch", "Windows per optimiser step.")
    micro_batch: int = option(2, "--tune-micro-batch", "Windows that go through the model at once.")
    save_steps: int = option(10, "--tune-save-steps", "Optimiser steps between durable points and held-out checks.")
    held_out: int = option(8, "--tune-held-out", "Windows kept back to see when to stop; 0 does not look.")
    patience: int = option(2, "--tune-patience", "Stop after this many held-out checks in a row without a new best.")

    # As lora's options of these names; no flags.
    stage, title, trained = "tune", "Training of scales", "the set of scales"
    teacher, loss, packing, schedule = "auto", "all", "windows", "cosine"
    warmup, weight_decay, checkpointing, distill_hidden = 0.1, 0.0, False, 0.0

    def __post_init__(self) -> None:
        faults = _Faults()
        faults.require(self.steps >= 0, f"--tune {self.steps}: cannot be negative; 0 skips the stage")
        faults.training(self)
        faults.raise_all()

    @property
    def skipped(self) -> bool:
        return self.steps == 0

    @property
    def label(self) -> str:
        return f"tune-{self.steps}"

    @property
    def total_steps(self) -> int:
        return self.steps

    def steps_over(self, windows: int) -> int:
        """Optimiser steps, however many windows there are."""
        return self.steps


@dataclass(frozen=True)
class Eora:
    """A training-free low-rank answer to the compression error (EoRA, arXiv 2410.21271)."""

    rank: int = option(
        64, "--eora", "Rank of the compensation (the thesis: 32); the default is less where a layer has less; 0 skips."
    )
    against: str = option("parent", "--eora-against", "Error against the checkpoint before quantisation, or dense.")
    bits: int = option(8, "--eora-bits", "16, or 8 to round the adapter to packed 8-bit codes.")
    samples: int = option(32, "--eora-samples", "Calibration windows (the thesis: 64).")
    length: int = option(512, "--eora-length", "Tokens per calibration window.")
    shrinkage: float = option(
        -1.0, "--eora-shrinkage", "Share of X^T X off its diagonal left out, as in GPTQ; -1: 0.2.", True, 0.0
    )

    def __post_init__(self) -> None:
        if self.shrinkage == -1:
            object.__setattr__(self, "shrinkage", SHRINKAGE)
        faults = _Faults()
        faults.require(
            0 <= self.shrinkage <= 1, f"--eora-shrinkage {self.shrinkage}: must be in [0, 1], or -1 for the default"
        )
        faults.require(self.rank >= 0, f"--eora {self.rank}: the rank cannot be negative")
        faults.one_of("--eora-against", self.against, ("parent", "dense"))
        faults.require(self.bits in (8, 16), f"--eora-bits {self.bits}: 8 or 16")
        faults.windows("eora", self.samples, self.length)
        faults.raise_all()

    @property
    def skipped(self) -> bool:
        return self.rank == 0

    @property
    def label(self) -> str:
        # The default says no rank: a model's smallest layer may have less.
        return "eora" + f"-r{self.rank}" * (self.rank != Eora.rank) + "-8bit" * (self.bits == 8)


def decisive(options: Any) -> dict[str, Any]:
    """What of a stage's options decides its output: all fields, but not later ones at their default or as before."""
    return {
        f.name: value
        for f in fields(options)
        for value in [getattr(options, f.name)]
        if not f.metadata.get("later") or value not in (f.default, f.metadata["before"])
    }


Options = Vocabulary | Pad | Depth | Wanda | Lora | Gptq | Tune | Eora
Training = Lora | Tune

STAGES: dict[str, type[Options]] = {
    "vocabulary": Vocabulary,
    "pad": Pad,
    "depth": Depth,
    "wanda": Wanda,
    "lora": Lora,
    "gptq": Gptq,
    "tune": Tune,
    "eora": Eora,
}
