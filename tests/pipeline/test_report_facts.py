"""The numbers behind every figure of the report, against brute force and by hand."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest

from edgepress.pipeline.page import content, facts
from edgepress.pipeline.page.read import pareto, read_study
from tests.pipeline import report_help as made

pytestmark = pytest.mark.unit


def test_the_front_is_what_no_other_point_beats() -> None:
    chance = random.Random(3)
    for _ in range(200):
        points = [(float(chance.randrange(6)), float(chance.randrange(6))) for _ in range(chance.randrange(1, 12))]
        slow = []
        for i, (x, y) in enumerate(points):
            others = [(a, b) for a, b in points if (a, b) != (x, y)]
            if not [1 for a, b in others if a <= x and b <= y]:
                slow.append(i)
        assert pareto(points) == slow
        assert slow


def test_waterfall_steps_are_continuous_and_add_up() -> None:
    steps = facts.waterfall(["source", "a", "b", "c"], [10.0, 14.0, 11.0, 11.0])
    assert [step.name for step in steps] == ["a", "b", "c"]
    assert [step.change for step in steps] == [4.0, -3.0, 0.0]
    assert sum(step.change for step in steps) == steps[-1].after - steps[0].before == 1.0
    assert all(before.after == after.before for before, after in itertools.pairwise(steps))


def test_effects_take_each_pair_of_parent_and_stage_once(tmp_path: Path) -> None:
    study = read_study(made.write_sweep(tmp_path / "out", made.sweep_rows()))
    found = facts.effects(study)
    assert {stage: [e.perplexity for e in effects] for stage, effects in found.items()} == {
        "wanda": [pytest.approx(22 / 20)],  # two configurations share it
        "gptq": [pytest.approx(24 / 22), pytest.approx(30 / 20)],
    }
    assert [e.size for e in found["gptq"]] == [pytest.approx(30 / 90), pytest.approx(30 / 100)]


def test_stage_facts_are_the_manifests_own(tmp_path: Path) -> None:
    runs = {run.stage: run for run in read_study(made.write_run(tmp_path / "out")).runs}
    ranking = facts.importance(runs["depth"])
    assert ranking == facts.Importance("perplexity", {1: 30.5, 2: 26.0, 3: 400.0, 4: 27.0}, (2,), 1)
    training = facts.losses(runs["lora"])
    assert training == facts.Losses((3.0, 2.5, 2.6), {1: 2.9, 3: 2.7}, 3)
    errors = facts.layer_errors(runs["gptq"])
    assert errors is not None
    assert errors.blocks == (0, 5)  # as numbered before depth took some away
    assert errors.layers == made.LAYERS
    assert errors.errors[0] == (0.01, 0.04)
    assert errors.errors[1][0] == 0.02 and math.isnan(errors.errors[1][1])
    assert errors.worst == [(0, "mlp.down_proj", 0.04), (5, "self_attn.q_proj", 0.02), (0, "self_attn.q_proj", 0.01)]
    assert facts.importance(runs["wanda"]) is facts.losses(runs["gptq"]) is facts.layer_errors(runs["lora"]) is None


def test_memory_map_leaves_out_what_holds_nothing() -> None:
    first, second = facts.memories(made.VERDICT)  # the empty memory off the chip is no part of the map
    assert (first.used, first.parts, first.fits) == (9 * made.MIB, (("block codes", 9 * made.MIB),), False)
    assert second.fits
    assert facts.weight_room(made.VERDICT) == 4 * made.MIB


def test_the_tiles_say_the_checkpoint_to_take_in_numbers(tmp_path: Path) -> None:
    study = read_study(made.write_run(tmp_path / "out"))
    tiles = {tile.label: (tile.value, tile.detail) for tile in content.tiles(study, made.chip(study))}
    assert tiles["Packed bytes"] == ("30 MiB", "of 100 MiB, 3.33 × smaller")
    assert tiles["Siracusa"] == ("does not fit", "weights: 9 MiB of 4 MiB")


def test_the_table_marks_what_is_not_beaten(tmp_path: Path) -> None:
    study = read_study(made.write_sweep(tmp_path / "out", made.sweep_rows()))
    assert [choice.name for choice in study.front] == ["both", "pruned", "none"]
    _, rows = content.table(study, made.chip(study))
    assert [(row[1].text, row[2].text, row[3].text, row[-1].text) for row in rows] == [
        ("none", "20.00", "1.00", "●"),
        ("pruned", "22.00", "1.10", "●"),
        ("both", "24.00", "1.20", "●"),
        ("worse", "30.00", "1.50", ""),
    ]
    assert [row[8].text for row in rows] == ["–", "1", "3", "1"]  # seconds of the whole chain


def test_only_what_was_measured_alike_is_compared(tmp_path: Path) -> None:
    rows = made.sweep_rows()
    rows += made.sweep_row(1, "gptq", "y", ["other"], ["other"], 1.0, made.MIB, protocol="rows of 512")
    rows += made.sweep_row(1, "gptq", "z", ["broken"], ["broken"], math.inf, made.MIB)
    for row in rows[:2]:
        row["configurations"] = row["configurations"].replace("]", ', "other", "broken"]')
    study = read_study(made.write_sweep(tmp_path / "out", rows))
    assert len(study.candidates) == 6
    assert {choice.name for choice in study.comparable} == {"none", "pruned", "both", "worse"}
    assert "other" not in [choice.name for choice in study.front]
    assert any("2 ways" in note for note in study.notes)
    table = {row[1].text: row for row in content.table(study, made.chip(study))[1]}
    assert table["broken"][2].text == "∞"
    assert table["other"][3].text == "–"
