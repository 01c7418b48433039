"""lm-eval's tasks on a tiny model from local files; our perplexity against lm-eval's own."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError, TextError
from edgepress.checkpoints.runtime import Runtime, Silent
from edgepress.eval import chat, harness_data
from edgepress.eval.harness import KeptModel
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.results import Result
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings, find_tasks
from edgepress.eval.text import Text

pytestmark = pytest.mark.pipeline

Tiny = Callable[..., Path]
TURN, ANSWER = {"role": "user", "content": "Open?"}, {"role": "assistant", "content": "Yes"}
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "hellaswag": lambda i: {
        "activity_label": "Running",
        "ctx_a": f"A man runs {i} miles.",
        "ctx_b": "he",
        "endings": ["falls down.", "jumps high.", "stops.", f"eats {i} apples."],
        "label": str(i % 4),
        "ind": i,
    },
    "arc_easy": lambda i: {
        "id": str(i),
        "question": f"What is {i} plus one?",
        "choices": {"text": [str(i), str(i + 1), "none", "many"], "label": list("ABCD")},
        "answerKey": "B",
    },
    "piqa": lambda i: {"goal": f"open jar {i}", "sol1": "twist the lid", "sol2": "eat the lid", "label": i % 2},
    "wikitext": lambda i: {"page": f" = Title {i} = \n The cat , number {i} , sat on the mat . It slept @-@ well .\n"},
}


def subject_of(folder: Path) -> Subject:
    return Subject(Checkpoint.open(folder), Runtime(progress=Silent()), "tiny")


def run(name: str, folder: Path, source: Path, **more: Any) -> Result:
    settings = Settings(sources=(f"{name}={source}",), **more)
    (task,) = find_tasks([name])
    task.check(settings)
    return task.load()(name, subject_of(folder), settings)


def write_rows(path: Path, name: str, count: int = 8) -> Path:
    path.write_text("".join(json.dumps(ROWS[name](i)) + "\n" for i in range(count)))
    return path


def write_mmlu(folder: Path) -> Path:
    for split, count in (("dev", 5), ("test", 4)):
        (folder / split).mkdir(parents=True)
        for subject in ("anatomy", "virology"):
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                rows = [[f'{i}, "so"?', "1", "NA", f"{i}", "none", "ABCD"[i % 4]] for i in range(count)]
                csv.writer(file).writerows(rows)
    return folder


@torch.no_grad()
def continuation_log_likelihood(folder: Path, context: str, continuation: str) -> float:
    subject = subject_of(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = len(subject.tokenizer(context)["input_ids"])
    ids = torch.tensor([subject.tokenizer(context + continuation)["input_ids"]])
    logits = F.log_softmax(model(input_ids=ids).logits[0, start - 1 : -1], dim=-1)
    return float(logits.gather(-1, ids[0, start:, None]).sum())


def test_piqa_is_scored_as_a_plain_loop_scores_it(tiny_model: Tiny, tmp_path: Path) -> None:
    result = run("piqa", tiny_model(), write_rows(tmp_path / "rows.jsonl", "piqa"))
    accuracy = next(score for score in result.scores if score.metric == "acc")
    expected = []
    for i in range(8):
        row = ROWS["piqa"](i)
        both = [
            continuation_log_likelihood(tiny_model(), f"Question: {row['goal']}\nAnswer:", f" {row[s]}")
            for s in ("sol1", "sol2")
        ]
        expected.append(float(both.index(max(both)) == row["label"]))
    assert list(accuracy.values) == expected
    assert "0-shot; rows.jsonl; float32" in accuracy.protocol


@pytest.mark.parametrize("name", ["hellaswag", "arc_easy"])
def test_multiple_choice_from_local_rows(tiny_model: Tiny, tmp_path: Path, name: str) -> None:
    result = run(name, tiny_model(), write_rows(tmp_path / "rows.jsonl", name), limit=6)
    assert [score.metric for score in result.scores] == ["acc", "acc_norm"]
    assert all(score.n == 6 and score.low <= score.value <= score.high for score in result.scores)


def test_mmlu_from_csv_has_five_examples_the_authors_prompt_and_resumes(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = tiny_model("llama", max_position_embeddings=1024)
    source, answers = write_mmlu(tmp_path / "mmlu"), tmp_path / "answers"
    result = run("mmlu", folder, source, answers=str(answers))
    (score,) = result.scores
    assert (score.metric, score.n) == ("acc", 8)
    assert "5-shot" in score.protocol and "cut" not in score.protocol
    assert set(result.details["subtasks"]) == {"mmlu_anatomy", "mmlu_virology"}
    path = answers / "tiny" / "mmlu.jsonl"
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    assert len(rows) == 2 * 4 * 4
    prompt = next(row["prompt"] for row in rows if "anatomy" in row["prompt"])
    assert prompt.startswith(
        'The following are multiple choice questions (with answers) about anatomy.\n\n0, "so"?\nA. 1\n'
    )
    assert prompt.count("\nAnswer: ") == 5 and prompt.endswith("\nAnswer:")
    # by hand: the likeliest letter is the answer
    best = {}
    for row in rows:
        best.setdefault(row["prompt"], []).append((row["answer"][0], row["continuation"].strip()))
    hits = [
        max(choices)[1] == "ABCD"[int(re.findall(r"(\d), \"so\"", prompt)[-1]) % 4] for prompt, choices in best.items()
    ]
    assert score.value == pytest.approx(sum(hits) / len(hits))
    # an interrupted run: half the lines are kept, the rest is computed again, the numbers are the same
    path.write_text("\n".join(lines[:15]) + "\n")
    again = run("mmlu", folder, source, answers=str(answers))
    assert again.scores == result.scores
    assert path.read_text().splitlines()[:15] == lines[:15]
    assert len(path.read_text().splitlines()) == len(lines)


def test_prompts_beyond_the_model_s_positions_are_counted(tiny_model: Tiny, tmp_path: Path) -> None:
    result = run("mmlu_anatomy", tiny_model("llama", max_position_embeddings=64), write_mmlu(tmp_path / "mmlu"))
    assert "16 prompts cut on the left to 64 tokens" in result.scores[0].protocol


def test_our_perplexity_becomes_lm_eval_s_word_perplexity(tiny_model: Tiny, tmp_path: Path) -> None:
    """lm-eval predicts each document's first token too, from a begin mark; our rows begin with that mark here."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    pages = [ROWS["wikitext"](i)["page"] for i in range(8)]
    documents = [wikitext_detokenizer({"page": page}).replace("\n", " ") for page in pages]
    # our rows end at line ends, so what lm-eval reads has none within a page
    single = tmp_path / "single.jsonl"
    single.write_text("".join(json.dumps({"page": document}) + "\n" for document in documents))
    theirs = {score.metric: score for score in run("wikitext", tiny_model(), single).scores}
    checkpoint = Checkpoint.open(tiny_model())
    text = Text("pages", tuple(f"<s>{wikitext_detokenizer({'page': document})}" for document in documents))
    ours = measure(checkpoint, text, Protocol("rows", 256, 0), Runtime())
    nats = math.log(ours.perplexity) * ours.scored_tokens
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    assert theirs["word_perplexity"].value == pytest.approx(math.exp(nats / words), rel=1e-5)
    size = sum(len(document.encode()) for document in documents)
    assert theirs["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_data_that_cannot_be_reached_name_the_form_of_file(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*arguments: Any, **keywords: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name, words in (("piqa", r"no network\nPass instead a .jsonl file"), ("mmlu", "headerless .csv files")):
        (task,) = find_tasks([name])
        with pytest.raises(TextError, match=words):
            task.load()(name, subject_of(tiny_model()), Settings())


def test_rows_of_another_form_and_a_missing_chat_template(tiny_model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"lm-eval cannot make 'arc_easy' of .*rows.jsonl"):
        run("arc_easy", tiny_model(), write_rows(tmp_path / "rows.jsonl", "piqa"))
    with pytest.raises(PlanError, match="no chat template"):
        run("piqa", tiny_model(), write_rows(tmp_path / "rows.jsonl", "piqa"), chat=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [("", "line 3: expected .*empty line"), ("q,1,2,3,4,E", "line 3: .*'E'"), ("q,1,2,3,A", "line 3: .*5 columns")],
)
def test_a_bad_csv_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    folder = write_mmlu(tmp_path / "mmlu")
    path = folder / "test" / "anatomy_test.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(TextError, match=words):
        harness_data.check("mmlu", Settings(sources=(f"mmlu={folder}",)))


def test_local_files_that_do_not_fit(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n{oops\n')
    with pytest.raises(TextError, match="line 2"):
        harness_data.check("piqa", Settings(sources=(f"piqa={rows}",)))
    rows.write_text("")
    with pytest.raises(TextError, match="holds no row"):
        harness_data.check("piqa", Settings(sources=(f"piqa={rows}",)))
    write_rows(rows, "piqa")
    with pytest.raises(PlanError, match=r"give a folder with train.jsonl"):
        harness_data.check("piqa", Settings(sources=(f"piqa={rows}",), shots=2))
    with pytest.raises(TextError, match=r"SUBJECT_test.csv"):
        harness_data.check("mmlu", Settings(sources=(f"mmlu={tmp_path}",)))


def with_template(folder: Path, to: Path, template: str) -> Path:
    shutil.copytree(folder, to)
    (to / "chat_template.jinja").write_text(template)
    return to


def test_a_chat_template_writes_the_prompts_and_may_know_no_system_turn(tiny_model: Tiny, tmp_path: Path) -> None:
    """The prompts are lm-eval's own: those of its unbounded call to the same template."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
    )
    folder = with_template(tiny_model(), tmp_path / "chat", template)
    rows = write_rows(tmp_path / "rows.jsonl", "piqa")
    run("piqa", folder, rows, chat=True, answers=str(tmp_path / "answers"))
    kept = (tmp_path / "answers/tiny/piqa.jsonl").read_text().splitlines()[1:]
    prompts = {json.loads(line)["prompt"] for line in kept}
    assert prompts == {f"<user>Question: open jar {i}\nAnswer:<answer>" for i in range(8)}
    model = KeptModel(subject_of(folder), Settings(), "piqa")
    system = {"role": "system", "content": "Be brief."}
    for turns, asks in (([TURN], True), ([system, TURN], True), ([TURN, ANSWER], False)):
        assert model.apply_chat_template(turns, asks) == HFLM.apply_chat_template(model, turns, asks)


def test_a_chat_template_without_end_is_an_error(tiny_model: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 0.5)
    nines = "{% for x in range(99999) %}" * 3 + "{% endfor %}" * 3
    folder = with_template(tiny_model(), tmp_path / "chat", nines)
    with pytest.raises(TextError, match="did not come to an end"):
        run("piqa", folder, write_rows(tmp_path / "rows.jsonl", "piqa"), chat=True)


def test_a_token_that_the_embedding_lacks_is_an_error(tiny_model: Tiny) -> None:
    model = KeptModel(subject_of(tiny_model()), Settings(), "piqa")
    vocabulary = model._subject.checkpoint.shape.vocabulary
    model.tokenizer.add_tokens([f"<more{i}>" for i in range(vocabulary)])
    assert model.tok_encode("open")
    with pytest.raises(TextError, match="the embedding has"):
        model.tok_encode(f"open <more{vocabulary - 1}>")
    with pytest.raises(TextError, match="the embedding has"):
        model.tok_batch_encode(["open", f"<more{vocabulary - 1}>"])
