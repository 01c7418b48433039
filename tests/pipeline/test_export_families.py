"""`compress export` for every family that it knows: the program's tokens are those of transformers' model.

The C sources are compiled for this machine; prompt and new tokens are several times longer than a sliding window.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.hardware.rv32.families import FAMILIES
from edgepress.hardware.rv32.simulator import expected_tokens
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.export import plan_export
from tests.conftest import TinyModel
from tests.models import WINDOW
from tests.pipeline.test_export import NATIVE_WEIGHTS, compressed

pytestmark = pytest.mark.pipeline

CONTEXT, NEW = 64, 36
PROMPT = "for every value in the list of strings that the function returns, try"
NEAR = 1e-4  # of two logits: further apart than arithmetic in another order moves them


@pytest.fixture
def native() -> Callable[[Path], list[int]]:
    """The tokens of an exported folder's forward(), compiled for this machine, after its memory has been checked."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler for this machine")

    def run(folder: Path) -> list[int]:
        (folder / "native.S").write_text(NATIVE_WEIGHTS)
        objects = ["runtime.o", "products.o", "model.o", "native.o"]
        for source in ("runtime.c", "products.c", "lists.c", "model.c", "native.S"):
            warnings = ("-Wall", "-Wextra", "-Werror") if source != "native.S" else ()
            command = [compiler, "-O1", "-std=c11", "-fPIC", "-ffreestanding", *warnings, "-c", source]
            subprocess.run(command, cwd=folder, check=True)
        subprocess.run([compiler, "-shared", *objects, "-o", "native.so", "-Wl,-z,noexecstack"], cwd=folder, check=True)
        program = ctypes.CDLL(str(folder / "native.so"))
        prompt = re.search(r"#define PROMPT_TOKENS (\d+)", (folder / "model.h").read_text())
        assert prompt
        tokens = list(expected_tokens(folder))[: int(prompt[1])]
        for position in range(len(tokens) + NEW - 1):
            last = position == len(tokens) - 1
            found = program.forward(tokens[position], position, int(last))
            tokens += [found] if last else []
        return tokens

    return run


def exported(checkpoint: Path, out: Path) -> Path:
    """A program that writes NEW tokens, whichever they are."""
    export = plan_export(Checkpoint.open(checkpoint), load_soc("siracusa"), PROMPT, NEW, CONTEXT)
    replace(export, run=replace(export.run, ends=())).write(out)
    return out


def loaded(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def require_clear(model: Any, tokens: list[int]) -> None:
    """Transformers' model, fed all tokens at once, chooses the new ones, and no other comes near one of them."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens])).logits[0, -NEW - 1 : -1]
    top = logits.topk(2)
    assert top.indices[:, 0].tolist() == tokens[-NEW:]
    assert float((top.values[:, 0] - top.values[:, 1]).min()) > NEAR, "a near tie: take another seed"


def bytes_of_objects(folder: Path) -> dict[str, int]:
    """Bytes of what an exported folder's objects have in memory, by the names in memory.json."""

    def symbols(name: str, kinds: str) -> dict[str, int]:
        listed = subprocess.run(["nm", "-S", name], cwd=folder, check=True, capture_output=True, text=True).stdout
        rows = [words for line in listed.splitlines() if len(words := line.split()) == 4]  # address, size, kind, name
        return {label: int(size, 16) for _, size, kind, label in rows if kind in kinds}

    variables = symbols("runtime.o", "bB") | symbols("products.o", "bB")
    cache = variables.pop("cache")
    return {
        "KV cache": cache,
        "activations": sum(variables.values()),
        "tables": sum(symbols("model.o", "R").values()),
    }


def require_planned(folder: Path) -> None:
    """What the objects have in memory is what memory.json says."""
    memories = json.loads((folder / "memory.json").read_text())["memories"]
    predicted = {part: nbytes for memory in memories for part, nbytes in memory["parts"].items()}
    found = bytes_of_objects(folder)
    assert found == {part: predicted[part] for part in found}


# What makes some of them what they are, where the tiny models' settings do not.
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cwm": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gemma2": {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 4},
    "gemma3_text": {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }},
    "granite": {"attention_multiplier": 0.1},
    "ministral3": {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.1,
    }},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "vaultgemma": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_programs_tokens_are_transformers(
    family: str, tiny_model: TinyModel, tmp_path: Path, native: Callable[[Path], list[int]]
) -> None:
    model = tiny_model(family, **SETTINGS.get(family, {}))
    folder = exported(model, tmp_path / "chip")
    tokens = native(folder)
    require_clear(loaded(model), tokens)
    assert tokens == list(expected_tokens(folder)) and len(set(tokens)) > 10
    require_planned(folder)


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", {"hidden_act": "relu"}),
    ("cohere", {"use_qk_norm": False}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 6}),
    ("hyperclovax", {"use_post_norm": False, "attention_bias": True}),
    ("mistral", {"sliding_window": CONTEXT}),
    ("phi3", {"original_max_position_embeddings": CONTEXT, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 3.0] * 2,
        "long_factor": [4.0] * 8,
    }}),
    ("internlm3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ("hunyuan_v1_dense", {"rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 100.0,
    }}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "overrides"), OTHERS)
