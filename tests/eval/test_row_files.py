"""Files of rows: the three kinds give the same rows, and every fault is named at once with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import TextError
from edgepress.eval.rows import RowError, read_rows

pytestmark = pytest.mark.unit


def letter(number: int, row: Any) -> tuple[int, str]:
    if "a" not in row:
        raise RowError("no a")
    return number, row["a"]


def read(path: Path, content: str, limit: int = 0) -> list[tuple[int, str]]:
    path.write_text(content, encoding="utf-8")
    return read_rows(path, letter, "rows with the field a", limit)


def test_the_three_kinds_of_file_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"a": f"{i}\u2028"} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    expected = [(i + 1, f"{i}\u2028") for i in range(5)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read_rows(tmp_path / "x.parquet", letter, "") == expected
    assert read(tmp_path / "x.json", json.dumps(rows)) == expected
    assert read(tmp_path / "x.jsonl", lines) == expected
    assert read(tmp_path / "mark.jsonl", "\ufeff" + lines + "\n\n \n") == expected


def test_every_fault_comes_at_once_with_its_line_and_the_form_that_is_expected(tmp_path: Path) -> None:
    with pytest.raises(TextError) as caught:
        read(tmp_path / "x.jsonl", '{"a": "1"}\n\n\n{oops\n{"b": 1}\n\n{"a": "2"}\n\n')
    head, *lines, form = str(caught.value).splitlines()
    assert head == f"{tmp_path / 'x.jsonl'}, line 2: empty; remove the line"
    assert [line.strip().split(":")[0] for line in lines] == ["line 3", "line 4", "line 5", "line 6"]
    assert "not JSON" in lines[1] and lines[2].endswith("no a")
    assert form == "Expected rows with the field a"
    with pytest.raises(TextError, match=r"row 1: no a\n  row 2: no a\nExp"):
        read(tmp_path / "x.json", "[{}, {}]")
    with pytest.raises(TextError, match=r"line 5: no a\n  and 4 more\nExp"):
        read(tmp_path / "x.jsonl", "{}\n" * 9)


def test_rows_behind_the_limit_are_not_read(tmp_path: Path) -> None:
    content = '{"a": "1"}\n{"a": "2"}\n{oops\n'
    assert read(tmp_path / "x.jsonl", content, limit=2) == [(1, "1"), (2, "2")]
    with pytest.raises(TextError, match="line 3"):
        read(tmp_path / "x.jsonl", content, limit=3)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", "", "holds no row. Expected rows with the field a"),
        ("x.jsonl", "\n \n", "holds no row"),
        ("x.json", "[]", "holds no row"),
        ("x.json", '{"a": 1}', "must hold a list of rows"),
        ("x.json", "[", r"cannot be read as \.json: "),
        ("x.parquet", "words", r"cannot be read as \.parquet: "),
        ("x.txt", "words", r"must end in \.jsonl, \.json, \.parquet"),
    ],
)
def test_a_file_that_holds_no_rows(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(TextError, match=says):
        read(tmp_path / name, content)
    with pytest.raises(TextError, match=r"there\.jsonl cannot be read"):
        read_rows(tmp_path / "there.jsonl", letter, "")


def test_reading_rows_needs_no_torch() -> None:
    code = "import sys\nfrom edgepress.eval import rows\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("row", ['{"question": "\\ud800"}', '{"answers": [["x"], ["\\udc00"]]}', '{"\\ud800": "x"}'])
def test_half_of_a_character_is_no_text(tmp_path: Path, row: str, suffix: str) -> None:
    """JSON can write it, no tokenizer can read it; a whole pair of halves is a character."""
    path = tmp_path / f"rows.{suffix}"
    path.write_text(row if suffix == "jsonl" else f"[{row}]")
    with pytest.raises(TextError, match="half of a character"):
        read_rows(path, lambda number, found: found, "rows")
    path.write_text(path.read_text().replace("\\ud800", "\\ud83d\\ude00").replace("\\udc00", "\\ud83d\\ude00"))
    assert read_rows(path, lambda number, found: found, "rows")
