"""GGUF files: read as what they hold, or refused where transformers' reader would leave something out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file

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


def rewritten(source: Path, target: Path, more: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """A GGUF file with further settings and tensors."""
    reader, writer = GGUFReader(source), GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in more:
            kind = field.types[0]
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, sub)
    for key, value in more.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


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
