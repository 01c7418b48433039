"""What a model folder's files hold against what its configuration states: followed as transformers does, or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.config import require_supported, stated_form
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.headers import INDEX, shape_from_folder
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import with_grid
from edgepress.checkpoints.sources import open_source
from edgepress.checkpoints.walk import Walk
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.pipeline.shapes import model_shape
from tests.models import save_tiny, tiny_config
from tests.random_checkpoint import Wanted

pytestmark = pytest.mark.unit
IDS = torch.arange(3, 43).view(2, 20)


def edited(folder: Path, change: Callable[[dict[str, Tensor]], Any] = lambda t: None, **config: Any) -> Path:
    """Change the folder's tensors in place, and keys of its configuration; ... takes a key away."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    stated = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not ...}))
    return folder


def ours(folder: Path) -> Tensor:
    """Logits (tokens, vocabulary) through the walk, in float32."""
    walk = Walk(Checkpoint.open(folder), [IDS], Runtime(), last_outputs=True)
    for block in walk:
        block.done()
    with walk.skeleton.head() as head:
        return torch.cat([head(states) for states in walk.states.chunks]).float()


@torch.no_grad()
def theirs(folder: Path) -> Tensor:
    logits: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits
    return logits


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("family", "made", "lost", "config", "said"),
    [
        ("llama", {"tie_word_embeddings": False}, HEAD, {}, "head is not tied to the embedding, and no file holds lm_"),
        ("llama", {"tie_word_embeddings": False}, HEAD, {"tie_word_embeddings": ...}, "no file holds lm_head.weight"),
        ("llama", {}, "model.norm.weight", {}, "no file holds model.norm.weight"),
        ("llama", {}, EMBEDDING, {}, "no file holds model.embed_tokens.weight"),
        ("llama", {}, "model.layers.2.input_layernorm.weight", {}, "no file holds model.layers.2.input_layernorm"),
        ("qwen2", {}, "model.layers.1.self_attn.q_proj.bias", {}, "no file holds model.layers.1.self_attn.q_proj.bias"),
        ("qwen3", {}, "model.layers.0.self_attn.k_norm.weight", {}, "no file holds model.layers.0.self_attn.k_norm"),
        ("llama", {}, None, {"attention_bias": True}, "no file holds model.layers.0.self_attn.q_proj.bias and 23 more"),
        ("llama", {"attention_bias": True}, None, {"attention_bias": False}, "which the model that it states has not"),
        ("llama", {}, None, {"hidden_size": 128}, "is 512 x 64 in its files and 512 x 128 by its configuration"),
        ("llama", {}, None, {"vocab_size": 600}, "is 512 x 64 in its files and 600 x 64 by its configuration"),
        ("llama", {}, None, {"intermediate_size": 256}, "is 128 x 64 in its files and 256 x 64 by its configuration"),
        ("llama", {}, None, {"num_key_value_heads": 4}, "is 32 x 64 in its files and 64 x 64 by its configuration"),
        ("llama", {"head_dim": 32}, None, {"head_dim": ...}, "is 128 x 64 in its files and 64 x 64 by"),
        ("llama", {}, None, {"num_hidden_layers": 5}, "states 5 blocks .*, and its files hold 6"),
        ("diffllama", {"tie_word_embeddings": False}, HEAD, {}, "no file holds a head of its own"),
    ],
)
def test_files_that_do_not_hold_what_is_stated_are_refused(
    tmp_path: Path, family: str, made: dict[str, Any], lost: str | None, config: dict[str, Any], said: str
) -> None:
    folder = save_tiny(tmp_path / "m", family, **made)
    edited(folder, lambda tensors: tensors.pop(lost) if lost else None, **config)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(folder)


def test_a_family_without_a_table_is_held_against_its_module(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "diffllama")
    edited(folder, lambda tensors: tensors.pop("model.layers.3.self_attn.lambda_q1"))
    with pytest.raises(CheckpointError, match=r"no file holds model\.layers\.3\.self_attn\.lambda_q1"):
        ours(folder)


def test_a_tied_head_may_lie_in_the_files_and_another_may_not(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "llama", tie_word_embeddings=True)
    alone, shape = ours(folder), shape_from_folder(folder)
    edited(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert torch.equal(ours(folder), alone)
    assert shape_from_folder(folder) == shape  # the copy is no parameter
    edited(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 0.1}))
    with pytest.raises(CheckpointError, match=r"tied to the embedding, and its files hold another lm_head\.weight"):
        Checkpoint.open(folder)
    edited(folder, tie_word_embeddings=False)
    assert torch.allclose(ours(folder), theirs(folder), atol=1e-4)


