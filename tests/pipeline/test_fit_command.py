"""`compress fit` as a person runs it: its table, its commands, its exit codes, and that its bytes are the stages'."""

from __future__ import annotations

import json
import math
import resource
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError, TextError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.hardware.check import check
from edgepress.hardware.fit import QUANTISATIONS, Settings, reshaped
from edgepress.hardware.placement import weight_bytes
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.fit import Vocabularies, command_of, fit, read_sweep
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build
from edgepress.stages.options import STAGES
from tests.models import as_drawn, save_tiny

pytestmark = pytest.mark.pipeline

HOW: dict[str, Any] = {"corpus": "", "sweep": None, "protect": (4, 2), "best": 8}
CHECK: dict[str, Any] = {"context": 256, "kv_bits": 8, "activation_bits": 8}


def flags_of(command: str) -> dict[str, Any]:
    """The recipe keys of a printed command, --model and the corpus aside."""
    keys = {
        "--depth": "depth.remove", "--wanda": "wanda.pattern", "--quant": "gptq.quant", "--group": "gptq.group",
        "--quant-embeddings": "gptq.quant_embeddings", "--eora": "eora.rank", "--vocabulary-size": "vocabulary.size",
    }  # fmt: skip
    words = shlex.split(command)[1:]
    pairs = zip(words[::2], words[1::2], strict=True)
    return {keys[flag]: int(v) if v.isdigit() else v for flag, v in pairs if flag in keys}


@pytest.mark.parametrize("preset", ["stories15m", "stories260k", "smollm2-135m"])
def test_every_command_makes_the_bytes_that_fit_counted(preset: str) -> None:
    """The stages' own plans, from the printed flags, come to the same file and the same verdict."""
    shape, soc = shape_from_config(PRESETS[preset]), load_soc("siracusa")
    found, _ = fit(preset, shape, soc, **HOW, **CHECK)
    for candidate in (*found.fitting, *found.closest):
        command = command_of(preset, shape, candidate.settings, "", (4, 2))
        planned = plan(build(None, {"model": preset} | flags_of(command)), shape)
        final = planned[-1].shape if planned else shape
        assert final.file_bytes == reshaped(shape, candidate.settings).file_bytes
        assert check(final, soc).fits == candidate.verdict.fits == bool(found.fitting)


def test_every_way_to_quantise_is_one_the_stage_knows() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    for how in QUANTISATIONS:
        flags = {"gptq.quant": how.quant, "gptq.quant_embeddings": how.embedding_bits}
        if how.group != -1:
            flags["gptq.group"] = how.group
        planned = plan(build(None, {"model": "smollm2-135m", **flags}, skip="depth,wanda,lora,eora"), shape)[-1].shape
        mine = reshaped(shape, Settings(shape.vocabulary, quantisation=how))
        assert (planned.grid, planned.file_bytes) == (mine.grid, mine.file_bytes)


