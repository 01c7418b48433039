"""Print the verdict on a terminal, in at most 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from edgepress.checkpoints.memory import size_text
from edgepress.hardware.check import Verdict
from edgepress.hardware.levers import Levers
from edgepress.hardware.needs import operator_name
from edgepress.hardware.placement import STREAMED
from edgepress.hardware.rates import Range
from edgepress.hardware.soc import Soc
from edgepress.hardware.units import count_text, quantity_text, times_text

COLUMNS = 80


def print_verdict(console: Console, verdict: Verdict) -> None:
    """All of the verdict; a narrow or absent terminal gets at most 80 columns."""
    console.print(_heading(verdict), highlight=False, markup=False)
    console.print(_memory_table(verdict))
    console.print(verdict.summary, style="green" if verdict.fits else "red", highlight=False, markup=False)
    console.print()
    for line in _details(verdict):
        console.print(line, highlight=False, markup=False)
    if verdict.levers is not None:
        _print_levers(console, verdict.levers, verdict.soc, verdict.model)
    if verdict.notes:
        console.print("\nNotes", style="bold")
    for note in verdict.notes:
        console.print(Padding(note, (0, 0, 0, 2)), highlight=False, markup=False)


def _heading(verdict: Verdict) -> str:
    asked, rule = verdict.request, verdict.cache
    window = f", newest {rule.form.window} tokens and {rule.form.sinks} sinks" if rule and rule.form.window else ""
    groups = " with its scales" if rule and rule.groups else ""
    return (
        f"{verdict.model} ({verdict.family}, {count_text(verdict.parameters)} parameters) on {verdict.soc}\n"
        f"context {asked.context}, KV cache {asked.kv_bits} bit{groups}{window}, "
        f"activations {asked.activation_bits} bit, prefill {asked.chunk} tokens at once"
    )


def _memory_table(verdict: Verdict) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("memory", "capacity", "used", "peak", "headroom", ""):
        table.add_column(column, justify="left" if column in ("memory", "") else "right", no_wrap=True)
    for use in verdict.memories:
        if use.role == "off_chip" and not use.peak_bytes:
            continue
        sizes = (size_text(x) for x in (use.capacity_bytes, use.used_bytes, use.peak_bytes, use.headroom_bytes))
        fate = "fits" if use.fits else times_text(use.peak_bytes, use.capacity_bytes)
        name = f"{use.name} ({use.role.replace('_', '-')})"
        table.add_row(name, *sizes, fate, style="" if use.fits else "red")
        for part, size in use.parts:
            table.add_row(f"  {part}", "", size_text(size), style="dim")
        for part, size in use.transient:
            table.add_row(f"  {part}", "", "", size_text(size), style="dim")
    return table


def _details(verdict: Verdict) -> Iterator[str]:
    sizes, found, asked = verdict.footprint, verdict.needs, verdict.request
    how = "measured" if sizes.file_measured else "predicted"
    yield (
        f"Weights: {size_text(sizes.file_bytes)} in files ({how}), {size_text(sizes.packed_bytes)} packed, "
        f"{size_text(sizes.chip.total)} in the chip's layout ({sizes.layout})."
    )
    prefill, decode = found.prefill.peak, found.decode.peak
    yield (
        f"Activations: {size_text(prefill.nbytes)} to prefill {asked.chunk} at once (at {prefill.operator}), "
        f"{size_text(decode.nbytes)} to decode (at {decode.operator}); addresses take {size_text(found.arena)}."
    )
    yield from _tiles(verdict)
    yield from _streams(verdict)
    yield from _times(verdict)


def _tiles(verdict: Verdict) -> Iterator[str]:
    failing = [tiling for tiling in verdict.needs.tilings if not tiling.fits]
    working = next((use for use in verdict.memories if use.role == "working"), None)
    if working is None:
        yield "Tiles: none are cut; the engines read weights, cache and activations where they lie."
    elif failing:
        yield f"Operators without a tile in {working.name}, and the smallest that would do:"
        for tiling in failing:
            yield f"  {operator_name(tiling)}: {size_text(tiling.smallest_bytes)}. {tiling.reason}"
    else:
        hardest = verdict.needs.hardest
        yield (
            f"Tiles: every operator has one in {working.name}; {operator_name(hardest)} needs most, at least "
            f"{size_text(hardest.smallest_bytes)}."
        )


def _streams(verdict: Verdict) -> Iterator[str]:
    placement = verdict.placement
    if not placement.streamed:
        in_place = all(use.role != "working" for use in verdict.memories)
        where = "lie in the memories above" if in_place else "stay on the chip"
        yield f"Streams: nothing; every weight and the KV cache {where}."
        return
    off_chip = sorted({t.memory for t in placement.tensors if t.state == STREAMED})
    if not off_chip:
        size = size_text(placement.homeless_bytes)
        yield f"Streams: {size} have no place in the memories above, and there is none to stream them from."
        return
    blocks = placement.per_block()
    most = max(blocks, key=lambda key: blocks[key])
    where = "outside the blocks" if most == "outer" else f"in block {most}"
    away = sum(t.nbytes for t in placement.streamed)
    yield (
        f"Streams: {size_text(away)} do not stay on the chip; a token moves {size_text(placement.streamed_per_token)} "
        f"to or from {' + '.join(off_chip)}, block by block, most {where}: {size_text(blocks[most])}."
    )
    if placement.homeless_bytes:
        yield f"Not even off-chip memory holds all: {size_text(placement.homeless_bytes)} have no place."


def _times(verdict: Verdict) -> Iterator[str]:
    """The estimate with its range, and the bound below which no implementation can be."""
    if verdict.timing is None:
        return
    if isinstance(verdict.timing, str):
        yield verdict.timing
        return
    for run in (verdict.timing.decode, verdict.timing.prefill):
        what = "a token" if run.mode == "decode" else f"{run.tokens} tokens"
        energy = "" if run.joules is None else f", {_range(run.joules, 'J')}"
        yield (
            f"{run.mode.capitalize()}, {what} at context {run.context}: {_range(run.seconds, 's')}{energy}; bound "
            f"{quantity_text(run.bound_seconds.default, 's')} by {run.bound_by}."
        )
    speed = verdict.timing.decode.tokens_per_second
    yield (
        f"That is {speed:.3g} token/s, estimated and not measured: {verdict.timing.basis}, see --json for which on "
        "what."
    )


def _range(found: Range, unit: str) -> str:
    low, default, high = (quantity_text(x, unit) for x in (found.low, found.default, found.high))
    return f"{default} ({low} to {high})"


def print_soc(console: Console, name: str, soc: Soc) -> None:
    """A chip's memories, engines and settings."""
    console.print(f"{name}: {soc.description or soc.name}", style="bold", highlight=False, markup=False)
    for memory in soc.memories:
        taken = f", {size_text(memory.reserved_bytes)} of it reserved" if memory.reserved else ""
        role = memory.role.replace("_", "-")
        console.print(f"  {memory.name}: {size_text(memory.capacity_bytes)}, {role}{taken}", highlight=False)
    engines = ", ".join(f"{engine.name} ({engine.kind})" for engine in soc.engines)
    console.print(f"  engines: {engines}; layout: {soc.layout.name}", highlight=False)
    for setting in soc.settings:
        console.print(Padding(f"--set {setting}", (0, 0, 0, 2)), highlight=False, markup=False)


