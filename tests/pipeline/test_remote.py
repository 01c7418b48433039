"""What a store at a URL gives back is not trusted: names, sizes, hashes and the fingerprint are checked first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.manifest import MANIFEST, sealed, write_json
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.pipeline.store import Mirror

pytestmark = pytest.mark.unit

NAME, KEY = "1-depth-1-ffffffff", "f" * 64


@pytest.fixture
def far(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """A store with one finished folder, as another machine left it."""
    from edgepress.checkpoints.headers import shape_from_folder
    from edgepress.checkpoints.manifest import Manifest, describe_files

    folder = Path(shutil.copytree(tiny_model(), tmp_path / "far" / NAME))
    shape = shape_from_folder(folder)
    Manifest(
        stage="depth", stage_version=1, options={}, fingerprint=KEY, parent=None, seed=0, dtype="float32", device="cpu",
        calibration=None, parameters_total=shape.parameters_total, parameters_nonzero=shape.parameters_total,
        sparsity=None, file_bytes=shape.file_bytes, packed_bytes=packed_sizes(shape).total, seconds=1.0,
        peak_memory_bytes=1, versions={}, files=describe_files(folder),
    ).write(folder)  # fmt: skip
    return folder


@pytest.fixture
def mirror(far: Path, tmp_path: Path) -> Mirror:
    return Mirror(far.parent.as_uri(), tmp_path / "near" / "store")


def edit(folder: Path, change: Callable[[dict[str, Any]], object], with_hash: bool = True) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    del data["sha256"]
    write_json(folder / MANIFEST, sealed(data) if with_hash else data)


def assert_refused(mirror: Mirror, words: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.glob("*"))
    with pytest.raises(CheckpointError, match=words):
        mirror.fetch(NAME, KEY)
    assert list(mirror.folder.iterdir()) == []
    assert sorted(tmp_path.glob("*")) == before and [p.name for p in (tmp_path / "near").iterdir()] == ["store"]


def test_a_sound_folder_comes_whole(mirror: Mirror, far: Path) -> None:
    (far / "not-listed.txt").write_text("stays there")
    assert mirror.fetch(NAME, KEY)
    got = {p.name: p.read_bytes() for p in (mirror.folder / NAME).iterdir()}
    assert got == {p.name: p.read_bytes() for p in far.iterdir() if p.name != "not-listed.txt"}
    assert mirror.fetch(NAME, KEY)
    assert not mirror.fetch("2-other-00000000", KEY)


@pytest.mark.parametrize("with_hash", [True, False])
@pytest.mark.parametrize(
    "name", ["../evil", "../../near/evil", "{outside}/evil", "a\\..\\evil", "a/../../evil", "..", "/dev/null"]
)
def test_names_that_leave_the_folder(mirror: Mirror, far: Path, tmp_path: Path, name: str, with_hash: bool) -> None:
    name = name.format(outside=tmp_path)
    (far.parent / "evil").write_text("evil")
    facts = {"bytes": 4, "sha256": "4" * 64}
    edit(far, lambda data: data["files"].update({name: facts}), with_hash)
    assert_refused(mirror, "does not lie in its folder", tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, ".work/journal.jsonl"])
def test_files_that_are_no_result(mirror: Mirror, far: Path, tmp_path: Path, name: str) -> None:
    edit(far, lambda data: data["files"].update({name: {"bytes": 4, "sha256": "4" * 64}}))
    assert_refused(mirror, "which is no result", tmp_path)


@pytest.mark.parametrize("fault", ["flipped", "longer", "gone"])
def test_files_that_are_not_those_listed(mirror: Mirror, far: Path, tmp_path: Path, fault: str) -> None:
    path = far / "config.json"
    data = path.read_bytes()
    if fault == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + b" " if fault == "flipped" else data + b" ")
    words = {
        "flipped": "config.json does not have the sha256",
        "longer": "config.json has",
        "gone": "config.json: FileNot",
    }
    assert_refused(mirror, words[fault], tmp_path)


def test_a_manifest_of_something_else_or_damaged(mirror: Mirror, far: Path, tmp_path: Path) -> None:
    sound = (far / MANIFEST).read_text()
    edit(far, lambda data: data.update(fingerprint="e" * 64))
    assert_refused(mirror, "was refused: its fingerprint is eeeeeeeeeeee, asked for was ffffffffffff", tmp_path)
    (far / MANIFEST).write_text(sound.replace('"seed": 0', '"seed": 1'))
    assert_refused(mirror, "is damaged or was edited", tmp_path)
    (far / MANIFEST).write_text(sound[:100])
    assert_refused(mirror, "is damaged", tmp_path)


def test_a_fetch_that_is_cut_never_counts(mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    original = mirror.files.get_file

    def cut(there: str, here: str) -> None:
        calls.append(there)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(there, here)

    monkeypatch.setattr(mirror.files, "get_file", cut)
    with pytest.raises(KeyboardInterrupt):
        mirror.fetch(NAME, KEY)
    assert list(mirror.folder.iterdir()) == []


@pytest.mark.parametrize("path", ["../..", "../../far", "../.locks", ".."])
def test_a_line_does_not_lead_out_of_the_store(mirror: Mirror, far: Path, tmp_path: Path, path: str) -> None:
    edit(far, lambda data: data.update(parent={"path": path, "fingerprint": KEY}))
    with pytest.raises(CheckpointError, match=r"does not lie in its folder|is no stage's folder"):
        mirror.fetch_line(NAME, KEY)
    assert [p.name for p in mirror.folder.iterdir()] == [NAME]


def test_what_is_shared_has_plain_names_and_is_no_folder(mirror: Mirror, far: Path) -> None:
    shared = far.parent / "measurements"
    (shared / "folder").mkdir(parents=True)
    (shared / "a.json").write_text("{}")
    (shared / ".hidden").write_text("{}")
    mirror.fetch(NAME, KEY)
    assert [p.name for p in (mirror.folder / "measurements").iterdir()] == ["a.json"]


def test_an_error_of_the_file_system_is_one_message(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the bucket is gone\nand more")

    monkeypatch.setattr(mirror.files, "exists", fail)
    with pytest.raises(CheckpointError, match=r"RuntimeError the bucket is gone$"):
        mirror.fetch(NAME, KEY)
