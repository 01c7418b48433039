"""Read JSON, YAML and TOML from outside, with bounds of size and depth that are checked before parsing."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import CheckpointError, EdgepressError

CONFIG_BYTES = 16 * 2**20  # of a configuration; an index of a thousand shards has less than one
RECIPE_BYTES = 2**20  # of what a person writes
MOST_DEPTH = 64
_MOST_VALUES = 100_000
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"|\'[^\'\n]*\'', re.DOTALL)
_BRACKET = re.compile(rb"[\[{]|[\]}]")


def read_small(path: Path, most: int, error: type[EdgepressError] = CheckpointError) -> bytes:
    """The bytes of a file of at most `most` bytes. Raises `error` for a device, a pipe, and what is larger."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path} is no file, but a folder, device, pipe or socket")
        if found.st_size > most:
            raise error(f"{path} has {found.st_size} bytes; a file of its kind has at most {most}")
        return path.read_bytes()
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror or fault}") from None


def parse_json(
    data: bytes,
    what: str,
    error: type[EdgepressError] = CheckpointError,
    fields: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value that JSON text in UTF-8 stands for. Raises `error` for what is not JSON, or is nested too deeply.

    fields: what makes an object of its fields, or raises ValueError.
    """
    _require_shallow(data, what, error)
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_finite, object_pairs_hook=fields)
    except (ValueError, RecursionError) as fault:  # neither JSON nor, perhaps, text at all
        raise error(f"{what} is not JSON: {fault}") from None


def parse_toml(data: bytes, what: str, error: type[EdgepressError] = CheckpointError) -> dict[str, Any]:
    _require_shallow(data, what, error)
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as fault:
        raise error(f"{what} cannot be read as TOML: {fault}") from None


def parse_yaml(data: bytes, what: str, error: type[EdgepressError] = CheckpointError) -> Any:
    """As for JSON; aliases count as what they stand for, since a few lines of them can stand for a billion values."""
    import yaml

    depth = 0
    try:
        text = data.decode("utf-8-sig")
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise error(f"{what} is nested more than {MOST_DEPTH} levels deep")
        tree = yaml.compose(text, yaml.SafeLoader)
        if _values(tree, {}) > _MOST_VALUES:
            raise error(f"{what} stands for more than {_MOST_VALUES} values, its aliases written out")
        if twice := _stated_twice(tree):
            raise error(f"{what} states {twice}; which of them is meant is not clear")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        raise error(f"{what} is not YAML: {' '.join(str(fault).split())}") from None


def _stated_twice(node: Any) -> str:
    """The first key that a YAML mapping has twice, with its line; YAML forbids it, and the parser takes the last."""
    waiting, seen = [node], set[int]()
    while waiting:
        if id(node := waiting.pop()) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))
        keys = set()
        for item in node.value:
            if isinstance(item, tuple):
                key = item[0].value if isinstance(item[0].value, str) else None
                if key is not None and key in keys and key != "<<":
                    return f"'{key}' twice (the second in line {item[0].start_mark.line + 1})"
                keys.add(key)
            waiting += item if isinstance(item, tuple) else (item,)
    return ""


def _values(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node stands for, aliases written out; without end where it holds itself."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # until it is known, for a node that holds itself
        inner = node.value if isinstance(getattr(node, "value", None), list) else []
        flat = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = min(1 + sum(_values(part, known) for part in flat), 2 * _MOST_VALUES)
    return known[id(node)]


def _require_shallow(data: bytes, what: str, error: type[EdgepressError]) -> None:
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MOST_DEPTH:
            raise error(f"{what} is nested more than {MOST_DEPTH} levels deep")


def _finite(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")
