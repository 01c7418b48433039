"""The numbers behind the figures, taken from the manifests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgepress.pipeline.page.read import StageRun, Study


@dataclass(frozen=True)
class Step:
    """One bar of a waterfall: a value before and after a stage."""

    name: str
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before


def waterfall(names: Sequence[str], values: Sequence[float]) -> list[Step]:
    """Steps between consecutive values; names[0] names the start. The changes sum to last minus first."""
    pairs = zip(names[1:], values, values[1:], strict=False)
    return [Step(name, before, after) for name, before, after in pairs]


@dataclass(frozen=True)
class Effect:
    """What one stage did in one place: its perplexity over its parent's, and its bytes over its parent's."""

    stage: str
    configuration: str
    perplexity: float
    size: float


def effects(study: Study) -> dict[str, list[Effect]]:
    """Every stage run of a sweep against its parent, by stage, each distinct pair once."""
    found: dict[tuple[str, str], Effect] = {}
    for configuration in study.configurations:
        for before, after in zip(configuration.runs, configuration.runs[1:], strict=False):
            if before.measured == after.measured and math.isfinite(before.perplexity + after.perplexity):
                ratio = after.perplexity / before.perplexity
                size = study.size(after) / study.size(before)
                key = (before.fingerprint, after.fingerprint)
                found.setdefault(key, Effect(after.stage, configuration.name, ratio, size))
    by_stage: dict[str, list[Effect]] = {}
    for effect in found.values():
        by_stage.setdefault(effect.stage, []).append(effect)
    return by_stage


@dataclass(frozen=True)
class Importance:
    """The scores of the blocks of the model that the depth stage was given; the lowest go first."""

    metric: str
    scores: dict[int, float]  # by block, of the first round
    removed: tuple[int, ...]  # in order
    rounds: int


def importance(run: StageRun) -> Importance | None:
    """None where the manifest is not here or the blocks were named by hand."""
    facts = _facts(run)
    if not facts.get("ranking"):
        return None
    scores = {int(block): float(score) for block, score in facts["ranking"][0].items()}
    removed = tuple(int(block) for block in facts["removed"])
    return Importance(str(facts["metric"]), dict(sorted(scores.items())), removed, len(facts["ranking"]))


@dataclass(frozen=True)
class LayerErrors:
    """One relative squared output error for each quantised layer; NaN where a block has no such layer."""

    blocks: tuple[int, ...]  # numbers in the uncompressed model
    layers: tuple[str, ...]
    errors: tuple[tuple[float, ...], ...]  # (blocks, layers)

    @property
    def worst(self) -> list[tuple[int, str, float]]:
        """All layers, the largest error first."""
        cells = [
            (block, layer, error)
            for block, row in zip(self.blocks, self.errors, strict=True)
            for layer, error in zip(self.layers, row, strict=True)
            if math.isfinite(error)
        ]
        return sorted(cells, key=lambda cell: -cell[2])


def layer_errors(run: StageRun) -> LayerErrors | None:
    """Of a gptq run; None where its manifest is not here."""
    blocks = _facts(run).get("blocks")
    if not blocks:
        return None
    layers = tuple(dict.fromkeys(name for block in blocks for name, facts in block.items() if _has_error(facts)))
    rows = tuple(
        tuple(float(block[name]["error"]) if _has_error(block.get(name)) else math.nan for name in layers)
        for block in blocks
    )
    assert run.manifest is not None
    numbers = run.manifest.origin.get("blocks") or range(len(blocks))
    return LayerErrors(tuple(int(n) for n in numbers), layers, rows) if layers else None


def _has_error(facts: Any) -> bool:
    return isinstance(facts, dict) and "error" in facts


@dataclass(frozen=True)
class Losses:
    """A LoRA training, in nats a token."""

    training: tuple[float, ...]  # of step 1, 2, …
    held_out: dict[int, float]  # by step
    kept_step: int | None


def losses(run: StageRun) -> Losses | None:
    facts = _facts(run)
    if not facts.get("losses"):
        return None
    held_out = {int(step): float(loss) for step, loss in facts.get("held_out_losses", {}).items()}
    return Losses(tuple(map(float, facts["losses"])), dict(sorted(held_out.items())), facts.get("kept_step"))


def _facts(run: StageRun) -> dict[str, Any]:
    return run.manifest.facts if run.manifest else {}


@dataclass(frozen=True)
class Memory:
    """One memory of the chip, in bytes."""

    name: str
    role: str
    capacity: int
    parts: tuple[tuple[str, int], ...]  # what lies there at its fullest

    @property
    def used(self) -> int:
        return sum(size for _, size in self.parts)

    @property
    def fits(self) -> bool:
        return self.used <= self.capacity


def memories(verdict: dict[str, Any]) -> list[Memory]:
    """The memory map of Verdict.to_dict(); memory off the chip is listed only where something lies there."""
    found = []
    for use in verdict["memories"]:
        parts = use["parts"].items()
        memory = Memory(use["name"], use["role"], use["capacity_bytes"], tuple((n, s) for n, s in parts if s))
        if memory.used or memory.role != "off_chip":
            found.append(memory)
    return found


def weight_room(verdict: dict[str, Any]) -> int:
    """Bytes of the chip's memories for weights."""
    return sum(use["capacity_bytes"] for use in verdict["memories"] if use["role"] == "weights")
