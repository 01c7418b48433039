"""Print what a person sees: the plan, the table of stages, the verdict, what a training takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.packed_sizes import PackedSizes, packed_sizes
from edgepress.checkpoints.runtime import machine
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.check import Verdict
from edgepress.pipeline.plan import StagePlan
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.tables import print_whole
from edgepress.pipeline.tree import duration_text, measured_speed
from edgepress.stages import tune
from edgepress.stages.options import Lora, Tune
from edgepress.stages.recovery.shapes import adapters

if TYPE_CHECKING:
    from edgepress.pipeline.run import RunResult


_MIB = 2**20


def print_summary(console: Console, result: RunResult, out: Path) -> None:
    """The final table: what each stage did, and whether the result fits."""
    report = result.report
    first = report["baseline"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("stage", "ppl", "params M", "nonzero M", "file MiB", "packed", "N:M", "sec", "peak MiB"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    parameters = result.stages[0].checkpoint.parent().shape.parameters_total if result.stages else 0
    counts = (_millions(parameters), _millions(parameters))
    table.add_row("0 source", f"{first['perplexity']:.2f}", *counts, *_sizes(**report["source"]))
    for position, stage in enumerate(report["stages"], 1):
        sparsity = stage["sparsity"]
        table.add_row(
            f"{position} {stage['stage']}",
            f"{stage['perplexity']['after']:.2f}",
            _millions(stage["parameters_total"]),
            _millions(stage["parameters_nonzero"]),
            *_sizes(**stage),
            sparsity["pattern"] or "",
            f"{stage['seconds']:.0f}",
            f"{stage['peak_memory_bytes'] / _MIB:.0f}",
        )
    console.print(f"\n{report['model']}; ppl: {first['protocol']}; {first['text']}", highlight=False)
    print_whole(console, table)
    console.print(report["hardware"]["summary"], highlight=False)
    console.print(f"Measured in {first['dtype']} on {machine()}.", highlight=False)
    if "smollm2-135m-instruct" in report["model"]:
        console.print("The packaged model's weights were 4-bit (GGUF Q4_1) before it came here.", highlight=False)
    if result.stages and not result.computed:
        console.print("Nothing to do: every stage was in the store already.", style="green")
    made = f"Result: {out / 'result'}" if result.stages else "Every stage was skipped: there is no result"
    console.print(f"{made}   report: {out / 'report.json'}", highlight=False, soft_wrap=True)


def print_plan(
    console: Console,
    model: str,
    shape: ModelShape,
    stages: list[StagePlan],
    notes: tuple[str, ...],
    verdict: Verdict | str,
    more: Sequence[str] = (),
) -> None:
    """The forecast as a table; `more` are lines about single stages."""
    console.print(f"Plan for {model}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("stage", "blocks", "params M", "nonzero M", "file MiB", "packed", "N:M", "bits", "peak MiB"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)

    def row(name: str, s: ModelShape, peak: str) -> None:
        found = sorted({x.grid.bits for block in s.blocks for x in block.linears if x.grid})
        bits = "-".join(map(str, dict.fromkeys(found[:1] + found[-1:])))
        pattern = str(s.pattern or "")
        counts = (_millions(s.parameters_total), _millions(s.parameters_nonzero))
        table.add_row(
            name, str(len(s.blocks)), *counts, *_sizes(s.file_bytes, packed_sizes(s).total), pattern, bits, peak
        )

    row("0 source", shape, "")
    for position, stage in enumerate(stages, 1):
        row(f"{position} {stage.stage}", stage.shape, f"{stage.cost.peak_memory_bytes / _MIB:.0f}")
    print_whole(console, table)
    for note in (*notes, *(remark for stage in stages for remark in stage.remarks)):
        console.print(f"  ! {note}", style="yellow", highlight=False)
    for line in more:
        console.print(line, highlight=False)
    total = sum(stage.written_bytes for stage in stages)
    scratch = max((stage.cost.scratch_bytes for stage in stages), default=0)
    console.print(
        f"Disk: {size_text(total, 'MiB', 1)} for all stages, with shards that they share counted once. "
        f"Up to {size_text(scratch, 'MiB', 1)} more while a stage runs.",
        highlight=False,
    )
    console.print(verdict if isinstance(verdict, str) else verdict.summary, highlight=False)


def print_packed(console: Console, path: Path, nbytes: int, file_bytes: int, sizes: PackedSizes) -> None:
    """What a packed file holds, part by part."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    table.add_column("bytes", justify="right")
    parts = sizes.parts() | ({"tokenizer": nbytes - sizes.total} if nbytes != sizes.total else {})
    for name, size in parts.items():
        table.add_row(name, f"{size:,}")
    print_whole(console, table)
    console.print(
        f"{path}: {nbytes:,} bytes, {nbytes / file_bytes:.1%} of the {file_bytes:,} of the checkpoint's files",
        highlight=False,
        soft_wrap=True,
    )


def _sizes(file_bytes: int, packed_bytes: int, **_: Any) -> tuple[str, str]:
    return f"{file_bytes / _MIB:.1f}", f"{packed_bytes / _MIB:.1f}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


# --- what a training takes --------------------------------------------------------------------------------------------
# What a recipe's lora and tune stages train, add and take, told before they run.


@dataclass(frozen=True)
class RecoveryForecast:
    stage: str
    method: str
    trainable_parameters: int
    trainable_share: float  # of the model's parameters without adapters
    adapter_bytes: int  # of the trained numbers as they would be stored
    added_bytes: int  # beside the weights: nothing where the adapter is merged
    peak_memory_bytes: int
    seconds: float | None  # None where the device is not here

    def to_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)

    def in_words(self) -> str:
        where = f"{self.added_bytes:,} bytes beside them" if self.added_bytes else "merged into them, no byte added"
        return (
            f"{self.stage} ({self.method}): trains {self.trainable_parameters:,} parameters, "
            f"{100 * self.trainable_share:.3g} % of the weights; {where}; "
            f"peak memory about {size_text(self.peak_memory_bytes, 'MiB', 0)}"
            + ("" if self.seconds is None else f"; about {duration_text(self.seconds)} here")
        )


def forecast_recovery(recipe: Recipe, source: ModelShape, plans: Sequence[StagePlan]) -> list[RecoveryForecast]:
    """One for lora and tune each, if they are there. Measures how fast this machine multiplies, for half a second."""
    found, before = [], source
    for step in plans:
        options = step.options
        if isinstance(options, Lora):
            trained = adapters(before, options)
            count = sum(x.adapter_parameters for x in trained)
            size = sum(x.adapter_bytes for x in trained)
            found.append(
                RecoveryForecast(
                    step.stage,
                    options.method,
                    count,
                    count / before.parameters_total,
                    size,
                    size if options.recovery.quantised else 0,
                    step.cost.peak_memory_bytes,
                    _seconds(recipe, step),
                )
            )
        elif isinstance(options, Tune):
            count = tune.trainable_parameters(before)
            peak, share = step.cost.peak_memory_bytes, count / before.parameters_total
            found.append(RecoveryForecast(step.stage, "scales", count, share, 0, 0, peak, _seconds(recipe, step)))
        before = step.shape
    return found


def _seconds(recipe: Recipe, step: StagePlan) -> float | None:
    try:
        speed = measured_speed(recipe.device, recipe.dtype)
    except PlanError:  # a plan may be made for another machine
        return None
    return step.cost.seconds(speed)
