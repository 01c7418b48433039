"""Time and energy against Deeploy's published runs, worked examples, and properties that must hold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.operators import forward, weights_read
from edgepress.hardware.rates import CORNERS, Range, missing_constants, rates, work_of
from edgepress.hardware.soc import Soc, load_soc
from edgepress.hardware.timing import PassTime, chunks, resolve, time_model

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]
INT8 = Grid(8, -1, True)
MHZ = 360e6
MICRO_LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8,
    "num_attention_heads": 16, "vocab_size": 256, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def soc() -> Soc:
    return load_soc("siracusa")


def micro_llama(make: Make) -> ModelShape:
    """Deeploy's: no embedding and no head, but the last norm."""
    shape = make(MICRO_LLAMA, grid=INT8)
    return replace(shape, outer=tuple(t for t in shape.outer if len(t.shape) == 1))


def resident(shape: ModelShape, memory: str = "MRAM") -> dict[str, str]:
    return dict.fromkeys(weights_read(shape), memory)


def in_order(x: Range) -> bool:
    return x.low <= x.default <= x.high


def check_pass(x: PassTime) -> None:
    """low <= default <= high, and no estimate below its bound, in all and for each operator."""
    pairs = [(x.bound_seconds, x.seconds), *((row.bound_cycles, row.cycles) for row in x.operators)]
    if x.joules is not None and x.bound_joules is not None:
        pairs.append((x.bound_joules, x.joules))
    for bound, estimate in pairs:
        assert in_order(bound) and in_order(estimate)
        assert all(bound.at(corner) <= estimate.at(corner) for corner in CORNERS)
    for corner in CORNERS:
        assert sum(row.cycles.at(corner) for row in x.operators) == pytest.approx(x.cycles.at(corner))
    assert x.macs == sum(row.macs for row in x.operators)
    for memory, nbytes in x.bytes.items():
        assert nbytes == sum(row.bytes.get(memory, 0) for row in x.operators)


# --- Deeploy's runs and the worked examples ---------------------------------------------------------------------


def test_npu_formula_of_one_job(soc: Soc, make: Make) -> None:
    """64 to 256 channels: 8 x (2 x 90 + 56 + 1) = 1896; the facts file says 1897, Deeploy's kernel trace 2595."""
    r = rates(soc, "default")
    assert r.linear_cycles(1, 64, 256) == 8 * (2 * 90 + 56 + 1) == pytest.approx(1897, abs=1)
    shape = micro_llama(make)
    gate = next(x for x in forward(shape) if x.name == "gate_proj")
    parts = work_of(gate, soc, resolve(shape, soc, resident(shape))).parts(r)
    assert parts["launches"] + parts["arithmetic"] == pytest.approx(2595, abs=1)
    # 40 tokens fold into a full plane of 36 and one of 4.
    assert r.linear_cycles(40, 64, 256) == 8 * (2 * 90 + 56 + 36) + 8 * (2 * 90 + 56 + 4)


def test_micro_llama_decode_is_what_the_constant_was_fitted_on(soc: Soc, make: Make) -> None:
    """712 k cycles in GVSoC. The fit left attention and softmax out, hence 2 % more here; no test of the model."""
    shape = micro_llama(make)
    found = time_model(shape, soc, resident(shape), context=64)
    decode = found.decode
    assert decode.cycles.default == pytest.approx(712e3, rel=0.03)
    assert decode.cycles.low < 712e3 < decode.cycles.high
    assert sum(row.engine == "accelerator" for row in decode.operators) == 56
    kernels = sum(x.kernels for x in forward(shape, context=64) if x.engine == "cores")
    assert kernels == 201
    assert "fitted" in found.fitted["cluster_operator_cycles"]
    # The roofline for 524 288 weights at 32 B/cycle, plus their scales: 44 times less.
    assert decode.bound_by == "weight link"
    assert decode.bound_seconds.default * MHZ == pytest.approx(524_288 / 32, rel=0.03)
    check_pass(decode)


