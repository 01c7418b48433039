"""Read local files in the form that lm-eval's tasks expect of the hub's data sets; no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import PlanError, TextError, require_package
from edgepress.eval.rows import RowError, read_rows
from edgepress.eval.tasks import Settings

_LETTERS = "ABCD"


def check(name: str, settings: Settings) -> None:
    """Raise what is wrong with a task's local files; the hub's data are lm-eval's to load."""
    require_package("lm_eval", f"--task {name}")
    files = settings.files_of(name)
    if len(files) > 1:
        raise PlanError(f"--from {name}=…: one file or folder, not {len(files)}")
    if files and name.split("_")[0] == "mmlu":
        mmlu_subjects(files[0])
    elif files:
        jsonl_splits(files[0], settings.shots > 0)


def mmlu_subjects(folder: Path) -> dict[str, Any]:
    """Subject -> datasets.DatasetDict with `dev` and `test`, of every subject that has a test file.

    Rows are headerless `question,A,B,C,D,letter`. Raises TextError naming file and line of what is not.
    """
    from datasets import Dataset, DatasetDict

    tests = sorted((folder / "test").glob("*_test.csv"))
    if not tests:
        raise TextError(f"{folder} has no test/SUBJECT_test.csv; rows are question,A,B,C,D,letter without a header")
    subjects = {}
    for test in tests:
        subject = test.name.removesuffix("_test.csv")
        dev = folder / "dev" / f"{subject}_dev.csv"
        if not dev.is_file():
            raise TextError(f"{dev} is not there: it holds the examples that go before {subject}'s questions")
        subjects[subject] = DatasetDict(
            {
                split: Dataset.from_list(list(_mmlu_rows(path, subject)))
                for split, path in (("dev", dev), ("test", test))
            }
        )
    return subjects


def _mmlu_rows(path: Path, subject: str) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        for row in reader:
            if len(row) != 6 or row[5] not in _LETTERS or not row[5]:
                raise TextError(
                    f"{path}, line {reader.line_num}: expected question,A,B,C,D,letter; found {len(row)} columns"
                    + (f", the last '{row[-1][:20]}'" if row else " (an empty line)")
                )
            question, *choices, letter = row
            yield {"question": question, "subject": subject, "choices": choices, "answer": _LETTERS.index(letter)}


def jsonl_splits(place: Path, examples: bool) -> Any:
    """A datasets.DatasetDict of a folder with SPLIT.jsonl files, or of one file for whichever split is asked for.

    examples: whether examples go before the questions; they must come from a split of their own.
    """
    from datasets import Dataset, DatasetDict

    if place.is_dir():
        files = {path.stem: path for path in sorted(place.glob("*.jsonl"))}
        if not files:
            raise TextError(f"{place} has no .jsonl file; expected test.jsonl, validation.jsonl or train.jsonl")
        if examples and "train" not in files:
            raise PlanError(f"--shots: {place} has no train.jsonl, from which examples come")
        splits = {split: Dataset.from_list(_rows(path)) for split, path in files.items()}
        # lm-eval reads the training split even where it takes no example from it.
        return DatasetDict({"train": next(iter(splits.values()))} | splits)
    if examples:
        raise PlanError(
            f"--shots: examples would come from the questions themselves in {place}; give a folder with train.jsonl "
            "and validation.jsonl or test.jsonl"
        )
    data = Dataset.from_list(_rows(place))
    return DatasetDict(dict.fromkeys(("train", "validation", "test"), data))


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path, _row, "an object with the fields of the task's data set in each row")


def _row(_: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RowError("not an object")
    return row
