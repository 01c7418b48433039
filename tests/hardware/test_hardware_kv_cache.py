"""Every option of `check` reaches every number that follows from it, and no other; the KV cache's against a count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.kv_format import GROUP, KVFormat, value_group
from edgepress.checkpoints.shape import ModelShape, with_bits
from edgepress.hardware.check import Verdict, check
from edgepress.hardware.operators import Operator, forward
from edgepress.hardware.orders import CacheRule, with_cache
from edgepress.hardware.soc import load_soc
from edgepress.hardware.tiling import tile
from edgepress.pipeline.shapes import with_other_bits
from tests.models import FAMILIES, WINDOW, tiny_config

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]
INT8 = Grid(8, -1, True)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16  # of tiny_config


# --- what an option must change, and what it must not ----------------------------------------------------------------

ATTENTION = ("scores", "weighted values")
KV = {"kv bytes", "placed KV cache", "decode attention bytes", "prefill attention bytes", "decode seconds"}
KV |= {"prefill seconds", "attention tiles", "decode joules", "prefill joules"}
ACTIVATIONS = {"decode arena", "prefill arena", "placed activations"}
WEIGHTS = {"weight bytes", "file bytes", "packed bytes", "placed weights"}
TIMES = {"decode seconds", "prefill seconds", "decode joules", "prefill joules"}


def figures(verdict: Verdict) -> dict[str, Any]:
    timing = verdict.timing
    assert timing is not None and not isinstance(timing, str)
    smallest = {x.operator.partition(".")[2] or x.operator: x.smallest_bytes for x in verdict.needs.tilings}
    found: dict[str, Any] = {
        "kv bytes": verdict.needs.kv_cache,
        "weight bytes": verdict.weights.total,
        "file bytes": verdict.footprint.file_bytes,
        "packed bytes": verdict.footprint.packed_bytes,
        "attention tiles": {name: smallest.get(name) for name in ATTENTION},
        "linear tiles": {name: smallest.get(name) for name in ("q_proj", "down_proj")},
        "head tile": smallest.get("head"),
        "element tiles": {name: smallest.get(name) for name in ("input_layernorm", "rope q", "gate x up")},
    }
    for part in ("KV cache", "activations"):
        found[f"placed {part}"] = [(t.nbytes, t.written_per_token) for t in verdict.placement.tensors if t.part == part]
    found["placed weights"] = [t.nbytes for t in verdict.placement.tensors if t.part not in ("KV cache", "activations")]
    for mode, run, peak in (
        ("decode", timing.decode, verdict.needs.decode.peak),
        ("prefill", timing.prefill, verdict.needs.prefill.peak),
    ):
        rows = {x.name.partition(".")[2] or x.name: x for x in run.operators}
        found[f"{mode} arena"] = peak.arena_bytes
        found[f"{mode} seconds"], found[f"{mode} joules"] = run.seconds, run.joules
        found[f"{mode} attention bytes"] = [rows[name].bytes for name in (*ATTENTION, "append to KV cache")]
        found[f"{mode} linear bytes"] = [rows[name].bytes for name in ("q_proj", "down_proj")]
    return found


@pytest.mark.parametrize(
    ("option", "value", "changes"),
    [
        *(("kv_bits", bits, KV) for bits in (32, 16, 4, 3)),
        ("kv_window", 20, KV),
        ("kv_sinks", 9, KV),
        ("kv_groups", True, KV),
        ("activation_bits", 16, ACTIVATIONS | TIMES | {"attention tiles", "linear tiles", "head tile", "element tiles",
            "decode attention bytes", "prefill attention bytes", "decode linear bytes", "prefill linear bytes"}),
        ("bits", 4, WEIGHTS | TIMES | {"linear tiles", "decode linear bytes", "prefill linear bytes"}),
        ("embedding_bits", 4, WEIGHTS | TIMES),
        ("context", 96, KV | ACTIVATIONS - {"decode arena"} | {"prefill linear bytes"}),
        ("prefill_chunk", 8, {"prefill arena", "placed activations", "prefill seconds", "prefill joules",
            "prefill attention bytes", "prefill linear bytes"}),
    ],
)  # fmt: skip
def test_an_option_reaches_its_figures_and_no_others(make: Make, option: str, value: Any, changes: set[str]) -> None:
    # Too large for the chip: every path is timed, off-chip memory too.
    soc = load_soc("siracusa")

    def judged(**how: Any) -> dict[str, Any]:
        window, chunk = (30 if option == "kv_sinks" else 0), (8 if option in ("kv_window", "kv_sinks") else None)
        given = {"context": 64, "kv_window": window, "prefill_chunk": chunk, **how}
        shape = with_bits(make("smollm2-135m", embedding_bits=8), 8)
        shape = with_other_bits(shape, given.pop("bits", 0), given.pop("embedding_bits", 0), soc)
        return figures(check(shape, soc, timing=True, **given))

    before, after = judged(), judged(**{option: value})
    changed = {name for name in before if before[name] != after[name]}
    assert changed == changes


# --- the cache, counted by hand ----------------------------------------------------------------------------------


def operators(shape: ModelShape, tokens: int, context: int, kv_bits: int) -> dict[str, Operator]:
    return {x.label: x for x in forward(shape, tokens=tokens, context=context, kv_bits=kv_bits)}


@pytest.mark.parametrize("kv_bits", [32, 16, 8, 4])
@pytest.mark.parametrize(("tokens", "context", "window", "sinks"), [(1, 60, 0, 4), (60, 60, 0, 4), (5, 60, 12, 3)])
def test_codes_alone(make: Make, kv_bits: int, tokens: int, context: int, window: int, sinks: int) -> None:
    """Keys and values that some query of the pass sees, each its code; tiles of 16 columns with two buffers."""
    soc, shape = load_soc("siracusa"), make(tiny_config("llama"), embedding_bits=8, grid=INT8)
    if window:
        shape = with_cache(shape, CacheRule(KVFormat(16, window, sinks)))
    seen_at_last = min(context, window + sinks) if window else context
    view = min(context, seen_at_last + tokens - 1)
    found = operators(shape, tokens, context, kv_bits)
    one = KV_HEADS * HEAD_DIM * kv_bits // 8  # bytes of a token's key, or its value
    assert found["2.scores"].kv_read == found["2.weighted values"].kv_read == view * one
    append = found["2.append to KV cache"]
    assert (append.kv_write, append.kv_held) == (2 * tokens * one, 2 * seen_at_last * one)
    keys, values = tile(found["2.scores"], soc), tile(found["2.weighted values"], soc)
    columns = min(16, view)
    assert keys.smallest_bytes == min(  # one query's row, and 16 keys; or all rows at once, which need one buffer
        (1 if rows == tokens else 2) * rows * HEAD_DIM + 2 * columns * HEAD_DIM * kv_bits // 8 + 2 * rows * columns
        for rows in {1, tokens}
    )
    assert values.smallest_bytes == min(
        (1 if rows == tokens else 2) * rows * view + 2 * 16 * view * kv_bits // 8 + 2 * rows * 16
        for rows in {1, tokens}
    )


def test_the_hardest_tile_follows_the_caches_width(make: Make) -> None:
    soc, shape = load_soc("siracusa"), make("llama-3.2-1b", embedding_bits=8, grid=INT8)
    for bits in (32, 16, 8, 4):
        hardest = check(shape, soc, context=8192, kv_bits=bits, prefill_chunk=1).needs.tilings
        values = next(x for x in hardest if x.operator == "0.weighted values")
        assert values.smallest_bytes == 8192 + 2 * 16 * 8192 * bits // 8 + 2 * 16
    # 8192 values of 16 channels do not go into 256 KiB at 8 bits and do at 4; only the L1 decides between the two.
    tiles = {bits: {x.operator for x in check(shape, soc, context=8192, kv_bits=bits).needs.tilings if not x.fits}
             for bits in (8, 4)}  # fmt: skip
    assert "0.weighted values" in tiles[8] - tiles[4]


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize(("window", "sinks"), [(0, 4), (0, 0), (50, 3), (200, 4)])
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 37), (1, 200), (40, 200), (200, 200)])
def test_scales_and_tokens_in_full_by_the_rule(
    make: Make, kv_bits: int, window: int, sinks: int, tokens: int, context: int
) -> None:
    """Token by token: sinks and an open group in full, else codes, with grids by group (keys) and token (values)."""
    shape = with_cache(make(tiny_config("llama")), CacheRule(KVFormat(kv_bits, window, sinks), groups=True))
    view = min(context, (min(context, window + sinks) if window else context) + tokens - 1)
    keys = values = 0.0
    for place in range(view):
        full = place < sinks + GROUP
        codes = KV_HEADS * HEAD_DIM * (16 if full else kv_bits) / 8
        keys, values = keys + codes, values + codes
        if not full:
            values += KV_HEADS * HEAD_DIM / value_group(HEAD_DIM) * 4
            keys += KV_HEADS * HEAD_DIM * 4 if (place - sinks) % GROUP == 0 else 0
    found = operators(shape, tokens, context, kv_bits)
    assert (found["0.scores"].kv_read, found["0.weighted values"].kv_read) == (keys, values)
    append = found["0.append to KV cache"]
    assert append.kv_held == KVFormat(kv_bits, window, sinks).capacity_bytes(context, KV_HEADS, HEAD_DIM)
    assert tokens > 1 or keys + values <= append.kv_held  # no more is read than there is
    assert append.kv_write == tokens * 2 * KV_HEADS * HEAD_DIM * 2 + -(
        -tokens * KVFormat(kv_bits).group_bytes(KV_HEADS, HEAD_DIM) // GROUP
    )
    # Tiles of one buffer that hold all of it: what one head reads, no matter how it is counted.
    soc = load_soc("siracusa")
    for name, size in (("scores", keys), ("weighted values", values)):
        parts = tile(found[f"0.{name}"], soc, working_bytes=2**24).parts
        part = "key tiles" if name == "scores" else "value tiles"
        assert parts[part] == 2 * size / KV_HEADS, name


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_with_their_own_window_keep_it(make: Make, family: str) -> None:
    """Families mix windows of 8 with blocks that see all; a block reads what it holds."""
    shape = make(tiny_config(family))
    wide, narrow = operators(shape, 1, 100, 16), operators(shape, 1, 100, 4)
    for index in range(6):
        seen = wide[f"{index}.scores"].columns
        assert seen in (WINDOW, 100)
        assert wide[f"{index}.scores"].kv_read == seen * KV_HEADS * HEAD_DIM * 2
        assert narrow[f"{index}.scores"].kv_read == seen * KV_HEADS * HEAD_DIM // 2


def test_decoding_moves_what_the_cache_gives(make: Make) -> None:
    """Between two widths the bytes of the attention's rows differ by the cache's own, in the memory where it lies."""
    soc, shape = load_soc("siracusa"), make("stories260k", embedding_bits=8, grid=INT8)
    moved = {}
    for bits in (16, 4):
        timing = check(shape, soc, context=128, kv_bits=bits, timing=True).timing
        assert timing is not None and not isinstance(timing, str)
        moved[bits] = timing.decode.bytes
    token = 2 * 4 * 8  # elements of a key and a value: 4 heads of 8
    read_and_written = 5 * token * (128 + 1)
    differ = {name: moved[16][name] - moved[4].get(name, 0) for name in moved[16] if moved[16][name] != moved[4][name]}
    assert differ == {"SRAM": read_and_written * (16 - 4) // 8}
