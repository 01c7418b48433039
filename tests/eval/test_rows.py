"""Instruction rows as text: every form, both origins, and each fault with its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import TextError
from edgepress.eval import text as texts
from edgepress.eval import trivia
from edgepress.eval.rows import RowError, chat_of, parse_row, question_prompt, row_text
from edgepress.eval.text import load_text

pytestmark = pytest.mark.unit

DATA = Path(os.environ.get("EDGEPRESS_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("plain", ("plain", 0)),
        ({"text": "plain", "url": "x"}, ("plain", 0)),
        ({"text": ""}, ("", 0)),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, ("Instruction: Add.\nInput: 1 2\nResponse: 3", 38)),
        ({"instruction": "Add.", "input": "", "output": " 3\n"}, ("Instruction: Add.\nResponse: 3", 27)),
        ({"instruction": "Add.", "output": "3", "text": "Do: Add. It is 3"}, ("Instruction: Add.\nResponse: 3", 27)),
        ({"prompt": "### Response:", "answer": "3###eos_token###"}, ("### Response: 3", 13)),
        ({"prompt": "Say it", "answer": "3"}, ("Say it\n3", 7)),
        ({"prompt": "Say: ", "answer": "3"}, ("Say: 3", 4)),
        ({"context": "Question: a?\nAnswer:", "answer": "b"}, ("Question: a? Answer: b", 20)),
        (
            {"context": "C.", "question": "a?", "answers": {"text": ["b", "c"], "answer_start": [0, 1]}, "id": "7"},
            ("Context: C. Question: a? Answer: b", 32),
        ),
        (
            {"context": "C.", "question": "a?", "answer": "b", "title": "t"},
            ("Context: C. Question: a? Answer: b", 32),
        ),
        ({"instruction": "i", "context": "c", "response": "r"}, ("Instruction: i\nInput: c\nResponse: r", 33)),
        ({"instruction": "i", "input": None, "output": "r"}, ("Instruction: i\nResponse: r", 24)),
        ({"question": "a?", "answer": "b"}, ("Question: a? Answer: b", 20)),
        ({"question": "a?", "answer": {"value": "b", "aliases": ["b", "c"]}}, ("Question: a? Answer: b", 20)),
    ],
)
def test_every_form_of_a_row(row: Any, expected: tuple[str, int]) -> None:
    assert row_text(row) == expected


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (3, "int"),
        ({"body": "x"}, "it has body"),
        ({"prompt": "x"}, "it has prompt"),
        ({"question": "x", "answer": ""}, "'answer' is empty"),
        ({"question": " ", "answer": "x"}, "'question' is empty"),
        ({"question": "x", "answer": {"aliases": []}}, "'answer' is null"),
        ({"prompt": "x", "answer": "###eos_token###"}, "'answer' is empty"),
        ({"instruction": "x", "output": 3}, "'output' is not text"),
        (None, "null"),
        ({"text": None}, "'text' is null"),
        ({"text": {"value": "x"}}, "'text' is not text but an object"),
        ({"question": "x", "answer": None}, "'answer' is null"),
        ({"question": "x", "answers": {"text": []}}, "'answer' is empty"),
        ({"instruction": "x", "output": "y", "text": "theirs"}, "'text', 'instruction', 'output', which no form"),
        ({"text": "x", "prompt": "y"}, "'text', 'prompt'"),
        ({"instruction": "x", "input": "a", "context": "b", "output": "c"}, "'context'"),
        ({"instruction": "x", "output": "y", "system": "Be kind."}, "'system'"),
        ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "'history'"),
        ({"question": "x", "choices": ["a", "b"], "answer": "b"}, "'choices'"),
    ],
)
def test_a_row_that_is_no_text(row: Any, says: str) -> None:
    with pytest.raises(RowError, match=says):
        row_text(row)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            [{"role": "user", "content": "a"}],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        (
            {"system": "s", "tools": "", "conversations": [{"from": "human", "value": "a"}]},
            [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        ),
        ({"text": "x"}, None),
    ],
)
def test_conversations(row: Any, turns: Any) -> None:
    assert (json.loads(chat_of(row) or "null")) == turns


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": None}, "'messages' is null"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"'messages\[0\].role' is 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, r"'messages\[0\].content' is null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"a part that is not text \(image\)"),
        ({"messages": [{"role": "user", "content": "a"}], "text": "b"}, "'messages' and 'text'"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}, "'messages' and 'tools'"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "begins with such a turn too"),
        ({"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]}, "reasoning_content' cannot"),
    ],
)
def test_a_conversation_that_cannot_be_read(row: Any, says: str) -> None:
    with pytest.raises(RowError, match=says):
        chat_of(row)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("t.txt", "words é".encode("utf-16"), "UTF-16"),
        ("t.txt", "words é".encode("utf-16-le"), "UTF-16"),
        ("t.txt", "words é".encode("utf-32"), "UTF-32"),
        ("t.txt", "words é".encode("latin-1"), "byte 0xe9 at 6; Latin-1"),
        ("t.TXT", b"\x89PNG\x00\x1a\x0b\x0c", "NUL"),
        ("t.txt", b" \n\t ", "holds no text"),
        ("t.txt", b"", "holds no text"),
        ("t.JSONL", '{"text": "é"}'.encode("latin-1"), "Latin-1"),
        ("t.json", '[{"text": "é"}]'.encode("utf-16"), "UTF-16"),
    ],
)
def test_what_is_no_utf8_is_named(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError, match=says):
        load_text(str(tmp_path / name), "whole")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("t.ndjson", '{"text": "words"}', "rename it to end in .jsonl"),
        ("t.CSV", "text\nwords", "save its rows as .jsonl"),
        ("t.html", "<p>words</p>", "save its text as .txt"),
        ("t.txt", "%PDF-1.4 words", "is a PDF"),
        ("t.txt", '{"text": "words"}\n\n{"text": "more"}', "rows of JSON, not plain text"),
        ("t.jsonl", '{"text": "one", "text": "two"}', "line 1: .*'text' is there twice"),
        ("t.json", '[{"text": "one", "text": "two"}]', "'text' is there twice"),
        ("t.jsonl", '{"text": "one", "id": ' + "9" * 5000 + "}", "line 1: .*4300 digits"),
    ],
)
def test_rows_and_documents_of_other_formats_are_no_plain_text(tmp_path: Path, name: str, data: str, says: str) -> None:
    (tmp_path / name).write_text(data)
    with pytest.raises(TextError, match=says):
        load_text(str(tmp_path / name), "whole")


def test_json_within_prose_is_prose(tmp_path: Path) -> None:
    for words in ('{"text": "words"}\nAnd words about it.', '{"a": 1}\n{"b": 2}'):
        (tmp_path / "t.txt").write_text(words)
        assert load_text(str(tmp_path / "t.txt"), "whole").documents == (words,)


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["one"]), pyarrow.array(["two"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(TextError, match="'text' is there twice"):
        load_text(str(tmp_path / "t.parquet"), "whole")


def test_marks_line_ends_and_capital_suffixes_change_no_text(tmp_path: Path) -> None:
    words = "One line.\nAnother é.\n"
    for name, data in {
        "a.txt": words.encode(),
        "b.TXT": words.encode("utf-8-sig"),
        "c.raw": words.replace("\n", "\r\n").encode(),
        "d.JSONL": json.dumps({"text": words}).encode("utf-8-sig"),
        "e.JSON": json.dumps([words]).encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert load_text(str(tmp_path / name), "whole").documents == (words,), name


def test_all_faults_of_a_file_come_with_their_lines(tmp_path: Path) -> None:
    good = json.dumps({"question": "a\u2028?", "answer": "b"}, ensure_ascii=False)
    bad = json.dumps({"question": "a", "answer": ""})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good, "", "{oops", bad, good, "[1]"]) + "\n\n")
    with pytest.raises(TextError) as caught:
        load_text(str(path), "whole")
    message = str(caught.value)
    for part in ("line 2: empty", "line 3: not JSON", "line 4: 'answer' is empty", "line 6: "):
        assert part in message
    assert "line 1" not in message and "line 5" not in message and "line 7" not in message
    path.write_text("\n".join([bad] * 9))
    with pytest.raises(TextError, match="and 4 more"):
        load_text(str(path), "whole")


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n"), ("a.json", "[]")])
def test_a_file_without_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=r"holds no row\. Expected rows that are text"):
        load_text(str(tmp_path / name), "whole")


class Words:
    """A tokenizer of one token a character, whose end token is 0."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.deprecation_warnings: dict[str, bool] = {}

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_an_end_token_closes_each_exchange_and_no_prose(tmp_path: Path) -> None:
    (tmp_path / "qa.json").write_text(json.dumps([{"question": "a", "answer": letter} for letter in "bc"]))
    (tmp_path / "prose.json").write_text(json.dumps([{"text": "b"}, {"text": "c"}]))
    qa, prose = (load_text(str(tmp_path / name), "whole").token_ids(Words()) for name in ("qa.json", "prose.json"))  # type: ignore[arg-type]
    first = [ord(letter) for letter in "Question: a Answer: "]
    assert qa.tolist() == [*first, ord("b"), 0, *first, ord("c"), 0]
    assert prose.tolist() == [ord("b"), ord("c")]


