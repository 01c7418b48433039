"""The program has the same logits, to the last bit, on a simulated RV32 core and compiled for this machine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.eval.perplexity import Protocol, token_windows
from edgepress.eval.text import Text
from edgepress.hardware.rv32.build import build
from edgepress.hardware.rv32.native import Native, find_compiler
from edgepress.hardware.rv32.simulator import expected_tokens, simulate
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.export import exact_model, plan_export
from tests.conftest import TinyModel
from tests.models import VOCABULARY, WINDOW
from tests.pipeline.test_export import compressed, rv32  # noqa: F401
from tests.pipeline.test_export_families import SETTINGS

pytestmark = pytest.mark.pipeline

PROMPT, NEW, CONTEXT = "for every value in the list", 60, 96
# Feeds what main.c feeds, and hands over all logits of a token as its text.
MAIN = """
#include "model.h"
float logits[VOCABULARY];
static void call(unsigned number, unsigned a, unsigned b, unsigned c) {
    register unsigned a0 __asm__("a0") = a, a1 __asm__("a1") = b, a2 __asm__("a2") = c, a7 __asm__("a7") = number;
    __asm__ volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a7) : "memory");
}
int main(void) {
    int token = PROMPT[0];
    for (int position = 0; position < PROMPT_TOKENS + NEW_TOKENS; position++) {
        int next = forward(token, position, 1);
        call(1, (unsigned)token, (unsigned)logits, sizeof logits);
        token = position + 1 < PROMPT_TOKENS ? PROMPT[position + 1] : next;
    }
    call(2, 0, 0, 0);
    return 0;
}
"""
TWO = {"num_hidden_layers": 2}
THREE = {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
# A model, how its weights are stored, the bits of the cache, and the layers' inputs.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], int, str]] = [
    ("llama", TWO, {"pattern": "2:4", "bits": 4, "rank": 4, "adapter_bits": 8, "edge_bits": 8}, 8, "float"),
    ("llama", TWO, {"bits": 3, "edge_bits": 4, "order": True}, 32, "float"),
    ("qwen3", THREE, {"bits": 4, "symmetric": True}, 8, "float"),
    ("gemma2", TWO, {"bits": 8}, 32, "float"),
    ("mistral", TWO | {"dtype": "bfloat16"}, {"bits": 4, "rank": 4, "edge_bits": 4}, 32, "float"),
    ("cohere", TWO | {"hidden_act": "gelu"}, {}, 8, "float"),
    ("llama", TWO, {"pattern": "1:8", "bits": 4, "rank": 4, "edge_bits": 8}, 8, "int8"),
    ("qwen3", THREE, {"bits": 8, "symmetric": True, "group": -1}, 8, "int8"),
    ("gemma2", TWO, {"bits": 3, "edge_bits": 4}, 32, "int8"),
    ("gemma3_text", THREE, {"bits": 2, "edge_bits": 8}, 32, "int8"),
    ("mistral", TWO | {"dtype": "bfloat16"}, {"bits": 4, "group": -1, "order": True}, 8, "int8"),
    ("llama", TWO, {"pattern": "2:4", "bits": 4, "edge_bits": 8}, 8, "int8"),
    ("qwen3", THREE, {"pattern": "2:4", "bits": 2, "symmetric": True, "group": -1}, 32, "int8"),
    ("llama", TWO, {"pattern": "1:4", "bits": 4, "group": 64}, 32, "int8"),
    ("gemma2", TWO, {"pattern": "2:4", "bits": 3}, 32, "int8"),
    ("llama", TWO, {"pattern": "4:8", "bits": 4}, 32, "int8"),
    ("llama", TWO, {"pattern": "1:8", "bits": 8}, 8, "int8"),
    ("llama", TWO, {"pattern": "2:4", "bits": None}, 32, "float"),
    ("mistral", TWO | {"dtype": "bfloat16"}, {"pattern": "1:8", "bits": None}, 8, "float"),
    ("qwen3", THREE | {"dtype": "float16"}, {"pattern": "4:8", "bits": None, "rank": 4}, 32, "float"),
]


@pytest.mark.parametrize(("family", "overrides", "how", "kv_bits", "activations"), CASES)
def test_every_logit_is_the_same_to_the_bit(
    family: str, overrides: dict[str, Any], how: dict[str, Any], kv_bits: int, activations: str,
    tiny_model: TinyModel, tmp_path: Path, rv32: list[str],  # noqa: F811
) -> None:  # fmt: skip
    model = tiny_model(family, **SETTINGS.get(family, {}) | overrides)
    if how:
        model = compressed(tmp_path / "model", model, **{"pattern": None, **how})
    folder = tmp_path / "chip"
    planned = plan_export(Checkpoint.open(model), load_soc("siracusa"), PROMPT, NEW, CONTEXT, kv_bits, activations)
    planned.write(folder)
    (folder / "main.c").write_text(MAIN)
    build(folder, [*rv32, "-DEVERY_LOGIT"])
    outcome = simulate(folder, limit=1_000_000_000)

    native = Native(folder)
    found = np.frombuffer(outcome.text, np.float32).reshape(-1, VOCABULARY)
    assert len(found) == len(planned.run.prompt) + NEW > 4 * WINDOW and len(set(outcome.tokens)) > 8
    for position, (token, logits) in enumerate(zip(outcome.tokens, found, strict=True)):
        own = native.logits(token, position)
        assert bool(np.isfinite(own).all()) and len(np.unique(own)) > VOCABULARY // 2
        assert own.tobytes() == logits.tobytes(), f"position {position}: {np.abs(own - logits).max()}"
    if activations == "int8":  # what is compared with after an export
        assert expected_tokens(folder) == outcome.tokens[: len(expected_tokens(folder))]


# --- inputs of 8 bits ------------------------------------------------------------------------------------------------


def rounded(x: Tensor, group: int) -> Tensor:
    """x (…, columns) to the nearest of 255 numbers, whose largest is the group's."""
    groups = x.double().unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (groups / scale).round() * scale, 0.0).flatten(-2).to(x.dtype)