def test_micro_llama_prefill_lies_between_default_and_high(soc: Soc, make: Make) -> None:
    """28.3 M cycles in GVSoC; the default is far too fast, the second fit of the cores was made on it."""
    shape = micro_llama(make)
    prefill = time_model(shape, soc, resident(shape), context=64).prefill
    assert prefill.cycles.default < 28.3e6 < prefill.cycles.high
    assert prefill.cycles.high == pytest.approx(28.3e6, rel=0.05)
    assert any("optimistic" in note and "28.3 M" in note for note in prefill.notes)
    # The pair that was fitted on prefill explains the decode run, which it never saw, within 10 %.
    where, slow = resolve(shape, soc, resident(shape)), rates(soc, "high").core_fits[1]
    r = replace(rates(soc, "default"), core_fits=(slow,))
    assert sum(work_of(x, soc, where).cycles(r) for x in forward(shape, context=64)) == pytest.approx(712e3, rel=0.1)


def test_stories15m_with_its_head_off_chip(soc: Soc, make: Make) -> None:
    """Worked by hand: 33.6 ms, 30 token/s, the head 91 % of it, 31 ms for its 9.2 MB.

    Ours is 1.6 % more: 4 B a row of scale and minimum come with the head, and activations by DMA.
    """
    shape = make("stories15m", embedding_bits=8, grid=INT8)
    inside = {name: "MRAM" for name in weights_read(shape) if name != "model.embed_tokens"}
    decode = time_model(shape, soc, inside, context=1).decode
    assert decode.seconds.default == pytest.approx(33.6e-3, rel=0.03)
    assert decode.tokens_per_second == pytest.approx(30, rel=0.03)
    head = decode.operators[-1]
    assert head.cycles.default / decode.cycles.default == pytest.approx(0.91, abs=0.01)
    assert head.bounded_by == "off-chip"
    assert decode.streamed_bytes == 32_000 * 292 + 292  # the head, and one row of the embedding
    assert decode.page_seconds.default == pytest.approx(decode.streamed_bytes / 300e6)
    assert decode.bound_by == "off-chip" and decode.bound_seconds.default == decode.page_seconds.default
    check_pass(decode)


def test_stories15m_with_4096_words_on_the_chip(soc: Soc, make: Make) -> None:
    """Worked by hand, KV traffic ignored: 3.2 ms, 311 token/s, 0.54 mJ. Ours adds DMA of activations: 3 %."""
    shape = make({**PRESETS["stories15m"], "vocab_size": 4096}, embedding_bits=8, grid=INT8)
    found = time_model(shape, soc, resident(shape), context=256)
    alone = time_model(shape, soc, resident(shape), context=1).decode
    assert alone.seconds.default == pytest.approx(3.2e-3, rel=0.04)
    assert alone.joules is not None and alone.joules.default == pytest.approx(0.54e-3, rel=0.04)
    assert alone.joules.default == pytest.approx(0.167 * alone.seconds.default)
    assert alone.streamed_bytes == 0 and alone.page_seconds == Range(0, 0, 0)
    # With 256 tokens in view attention and the cache's bytes cost 10 % on top, still within the stated factor of 2.
    assert alone.seconds.default < found.decode.seconds.default < 1.15 * alone.seconds.default
    assert found.decode.seconds.low < 3.2e-3 < found.decode.seconds.high


def test_llama_1b_streamed_at_300_mb_per_second(soc: Soc, make: Make) -> None:
    """589 MiB of codes at 4 bit: 2.06 s a token at least. Stored in slots of 8 bit, as the engine reads them: twice."""
    shape = make("llama-3.2-1b", embedding_bits=4, grid=Grid(4, -1, True))
    decode = time_model(shape, soc, {}, context=256).decode
    assert decode.bound_by == "off-chip"
    assert 2.058 <= decode.bound_seconds.default == pytest.approx(2.06, rel=0.01)
    assert 2.06 < decode.seconds.default < 2.06 * 1.05
    slots = time_model(shape, load_soc("siracusa-neureka"), {}, context=256).decode
    assert slots.seconds.default == pytest.approx(2 * 2.06, rel=0.01)
    assert decode.bound_joules is not None
    assert decode.bound_joules.low == pytest.approx(0.062, rel=0.01)  # at 100 pJ/B
    assert decode.bound_joules.high == pytest.approx(0.544, rel=0.01)  # at 880 pJ/B
    assert any("down_proj" in note and "fits L1" in note for note in decode.notes)
    check_pass(decode)


