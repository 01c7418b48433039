"""Names and links that lead out of a folder are refused; devices are written to, never replaced."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.headers import INDEX, shape_from_folder
from edgepress.checkpoints.manifest import Manifest, describe_files, require_name, sealed, write_bytes, write_json
from edgepress.checkpoints.vocabulary import load_tokenizer
from edgepress.checkpoints.writer import CheckpointWriter

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]
Finish = Callable[..., Checkpoint]

OUTSIDE = [
    "../x",
    "/etc/passwd",
    "a/../../x",
    "..",
    ".",
    "",
    "a//b",
    "a/./b",
    "a\\..\\b",
    "C:/x",
    "a\x00b",
    "a\nb",
    7,
    None,
]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_names_that_do_not_lie_in_the_folder(name: object) -> None:
    with pytest.raises(CheckpointError, match=r"^the index names a file .* does not lie in its folder"):
        require_name(name, "the index")


@pytest.mark.parametrize("name", ["a", "model-00001-of-00002.safetensors", "adapter/b.json", "..a", "a..", ".hidden"])
def test_plain_names(name: str) -> None:
    assert require_name(name, "the index") == name


@pytest.fixture
def sharded(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A model with an index and one shard a block."""
    source = Checkpoint.open(tiny_model())
    writer = CheckpointWriter(tmp_path / "model")
    for index in range(len(source.shape.blocks)):
        writer.copy_block(index, source, index)
    writer.copy_outer(source)
    writer.finish(source.config, source)
    return writer.folder


