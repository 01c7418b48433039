"""Whatever is wrong with a recipe is said at once, by the plan and by the run before it touches a weight."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError, RecipeError, TextError
from edgepress.checkpoints.tokens import beyond_positions
from edgepress.pipeline.plan import examined, plan
from edgepress.pipeline.recipe import Draft, draft
from edgepress.stages.options import Depth, Gptq, Lora

pytestmark = pytest.mark.pipeline
Command = Callable[..., Any]

WRONG: list[tuple[list[str], str]] = [
    (["--protocol", "magic"], "--protocol magic: there are windows and rows"),
    (["--window", "1"], "--window 1: at least 2"),
    (["--tokens", "-4"], "--tokens -4"),
    (["--device", "tpu"], "unknown device 'tpu'"),
    (["--dtype", "int3"], "unknown precision 'int3'"),
    (["--soc", "nochip"], "'nochip': not a chip"),
    (["--spill-mib", "-1"], "--spill-mib -1"),
    (["--data", "gone.txt"], "there is no text 'gone.txt'"),
    (["--text", "lost.jsonl"], "there is no text 'lost.jsonl'"),
    (["--lora-data", "away.parquet"], "there is no text 'away.parquet'"),
    (["--trim-vocabulary", "nowhere.txt"], "there is no text 'nowhere.txt'"),
    (["--depth", "9"], "--depth 9: of 6 blocks"),
    (["--pad-ffn", "-3"], "--pad-ffn -3: cannot be negative"),
    (["--lora-targets", "w1"], "--lora-targets w1: this model's blocks have"),
    (["--wanda-samples", "0", "--wanda-length", "1"], "wanda: 0 calibration windows"),
    ([], "wanda: windows of 1 tokens"),
    (["--quant", "int5"], "--quant int5 (near: int8"),
    (["--eora-bits", "3"], "--eora-bits 3: 8 or 16"),
    (["--skip", "loro"], "--skip loro: there is no such stage (near: lora)"),
]


@pytest.mark.parametrize("command", [["plan"], ["--plan"], []], ids=" ".join)
def test_faults_of_every_kind_come_at_once(
    compress: Command, tiny_llama: Path, tmp_path: Path, command: list[str]
) -> None:
    flags = [word for words, _ in WRONG for word in words]
    done = compress(*command, "--model", tiny_llama, *flags, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    for _, words in WRONG:
        assert done.stderr.count(words) == 1, words
    assert f"{len(WRONG)} errors in the recipe" in done.stderr  # and no other that only follows from these
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["plan"], ["--plan"], []], ids=" ".join)
def test_an_unknown_model_is_said_with_the_rest(compress: Command, tmp_path: Path, command: list[str]) -> None:
    for model, words in (("nomodel", "no model 'nomodel'"), ("llama-3.2-1b", "--depth 99: of 16 blocks")):
        done = compress(*command, "--model", model, "--depth", 99, "--window", 1, "--data", "gone", cwd=tmp_path)
        assert done.returncode == 2
        for word in (words, "--window 1", "there is no text 'gone'"):
            assert word in done.stderr, word
        assert ("is a preset" in done.stderr) == (model == "llama-3.2-1b" and not command)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        (["plan", "--recipe", "tabel-a1"], "table-a1"),
        (["check", "smollm2-135m", "--soc", "sirakusa"], "siracusa"),
        (["plan", "--model", "smollm-135m"], "smollm2-135m"),
        (["plan", "--quant", "gtpq4"], "gptq4"),
        (["plan", "--prune", "sparsegtp"], "sparsegpt"),
        (["plan", "--recover", "qlorra"], "qlora"),
        (["plan", "--metric", "tailor"], "taylor"),
        (["plan", "--protocol", "window"], "windows"),
        (["plan", "--data", "wikitext-2"], "wikitext2"),
        (["plan", "--device", "cud"], "cuda"),
        (["plan", "--dtype", "float23"], "float32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_name_that_nothing_has_is_answered_with_those_near_it(compress: Command, wrong: list[str], near: str) -> None:
    done = compress(*wrong)
    assert done.returncode == 2
    assert re.search(rf"\(near: [^)]*\b{near}\b", done.stderr), done.stderr


@pytest.mark.parametrize("command", [["plan"], []], ids=" ".join)
def test_texts_too_short_for_their_stages(
    compress: Command, tiny_llama: Path, quick: list[str], tmp_path: Path, command: list[str]
) -> None:
    """Less than 4 windows of 64 tokens to calibrate on, and of what is held back less than is to be measured."""
    (tmp_path / "short.txt").write_text("A line of a few words.\n" * 20)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": null}\n')
    wrong = ("--data", "short.txt", "--lora-data", "bad.jsonl")
    done = compress(*command, "--model", tiny_llama, *quick, *wrong, cwd=tmp_path)
    assert done.returncode == 2
    for words in ("wanda: the text 'short.txt", "measuring: the text 'short.txt", "bad.jsonl, line 2"):
        assert words in done.stderr, words
    # With a tokenizer at hand tokens are counted; a preset has none, and no token is less than a byte.
    assert "short.txt (first four fifths)' has 255 tokens; 256 are asked for" in done.stderr
    bare = compress("plan", "--model", "smollm2-135m", "--data", "short.txt", cwd=tmp_path)
    assert bare.returncode == 2 and "has at most " in bare.stderr
    (tmp_path / "long.txt").write_text("A line of a few words.\n" * 20_000)
    assert compress("plan", "--model", "smollm2-135m", "--data", "long.txt", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("command", [["plan", "--recipe"], ["sweep"]], ids=" ".join)
def test_a_sweep_s_faults_come_at_once_too(
    compress: Command, tiny_llama: Path, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "s.yaml").write_text(
        f"protocol: magic\nmodel: {tiny_llama}\ndata: gone.txt\nnonsense: 1\n"
        "sweep:\n  grid: {depth.remove: [1, 9], wanda.pattern: ['1:8', '1:7'], lora.rank: [8, 0]}\n"
    )
    done = compress(*command, "s.yaml", "--device", "tpu", cwd=tmp_path)
    assert done.returncode == 2
    for words in (
        *("--protocol magic", "unknown device 'tpu'", "no text 'gone.txt'", "unknown key 'nonsense'"),
        *("--depth 9: of 6 blocks", "--wanda 1:7 needs", "--lora-rank 0"),
    ):
        assert done.stderr.count(words) == 1, words
    assert not (tmp_path / "out").exists()


def test_a_plan_by_flag_is_the_command_s(compress: Command, tiny_llama: Path, tmp_path: Path) -> None:
    flags = ("--model", tiny_llama, "--skip", "lora,eora", "--protect-first", 1, "--group", 32, "--json")
    by_flag, by_command = compress("--plan", *flags, cwd=tmp_path), compress("plan", *flags, cwd=tmp_path)
    assert by_flag.returncode == 0 and by_flag.stdout == by_command.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_stage_names_all_its_faults() -> None:
    with pytest.raises(PlanError) as caught:
        Lora(rank=0, alpha=0, batch=3, micro_batch=0, method="nothing", samples=0)
    for words in ("--lora-rank 0", "--lora-alpha 0", "--lora-micro-batch must", "nothing", "0 calibration windows"):
        assert words in str(caught.value), words
    with pytest.raises(PlanError, match=r"(?s)--group 3.*--quant-embeddings 5"):
        Gptq(group=3, quant_embeddings=5)
    with pytest.raises(PlanError, match=r"(?s)--metric luck.*--layers: '5-1'"):
        Depth(metric="luck", layers="5-1")


def test_what_only_follows_from_a_refused_stage_is_not_said() -> None:
    found = draft(None, {"gptq.quant": "int5", "eora.rank": 4, "lora.rank": -1, "homotopic": 2})
    assert found.refused == {"gptq", "lora"} and found.recipe.homotopic == 0
    assert [fault.partition(":")[0].partition(" (")[0] for fault in found.faults] == ["--lora-rank -1", "--quant int5"]


def test_windows_beyond_the_positions_are_a_remark_or_an_error(tiny_llama: Path) -> None:
    """A rotary model goes on beyond its positions; a table has no row there."""
    recipe = draft(
        None, {"model": str(tiny_llama), "data": "embedded", "depth.remove": 0, "wanda.length": 600, "window": 600}
    ).recipe
    shape = Checkpoint.open(tiny_llama).shape
    wanda, lora, *_ = plan(recipe, shape)
    assert (
        "--wanda-length 600" not in " ".join(lora.remarks)
        and "--wanda-length 600 is more than the 256 positions of the model" in wanda.remarks[0]
    )
    for length in (256, 600):
        table = replace(shape, family="opt")
        fails = length > 256
        with pytest.raises(TextError, match="which are a table; at most 256") if fails else nullcontext():
            beyond_positions(table, length, "--window")
    with pytest.raises(RecipeError) as raised:
        examined(Draft(recipe), lambda _: table, texts=False)
    assert "--wanda-length 600" in str(raised.value) and "--window 600" in str(raised.value)


def test_a_pipe_in_place_of_the_log_is_an_error(compress: Command, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--model", tiny_llama, "--data", "embedded", "--skip", "depth,wanda,lora,gptq,eora", "-o", out]
    assert compress(*flags).returncode == 0
    (out / "compress.log").unlink()
    os.mkfifo(out / "compress.log")
    done = compress(*flags)
    assert done.returncode == 2 and "compress.log is a device, pipe or socket" in done.stderr