def test_what_is_asked_reads_the_same_in_training_and_when_it_is_measured(tmp_path: Path) -> None:
    asked = [
        ({"question": " Who? ", "answer": "b"}, "closed"),
        ({"context": "Question: Who?\nAnswer:", "answer": "b"}, "closed"),
        ({"context": "C.", "question": "Who?", "answer": "b", "ctxs": [{"text": "C."}]}, "open"),
    ]
    for row, book in asked:
        item = trivia._item("1", {key: value for key, value in row.items() if (key, book) != ("context", "open")})
        prompt = question_prompt(item.question, item.contexts[0] if book == "open" else "")
        text, start = row_text({key: value for key, value in row.items() if key != "ctxs"})
        assert text[:start] == prompt == ("Context: C. " if book == "open" else "") + "Question: Who? Answer:"
    for row in (
        {"instruction": " Add. ", "input": "1 2", "output": "b"},
        {"instruction": "Add.", "output": "b"},
        {"instruction": "Add.", "context": "1 2", "response": "b"},
        {"prompt": "Add.", "answer": "b"},
        {"prompt": "### Response: ", "answer": "b"},
        {"prompt": "Below is\n\n", "answer": "b"},
    ):
        text, start = row_text(row)
        assert text[:start] == parse_row(1, row).prompt(chat=False)
        assert text.endswith("b") and start <= len(text) - 1


