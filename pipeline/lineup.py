"""Several checkpoints side by side: an output folder stands for all stages of its last run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import CheckpointError
from checkpoints.sources import open_source
from pipeline.store import MARKER


@dataclass(frozen=True)
class Entry:
    label: str
    checkpoint: Checkpoint


def line_up(names: Sequence[str]) -> list[Entry]:
    """What the names stand for, in order, each with a label of its own.

    Raises CheckpointError for an output folder without a finished run.
    """
    entries = [
        entry
        for name in names
        for entry in (_run(Path(name)) if _is_store(name) else [_single(name, open_source(name))])
    ]
    counts = Counter(entry.label for entry in entries)
    return [
        entry
        if counts[entry.label] == 1
        else Entry(f"{entry.checkpoint.folder.parent.name}/{entry.label}", entry.checkpoint)
        for entry in entries
    ]


def _is_store(name: str) -> bool:
    return (Path(name).expanduser() / MARKER).is_file()


def _single(name: str, checkpoint: Checkpoint) -> Entry:
    return Entry(checkpoint.folder.name if Path(name).exists() else name, checkpoint)


def _run(out: Path) -> list[Entry]:
    """The uncompressed model and every stage of the run that `result` points to."""
    result = out.expanduser() / "result"
    if not result.exists():
        raise CheckpointError(
            f"{out} holds no finished run: it has no `result`. Name a stage's folder, or finish the run"
        )
    chain = list(Checkpoint.open(result.resolve()).ancestors())[::-1]
    names = [c.manifest.stage if c.manifest and c.manifest.parent else "source" for c in chain]
    return [Entry(f"{number} {name}", c) for number, (name, c) in enumerate(zip(names, chain, strict=True))]
