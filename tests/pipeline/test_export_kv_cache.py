"""`compress export --kv-bits 8`: keys and values as codes with a scale a head, the same on the chip and in Python."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.hardware.rv32.build import build
from edgepress.hardware.rv32.simulator import expected_tokens, simulate, used_bytes
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.export import RoundedCache, plan_export
from tests.conftest import TinyModel
from tests.models import WINDOW
from tests.pipeline.test_export import compressed, on_this_machine, rv32  # noqa: F401

pytestmark = pytest.mark.pipeline

PROMPT, NEW, CONTEXT = "for every value in the list", 32, 64


def exported(model: Path, out: Path) -> Path:
    plan_export(Checkpoint.open(model), load_soc("siracusa"), PROMPT, NEW, CONTEXT, kv_bits=8).write(out)
    return out


def rounded(numbers: list[float]) -> list[float]:
    """A head's numbers from their 8-bit codes, one after the other; a float32's upper half holds the scale."""
    least = torch.tensor(max(map(abs, numbers))).div(127).item()
    bits = struct.unpack("<I", struct.pack("<f", least))[0]
    upper = bits >> 16 if bits & 0xFFFF == 0 else (bits >> 16) + 1
    scale = struct.unpack("<f", struct.pack("<I", upper << 16))[0]
    return [round(x / scale) * scale if scale else 0.0 for x in numbers]


@pytest.mark.unit
def test_a_heads_numbers_are_within_half_a_step_and_those_of_the_formula() -> None:
    g = torch.Generator().manual_seed(5)
    states = torch.randn(1, 2, 7, 16, generator=g) * torch.logspace(-9, 9, 7)[:, None]
    states[0, 1, 3] = 0
    keys, values = RoundedCache().update(states, -states, 0)
    assert torch.equal(keys, -values)
    for head, token in ((h, t) for h in range(2) for t in range(7)):
        own = states[0, head, token]
        assert keys[0, head, token].tolist() == pytest.approx(rounded(own.tolist()), rel=1e-6, abs=0)
        step = own.abs().max() / 127 * (1 + 1 / 128)
        assert bool(((keys[0, head, token] - own).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "cohere"])
def test_the_programs_tokens_are_those_of_python_with_the_same_cache(
    family: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    on_this_machine: Callable[[Path], list[int]],  # noqa: F811
) -> None:
    folder = exported(tiny_model(family), tmp_path / "chip")
    tokens = on_this_machine(folder)
    assert len(tokens) > WINDOW
    assert tokens == list(expected_tokens(folder)) and len(set(tokens)) > 4


def test_a_simulated_core_keeps_it_in_the_bytes_that_were_predicted(
    tiny_model: TinyModel,
    tmp_path: Path,
    on_this_machine: Any,  # noqa: F811
    rv32: list[str],  # noqa: F811
) -> None:
    model = tiny_model("qwen3")
    folder = exported(compressed(tmp_path / "model", model, None, 4), tmp_path / "chip")
    shape = Checkpoint.open(model).shape
    memories = json.loads((folder / "memory.json").read_text())["memories"]
    predicted = {part: nbytes for memory in memories for part, nbytes in memory["parts"].items()}
    rooms = [WINDOW if kind == "sliding_attention" else CONTEXT for kind in shape.config["layer_types"]]
    assert predicted["KV cache"] == 2 * sum(rooms) * shape.kv_heads * (shape.head_dim + 2)
    build(folder, rv32)
    outcome = simulate(folder, limit=200_000_000)
    assert list(outcome.tokens) == on_this_machine(folder) == list(expected_tokens(folder))
    used = {part: nbytes for row in used_bytes(outcome, memories) for part, nbytes in row["parts"].items()}
    assert used["KV cache"] == predicted["KV cache"] and used["activations"] == predicted["activations"]


def test_other_bits_are_refused(tiny_model: TinyModel, tmp_path: Path, compress: Callable[..., Any]) -> None:
    done = compress("export", tiny_model("llama"), "--kv-bits", 4, "-o", tmp_path / "chip")
    assert done.returncode == 2 and "--kv-bits 4: the program keeps keys and values in 8 or 32 bits" in done.stderr
