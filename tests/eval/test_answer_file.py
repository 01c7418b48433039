"""A kept answer is the one that was given: edits are found, two processes take turns, a killed one holds nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import CheckpointError, TextError
from edgepress.eval.answer_file import AnswerFile

pytestmark = pytest.mark.unit

ROWS = [{"id": str(i), "prompt": f"What is {i}?", "answer": f"It is {i}.", "tokens": 3} for i in range(4)]


def opened(path: Path, note: Callable[[str], None] = print, **settings: Any) -> AnswerFile:
    return AnswerFile(path, "trivia", "c" * 64, "tiny", {"new_tokens": 4} | settings, note)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with opened(tmp_path / "tiny" / "t.jsonl") as file:
        file.add(ROWS)
    return tmp_path / "tiny" / "t.jsonl"


def test_rows_come_back_as_they_were(path: Path) -> None:
    for _ in range(2):
        with opened(path) as file:
            assert list(file.rows.values()) == ROWS


def test_any_flipped_bit_is_found_or_harmless(path: Path) -> None:
    sound, draw, found = path.read_bytes(), random.Random(3), 0
    for _ in range(200):
        data = bytearray(sound)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            with opened(path) as file:
                # A last line without its end was cut by a kill and is answered again; else nothing may differ.
                assert all(file.rows.get(row["id"], row) == row for row in ROWS) and len(file.rows) >= 3
        except (CheckpointError, TextError) as error:
            found += str(path) in str(error)
    assert found > 150


@pytest.mark.parametrize("number", [0, 1, 4])
def test_an_edited_line_is_named(path: Path, number: int) -> None:
    lines = path.read_text().splitlines()
    lines[number] = lines[number].replace("tiny" if number == 0 else "It is", "other")
    path.write_text("\n".join(lines) + "\n")
    with (
        pytest.raises(TextError, match=rf"t\.jsonl, line {number + 1}: not an answer .*edited or damaged"),
        opened(path),
    ):
        pass


def test_a_line_of_another_file_is_no_answer_here(path: Path, tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "other.jsonl", "trivia", "d" * 64, "tiny", {"new_tokens": 4}) as other:
        other.add([ROWS[0] | {"answer": "another model's"}])
    lines = path.read_text().splitlines()
    lines[1] = (tmp_path / "other.jsonl").read_text().splitlines()[1]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TextError, match="line 2: not an answer"), opened(path):
        pass


def test_a_line_may_be_removed_and_is_then_answered_again(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    with opened(path) as file:
        assert list(file.rows) == ["0", "2", "3"]


def test_a_file_of_the_format_before_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    header = {"format": 1, "task": "trivia", "checkpoint": "c" * 64, "label": "tiny", "settings": {"new_tokens": 4}}
    path.write_text("\n".join(json.dumps(line) for line in (header, *ROWS[:2])) + "\n")
    with opened(path) as file:
        assert list(file.rows.values()) == ROWS[:2]
        file.add(ROWS[2:])
    with opened(path) as file:
        assert list(file.rows.values()) == ROWS


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t.jsonl"
    if kind == "link":
        (tmp_path / "elsewhere").write_text("")
        path.symlink_to("elsewhere")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is no plain file"), opened(path):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from edgepress.eval.answer_file import AnswerFile
with AnswerFile(Path(sys.argv[1]), "trivia", "c" * 64, "tiny", {"new_tokens": 4}) as file:
    file.add([{"id": "9", "answer": "of the first"}])
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    file.add([{"id": "10", "answer": "of the first"}])
"""


@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_take_turns(path: Path, killed: bool) -> None:
    """The second waits and says so, then finds the answers of the first; a killed one keeps nobody waiting."""
    command = [sys.executable, "-c", HOLDER, str(path), "60" if killed else "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        said: list[str] = []

        def note(message: str) -> None:
            said.append(message)
            if killed:
                first.send_signal(signal.SIGKILL)

        with opened(path, note) as file:
            assert file.rows["9"]["answer"] == "of the first"
            assert ("10" in file.rows) != killed
            file.add([{"id": "11", "answer": "of the second"}])
        assert len(said) == 1 and "is being written by another process; waiting for it" in said[0]
    with opened(path) as file:
        assert {"9", "11"} <= file.rows.keys()


def test_the_lock_ends_with_an_error(path: Path) -> None:
    with pytest.raises(CheckpointError, match="another evaluation"), opened(path, new_tokens=5):
        pass
    with pytest.raises(KeyboardInterrupt), opened(path):
        raise KeyboardInterrupt
    with opened(path) as file:
        assert len(file.rows) == 4
