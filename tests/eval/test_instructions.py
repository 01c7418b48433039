"""Instruction data: every schema, every kind of fault with its place, the real files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import TextError
from edgepress.eval import rows as instructions
from edgepress.eval.rows import HUB, Instruction, load_instructions, parse_row

pytestmark = pytest.mark.unit

DATA = Path(os.environ.get("EDGEPRESS_DATA") or Path(__file__).parents[2].parent / "shared" / "data") / "instructions"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": " Add. ", "input": "2, 2", "output": "4"}, ("Add.", "2, 2", "4", False)),
        ({"instruction": "Add.", "input": "", "output": "4"}, ("Add.", "", "4", False)),
        ({"instruction": "Add.", "output": "4"}, ("Add.", "", "4", False)),
        ({"instruction": "Add.", "input": None, "output": "4"}, ("Add.", "", "4", False)),
        ({"instruction": "Who?", "context": "Ada.", "response": "Ada"}, ("Who?", "Ada.", "Ada", False)),
        ({"prompt": "### Q\nWho?\n### A", "answer": "Ada"}, ("### Q\nWho?\n### A", "", "Ada", True)),
        (
            {
                "conversations": [
                    {"from": "human", "value": "first", "loss": None},
                    {"from": "gpt", "value": "one", "loss": False},
                    {"from": "human", "value": "second", "loss": None},
                    {"from": "gpt", "value": "two", "loss": True},
                    {"from": "human", "value": "never answered", "loss": None},
                ]
            },
            ("second", "", "two", False),
        ),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Hello"}]},
            ("Hi", "", "Hello", False),
        ),
    ],
)  # fmt: skip
def test_schemas(row: dict[str, Any], expected: tuple[str, str, str, bool]) -> None:
    assert parse_row("7", row) == Instruction("7", *expected)


def test_prompts() -> None:
    row = Instruction("1", "Add.", "2, 2", "4")
    assert row.prompt(chat=False) == "Instruction: Add.\nInput: 2, 2\nResponse:"
    assert row.prompt(chat=True) == "Add.\n\n2, 2"
    assert Instruction("1", "Add.", "", "4").prompt(chat=False) == "Instruction: Add.\nResponse:"
    prepared = Instruction("1", "### Q", "", "4", prepared=True)
    assert (prepared.prompt(chat=False), prepared.prompt(chat=True)) == ("### Q\n", "### Q")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet as file

    file.write_table(pyarrow.Table.from_pylist(rows), path)


def test_the_three_kinds_of_file_give_the_same(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.\u2028", "input": "", "output": str(i)} for i in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    parquet(tmp_path / "c.parquet", rows)
    a, b, c = (load_instructions(str(tmp_path / name)).rows for name in ("a.json", "b.jsonl", "c.parquet"))
    assert a == b == c and [r.id for r in a] == ["1", "2", "3", "4", "5"]
    assert load_instructions(str(tmp_path / "a.json"), limit=2).rows == a[:2]


GOOD = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", f"{GOOD}\n\n{GOOD}\n", ["line 2: empty"]),
        ("x.jsonl", f"{GOOD}\n{{broken\n", ["line 2: not JSON"]),
        ("x.jsonl", f"{GOOD}\n[1]\n", ["line 2: not an object", "list"]),
        ("x.jsonl", '{"instruction": "a", "output": " "}\n', ["line 1: 'output' is empty"]),
        ("x.jsonl", '{"instruction": 3, "output": "b"}\n', ["line 1: 'instruction' is not text"]),
        (
            "x.json",
            f'[{GOOD}, {{"text": "c"}}]',
            ["row 2: no instruction; it has text", "{instruction, input, output}"],
        ),
        ("x.json", '[{"conversations": [{"from": "human", "value": "a"}]}]', ["row 1", "followed by one of gpt"]),
        ("x.json", '[{"conversations": "none"}]', ["row 1", "not a list of turns"]),
        ("x.json", "[]", ["no row"]),
        ("x.json", '{"a": 1}', ["must hold a list"]),
        ("x.json", "[", ["cannot be read as .json"]),
        ("x.jsonl", b"\xff\xfe", ["x.jsonl is in UTF-16, not UTF-8", "iconv"]),
        ("x.parquet", "no parquet", ["cannot be read as .parquet"]),
        ("x.txt", "words", ["no file of rows", ".jsonl"]),
        ("x.jsonl", "{\n" * 8, ["line 1: not JSON", "line 5", "and 3 more"]),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path: Path, name: str, content: str | bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TextError) as caught:
        load_instructions(str(tmp_path / name))
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(TextError, match=r"alpaca, dolly, agent, and not a file.*\.jsonl"):
        load_instructions("alpacca")


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits one after the other, no more rows than wanted, unusable rows left out and counted."""
    asked: list[tuple[str, str]] = []

    def hub_rows(name: str, config: str, split: str, spec: str, instead: str) -> Iterator[dict[str, Any]]:
        asked.append((name, split))
        yield {"instruction": f"{split} 1", "output": ""}
        yield {"instruction": f"{split} 2", "output": "done"}

    monkeypatch.setattr(instructions, "hub_rows", hub_rows)
    found = load_instructions("agent", limit=2)
    assert [(r.id, r.instruction) for r in found.rows] == [("2", "os 2"), ("4", "db 2")]
    assert found.unusable == 2
    assert asked == [(HUB["agent"][0], "os"), (HUB["agent"][0], "db")]
    assert len(load_instructions("agent").rows) == len(HUB["agent"][1])


def test_a_hub_out_of_reach_names_the_file_form(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(TextError, match=r"(?s)'dolly' could not be had.*no route.*\{instruction, context, response\}"):
        load_instructions("dolly", 3)


@pytest.mark.parametrize(
    ("name", "count", "check"),
    [
        ("alpaca_en_demo.json", 999, lambda r: r.reference and not r.prepared),
        ("dolly_151.jsonl", 151, lambda r: r.prepared and r.instruction.endswith("Response:")),
        ("fireact_hotpotqa.json", 500, lambda r: "Thought:" in r.reference),
    ],
)
def test_the_real_files(name: str, count: int, check: Callable[[Instruction], bool]) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there")
    rows = load_instructions(str(DATA / name)).rows
    assert len(rows) == count
    assert all(check(row) for row in rows)
