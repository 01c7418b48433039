"""LoRA's own training text through the pipeline: files of instructions, too little of it, and what a plan says."""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import RecipeError, TextError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.runtime import Runtime, Silent
from edgepress.checkpoints.writer import verify
from edgepress.pipeline.calibration import Calibration, sample_text
from edgepress.pipeline.plan import plan, text_faults
from edgepress.pipeline.recipe import build, shares_of, texts_of
from edgepress.stages.options import Depth, Lora, Wanda

pytestmark = pytest.mark.pipeline

Run = Callable[..., Any]


class Listening(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = ({"question": f"What is {i} and {i}?", "answer": {"value": str(2 * i)}} for i in range(400))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def training_windows(model: Path, data: Path, options: Lora, out: Path) -> tuple[Any, list[str]]:
    listening = Listening()
    recipe = build(None, {"model": str(model), "data": "embedded", "lora.data": str(data)})
    calibration = Calibration(recipe, Checkpoint.open(model), out, Runtime(progress=listening))
    windows = [calibration.windows("lora", options) for _ in range(2)]
    assert windows[0].sha256 == windows[1].sha256
    return windows[0], listening.notes


def test_fewer_windows_than_asked_for_are_all_used_and_it_is_said_once(
    tiny_llama: Path, questions: Path, tmp_path: Path
) -> None:
    options = Lora(data=str(questions), samples=8192, length=64, batch=8, held_out=4)
    windows, notes = training_windows(tiny_llama, questions, options, tmp_path)
    assert 12 <= len(windows.ids) < 8192
    (note,) = notes
    assert f"has {len(windows.ids)} windows of 64 tokens, not the 8192 asked for" in note
    end = Checkpoint.open(tiny_llama).tokenizer().eos_token_id
    tokens = windows.ids.flatten().tolist()
    assert 310 <= tokens.count(end) <= 320  # one for each row of four fifths, but for those outside the last window


@pytest.mark.parametrize("packing", ["windows", "rows", "grouped"])
def test_only_answers_are_learnt_where_it_is_asked_for(
    packing: str, tiny_llama: Path, questions: Path, tmp_path: Path
) -> None:
    options = Lora(data=str(questions), samples=40, length=64, batch=8, held_out=4, loss="answers", packing=packing)
    data, _ = training_windows(tiny_llama, questions, options, tmp_path)
    tokenizer = Checkpoint.open(tiny_llama).tokenizer()
    learnt = tokenizer.decode(data.labels[data.labels != -100])
    assert data.facts()["learnt_tokens"] == int((data.labels != -100).sum())
    end = tokenizer.eos_token
    assert learnt.count(end) >= 40 and learnt.replace(end, "").replace(" ", "").isdecimal()
    if packing == "windows":
        return
    for ids, labels in zip(data.ids, data.labels, strict=True):
        row = tokenizer.decode(ids[: int((labels != -100).nonzero()[-1]) + 1])
        number = row.removeprefix("Question: What is ").split()[0]
        assert row == f"Question: What is {number} and {number}? Answer: {2 * int(number)}{end}"
        assert tokenizer.decode(labels[labels != -100]) == f" {2 * int(number)}{end}"


def test_rows_of_plain_text_are_learnt_whole_and_have_no_answers(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "prose.jsonl"
    path.write_text("".join(json.dumps({"text": f"two\nlines of row {i}"}) + "\n" for i in range(60)))
    options = Lora(data=str(path), samples=40, length=32, batch=8, packing="rows")
    data, _ = training_windows(tiny_llama, path, options, tmp_path)
    tokenizer = Checkpoint.open(tiny_llama).tokenizer()
    rows = {tokenizer.decode(ids[:length]) for ids, length in zip(data.ids, data.lengths(), strict=True)}
    assert len(rows) == 40 and all(row.startswith("two\nlines of row ") for row in rows)
    with pytest.raises(TextError, match="has no questions or instructions with answers"):
        training_windows(tiny_llama, path, Lora(data=str(path), loss="answers"), tmp_path)


def test_no_batch_is_an_error_that_says_what_is_there(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    options = Lora(data=str(questions), samples=8192, length=2048)
    with pytest.raises(
        TextError, match=r"yields no batch: it has \d windows of 2048 tokens, and --lora-batch 8 with 4"
    ):
        training_windows(tiny_llama, questions, options, tmp_path)


def test_questions_train_the_stage_and_its_folder_verifies(
    tiny_llama: Path, run_recipe: Run, questions: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    flags = {"lora__data": str(questions), "lora__steps": 0, "lora__epochs": 1, "lora__samples": 16}
    result = run_recipe(tmp_path / "out", tiny_llama, skip="depth,gptq,eora", **flags)
    checkpoint = result.stages[-1].checkpoint
    assert checkpoint.manifest.facts["steps"] == 3
    assert checkpoint.manifest.calibration["name"] == "questions.jsonl (first four fifths)"
    assert {"loss.json", "loss.png"} <= checkpoint.manifest.files.keys()
    assert verify(checkpoint)
    assert AutoModelForCausalLM.from_pretrained(checkpoint.folder).config.num_hidden_layers == 6
    damaged = shutil.copytree(checkpoint.folder, tmp_path / "damaged")
    (damaged / "loss.json").write_text("{}")
    with pytest.raises(Exception, match=r"loss\.json has"):
        Checkpoint.open(damaged)


def test_a_plan_counts_the_teachers_disk_and_every_fault_of_a_quantised_model() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    steps = {step.stage: step for step in plan(build(None, {"lora.distill": 0.5}), shape)}
    assert steps["lora"].cost.scratch_bytes == 2 * 148 * 512 * 576 * 2
    assert steps["gptq"].cost.scratch_bytes == 2 * 32 * 512 * 576 * 2
    assert next(s for s in plan(build(None, {}), shape) if s.stage == "lora").cost.scratch_bytes == 0
    with pytest.raises(RecipeError) as caught:
        plan(build(None, {}), steps["gptq"].shape)
    for stage in ("depth", "wanda", "lora", "gptq"):
        assert f"{stage} needs dense weights" in str(caught.value)


def test_text_that_is_measured_on_is_left_out_of_training(
    compress: Callable[..., Any], tiny_llama: Path, quick: list[str], tmp_path: Path
) -> None:
    topics = pydoc_data.topics.topics
    names = sorted(topics, key=lambda name: -len(topics[name]))[:12]
    rows = [json.dumps({"text": topics[name]}) for name in names]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "measure.txt").write_text(topics[names[1]].replace("\n", "\r\n"))
    (tmp_path / "copy.txt").write_text("\n\n".join(topics[name] for name in names).upper())
    run = ["--model", tiny_llama, *quick, "--data", tmp_path / "train.jsonl", "--skip", "lora,gptq,eora"]
    out = tmp_path / "out"
    done = compress(*run, "--text", tmp_path / "measure.txt", "-o", out)
    assert done.returncode == 0, done.stderr
    manifests = [json.loads(path.read_text()) for path in sorted(out.glob("[12]-*/manifest.json"))]
    assert [(m["calibration"]["overlap"], m["calibration"]["left_out"] >= 1) for m in manifests] == [(0, True)] * 2
    assert "left out of calibration and training" in (out / "compress.log").read_text()

    refused = compress(*run, "--text", tmp_path / "copy.txt", "-o", tmp_path / "other")
    assert refused.returncode == 2
    assert "would both calibrate and be measured on" in " ".join(refused.stderr.split())
    assert not list((tmp_path / "other").glob("*/manifest.json"))


def test_eval_says_that_a_checkpoint_saw_the_text_before(
    tiny_llama: Path, run_recipe: Run, compress: Run, tmp_path: Path
) -> None:
    """A run measures on the rest of its text; `eval --text` of the same file would measure on what was trained on."""
    seen, other = tmp_path / "seen.txt", tmp_path / "other.txt"
    words = [str(pydoc_data.topics.topics[name]) for name in sorted(pydoc_data.topics.topics)]
    seen.write_text("\n".join(words[:30]))
    other.write_text("\n".join(words[30:60]))
    out = tmp_path / "out"
    run_recipe(out, tiny_llama, data=str(seen), skip="depth,gptq,eora")
    for text, stages in ((seen, ["wanda", "lora"]), (other, [])):
        done = compress(
            "eval", out / "result", tiny_llama, "--text", text, "--window", 64, "--tokens", 512, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        told = [line for line in (done.stderr + done.stdout).splitlines() if "measure on another text" in line]
        assert [line.split("its ")[1].split(" stage")[0] for line in told] == stages
        assert all("saw 'seen.txt (first four fifths)'" in line for line in told)


def mixture(model: Path, spec: str, options: Any, out: Path, stage: str) -> Any:
    recipe = build(None, {"model": str(model), "data": spec, "text": "embedded"})
    return Calibration(recipe, Checkpoint.open(model), out, Runtime()).windows(stage, options)


def test_texts_joined_with_a_plus_share_the_windows(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    options = Wanda(samples=7, length=32)
    found = mixture(tiny_llama, f"self+{questions}", options, tmp_path, "wanda")
    assert found.ids.shape == (7, 32) and found.name.startswith("self + ")
    (written,) = (load_file(path)["ids"] for path in (tmp_path / "calibration").iterdir())
    assert torch.equal(found.ids[:4], written[:4, :32])  # the model's own text: the first text's share is one more
    decode = Checkpoint.open(tiny_llama).tokenizer().decode
    known = "".join(f"What is {i} and {i}?" for i in range(400))
    assert all(decode(row).split("What is ")[1].split(" and")[0] in known for row in found.ids[4:])
    assert found.left_out == 0  # of the file; what the model writes is compared with nothing


def test_all_stages_read_one_text_that_the_model_writes(tiny_llama: Path, tmp_path: Path) -> None:
    """As long as the stage with the longest windows of it wants, whichever stage comes first."""
    stages = (("depth", Depth(length=16)), ("wanda", Wanda(length=32)), ("lora", Lora(length=160, samples=12)))
    plain = build(None, {"model": str(tiny_llama), "data": "self", "text": "embedded"})
    recipe = replace(plain, stages=stages)
    calibration = Calibration(recipe, Checkpoint.open(tiny_llama), tmp_path, Runtime())
    read = {stage: calibration.windows(stage, options).ids for stage, options in recipe.stages}
    (written,) = (load_file(path)["ids"] for path in (tmp_path / "calibration").iterdir())
    positions = Checkpoint.open(tiny_llama).shape.positions
    assert written.shape[1] == min(256, positions or 256)
    for stage, ids in read.items():
        assert torch.equal(ids[:80], written[: len(ids), : ids.shape[1]]), stage


def test_training_on_a_mixture_shuffles_it(tiny_llama: Path, questions: Path, tmp_path: Path) -> None:
    options = Lora(data=f"{questions}+self", samples=24, length=32, batch=8, held_out=4)
    found = mixture(tiny_llama, "embedded", options, tmp_path, "lora")
    assert found.ids.shape == (24, 32)
    (written,) = (load_file(path)["ids"] for path in (tmp_path / "calibration").iterdir())
    own = [any(torch.equal(row, other) for other in written[:, :32]) for row in found.ids]
    assert sum(own) == 12 and own != sorted(own) and own != sorted(own, reverse=True)
    with pytest.raises(TextError, match="writes itself has no answers"):
        mixture(tiny_llama, "embedded", replace(options, loss="answers"), tmp_path, "lora")


def test_what_is_held_back_of_the_first_text_is_measured(tiny_llama: Path, questions: Path) -> None:
    flags = {"model": str(tiny_llama), "protocol": "windows"}
    for spec, measured in [("self+embedded", "embedded"), (f"{questions}+embedded", str(questions)), ("self", "self")]:
        assert build(None, flags | {"data": spec}).evaluation_text == measured
    for spec, fault in [("embedded+no-such", "no text 'no-such'"), ("embedded+", "no text ''")]:
        recipe = build(None, flags | {"data": spec})
        assert any(fault in found for found in text_faults(recipe, recipe.stages))


def test_a_file_with_a_plus_in_its_name_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "a+b.txt"
    assert texts_of(str(path)) == [str(tmp_path / "a"), "b.txt"]
    path.write_text("words")
    assert texts_of(str(path)) == [str(path)]
    assert shares_of("a+b+c", 8) == {"a": 3, "b": 3, "c": 2} and shares_of("a+b", 1) == {"a": 1}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_a_text_is_drawn_token_by_token_from_the_whole_models_odds(
    family: str, tiny_model: Callable[..., Path]
) -> None:
    """Against the model without a cache, and the distribution function read at the generator's numbers."""
    source, runtime = Checkpoint.open(tiny_model(family)), Runtime()
    runtime = replace(runtime, dtype=torch.float32)
    (written,) = sample_text(source, [0], 20, runtime)
    model, generator = source.model(torch.device("cpu"), torch.float32), runtime.generator("self calibration 0")
    for seen in range(1, 20):
        with torch.no_grad():
            odds = model(input_ids=written[:, :seen]).logits[:, -1].double().softmax(-1)
        number = torch.rand(len(written), 1, dtype=torch.float64, generator=generator)
        reached = odds.cumsum(-1)
        drawn = written[:, seen : seen + 1]
        before = reached.gather(1, drawn) - odds.gather(1, drawn)
        # What lies within rounding of a border may fall to either side of it.
        assert ((before - 1e-5 <= number) & (number <= reached.gather(1, drawn) + 1e-5)).all()