def test_the_familys_default_says_whether_the_head_is_tied(tmp_path: Path) -> None:
    folder = edited(save_tiny(tmp_path / "m", "gemma2"), tie_word_embeddings=...)
    assert torch.allclose(ours(folder), theirs(folder), atol=1e-3)
    edited(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 0.1}))
    with pytest.raises(CheckpointError, match="its files hold another lm_head"):
        Checkpoint.open(folder)


def test_the_single_file_goes_before_an_index(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    alone = ours(folder)
    old = tmp_path / "old"
    AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "other", seed=9)).save_pretrained(
        old, max_shard_size="200KB"
    )
    for path in old.glob("model*"):
        path.rename(folder / path.name)
    assert (folder / INDEX).is_file()
    assert torch.equal(ours(folder), alone)
    assert torch.allclose(alone, theirs(folder), atol=1e-4)


@pytest.mark.parametrize("kind", ["twice", "unnamed"])
def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "shards"
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "m"))
    model.save_pretrained(folder, max_shard_size="200KB")
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items())) if kind == "twice" else ("model.new", torch.zeros(3))
    save_file(load_file(second) | {name: tensor + 1}, second, {"format": "pt"})
    with pytest.raises(CheckpointError, match="keeps in model-00001" if kind == "twice" else "does not name"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    ["model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.rotary_emb.cos_cached"],
)
def test_what_the_model_computes_itself_is_left_out(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path / "m")
    alone, shape = ours(folder), shape_from_folder(folder)
    edited(folder, lambda tensors: tensors.update({name.format(i): torch.ones(8) for i in range(6)}))
    assert torch.equal(ours(folder), alone)
    assert shape_from_folder(folder) == shape


def test_gpt_neox_keeps_its_head_under_another_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "gpt_neox")
    assert "embed_out.weight" in load_file(folder / "model.safetensors")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    edited(folder, lambda tensors: tensors.update({"gpt_neox.layers.0.attention.bias": mask}))
    assert torch.allclose(ours(folder), theirs(folder), atol=1e-3)


# --- kinds of models that are not supported ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mixtral", "num_hidden_layers": 4}, "mixtures of experts .'mixtral'. are not supported"),
        ({"model_type": "new", "num_hidden_layers": 4, "n_routed_experts": 8}, "mixtures of experts"),
        ({"model_type": "gpt2", "n_layer": 4}, "family 'gpt2' is not supported"),
        ({"model_type": "bloom", "n_layer": 4}, "family 'bloom' is not supported"),
        ({"model_type": "t5", "num_layers": 4, "is_encoder_decoder": True}, "an encoder and a decoder"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}},
            "multimodal models .'gemma3'. are not supported; give its language model alone, the 'gemma3_text'",
        ),
        ({"model_type": "phi4_multimodal", "num_hidden_layers": 4, "vision_config": {}}, "multimodal models"),
    ],
)
def test_kinds_that_are_not_supported_say_so_in_one_sentence(config: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as raised:
        require_supported(config, "config.json")
    assert "\n" not in str(raised.value)


def test_a_dense_model_with_a_word_for_experts_is_supported() -> None:
    require_supported(tiny_config("llama") | {"num_experts": 1, "num_experts_per_tok": 0}, "config.json")


# --- what is said of codes -----------------------------------------------------------------------------------------

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format 'gptq_v2'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"format": "gptq_v2"}, "format 'gptq_v2'"),
        ({"pack_dtype": "int16"}, "words of int16"),
        ({"lm_head": True}, "the head is quantised as well"),
        ({"dynamic": {r".*\.18\.": {"bits": 8, "desc_act": True}}}, "single layers have settings of their own"),
        ({"rotation": "hadamard"}, "has rotation, and what that changes is not known"),
        ({"activation": {"bits": 8}}, "has activation"),
        ({"bits": 5}, "bits 5"),
        ({"bits": "4"}, "bits '4'"),
        ({"group_size": 0}, "group_size 0"),
        ({"quant_method": "fp8"}, "quantised by 'fp8'"),
        ({"quant_method": "compressed-tensors"}, "quantised by 'compressed-tensors'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by 'bitsandbytes'"),
    ],
)
def test_fields_that_change_the_numbers_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        stated_form({"quantization_config": GPTQ | change})


