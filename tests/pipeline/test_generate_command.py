"""`compress generate` as a person runs it: one checkpoint, several, all stages of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgepress.eval.generation import Continuation, Decoding
from edgepress.pipeline.evaluate import open_all, print_table

pytestmark = pytest.mark.pipeline

Command = Callable[..., Any]
PROMPT = "The for statement"


def test_one_checkpoint_continues_the_prompt(compress: Command, tiny_llama: Path) -> None:
    done = compress("generate", tiny_llama, PROMPT, "--tokens", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT) and len(done.stdout) > len(PROMPT) + 3


def test_an_output_folder_is_all_its_stages(compress: Command, chain: Path, tiny_llama: Path) -> None:
    done = compress("generate", chain, PROMPT, "--tokens", 8, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["prompt"] == PROMPT and data["decoding"]["tokens"] == 8
    found = data["continuations"]
    assert found[0]["checkpoint"] == tiny_llama.name
    assert [c["checkpoint"][:5] for c in found[1:]] == ["1-dep", "2-wan", "3-lor", "4-gpt", "5-eor"]
    assert Path(found[0]["folder"]) == tiny_llama.resolve()
    assert found[0]["same_words_as_first"] == len(found[0]["text"].split())
    plain = compress("generate", tiny_llama, chain / "result", PROMPT, "--tokens", 8)
    headings = re.findall(r"^\[(.+)\](.*)$", plain.stdout, flags=re.M)
    assert [h[0] for h in headings] == [tiny_llama.name, (chain / "result").resolve().name]
    assert "begins with" in headings[1][1]
    assert found[0]["text"].strip("\n") in plain.stdout and found[5]["text"].strip("\n") in plain.stdout


def test_all_checkpoints_that_cannot_be_opened_are_named(compress: Command, tmp_path: Path) -> None:
    (tmp_path / ".edgepress").touch()
    done = compress("generate", "no/such/folder", tmp_path, PROMPT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "there is no model 'no/such/folder'" in done.stderr and "has no result yet" in done.stderr


def test_the_table_dims_what_is_the_same(chain: Path) -> None:
    entries = open_all([str(chain)])[:2]
    texts = [" one two three", " one two four [not markup]"]
    found = [Continuation(PROMPT, text, 3, False, 0.1) for text in texts]
    console = Console(width=80, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(console, PROMPT, Decoding(), entries, found)
    styled = console.export_text(styles=True)
    assert re.search(r"\x1b\[2m ?one two \x1b\[0mfour \[not markup\]", styled)
    assert "greedy, at most 60 new tokens" in styled and "1-depth" in styled
