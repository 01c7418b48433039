"""However narrow the console, every number of a table stands in it with all its digits."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich import box
from rich.console import Console
from rich.table import Table

from edgepress.eval.results import Difference, Result, Score, mean
from edgepress.pipeline import results
from edgepress.pipeline.cli_hardware import _write_csv
from edgepress.pipeline.evaluate import Measured, print_differences, print_measured
from edgepress.pipeline.tables import plain_cell, print_whole, read_cell

pytestmark = pytest.mark.unit


def screen(width: int) -> Console:
    return Console(file=StringIO(), width=width)


def shown(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [10, 30, 80, 500])
def test_columns_go_below_one_another_with_the_rows_names_before_each_part(width: int) -> None:
    numbers = [[f"{row}{column}.{10**6 + column}" for column in range(9)] for row in range(3)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name")
    for column in range(9):
        table.add_column(f"title {column}", justify="right")
    for row, cells in enumerate(numbers):
        table.add_row(f"row {row}", *cells)
    console = screen(width)
    print_whole(console, table)
    text = shown(console)
    lines = [line.split() for line in text.splitlines() if line.startswith(" row ")]
    for row, cells in enumerate(numbers):
        assert [word for line in lines if line[1] == str(row) for word in line[2:]] == cells
    parts = len(lines) // 3
    assert parts == {10: 9, 30: 9, 80: 2, 500: 1}[width]  # 7 characters for the name and the edges, 13 for each column
    assert max(map(len, text.splitlines())) <= max(width, 7 + 13)


def score(metric: str, unit: str, protocol: str) -> Score:
    values = [0.0060123, 0.9960123, 0.1234567]
    return mean(metric, ["a", "b", "c"], values, protocol, unit=unit)


def measured(label: str) -> Measured:
    results = {
        task: Result(task, (score("perplexity", "", task), score("a metric with a long name", "%", task)), 12345.0)
        for task in ("perplexity", "triviaqa-closed", "triviaqa-open", "robustness", "generation", "speed")
    }
    return Measured(label, f"out/{label}", "0" * 64, 12_345_678_901, 10**9, results)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("width", [70, 80])
def test_evaluations_on_narrow_consoles_keep_every_digit(count: int, width: int) -> None:
    console, wide = screen(width), screen(1000)
    entries = [measured(f"{place}-wanda-1of8-9c31aa02") for place in range(count)]
    print_measured(console, entries)
    print_measured(wide, entries)
    text, whole = shown(console), shown(wide)
    assert "…" not in text
    words = whole.split()
    for word in {word for word in words if any(letter.isdigit() for letter in word)}:
        assert text.split().count(word) >= words.count(word)
    table = text[: text.index("Intervals")].splitlines()
    assert max(len(line) for line in table if ": " not in line) <= width


def test_differences_on_a_narrow_console_keep_every_digit() -> None:
    numbers = (0.0060123, 0.0054321, -0.0016543, 0.0012987, 0.00012345)
    a, b, low, high, p = numbers
    found = [
        Difference("triviaqa-closed", "accuracy", a, b, low, high, p, "exact McNemar", 1200, True, False, "how", unit)
        for unit in ("", "MiB")
    ]
    console = screen(80)
    print_differences(console, "A", "B", found)
    text = shown(console)
    assert "…" not in text
    for number in ("0.006012", "0.005432", "-0.0005802", "-0.001654", "0.001299", "0.00012", "1200", "within noise"):
        assert text.count(number) == 2
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\tx", "\r=1", "\uff1d1", "'=1", "''-x", "-1;=2"])
def test_a_cell_that_a_spreadsheet_would_compute_is_text_and_reads_back(text: str) -> None:
    assert plain_cell(text) == f"'{text}" and read_cell(plain_cell(text)) == text


@pytest.mark.parametrize("value", ["", "a=b", "-1", "-1.5e-7", "+.5", "it's", "'quoted'", "1-2", -1, -0.5, None, True])
def test_numbers_and_other_text_stay(value: object) -> None:
    assert plain_cell(value) is value and read_cell(value) is value


def test_check_s_table_holds_no_formula(tmp_path: Path) -> None:
    _write_csv(tmp_path / "t.csv", [{"name": "=HYPERLINK(1)", "bytes": -4}, {"name": "-2", "bytes": 5}])
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["name", "bytes"], ["'=HYPERLINK(1)", "-4"], ["-2", "5"]]


def test_a_sweep_s_table_holds_no_formula_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {name: {"string": "x", "bool": False}.get(kind, -1) for name, kind in results.COLUMNS.items()}
    monkeypatch.setattr(results, "rows", lambda sweep, result: [row | {"sweep": "=1", "folder": "@a", "text": "-b"}])
    results.write_results(tmp_path, "=1", None)  # type: ignore[arg-type]
    written = pd.read_csv(tmp_path / "results.csv")
    assert list(written.loc[0, ["sweep", "folder", "text", "value"]]) == ["'=1", "'@a", "'-b", -1.0]
    assert written.map(read_cell).equals(pd.read_parquet(tmp_path / "results.parquet").astype(written.dtypes.to_dict()))
