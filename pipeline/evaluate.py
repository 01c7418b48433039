"""Tasks on checkpoints: which ones a user means, running them, and the report as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, EdgepressError, PlanError
from edgepress.checkpoints.manifest import MARKER, check_files, is_special, seal_holds, sealed, write_json
from edgepress.checkpoints.runtime import Progress, Runtime, choose_device, choose_dtype
from edgepress.checkpoints.sources import open_source
from edgepress.eval.results import Result
from edgepress.eval.settings import Settings
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import TASKS, Task
from edgepress.pipeline.store import Store, require_own


@dataclass(frozen=True)
class Measured:
    """One checkpoint's results, by task."""

    label: str
    folder: str
    fingerprint: str
    file_bytes: int
    parameters_total: int
    results: dict[str, Result]

    def to_dict(self, items: bool) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("label", "folder", "fingerprint", "file_bytes")}
        facts["parameters_total"] = self.parameters_total
        return facts | {"results": {task: result.to_dict(items) for task, result in self.results.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measured:
        results = {task: Result.from_dict(result) for task, result in data["results"].items()}
        return cls(**(data | {"results": results}))


def is_store(name: str) -> bool:
    return (Path(name).expanduser() / MARKER).is_file()


def open_all(names: Sequence[str]) -> list[tuple[str, Checkpoint]]:
    """The checkpoints that a user names, each with a label of its own; an output folder means all its stages.

    Raises CheckpointError with everything that is wrong with any of them.
    """
    opened: list[Checkpoint] = []
    faults = []
    for name in names or [""]:
        try:
            opened += _stages(Path(name).expanduser()) if name and is_store(name) else [open_source(name or None)]
        except EdgepressError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    folders = [checkpoint.folder.resolve() for checkpoint in opened]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise PlanError(f"{twice} is named twice; name each checkpoint once")
    names_only = [checkpoint.name for checkpoint in opened]
    labels = [
        name if names_only.count(name) == 1 else "-".join(folder.parts[-2:])
        for name, folder in zip(names_only, folders, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise PlanError(f"two checkpoints would both be called {max(labels, key=labels.count)}; rename a folder")
    return list(zip(labels, opened, strict=True))


def _stages(store: Path) -> list[Checkpoint]:
    """The last run's checkpoints of an output folder, the uncompressed model first."""
    require_own(store)
    result = Store(store).result()
    if result is None:
        raise CheckpointError(
            f"{store} has no result yet: its run is not finished. Run its command again to finish it, or name a "
            "stage's folder in it"
        )
    line = list(Checkpoint.open(result).ancestors())[::-1]
    for checkpoint in line:
        if checkpoint.manifest is not None:
            check_files(checkpoint.folder, checkpoint.manifest, hashes=True)
    return line


def check_request(tasks: Sequence[Task], settings: Settings) -> None:
    """Everything about tasks and their data that can be wrong, before any model is loaded; all faults at once."""
    names = {task.name for task in tasks}
    if "robustness" in names:
        names.add(settings.robust_task)
    faults = [
        f"--from {source}: '{source.partition('=')[0]}' is not among the tasks {', '.join(sorted(names))}"
        for source in settings.sources
        if "=" in source and source.partition("=")[0] not in names
    ]
    for task in tasks:
        try:
            settings.files_of(task.name)
            task.check(settings)
        except EdgepressError as error:
            faults.append(str(error))
    if faults:
        raise PlanError("\n".join(dict.fromkeys(faults)))


def measure_all(
    named: Sequence[tuple[str, Checkpoint]],
    tasks: Sequence[Task],
    settings: Settings,
    device: str,
    dtype: str,
    progress: Progress,
) -> list[Measured]:
    """Every task on every checkpoint, one model in memory at a time."""
    where = choose_device(device)
    precisions = _precisions(named, tasks, settings, dtype, where)
    measured = []
    for label, checkpoint in named:
        found: dict[str, Result] = {}
        for precision in dict.fromkeys(precisions.values()):
            subject = Subject(checkpoint, Runtime(where, precision, progress=progress), label)
            group = [task for task in tasks if precisions[task.name] == precision]
            found |= {task.name: task.load()(task.name, subject, settings) for task in group}
        results = {task.name: found[task.name] for task in tasks}
        shape = checkpoint.shape
        measured.append(
            Measured(
                label, str(checkpoint.folder), checkpoint.fingerprint, shape.file_bytes, shape.parameters_total, results
            )
        )
    return measured


def _precisions(
    named: Sequence[tuple[str, Checkpoint]], tasks: Sequence[Task], settings: Settings, dtype: str, where: torch.device
) -> dict[str, torch.dtype]:
    """Each task's precision: one for all checkpoints, or a difference between them could be that of the precisions.

    `auto` is float32 for greedy answers, and for robustness that follows them.
    """
    stored = {checkpoint.shape.dense_dtype for _, checkpoint in named}
    usual = choose_dtype(dtype, where, "F32" if "F32" in stored else "BF16")
    exact = usual if dtype != "auto" else torch.float32
    measured = {t.name: TASKS.get(settings.robust_task, t) if t.name == "robustness" else t for t in tasks}
    return {name: exact if task.answers else usual for name, task in measured.items()}


def keeping_answers(settings: Settings, home: Path) -> Settings:
    """Settings with the folder for answers filled in: `answers` in `home` unless the user chose one, or none."""
    if settings.answers == "none":
        return replace(settings, answers="")
    return settings if settings.answers else replace(settings, answers=str(home / "answers"))


def write_report(path: Path, measured: Sequence[Measured], machine: str) -> None:
    """Every result with the value of each item, so that two reports can be compared later."""
    if not is_special(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, sealed(report(measured, machine, items=True)))


def report(measured: Sequence[Measured], machine: str, items: bool = False) -> dict[str, Any]:
    return {"format": 1, "machine": machine, "checkpoints": [m.to_dict(items) for m in measured]}


def read_report(name: str) -> Measured:
    """One checkpoint's results from a report: FILE.json, or FILE.json:LABEL where it holds several."""
    file, _, label = name.partition(".json:")
    path = Path(file if not label else f"{file}.json").expanduser()
    try:
        data = json.loads(path.read_text())
        if seal_holds(data) is False:
            raise PlanError(f"{path} is damaged or was edited: it does not have the sha256 that it states of itself")
        found = {m["label"]: Measured.from_dict(m) for m in data["checkpoints"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(f"{path} is not a report of `compress eval -o`: {error}") from None
    if label and label in found:
        return found[label]
    if label or len(found) != 1:
        raise PlanError(f"{path} holds {', '.join(found)}; name one as {path}:LABEL")
    return next(iter(found.values()))