def test_a_row_of_several_lines_is_one_row(tmp_path: Path) -> None:
    rows = [{"text": f"Human: {i}\n\nAssistant: yes"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lines.txt").write_text("\n".join(row["text"] for row in rows))
    text = load_text(str(tmp_path / "rows.jsonl"), "whole")
    assert text.rows() == [row["text"] for row in rows]
    assert load_text(str(tmp_path / "rows.jsonl"), "evaluate").rows() == [rows[4]["text"]]
    assert len(load_text(str(tmp_path / "lines.txt"), "whole").rows()) == 10
    # A measurement of its lines is not taken for one of its rows.
    assert text.sha256 != replace(text, whole_rows=False).sha256
    plain = replace(text, documents=("one line", "another"))
    assert plain.sha256 == replace(plain, whole_rows=False).sha256


class Hub:
    """What datasets.load_dataset gives, for rows of ours."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.asked = rows, []

    def load(self, name: str, config: str | None, split: str, streaming: bool) -> Hub:
        self.asked.append((name, config, split))
        return self

    def select_columns(self, columns: list[str]) -> Hub:
        return Hub([{name: row[name] for name in columns} for row in self.rows])

    def __iter__(self) -> Any:
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], Hub]:
    def serve(rows: list[dict[str, Any]]) -> Hub:
        import datasets

        made = Hub(rows)
        monkeypatch.setattr(datasets, "load_dataset", made.load)
        return made

    return serve


def test_trivia_qa_from_the_hub_reads_like_its_local_file(hub: Callable[..., Hub], tmp_path: Path) -> None:
    rows = [{"question": f"q{i}?", "answer": {"value": f"a{i}"}, "search_results": {}} for i in range(6)]
    served = hub([*rows, {"question": "unanswered", "answer": {"value": ""}, "search_results": {}}])
    train, test = load_text("trivia_qa", "calibrate"), load_text("trivia_qa", "evaluate")
    assert served.asked == [("mandarjoshi/trivia_qa", "rc.nocontext", split) for split in ("train", "validation")]
    assert train.documents[0] == "Question: q0? Answer: a0"
    assert train.exchanges and "1 rows without an answer left out" in train.name
    assert test.documents == train.documents  # the splits differ, this hub does not
    local = [{"context": f"Question: q{i}?\nAnswer:", "answer": f"a{i}"} for i in range(6)]
    (tmp_path / "local.jsonl").write_text("".join(json.dumps(row) + "\n" for row in local))
    assert load_text(str(tmp_path / "local.jsonl"), "whole").documents == train.documents


def test_alpaca_from_the_hub_in_our_own_form_with_a_fifth_held_back(hub: Callable[..., Hub]) -> None:
    hub([{"instruction": f"i{n}", "input": "", "output": f"o{n}", "text": "theirs"} for n in range(10)])
    train, test = load_text("alpaca", "calibrate"), load_text("alpaca", "evaluate")
    assert train.documents == tuple(f"Instruction: i{n}\nResponse: o{n}" for n in range(8))
    assert test.documents == tuple(f"Instruction: i{n}\nResponse: o{n}" for n in (8, 9))


def test_a_hub_that_cannot_be_reached_names_the_files_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for spec in texts.INSTRUCTIONS:
        with pytest.raises(TextError) as caught:
            load_text(spec, "calibrate")
        message = str(caught.value)
        assert f"'{spec}' could not be had from the hub: no route\n" in message
        for part in (".jsonl", "question, answer", "instruction, (input,) output", "prompt, answer", "context, answer"):
            assert part in message
    with pytest.raises(TextError, match=r"\.txt, \.raw"):
        load_text("wikitext2", "calibrate")


@pytest.mark.parametrize(
    ("name", "rows", "begins"),
    [
        ("instructions/alpaca_en_demo.json", 999, "Instruction: "),
        ("instructions/dolly_151.jsonl", 151, "Below is"),
        ("instructions/fireact_hotpotqa.json", 500, "Instruction: "),
        ("triviaqa/closed_book_1000.jsonl", 1000, "Question: "),
    ],
)
def test_the_files_kept_for_machines_without_a_hub(name: str, rows: int, begins: str) -> None:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not there (EDGEPRESS_DATA names its folder)")
    text = load_text(str(path), "whole")
    assert (len(text.documents), text.exchanges) == (rows, True)
    assert all(document.startswith(begins) for document in text.documents)
    assert not any("eos_token" in document for document in text.documents)
