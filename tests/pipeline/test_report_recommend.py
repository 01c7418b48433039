"""What the report recommends: hand-made studies whose answers are known, and the knee against plain geometry."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main

from edgepress.checkpoints.manifest import sealed, write_json
from edgepress.eval.results import Result, mean
from edgepress.pipeline.cli import app
from edgepress.pipeline.cli_export import ON_CHIPS
from edgepress.pipeline.formats import FORMATS
from edgepress.pipeline.page import advice, content
from edgepress.pipeline.page.content import Chip
from edgepress.pipeline.page.read import SOURCE, Configuration, StageRun, Study, pareto, read_study, stem
from edgepress.pipeline.page.recommend import difference, knee, take, worth
from tests.pipeline import report_help as made

pytestmark = pytest.mark.unit

MIB = 2**20
ROOM = 64 * MIB
Point = tuple[str, float, float]  # name, MiB, perplexity


def stage_run(position: int, point: Point, **changes: Any) -> StageRun:
    name, mib, perplexity = point
    size = round(mib * MIB)
    run = StageRun(
        position, name if position else SOURCE, name, name, None, perplexity, None, ("windows", "text", "bfloat16"),
        2 * size, size, 1000, 900,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def chain(*points: Point) -> Study:
    """One run: the uncompressed model and its stages."""
    runs = tuple(stage_run(i, point) for i, point in enumerate(points))
    return Study("run", "tiny", "tiny", Path("out"), (Configuration("tiny", runs),))


def sweep(*points: Point, source: Point = ("source", 100, 20.0)) -> Study:
    """Each point a configuration of one stage; one without a stage for the uncompressed model."""
    first = stage_run(0, source)
    ways = [Configuration("none", (first,))]
    ways += [Configuration(point[0], (first, stage_run(1, point))) for point in points]
    return Study("sweep", "small", "tiny", Path("out"), tuple(ways))


def took(study: Study, room: int = ROOM, fits: dict[str, bool] | None = None) -> tuple[str, str]:
    found = take(study, room, fits or {})
    assert found is not None
    return found.choice.name, found.rule


# --- what to take -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "room", "name", "rule"),
    [
        ([("a", 60, 25.0), ("b", 40, 22.0), ("c", 20, 40.0)], ROOM, "b", "budget"),
        ([("a", 64, 25.0)], ROOM, "a", "budget"),  # as large as the room
        ([("large", 60, 22.0), ("small", 40, 22.0)], ROOM, "small", "budget"),  # equal in quality
        ([("first", 40, 22.0), ("second", 40, 22.0)], ROOM, "first", "budget"),  # equal in both
        ([("a", 60, 25.0)], 200 * MIB, "none", "budget"),  # the uncompressed model fits, and is better
        ([("a", 30, 80.0), ("b", 40, 24.0), ("c", 90, 21.0)], MIB, "b", "knee"),
        ([("a", 30, 80.0), ("b", 60, 60.0)], MIB, "a", "no knee"),  # b lies above the line
        ([("a", 30, 25.0), ("b", 40, 30.0)], MIB, "a", "alone"),  # b is beaten by a
        ([("a", 120, 25.0), ("b", 100, 30.0)], MIB, "none", "beaten"),
        ([], MIB, "none", "nothing"),
    ],
)
def test_known_studies(points: list[Point], room: int, name: str, rule: str) -> None:
    assert took(sweep(*points), room) == (name, rule)


def test_the_chips_verdict_goes_before_packed_bytes() -> None:
    study = sweep(("a", 60, 25.0), ("b", 70, 22.0), ("c", 40, 30.0))
    assert took(study) == ("a", "budget")
    assert took(study, fits={"a": False}) == ("c", "budget")  # its cache does not fit, say
    assert took(study, fits={"b": True}) == ("b", "budget")  # smaller in the chip's own layout
    assert took(study, fits=dict.fromkeys("abc", False) | {"source": False})[1] in ("knee", "no knee")


def test_of_a_run_every_stage_can_be_taken() -> None:
    study = chain(("source", 100, 20.0), ("wanda", 80, 21.0), ("gptq", 30, 23.0), ("eora", 60, 22.9))
    assert took(study, 90 * MIB) == ("wanda", "budget")
    assert took(study, 50 * MIB) == ("gptq", "budget")
    assert took(chain(("source", 100, 20.0), ("gptq", 30, 23.0)), MIB) == ("gptq", "alone")
    assert took(chain(("source", 100, 20.0)), MIB) == ("uncompressed", "nothing")


def test_without_a_finite_perplexity_nothing_is_taken() -> None:
    study = chain(("source", 100, math.inf), ("gptq", 30, math.inf))
    assert take(study, ROOM, {}) is None
    assert "Nothing to take" in advice.recommendation(study, Chip("Siracusa", ROOM, None))


def test_the_knee_is_the_point_farthest_from_the_chord_on_its_lower_side() -> None:
    chance = random.Random(5)
    found = 0
    for _ in range(300):
        points = [(chance.uniform(1, 9), chance.uniform(1, 9)) for _ in range(chance.randrange(2, 9))]
        front = sorted(points[i] for i in pareto(points))
        (x0, y0), (x1, y1) = front[0], front[-1]
        slow, farthest = None, 1e-9
        for i, (x, y) in enumerate(front):
            if len(front) == 1:
                break
            u, v = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)  # the chord from (0, 0) to (1, 1)
            distance = (v - u) / math.sqrt(2)  # v grows downwards
            if distance > farthest:
                slow, farthest = i, distance
        assert knee(front) == slow
        found += slow is not None
    assert 20 < found < 300  # both answers come up


def test_with_other_tokens_bits_per_byte_are_compared() -> None:
    runs = [stage_run(0, ("source", 100, 20.0), bits_per_byte=1.0)]
    runs += [
        stage_run(1, ("vocabulary", 50, 9.0), bits_per_byte=1.3),
        stage_run(2, ("gptq", 20, 9.5), bits_per_byte=1.4),
    ]
    study = Study("run", "tiny", "tiny", Path("out"), (Configuration("tiny", tuple(runs)),))
    assert study.quality_name == "bits per byte"
    assert [c.name for c in study.front] == ["gptq", "vocabulary", "uncompressed"]  # by perplexity it would be beaten
    assert took(study, 1) == ("gptq", "no knee")
    assert "bits per byte 1.40" in advice.recommendation(study, Chip("Siracusa", 1, None))


# --- whether bytes paid -----------------------------------------------------------------------------------------------


def outcome(study: Study, *place: int) -> tuple[str, str | None]:
    way, at = place
    runs = study.configurations[way].runs
    found = worth(study, runs[at - 1], runs[at])
    assert found is not None
    return found.outcome, found.rival.name if found.rival else None


def with_adapter(*others: Point) -> Study:
    """gptq to 30 MiB, then eora to 47 MiB, among other configurations."""
    plain = sweep(*others)
    long = (plain.source, stage_run(1, ("gptq", 30, 25.0)), stage_run(2, ("eora", 47, 24.0)))
    ways = (Configuration("both", long), Configuration("codes", long[:2]), *plain.configurations)
    return dataclasses.replace(plain, configurations=ways)


def test_added_bytes_are_held_against_what_else_they_could_have_bought() -> None:
    assert outcome(with_adapter(), 0, 2) == ("price", None)
    assert outcome(with_adapter(("other", 40, 23.0)), 0, 2) == ("did not pay", "other")
    assert outcome(with_adapter(("other", 20, 23.0)), 0, 2) == ("did not pay", "other")
    assert outcome(with_adapter(("other", 47, 24.5)), 0, 2) == ("paid", "other")
    assert outcome(with_adapter(("other", 29, 26.0)), 0, 2) == ("price", None)  # a rival of gptq, not of what eora adds
    assert outcome(with_adapter(("other", 48, 23.0)), 0, 2) == ("price", None)  # more bytes


def test_saved_bytes_are_held_against_what_is_no_larger() -> None:
    assert outcome(with_adapter(), 0, 1) == ("price", None)  # eora stands on it and is no rival
    assert outcome(with_adapter(("other", 30, 24.0)), 0, 1) == ("did not pay", "other")
    assert outcome(with_adapter(("other", 30, 25.0)), 0, 1) == ("paid", "other")


def test_what_needs_no_rival() -> None:
    study = chain(("source", 100, 20.0), ("a", 90, 19.0), ("b", 90, 21.0), ("c", 95, 21.0), ("d", 95, 21.0))
    assert [outcome(study, 0, i)[0] for i in (1, 2, 3, 4)] == [
        *("cost nothing", "did not pay", "did not pay", "changed nothing")
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_the_price_where_a_run_has_no_rivals(tmp_path: Path) -> None:
    study = read_study(made.write_run(tmp_path / "out", ("gptq", "eora")))  # 100 -> 90 -> 80 MiB, 20 -> 26 -> 28
    items = next(s for s in content.sections(study, made.chip(study))[0] if s.key == "stages").items
    assert [(item.change, item.verdict) for item in items] == [
        ("−10 MiB, +6.00 perplexity", "0.6 a MiB"),
        ("−10 MiB, +2.00 perplexity", "0.2 a MiB"),
    ]
    assert items[1].words == (
        "It gave up 0.2 of perplexity for each MiB, no more than the 0.4 that the whole chain gave up."
    )


# --- intervals --------------------------------------------------------------------------------------------------------


def evaluated(name: str, losses: Sequence[float]) -> dict[str, Any]:
    ids = [str(i) for i in range(len(losses))]
    score = mean(
        "perplexity", ids, losses, "windows of 8", weights=[8.0] * len(ids), transform="exp", higher_is_better=False,
        of="windows",
    )  # fmt: skip
    result = Result("perplexity", (score,), 1.0)
    facts = {"label": name, "folder": "", "file_bytes": 1, "parameters_total": 1, "fingerprint": f"{name}-print"}
    return facts | {"results": {"perplexity": result.to_dict(items=True)}}


@pytest.mark.usefixtures("undrawn")
def test_intervals_come_from_the_losses_of_windows(tmp_path: Path) -> None:
    out = made.write_run(tmp_path / "out")
    chance = random.Random(1)
    base = [24 + chance.uniform(-4, 4) for _ in range(40)]
    shaken = [x + chance.uniform(-1, 1) * (-1) ** i for i, x in enumerate(base)]
    entries = [evaluated("gptq", base), evaluated("eora", [x - 0.8 for x in base]), evaluated("lora", shaken)]
    write_json(out / "evaluation.json", sealed({"format": 1, "checkpoints": entries}))
    study = read_study(out)
    runs = {run.stage: run for run in study.runs}
    found = difference(study, runs["gptq"], runs["eora"])
    assert found is not None and not found.within_noise
    before = math.exp(sum(base) / 320)
    assert found.difference == pytest.approx(before * (math.exp(-0.1) - 1))  # 0.8 nats over 8 tokens
    assert found.low <= found.difference <= found.high < 0
    same = difference(study, runs["gptq"], runs["lora"])
    assert same is not None and same.within_noise
    assert difference(study, runs["gptq"], runs["wanda"]) is None
    shown = {s.key: s for s in content.sections(study, made.chip(study))[0]}
    words = {item.name: item.words for item in shown["stages"].items}
    assert f"(95 %: −{-found.low:.2f} to −{-found.high:.2f}; 40 windows)" in words["eora"]
    assert "Window by window" not in words["wanda"]
    grid = shown["measured"].grid
    assert grid is not None and grid.headings == ["checkpoint", "perplexity: perplexity"]
    assert [row[0][0] for row in grid.rows] == ["lora", "gptq", "eora"]
    assert grid.rows[1][1][-1].endswith("within noise") and grid.rows[2][1][-1].endswith("better")
    # gptq is 6 MiB smaller than eora, the one to take; it is told apart, so nothing is said of it
    assert "not told apart" not in " ".join(advice.reasons(study, made.chip(study)))


@pytest.mark.usefixtures("undrawn")
def test_a_smaller_one_that_is_not_told_apart_is_named(tmp_path: Path) -> None:
    out = made.write_run(tmp_path / "out")
    base = [24 + 0.1 * i for i in range(40)]
    noisy = [x + 0.5 * (-1) ** i for i, x in enumerate(base)]
    entries = [evaluated("gptq", noisy), evaluated("eora", base)]
    write_json(out / "evaluation.json", sealed({"format": 1, "checkpoints": entries}))
    study = read_study(out)
    assert took(study, 1) == ("eora", "knee")
    words = " ".join(advice.reasons(study, made.chip(study)))
    assert "gptq is 6 MiB smaller, and its perplexity is not told apart: " in words


def test_a_damaged_evaluation_is_a_note(tmp_path: Path) -> None:
    out = made.write_run(tmp_path / "out")
    write_json(out / "evaluation.json", sealed({"checkpoints": [{"label": "gptq"}]}))
    study = read_study(out)
    assert study.evaluated == {}
    assert any("evaluation.json cannot be read" in note for note in study.notes)
    (out / "evaluation.json").write_text(json.dumps({"checkpoints": []}))
    assert any("edited or damaged" in note for note in read_study(out).notes)


# --- words ------------------------------------------------------------------------------------------------------------


def first_words(study: Study, room: int) -> str:
    return advice.recommendation(study, Chip("Siracusa", room, None))


def test_the_first_sentence_names_what_to_take_and_why() -> None:
    points: list[Point] = [("a", 60, 25.0), ("b", 40, 22.0), ("c", 20, 40.0)]
    assert first_words(sweep(*points), ROOM) == (
        "Take b: of the 3 that fit the 64 MiB of Siracusa for weights, none has a lower perplexity; "
        "perplexity 22.0 in 40 MiB."
    )
    assert first_words(sweep(*points), 30 * MIB) == (
        "Take c: it alone fits the 30 MiB of Siracusa for weights, with perplexity 40.0 in 20 MiB."
    )
    assert first_words(sweep(*points), MIB) == (
        "Take b: nothing here fits the 1 MiB of Siracusa for weights, and it is the knee of the 3 that no other beats "
        "in both size and quality; perplexity 22.0 in 40 MiB."
    )
    assert first_words(sweep(("a", 30, 25.0)), MIB).startswith("Take a: nothing here fits the 1 MiB")
    assert "is the only compressed checkpoint that no other beats" in first_words(sweep(("a", 30, 25.0)), MIB)
    assert first_words(sweep(("a", 110, 25.0)), MIB).startswith("Take the uncompressed model: nothing here fits")
    run = chain(("source", 100, 20.0), ("wanda", 80, 21.0), ("gptq", 30, 23.0))
    assert first_words(run, 90 * MIB).startswith("Take stage 1, wanda: of the 2 that fit")
    assert first_words(run, 50 * MIB).startswith("Take the result, gptq: it alone fits")
    assert first_words(chain(("source", 100, 20.0)), MIB) == (
        "tiny was measured and not compressed: perplexity 20.0 in 100 MiB."
    )


def test_names_are_stems() -> None:
    for model, name in {
        "/home/me/models/stories260K.bin": "stories260K",
        "HuggingFaceTB/SmolLM2-135M": "SmolLM2-135M",
        "./Qwen2.5-0.5B/": "Qwen2.5-0.5B",
        "demo/result": "demo/result",
        "C:\\models\\tiny.gguf": "tiny",
        "smollm2-135m-instruct": "smollm2-135m-instruct",
        "/": "/",
    }.items():
        assert stem(model) == name


def test_commands_are_those_that_there_are(tmp_path: Path) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    study = read_study(made.write_run(tmp_path / "out"))
    for fits in (True, False):
        chip = dataclasses.replace(made.chip(study), verdict=made.VERDICT | {"fits": fits}, soc="siracusa")
        code = "\n".join(deed.code for deed in advice.deeds(study, chip))
        found = re.findall(r"^compress (\S+)", code, re.MULTILINE)
        assert {"generate", "check", "eval"} <= set(found) <= set(known)
        assert ("simulate" in found) == fits
        assert set(re.findall(r"--to (\S+)", code)) == {*FORMATS, *(["rv32"] if fits else [])}
        assert str(tmp_path / "out" / "5-eora-00000005") in code
    assert "rv32" in ON_CHIPS

    def loading() -> advice.Deed:
        return advice.deeds(study, chip)[0]

    assert "peft" not in loading().code + loading().words
    folder = tmp_path / "out" / "5-eora-00000005"
    assert 'dtype="auto"' in loading().code
    (folder / "config.json").write_text('{"quantization_config": {}}')  # which GPTQModel computes right in bfloat16
    assert 'dtype="bfloat16"' in loading().code
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").touch()  # as earlier stores have it
    assert "PeftModel.from_pretrained(model" in loading().code
    (folder / "adapter_model.safetensors").touch()
    assert "PeftModel" not in loading().code and loading().words == "Python, with transformers and peft."


@pytest.mark.usefixtures("undrawn")
def test_where_it_does_not_fit_the_levers_are_on_the_page(tmp_path: Path) -> None:
    study = read_study(made.write_run(tmp_path / "out"))
    worth_of = {"lever": "layers", "now": "28 blocks", "furthest": "--depth 27", "saved_bytes": MIB, "enough": None}
    levers: dict[str, Any] = {
        "ranked": [worth_of], "smallest": ["--quant gptq3", "--kv-bits 4"], "spread": [], "needs_then": {},
        "missing_then": {"weights": 2 * MIB}, "options": "--quant gptq3", "options_for": "",
    }  # fmt: skip

    def memory(**changes: Any) -> content.Section:
        chip = dataclasses.replace(made.chip(study), verdict=made.VERDICT | {"levers": levers | changes})
        return next(s for s in content.sections(study, chip)[0] if s.key == "memory")

    section = memory()
    assert section.grid is not None
    assert section.grid.rows == [[("layers",), ("28 blocks",), ("--depth 27",), ("1 MiB",), ("no",)]]
    assert section.after[0].startswith("Smallest change that fits: `--quant gptq3` and `--kv-bits 4`.")
    folder = tmp_path / "out" / "5-eora-00000005"
    assert section.command == f"compress plan --model {folder} --quant gptq3"
    assert memory(options_for="the model without its adapter").command == ""
    assert "2 MiB of weights are missing" in memory(smallest=[], options="").after[0]
    assert memory(ranked=[]).grid is not None
