"""The output folder: a store of stage folders keyed by fingerprint.

One command owns the folder at a time; the workers that it starts each claim the stage folder they write.
Both are flocks, which the kernel drops with the process that held them, however it ended.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.manifest import (
    MANIFEST,
    MARKER,
    SEAL,
    WORK,
    remove_partial,
    require_inside,
    require_no_links_out,
    seal_holds,
    sealed,
    write_json,
)  # fmt: skip

LOCKS, RESULT = ".locks", "result"
REPORT, EARLIER_REPORT = "report.json", "report-earlier.json"


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Create or take over the folder. Raises PlanError if it holds something else or is in use."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise PlanError(f"{folder} is a file; give a folder with -o")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
            names = ", ".join(sorted(p.name for p in folder.iterdir())[:5])
            raise PlanError(f"{folder} is not an output folder of compress (it holds {names}); choose another with -o")
        folder.mkdir(parents=True, exist_ok=True)
        require_own(folder)
        try:
            lock = FileLock(folder / MARKER, preserve_lock_file=True).acquire(timeout=0)
        except Timeout:
            raise PlanError(f"another compress is writing to {folder}; wait for it, or choose another -o") from None
        with lock:
            remove_partial(folder)
            for draft in folder.glob(".fetched-*"):
                shutil.rmtree(draft, ignore_errors=True)
            try:
                yield self
            finally:
                remove_partial(folder)  # of workers that were stopped while they wrote

    def stage_folder(self, position: int, label: str, fingerprint: str) -> Path:
        return self.folder / f"{position}-{label}-{fingerprint[:8]}"

    @contextmanager
    def claimed(self, folder: Path) -> Iterator[None]:
        """Hold a stage folder for this process; waits while another one computes it."""
        locks = self.folder / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / folder.name, on_acquired=_sign):
            yield

    def finished(self, folder: Path, fingerprint: str) -> Checkpoint | None:
        """The stage's checkpoint if it is there and sound, None if it is not finished.

        Raises CheckpointError naming a folder that is damaged or was made from something else; such a folder
        is neither reused nor removed.
        """
        require_no_links_out(folder)
        if not (folder / MANIFEST).is_file():
            if folder.is_dir() and not (folder / WORK).is_dir() and any(folder.iterdir()):
                raise CheckpointError(
                    f"{folder} has neither a manifest nor work in progress: it is damaged or not ours. "
                    "It was neither used nor removed; move it away and run the same command again"
                )
            return None
        checkpoint = Checkpoint.open(folder, hashes=True)
        if checkpoint.fingerprint != fingerprint:
            raise CheckpointError(
                f"{folder} belongs to another run: its fingerprint is {checkpoint.fingerprint[:12]}, expected "
                f"{fingerprint[:12]}. It was neither used nor removed; move it away and run the same command again"
            )
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return checkpoint

    def result(self) -> Path | None:
        """The last stage's folder of the last run, if that run is finished.

        Raises CheckpointError where `result` does not lead to a folder of this store.
        """
        link = self.folder / RESULT
        if not link.is_symlink() and not link.exists():
            return None
        if not link.is_symlink() or Path(os.readlink(link)).name != os.readlink(link) or not link.is_dir():
            raise CheckpointError(f"{link} is not the link to a stage's folder beside it that compress keeps there")
        require_inside(self.folder, [RESULT], str(self.folder))
        return link.resolve()

    def forget_result(self, coming: Path | None) -> None:
        """At the start of a run: take `result` away unless it is the folder that this run will give.

        The report of the run that gave it is kept under another name. Raises PlanError where `result` is no link.
        """
        link = self.folder / RESULT
        if link.exists() and not link.is_symlink():
            raise PlanError(
                f"{link} is not the link that compress keeps there; move it away, or choose another folder with -o"
            )
        if coming is not None and link.is_symlink() and os.readlink(link) == coming.name:
            return
        link.unlink(missing_ok=True)
        if (self.folder / REPORT).is_file():
            os.replace(self.folder / REPORT, self.folder / EARLIER_REPORT)

    def link_result(self, folder: Path) -> None:
        """Point `result` at the last stage's folder, atomically."""
        temporary = self.folder / ".result.partial"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        os.replace(temporary, self.folder / RESULT)

    # --- measurements, which belong to a checkpoint and a protocol, not to a run -----------------------------------

    def measurement(self, key: str, note: Callable[[str], None] = lambda message: None) -> dict[str, Any] | None:
        """What was measured before; None where it was not, or the file is not as it was written, which is told."""
        path = self.folder / "measurements" / f"{key}.json"
        if not path.is_file():
            return None
        try:
            facts: dict[str, Any] = json.loads(path.read_text())
            holds = seal_holds(facts, key)
        except (ValueError, TypeError, RecursionError):
            holds = False
        if not holds:
            why = "carries no hash, as those of earlier versions" if holds is None else "is damaged or was edited"
            note(f"{path} {why}; it is measured again")
            return None
        del facts[SEAL]
        return facts

    def keep_measurement(self, key: str, facts: dict[str, Any]) -> None:
        path = self.folder / "measurements" / f"{key}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, sealed(facts, key))


def _sign(lock: int) -> None:
    """Write this process's id into a claim's file, for whoever wonders who holds it."""
    os.truncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())


def require_own(folder: Path) -> None:
    """Raise CheckpointError where something in an output folder is a link out of it, through which we would write."""
    if folder.is_dir():
        require_inside(folder, [p.name for p in folder.iterdir() if p.is_symlink() and p.name != RESULT], str(folder))