def _children_seconds() -> float:
    """Of the processor, imports included: what a busy machine does besides does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_stories15m_s_table_commands_and_note(compress: Callable[..., Any]) -> None:
    before = _children_seconds()
    done = compress("fit", "stories15m", "--soc", "siracusa")
    assert _children_seconds() - before < 10
    assert done.returncode == 0
    assert done.stdout.startswith("stories15m fits Siracusa with\n")
    commands = [line for line in done.stdout.splitlines() if " compress --model stories15m " in line]
    assert len(commands) == 8
    assert all("--vocabulary-size" in line and "--trim-vocabulary" not in line for line in commands)
    assert "'stories15m' is a preset" in done.stdout
    assert "The vocabulary was taken as free" in done.stdout
    assert "N:M" in done.stdout.splitlines()[2]  # kept weights with their index take less room there


def test_what_does_not_fit_exits_with_3_and_shows_the_closest(compress: Callable[..., Any]) -> None:
    before = _children_seconds()
    done = compress("fit", "smollm2-135m", "--json")
    assert _children_seconds() - before < 10
    assert done.returncode == 3
    said = json.loads(done.stdout)
    assert said["fitting"] == []
    assert len(said["closest"]) == 3
    assert all(c["over_bytes"] > 0 and not c["fits"] for c in said["closest"])
    assert "does not fit Siracusa" in said["closest"][0]["summary"]


def test_prompts_in_pieces_fit_where_a_whole_one_does_not(compress: Callable[..., Any]) -> None:
    asked = ("fit", "stories15m", "--soc", "rp2350", "--context", 112, "--best", 1)
    assert compress(*asked).returncode == 3
    assert compress(*asked, "--prefill-chunk", 8).returncode == 0


def test_a_context_too_long_for_the_model_is_one_message(compress: Callable[..., Any]) -> None:
    done = compress("fit", "stories15m", "--context", "300")
    assert done.returncode == 2
    assert "beyond the model's 256 positions" in done.stderr


def test_a_corpus_says_how_many_tokens_are_needed(tiny_llama: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"The for statement number {n} is used, else it is not.\n" for n in range(40)))
    shape = Checkpoint.open(tiny_llama).shape
    sizes = Vocabularies(shape, str(corpus), tiny_llama)
    (used,) = sizes.sizes
    asked = {"model": str(tiny_llama), "vocabulary.corpus": str(corpus)}
    assert plan(build(None, asked, skip="depth,wanda,lora,gptq,eora"), shape)[0].shape.vocabulary == used
    assert sizes.cost(shape.vocabulary) == 0
    found, notes = fit(str(tiny_llama), shape, load_soc("siracusa"), **HOW | {"corpus": str(corpus)}, **CHECK)
    assert found.fitting[0].settings.vocabulary == shape.vocabulary  # it fits as it is
    assert not any("taken as free" in note for note in notes)


def test_a_corpus_s_cost_rises_as_its_unseen_text_gets_longer(tiny_llama: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"The for statement number {n} is used, else it is not.\n" for n in range(40)))
    sizes = Vocabularies(Checkpoint.open(tiny_llama).shape, str(corpus), tiny_llama)
    costs = [sizes.cost(size) for size in (260, 270, 280, sizes.sizes[0])]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1] >= 0


def test_measured_losses_of_a_run_go_before_the_estimate(chain: Path, tiny_llama: Path) -> None:
    shape = Checkpoint.open(tiny_llama).shape
    measured = read_sweep(chain, shape)
    report = json.loads((chain / "report.json").read_text())
    stages = {s["stage"]: s for s in report["stages"]}
    base = report["baseline"]["perplexity"]
    depth = Settings(shape.vocabulary, removed=2)
    # The same text by the same tokens: the rise in bits per byte is the rise of the loss.
    assert measured[depth] == pytest.approx(math.log(stages["depth"]["perplexity"]["after"] / base), rel=1e-6)
    assert {s.quantisation.quant for s in measured} == {"none", "gptq4"}
    assert not any(s for s in measured if s.removed != 2)
    found, notes = fit(
        str(tiny_llama), shape, load_soc("siracusa"), **HOW | {"sweep": chain, "protect": (1, 1), "best": 80}, **CHECK
    )
    assert any("measured (m)" in note for note in notes)
    assert all(c.measured == (c.settings in measured) for c in found.fitting)


def test_bad_input(chain: Path, tmp_path: Path) -> None:
    shape, soc = shape_from_config(PRESETS["stories15m"]), load_soc("siracusa")
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_sweep(tmp_path / "none", shape)
    with pytest.raises(CheckpointError, match="holds 5 finished stages, none of them measured on this model"):
        read_sweep(chain, shape)
    with pytest.raises(PlanError, match="is a preset: it has no tokenizer"):
        fit("stories15m", shape, soc, **HOW | {"corpus": "corpus.txt"}, **CHECK)
    with pytest.raises(PlanError, match="protected blocks cannot be negative"):
        fit("stories15m", shape, soc, **HOW | {"protect": (-1, 2)}, **CHECK)


def test_an_empty_corpus(tiny_llama: Path, tmp_path: Path) -> None:
    shape, soc = Checkpoint.open(tiny_llama).shape, load_soc("siracusa")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(TextError, match="is empty"):
        fit(str(tiny_llama), shape, soc, **HOW | {"corpus": str(tmp_path / "empty.txt")}, **CHECK)
    with pytest.raises(TextError, match="there is no text"):
        fit(str(tiny_llama), shape, soc, **HOW | {"corpus": str(tmp_path / "none.txt")}, **CHECK)


def _chip(folder: Path, weights: int) -> Path:
    """Siracusa with this many bytes for weights."""
    path = folder / f"chip-{weights}.toml"
    capacity = f'{{ value = {weights}, unit = "B", kind = "stated", source = "a test" }}'
    path.write_text(f'based_on = "siracusa"\nname = "Small"\n[memories.MRAM]\ncapacity = {capacity}\n')
    return path


def _recipe_keys(command: str) -> tuple[dict[str, Any], str]:
    """The recipe keys of a printed command, and what it skips."""
    keys = {field.metadata["flag"]: f"{stage}.{field.name}" for stage, o in STAGES.items() for field in fields(o)}
    words = shlex.split(command)[1:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    skip = given.pop("--skip")
    return {keys.get(flag, flag[2:]): int(v) if v.isdigit() else v for flag, v in given.items()}, skip


def test_measured_plans_fit_and_the_best_one_is_run(compress: Callable[..., Any], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=3, max_position_embeddings=1024, weights=as_drawn)
    shape, soc = Checkpoint.open(model).shape, load_soc("siracusa")
    path = _chip(tmp_path, weight_bytes(shape, soc.layout).total // 7)
    asked = ("fit", model, "--soc", path, "--measure", "--data", "embedded", "--context", "32")
    asked = (*asked, "--protect-first", "1", "--protect-last", "1", "-o", tmp_path / "out")
    done = compress(*asked, "--json")
    assert done.returncode == 0, done.stderr
    said, chip = json.loads(done.stdout), load_soc(str(path))
    offers, budget = said["fitting"], said["budget"]
    losses = [offer["loss"] for offer in offers]
    assert len(offers) > 1 and losses == sorted(losses) and said["fits"]
    first = budget["rounds"][0]
    assert (first["predicted_rise"], first["bytes"]) == (losses[0], offers[0]["weight_bytes"])
    assert first["perplexity"] > 1 and offers[0]["perplexity"] > 1
    for offer in offers:
        flags, skip = _recipe_keys(offer["command"])
        recipe = build(None, flags, skip)
        after = plan(recipe, shape)[-1].shape
        assert weight_bytes(after, chip.layout).total == offer["weight_bytes"] <= offer["room_bytes"]
        assert check(after, chip, **CHECK | {"context": 32}).fits
        assert len(after.blocks) == 3 - len(offer["removed_blocks"])
    assert dict(recipe.stages)["gptq"] != build(None, {}, "depth,wanda,lora,eora").stages[0][1]
    result = Checkpoint.open(tmp_path / "out" / "result")
    best = budget["rounds"][budget["best"]]
    assert weight_bytes(result.shape, chip.layout).total == best["bytes"] <= offers[0]["room_bytes"]
    again = compress(*asked)
    assert again.returncode == 0 and "measured ppl" in again.stdout and "fits Small" in again.stdout
    assert f"{best['perplexity']:.2f}" in again.stdout and offers[0]["command"] in again.stdout


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--measure", "--sweep", "none"), 2, "leave one out"),
        (("--data", "embedded"), 2, "there is no --measure"),
        (("--measure",), 2, "fits Siracusa as it is"),
        (("--measure", "--soc", "tiny"), 3, "the smallest model that --budget can make"),
        (("--measure", "--context", "4096"), 2, "beyond the model's"),
    ],
)
def test_what_cannot_be_measured_is_said_before_any_work(
    more: tuple[str, ...], code: int, said: str, compress: Callable[..., Any], tiny_llama: Path, tmp_path: Path
) -> None:
    chip = _chip(tmp_path, 2000)
    done = compress("fit", tiny_llama, "-o", tmp_path / "out", *(chip if x == "tiny" else x for x in more))
    assert done.returncode == code and said in " ".join((done.stdout + done.stderr).split())
    assert not (tmp_path / "out").exists()


def test_a_preset_has_nothing_to_measure(compress: Callable[..., Any], tmp_path: Path) -> None:
    done = compress("fit", "stories15m", "--measure", "-o", tmp_path / "out")
    assert done.returncode == 2 and "is a preset, a shape without weights to measure" in done.stderr
