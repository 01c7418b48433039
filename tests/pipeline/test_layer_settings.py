"""Layers with settings of their own (`--quant-layers`): through the command, its files, GPTQ's `dynamic`, the image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.headers import shape_from_folder
from edgepress.checkpoints.image import pack_checkpoint, unpack_checkpoint
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.pipeline.shapes import stated_shape
from edgepress.stages import gptq
from edgepress.stages.options import Gptq

pytestmark = pytest.mark.pipeline

# --quant and the rules for single layers.
GRIDS = ("gptq4", "down_proj=gptq8/64; 0,2-3.self_attn.q_proj=gptq3; 0.q_proj=gptq8-channel")
FINER = ("gptq4-s", "*.down_proj=gptq5-s; 0-1.up_proj=gptq2-s/64; 1.up_proj=q6_k")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers") / "out"


@pytest.mark.parametrize(("quant", "layers"), [GRIDS, FINER], ids=["gptq", "finer"])
def test_layers_have_their_own_form_in_every_file(
    quant: str, layers: str, out: Path, tiny_llama: Path, run_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    values = {"skip": "depth,wanda,lora,eora", "gptq__quant": quant, "gptq__group": 32}
    mixed = run_recipe(out, tiny_llama, **values, gptq__layers=layers).stages[0].checkpoint
    facts = mixed.manifest
    assert (mixed.shape.file_bytes, packed_sizes(mixed.shape).total) == (facts.file_bytes, facts.packed_bytes)
    assert run_recipe(out, tiny_llama, **values, gptq__layers=layers).computed == 0
    forms = [{x.name.rpartition(".")[2]: x.grid for x in block.linears} for block in mixed.shape.blocks]
    if quant == "gptq4":
        assert forms[0]["q_proj"] == Grid(8, -1) and forms[1]["q_proj"] == Grid(4, 32)
        assert forms[3]["q_proj"] == Grid(3, 32) and {f["down_proj"] for f in forms} == {Grid(8, 64)}
        told = [{x.name.rpartition(".")[2]: x.grid for x in b.linears} for b in stated_shape(mixed.folder).blocks]
        assert told == forms
    else:
        assert [(f["down_proj"].bits, f["up_proj"].bits) for f in forms[:3]] == [(5, 2), (5, 8), (5, 4)]
    # Of the first block the inputs are the same whatever the others are: the codes must be those of a uniform run.
    last = {"gptq4": ("gptq8", 64), "gptq4-s": ("gptq5-s", 32)}[quant]
    for (how, group), name in ((last, "mlp.down_proj"), ((quant, 32), "self_attn.k_proj")):
        alike = run_recipe(out, tiny_llama, **values | {"gptq__quant": how, "gptq__group": group}).stages[0].checkpoint
        assert torch.equal(mixed.block(0)[f"{name}.weight"], alike.block(0)[f"{name}.weight"])
    pack_checkpoint(mixed, tmp_path / "image")
    assert (tmp_path / "image").stat().st_size == facts.packed_bytes
    back = unpack_checkpoint(tmp_path / "image", tmp_path / "back")
    assert back.shape.blocks == mixed.shape.blocks == shape_from_folder(mixed.folder).blocks
    for index in range(len(back.shape.blocks)):
        for name, weight in back.block(index).items():
            assert torch.equal(weight, mixed.block(index)[name])


@pytest.mark.parametrize(
    ("quant", "layers", "said"),
    [
        ("gptq4", "down_proj gptq8", "is not [BLOCKS.]NAME=QUANT[/GROUP]"),
        ("gptq4", "down_proj=gptq7", "there is no quantiser gptq7"),
        ("gptq4", "down_proj=gptq8/8", "a group of 8; at least 32"),
        ("gptq4", "3-1.down_proj=gptq8", "not a block or a range"),
        ("gptq4", "down_proj=gptq3-s", "gptq3-s cannot stand beside --quant gptq4 in one model"),
        ("gptq4", "nose=gptq8", "no layer is called nose"),
        ("gptq4", "9.down_proj=gptq8", "no layer is called down_proj in those of 6 blocks"),
        ("none", "down_proj=gptq8", "--quant none quantises none"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_before_any_work(
    quant: str, layers: str, said: str, tiny_llama: Path, compress: Callable[..., Any], tmp_path: Path
) -> None:
    flags = ("--model", tiny_llama, "--data", "embedded", "--skip", "depth,wanda,lora,eora")
    done = compress("run", *flags, "--quant", quant, "--quant-layers", layers, "-o", tmp_path / "out")
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "out").exists()


def test_who_loads_layers_of_unlike_bits_is_said() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    for quant, said in (("gptq4", "GPTQModel loads it"), ("gptq4-s", "only this project loads the folder")):
        one, none = (gptq.remarks(shape, Gptq(quant=quant, layers=x)) for x in (f"down_proj=gptq3{quant[5:]}", ""))
        assert said in " ".join(one) and "transformers itself" not in " ".join(none)


def test_rules_as_keys_of_a_recipe_and_what_the_plan_says(
    tiny_llama: Path, compress: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        f"model: {tiny_llama}\ndata: embedded\nstages:\n  - gptq:\n      quant: gptq4-s\n      layers:\n"
        "        down_proj: gptq5-s/64\n        0,2.q_proj: gptq3-s\n"
    )
    done = compress("plan", "--recipe", recipe)
    assert done.returncode == 0, done.stderr
    assert "of 42 layers have settings of their own: 2 gptq3-s/32, 6 gptq5-s/64" in " ".join(done.stdout.split())
    assert "3-5" in done.stdout


def test_a_layer_reads_its_bits_from_what_the_configuration_states(
    out: Path, tiny_llama: Path, run_recipe: Callable[..., Any]
) -> None:
    """Not from the file's shapes: 64 columns of 8 bits are as many words as 128 of 4."""
    values = {"skip": "depth,wanda,lora,eora", "gptq__quant": GRIDS[0], "gptq__group": 32, "gptq__layers": GRIDS[1]}
    mixed = run_recipe(out, tiny_llama, **values).stages[0].checkpoint
    dynamic = mixed.config["quantization_config"]["dynamic"]
    assert dynamic[r"+:^model\.layers\.(2|3)\.self_attn\.q_proj$"] == {"bits": 3, "group_size": 32}
    assert Checkpoint.open(mixed.folder).shape.blocks == mixed.shape.blocks
