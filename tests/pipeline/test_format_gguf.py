"""`export --to gguf`: the package gguf reads the checkpoint's weights bit for bit; transformers gives its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.llama2c import halves_to_pairs
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.sources import open_source
from edgepress.pipeline.formats import FORMATS, Wanted, Written, module_of
from edgepress.pipeline.formats.gguf import FileBytes
from edgepress.pipeline.formats.proof import exact_model, logits_of, some_tokens
from tests.conftest import TinyModel
from tests.pipeline.test_export import compressed

pytestmark = pytest.mark.pipeline

TEXT = "for every 12 statements, try\n\n  with 3.5 «names»  and while"
TABLE = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def export(source: Checkpoint, out: Path, kind: str = "") -> Written:
    return module_of(FORMATS["gguf"]).write(source, Wanted(out, kind), Runtime())


def tensors_of(path: Path) -> dict[str, tuple[Tensor, str]]:
    """Every tensor in float32 as the package gguf decodes it, and its type."""
    return {
        t.name: (torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))), t.tensor_type.name)
        for t in gguf.GGUFReader(path).tensors
    }


def ours(source: Checkpoint, index: int, name: str) -> Tensor:
    """Base weights in ggml's order of rows."""
    x = next(x for x in source.shape.blocks[index].linears if x.name.endswith(name))
    weight = source.base_weight(index, x).float()
    if source.shape.family != "llama" or name not in ("q_proj", "k_proj"):
        return weight
    return halves_to_pairs(weight, source.shape.heads if name == "q_proj" else source.shape.kv_heads)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"bits": None}, "BF16"),
        ({"bits": 4, "symmetric": True}, "Q4_0"),
        ({"bits": 4}, "Q5_0"),
        ({"bits": 3, "group": 64, "edge_bits": 4}, "Q4_0"),
        ({"bits": 8, "symmetric": True, "group": -1, "edge_bits": 8}, "Q8_0"),
        ({"bits": None, "codebook": "nf4-thesis"}, "BF16"),
    ],
)
def test_gguf_reads_the_checkpoints_weights(
    how: dict[str, Any], kind: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(num_hidden_layers=2, tie_word_embeddings=True, dtype="bfloat16")
    source = Checkpoint.open(compressed(tmp_path / "stage", model, "1:8", **how))
    written = export(source, tmp_path / "model.gguf")
    assert written.nbytes == (tmp_path / "model.gguf").stat().st_size
    if how["bits"] is None or how.get("symmetric"):
        assert FileBytes(source).of(source.shape, source.name) == written.nbytes
    else:
        with pytest.raises(PlanError, match="depends on its zero points"):
            FileBytes(source).of(source.shape, source.name)
    found = tensors_of(tmp_path / "model.gguf")
    for index in range(2):
        for name, theirs in TABLE.items():
            tensor, type_ = found[f"blk.{index}.{theirs}.weight"]
            expected = ours(source, index, name)
            if how.get("codebook"):
                expected = expected.bfloat16().float()
            assert type_ == kind, name
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    embedding, type_ = found["token_embd.weight"]
    assert type_ == {None: "BF16", 4: "Q4_1", 8: "Q8_0"}[how.get("edge_bits")]
    off = {None: 0.0, 4: 2e-3, 8: 8e-3}[how.get("edge_bits")]
    wanted = source.outer()["model.embed_tokens.weight"].float()
    assert (embedding - wanted).abs().max() <= off * wanted.abs().max()
    assert ("rounded to Q8_0" in " ".join(written.notes)) == (how.get("edge_bits") == 8)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_transformers_gives_the_same_logits_and_tokens(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Read back by this project's own reader of GGUF, which is transformers'."""
    how: dict[str, Any] = {"sliding_window": None}
    if family == "qwen3":
        how |= {"layer_types": ["full_attention"] * 2, "use_sliding_window": False}
        how["head_dim"] = 128  # the only one that transformers' reader gives it
    source = Checkpoint.open(compressed(tmp_path / "stage", tiny_model(family, num_hidden_layers=2, **how), None, 4))
    export(source, tmp_path / "model.gguf")
    back = open_source(str(tmp_path / "model.gguf"))
    ids = some_tokens(source.shape)
    model = exact_model(source)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # as the reader rounds them
    expected = logits_of(model, ids)
    found = logits_of(back.model(dtype=torch.float32), ids)
    assert (found - expected).abs().max() < 1e-5 * float(expected.max() - expected.min())
    assert back.tokenizer()(TEXT)["input_ids"] == source.tokenizer()(TEXT)["input_ids"]
    assert back.tokenizer().eos_token_id == source.tokenizer().eos_token_id


def test_biases_go_along(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Qwen 2's, of which transformers' reader takes no tokenizer but Qwen's own."""
    how = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": None}
    source = Checkpoint.open(compressed(tmp_path / "stage", tiny_model("qwen2", num_hidden_layers=2, **how), None, 4))
    export(source, tmp_path / "model.gguf")
    found, block = tensors_of(tmp_path / "model.gguf"), source.block(1)
    for name in ("q_proj", "k_proj", "v_proj"):
        torch.testing.assert_close(found[f"blk.1.{TABLE[name]}.weight"][0], ours(source, 1, name), rtol=0, atol=0)
        bias = block[f"self_attn.{name}.bias"].float()
        assert bias.abs().max() > 0
        torch.testing.assert_close(found[f"blk.1.{TABLE[name]}.bias"][0], bias, rtol=0, atol=0)


def test_the_adapter_lies_beside_or_is_merged(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=2, tie_word_embeddings=True, dtype="bfloat16")
    source = Checkpoint.open(compressed(tmp_path / "stage", model, "1:8", 4, 4))
    written = export(source, tmp_path / "model.gguf")
    base, beside = tensors_of(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model-lora.gguf")
    parts = {t.name: torch.from_numpy(np.array(t.data)) for t in beside.tensors}
    scale = beside.fields["adapter.lora.alpha"].contents() / parts["blk.0.attn_q.weight.lora_a"].shape[0]
    merged_file = tmp_path / "merged.gguf"
    assert export(source, merged_file, "merged").facts["adapter"] is None
    merged = tensors_of(merged_file)
    for index in range(2):
        for name, theirs in TABLE.items():
            stem = f"blk.{index}.{theirs}.weight"
            a, b = parts[f"{stem}.lora_a"], parts[f"{stem}.lora_b"]
            assert base[stem][1] == "Q5_0" and merged[stem][1] == "BF16"
            total = base[stem][0] + scale * (b @ a)
            effective = source.block(index)[
                next(n for n in source.block(index) if n.endswith(f"{name}.weight"))
            ].float()
            if name in ("q_proj", "k_proj"):
                heads = source.shape.heads if name == "q_proj" else source.shape.kv_heads
                effective = halves_to_pairs(effective, heads)
            assert (total - effective).abs().max() <= 2**-7 * effective.abs().max()
            torch.testing.assert_close(merged[stem][0], effective, rtol=0, atol=0)
    assert written.nbytes == sum((tmp_path / n).stat().st_size for n in ("model.gguf", "model-lora.gguf"))
    assert "--lora" in " ".join(written.notes)
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(PlanError, match=r"model-lora\.gguf, where the adapter would lie, is there already"):
        export(source, tmp_path / "model.gguf")


@pytest.mark.parametrize(("method", "kind"), [("q4_k", "Q4_K"), ("gptq4-s", "Q4_K"), ("gptq3-s", "Q4_K")])
def test_grids_of_super_blocks_are_ggmls(
    method: str, kind: str, tiny_model: TinyModel, run_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Rows of 256: k-quants as they are, this project's own with a row's scales for every super-block."""
    model = tiny_model(
        num_hidden_layers=2, hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    result = run_recipe(tmp_path / "out", model, skip="depth,wanda,lora,eora", gptq__quant=method)
    source = result.stages[-1].checkpoint
    export(source, tmp_path / "model.gguf")
    found = tensors_of(tmp_path / "model.gguf")
    for name, theirs in TABLE.items():
        tensor, type_ = found[f"blk.1.{theirs}.weight"]
        assert type_ == kind
        torch.testing.assert_close(tensor, ours(source, 1, name), rtol=0, atol=0)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    for family, words in (("gemma2", "the family gemma2"), ("mistral", "a sliding window")):
        how = {"sliding_window": 8} if family == "mistral" else {}
        source = Checkpoint.open(tiny_model(family, num_hidden_layers=2, **how))
        with pytest.raises(PlanError, match=rf"{words}.*--to hf"):
            export(source, tmp_path / "model.gguf")
    source = Checkpoint.open(tiny_model(num_hidden_layers=2, hidden_act="gelu"))
    with pytest.raises(PlanError, match="the activation gelu"):
        export(source, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