# --- properties --------------------------------------------------------------------------------------------------


def shapes(make: Make) -> list[tuple[ModelShape, dict[str, str]]]:
    small = make("stories260k", embedding_bits=8, grid=INT8)
    middle = make("stories15m", embedding_bits=4, grid=Grid(4, 32), adapter_rank=8)
    large = make("smollm2-135m")
    half = {name: "MRAM" for i, name in enumerate(weights_read(middle)) if i % 2}
    return [(small, resident(small)), (small, resident(small, "L2")), (middle, half), (large, {})]


def test_bounds_and_corners_are_in_order(soc: Soc, make: Make) -> None:
    for shape, where in shapes(make):
        for widths in ({}, {"kv_bits": 4, "activation_bits": 16}):
            found = time_model(shape, soc, where, context=100, prefill_chunk=30, **widths)
            check_pass(found.decode)
            check_pass(found.prefill)
            assert found.prefill.tokens == 100 and found.decode.tokens == 1
            assert all(in_order(x.seconds) and in_order(x.bound_seconds) for x in found.curve)


def test_more_context_is_never_faster(soc: Soc, make: Make) -> None:
    for shape, where in shapes(make):
        curve = time_model(shape, soc, where, context=700).curve
        assert [x.context for x in curve] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 700]
        for before, after in itertools.pairwise(curve):
            for corner in CORNERS:
                assert before.seconds.at(corner) <= after.seconds.at(corner)
                assert before.bound_seconds.at(corner) <= after.bound_seconds.at(corner)
        prefills = [time_model(shape, soc, where, context=c).prefill for c in (1, 36, 37, 300)]
        for shorter, longer in itertools.pairwise(prefills):
            assert all(shorter.seconds.at(corner) < longer.seconds.at(corner) for corner in CORNERS)


def test_nearer_memories_are_never_slower(soc: Soc, make: Make) -> None:
    shape = make("stories15m", embedding_bits=8, grid=INT8)
    times = [time_model(shape, soc, resident(shape, m), context=64).decode for m in ("MRAM", "L2", "HyperRAM")]
    for near, far in itertools.pairwise(times):
        assert all(near.seconds.at(corner) < far.seconds.at(corner) for corner in CORNERS)
    assert times[2].seconds == time_model(shape, soc, {}, context=64).decode.seconds  # what has no place streams