@pytest.mark.parametrize(("bits", "how"), [
    (4, {"edge_bits": 8}), (4, {"group": -1, "edge_bits": 4, "rank": 4}), (8, {"symmetric": True}),
    (3, {"group": 64}), (2, {"group": -1, "symmetric": True}), (4, {"group": 16, "order": True}),
    (4, {"pattern": "2:4"}), (4, {"pattern": "1:4", "symmetric": True}), (2, {"pattern": "2:4", "group": -1}),
    (3, {"pattern": "2:4", "group": 64}), (4, {"pattern": "4:8"}), (8, {"pattern": "1:8", "edge_bits": 4}),
    (4, {"large": 2e7}), (8, {"large": 3e8, "symmetric": True}), (4, {"large": 2e7, "pattern": "2:4"}),
])  # fmt: skip
def test_integers_compute_what_rounded_inputs_give(
    bits: int, how: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    how = dict(how)
    large, pattern, source = how.pop("large", 0.0), how.pop("pattern", None), tiny_model("llama", num_hidden_layers=1)
    if large:  # inputs of up and gate; what down reads is larger still
        source = with_norms(source, tmp_path / "large", large)
    made = compressed(tmp_path / "model", source, pattern, bits, **how)
    checkpoint = Checkpoint.open(made)
    plan_export(checkpoint, load_soc("siracusa"), PROMPT, 4, CONTEXT, 32, "int8").write(tmp_path / "chip")
    native, model = Native(tmp_path / "chip"), exact_model(checkpoint)
    tokens = torch.randint(3, VOCABULARY, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(tokens[None]).logits[0]
        for x in checkpoint.shape.blocks[0].linears:
            layer = model.get_submodule(f"model.layers.0.{x.name}")
            adapter = layer.weight - checkpoint.base_weight(0, x).float()
            order = checkpoint.stored_block(0)[f"{x.name}.g_idx"].argsort(stable=True)
            group = how.get("group", 32) if how.get("group", 32) > 0 else x.in_features
            layer.register_forward_hook(by_groups(layer.weight - adapter, adapter, order, group))
        if how.get("edge_bits"):
            model.lm_head.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], inputs[0].shape[-1]),))
        wanted = model(tokens[None]).logits[0]
    found = torch.stack([torch.from_numpy(native.logits(int(t), k)) for k, t in enumerate(tokens)])
    off = (found - wanted).abs().amax(-1)  # of each token; where one input is rounded the other way it is more
    assert (
        float(off.median()) < 1e-3 < 20 * float(off.median()) + 1e-3 < float((plain - wanted).abs().amax(-1).median())
    )


def with_norms(model: Path, to: Path, factor: float) -> Path:
    """A model whose feed-forward parts read inputs that are larger by a factor."""
    shutil.copytree(model, to)
    for path in to.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({k: v * factor if "post_attention" in k else v for k, v in tensors.items()}, path, {"format": "pt"})
    return to


def by_groups(weight: Tensor, adapter: Tensor, order: Tensor, group: int) -> Any:
    def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        return rounded(x[..., order], group) @ weight[:, order].T + x @ adapter.T

    return hook


