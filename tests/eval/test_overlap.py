"""Training text that holds what is measured on: found whatever the file's form, and left out."""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from edgepress.eval.text import Measured, Text, held_out_of, load_text, read_file, without_measured

pytestmark = pytest.mark.unit
NAMES = ("for", "try", "with", "class", "function", "import", "global", "raise", "assert", "del")
PROSE = [pydoc_data.topics.topics[name] for name in NAMES]


def test_the_embedded_halves_share_nothing() -> None:
    measured = Measured.of(load_text("embedded", "evaluate"))
    text = load_text("embedded", "calibrate")
    kept, left_out, _ = without_measured(text, measured)
    assert kept is text and left_out == 0


@pytest.mark.parametrize("form", ["txt", "crlf", "jsonl", "shuffled", "wrapped", "upper", "more", "joined"])
def test_a_copy_in_another_form_is_found(tmp_path: Path, form: str) -> None:
    rows = [json.dumps({"text": document}) for document in PROSE]
    joined = "\n\n".join(PROSE)
    files: dict[str, tuple[str, str]] = {
        "txt": ("a.txt", joined),
        "crlf": ("a.txt", joined.replace("\n", "\r\n")),
        "jsonl": ("a.jsonl", "\n".join(rows)),
        "shuffled": ("a.jsonl", "\n".join(rows[::-1])),
        "wrapped": ("a.txt", "\n".join(" ".join(document.split()) for document in PROSE)),
        "upper": ("a.txt", joined.upper()),
        "joined": ("a.txt", joined.replace(" ", "_")),
        "more": ("a.jsonl", "\n".join(json.dumps({"text": "Some words before it. " + d}) for d in PROSE)),
    }
    name, content = files[form]
    (tmp_path / name).write_bytes(content.encode())
    _, left_out, of = without_measured(read_file(tmp_path / name), Measured.of(Text("measured", tuple(PROSE))))
    assert left_out >= 0.95 * of > 0


@pytest.mark.parametrize("ends", ["\n", ". "])
def test_a_copy_with_its_lines_or_sentences_shuffled_is_found(ends: str) -> None:
    measured = Measured.of(Text("measured", tuple(PROSE)))
    parts = "\n".join(PROSE).split(ends)
    random.Random(0).shuffle(parts)
    _, left_out, of = without_measured(Text("training", (ends.join(parts),)), measured)
    assert left_out >= 0.9 * of > 0


@pytest.mark.parametrize("form", ["{} {}", "{}. {}", "[{}] {}", "  {}:\t{}", "{}.1) {}", "00:{:02}:07,5 {}"])
def test_a_copy_with_numbered_lines_is_found_and_the_other_way_round(form: str) -> None:
    lines = [" ".join(words[at : at + 8]) for d in PROSE if (words := d.split()) for at in range(0, len(words), 8)]
    random.Random(0).shuffle(lines)  # so that no run of words goes on over the end of a line
    plain = Text("plain", ("\n".join(lines),))
    random.Random(1).shuffle(lines)
    numbered = Text("numbered", ("\n".join(form.format(n, line) for n, line in enumerate(lines, 1)),))
    for training, measured in ((numbered, plain), (plain, numbered)):
        _, left_out, of = without_measured(training, Measured.of(measured))
        assert left_out >= 0.95 * of > 0


@pytest.mark.parametrize("label", ["(b) ", "iv. ", "C: "])
def test_a_copy_whose_lines_begin_with_letters_is_found(label: str) -> None:
    lines = [" ".join(words[at : at + 8]) for d in PROSE if (words := d.split()) for at in range(0, len(words), 8)]
    measured = Measured.of(Text("measured", ("\n".join(lines),)))
    random.Random(0).shuffle(lines)
    _, left_out, of = without_measured(Text("training", (label + f"\n{label}".join(lines),)), measured)
    assert left_out >= 0.95 * of > 0


def test_a_copy_in_another_spelling_of_the_same_letters_is_found() -> None:
    words = " ".join(PROSE).replace("e", "\u00e9")  # e with an accent, as one letter
    for copy in (
        unicodedata.normalize("NFD", words),
        words.replace("r\u00e9", "r\u00ad\u00e9"),
        words.replace(" ", " \u200b"),
    ):
        _, left_out, of = without_measured(Text("training", (copy,)), Measured.of(Text("measured", (words,))))
        assert left_out >= 0.95 * of > 0


def test_a_copy_without_spaces_between_words_is_found_in_lines_of_another_length() -> None:
    letters = "".join(chr(0x4E00 + place * 7919 % 5000) for place in range(3000))
    lines = {wide: "\n".join(letters[i : i + wide] for i in range(0, len(letters), wide)) for wide in (40, 60)}
    text = Text("training", (lines[40], *PROSE))
    kept, left_out, _ = without_measured(text, Measured.of(Text("measured", (lines[60],))))
    assert (kept.documents, left_out) == (tuple(PROSE), 1)


def test_what_is_shared_goes_and_the_rest_stays() -> None:
    text = Text("training", tuple(PROSE))
    kept, left_out, of = without_measured(text, Measured.of(Text("measured", (PROSE[0], PROSE[7]))))
    assert (left_out, of) == (2, len(PROSE))
    assert kept.documents == tuple(d for d in PROSE if d not in (PROSE[0], PROSE[7]))


def test_of_one_long_document_passages_go() -> None:
    whole = Text("file", ("\n".join(PROSE),))
    kept, left_out, of = without_measured(whole, Measured.of(Text("measured", (PROSE[3],))))
    assert 0 < left_out < of / 2
    assert PROSE[0].strip()[:400] in kept.documents[0]
    assert without_measured(kept, Measured.of(Text("measured", (PROSE[3],))))[1] == 0


def test_questions_asked_again_are_found_whatever_the_answer() -> None:
    asked = Text("measured", ("Question: Which town lies where both rivers meet?\nAnswer: Koblenz",), True)
    again = ("Question: Which town lies where both rivers meet?\nAnswer: I do not know",)
    other = ("Question: Which town lies where both railways meet?\nAnswer: Crewe",)
    _, left_out, _ = without_measured(Text("training", (*again, *other * 4), True), Measured.of(asked))
    assert left_out == 1


def test_phrases_of_the_form_are_no_overlap() -> None:
    """Below 13 common words in a row, and what stands in more than ten measured documents."""
    head = "Below is an instruction that describes a task; write a response that completes the request as asked. "
    many = [head + f"Word{i} " * 30 for i in range(20)]
    _, left_out, _ = without_measured(
        Text("training", (head + "own words " * 40,) * 5), Measured.of(Text("m", tuple(many)))
    )
    assert left_out == 0


@pytest.mark.parametrize("way", ["same", "link", "relative", "copy"])
def test_the_same_file_by_another_path_is_split(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "text.txt"
    file.write_text("words\n" * 50)
    monkeypatch.chdir(tmp_path)
    other: Any = {
        "same": file,
        "link": tmp_path / "link.txt",
        "relative": Path("text.txt"),
        "copy": tmp_path / "copy.txt",
    }
    if way == "link":
        other[way].symlink_to(file)
    if way == "copy":
        other[way].write_text("words\n" * 50)
    assert held_out_of(str(other[way]), ["embedded", str(file)]) is (way != "copy")
