"""The verdict: what fits, by how much it does not, and what is said about it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints.errors import PlanError
from checkpoints.shape import Grid, ModelShape, Pattern
from hardware.check import check
from hardware.footprint import weight_bytes
from hardware.soc import SHIPPED, Constant, Soc, load_soc
from hardware.verdict import Verdict, size_text, times_text

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]


@pytest.fixture
def siracusa() -> Soc:
    return load_soc("siracusa")


def _with_capacity(soc: Soc, role: str, size: int) -> Soc:
    exact = Constant(size, "B", "assumed", "test")
    return replace(soc, memories=tuple(replace(m, capacity=exact) if m.role == role else m for m in soc.memories))


def _use(verdict: Verdict, role: str) -> Any:
    return next(use for use in verdict.memories if use.role == role)


def test_stories260k_fits(make: Make, siracusa: Soc) -> None:
    shape = make("stories260k", embedding_bits=8, grid=Grid(8, -1, symmetric=True))
    verdict = check(shape, siracusa, context=512, name="stories260k")
    assert verdict.fits
    assert _use(verdict, "weights").used_bytes == 226_560 + 6_000 + 34_816 + 2_816
    assert dict(_use(verdict, "tiles").parts) == {
        "KV cache": 2 * 5 * 4 * 8 * 512,
        "activations": 512 * 64 + 512 * 64 + 8 * 512 * 512,
    }
    assert _use(verdict, "off_chip").used_bytes == 0
    assert verdict.largest_layer.name == "mlp.down_proj" and verdict.largest_layer.largest_tile == 64
    assert verdict.largest_layer.working_set_bytes == 172 + 2 * 32 * (172 + 2) + 2 * 32
    assert verdict.layers_too_large == ()
    assert "stories260k fits Siracusa" in verdict.summary


def test_smollm2_in_4_bit_says_by_how_much(make: Make, siracusa: Soc) -> None:
    verdict = check(make("smollm2-135m", embedding_bits=4, grid=Grid(4, 64)), siracusa, name="smollm2-135m")
    assert not verdict.fits
    mram = _use(verdict, "weights")
    assert (mram.used_bytes, mram.headroom_bytes) == (71_654_016, 4_194_304 - 71_654_016)
    assert verdict.summary == ("smollm2-135m does not fit Siracusa: weights need 68.3 MiB, 17.1 x the 4 MiB of MRAM.")
    assert dict(_use(verdict, "off_chip").parts) == {"weights beyond the chip": 71_654_016 - 4_194_304}
    assert not _use(verdict, "off_chip").fits


def test_llama_is_over_everywhere_and_names_the_layer(make: Make, siracusa: Soc) -> None:
    verdict = check(make("llama-3.2-1b", embedding_bits=4, grid=Grid(4, 128)), siracusa)
    assert [use.fits for use in verdict.memories] == [False, False, False, True, False]
    (layer,) = verdict.layers_too_large
    assert (layer.name, layer.repeats, layer.working_set_bytes, layer.largest_tile) == ("mlp.down_proj", 16, 280_640, 0)
    for words in ("weights need", "KV cache and activations need", "the smallest tile of mlp.down_proj needs 274 KiB"):
        assert words in verdict.summary
    assert "mlp.down_proj (16 blocks): 274 KiB" in verdict.render()


@pytest.mark.parametrize("role", ["weights", "tiles", "working"])
def test_one_byte_decides(make: Make, siracusa: Soc, role: str) -> None:
    shape = make("stories260k", embedding_bits=8, grid=Grid(8, -1))
    need = _use(check(shape, siracusa), role).used_bytes
    assert check(shape, _with_capacity(siracusa, role, need)).fits
    over = check(shape, _with_capacity(siracusa, role, need - 1))
    assert not over.fits and _use(over, role).headroom_bytes == -1
    assert "1 B more than the" in over.summary


def test_off_chip_memory_never_decides(make: Make, siracusa: Soc) -> None:
    small = make("stories260k", embedding_bits=8, grid=Grid(8, -1))
    assert check(small, _with_capacity(siracusa, "off_chip", 1)).fits
    assert not check(make("smollm2-135m"), _with_capacity(siracusa, "off_chip", 2**40)).fits


def test_staging_that_is_too_small_decides(make: Make, siracusa: Soc) -> None:
    small = make("stories260k", embedding_bits=8, grid=Grid(8, -1))
    verdict = check(small, _with_capacity(siracusa, "staging", 1_000_000))
    assert not verdict.fits and "code, stacks and vectors need" in verdict.summary


def test_the_other_reading_of_the_sram(make: Make, tmp_path: Path) -> None:
    """Weights in both halves of the neural memory, activations in L2: stories15M in 4 bit then fits."""
    text = (SHIPPED / "siracusa.toml").read_text()
    path = tmp_path / "weights.toml"
    path.write_text(text.replace('role = "tiles"', 'role = "weights"').replace('role = "staging"', 'role = "tiles"'))
    soc = load_soc(str(path))
    shape = make("stories15m", embedding_bits=4, grid=Grid(4, -1))
    need = weight_bytes(shape).total
    verdict = check(shape, soc)
    assert verdict.fits and not check(shape, load_soc("siracusa")).fits
    first, second = [use for use in verdict.memories if use.role == "weights"]
    assert first.used_bytes == 4_194_304 and second.used_bytes == need - 4_194_304
    assert "MRAM + tile memory" in verdict.summary and "8 MiB" in verdict.summary
    assert _use(verdict, "tiles").name == "L2"


def test_prefill_in_chunks_needs_less(make: Make, siracusa: Soc) -> None:
    shape = make("llama-3.2-1b", embedding_bits=4, grid=Grid(4, 128))
    whole, chunked = check(shape, siracusa), check(shape, siracusa, prefill_chunk=16)
    assert whole.prefill.nbytes == 256 * (2048 + 2048 + 8192 + 8192)
    assert chunked.prefill.nbytes == 16 * (2048 + 2048 + 8192 + 8192)
    assert whole.decode == chunked.decode
    token = check(shape, siracusa, prefill_chunk=1)
    assert dict(_use(token, "tiles").parts)["activations"] == 128_256 + 2048  # the logits


def test_widths_scale_what_they_should(make: Make, siracusa: Soc) -> None:
    shape = make("smollm2-135m")
    parts = {
        (kv, act): dict(_use(check(shape, siracusa, kv_bits=kv, activation_bits=act), "tiles").parts)
        for kv in (4, 8)
        for act in (8, 16)
    }
    assert parts[4, 8]["KV cache"] * 2 == parts[8, 8]["KV cache"]
    assert parts[8, 16]["activations"] == 2 * parts[8, 8]["activations"]


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 513}, "beyond the model's 512 positions"),
        ({"context": 0}, "context of 0 tokens"),
        ({"context": -3}, "context of -3 tokens"),
        ({"kv_bits": 0}, "KV cache width of 0 bit"),
        ({"activation_bits": 64}, "activation width of 64 bit"),
        ({"prefill_chunk": 257}, "prefill chunk of 257 tokens"),
        ({"prefill_chunk": 0}, "prefill chunk of 0 tokens"),
    ],
)
def test_each_impossible_request_is_refused(make: Make, siracusa: Soc, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        check(make("stories260k"), siracusa, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_all_impossible_requests_come_at_once(make: Make, siracusa: Soc) -> None:
    with pytest.raises(PlanError) as caught:
        check(make("stories260k"), siracusa, context=600, kv_bits=0, activation_bits=-1, prefill_chunk=601)
    assert len(str(caught.value).splitlines()) == 4


def test_the_last_position_is_allowed(make: Make, siracusa: Soc) -> None:
    assert check(make("stories260k"), siracusa, context=512).context == 512


def test_a_model_that_states_no_positions(make: Make, siracusa: Soc) -> None:
    shape = make("stories260k")
    config = {key: value for key, value in shape.config.items() if key != "max_position_embeddings"}
    with pytest.raises(PlanError, match="max_position_embeddings"):
        check(replace(shape, config=config), siracusa)


# --- notes and output ------------------------------------------------------------------------------------------


def _notes(shape: ModelShape, soc: Soc) -> str:
    return "\n".join(check(shape, soc).notes)


def test_zeros_bring_nothing_and_the_packed_number_is_given(make: Make, siracusa: Soc) -> None:
    shape = make("smollm2-135m", embedding_bits=4, grid=Grid(4, 64), pattern=Pattern(2, 4))
    verdict = check(shape, siracusa)
    # 2:4 in 4 bit: half of 53 084 160, and 44 bits for every 17 groups of four
    indexed = 106_168_320 // 4 / 17 * 44 / 8
    assert verdict.packed_weights
    assert verdict.packed_weights.total == pytest.approx(71_654_016 - 53_084_160 // 2 + indexed, abs=30 * 7 * 6)
    assert "zeros of the 2:4 pattern" in verdict.notes[0] and "51.2 MiB, less than 68.3 MiB" in verdict.notes[0]
    dense = check(make("smollm2-135m", embedding_bits=4, grid=Grid(4, 64)), siracusa)
    assert dense.packed_weights is None and "zeros of the" not in "\n".join(dense.notes)
    sixteenth = make("smollm2-135m", embedding_bits=4, grid=Grid(4, 64), pattern=Pattern(1, 16))
    assert "no less than 68.3 MiB" in _notes(sixteenth, siracusa)


def test_group_scales_and_zero_points_are_named_only_where_they_are(make: Make, siracusa: Soc) -> None:
    grouped = _notes(make("smollm2-135m", grid=Grid(4, 64)), siracusa)
    assert "groups of 64" in grouped and "one weight offset" in grouped
    rowwise = _notes(make("smollm2-135m", grid=Grid(4, -1, symmetric=True)), siracusa)
    assert "groups of" not in rowwise and "one weight offset" not in rowwise


def test_slots_are_named_and_decide_nothing_silently(make: Make, siracusa: Soc) -> None:
    shape = make("stories15m", embedding_bits=2, grid=Grid(4, -1, symmetric=True))
    notes = _notes(shape, _with_capacity(siracusa, "weights", weight_bytes(shape).total))
    assert "slot of 8 bit" in notes and "which does not fit" in notes
    assert "which does not fit" not in _notes(shape, _with_capacity(siracusa, "weights", 2**30))


def test_matrices_too_wide_for_the_accelerator(make: Make, siracusa: Soc) -> None:
    assert "256 MiB of matrices" in _notes(make("smollm2-135m"), siracusa)
    quantised = _notes(make("stories260k", embedding_bits=8, grid=Grid(8, -1)), siracusa)
    assert "of matrices" not in quantised
    head = _notes(make("stories260k", grid=Grid(8, -1)), siracusa)  # 512 x 64 in float32
    assert "128 KiB of matrices" in head


def test_a_chip_without_accelerator_gets_no_notes_on_one(make: Make, siracusa: Soc) -> None:
    plain = replace(siracusa, accelerator=None)
    notes = _notes(make("smollm2-135m", grid=Grid(4, 64), pattern=Pattern(2, 4)), plain)
    assert "N-EUREKA" not in notes and "zeros of the 2:4 pattern" in notes


def test_a_sliding_window_is_an_upper_bound(make: Make, siracusa: Soc) -> None:
    shape = make("stories260k")
    windowed = replace(shape, config={**shape.config, "sliding_window": 64})
    assert "sliding window" in _notes(windowed, siracusa) and "sliding window" not in _notes(shape, siracusa)


def test_to_dict_is_json_and_agrees_with_the_verdict(make: Make, siracusa: Soc) -> None:
    shape = make("smollm2-135m", embedding_bits=4, grid=Grid(4, 64), pattern=Pattern(2, 4), adapter_rank=32)
    verdict = check(shape, siracusa)
    data = json.loads(json.dumps(verdict.to_dict()))
    assert data["fits"] is False and data["summary"] == verdict.summary and data["notes"] == list(verdict.notes)
    assert data["weight_bytes"] == verdict.weights.total
    for entry in data["memories"]:
        assert entry["used_bytes"] == sum(entry["parts"].values())
        assert entry["headroom_bytes"] == entry["capacity_bytes"] - entry["used_bytes"]
        assert entry["fits"] is (entry["headroom_bytes"] >= 0)


@pytest.mark.parametrize("preset", ["llama-3.2-1b", "llama-3.1-8b", "smollm2-135m", "stories15m", "stories260k"])
def test_render_stays_within_100_columns(make: Make, siracusa: Soc, preset: str) -> None:
    for shape in (
        make(preset),
        make(preset, embedding_bits=4, grid=Grid(4, 64), pattern=Pattern(1, 8), adapter_rank=8),
    ):
        verdict = check(shape, siracusa, name=preset)
        lines = verdict.render().splitlines()
        assert max(map(len, lines)) <= 100
        assert lines[0].startswith(preset)
        for use in verdict.memories:
            shown = any(line.startswith(f"{use.name} ") for line in lines)
            assert shown is (use.role != "off_chip" or use.used_bytes > 0)


@pytest.mark.parametrize(("need", "text"), [(171, "17.1 x"), (15, "1.5 x"), (9_996, "1,000 x"), (38_260, "3,826 x")])
def test_times_text(need: int, text: str) -> None:
    assert times_text(need, 10) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (-1536, "-1.5 KiB"),
        (262_144, "256 KiB"),
        (1_048_575, "1 MiB"),
        (71_654_016, "68.3 MiB"),
        (589 << 20, "589 MiB"),
        (1000 << 20, "0.977 GiB"),
    ],
)
def test_size_text(size: int, text: str) -> None:
    assert size_text(size) == text


def test_the_path_of_check_imports_no_torch() -> None:
    code = "import sys, hardware.check; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
