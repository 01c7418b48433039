"""The campaign's table: for each kind how much was tried, how much was right, and what was wrong with the rest."""

from __future__ import annotations

from collections.abc import Sequence

from tests.campaign.case import FAULTS, KINDS
from tests.campaign.runner import Result


def table(results: Sequence[Result]) -> str:
    """Markdown. A kill or an input counts as right where nothing is wrong with its case."""
    head = ["kind", "cases", "tried", "right", "wrong", *FAULTS, "slowest s", "peak MiB"]
    rows = []
    for group in ("kills", "hostile"):
        of_group = [r for r in results if r.group == group]
        for name in KINDS:
            if of_kind := [r for r in of_group if r.kind == name]:
                rows.append(_row(name, of_kind))
        if of_group:
            rows.append(_row(f"**all {group}**", of_group))
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _tried(result: Result) -> int:
    return result.kills if result.group == "kills" else result.inputs


def _row(name: str, results: Sequence[Result]) -> list[str]:
    wrong = [r for r in results if r.faults]
    tried, bad = sum(map(_tried, results)), sum(max(1, _tried(r)) for r in wrong)
    columns = [str(sum(fault in r.faults for r in wrong)) for fault in FAULTS]
    counts = [str(len(results)), str(tried), str(max(0, tried - bad)), str(bad), *columns]
    slowest, peak = max(r.seconds for r in results), max(r.peak_bytes for r in results)
    return [name, *counts, f"{slowest:.0f}", f"{peak / 2**20:.0f}"]


def failures(results: Sequence[Result], seed: int) -> str:
    lines = []
    for result in sorted(results, key=lambda r: (r.kind, r.index)):
        if result.faults:
            lines.append(f"{result.kind}: python -m tests.campaign --seed {seed} --case {result.index}")
            lines += [f"    {column}: {words}" for column, words in result.faults.items()]
    return "\n".join(lines)


def story(result: Result) -> str:
    """All that happened in one case."""
    head = f"case {result.index}: {result.kind}, {result.kills} kills, {result.inputs} inputs, {result.seconds:.1f} s"
    told = [f"  {line}" for words in result.story for line in words.splitlines()]
    wrong = [f"  WRONG, {column}: {words}" for column, words in result.faults.items()] or ["  right"]
    return "\n".join([head, *told, *wrong])
