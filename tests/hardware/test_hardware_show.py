"""How the verdict reads and looks: 80 columns, CSV that adds up, a picture with everything in it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import ModelShape, Pattern
from edgepress.hardware.check import Verdict, check
from edgepress.hardware.draw import draw_verdict
from edgepress.hardware.show import print_soc, print_verdict
from edgepress.hardware.soc import load_soc, shipped_socs

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]


def _text(verdict: Verdict) -> str:
    console = Console(width=80, file=io.StringIO())
    print_verdict(console, verdict)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("preset", ["llama-3.2-1b", "smollm2-135m", "microllama"])
@pytest.mark.parametrize("chip", ["siracusa", "gap9", "esp32-s3:psram_role=weights", "stm32n6", "rp2350", "phone"])
def test_the_text_stays_within_80_columns_and_cuts_nothing(make: Make, preset: str, chip: str) -> None:
    shape = make(preset, embedding_bits=4, grid=Grid(4, 64), pattern=Pattern(2, 4), adapter_rank=8)
    verdict = check(shape, load_soc(chip), name=preset, levers=True, timing=True)
    text = _text(verdict)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.startswith(preset)
    for use in verdict.memories:
        shown = any(line.startswith(f" {use.name} (") for line in text.splitlines())
        assert shown is (use.role != "off_chip" or use.peak_bytes > 0)
    timed = not isinstance(verdict.timing, str)
    assert ("Decode, a token at context 256" in text) is timed and (chip not in ("siracusa", "phone") or timed)
    assert ("No time is estimated: the chip's file states no" in text) is (chip == "gap9")
    assert ("No time is estimated: no public source" in text) is (chip == "stm32n6")
    assert ("What would have to give" in text) is not verdict.fits


def test_what_streams_and_what_has_no_tile_is_said(make: Make) -> None:
    soc = load_soc("siracusa")
    text = _text(check(make("llama-3.2-1b", embedding_bits=4, grid=Grid(4, 128)), soc, levers=True))
    assert "Operators without a tile in L1" in text and "down_proj: 539 KiB" in text
    assert "Streams: " in text and "HyperRAM" in text and "Not even off-chip memory holds all" in text
    assert "Nothing here is enough" in text
    fits = _text(check(make("stories260k"), soc))
    assert "Streams: nothing" in fits and "every operator has one in L1" in fits


def test_rows_add_up(make: Make) -> None:
    verdict = check(make("stories15m", grid=Grid(4, 32)), load_soc("siracusa"), timing=True)
    rows = verdict.rows()
    assert sum(row["placed_bytes"] for row in rows) == (
        verdict.weights.total + verdict.needs.kv_cache + verdict.needs.arena
    )
    streamed = [row for row in rows if row["state"] != "resident"]
    assert sum(r["read_per_token"] + r["written_per_token"] for r in streamed) == verdict.placement.streamed_per_token
    operators = verdict.operator_rows()
    assert {row["mode"] for row in operators} == {"decode", "prefill"}
    assert {"cycles_low", "cycles", "cycles_high", "bounded_by", "macs", "bytes"} <= set(operators[0])
    tiles = check(make("stories260k"), load_soc("gap9"), timing=True).operator_rows()
    assert {row["engine"] for row in tiles} and all(row["rows"] > 0 for row in tiles)


def test_the_picture_shows_every_memory_and_buffer(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    shape = make("smollm2-135m", embedding_bits=4, grid=Grid(4, 64))
    verdict = check(shape, load_soc("siracusa:sram_role=weights"), name="smollm2")
    draw_verdict(verdict, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    bars, decode, prefill = drawn[0].axes
    labels = " ".join(tick.get_text() for tick in bars.get_yticklabels())
    assert all(use.name in labels for use in verdict.memories if use.peak_bytes)
    for axes, run, extra in ((decode, verdict.needs.decode, 0), (prefill, verdict.needs.prefill, 1)):
        assert len(axes.patches) == len(run.plan.buffers) + extra  # the KV cache once
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [x.name for x in run.operators]


def test_shipped_chips_are_listed_with_their_settings() -> None:
    console = Console(width=80, file=io.StringIO())
    for name in shipped_socs():
        print_soc(console, name, load_soc(name))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "sram_role (tiles|weights; tiles)" in text and "MRAM: 2 MiB, weights" in text
