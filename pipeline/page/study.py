"""What a report is about: the stage runs of one run or of a sweep, and the configurations they make up."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepress.checkpoints.manifest import Manifest

SOURCE = "source"


@dataclass(frozen=True)
class StageRun:
    """One finished checkpoint and what was measured on it; the uncompressed model is the one at position 0."""

    position: int
    stage: str
    label: str  # as in the folder's name: wanda-1of8
    fingerprint: str
    folder: Path | None  # None: not on this disk
    perplexity: float
    bits_per_byte: float | None
    measured: tuple[str, str, str]  # protocol, text, precision: only equal ones compare
    file_bytes: int
    packed_bytes: int | None
    parameters_total: int | None
    parameters_nonzero: int | None
    pattern: str = ""
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    manifest: Manifest | None = None

    @property
    def name(self) -> str:
        return "uncompressed" if self.stage == SOURCE else self.label


@dataclass(frozen=True)
class Configuration:
    """A way from the uncompressed model (first) to a result (last)."""

    name: str
    runs: tuple[StageRun, ...]
    recipe: dict[str, Any] | None = None  # as Recipe.to_dict()

    @property
    def source(self) -> StageRun:
        return self.runs[0]

    @property
    def result(self) -> StageRun:
        return self.runs[-1]

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(run.stage for run in self.runs[1:])


@dataclass(frozen=True)
class Study:
    """All that lies in one output folder."""

    kind: str  # run or sweep
    name: str
    model: str
    out: Path
    configurations: tuple[Configuration, ...]
    failures: dict[str, str] = field(default_factory=dict)  # configuration -> reason
    soc: str = "siracusa"
    verdict: dict[str, Any] | None = None  # of the run's result, as Verdict.to_dict()
    about: str = ""
    machine: str = ""  # that the command ran on
    counts: dict[str, int] = field(default_factory=dict)  # of a sweep: stage runs asked, distinct, shared
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> StageRun:
        return self.configurations[0].source

    @property
    def runs(self) -> tuple[StageRun, ...]:
        """Every stage run once, the sources included, in the order of the configurations."""
        return tuple({(r.fingerprint, r.measured): r for c in self.configurations for r in c.runs}.values())

    def of_stage(self, stage: str) -> list[StageRun]:
        """The runs of one stage, each fingerprint once."""
        return list({r.fingerprint: r for r in self.runs if r.stage == stage}.values())

    def users(self, run: StageRun) -> list[str]:
        """The configurations that go through a stage run."""
        return [c.name for c in self.configurations if any(r.fingerprint == run.fingerprint for r in c.runs)]

    @property
    def candidates(self) -> list[Choice]:
        """What there is to choose from: a run's stages, or a sweep's configurations."""
        if self.kind == "run":
            return [Choice(r.name, r, self.source) for r in self.configurations[0].runs]
        return [Choice(c.name, c.result, c.source) for c in self.configurations]

    @property
    def comparable(self) -> list[Choice]:
        """The candidates measured like most of them, with a finite perplexity."""
        kinds = Counter(c.run.measured for c in self.candidates)
        usual = kinds.most_common(1)[0][0]
        return [c for c in self.candidates if c.run.measured == usual and math.isfinite(c.run.perplexity)]

    @property
    def front(self) -> list[Choice]:
        """The comparable candidates that no other beats in both bytes and perplexity, the smallest first."""
        choices = self.comparable
        kept = pareto([(self.size(c.run), c.run.perplexity) for c in choices])
        return sorted((choices[i] for i in kept), key=lambda c: self.size(c.run))

    @property
    def all_packed(self) -> bool:
        """Whether packed bytes are known of every stage run; else file bytes are compared."""
        return all(run.packed_bytes is not None for run in self.runs)

    def size(self, run: StageRun) -> int:
        """Bytes that sizes are compared by: packed for the edge, or of the files where one run did not say."""
        return run.packed_bytes if self.all_packed and run.packed_bytes is not None else run.file_bytes

    @property
    def size_name(self) -> str:
        return "packed bytes" if self.all_packed else "file bytes"

    def configuration_of(self, choice: Choice) -> Configuration:
        return next(c for c in self.configurations if any(r is choice.run for r in c.runs))

    @property
    def smallest(self) -> Configuration:
        """The configuration that the detailed figures follow: a run's own, the smallest of a sweep's front."""
        return self.configurations[0] if self.kind == "run" or not self.front else self.configuration_of(self.front[0])


@dataclass(frozen=True)
class Choice:
    """A row of the report's table and a point of its Pareto figure."""

    name: str
    run: StageRun
    source: StageRun


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Which points no other beats: both coordinates at most as large, and one smaller. Equal points all stay."""

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b <= y and (a < x or b < y) for a, b in points)

    return [i for i, (x, y) in enumerate(points) if not beaten(x, y)]
