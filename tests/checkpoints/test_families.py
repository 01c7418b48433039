"""Shapes from a configuration alone against the module that transformers builds from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints.errors import PlanError
from checkpoints.families import PRESETS, known_families, shape_from_config
from checkpoints.shape import ModelShape
from tests.models import FAMILIES, tiny_config

pytestmark = pytest.mark.unit

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
BOTH_BIASES = {"attention_bias": True, "mlp_bias": True}


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
    expected = {name: (tuple(p.shape), DTYPES[p.dtype]) for name, p in model.named_parameters()}
    assert listed(shape) == expected
    assert shape.parameters_total == model.num_parameters()
    assert ("lm_head.weight" in expected) is not model.config.tie_word_embeddings
    linears = {
        f"model.layers.{i}.{x.name}": (x.out_features, x.in_features, x.bias)
        for i, block in enumerate(shape.blocks)
        for x in block.linears
    }
    assert linears == {
        name: (m.out_features, m.in_features, m.bias is not None)
        for name, m in model.model.named_modules()
        if isinstance(m, torch.nn.Linear)
        for name in [f"model.{name}"]
    }


def test_every_known_family_is_tested() -> None:
    assert sorted(FAMILIES) == known_families()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_shape_is_the_modules(family: str, tied: bool) -> None:
    assert_same(tiny_config(family, tie_word_embeddings=tied))


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_wider_than_the_model(family: str) -> None:
    assert_same(tiny_config(family, head_dim=24, num_key_value_heads=1, dtype="bfloat16"))


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_where_the_family_heeds_them(family: str) -> None:
    """Mistral, Qwen2 and Phi-3 have no such setting; a stray key in their config.json changes nothing."""
    assert_same(tiny_config(family, **BOTH_BIASES))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_silent_configuration_means(family: str) -> None:
    """Older config.json files leave out what equals the family's default: tied heads, KV heads, types."""
    config = tiny_config(family)
    for key in ("tie_word_embeddings", "dtype"):
        config.pop(key)
    shape = shape_from_config(config)
    tied = AutoConfig.for_model(family, pad_token_id=0).tie_word_embeddings
    assert ("lm_head.weight" in listed(shape)) is not tied
    assert {dtype for _, dtype in listed(shape).values()} == {"BF16"}


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
        ({"model_type": "mamba"}, "'mamba' model .* known are gemma2, .*smollm3. Give a folder"),
        ({"model_type": "llama"}, "lacks a positive whole number for hidden_size, num_hidden_layers, num_attention_"),
        (PRESETS["stories260k"] | {"vocab_size": "512"}, "whole number for vocab_size"),
        (PRESETS["stories260k"] | {"hidden_size": 0}, "whole number for hidden_size"),
    ],
)
def test_what_cannot_be_told(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        shape_from_config(config)
