"""Chips whose engines read every memory themselves: nothing is cut, and each memory's own bus bounds the time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.shape import with_bits
from edgepress.hardware.check import check
from edgepress.hardware.needs import Request, needs
from edgepress.hardware.operators import forward, weights_read
from edgepress.hardware.rates import missing_constants, rates
from edgepress.hardware.soc import OPERATORS, UNKNOWN, Constant, Engine, Soc, load_soc
from edgepress.hardware.timing import time_model
from tests.hardware.test_hardware_soc import GOOD

pytestmark = pytest.mark.unit

ALL = Engine("all", "cores", OPERATORS, True, True, "ours", {8: Constant(4, "MAC/cycle", "stated", "ours")})
TIMED = """
clock = { value = 1e6, unit = "Hz", kind = "stated", source = "ours" }
cluster_efficiency = { value = 0.5, low = 0.25, high = 1, unit = "fraction", kind = "assumed", source = "a guess" }
cluster_operator_cycles = { value = 0, unit = "cycles", kind = "stated", source = "ours" }
"""


def in_place(folder: Path, text: str = "", **bandwidths: float) -> Soc:
    """The toy without its scratch memory, its flash and RAM with buses of their own where asked."""
    lines = GOOD.replace('link = "dma"', 'link = "working_link"').replace("dma = {", "working_link = {")
    start, end = lines.index("[memories.scratch]"), lines.index("[engines.core]")
    lines = lines[:start] + lines[end:] + text
    for memory, speed in bandwidths.items():
        own = f'bandwidth = {{ value = {speed}, unit = "B/s", kind = "stated", source = "data sheet" }}\n'
        lines = lines.replace(f"[memories.{memory}]\n", f"[memories.{memory}]\n{own}")
    (folder / "toy.toml").write_text(lines)
    return load_soc(str(folder / "toy.toml"))


def test_without_a_working_memory_nothing_is_cut_and_its_constants_are_not_asked_for(tmp_path: Path) -> None:
    soc = in_place(tmp_path)
    assert soc.working is None and load_soc("siracusa").working is not None
    text = (tmp_path / "toy.toml").read_text().splitlines()
    (tmp_path / "toy.toml").write_text("\n".join(x for x in text if not x.startswith("tile_")))
    assert load_soc(str(tmp_path / "toy.toml")).count("tile_buffers") is None
    found = needs(shape_from_config(PRESETS["smollm2-135m"]), soc, Request(context=64))
    assert all(t.fits and t.tiles == 1 and t.smallest_bytes == t.tile_bytes == 0 for t in found.tilings)
    assert found.by_role()["working"] == 0 and "working" not in found.short(soc)


def test_what_a_memorys_own_bus_delivers_bounds_the_time(tmp_path: Path) -> None:
    """A token reads every weight once over the flash's bus, 1000 B/s: bound and estimate by hand."""
    soc = in_place(tmp_path, TIMED, flash=1000)
    large = Constant(1 << 30, "B", "stated", "a test")
    soc = replace(soc, memories=tuple(replace(m, capacity=large) for m in soc.memories), engines=(ALL,))
    shape = with_bits(shape_from_config(PRESETS["stories260k"]), 8)
    timing = check(shape, soc, context=8, timing=True).timing
    assert not isinstance(timing, str), timing
    read = sum(x.weight_bytes for x in forward(shape, context=8))
    assert timing.decode.bound_by == "flash bus"
    assert timing.decode.bound_seconds.default == pytest.approx(read / 1000)
    assert timing.decode.bytes["flash"] == read and timing.decode.streamed_bytes == 0
    # not hidden in the high corner: arithmetic at a quarter of 4 MAC/cycle on top
    work = sum(x.macs + x.element_operations for x in forward(shape, context=8))
    assert timing.decode.seconds.high == pytest.approx(read / 1000 + work / 1e6)
    assert timing.basis == "constants of its file are assumed"
    assert timing.fitted == {"cluster_efficiency": "assumed: a guess."}


def test_wide_operands_take_the_speed_of_their_width(tmp_path: Path) -> None:
    soc = in_place(tmp_path, TIMED)
    wide = {8: Constant(4, "MAC/cycle", "stated", "ours"), 32: Constant(1, "MAC/cycle", "stated", "ours")}
    soc = replace(soc, engines=(replace(ALL, throughput=wide),))
    r = rates(soc, "default")
    assert [r.core_peak(bits) for bits in (1, 4, 8, 9, 16, 32)] == [4, 4, 4, 1, 1, 1]
    for preset, bits, peak in (("stories260k", 0, 1), ("stories260k", 8, 4)):
        shape = shape_from_config(PRESETS[preset])
        shape = with_bits(shape, bits) if bits else shape
        where = dict.fromkeys(weights_read(shape), "flash")
        (row,) = [x for x in time_model(shape, soc, where, context=4).decode.operators if x.name == "0.q_proj"]
        assert row.cycles.default == pytest.approx(64 * 64 / (peak * 0.5))


