"""Damage: bytes, JSON values and text, drawn by a seeded generator; each says in words what it did."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, "", "x" * 5000, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf"), [], {},
    [[]], {"a": 1}, "../../outside/secret.txt", "\u0000", "\ud800", "nan", "1", [None], [1] * 1000, "é" * 50,
)  # fmt: skip


def nested(depth: int) -> list[Any]:
    """A list in a list in a list …"""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def damage_file(path: Path, draw: random.Random) -> str:
    """Flip, cut, lengthen, empty, or take a file's place."""
    data = bytearray(path.read_bytes())
    ways = ["flip", "flip", "flip", "cut", "zeros", "empty", "longer", "gone", "folder", "swap", "bytes"]
    way = draw.choice(ways) if data else draw.choice(["longer", "gone", "folder"])
    if way == "flip":
        places = [draw.randrange(len(data)) for _ in range(draw.choice((1, 1, 1, 8)))]
        for place in places:
            data[place] ^= 1 << draw.randrange(8)
        said = f"flipped bits at {places}"
    elif way == "cut":
        cut = draw.randrange(len(data))
        del data[cut:]
        said = f"cut to {cut} bytes"
    elif way == "zeros":
        start = draw.randrange(len(data))
        length = min(len(data) - start, draw.choice((1, 16, 4096)))
        data[start : start + length] = bytes(length)
        said = f"{length} zeros at {start}"
    elif way == "empty":
        data.clear()
        said = "emptied"
    elif way == "longer":
        data += draw.randbytes(draw.choice((1, 8, 4096)))
        said = "lengthened by random bytes"
    elif way == "swap":
        start, length = draw.randrange(len(data)), draw.choice((1, 4, 64))
        chunk = data[start : start + length]
        place = draw.randrange(len(data))
        data[place : place + len(chunk)] = chunk
        said = f"bytes {start} to {start + length} copied to {place}"
    elif way == "bytes":
        place = draw.randrange(len(data))
        data[place : place + 4] = draw.randbytes(4)
        said = f"4 random bytes at {place}"
    else:
        path.unlink()
        if way == "folder":
            path.mkdir()
        return f"{path.name}: {'a folder in its place' if way == 'folder' else 'removed'}"
    replace_file(path, bytes(data))
    return f"{path.name}: {said}"


def replace_file(path: Path, data: bytes) -> None:
    """New contents under a new inode, so that files linked with it keep theirs."""
    path.unlink()
    path.write_bytes(data)


def flip_in(path: Path, draw: random.Random, start: int, end: int) -> str:
    """Random bytes in a part of a file."""
    data = bytearray(path.read_bytes())
    places = [draw.randrange(start, min(end, len(data))) for _ in range(draw.choice((1, 1, 2, 4)))]
    for place in places:
        data[place] = draw.randrange(256)
    replace_file(path, bytes(data))
    return f"{path.name}: random bytes at {places}"


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something lies in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [at] if at else []
    for key, inner in list(items)[:60]:
        found += paths_in(inner, (*at, key))
    return found


def change_json(value: Any, draw: random.Random, deepest: int = 3) -> tuple[Any, str]:
    """A copy with one value gone, replaced, nudged, renamed, or nested deeply."""
    value = copy.deepcopy(value)
    places = [p for p in paths_in(value) if len(p) <= deepest]
    if not places:
        return draw.choice(ODD), "replaced as a whole"
    where = draw.choice(places)
    holder = value
    for key in where[:-1]:
        holder = holder[key]
    key, way = where[-1], draw.choice(("gone", "odd", "odd", "odd", "nudged", "nudged", "renamed", "nested", "text"))
    was = holder[key]
    if way == "gone":
        del holder[key]
    elif way == "nudged" and isinstance(was, int | float) and not isinstance(was, bool):
        holder[key] = draw.choice((was + 1, was - 1, was * 2, was / 2, -was, str(was), float(was)))
    elif way == "renamed" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif way == "nested":
        holder[key] = nested(draw.choice((10, 500)))
    elif way == "text" and isinstance(was, str):
        holder[key] = draw.choice((was + "x", was.upper(), was[:-1], was * 100))
    else:
        holder[key] = draw.choice(ODD)
    now = repr(holder[key])[:60] if way != "gone" and not (isinstance(holder, dict) and key not in holder) else "gone"
    return value, f"{'.'.join(map(str, where))}: {repr(was)[:40]} -> {now}"


def change_json_file(path: Path, draw: random.Random, deepest: int = 3) -> str:
    value, said = change_json(json.loads(path.read_text()), draw, deepest)
    replace_file(path, json.dumps(value).encode())
    return f"{path.name}: {said}"


_LINES = (
    "x: !!python/object/apply:os.system ['touch {canary}']",
    "x: !!python/object/new:subprocess.Popen [['touch', '{canary}']]",
    "x: &a [*a]",
    "a: &a [x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\n"
    "e: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f,*f,*f]",
    "x = " + "[" * 3000 + "]" * 3000,
    "x: " + "[" * 3000 + "]" * 3000,
    "x = " + "9" * 5000,
    "x: " + "9" * 5000,
    "\t- x",
    "\u0000",
    "? x\n: y",
    "--- \n---",
    "[[x]]",
    "<<: *nothing",
    "'unclosed",
)


def change_text(text: str, draw: random.Random, canary: Path) -> tuple[str, str]:
    """One line of a recipe or chip's file gone, doubled, cut, replaced or joined by something planted."""
    lines = text.split("\n")
    place = draw.randrange(len(lines))
    way = draw.choice(("gone", "doubled", "cut", "value", "value", "value", "planted", "planted", "letter", "indent"))
    if way == "gone":
        del lines[place]
    elif way == "doubled":
        lines.insert(place, lines[place])
    elif way == "cut":
        lines = [*lines[:place], lines[place][: draw.randrange(len(lines[place]) + 1)]]
    elif way == "value":
        import re

        spots = [m.span() for m in re.finditer(r"(?<=[:=\[,] )[\w.\"%-]+", text)]
        if spots:
            start, end = draw.choice(spots)
            odd = draw.choice(
                (*map(json.dumps, ODD[:20]), ".nan", "inf", "-inf", "1e400", "0x10", "~", "yes", "2001-01-01")
            )
            return text[:start] + odd + text[end:], f"{text[start:end]!r} -> {odd[:40]}"
    elif way == "planted":
        line = draw.choice(_LINES).replace("{canary}", str(canary))
        lines.insert(place, line)
        return "\n".join(lines), f"line {place}: {line[:60]!r} put in"
    elif way == "letter" and lines[place]:
        at = draw.randrange(len(lines[place]))
        lines[place] = lines[place][:at] + draw.choice("\"'{}[]:#&*!|>%@`\\\x07é") + lines[place][at + 1 :]
    elif way == "indent":
        lines[place] = " " * draw.randrange(1, 5) + lines[place]
    return "\n".join(lines), f"line {place} {way}"


def special(path: Path, draw: random.Random) -> str:
    """A pipe that nobody writes, or a link to a device, in a file's place."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    device = draw.choice(("fifo", "/dev/zero", "/dev/null", "/dev/urandom", "loop", "dangling"))
    if device == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"loop": path.name, "dangling": "nowhere"}.get(device, device))
    return f"{path.name}: {device}"
