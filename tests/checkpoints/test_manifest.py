"""The manifest: what it takes in, what it refuses, and that a cut write never counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints import manifest
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.manifest import (
    MANIFEST,
    WORK,
    Manifest,
    check_files,
    describe_files,
    fingerprint,
    write_bytes,
)

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]
Finish = Callable[..., Checkpoint]

FACTS: dict[str, Any] = {
    "parent": "p" * 64,
    "stage": "wanda",
    "version": 1,
    "options": {"pattern": "1:8", "samples": 4},
    "calibration": "c" * 64,
    "seed": 0,
    "dtype": "float32",
}


@pytest.mark.parametrize(
    "change",
    [
        {"parent": "q" * 64},
        {"stage": "depth"},
        {"version": 2},
        {"options": {"pattern": "1:8", "samples": 5}},
        {"options": {"pattern": "1:8"}},
        {"calibration": None},
        {"seed": 1},
        {"dtype": "bfloat16"},
    ],
)
def test_fingerprint_depends_on_everything(change: dict[str, Any]) -> None:
    assert fingerprint(**(FACTS | change)) != fingerprint(**FACTS)


def test_fingerprint_does_not_depend_on_the_order_of_options() -> None:
    assert fingerprint(**(FACTS | {"options": {"samples": 4, "pattern": "1:8"}})) == fingerprint(**FACTS)
    assert len(fingerprint(**FACTS)) == 64


def test_manifest_comes_back(own_model: TinyModel, finish: Finish) -> None:
    checkpoint = finish(own_model(), quality={"after": 12.25}, parent={"path": "../a", "fingerprint": "a"})
    again = Manifest.read(checkpoint.folder)
    assert again == checkpoint.manifest
    assert (again.stage, again.seed, again.quality, again.seconds) == ("depth", 7, {"after": 12.25}, 1.5)


def test_files_are_listed_with_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / WORK).mkdir()
    for name in ("a.json", "adapter/b.bin", f"{WORK}/journal.jsonl", MANIFEST, f".{MANIFEST}.partial"):
        (tmp_path / name).write_text(name)
    assert describe_files(tmp_path) == {
        name: {"bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}
        for name in ("a.json", "adapter/b.bin")
    }


def test_manifest_after_a_write_that_was_cut(own_model: TinyModel, finish: Finish) -> None:
    """The file a kill left behind is replaced by the next write: listed, it would be missed for ever after."""
    folder = own_model()
    (folder / f".{MANIFEST}.partial").write_text('{"form')
    (folder / ".config.json.partial").write_text("{")
    assert finish(folder).manifest is not None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"format": 2}', b"null"])
def test_damaged_manifest(own_model: TinyModel, content: bytes) -> None:
    folder = own_model()
    (folder / MANIFEST).write_bytes(content)
    for read in (Manifest.read, Checkpoint.open):
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged .*; move the folder away") as raised:
            read(folder)
        assert str(folder) in str(raised.value)


def test_unknown_key_or_format(own_model: TinyModel, finish: Finish) -> None:
    folder = finish(own_model()).folder
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(data | {"surprise": 1}))
    with pytest.raises(CheckpointError, match=r"is damaged .*surprise"):
        Manifest.read(folder)
    (folder / MANIFEST).write_text(json.dumps(data | {"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99; this version reads format 2"):
        Manifest.read(folder)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json: it was never finished") as raised:
        Manifest.read(tmp_path)
    assert str(tmp_path) in str(raised.value)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_damaged_files_are_named(own_model: TinyModel, finish: Finish) -> None:
    folder = finish(own_model()).folder
    told = Manifest.read(folder)
    check_files(folder, told, hashes=True)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    damage(weights)
    Checkpoint.open(folder)  # sizes only
    with pytest.raises(CheckpointError, match=r"damaged: model\.safetensors does not have the sha256") as raised:
        Checkpoint.open(folder, hashes=True)
    assert str(folder) in str(raised.value)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors has {size - 1} bytes, the manifest says {size}"):
        Checkpoint.open(folder)
    weights.unlink()
    with pytest.raises(
        CheckpointError, match=r"damaged: model\.safetensors is missing\. It was neither used nor removed"
    ):
        Checkpoint.open(folder)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_bytes(path, b"old")

    def fail(_: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(manifest.os, "fsync", fail)
    with pytest.raises(OSError, match="power cut"):
        write_bytes(path, b"new and longer")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
