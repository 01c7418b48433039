"""`compress pack --layout rv32`: a program's weights.bin that unpacks to the checkpoint it was made of, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.writer import verify
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.device_image import pack_device, unpack_device
from edgepress.pipeline.export import PROMPT, plan_export
from tests.conftest import TinyModel
from tests.pipeline.test_export import FULL, compressed
from tests.pipeline.test_pack import assert_same_files

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize(("family", "pattern", "bits", "how"), [
    ("llama", None, None, {}),
    ("llama", "2:4", 4, {"rank": 4, "adapter_bits": 8, "edge_bits": 8}),
    ("qwen2", "1:8", 3, {"rank": 4, "edge_bits": 4}),
    ("mistral", None, 8, {"symmetric": True, "group": -1}),
    ("llama", None, 4, {"order": True, "rank": 4}),
    ("llama", "4:8", 3, {"symmetric": True}),
    ("qwen2", "2:4", None, {"rank": 4}),
    ("gemma2", None, 4, {}),
    ("cohere", None, 4, {"rank": 4}),
    ("phi3", None, 4, {"rank": 4, "adapter_bits": 8}),
])  # fmt: skip
def test_what_comes_back_is_what_went_in(
    family: str, pattern: str | None, bits: int | None, how: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(family, num_hidden_layers=2, **FULL.get(family, {}))
    folder = compressed(tmp_path / "model", model, pattern, bits, **how)
    image = pack_device(Checkpoint.open(folder), tmp_path / "weights.bin", tokenizer=True)
    # The rest is a description, the tokenizer, and a few numbers: norms of one more, the scales of adapters' codes.
    assert image.nbytes - image.program_bytes < 60_000
    back = unpack_device(tmp_path / "weights.bin", tmp_path / "back")
    assert_same_files(folder, tmp_path / "back")
    assert back.tokenizer()(PROMPT).input_ids == Checkpoint.open(folder).tokenizer()(PROMPT).input_ids
    assert any("packed_bytes" in line for line in verify(back))

    planned = plan_export(Checkpoint.open(folder), load_soc("siracusa"), PROMPT, 4, 48)
    planned.write(tmp_path / "chip")
    data = (tmp_path / "weights.bin").read_bytes()
    assert image.nbytes == len(data) and image.program_bytes == planned.layout.nbytes
    assert data[: image.program_bytes] == (tmp_path / "chip" / "weights.bin").read_bytes()


def test_the_commands_write_and_read_it_and_check_knows_its_bytes(
    tiny_model: TinyModel, tmp_path: Path, compress: Callable[..., Any]
) -> None:
    model, image = compressed(tmp_path / "model", tiny_model("llama"), None, 4, edge_bits=8), tmp_path / "weights.bin"
    done = compress("pack", model, "--layout", "rv32", "-o", image, "--json")
    assert done.returncode == 0, done.stderr
    judged = json.loads(compress("check", model, "--program", "rv32", "--json").stdout)
    assert json.loads(done.stdout)["program_bytes"] == judged["memories"][0]["parts"]["weights"]
    assert compress("unpack", image, "-o", tmp_path / "back").returncode == 0
    assert_same_files(model, tmp_path / "back")
    assert compress("pack", model, "--layout", "nibbles").returncode == 2


def test_a_damaged_file_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    image = tmp_path / "weights.bin"
    pack_device(Checkpoint.open(tiny_model("llama")), image)
    data = bytearray(image.read_bytes())
    image.write_bytes(data[:1000] + data[1010:])
    with pytest.raises(CheckpointError, match="where its end announces others"):
        unpack_device(image, tmp_path / "back")
    data[500] ^= 1
    image.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256 is not the one it carries"):
        unpack_device(image, tmp_path / "back")
    # A sound hash over a description of another shape.
    whole = pack_device(Checkpoint.open(tiny_model("llama")), image) and image.read_bytes()
    body = (
        whole[:-72]
        .replace(b'"vocab_size": 512', b'"vocab_size": 513')
        .replace(b'"shape": [512, 64]', b'"shape": [513, 64]')
    )
    assert body != whole[:-72] and len(body) == len(whole) - 72
    image.write_bytes(body + whole[-72:-40] + hashlib.sha256(body).digest() + b"EPDEVICE")
    with pytest.raises(CheckpointError, match="a description that makes no sense"):
        unpack_device(image, tmp_path / "back")
    assert not (tmp_path / "back").exists()
