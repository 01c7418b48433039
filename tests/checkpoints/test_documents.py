"""JSON, YAML and TOML from outside: read where they are small and shallow, refused by name where they are not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.documents import MOST_DEPTH, parse_json, parse_toml, parse_yaml, read_small
from edgepress.checkpoints.errors import CheckpointError, PlanError

pytestmark = pytest.mark.unit
DEEP = MOST_DEPTH + 1


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_json, "[" * DEEP + "]" * DEEP),
        (parse_json, '{"a":' * 50_000 + "1" + "}" * 50_000),
        (parse_toml, "a = " + "[" * DEEP + "]" * DEEP),
        (parse_yaml, "[" * DEEP + "]" * DEEP),
        (parse_yaml, "- " * DEEP + "x"),
    ],
)
def test_what_is_nested_too_deeply_is_refused(parse: Callable[..., Any], text: str) -> None:
    with pytest.raises(PlanError, match=f"it is nested more than {MOST_DEPTH} levels deep"):
        parse(text.encode(), "it", PlanError)


def test_brackets_in_strings_are_no_nesting() -> None:
    text = '{"a": "' + "[{" * 500 + '\\"", "b": [1, {"c": 2}]}'
    assert parse_json(text.encode(), "it")["b"] == [1, {"c": 2}]
    assert parse_toml(b"a = '[[[['\nb = [[1]]\n", "it") == {"a": "[[[[", "b": [[1]]}


@pytest.mark.parametrize(
    "text", ["a: &a [1, 2]\nb: &b [*a, *a]\nc: *b\n", "x: &x {k: 1}\ny: {<<: *x}\n", "- 1\n- two\n", ""]
)
def test_aliases_that_stand_for_little_are_read(text: str) -> None:
    import yaml

    assert parse_yaml(text.encode(), "it") == yaml.safe_load(text)


def test_aliases_that_stand_for_a_billion_values_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    began = time.monotonic()
    with pytest.raises(PlanError, match="stands for more than 100000 values"):
        parse_yaml("\n".join(lines).encode(), "it", PlanError)
    with pytest.raises(PlanError, match="stands for more than 100000 values"):
        parse_yaml(b"&a [*a]", "it", PlanError)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["{", "nonsense", "[1,]", '{"a": NaN}', '{"a": Infinity}'])
def test_what_is_not_json_is_said(text: str) -> None:
    with pytest.raises(CheckpointError, match="it is not JSON"):
        parse_json(text.encode(), "it")


def test_tags_of_python_construct_nothing() -> None:
    with pytest.raises(PlanError, match="is not YAML"):
        parse_yaml(b"a: !!python/object/apply:os.system ['true']", "it", PlanError)


def test_files_that_are_none_or_too_large_are_refused(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"x" * 11)
    assert read_small(large, 11) == b"x" * 11
    with pytest.raises(CheckpointError, match="has 11 bytes; a file of its kind has at most 10"):
        read_small(large, 10)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="is no file, but a folder, device, pipe or socket"):
            read_small(path, 10)
    with pytest.raises(CheckpointError, match="No such file"):
        read_small(tmp_path / "none", 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nwindow: 2\nseed: 2\n", "'seed' twice .the second in line 3"),
        ("stages:\n  - lora: {rank: 4, rank: 8}\n", "'rank' twice .the second in line 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        parse_yaml(text.encode(), "it", PlanError)
    assert parse_yaml(b"a: {k: 1}\nb: {k: 1}\nc: &x {k: 1}\nd: {<<: *x, j: 2}\n", "it")["d"] == {"k": 1, "j": 2}
