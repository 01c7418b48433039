"""Keep answers on disk, one JSON line each, behind a header that says whose they are.

Lines are appended as batches finish, so an interrupted evaluation goes on where it stopped. Each carries the sha256 of
itself and of the header, so a line that was edited, damaged or taken from another file is found. Two processes that
want the same file take turns: the second waits, and finds the answers of the first. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from filelock import FileLock, Timeout

from edgepress.checkpoints.errors import CheckpointError, TextError
from edgepress.checkpoints.manifest import SEAL, seal_holds, sealed

FORMAT = 2
_UNSEALED = 1  # the format before, whose lines carry no hash


class AnswerFile:
    """The lines of one task on one checkpoint under one set of settings, by their key."""

    def __init__(
        self,
        path: Path,
        task: str,
        checkpoint: str,
        label: str,
        settings: dict[str, Any],
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        """note: told when another process holds the file, and this one waits."""
        self.path, self._note = path, note
        self.header: dict[str, Any] = {
            "format": FORMAT,
            "task": task,
            "checkpoint": checkpoint,
            "label": label,
            "settings": settings,
        }
        self.rows: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))  # the kernel's: it ends with the process
        self._about = ""  # what a line's hash takes in beside the line: the header's hash

    def __enter__(self) -> AnswerFile:
        """Read what is there, and be ready to add to it. Raises CheckpointError if it belongs to something else."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.parent.is_symlink() or self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            raise CheckpointError(
                f"{self.path} is no plain file in a plain folder; move it away, or choose another --answers FOLDER"
            )
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._note(f"{self.path} is being written by another process; waiting for it")
            self._lock.acquire()
        try:
            if self.path.is_file() and self.path.stat().st_size:
                self._read()
            self._file = self.path.open("a", encoding="utf-8")
            if not self._file.tell():
                header = sealed(self.header)
                self._about = header[SEAL]
                self._write(header)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            self._file.close()
        self._lock.release()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows, each with its `id`, and have the system take them before going on."""
        for row in rows:
            self.rows[row["id"]] = row
            self._write(sealed(row, self._about) if self._about else row)
        assert self._file is not None
        self._file.flush()

    def _write(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _read(self) -> None:
        data = self.path.read_bytes()
        if not data.endswith(b"\n"):
            # A kill in the middle of a line: that answer is not there yet.
            data = data[: data.rfind(b"\n") + 1]
            with self.path.open("r+b") as file:
                file.truncate(len(data))
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line.decode())
                if number == 1:
                    self._about = self._sealed_header(row)
                    self._compare(row)
                    continue
                if self._about and not seal_holds(row, self._about):
                    raise ValueError("it was edited or damaged: its sha256 is not that of the line")
                row.pop(SEAL, None)
                self.rows[str(row["id"])] = row
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise TextError(
                    f"{self.path}, line {number}: not an answer ({error}). Remove the line, and it is answered again; "
                    "or remove the file"
                ) from None

    def _sealed_header(self, found: dict[str, Any]) -> str:
        """The header's hash; empty for a file of the format before, which is read and gone on with as it is."""
        if found["format"] == _UNSEALED and SEAL not in found:
            return ""
        if not seal_holds(found):
            raise ValueError("the header was edited or damaged")
        return str(found[SEAL])

    def _compare(self, found: dict[str, Any]) -> None:
        differences = []
        if found["checkpoint"] != self.header["checkpoint"]:
            differences.append(f"checkpoint {found['label']} ({found['checkpoint'][:12]})")
        if found["format"] not in (FORMAT, _UNSEALED):
            differences.append(f"format {found['format']}")
        if found["task"] != self.header["task"]:
            differences.append(f"task {found['task']}")
        settings = found["settings"]
        differences += [
            f"{name} {settings.get(name)}"
            for name in sorted({*settings, *self.header["settings"]})
            if settings.get(name) != self.header["settings"].get(name)
        ]
        if differences:
            here = self.header
            own = ", ".join(f"{name} {value}" for name, value in here["settings"].items())
            raise CheckpointError(
                f"{self.path} holds answers of another evaluation: {', '.join(differences)}; this one is "
                f"{here['task']} on {here['label']} ({str(here['checkpoint'])[:12]}), {own}. "
                "Remove that file, or keep these answers elsewhere with --answers FOLDER"
            )