@pytest.mark.parametrize(("family", "overrides"), [
    ("granite", {}), ("cohere", {"logit_scale": 0.25}), ("hyperclovax", {"logits_scaling": 0.5}),
    ("gemma2", {"final_logit_softcapping": 4.0}),
])  # fmt: skip
def test_the_perplexity_without_rounding_is_transformers(
    family: str, overrides: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(family, num_hidden_layers=2, **overrides)
    made = compressed(tmp_path / "model", model, None, 8, group=-1)
    text = Text("a test", ("for every value in the list of strings that the function returns, try " * 20,))
    checkpoint = Checkpoint.open(made)
    planned = plan_export(checkpoint, load_soc("siracusa"), PROMPT, 4, 48, 32, "int8")
    quality = planned.write(tmp_path / "chip", text)
    assert quality and quality.window == 48 and quality.windows > 2
    ids = token_windows(text, checkpoint.tokenizer(), Protocol("windows", 48, 0))
    with torch.no_grad():
        loss = float(exact_model(checkpoint)(ids, labels=ids).loss)
    assert quality.in_float == pytest.approx(np.exp(loss), rel=1e-4)
    assert 1e-6 < abs(quality.in_int8 / quality.in_float - 1) < 0.05


def test_simulate_tells_which_tokens_are_pythons_and_export_what_rounding_costs(
    tiny_model: TinyModel, tmp_path: Path, compress: Callable[..., Any], rv32: list[str]  # noqa: F811
) -> None:  # fmt: skip
    made = compressed(tmp_path / "model", tiny_model("llama", num_hidden_layers=2), None, 4)
    done = compress("simulate", made, "for each", "--tokens", 4, "--context", 16, "--activations", "int8")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"all \d+ tokens are those of the same C compiled for \w+; the first \d+ are Python's", done.stdout
    )
    (tmp_path / "text.txt").write_text("for every value in the list of strings\n" * 40)
    few = ("--tokens", 4, "--context", 16, "--activations", "int8", "--text", tmp_path / "text.txt")
    done = compress("export", made, *few, "-o", tmp_path / "chip")
    assert done.returncode == 0, done.stderr
    assert re.search(r"perplexity [\d.]+ with activations in int8, [\d.]+ in float: [-+]", done.stdout)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_numbers_that_are_none_are_refused(activations: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    def export(source: Path, name: str) -> None:
        made = compressed(tmp_path / name, source, None, 4)
        if name == "scales":
            for path in made.glob("*.safetensors"):
                tensors = load_file(path)
                for key in [key for key in tensors if key.endswith("up_proj.scales")]:
                    tensors[key][0, 0] = torch.inf
                save_file(tensors, path, {"format": "pt"})
        planned = plan_export(Checkpoint.open(made), load_soc("siracusa"), PROMPT, 4, CONTEXT, 32, activations)
        planned.write(tmp_path / "chip")

    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(NumericsError, match="holds 32 values that are NaN or infinite"):
        export(model, "scales")
    with pytest.raises(NumericsError, match="logits are not finite"):
        export(with_norms(model, tmp_path / "vast", 1e30), "vast-4")
    assert not (tmp_path / "chip").exists()


@pytest.mark.parametrize(("command", "words"), [
    (("export", "--activations", "int4"), "--activations int4 (near: int8): there is float and int8"),
    (("export", "--activations", "int8"), "the model's linear layers hold no codes of an integer grid"),
    (("export", "--to", "deeploy", "--activations", "int8"), "--activations int8 goes with --to rv32"),
    (("export", "--text", "embedded"), "--text with that or with --activations int8"),
    (("check", "--program", "rv32", "--activations", "int8"), "quantise it first (--quant gptq4)"),
    (("check", "--activations", "int8"), "--activations belongs to --program rv32"),
])  # fmt: skip
def test_what_cannot_be_rounded_is_refused(
    command: tuple[str, ...], words: str, tiny_model: TinyModel, tmp_path: Path, compress: Callable[..., Any]
) -> None:
    out = ("-o", tmp_path / "chip") if command[0] == "export" else ()
    done = compress(command[0], tiny_model("llama"), *command[1:], *out)
    assert done.returncode == 2 and words in " ".join(done.stderr.split()) and not (tmp_path / "chip").exists()


def test_this_machines_compiler_is_named_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert find_compiler()[1:] == ["-m", "ziglang", "cc"]
    monkeypatch.setattr("edgepress.hardware.rv32.native.find_spec", lambda name: None)
    with pytest.raises(PlanError, match="no C compiler for this machine was found: apt-get install gcc, or pip"):
        find_compiler()
