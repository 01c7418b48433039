"""What is written loads on its own, and what was cut short never counts."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgepress.checkpoints import writer as writer_module
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.headers import INDEX
from edgepress.checkpoints.writer import OUTER, CheckpointWriter, shard_name
from tests.models import FAMILIES

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]

IDS = torch.arange(3, 27).view(1, 24) * 17 % 512


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    return result


def rewritten(source: Checkpoint, folder: Path) -> Checkpoint:
    """Odd blocks written anew, even ones taken over."""
    writer = CheckpointWriter(folder)
    for index in range(len(source.shape.blocks)):
        if index % 2:
            writer.write_block(index, source.block(index))
        else:
            writer.copy_block(index, source, index)
    writer.copy_outer(source)
    writer.finish(source.config, source)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    source = Checkpoint.open(tiny_model(family))
    target = rewritten(source, tmp_path / "target")
    assert torch.equal(logits(target.folder), logits(source.folder))
    assert target.shape == source.shape
    assert target.facts()["file_bytes"] == source.shape.file_bytes
    assert sorted(p.name for p in target.folder.glob("*.safetensors")) == [*map(shard_name, range(6)), OUTER]
    index = json.loads((target.folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for path in target.folder.glob("*.safetensors") for t in load_file(path).values()
    )
    tokenizer = AutoTokenizer.from_pretrained(target.folder)
    assert tokenizer.decode(tokenizer("for each item")["input_ids"]) == "for each item"


def test_blocks_may_be_renumbered(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = rewritten(Checkpoint.open(tiny_model()), tmp_path / "source")
    writer = CheckpointWriter(tmp_path / "target")
    kept = [0, 1, 4, 5]
    for index, old in enumerate(kept):
        writer.copy_block(index, source, old)
    writer.copy_outer(source)
    writer.finish(source.config | {"num_hidden_layers": 4}, source)
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder)
    model.model.layers = torch.nn.ModuleList([model.model.layers[old] for old in kept])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = 4
    with torch.no_grad():
        assert torch.equal(logits(writer.folder), model.eval()(IDS).logits)


def test_shared_shards_are_never_written_through(tiny_model: TinyModel, tmp_path: Path) -> None:
    first = rewritten(Checkpoint.open(tiny_model()), tmp_path / "first")
    second = rewritten(first, tmp_path / "second")
    shared = second.folder / shard_name(2)
    assert os.path.samefile(first.folder / shard_name(2), shared)
    assert os.path.samefile(first.folder / OUTER, second.folder / OUTER)
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    writer = CheckpointWriter(second.folder)
    writer.write_block(2, {name: tensor * 2 for name, tensor in second.block(2).items()})
    writer.write_outer({name: tensor * 2 for name, tensor in second.outer().items()})
    writer.finish(second.config | {"rms_norm_eps": 0.5}, first)
    assert {path.name: path.read_bytes() for path in first.folder.iterdir()} == before
    assert torch.equal(second.block(2)["mlp.up_proj.weight"], 2 * first.block(2)["mlp.up_proj.weight"])


def test_taking_over_a_block_again_replaces_the_link(tiny_model: TinyModel, tmp_path: Path) -> None:
    first = rewritten(Checkpoint.open(tiny_model()), tmp_path / "first")
    other = rewritten(Checkpoint.open(tiny_model(seed=1)), tmp_path / "other")
    before = (first.folder / shard_name(2)).read_bytes()
    writer = CheckpointWriter(tmp_path / "target")
    for source in (first, first, other):
        writer.copy_block(2, source, 2)
        assert (writer.folder / shard_name(2)).read_bytes() == (source.folder / shard_name(2)).read_bytes()
    assert (first.folder / shard_name(2)).read_bytes() == before


def test_copies_where_links_are_impossible(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("another file system")

    first = rewritten(Checkpoint.open(tiny_model()), tmp_path / "first")
    monkeypatch.setattr(writer_module.os, "link", fail)
    second = rewritten(first, tmp_path / "second")
    assert not os.path.samefile(first.folder / OUTER, second.folder / OUTER)
    assert torch.equal(logits(first.folder), logits(second.folder))


def test_partial_files_never_count(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(tiny_model())
    folder = tmp_path / "target"
    writer = CheckpointWriter(folder)
    writer.write_block(0, source.block(0))
    before = (folder / shard_name(0)).read_bytes()

    def fail(_: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(writer_module.os, "fsync", fail)
    for index in (0, 1):
        with pytest.raises(OSError, match="power cut"):
            writer.write_block(index, {name: 2 * tensor for name, tensor in source.block(0).items()})
    monkeypatch.undo()
    assert (folder / shard_name(0)).read_bytes() == before
    assert not (folder / shard_name(1)).exists()
    writer.copy_outer(source)
    writer.finish(source.config, source)
    files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    assert files == {shard_name(0), OUTER}
    with pytest.raises(CheckpointError, match=r"states 6 blocks .*, and its files hold 1"):
        Checkpoint.open(folder)
    target = rewritten(source, folder)  # the rerun
    assert not list(folder.glob("*.partial"))
    assert torch.equal(logits(target.folder), logits(source.folder))


def test_finish_finds_a_damaged_shard(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_model())
    writer = CheckpointWriter(tmp_path / "target")
    writer.write_block(0, source.block(0))
    path = writer.folder / shard_name(0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard_name(0)} has \d+ bytes where its header announces"):
        writer.finish(source.config, source)


def test_packed_embedding_is_taken_over(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = rewritten(Checkpoint.open(tiny_model()), tmp_path / "source")
    bare = CheckpointWriter(tmp_path / "bare")
    bare.copy_edge(source)
    assert list(bare.folder.iterdir()) == []
    edge = {
        f"{name}.{kind}": tensor
        for name in ("model.embed_tokens", "lm_head")
        for kind, tensor in {
            "codes": torch.zeros(512, 32, dtype=torch.uint8),
            "scales": torch.ones(512, 1).half(),
            "minimum": torch.ones(512, 1).half(),
        }.items()
    }
    CheckpointWriter(source.folder).write_edge(edge)
    target = CheckpointWriter(tmp_path / "target")
    target.copy_edge(Checkpoint.open(source.folder))
    reopened = rewritten(Checkpoint.open(source.folder), tmp_path / "target")
    assert reopened.shape.embedding_bits == 4
    assert reopened.facts()["file_bytes"] == reopened.shape.file_bytes


def test_a_shard_for_which_there_is_no_room_is_named_and_not_left(tmp_path: Path) -> None:
    """A limit of 4 KiB a file stands for the full disk: the same path through safetensors, another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CheckpointWriter(tmp_path / "out")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*block-00000\.safetensors"):
            writer.write_block(0, {"weight": torch.zeros(64, 64)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.*"))
