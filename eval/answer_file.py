"""Answers on disk, one JSON line each, behind a header that says whose they are.

Lines are appended as batches finish, so an interrupted evaluation goes on where it stopped. No torch here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from checkpoints.errors import CheckpointError, TextError

FORMAT = 1


class AnswerFile:
    """The lines of one task on one checkpoint under one set of settings, by their key."""

    def __init__(self, path: Path, task: str, checkpoint: str, label: str, settings: dict[str, Any]) -> None:
        self.path = path
        self.header: dict[str, Any] = {
            "format": FORMAT,
            "task": task,
            "checkpoint": checkpoint,
            "label": label,
            "settings": settings,
        }
        self.rows: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> AnswerFile:
        """Read what is there, and be ready to add to it. Raises CheckpointError if it belongs to something else."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and self.path.stat().st_size:
            self._read()
        self._file = self.path.open("a", encoding="utf-8")
        if not self._file.tell():
            self._append(self.header)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows, each with its `id`, and have the system take them before going on."""
        for row in rows:
            self.rows[row["id"]] = row
            self._append(row)
        assert self._file is not None
        self._file.flush()

    def _append(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _read(self) -> None:
        data = self.path.read_bytes()
        if not data.endswith(b"\n"):
            # A kill in the middle of a line: that answer is not there yet.
            data = data[: data.rfind(b"\n") + 1]
            with self.path.open("r+b") as file:
                file.truncate(len(data))
        for number, line in enumerate(data.decode().split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                if number == 1:
                    self._compare(row)
                else:
                    self.rows[str(row["id"])] = row
            except (ValueError, KeyError, TypeError) as error:
                raise TextError(
                    f"{self.path}, line {number}: not an answer ({error}). Remove the line, and it is answered again; "
                    "or remove the file"
                ) from None

    def _compare(self, found: dict[str, Any]) -> None:
        differences = []
        if found["checkpoint"] != self.header["checkpoint"]:
            differences.append(f"checkpoint {found['label']} ({found['checkpoint'][:12]})")
        for name in ("format", "task"):
            if found[name] != self.header[name]:
                differences.append(f"{name} {found[name]}")
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