def test_a_memory_of_unknown_speed_has_no_time(tmp_path: Path) -> None:
    soc = in_place(tmp_path, TIMED)
    path = tmp_path / "toy.toml"
    path.write_text(path.read_text().replace('link = "working_link"', f'link = "{UNKNOWN}"', 1))
    assert missing_constants(soc) == [] and missing_constants(load_soc(str(path))) == ["speed of flash"]
    path.write_text(path.read_text().replace('name = "Toy"', 'name = "Toy"\nestimate.none = "nobody tells"'))
    verdict = check(
        shape_from_config(PRESETS["stories260k"]), replace(load_soc(str(path)), engines=(ALL,)), timing=True
    )
    assert str(verdict.timing) == "No time is estimated: nobody tells; the chip's file states no speed of flash."


# Runs of others, whose sources and figures are in SCHEMA.md, and what it says of ours: theirs, low, default, high.
FLOAT = {"kv_bits": 32, "activation_bits": 32}
LLAMA4 = {"bits": 4, "embedding_bits": 8}
RUNS: list[tuple[str, str, list[str], dict[str, int], tuple[float, float, float, float]]] = [
    ("stories260k", "esp32-s3", ["psram_role=weights", "psram_bandwidth=20e6"], FLOAT, (19.13, 10.8, 18.6, 19.1)),
    ("stories260k", "esp32-s3", ["psram_role=weights", "psram_bandwidth=40e6"], FLOAT, (19.13, 15.0, 36.2, 38.0)),
    ("stories260k", "esp32-s3", ["psram_role=weights"], FLOAT, (25.3, 15.0, 68.3, 147)),
    ("stories15m", "esp32-s3", [], {"bits": 4, "embedding_bits": 4}, (1.4, 1.51, 3.62, 4.85)),
    ("stories260k", "rp2350", ["psram_role=weights"], FLOAT, (19, 7.58, 18.3, 35.5)),
    ("llama-3.2-1b", "phone", [], {"kv_bits": 16, "activation_bits": 16}, (19.2, 4.91, 18.5, 30.9)),
    ("llama-3.2-1b", "phone", [], LLAMA4, (50.2, 10.7, 52.1, 91.8)),
    ("llama-3.2-1b", "phone", [], LLAMA4 | {"prompt": 64}, (260.5, 22.5, 328, 1368)),
    ("llama-3.2-1b", "phone", [], {"kv_bits": 16, "activation_bits": 16, "prompt": 64}, (60.3, 11.2, 165, 685)),
]


@pytest.mark.parametrize(("preset", "chip", "settings", "how", "figures"), RUNS)
def test_runs_of_others_against_the_estimate(
    preset: str, chip: str, settings: list[str], how: dict[str, int], figures: tuple[float, float, float, float]
) -> None:
    how = dict(how)
    shape, prompt = shape_from_config(PRESETS[preset]), how.pop("prompt", 0)
    if bits := how.pop("bits", 0):
        shape = replace(with_bits(shape, bits, 32), embedding_bits=how.pop("embedding_bits"))
    verdict = check(
        shape, load_soc(chip, settings), context=prompt or 128, prefill_chunk=prompt or 1, timing=True,
        kv_bits=how.get("kv_bits", 8), activation_bits=how.get("activation_bits", 8),
    )  # fmt: skip
    assert verdict.fits and not isinstance(verdict.timing, str)
    run = verdict.timing.prefill if prompt else verdict.timing.decode
    theirs, *ours = figures
    found = [run.tokens / seconds for seconds in (run.seconds.high, run.seconds.default, run.seconds.low)]
    assert found == pytest.approx(ours, rel=0.01)
    assert run.tokens / run.bound_seconds.low > theirs  # no run beats what the estimate says nothing can beat


@pytest.mark.parametrize(("old", "new", "fault"), [
    ('link = "working_link"', "", "'link' is missing"),
    ('link = "working_link"', 'bandwidth = { value = 0, unit = "B/s", kind = "stated", source = "x" }', "must be"),
    ('link = "working_link"', 'bandwidth = { value = 1, unit = "Hz", kind = "stated", source = "x" }', "is not B/s"),
    ('name = "Toy"', 'name = "Toy"\nestimate.bases = "x"', "unknown key 'bases' (near: basis)"),
    ('name = "Toy"', 'name = "Toy"\nno_rv32 = ""', "'no_rv32' must be a text"),
])  # fmt: skip
def test_faults_of_what_such_chips_state(tmp_path: Path, old: str, new: str, fault: str) -> None:
    in_place(tmp_path)
    path = tmp_path / "toy.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(PlanError) as caught:
        load_soc(str(path))
    assert fault in str(caught.value)
