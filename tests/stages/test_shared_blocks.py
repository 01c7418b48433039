"""Blocks that run several times (`--layers` with repeats) are one: one mask, one set of codes, one adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.image import open_image, pack_checkpoint, read_block
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.hardware.placement import weight_bytes
from edgepress.stages import depth, eora, gptq, lora, training, tune, wanda
from edgepress.stages.options import Depth, Eora, Gptq, Lora, Tune, Wanda
from tests.stages.lora_help import mean_loss, options, text

pytestmark = pytest.mark.unit

RUNTIME = Runtime()
LAYERS, FIRSTS = "0,1,1,2,3,3", (0, 1, 1, 3, 4, 4)
Make = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def source(build: Make) -> Checkpoint:
    return build("llama", blocks=4)


@pytest.fixture(scope="module")
def franken(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory, seal: Any, tokens: Any) -> Checkpoint:
    target = CheckpointWriter(tmp_path_factory.mktemp("franken"))
    depth.run(source, target, tokens(), Depth(layers=LAYERS), RUNTIME)
    sealed: Checkpoint = seal(target, source)
    return sealed


@pytest.fixture(scope="module")
def packed(franken: Checkpoint, tmp_path_factory: pytest.TempPathFactory, seal: Any, tokens: Any) -> Checkpoint:
    target = CheckpointWriter(tmp_path_factory.mktemp("packed"))
    facts = gptq.run(franken, target, tokens(), Gptq(group=32, scale_search=False), RUNTIME)
    assert facts["blocks"][2] == facts["blocks"][1]
    sealed: Checkpoint = seal(target, franken)
    return sealed


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=text().ids, use_cache=False).logits
    return found


def require_one(checkpoint: Checkpoint) -> None:
    """What runs again is the same to the last bit, and what does not is not."""
    assert checkpoint.shape.firsts == FIRSTS
    for index, first in enumerate(FIRSTS):
        own, other = checkpoint.block(index), checkpoint.block(first)
        assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
    assert not torch.equal(checkpoint.block(0)["mlp.up_proj.weight"], checkpoint.block(1)["mlp.up_proj.weight"])


def test_it_loads_in_plain_transformers_and_computes_the_sequence(source: Checkpoint, franken: Checkpoint) -> None:
    require_one(franken)
    model, told = AutoModelForCausalLM.from_pretrained(franken.folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    by_hand = source.model()
    layers = by_hand.get_submodule("model.layers")
    by_hand.model.layers = torch.nn.ModuleList(layers[i] for i in (0, 1, 1, 2, 3, 3))
    by_hand.config.num_hidden_layers = 6
    torch.testing.assert_close(logits(model), logits(by_hand))
    torch.testing.assert_close(logits(franken.model()), logits(model))


def test_weights_count_once_and_the_files_hold_each_run(source: Checkpoint, franken: Checkpoint) -> None:
    assert franken.shape == depth.plan(source.shape, Depth(layers=LAYERS))
    assert franken.shape.parameters_total == source.shape.parameters_total
    assert franken.facts()["parameters_total"] == source.shape.parameters_total
    assert franken.shape.file_bytes > source.shape.file_bytes  # under their own names, for transformers
    assert weight_bytes(franken.shape) == weight_bytes(source.shape)
    sizes = packed_sizes(franken.shape), packed_sizes(source.shape)
    assert sizes[0].total - sizes[0].header == sizes[1].total - sizes[1].header
    # The thesis's own: blocks of Llama-2-7B run twice take no more memory than once.
    seven = shape_from_config(PRESETS["llama-2-7b"])
    twice = depth.plan(seven, Depth(layers="0-15,8-15,16-31"))
    assert (len(twice.blocks), twice.parameters_total) == (40, seven.parameters_total)
    (said,) = depth.remarks(seven, Depth(layers="0-15,8-15,16-31"))
    assert said.startswith("depth: 8 of 40 blocks have the weights of one before them; they count once")
    assert not list(depth.remarks(seven, Depth(layers="0-22,28-31")))
    fewer = depth.plan(twice, Depth(layers="0-7,16-39"))  # the second run of 8 to 15 is now their first
    assert fewer.parameters_total == seven.parameters_total and fewer.firsts == tuple(range(32))


def test_the_image_has_one_place_for_them(franken: Checkpoint, packed: Checkpoint, tmp_path: Path) -> None:
    for checkpoint in (franken, packed):
        image = pack_checkpoint(checkpoint, tmp_path / "model.bin")
        assert (tmp_path / "model.bin").stat().st_size == packed_sizes(checkpoint.shape).total == image.nbytes
        image = open_image(tmp_path / "model.bin")
        for index in range(6):
            found, wanted = read_block(image, index).tensor, checkpoint.stored_block(index)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_wanda_gptq_and_eora_decide_once(
    franken: Checkpoint, packed: Checkpoint, tmp_path: Path, seal: Any, tokens: Any
) -> None:
    target = CheckpointWriter(tmp_path / "wanda")
    wanda.run(franken, target, tokens(), Wanda("2:4", samples=4, length=16), RUNTIME)
    pruned = seal(target, franken, pattern="2:4")
    require_one(pruned)
    assert pruned.facts()["parameters_nonzero"] == wanda.plan(franken.shape, Wanda("2:4")).parameters_nonzero
    require_one(packed)
    target = CheckpointWriter(tmp_path / "eora")
    facts = eora.run(packed, target, tokens(), Eora(rank=4), RUNTIME)
    compensated = seal(target, packed)
    require_one(compensated)
    assert compensated.shape.parameters_total == eora.plan(packed.shape, Eora(rank=4)).parameters_total
    own = [facts["blocks"][first] for first in sorted(set(FIRSTS))]
    assert facts["total"]["adapter_bytes"] == sum(layer["adapter_bytes"] for block in own for layer in block.values())


@pytest.mark.parametrize("method", ["lora", "qlora", "loftq"])
def test_all_runs_train_one_adapter(
    method: str, franken: Checkpoint, packed: Checkpoint, tmp_path: Path, seal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}
    real = training.train

    def spy(model: Any, *rest: Any) -> Any:
        result = real(model, *rest)
        seen["after"] = logits(model)
        return result

    monkeypatch.setattr(training, "train", spy)
    before = franken if method == "lora" else packed
    target, chosen = CheckpointWriter(tmp_path / method), options(method=method, targets="all", learning_rate=2e-2)
    facts = lora.run(before, target, text(), chosen, RUNTIME)
    after = seal(target, before)
    require_one(after)
    torch.testing.assert_close(logits(after.model()), seen["after"], rtol=1e-4, atol=1e-4)
    assert mean_loss(after, text().ids) < mean_loss(before, text().ids)
    planned = lora.plan(before.shape, chosen)
    assert after.shape.parameters_total == planned.parameters_total
    assert facts["trainable_parameters"] == sum(
        8 * (x.in_features + x.out_features) // 2 for block in before.shape.own_blocks for x in block.linears
    )


def test_what_is_said_to_be_one_is_held_to_it(franken: Checkpoint, packed: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--tune: a block runs several times here"):
        tune.plan(packed.shape, Tune(steps=1))
    with pytest.raises(PlanError, match="--recover full: a block runs several times here"):
        lora.plan(franken.shape, Lora(method="full"))
    for firsts, says in (([0, 1, 1, 3, 4], "must name"), ([0, 1, 1, 2, 4, 4], "must name"), ([0, 0, 0, 3, 4, 4], "")):
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        copy.mkdir()
        for path in franken.folder.iterdir():
            if path.is_file() and path.name != "manifest.json":
                (copy / path.name).write_bytes(path.read_bytes())
        config = json.loads((copy / "config.json").read_text())
        config["edgepress"]["same_blocks"] = firsts
        (copy / "config.json").write_text(json.dumps(config))
        if says:
            with pytest.raises(CheckpointError, match=says):
                Checkpoint.open(copy)
        else:
            with pytest.raises(CheckpointError, match="is not the same as block 0's"):
                pack_checkpoint(Checkpoint.open(copy), tmp_path / "lie.bin")