def _print_levers(console: Console, levers: Levers, soc: str, model: str) -> None:
    console.print("\nWhat would have to give", style="bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("lever", "now", "furthest", "saves at most", "enough alone"):
        table.add_column(column, justify="right" if column == "saves at most" else "left")
    for worth in levers.ranked:
        table.add_row(worth.lever, worth.now, worth.furthest, size_text(worth.saved_bytes), worth.enough or "no")
    natural = console.measure(table, options=console.options.update(max_width=10 * console.width)).maximum
    if natural > console.width and any(worth.enough for worth in levers.ranked):
        # Options in two columns stay whole; the others break between words.
        for options in (table.columns[2], table.columns[4]):
            options.width = max(len(word) for cell in (options.header, *options.cells) for word in str(cell).split())
    console.print(table)
    if levers.options_for:
        console.print(f"Options of stages are for {levers.options_for}.", highlight=False)
    then = ", ".join(f"{role} {size_text(size)}" for role, size in levers.needs_then.items() if size)
    if levers.smallest:
        console.print(f"Smallest change that fits: {', '.join(levers.smallest)}.", style="bold", highlight=False)
        console.print(f"Then it needs: {then}.", highlight=False)
        if not levers.options_for:
            console.print(f"Its stages: compress plan --model {model} {levers.options}", highlight=False, markup=False)
        if levers.spread:
            console.print(f"Or, spread over more of them: {', '.join(levers.spread)}.", highlight=False)
    else:
        missing = ", ".join(f"{size_text(size)} of {role}" for role, size in levers.missing_then.items())
        console.print(
            f"Nothing here is enough: with every lever at its end {missing} are missing on {soc}.", highlight=False
        )