def test_a_tensor_spread_over_two_memories(soc: Soc, make: Make) -> None:
    shape = make("stories15m", embedding_bits=8, grid=INT8)
    whole, part = resident(shape), 32_000 * 292
    spread = {**whole, "model.embed_tokens.weight": {"MRAM": 3 * part // 4, "HyperRAM": part // 4}}
    found = time_model(shape, soc, spread, context=8).decode
    assert found.streamed_bytes == pytest.approx(part / 4, abs=200)
    assert found.bytes["HyperRAM"] == found.streamed_bytes
    fast, slow = (
        time_model(shape, soc, x, context=8).decode for x in (whole, {**whole, "model.embed_tokens": "HyperRAM"})
    )
    assert fast.seconds.default < found.seconds.default < slow.seconds.default


def test_a_cache_off_chip_streams_and_one_in_part(soc: Soc, make: Make) -> None:
    shape = make("stories260k", embedding_bits=8, grid=INT8)
    everything = time_model(shape, soc, {**resident(shape), "KV cache": "HyperRAM"}, context=50).decode
    assert everything.streamed_bytes == 5 * (2 * 32 * 50 + 2 * 32)  # read all, write one token's
    one = time_model(shape, soc, {**resident(shape), "KV cache 3": "HyperRAM"}, context=50).decode
    assert one.streamed_bytes * 5 == everything.streamed_bytes


def test_prefill_in_chunks_streams_the_weights_for_each(soc: Soc, make: Make) -> None:
    shape = make("stories15m", embedding_bits=8, grid=INT8)
    once, four = (time_model(shape, soc, {}, context=64, prefill_chunk=chunk).prefill for chunk in (None, 16))
    assert once.tokens == four.tokens == 64
    assert four.bound_seconds.default == pytest.approx(4 * once.bound_seconds.default, rel=1e-3)
    decode = time_model(shape, soc, {}, context=64).decode
    assert once.seconds.default < 64 * decode.seconds.default


def test_many_chunks_are_sampled(soc: Soc, make: Make) -> None:
    """200 chunks of 1: a run's middle stands for 6 of them; the sum is that of all 200 passes within 1 %."""
    shape = make("stories260k", embedding_bits=8, grid=INT8)
    for context, chunk in ((1, 1), (64, 1), (200, 1), (505, 7), (1000, 1), (7, 9)):
        found = chunks(context, min(chunk, context))
        assert sum(tokens * times for tokens, _, times in found) == context and len(found) <= 96
        assert all(0 < tokens <= end <= context for tokens, end, _ in found)
    sampled = time_model(shape, soc, resident(shape), context=200, prefill_chunk=1).prefill
    each = [time_model(shape, soc, resident(shape), context=c).decode for c in range(5, 200, 10)]
    assert sampled.tokens == 200
    assert sampled.seconds.default == pytest.approx(200 * sum(x.seconds.default for x in each) / len(each), rel=0.01)


def test_groups_cost_a_job_each(soc: Soc, make: Make) -> None:
    times = []
    for grid in (INT8, Grid(8, 72, True), Grid(8, 36, True)):
        shape = make("stories15m", embedding_bits=8, grid=grid)
        times.append(time_model(shape, soc, resident(shape), context=16).decode)
    assert times[0].seconds.default < times[1].seconds.default < times[2].seconds.default
    assert any("q_proj" in note and "job for each group" in note for note in times[1].notes)
    assert not any("q_proj" in note for note in times[0].notes)


def test_a_chip_without_accelerator_or_without_constants(soc: Soc, make: Make) -> None:
    shape = make("stories260k", embedding_bits=8, grid=INT8)
    cores = replace(soc, engines=tuple(engine for engine in soc.engines if engine.kind == "cores"))
    alone = time_model(shape, cores, resident(shape), context=16).decode
    assert {row.engine for row in alone.operators} == {"cores"}
    check_pass(alone)
    bare = replace(soc, constants={k: v for k, v in soc.constants.items() if k not in ("clock", "linear_macs")})
    assert missing_constants(bare) == ["clock", "linear_macs"]
    with pytest.raises(PlanError, match="states no clock, linear_macs"):
        time_model(shape, bare, resident(shape))
    powerless = replace(soc, constants={k: v for k, v in soc.constants.items() if k != "active_power"})
    assert time_model(shape, powerless, resident(shape), context=8).decode.joules is None


def test_a_bad_placement_is_told_at_once(soc: Soc, make: Make) -> None:
    shape = make("stories260k")
    with pytest.raises(PlanError) as caught:
        time_model(shape, soc, {"model.layers.9.x": "MRAM", "lm_head": "flash", "model.norm": {"L2": 0}})
    message = str(caught.value)
    assert "does not read: lm_head, model.layers.9.x" in message
    assert f"no memory flash; it has {', '.join(m.name for m in soc.memories)}" in message
    assert "shares of model.norm add up to nothing" in message
    inside = replace(soc, memories=tuple(m for m in soc.memories if m.role != "off_chip"))
    with pytest.raises(PlanError, match="no off-chip memory to stream them from"):
        time_model(shape, inside, {})


@pytest.mark.parametrize(("context", "chunk"), [(0, None), (8, 0), (8, -1)])
def test_an_impossible_context_or_chunk(soc: Soc, make: Make, context: int, chunk: int | None) -> None:
    with pytest.raises(PlanError, match="both must be at least 1"):
        time_model(make("stories260k"), soc, {}, context=context, prefill_chunk=chunk)


def test_everything_as_json(soc: Soc, make: Make) -> None:
    shape = make("stories260k", embedding_bits=8, grid=INT8)
    found = json.loads(json.dumps(time_model(shape, soc, resident(shape), context=8).to_dict()))
    assert set(found) == {"decode", "prefill", "curve", "fitted"}
    row = found["decode"]["operators"][2]
    assert row["name"] == "0.q_proj" and set(row["cycles"]) == {"low", "default", "high"}
    assert {"engine", "macs", "bytes", "bounded_by"} <= set(row)
    assert found["decode"]["seconds"]["default"] * found["decode"]["tokens_per_second"] == pytest.approx(1)