def test_other_settings(
    family: str, overrides: dict[str, Any], tiny_model: TinyModel, tmp_path: Path,
    native: Callable[[Path], list[int]],
) -> None:  # fmt: skip
    model = tiny_model(family, **overrides)
    folder = exported(model, tmp_path / "chip")
    tokens = native(folder)
    require_clear(loaded(model), tokens)
    assert tokens == list(expected_tokens(folder))


@pytest.mark.parametrize(("family", "bits", "rank", "how"), [
    ("gemma3_text", 4, 0, {}), ("phi3", 4, 4, {}), ("glm4", 4, 4, {"adapter_bits": 8}), ("cohere2", 4, 4, {}),
    ("llama", 3, 4, {"order": True}), ("phi3", 4, 4, {"order": True, "adapter_bits": 8}),
    ("glm4", 8, 0, {"order": True, "symmetric": True}),
])  # fmt: skip
def test_codes_and_adapters_of_fused_and_reordered_rows_and_columns(
    family: str, bits: int, rank: int, how: dict[str, Any], tiny_model: TinyModel, tmp_path: Path,
    native: Callable[[Path], list[int]],
) -> None:  # fmt: skip
    made = compressed(tmp_path / "model", tiny_model(family, **SETTINGS.get(family, {})), None, bits, rank, **how)
    folder = exported(made, tmp_path / "chip")
    tokens = native(folder)
    require_clear(Checkpoint.open(made).model(dtype=torch.float32), tokens)
    assert tokens == list(expected_tokens(folder))
    require_planned(folder)


def test_readme_lists_the_families() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    listed = text[text.index("It runs the families ") :].partition(";")[0]
    assert re.findall(r"`(\w+)`", listed) == sorted(FAMILIES)


# Each with what is taken out of its program.
PARTS = [
    ("gemma2", r"#define ATTENTION_CAP .*", ""),
    ("gemma", r"#define EMBEDDING_SCALE .*", ""),
    ("granite", r"#define RESIDUAL_SCALE .*", ""),
    ("granite", r"(#define ATTENTION_SCALE) .*", r"\1 0.25f"),
    ("cohere", r"#define CENTRED_NORMS 1", "#define CENTRED_NORMS 0"),
    ("hunyuan_v1_dense", r"#define ROPE_FIRST 1", "#define ROPE_FIRST 0"),
    ("smollm3", r"#define ROPE\(layer\) .*", "#define ROPE(layer) 0"),
    ("gemma3_text", r"#define ROPE\(layer\) .*", "#define ROPE(layer) 0"),
    ("ministral3", r"#define ROPE_SCALE.*", ""),
    ("mistral", r"(#define SEEN.*\? ).*", r"\1 (position) + 1 : 7)"),
    ("olmo2", r"(#define Q_NORM_WIDTH) .*", r"\1 HEAD_DIM"),
]


@pytest.mark.parametrize(("family", "part", "instead"), PARTS)
def test_every_part_shows_in_the_tokens(
    family: str, part: str, instead: str, tiny_model: TinyModel, tmp_path: Path, native: Callable[[Path], list[int]]
) -> None:
    folder = exported(tiny_model(family, **SETTINGS.get(family, {})), tmp_path / "chip")
    header = folder / "model.h"
    changed, count = re.subn(part, instead, header.read_text())
    assert count == 1
    header.write_text(changed)
    assert native(folder) != list(expected_tokens(folder))


def test_a_sliding_window_shrinks_the_cache(tiny_model: TinyModel) -> None:
    def cache(**how: Any) -> int:
        plan = plan_export(Checkpoint.open(tiny_model("mistral", **how)), load_soc("siracusa"), PROMPT, NEW, CONTEXT)
        return next(use.parts["KV cache"] for use in plan.uses if "KV cache" in use.parts)

    assert cache() * CONTEXT == cache(sliding_window=None) * WINDOW


@pytest.mark.parametrize(("family", "overrides", "words"), [
    ("phi", {}, "the family 'phi': the program knows the blocks of arcee, cohere,"),
    ("granite", {"logits_scaling": -2.0}, "logits_scaling is -2.0"),
    ("llama", {"hidden_act": "gelu_new"}, "the activation function 'gelu_new': silu, gelu,"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "attention to later tokens"),
    ("llama", {"partial_rotary_factor": 0.5}, "rotary embeddings on a part of a head's channels"),
    ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    }}, "give --context 32 or fewer"),
    ("ministral3", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.1,
    }}, "give --context 16 or fewer"),
])  # fmt: skip
def test_what_a_family_may_ask_for_and_the_program_has_not(
    family: str, overrides: dict[str, Any], words: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model(family), tmp_path / "model")
    # Changed after the model was made: once GPTQModel is imported, transformers cannot make some of these.
    settings = json.loads((model / "config.json").read_text()) | overrides
    (model / "config.json").write_text(json.dumps(settings))
    with pytest.raises(PlanError, match=re.escape(words)):
        plan_export(Checkpoint.open(model), load_soc("siracusa"), PROMPT, NEW, CONTEXT)


def test_a_configuration_that_transformers_cannot_run_gets_one_message(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["use_sliding_window"]  # its layer_types slide, and by default there is no window then
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot run"):
        exported(model, tmp_path / "chip")
    assert not (tmp_path / "chip").exists()
