"""Rows of data: of a .jsonl, .json or .parquet file, every fault named at once, or of the hub. No torch here."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from edgepress.checkpoints.documents import parse_json
from edgepress.checkpoints.errors import TextError

SUFFIXES = (".jsonl", ".json", ".parquet")
_SHOWN_FAULTS = 5
# Longest first: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
Row = TypeVar("Row")


class RowError(ValueError):
    """What is wrong with one row; whoever knows its place adds it."""


def read_utf8(path: Path) -> str:
    """A file's text with line ends as \\n, without a byte order mark.

    Raises TextError naming the encoding where it is not UTF-8, and for bytes that are no text.
    """
    data = path.read_bytes()
    require_utf8(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def require_utf8(path: Path, data: bytes) -> None:
    """Raise TextError where a file, of which these are the first bytes, is in another encoding or no text."""
    name = next((name for mark, name in _MARKS if data.startswith(mark)), "")
    if not name and b"\0" in data:
        places = [place for place, byte in enumerate(data[:4096]) if not byte]
        alternate = len(places) * 4 > min(len(data), 4096) and len({place % 2 for place in places}) == 1
        if not alternate:
            raise TextError(f"{path} is no text: byte {data.index(0)} is NUL; give a file of UTF-8 text")
        name = "UTF-16"
    if name:
        raise TextError(f"{path} is in {name}, not UTF-8. {_convert(path, name)}")


def not_utf8(path: Path, error: UnicodeDecodeError) -> TextError:
    byte = error.object[error.start]
    return TextError(
        f"{path} is not UTF-8: it has byte 0x{byte:02x} at {error.start}; Latin-1 or Windows-1252, as it seems. "
        + _convert(path, "WINDOWS-1252")
    )


def _convert(path: Path, encoding: str) -> str:
    return f"Convert it with: iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"


def read_rows(path: Path, parse: Callable[[int, Any], Row], form: str, limit: int = 0) -> list[Row]:
    """What `parse` makes of a file's rows and their numbers, counted from 1; of the first `limit` rows unless it is 0.

    Raises TextError with the line or row of everything that is malformed, empty or a RowError to `parse` (a few of
    many), and with the `form` that rows must have; likewise for a file without rows.
    """
    if path.exists() and not path.is_file():
        raise TextError(f"{path} is no file of rows, but a folder, device or pipe")
    rows, faults = [], []
    place = "line" if path.suffix.lower() == ".jsonl" else "row"
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
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            yield from _json_lines(path)
        elif suffix == ".json":
            rows = parse_json(read_utf8(path).encode(), f"{path} cannot be read as {suffix}: it", TextError)
            if not isinstance(rows, list):
                raise TextError(f"{path} must hold a list of rows")
            yield from rows
        elif suffix == ".parquet":
            from pyarrow import parquet

            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        else:
            raise TextError(f"{path} is no file of rows; its name must end in {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except (ValueError, OSError) as error:  # undecodable bytes, JSON's and pyarrow's own are all ValueErrors
        raise TextError(f"{path} cannot be read as {suffix}: {error}") from None


def _json_lines(path: Path) -> Iterator[Any]:
    empty = 0  # lines since the last row; at the end of a file they do not count
    # newline: JSON allows other line separators, such as U+2028, inside a string.
    with path.open("rb") as raw:
        require_utf8(path, raw.peek(4096))
        for line in io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n"):
            if not line.strip():
                empty += 1
                continue
            yield from (RowError("empty; remove the line") for _ in range(empty))
            empty = 0
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                yield RowError(f"not JSON ({error.msg})")
            except RecursionError:
                yield RowError("not JSON (nested too deeply)")


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
