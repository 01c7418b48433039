"""What the shell around the command may be like: closed streams, a folder that is gone, encodings, python -OO."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.pipeline
Command = Callable[..., Any]
COMPRESS = f"{sys.executable} -m edgepress"
ASCII = {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_closed_streams_are_no_error(tiny_llama: Path, tmp_path: Path) -> None:
    """Were they left closed, a file that is opened next would take what is printed."""
    line = f"{COMPRESS} check {tiny_llama} --csv t.csv"
    assert shell(line, tmp_path).returncode == 0
    table = (tmp_path / "t.csv").read_bytes()
    for closed in (">&-", "<&- >&- 2>&-"):
        (tmp_path / "t.csv").unlink()
        done = shell(f"{line} {closed}", tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (tmp_path / "t.csv").read_bytes() == table
    assert shell(f"{COMPRESS} check nothing 2>&-", tmp_path).returncode == 2


def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path: Path) -> None:
    done = shell(f"({COMPRESS} socs; echo $? >&2) | true", tmp_path)
    assert done.stderr == "141\n"


def test_what_the_terminal_cannot_show_is_escaped(tiny_llama: Path, tmp_path: Path) -> None:
    done = shell(f"{COMPRESS} --help", tmp_path, **ASCII)
    assert done.returncode == 0 and "\\u2026" in done.stdout
    done = shell(f"{COMPRESS} generate {tiny_llama} $'na\\xff'", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: the prompt is no text in the encoding of this shell")


def test_a_folder_whose_name_is_no_text_is_refused_by_name(compress: Command, tiny_llama: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"n\xff")
    try:
        shutil.copytree(tiny_llama, odd)
    except OSError:
        pytest.skip("this file system has no such names")
    for arguments in (["eval", odd], ["--model", tiny_llama, "--depth", 0, "-o", tmp_path / os.fsdecode(b"o\xff")]):
        done = compress(*arguments)
        assert done.returncode == 2 and "is no text in the encoding of this shell" in done.stderr


@pytest.mark.parametrize(
    ("line", "environment", "words"),
    [
        ("cd gone && rmdir ../gone && {} check {}", {}, "the current folder is gone"),
        ("{} check {}", {"PYTHONOPTIMIZE": "2"}, "python -OO"),
    ],
)
def test_where_libraries_cannot_work_one_message_says_why(
    line: str, environment: dict[str, str], words: str, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(line.format(COMPRESS, tiny_llama), tmp_path, **environment)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_too_little_memory_to_load_a_library_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    done = shell(f"ulimit -v 500000; {COMPRESS} eval {tiny_llama}", tmp_path)
    assert done.returncode == 2 and "not enough memory" in done.stderr and "Traceback" not in done.stderr
