"""`export --to llama2c`: our own reader, and a parser written from runq.c, get back exactly what the checkpoint has."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.llama2c import halves_to_pairs, read_model, read_tokenizer
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.sources import write_model
from edgepress.pipeline.formats import FORMATS, Wanted, module_of
from edgepress.pipeline.formats.hf import exact_block
from tests.conftest import TinyModel
from tests.pipeline.test_export import compressed

pytestmark = pytest.mark.pipeline

SHARED = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
TIED: dict[str, Any] = {"num_hidden_layers": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}


def pieces() -> list[tuple[str, float]]:
    """A tokenizer of SentencePiece's kind: three special pieces, the bytes, letters and a few joined ones."""
    letters = [(letter, 0.0) for letter in " abcdefghijklmnopqrstuvwxyz"]
    words = [("he", -1.0), (" t", -2.0), (" the", -3.0), ("in", -4.0), ("ing", -5.0), ("er", -6.0)]
    special = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
    found = special + [(f"<0x{byte:02X}>", 0.0) for byte in range(256)] + letters + words
    return found + [(f"word{n}", -100.0 - n) for n in range(512 - len(found))]


def with_pieces(folder: Path, model: Path) -> Path:
    """A copy of a tiny llama, with such a tokenizer."""
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "tokenizer.bin").open("wb") as file:
        file.write(struct.pack("<I", 16))
        for text, score in pieces():
            file.write(struct.pack("<fi", score, len(text.encode())) + text.encode())
    source = Checkpoint.open(model)
    tensors = dict(source.outer())
    for index in range(len(source.shape.blocks)):
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in source.block(index).items()}
    write_model(folder, source.config, tensors, read_tokenizer(folder.parent / "tokenizer.bin", 512))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    """With grouped queries."""
    return with_pieces(tmp_path_factory.mktemp("llama2c") / "model", tiny_model(**TIED))


