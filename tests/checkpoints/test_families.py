"""Shapes from a configuration alone against the module that transformers builds from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgepress.checkpoints.config import DEFAULTS, setting
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, known_families, shape_from_config
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.orders import own_window
from tests.models import ALL_FAMILIES, BIASES, SWITCHES, tiny_config

pytestmark = pytest.mark.unit

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FAMILIES = known_families()


def built(config: dict[str, Any]) -> Any:
    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made, dtype=made.dtype)


def listed(shape: ModelShape) -> dict[str, tuple[tuple[int, ...], str]]:
    tensors = [*shape.outer, *(t for index in range(len(shape.blocks)) for t in shape.block_tensors(index))]
    assert len({t.name for t in tensors}) == len(tensors)
    return {t.name: (t.shape, t.dtype) for t in tensors}


def assert_same(config: dict[str, Any]) -> None:
    model = built(config)
    shape = shape_from_config(config)
    # named_parameters leaves out a tied head, and so do the files
    kept = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    expected = {name: (tuple(p.shape), DTYPES[p.dtype]) for name, p in (*model.named_parameters(), *kept.items())}
    assert listed(shape) == expected
    assert shape.parameters_total == model.num_parameters() + len(kept)
    assert ("lm_head.weight" in expected) is not model.config.tie_word_embeddings
    linears = {
        f"model.layers.{i}.{x.name}": (x.out_features, x.in_features, x.bias)
        for i, block in enumerate(shape.blocks)
        for x in block.linears
    }
    assert linears == {
        name: (m.out_features, m.in_features, m.bias is not None)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    }


def test_every_known_family_is_tested() -> None:
    assert set(FAMILIES) < set(ALL_FAMILIES)
    assert set(FAMILIES) == set(DEFAULTS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_shape_is_the_modules(family: str, tied: bool) -> None:
    assert_same(tiny_config(family, tie_word_embeddings=tied))


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_wider_than_the_model(family: str) -> None:
    if family == "helium":  # its o_proj is square, so that such a model cannot compute
        return
    assert_same(tiny_config(family, head_dim=24, num_key_value_heads=1, dtype="bfloat16"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("on", [True, False])
def test_switches_where_the_family_heeds_them(family: str, on: bool) -> None:
    """Mistral, Qwen2 and Phi-3 have no such setting; a stray key in their config.json changes nothing."""
    assert_same(tiny_config(family, **dict.fromkeys(SWITCHES, on)))


OPTIONAL = (
    "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size", "max_position_embeddings",
    "tie_word_embeddings", "sliding_window", "layer_types", "no_rope_layers", "use_sliding_window",
    "max_window_layers", "hidden_act", "hidden_activation", *SWITCHES,
)  # fmt: skip


# What transformers' class leaves empty, so that its own module cannot be built.
NEEDED = {"hunyuan_v1_dense": "head_dim", "ministral": "head_dim", "nemotron": "num_key_value_heads"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_silent_configuration_means(family: str) -> None:
    """Keys left out one at a time and all at once: the modules, numbers and windows that transformers then has.

    Biases and norms are stated as the family's default does not have them, so that every default shows.
    """
    full = tiny_config(family, **({"hidden_size": 512, "head_dim": 128} if family == "helium" else {}))
    plain = AutoConfig.for_model(family)
    if family != "internlm3":  # whose two must be alike
        full |= {key: not getattr(plain, key) for key in SWITCHES if isinstance(getattr(plain, key, None), bool)}
    optional = [key for key in OPTIONAL if key in full and key != NEEDED.get(family)]
    for keys in (*((key,) for key in optional), optional):
        config = {key: value for key, value in full.items() if key not in keys}
        model = built(config)
        shape, resolved = shape_from_config(config), model.config
        kept = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        expected = {name: tuple(p.shape) for name, p in (*model.named_parameters(), *kept.items())}
        assert {name: size for name, (size, _) in listed(shape).items()} == expected, keys
        attention = model.model.layers[0].self_attn
        assert shape.head_dim == getattr(attention, "head_dim", None) or resolved.head_dim, keys
        assert shape.positions == resolved.max_position_embeddings
        assert shape.vocabulary == resolved.vocab_size
        assert shape.number("intermediate_size") == resolved.intermediate_size
        assert [own_window(shape, i) for i in range(len(shape.blocks))] == windows(family, resolved), keys
        assert setting(config, "hidden_act") == getattr(resolved, "hidden_act", None)
        assert setting(config, "hidden_activation") == getattr(resolved, "hidden_activation", None)


def windows(family: str, config: Any) -> list[int | None]:
    """Of each block, by the masks that the family's modelling code asks for."""
    width = getattr(config, "sliding_window", None)
    if family in ("mistral", "ministral3", "phi3", "starcoder2"):
        return [width] * config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if types is None:
        return [None] * config.num_hidden_layers
    return [width if kind == "sliding_attention" else None for kind in types]


def test_a_setting_under_its_other_name() -> None:
    config = {key: value for key, value in tiny_config("internlm3").items() if key not in BIASES}
    assert_same(config | {"qkv_bias": True, "bias": True})


def test_a_null_is_no_silence() -> None:
    """Qwen's class has 32 heads for keys and values; null, as older files state it, means as many as for queries."""
    config = tiny_config("qwen3", num_attention_heads=64, head_dim=4)
    config.pop("num_key_value_heads")
    assert shape_from_config(config).kv_heads == 32
    assert_same(config)
    config["num_key_value_heads"] = None
    assert shape_from_config(config).kv_heads == 64
    assert_same(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_precision_is_16_bit_where_nothing_is_said(family: str) -> None:
    config = {key: value for key, value in tiny_config(family).items() if key != "dtype"}
    assert {dtype for _, dtype in listed(shape_from_config(config)).values()} == {"BF16"}


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config["vocab_size"]])
def test_presets_are_models_that_transformers_can_build(name: str) -> None:
    assert_same(dict(PRESETS[name]))


def test_blocks_alone_are_those_of_the_model_with_a_vocabulary() -> None:
    whole = PRESETS["microllama"] | {"vocab_size": 96}
    assert_same(whole)
    bare, full = shape_from_config(PRESETS["microllama"]), shape_from_config(whole)
    assert bare.blocks == full.blocks and [t.name for t in bare.outer] == ["model.norm.weight"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "the shape of a 'nameless' model cannot be told"),
        ({"model_type": "mamba"}, "'mamba' model .* known are apertus, .*vaultgemma. Give a folder"),
        ({"model_type": "llama"}, "lacks a positive whole number for hidden_size, num_hidden_layers, num_attention_"),
        (PRESETS["stories260k"] | {"vocab_size": "512"}, "whole number for vocab_size"),
        (PRESETS["stories260k"] | {"hidden_size": 0}, "whole number for hidden_size"),
    ],
)
def test_what_cannot_be_told(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        shape_from_config(config)
