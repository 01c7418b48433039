"""The benchmark of every method: its rows, its table, and a tiny run that is gone on with."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import methods
from benchmarks.method_rows import ROUNDS, rows
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.eval.text import load_text
from edgepress.pipeline.plan import plan
from edgepress.stages.options import QUANTS
from edgepress.stages.recovery import METHODS as RECOVERY

pytestmark = pytest.mark.unit


def asked(**given: object) -> argparse.Namespace:
    usual = {"training": "a.txt", "text": "b.txt", "model": "m", "base": "dense,2:4", "only": "", "tokens": 64}
    sizes = {"samples": 2, "length": 32, "recovery_steps": 8, "recovery_length": 32}
    return argparse.Namespace(**usual | sizes | given)


def test_every_method_of_the_registries_has_a_row_on_each_base() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    found = rows(asked())
    names = {(row.method, row.base) for row in found}
    assert len(names) == len(found)
    for base in ("dense", "2:4"):
        every = {*QUANTS, "gptq4+eora"}
        without = set() if base == "dense" else {"q2_k", "q4_k", "q5_k"}  # these have no room for a mask
        assert {name for name, at in names if at == base} & every == every - without
        for method in RECOVERY:
            assert any(method in row.method.split("+") for row in found if row.base == base), method
    assert (f"homotopic-{ROUNDS}", "2:4") in names and ("none", "2:4") in names
    for row in found:
        assert not row.faults, row
        steps = plan(row.recipe, shape)
        own = [step.stage for step in steps[row.shared :]]
        assert row.shared == (row.base != "dense" and row.kind != "base" and not row.recipe.homotopic)
        trained = [step.options for step in steps if step.stage == "lora"]
        assert sum(options.total_steps for options in trained) == (8 if "lora" in own else 0)  # type: ignore[union-attr]


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(PlanError, match="no method int7; there are none, gptq4"):
        rows(asked(only="int8,int7"))


def test_a_row_that_a_recipe_alone_refuses_keeps_its_reason() -> None:
    (row,) = rows(asked(only=f"homotopic-{ROUNDS}", recovery_steps=ROUNDS))
    assert "a round needs two" in row.faults[0]


def test_bits_of_a_weight() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    assert methods.bits_per_weight(shape) == 16
    (row,) = rows(asked(only="int8", base="dense"))
    (step,) = plan(row.recipe, shape)
    linear = step.shape.blocks[0].linears[0]
    assert linear.grid is not None
    scales = 16 / linear.in_features if linear.grid.group == -1 else 16 / linear.grid.group
    assert 8 + scales * 0.3 < methods.bits_per_weight(step.shape) < 8 + 2 * scales


def test_the_table_takes_the_newest_line_of_a_row_and_reasons(tmp_path: Path) -> None:
    file = tmp_path / "methods.jsonl"
    numbers = {"bits_per_weight": 4.5, "seconds": 61.2, "peak_memory_bytes": 2**30, "packed_bytes": 12345678}
    first = {"method": "int8", "base": "dense", "kind": "quantiser", "perplexity": 30.0, **numbers}
    for line in (
        {"method": "loftq", "base": "2:4", "kind": "recovery", "refused": "it cannot be"},
        first,
        {**first, "perplexity": 28.126},
        {"method": "none", "base": "dense", "kind": "base", **numbers, "perplexity": 28.5, "peak_memory_bytes": None},
    ):
        methods.append(file, line)
    found = methods.read_lines(file)
    assert methods.table(found).splitlines()[2:] == [
        "| none | dense | 28.50 | 4.50 | 61 |  | 12,345,678 |",
        "| int8 | dense | 28.13 | 4.50 | 61 | 1.00 | 12,345,678 |",
        "| loftq | 2:4 | refused: it cannot be | | | | |",
    ]
    methods.draw(found, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_no_name_in_the_figure_lies_on_another() -> None:
    """With as many methods on nearly one spot as the real table has."""
    from matplotlib import pyplot
    from matplotlib.text import Text

    from benchmarks.method_figure import figure_of

    kinds = ["base", *["quantiser"] * 12, *["recovery"] * 9]
    found = [
        {
            "method": f"method-{i}-of-many",
            "base": base,
            "kind": kind,
            "perplexity": 1e6 if i == 5 else 28 + (i % 7) * 0.1,
            "packed_bytes": (100 + i % 3 + 60 * (i % 4 == 0)) * 2**20,
        }
        for base in ("dense", "2:4")
        for i, kind in enumerate(kinds)
    ]
    figure = figure_of(found)
    figure.draw_without_rendering()
    whole = figure.bbox
    for panel in figure.axes:
        boxes = [Text.get_window_extent(text) for text in panel.texts]  # without the line to its point
        assert len(boxes) == len(kinds)
        for i, box in enumerate(boxes):
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
            assert not any(box.overlaps(other) for other in boxes[:i])
    pyplot.close(figure)


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([1.0, 3.0, 5.0], [1.0, 3.0, 5.0]),
        ([4.0, 4.0, 4.0], [3.0, 4.0, 5.0]),
        ([0.0, 0.0, 0.5], [0.0, 1.0, 2.0]),
        ([9.9, 10.0], [9.0, 10.0]),
    ],
)
def test_names_spread_around_where_they_would_be(wanted: list[float], placed: list[float]) -> None:
    from benchmarks.method_figure import spread

    assert spread(wanted, 1.0, 10.0) == pytest.approx(placed)


@pytest.mark.pipeline
def test_a_tiny_run_writes_a_line_for_each_row_and_goes_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from edgepress.pipeline import workers

    documents = load_text("embedded", "whole").documents
    for name, part in (("a.txt", documents[:20]), ("b.txt", documents[20:40])):
        (tmp_path / name).write_text("\n".join(part))
    here: Callable[..., Any] = lambda count, tell, once: workers.Here(tell)  # noqa: E731  # no process a stage here
    monkeypatch.setattr(workers, "Processes", here)
    monkeypatch.setattr(methods.signal, "signal", lambda *_: None)  # the test's own handler stays
    out = tmp_path / "out"
    argv = ["methods", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "-o", str(out), "--model", str(tiny_llama)]
    argv += ["--samples", "4", "--length", "64", "--tokens", "512", "--recovery-steps", "2", "--recovery-length", "32"]
    argv += ["--only", f"none,gptq4,int8,homotopic-{ROUNDS}"]
    tables = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", argv)
        methods.main()
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]  # seconds and memory too: they are the store's
    assert f"| homotopic-{ROUNDS} | 2:4 | refused: --homotopic {ROUNDS}: lora has 2 optimiser steps" in tables[0]
    lines = methods.read_lines(out / "methods.jsonl")
    assert {(f["method"], f["base"]) for f in lines if "perplexity" in f} == {
        (method, base) for method in ("none", "gptq4", "int8") for base in ("dense", "2:4")
    }
    for facts in (f for f in lines if f.get("stages")):
        last = Checkpoint.open(out / facts["stages"][-1])
        assert facts["packed_bytes"] == packed_sizes(last.shape).total
        assert facts["bits_per_weight"] == methods.bits_per_weight(last.shape)
        manifest = last.manifest
        assert manifest is not None
        assert json.loads(json.dumps(manifest.seconds)) == facts["seconds"]
    assert (out / "methods.png").is_file()
