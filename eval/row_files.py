"""Rows of data: of a .jsonl, .json or .parquet file, every fault named at once, or of the hub. No torch here."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from checkpoints.errors import TextError

SUFFIXES = (".jsonl", ".json", ".parquet")
_SHOWN_FAULTS = 5
Row = TypeVar("Row")


class RowError(ValueError):
    """What is wrong with one row; whoever knows its place adds it."""


def read_rows(path: Path, parse: Callable[[int, Any], Row], form: str, limit: int = 0) -> list[Row]:
    """What `parse` makes of a file's rows and their numbers, counted from 1; of the first `limit` rows unless it is 0.

    Raises TextError with the line or row of everything that is malformed, empty or a RowError to `parse` (a few of
    many), and with the `form` that rows must have; likewise for a file without rows.
    """
    rows, faults = [], []
    place = "line" if path.suffix == ".jsonl" else "row"
    for number, raw in enumerate(itertools.islice(_raw_rows(path), limit or None), 1):
        try:
            if isinstance(raw, RowError):
                raise raw
            rows.append(parse(number, raw))
        except RowError as fault:
            faults.append(f"{place} {number}: {fault}")
    if faults:
        more = len(faults) - _SHOWN_FAULTS
        shown = [*faults[:_SHOWN_FAULTS], *([f"and {more} more"] if more > 0 else [])]
        raise TextError(f"{path}, " + "\n  ".join(shown) + f"\nExpected {form}")
    if not rows:
        raise TextError(f"{path} holds no row. Expected {form}")
    return rows


def _raw_rows(path: Path) -> Iterator[Any]:
    """Each row as it is read; a line that is empty or no JSON is a RowError in the row's place."""
    try:
        if path.suffix == ".jsonl":
            yield from _json_lines(path)
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list):
                raise TextError(f"{path} must hold a list of rows")
            yield from rows
        elif path.suffix == ".parquet":
            from pyarrow import parquet

            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        else:
            raise TextError(f"{path} is no file of rows; its name must end in {', '.join(SUFFIXES)}")
    except (ValueError, OSError) as error:  # undecodable bytes, JSON's and pyarrow's own are all ValueErrors
        raise TextError(f"{path} cannot be read as {path.suffix}: {error}") from None


def _json_lines(path: Path) -> Iterator[Any]:
    empty = 0  # lines since the last row; at the end of a file they do not count
    # newline: JSON allows other line separators, such as U+2028, inside a string.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            if not line.strip():
                empty += 1
                continue
            yield from (RowError("empty; remove the line") for _ in range(empty))
            empty = 0
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                yield RowError(f"not JSON ({error.msg})")


def hub_rows(
    name: str, config: str | None, split: str, spec: str, instead: str, stream: bool = True,
    columns: list[str] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of a data set of the hub, one by one, whole or with these columns.

    Raises TextError where it cannot be reached, saying what to pass `instead`.
    """
    from datasets import load_dataset

    # Each of its retries would be two lines of warning; the error below says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        data = load_dataset(name, config, split=split, streaming=stream)
        yield from data.select_columns(columns) if columns else data
    except Exception as error:  # datasets raises its own, the hub's and the network's errors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextError(
            f"the data set '{spec}' could not be had from the hub: {reason}\nPass instead {instead}"
        ) from None