def test_float32_is_read_back_with_the_adapter_merged(model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(compressed(tmp_path / "stage", model, "1:8", 4, 4))
    written = module_of(FORMATS["llama2c"]).write(source, Wanted(tmp_path / "out"), Runtime())
    config, tensors = read_model(written.path / "model.bin")
    assert (config.num_key_value_heads, config.tie_word_embeddings) == (2, True)
    for index in range(2):
        for name, tensor in exact_block(source, index).items():
            assert torch.equal(tensors[f"model.layers.{index}.{name}"], tensor.float()), name
    assert torch.equal(tensors["model.embed_tokens.weight"], source.outer()["model.embed_tokens.weight"])
    again = read_tokenizer(written.path / "tokenizer.bin", 512)
    for text in ("the other thing", "in\u00e9 <0x41> x", "tthere"):
        assert again(text)["input_ids"] == source.tokenizer()(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == source.tokenizer().decode(
            source.tokenizer()(text)["input_ids"]
        )


def test_an_untied_head_is_in_it(tiny_model: TinyModel, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(**TIED | {"tie_word_embeddings": False}), tmp_path / "untied")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / name)
    source = Checkpoint.open(folder)
    written = module_of(FORMATS["llama2c"]).write(source, Wanted(tmp_path / "out"), Runtime())
    _, tensors = read_model(written.path / "model.bin")
    assert torch.equal(tensors["lm_head.weight"], source.outer()["lm_head.weight"])


def read_int8(path: Path) -> tuple[tuple[int, ...], int, dict[str, list[Tensor]]]:
    """Version 2 as runq.c reads it: memory_map_weights and read_checkpoint."""
    raw = path.read_bytes()
    assert struct.unpack_from("<Ii", raw) == (0x616B3432, 2)
    sizes = struct.unpack_from("<7i", raw, 8)
    shared, group = struct.unpack_from("<Bi", raw, 36)
    dim, hidden, layers, heads, kv_heads, vocabulary, _ = sizes
    kv = dim // heads * kv_heads
    at = 256 + 4 * dim * (2 * layers + 1)
    found: dict[str, list[Tensor]] = {}
    shapes = {
        "embed": (1, vocabulary, dim), "self_attn.q_proj": (layers, dim, dim), "self_attn.k_proj": (layers, kv, dim),
        "self_attn.v_proj": (layers, kv, dim), "self_attn.o_proj": (layers, dim, dim),
        "mlp.gate_proj": (layers, hidden, dim), "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim),
    } | ({} if shared else {"head": (1, vocabulary, dim)})  # fmt: skip
    for name, (count, rows, columns) in shapes.items():
        for _ in range(count):
            levels = np.frombuffer(raw, np.int8, rows * columns, at).astype(np.float32)
            at += rows * columns
            scales = np.frombuffer(raw, "<f4", rows * columns // group, at)
            at += 4 * len(scales)
            dense = torch.from_numpy(levels.reshape(-1, group) * scales[:, None]).view(rows, columns)
            found.setdefault(name, []).append(dense)
    assert at == len(raw)
    return sizes, group, found


@pytest.mark.parametrize(("bits", "how"), [(4, {}), (3, {"group": 64}), (2, {"group": -1}), (8, {"symmetric": True})])
def test_codes_are_in_int8_what_they_were(bits: int, how: dict[str, Any], model: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(compressed(tmp_path / "stage", model, None, bits, **how))
    written = module_of(FORMATS["llama2c"]).write(source, Wanted(tmp_path / "out", "int8"), Runtime())
    _, group, found = read_int8(written.path / "model.bin")
    assert group == (32 if how.get("group", 32) == 32 else 64)
    for index, block in enumerate(source.shape.blocks):
        for x in block.linears:
            weight = source.base_weight(index, x)
            if x.name.endswith(("q_proj", "k_proj")):
                weight = halves_to_pairs(weight, 4 if "q_proj" in x.name else 2)
            assert torch.equal(found[x.name][index], weight), x.name
    table = source.outer()["model.embed_tokens.weight"]
    assert (found["embed"][0] - table).abs().max() <= table.abs().max() / 254 * 1.001
    assert any("14 matrices have the checkpoint's own codes" in note for note in written.notes)


def test_dense_weights_are_rounded_and_it_says_by_how_much(model: Path, tmp_path: Path) -> None:
    written = module_of(FORMATS["llama2c"]).write(Checkpoint.open(model), Wanted(tmp_path / "out", "int8"), Runtime())
    assert "14 matrices are rounded to 8 bits in groups of 64" in written.notes[0]


def test_what_run_c_has_no_code_for_is_refused_by_name(tiny_model: TinyModel, model: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(PlanError) as caught:
            module_of(FORMATS["llama2c"]).write(Checkpoint.open(folder), Wanted(tmp_path / "out"), Runtime())
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "the family qwen3" in refused(tiny_model("qwen3"))
    assert "biases" in refused(tiny_model(attention_bias=True, **TIED))
    assert "a sliding window (8)" in refused(tiny_model("mistral"))
    assert "the activation gelu" in refused(tiny_model(hidden_act="gelu", **TIED))
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    told = refused(tiny_model(rope_parameters=rope, **TIED | {"rms_norm_eps": 1e-6}))
    assert all(part in told for part in ("rotary scaling 'linear'", "rope_theta 500", "rms_norm_eps 1e-06"))
    assert "4 heads of 32" in refused(tiny_model(head_dim=32, **TIED))
    assert "run.c cannot have this tokenizer" in refused(tiny_model(**TIED))


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared has no stories260K")
def test_stories260k_comes_back_byte_for_byte(tmp_path: Path) -> None:
    from edgepress.checkpoints.sources import open_source

    original = SHARED / "stories260K.bin"
    written = module_of(FORMATS["llama2c"]).write(open_source(str(original)), Wanted(tmp_path / "out"), Runtime())
    ours, theirs = (written.path / "model.bin").read_bytes(), original.read_bytes()
    assert len(ours) == len(theirs)
    config, tensors = read_model(original)
    for name, tensor in read_model(written.path / "model.bin")[1].items():
        assert torch.equal(tensor, tensors[name])
    assert config.vocab_size == 512
