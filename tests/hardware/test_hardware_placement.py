"""Placement: every byte has one place, nothing overlaps, and what streams is what did not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.activations import activation_pass, address_plan, alive_bytes, one_of_each_kind
from edgepress.hardware.check import check
from edgepress.hardware.operators import forward
from edgepress.hardware.orders import has_rope, window_of
from edgepress.hardware.placement import HOMELESS, RESIDENT, STREAMED, place, tensor_table
from edgepress.hardware.soc import Constant, Soc, load_soc, shipped_socs

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]

UNTIED: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip


def _sized(soc: Soc, **sizes: int) -> Soc:
    memories = tuple(
        replace(m, capacity=Constant(sizes[m.role], "B", "stated", "test"), reserved=None) if m.role in sizes else m
        for m in soc.memories
    )
    return replace(soc, memories=memories)


@pytest.mark.parametrize("chip", [*shipped_socs(), "siracusa:sram_role=weights", "esp32-s3:psram_role=weights"])
@pytest.mark.parametrize("preset", ["stories260k", "stories15m", "smollm2-135m", "microllama"])
def test_every_byte_has_one_place_and_none_overlap(make: Make, chip: str, preset: str) -> None:
    soc, shape = load_soc(chip), make(preset, grid=Grid(4, 32), adapter_rank=4)
    verdict = check(shape, soc, context=64)
    wanted = {t.name: t.chip_bytes for t in tensor_table(shape, soc.layout)}
    placed: dict[str, int] = {}
    for t in verdict.placement.tensors:
        placed[t.name] = placed.get(t.name, 0) + t.nbytes
    assert {name: placed[name] for name in wanted} == wanted
    assert placed["activations"] == verdict.needs.arena
    assert sum(size for name, size in placed.items() if name.startswith("KV cache")) == verdict.needs.kv_cache
    for memory in soc.memories:
        end = memory.reserved_bytes
        for t in sorted((t for t in verdict.placement.tensors if t.memory == memory.name), key=lambda t: t.offset):
            assert t.offset >= end and t.nbytes > 0
            end = t.offset + t.nbytes
        assert end <= memory.capacity_bytes


def test_what_fits_is_resident_and_streams_nothing(make: Make) -> None:
    found = check(make("stories260k", embedding_bits=8, grid=Grid(8, -1)), load_soc("siracusa")).placement
    assert {t.state for t in found.tensors} == {RESIDENT} and found.streamed_per_token == 0 and not found.per_block()


def test_streams_by_hand(make: Make) -> None:
    """Two equal blocks, room for the first and all outside of them but the lookup: the second streams whole."""
    shape = make(UNTIED)
    table = tensor_table(shape)
    block = sum(t.chip_bytes for t in table if t.block == 0)
    head = 96 * 64 * 2
    soc = _sized(load_soc("siracusa"), weights=block, off_chip=10**9)
    found = place(shape, table, soc, context=16, kv_bits=8, copies=1, arena=100)
    # each token: all of block 1, head, last norm, and one row of the embedding
    assert found.per_block() == {"1": block, "outer": head + 64 * 2 + 64 * 2}
    assert found.streamed_per_token == block + head + 256
    assert found.held("MRAM") == block and found.homeless_bytes == 0


def test_a_lookup_gives_way_first_but_a_tied_embedding_does_not(make: Make) -> None:
    soc = _sized(load_soc("siracusa"), weights=96 * 64 * 2)
    untied = place(make(UNTIED), tensor_table(make(UNTIED)), soc, 16, 8, 1, 0)
    assert {t.state for t in untied.tensors if t.part == "embedding"} == {STREAMED}
    tied = make(UNTIED | {"tie_word_embeddings": True})
    found = place(tied, tensor_table(tied), soc, 16, 8, 1, 0)
    assert {t.state for t in found.tensors if t.part == "embedding"} == {RESIDENT}


def test_caches_that_do_not_fit_stream_both_ways(make: Make) -> None:
    shape = make(UNTIED)
    cache = 2 * 64 * 16  # of one block
    soc = _sized(load_soc("siracusa"), tiles=1000 + cache)
    once = place(shape, [], soc, context=16, kv_bits=8, copies=1, arena=1000)
    assert once.held("SRAM") == 1000 + cache
    assert once.per_block() == {"1": cache + 2 * 64}  # read whole, one token written
    twice = place(shape, [], soc, context=16, kv_bits=8, copies=2, arena=1000)
    assert sum(t.nbytes for t in twice.streamed) == 2 * 2 * cache - cache
    assert twice.per_block()["1"] == 2 * cache  # read whole, written whole


def test_without_room_anywhere_it_is_said(make: Make) -> None:
    soc = _sized(load_soc("siracusa"), weights=1000, off_chip=2000)
    table = tensor_table(make(UNTIED))
    found = place(make(UNTIED), table, soc, 16, 8, 1, 0)
    assert found.homeless_bytes == sum(t.chip_bytes for t in table) - 3000
    assert sum(t.nbytes for t in found.tensors if t.state == HOMELESS) == found.homeless_bytes
    alone = replace(soc, memories=tuple(m for m in soc.memories if m.role != "off_chip"))
    assert place(make(UNTIED), table, alone, 16, 8, 1, 0).homeless_bytes == found.homeless_bytes + 2000


# --- one block stands for all that are alike ---------------------------------------------------------------------

FAMILIES = [
    ("llama", {}, 1),
    ("gemma2", {"sliding_window": 8}, 2),
    ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}, 2),
    ("smollm3", {}, 2),
    ("mistral", {"sliding_window": 8}, 1),
    ("phi3", {}, 1),
]


@pytest.mark.parametrize(("family", "more", "kinds"), FAMILIES)
@pytest.mark.parametrize("tokens", [1, 16])
def test_the_short_pass_has_the_peak_of_the_whole(
    make: Make, family: str, more: dict[str, Any], kinds: int, tokens: int
) -> None:
    shape = make(UNTIED | more | {"model_type": family, "num_hidden_layers": 5, "head_dim": 16})
    short, counts = one_of_each_kind(shape)
    assert len(short.blocks) == kinds and sum(counts) == 5
    kept = {(window_of(short, i), has_rope(short, i)) for i in range(kinds)}
    assert kept == {(window_of(shape, i), has_rope(shape, i)) for i in range(5)}
    whole = forward(shape, tokens=tokens, context=32)
    found = activation_pass(shape, tokens, 32, 8)
    assert found.peak.nbytes == max(alive_bytes(whole))
    assert found.plan.peak_bytes == found.peak.nbytes <= found.peak.arena_bytes <= address_plan(whole).arena_bytes * 1.1


def test_peak_names_where_it_is(make: Make) -> None:
    peak = activation_pass(make("stories260k"), 1, 256, 8).peak
    assert peak.nbytes == 64 + 64 + 8 * 256
    assert peak.operator == "scores" and set(peak.alive) == {"residual", "q", "scores"}
    logits = activation_pass(make("llama-3.2-1b"), 1, 256, 8).peak
    assert (logits.nbytes, logits.operator) == (128_256 + 2048, "head")