@pytest.mark.parametrize("how", ["up", "absolute", "link", "circle"])
def test_an_index_cannot_lead_out(sharded: Path, tmp_path: Path, how: str) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    (sharded / "block-00002.safetensors").rename(elsewhere)
    index = json.loads((sharded / INDEX).read_text())
    name = {"up": "../elsewhere.safetensors", "absolute": str(elsewhere)}.get(how, "block-00002.safetensors")
    index["weight_map"] = {k: name if v == "block-00002.safetensors" else v for k, v in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    if how == "link":
        (sharded / name).symlink_to("../elsewhere.safetensors")
    if how == "circle":
        (sharded / name).symlink_to(name)
    for read in (Checkpoint.open, shape_from_folder):
        with pytest.raises(CheckpointError, match=r"does not lie in its folder|is a link out of its folder"):
            read(sharded)


def test_links_within_the_folder_and_the_hub_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    """The hub's cache: snapshots/REVISION/NAME is a link to ../../blobs/HASH."""
    shape = Checkpoint.open(sharded).shape
    repo = tmp_path / "models--tiny"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in sharded.iterdir() if p.is_file())):
        shutil.copy(path, repo / "blobs" / str(number))
        (repo / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{number}")
    cached = Checkpoint.open(repo / "snapshots" / "abc")
    assert cached.shape == shape
    assert cached.tokenizer().vocab_size > 0
    copied = CheckpointWriter(tmp_path / "copy")
    for index in range(len(shape.blocks)):
        copied.copy_block(index, cached, index)
    copied.copy_outer(cached)
    copied.finish(cached.config, cached)
    assert not [p for p in copied.folder.iterdir() if p.is_symlink()]
    # Out of the cache's own blobs is out.
    (repo / "snapshots" / "abc" / "tokenizer.json").unlink()
    (repo / "snapshots" / "abc" / "tokenizer.json").symlink_to("../../../model/tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link out of its folder"):
        Checkpoint.open(repo / "snapshots" / "abc")
    (sharded / "block-00001.safetensors").rename(sharded / "there")
    (sharded / "block-00001.safetensors").symlink_to("there")
    assert Checkpoint.open(sharded).shape == shape


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja", "adapter", "edge"])
def test_what_a_model_is_read_from_is_no_link_out(sharded: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("{}")
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to(tmp_path / "secret" / ("" if "." not in name else "file"))
    with pytest.raises(CheckpointError, match=rf"{name} is a link out of its folder"):
        Checkpoint.open(sharded)
    if name == "tokenizer.json":
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link out"):
            load_tokenizer(sharded)


def test_a_file_in_a_folder_of_a_model_is_no_link_out(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (sharded / "adapter").mkdir()
    (sharded / "adapter" / "adapter_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is a link out"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "model.safetensors"])
def test_a_pipe_is_no_file_of_a_model(sharded: Path, name: str) -> None:
    """Reading one would wait for ever."""
    (sharded / name).unlink(missing_ok=True)
    os.mkfifo(sharded / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a device, pipe or socket"):
        Checkpoint.open(sharded)


def test_tokenizer_settings_cannot_name_files_elsewhere(sharded: Path, tmp_path: Path) -> None:
    settings = json.loads((sharded / "tokenizer_config.json").read_text())
    (sharded / "tokenizer_config.json").write_text(json.dumps(settings | {"vocab_file": "/etc/passwd"}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json \(vocab_file\) names a file '/etc/passwd'"):
        load_tokenizer(sharded)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
@pytest.mark.parametrize("with_hash", [True, False])
def test_a_manifest_cannot_list_files_elsewhere(sharded: Path, finish: Finish, name: str, with_hash: bool) -> None:
    made = finish(sharded)
    data = json.loads((made.folder / "manifest.json").read_text())
    data["files"][name] = {"bytes": 1, "sha256": "0"}
    del data["sha256"]
    write_json(made.folder / "manifest.json", sealed(data) if with_hash else data)
    for read in (Checkpoint.open, Manifest.read):
        with pytest.raises(CheckpointError, match="does not lie in its folder"):
            read(made.folder)


@pytest.mark.parametrize("path", ["../../elsewhere", "../..", "..", "../link", "../a/../../elsewhere"])
def test_a_parent_is_beside_its_child(sharded: Path, finish: Finish, tmp_path: Path, path: str) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    store.mkdir()
    shutil.copytree(sharded, elsewhere)
    parent = finish(elsewhere)
    (store / "link").symlink_to(elsewhere)
    shutil.copytree(sharded, store / "child")
    child = finish(store / "child", parent={"path": path, "fingerprint": parent.fingerprint})
    with pytest.raises(CheckpointError, match=r"does not lie in its folder|is a link out of its folder"):
        child.parent()


def test_a_parent_beside_it_or_at_an_absolute_path_is_found(sharded: Path, finish: Finish, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    for name in ("store/parent", "far"):
        shutil.copytree(sharded, tmp_path / name)
        finish(tmp_path / name)
    shutil.copytree(sharded, tmp_path / "store" / "child")
    for path in ("../parent", str(tmp_path / "far")):
        child = finish(tmp_path / "store" / "child", parent={"path": path, "fingerprint": "f" * 64})
        assert child.parent().folder.name in ("parent", "far")


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_a_device_is_written_to(tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    write_bytes(Path("/dev/null"), b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.stat("/dev/null").st_ino == before.st_ino
    link = tmp_path / "out.json"
    link.symlink_to("/dev/null")
    write_bytes(link, b"gone")
    assert link.is_symlink()
    with pytest.raises(OSError, match="No space left on device"):
        write_bytes(Path("/dev/full"), b"x" * 100_000)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_pipe_gets_the_bytes_and_one_that_nobody_reads_is_an_error(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="No such device or address"):
        write_bytes(pipe, b"x")
    handle = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_bytes(pipe, b"through")
    got = os.read(handle, 100)
    os.close(handle)
    assert got == b"through" and stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_a_processes_own_stream_is_written_to(tmp_path: Path) -> None:
    with (tmp_path / "redirected").open("wb") as file:
        write_bytes(Path(f"/dev/fd/{file.fileno()}"), b"through")
    assert (tmp_path / "redirected").read_bytes() == b"through"
    assert [p.name for p in tmp_path.iterdir()] == ["redirected"]


def test_an_output_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder; name a file to write"):
        write_bytes(tmp_path, b"x")
    with pytest.raises(CheckpointError, match=r"cannot be written: there is no folder .*/no"):
        write_bytes(tmp_path / "no" / "file", b"x")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])
def test_nothing_is_left_of_a_write_that_was_stopped(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: int) -> None:
        raise error

    monkeypatch.setattr("edgepress.checkpoints.manifest.os.fsync", stop)
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        write_bytes(tmp_path / "x.json", b"new")
    if isinstance(raised.value, OSError):
        assert str(tmp_path / "x.json") in str(raised.value)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_no_longer_its_parents_is_not_taken_over(sharded: Path, finish: Finish, tmp_path: Path) -> None:
    """Hard links share what is damaged: whoever links, and whoever checks later, finds it."""
    source = finish(sharded)
    writer = CheckpointWriter(tmp_path / "child")
    assert writer.work.folder.is_dir()
    writer.copy_block(0, source, 0)
    with (sharded / "block-00001.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match=r"is damaged: block-00001\.safetensors does not have the sha256"):
        writer.copy_block(1, source, 1)
    listed = describe_files(writer.folder)
    assert "block-00000.safetensors" in listed
    with (sharded / "block-00000.safetensors").open("r+b") as file:  # the same file by another name
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match=r"block-00000\.safetensors is not as it was written"):
        writer.work.require_as_written(describe_files(writer.folder))
