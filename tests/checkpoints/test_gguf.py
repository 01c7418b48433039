"""GGUF files: read as what they hold, or refused where transformers' reader would leave something out."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    get_tensor_name_map,
    quants,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.sources import open_source
from tests.campaign.world import write_gguf
from tests.models import save_tiny

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gguf") / "model", "llama", num_hidden_layers=2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))


def rewritten(
    source: Path,
    target: Path,
    more: dict[str, Any],
    tensors: dict[str, Any] | None = None,
    without: Collection[str] = (),
    family: str = "llama",
    kinds: dict[str, GGMLQuantizationType] | None = None,
) -> Path:
    """A GGUF file with further settings and tensors, without some, as another family, in other kinds of codes."""
    reader, writer = GGUFReader(source), GGUFWriter(target, family)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in {*more, *without}:
            kind = field.types[0]
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key.replace("llama.", f"{family}."), field.contents(), kind, sub)
    for key, value in more.items():
        add = {
            str: writer.add_string,
            float: writer.add_float32,
            int: writer.add_uint32,
            bool: writer.add_bool,
            list: writer.add_array,
        }[type(value)]
        add(key, value)
    for tensor in reader.tensors:
        if tensor.name in without or tensor.name in (tensors or {}):
            continue
        if kind := (kinds or {}).get(tensor.name):
            writer.add_tensor(tensor.name, encoded(tensor.data.astype(np.float32), kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def encoded(array: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Codes of the array; where gguf cannot make them, random ones whose 16-bit scales are below 1/8."""
    try:
        return quants.quantize(array, kind)
    except (NotImplementedError, AttributeError):
        block, length = GGML_QUANT_SIZES[kind]
        shape = (*array.shape[:-1], array.shape[-1] // block * length)
        codes = np.random.default_rng(int(kind)).integers(0, 256, shape, dtype=np.uint8)
        codes[..., 1::2] &= 0x2F
        return codes


def test_a_file_of_floats_keeps_their_precision(model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.GGUF", model)  # matrices in float16, norms in float32
    found, wanted = open_source(str(tmp_path / "small.GGUF")), Checkpoint.open(model)
    assert found.stored_dtype == torch.float16 and found.config["dtype"] == "float16"
    for index in range(2):
        theirs = wanted.block(index)
        for name, tensor in found.block(index).items():
            assert tensor.dtype == (torch.float16 if tensor.dim() == 2 else torch.float32)
            assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rope.scaling"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window = 64"),
        ({"llama.attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"llama.logit_scale": 0.5}, "logit_scale"),
        ({"llama.rope.scale_linear": 4.0}, "rope.scale_linear = 4.0"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor"),
        ({"llama.attention.causal": False}, "attention.causal = False"),
        ({"llama.attention.value_length": 8}, "attention.value_length = 8"),
        ({"llama.expert_count": 8}, "a mixture of experts"),
        ({"llama.of_the_future": 1}, "llama.of_the_future = 1"),
    ],
)
def test_a_setting_that_does_not_arrive_is_refused(
    model: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    write_gguf(tmp_path / "plain.gguf", model)
    path = rewritten(tmp_path / "plain.gguf", tmp_path / "more.gguf", more)
    with pytest.raises(CheckpointError, match=rf"reader leaves out .*{said}"):
        open_source(str(path))


def test_factors_of_the_rotary_frequencies_are_not_dropped(model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "plain.gguf", model)
    factors = {"rope_freqs.weight": torch.linspace(1, 8, 8).numpy()}
    path = rewritten(tmp_path / "plain.gguf", tmp_path / "more.gguf", {}, factors)
    with pytest.raises(CheckpointError, match=r"rope_freqs|GGUF"):
        open_source(str(path))


def test_a_file_rewritten_as_it_is_reads_alike(model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "plain.gguf", model)
    path = rewritten(tmp_path / "plain.gguf", tmp_path / "again.gguf", {})
    one, two = open_source(str(tmp_path / "plain.gguf")), open_source(str(path))
    assert one.shape == two.shape
    shards = sorted(p.name for p in one.folder.glob("*.safetensors"))
    for name in shards:
        ours, theirs = load_file(one.folder / name), load_file(two.folder / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("fault", ["empty", "magic", "cut", "header"])
def test_whatever_the_reader_raises_is_one_message(model: Path, tmp_path: Path, fault: str) -> None:
    write_gguf(tmp_path / "plain.gguf", model)
    data = (tmp_path / "plain.gguf").read_bytes()
    broken = {"empty": b"", "magic": b"GGML" + data[4:], "cut": data[: len(data) // 2], "header": data[:40]}[fault]
    (tmp_path / "bad.gguf").write_bytes(broken)
    with pytest.raises(CheckpointError, match=r"bad\.gguf") as raised:
        open_source(str(tmp_path / "bad.gguf"))
    assert "\n" not in str(raised.value)


def test_every_kind_of_codes_is_what_gguf_makes_of_it(tmp_path: Path) -> None:
    """One file with each matrix in another kind; and its logits, the rotary order undone by an own loop."""
    folder = save_tiny(
        tmp_path / "wide", "llama", num_hidden_layers=4, hidden_size=256, intermediate_size=256, head_dim=64
    )
    write_gguf(tmp_path / "plain.gguf", folder)
    matrices = [t.name for t in GGUFReader(tmp_path / "plain.gguf").tensors if len(t.shape) == 2]
    codes = sorted(quants._type_traits)
    assert len(matrices) >= len(codes) >= 24
    path = rewritten(tmp_path / "plain.gguf", tmp_path / "all.gguf", {}, kinds=dict(zip(matrices, codes, strict=False)))
    found = open_source(str(path))
    config = found.config
    names = get_tensor_name_map(next(k for k, name in MODEL_ARCH_NAMES.items() if name == "llama"), 4)
    held = {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
    network = Checkpoint.open(folder).model().float().eval()
    wanted = {}
    for name in network.state_dict():
        theirs = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        if theirs not in held:
            assert name == "lm_head.weight" and config["tie_word_embeddings"]
            continue
        array = np.array(held[theirs], dtype=np.float32)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads:
            rows, half = array.copy(), len(array) // config[heads] // 2
            for row in range(len(array)):
                head, place = divmod(row, 2 * half)
                rows[2 * half * head + place] = array[2 * half * head + 2 * (place % half) + place // half]
            array = rows
        wanted[name] = torch.from_numpy(array).bfloat16().float()
    network.load_state_dict(wanted, strict=False)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs_ = found.model().float().eval()(ids).logits, network(ids).logits
    assert float(theirs_.std()) > 0
    torch.testing.assert_close(ours, theirs_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_keep_their_order_of_rows(model: Path, tmp_path: Path, family: str) -> None:
    write_gguf(tmp_path / "llama.gguf", model)
    sizes = Checkpoint.open(model).config
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    head = 128 if family == "qwen3" else sizes["hidden_size"] // sizes["num_attention_heads"]
    more = {f"{family}.attention.{side}_length": head for side in ("key", "value")}
    settings = {key: sizes[key] for key in (*same, "vocab_size", "rms_norm_eps", "num_hidden_layers")}
    config = AutoConfig.for_model(family, head_dim=head, tie_word_embeddings=False, **settings)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    names = get_tensor_name_map(next(k for k, name in MODEL_ARCH_NAMES.items() if name == family), 2)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in theirs.state_dict().items():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
        stem, _, kind = name.rpartition(".")
        tensors[f"{names.get_name(stem)}.{kind}"] = tensor.numpy()
    dropped = ("llama.attention.key_length", "llama.rope.dimension_count")
    path = rewritten(tmp_path / "llama.gguf", tmp_path / "other.gguf", more, tensors, dropped, family)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(open_source(str(path)).model().float().eval()(ids).logits, theirs(ids).logits)


def test_two_kinds_of_halves_are_kept_by_neither(model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "plain.gguf", model)
    kinds = {"blk.0.ffn_up.weight": GGMLQuantizationType.BF16}
    path = rewritten(tmp_path / "plain.gguf", tmp_path / "mixed.gguf", {}, kinds=kinds)
    data = next(t.data for t in GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    found = open_source(str(path)).block(0)["mlp.up_proj.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(quants.dequantize(data, GGMLQuantizationType.BF16)))


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("blk.1.attn_q.weight", r"holds no blk\.1\.attn_q\.weight"),
        ("output_norm.weight", r"holds no output_norm\.weight"),
        ("token_embd.weight", r"holds no token_embd\.weight"),
        ("llama.attention.head_count_kv", r"does not state llama\.attention\.head_count_kv"),
        ("llama.attention.layer_norm_rms_epsilon", r"does not state llama\.attention\.layer_norm_rms_epsilon"),
        ("tokenizer.ggml.tokens", "cannot make a tokenizer"),
    ],
)
def test_what_is_missing_is_not_made_up(model: Path, tmp_path: Path, without: str, said: str) -> None:
    write_gguf(tmp_path / "plain.gguf", model)
    path = rewritten(tmp_path / "plain.gguf", tmp_path / "less.gguf", {}, without=[without])
    with pytest.raises(CheckpointError, match=said):
        open_source(str(path))


@pytest.mark.parametrize(
    ("more", "tensors", "said"),
    [
        ({}, {"blk.0.attn_q.bias": (64,)}, r"blk\.0\.attn_q\.bias, which the configuration has no place for"),
        ({}, {"mm.0.weight": (4, 4)}, r"mm\.0\.weight, which"),
        ({}, {"token_embd.weight": (520, 64)}, r"token_embd\.weight of shape \(520, 64\)"),
        ({"split.count": 2}, {}, "one of 2 parts"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, {}, "does not know how a tokenizer of the kind deepseek-llm splits"),
        ({"split.count": "many"}, {}, "one of many parts"),
        ({"general.tags": [0] * 70000}, {}, "counts 70000 values of an array"),
    ],
)
def test_what_is_too_much_is_refused(
    model: Path, tmp_path: Path, more: dict[str, Any], tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    write_gguf(tmp_path / "plain.gguf", model)
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    path = rewritten(tmp_path / "plain.gguf", tmp_path / "more.gguf", more, arrays)
    with pytest.raises(CheckpointError, match=said) as raised:
        open_source(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("offset", "said"), [(0, "lies over"), (1 << 30, "cannot be read"), (-8, "no multiple of 32")])
def test_tensors_lie_where_the_layout_has_them(model: Path, tmp_path: Path, offset: int, said: str) -> None:
    write_gguf(tmp_path / "plain.gguf", model)
    last = max(GGUFReader(tmp_path / "plain.gguf").tensors, key=lambda t: t.data_offset)
    data = bytearray((tmp_path / "plain.gguf").read_bytes())
    place = last.field.offset + 8 + len(last.name) + 4 + 8 * len(last.shape) + 4
    old = int.from_bytes(data[place : place + 8], "little")
    data[place : place + 8] = (old + 8 if offset < 0 else offset).to_bytes(8, "little")
    (tmp_path / "moved.gguf").write_bytes(data + bytes(64))
    with pytest.raises(CheckpointError, match=said):
        open_source(str(tmp_path / "moved.gguf"))


def test_what_lies_beside_the_file_is_not_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the same name in the working directory, and another model's configuration and tokenizer."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    write_gguf(there / "same.gguf", model)
    (there / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 8}')
    (there / "tokenizer.json").write_text("{}")
    write_gguf(here / "same.gguf", save_tiny(tmp_path / "another", "llama", seed=1, num_hidden_layers=2))
    monkeypatch.chdir(here)
    found, wanted = open_source("../there/same.gguf"), Checkpoint.open(model)
    name = "mlp.up_proj.weight"
    assert torch.equal(found.block(0)[name].float(), wanted.block(0)[name].half().float())
    assert "edgepress-gguf-" not in (found.folder / "config.json").read_text()
    assert "edgepress-gguf-" not in (found.folder / "tokenizer_config.json").read_text()
