"""What several checkpoints make of one prompt: a table, plain lines, or JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.eval.generate import Continuation, Decoding, same_words

Named = tuple[str, Checkpoint]


def as_dict(prompt: str, decoding: Decoding, entries: list[Named], found: list[Continuation]) -> dict[str, Any]:
    first = found[0].text
    return {
        "prompt": prompt,
        "decoding": asdict(decoding),
        "continuations": [
            {
                "checkpoint": label,
                "folder": str(checkpoint.folder),
                "fingerprint": checkpoint.fingerprint,
                "text": c.text,
                "tokens": c.tokens,
                "ended": c.ended,
                "seconds": c.seconds,
                "same_words_as_first": same_words(c.text, first),
            }
            for (label, checkpoint), c in zip(entries, found, strict=True)
        ],
    }


def print_plain(console: Console, entries: list[Named], found: list[Continuation]) -> None:
    """One heading and one text a checkpoint; nothing is wrapped, so that lines can be searched and compared."""
    for place, c in enumerate(found):
        agreement = "" if place == 0 else _agreement(entries[0][0], c, found[0])
        _line(console, f"[{entries[place][0]}]{agreement}")
        _line(console, c.text.strip("\n"))
        _line(console, "")


def print_table(
    console: Console, prompt: str, decoding: Decoding, entries: list[Named], found: list[Continuation]
) -> None:
    """One row a checkpoint; what all the texts begin with like the first is dim, so that the eye finds the change."""
    console.print(Words(prompt, style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("continuation", overflow="fold")
    for place, c in enumerate(found):
        words = Words(c.text.strip("\n"))
        if place > 0:
            words.stylize("dim", 0, _same_start(words.plain, found[0].text.strip("\n")))
        table.add_row(entries[place][0], words)
    console.print(table)
    console.print(f"{decoding}; dim: the same as {entries[0][0]}", highlight=False)


def _agreement(first: str, c: Continuation, other: Continuation) -> str:
    count = same_words(c.text, other.text)
    return f"  begins with {count} word{'s' * (count != 1)} of {first}"


def _same_start(text: str, other: str) -> int:
    """Characters that two texts share from their beginning."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
