"""The output folder: a store of stage folders keyed by fingerprint.

One command owns the folder at a time; the workers that it starts each claim the stage folder they write.
Both are flocks, which the kernel drops with the process that held them, however it ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import CheckpointError, PlanError
from checkpoints.manifest import MANIFEST, WORK, write_json

MARKER, LOCKS = ".edgepress", ".locks"


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
        (folder / MARKER).touch()
        with (folder / MARKER).open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise PlanError(f"another compress is writing to {folder}; wait for it, or choose another -o") from None
            yield self

    def stage_folder(self, position: int, label: str, fingerprint: str) -> Path:
        return self.folder / f"{position}-{label}-{fingerprint[:8]}"

    @contextmanager
    def claimed(self, folder: Path) -> Iterator[None]:
        """Hold a stage folder for this process; waits while another one computes it."""
        locks = self.folder / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / folder.name).open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            lock.write(str(os.getpid()))  # for whoever wonders who holds it
            lock.flush()
            yield

    def finished(self, folder: Path, fingerprint: str) -> Checkpoint | None:
        """The stage's checkpoint if it is there and sound, None if it is not finished.

        Raises CheckpointError naming a folder that is damaged or was made from something else; such a folder
        is neither reused nor removed.
        """
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

    def link_result(self, folder: Path) -> None:
        """Point `result` at the last stage's folder, atomically."""
        temporary = self.folder / ".result.partial"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        os.replace(temporary, self.folder / "result")

    # --- measurements, which belong to a checkpoint and a protocol, not to a run -----------------------------------

    def measurement(self, key: str) -> dict[str, Any] | None:
        path = self.folder / "measurements" / f"{key}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def keep_measurement(self, key: str, facts: dict[str, Any]) -> None:
        path = self.folder / "measurements" / f"{key}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, facts)