@pytest.mark.parametrize(
    "more", [{}, {"checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False}, {"dynamic": {"-:.*down": {}}}]
)
def test_fields_that_change_nothing_are_read_over(more: dict[str, Any]) -> None:
    said_how = {"damp_percent": 0.1, "true_sequential": True, "meta": {"quantizer": ["x:1"]}, "static_groups": True}
    assert stated_form({"quantization_config": GPTQ | said_how | more}) == Grid(4, 64, True)


def test_another_tools_note_is_no_dense_model() -> None:
    with pytest.raises(CheckpointError, match="quantised by 'mlx'"):
        stated_form({"quantization": {"group_size": 64, "bits": 4}})


def test_codes_that_nothing_speaks_of_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    edited(folder, quantization_config=GPTQ)
    with pytest.raises(
        CheckpointError, match=r"says that weights are quantised .*, and all of its files' layers are dense"
    ):
        Checkpoint.open(folder)


def test_the_quantisers_own_file_may_not_tell_another_format(tmp_path: Path) -> None:
    folder = Wanted(bits=4).make(tmp_path / "m").folder
    beside = folder / "quantize_config.json"
    for told in ("{", json.dumps(GPTQ), json.dumps(GPTQ | {"checkpoint_format": "gptq"})):
        beside.write_text(told)
        assert shape_from_folder(folder).grid
    beside.write_text(json.dumps(GPTQ | {"checkpoint_format": "gptq_v2"}))
    with pytest.raises(CheckpointError, match=r"checkpoint_format 'gptq_v2', and config\.json does not"):
        shape_from_folder(folder)


def test_results_as_tuples_are_no_settings_of_ours(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    wanted = ours(folder)
    assert torch.equal(ours(edited(folder, return_dict=False)), wanted)


def test_a_bare_configuration_counts_the_codes_that_it_states(tmp_path: Path) -> None:
    config = dict(PRESETS["smollm2-135m"])
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ}))
    assert model_shape(str(tmp_path)) == with_grid(
        shape_from_config(config | {"quantization_config": GPTQ}), 4, 64, True, 0
    )
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ | {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match="quantised by 'awq'"):
        model_shape(str(tmp_path / "config.json"))


def test_one_flipped_byte_of_a_finished_model_is_found_before_it_is_used(tmp_path: Path) -> None:
    folder = Wanted().make(tmp_path / "m").folder
    assert open_source(str(folder)).manifest is not None
    shard = folder / "block-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors does not have the sha256"):
        open_source(str(folder))


# --- mixed precisions ----------------------------------------------------------------------------------------------

MIXES: dict[str, Callable[[str], bool]] = {  # which tensors are float32 in a bfloat16 model
    "norms": lambda name: "norm" in name,
    "outside": lambda name: "layers" not in name,
    "one layer": lambda name: "layers.1.mlp.up_proj" in name,
    "the first": lambda name: "layers.0.self_attn" in name,
    "biases": lambda name: name.endswith("bias"),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_tensor_keeps_its_precision(tmp_path: Path, mix: str, dtype: torch.dtype) -> None:
    """Through a walk that changes one layer: what it left alone is stored bit for bit as it was."""

    def rounded(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name] if MIXES[mix](name) else tensors[name].bfloat16()

    family = "qwen2" if mix == "biases" else "llama"
    source = Checkpoint.open(edited(save_tiny(tmp_path / "m", family), rounded))
    assert source.stored_dtype == torch.bfloat16
    target = CheckpointWriter(tmp_path / "out")
    for block in Walk(source, [IDS], Runtime(dtype=dtype), target.work):
        block.linears["mlp.up_proj"].weight[:, ::2] = 0
        target.write_block(block.index, block.weights())
        block.done()
    target.copy_outer(source)
    target.finish(source.config, source)
    target.work.remove()
    before, after = load_file(source.folder / "model.safetensors"), Checkpoint(tmp_path / "out", None)
    assert after.shape == source.shape
    assert after.shape.file_bytes == sum(p.stat().st_size for p in after.folder.glob("*.safetensors"))
    for index in range(6):
        for name, tensor in after.stored_block(index).items():
            was = before[f"model.layers.{index}.{name}"]
            if "up_proj.weight" in name:
                was[:, ::2] = 0
            assert tensor.dtype == was.dtype and torch.equal(tensor, was), name
    assert math.isfinite(float(ours(after.folder).sum()))
