"""The tasks generation, speed and robustness on tiny models, from local files, the way `compress eval` calls them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.disturb import Disturbance
from edgepress.checkpoints.errors import PlanError, TextError
from edgepress.checkpoints.runtime import Runtime, Silent
from edgepress.eval import metrics
from edgepress.eval.answers import Answer, Question
from edgepress.eval.generation import output_kib
from edgepress.eval.metrics import bleu, bleu_terms, f1, rouge_l
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.results import Result
from edgepress.eval.speed import Workload, measure_speed, time_once
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings, find_tasks
from edgepress.eval.text import load_text

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def run(task: str, folder: Path, settings: Settings, progress: Silent | None = None) -> Result:
    subject = Subject(Checkpoint.open(folder), Runtime(progress=progress or Silent()))
    return find_tasks([task])[0].load()(task, subject, settings)


def by_name(result: Result) -> dict[str, Any]:
    return {score.metric: score for score in result.scores}


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    topics = ["for", "while", "try", "with"]
    alpaca = [{"instruction": f"Explain {t}.", "input": "", "output": f"The {t} statement is a"} for t in topics]
    dolly = [{"prompt": f"### {t}", "answer": f"{t} is used"} for t in topics[:3]]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dolly))
    return {name: tmp_path / name for name in ("alpaca.json", "dolly.jsonl")}


def settings(files: dict[str, Path], tmp_path: Path, **more: Any) -> Settings:
    sources = tuple(f"generation={path}" for path in files.values())
    return Settings(sources=sources, answers=str(tmp_path / "answers"), reply_tokens=12, sbert="none", **more)


def test_generation_scores_each_set_by_its_stored_answers(
    tiny_model: TinyModel, files: dict[str, Path], tmp_path: Path
) -> None:
    notes = Notes()
    result = run("generation", tiny_model(), settings(files, tmp_path), notes)
    scores = by_name(result)
    for name, count in (("alpaca", 4), ("dolly", 3)):
        stored = next((tmp_path / "answers").rglob(f"generation-{name}.jsonl"))
        rows = [json.loads(line) for line in stored.read_text().splitlines()[1:]]
        assert len(rows) == count
        said = [row["answer"] for row in sorted(rows, key=lambda row: int(row["id"]))]
        wanted = [row["expected"][0] for row in sorted(rows, key=lambda row: int(row["id"]))]
        assert scores[f"rouge_l, {name}"].value == pytest.approx(statistics.fmean(rouge_l(said, wanted)))
        assert scores[f"f1, {name}"].value == pytest.approx(statistics.fmean(map(f1, said, wanted)))
        assert scores[f"bleu, {name}"].value == pytest.approx(bleu(bleu_terms(said, wanted)))
        for metric in ("rouge_l", "f1", "bleu", "seconds"):
            score = scores[f"{metric}, {name}"]
            assert score.low <= score.value <= score.high and score.n == count
        unmeasured = scores[f"sbert, {name}"]
        assert math.isnan(unmeasured.value) and unmeasured.protocol.endswith("not measured: --sbert none")
        assert f"generation: {unmeasured.protocol}" in notes.notes
    shown = json.loads(json.dumps(result.to_dict(items=True), allow_nan=False))
    assert [s["value"] for s in shown["scores"] if s["metric"].startswith("sbert")] == [None, None]
    assert str(Result.from_dict(shown)) == str(replace(result, details=shown["details"]))  # nan is not equal to nan
    assert scores["model size"].value == pytest.approx(Checkpoint.open(tiny_model()).shape.model_mib)


def test_sbert_is_a_score_like_the_others(
    tiny_model: TinyModel, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Encoder:
        def encode(self, texts: list[str], show_progress_bar: bool) -> list[list[float]]:
            return [[len(text) + 1.0, 3.0] for text in texts]

    monkeypatch.setattr(metrics, "_encoder", lambda place, device: Encoder())
    given = replace(settings(files, tmp_path), sbert="some/model")
    scores = by_name(run("generation", tiny_model(), given))
    assert 0 < scores["sbert, dolly"].low <= scores["sbert, dolly"].value <= scores["sbert, dolly"].high <= 1
    assert scores["sbert, dolly"].protocol.count("sbert: model;") == 1


def test_limit_chat_and_rows_that_do_not_fit(tiny_model: TinyModel, files: dict[str, Path], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in files["dolly.jsonl"].read_text().splitlines()]
    rows[1]["prompt"] = "too long " * 200
    files["dolly.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = Notes()
    result = run("generation", tiny_model(), settings(files, tmp_path), notes)
    assert result.details["dolly"] == {"rows": 2, "too_long": 1, "unusable": 0}
    assert any("1 of 3 rows of 'dolly' left out" in note for note in notes.notes)
    limited = run("generation", tiny_model(), replace(settings(files, tmp_path), limit=1, answers=""))
    assert limited.details["alpaca"]["rows"] == 1
    with pytest.raises(PlanError, match="no chat template"):
        run("generation", tiny_model(), replace(settings(files, tmp_path), chat=True, answers=""))
    long = replace(settings({"d": files["dolly.jsonl"]}, tmp_path), reply_tokens=254)
    with pytest.raises(TextError, match="--reply-tokens"):
        run("generation", tiny_model(), long)


def test_two_files_of_one_name_are_refused(tiny_model: TinyModel, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "dolly.jsonl"
    twin.write_text(files["dolly.jsonl"].read_text())
    with pytest.raises(PlanError, match="same name"):
        run("generation", tiny_model(), settings(files | {"twin": twin}, tmp_path))


def test_output_size_is_that_of_a_file_of_them(tmp_path: Path) -> None:
    answers = [Answer(Question(str(i), f"Frage {i}?", ("Straße",)), "naïve\n", 2, 0.1) for i in range(3)]
    path = tmp_path / "out.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for a in answers:
            row = {"prompt": a.question.prompt, "answer": a.text, "reference": "Straße"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    assert output_kib(answers) == path.stat().st_size / 1024


def test_model_size_is_equation_2_55(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("qwen2", tie_word_embeddings=False))
    tensors = dict(checkpoint.outer())
    for index in range(len(checkpoint.shape.blocks)):
        tensors |= {f"{index}.{name}": t for name, t in checkpoint.stored_block(index).items()}
    bits = sum(t.numel() * t.element_size() * 8 for t in tensors.values())
    assert checkpoint.shape.model_mib == pytest.approx(bits / (8 * 1024**2))


# --- speed: what is counted, never how fast it is -----------------------------------------------------------------


def test_time_once_decodes_what_a_plain_loop_decodes(tiny_model: TinyModel) -> None:
    """One pass over the prompt, then single tokens; the tokens are the greedy ones."""
    model: Any = Checkpoint.open(tiny_model()).model()
    ids = torch.arange(5, 15).unsqueeze(0)
    widths, fed = [], []
    original = model.forward

    def forward(**given: Any) -> Any:
        widths.append(given["input_ids"].shape[1])
        fed.append(given["input_ids"][0].tolist())
        return original(**given)

    model.forward = forward
    repeat = time_once(model, ids, 6)
    model.forward = original
    assert widths == [10, 1, 1, 1, 1, 1]
    sequence = ids[0].tolist()
    with torch.no_grad():
        for tokens in fed[1:]:
            sequence.append(int(model(input_ids=torch.tensor([sequence])).logits[0, -1].argmax()))
            assert tokens == sequence[-1:]
    assert 0 < repeat.prefill_seconds <= repeat.first_token_seconds and repeat.decode_seconds > 0


@pytest.mark.parametrize(
    ("engine", "workload", "words"),
    [
        ("effective", Workload(250, 20), "256 positions"),
        ("warp", Workload(4, 2), "effective and kernels"),
        ("kernels", Workload(4, 2), "not quantised"),
    ],
)
def test_speed_that_cannot_be_measured(tiny_model: TinyModel, engine: str, workload: Workload, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        measure_speed(Checkpoint.open(tiny_model()), engine, workload, torch.device("cpu"), torch.float32)


def test_a_workload_of_one_token_has_no_decoding() -> None:
    with pytest.raises(PlanError, match="2 new tokens"):
        Workload(8, 1)


# --- robustness -----------------------------------------------------------------------------------------------------


def test_robustness_of_perplexity(tiny_model: TinyModel) -> None:
    given = Settings(noise="0,0.4", mask="0.2", seeds=2, window=32, tokens=256)
    result = run("robustness", tiny_model(), given)
    checkpoint, text = Checkpoint.open(tiny_model()), load_text("embedded", "evaluate")

    def plain(disturbance: Disturbance | None) -> float:
        return measure(checkpoint, text, Protocol("windows", 32, 256), Runtime(), disturbance).perplexity

    names = [score.metric for score in result.scores]
    assert names == [
        f"perplexity, {x}" for x in ("undisturbed", "gate-noise 0", "gate-noise 0.4", "attention-mask 0.2")
    ]
    first, still, noisy, masked = result.scores
    assert first.value == still.value == plain(None)
    expected = [plain(Disturbance("gate-noise", 0.4, seed)) for seed in (0, 1)]
    assert noisy.value == pytest.approx(statistics.fmean(expected))
    assert (noisy.low, noisy.high) == (min(expected), max(expected))
    assert result.details["levels"][1]["spread"] == pytest.approx(statistics.stdev(expected))
    assert noisy.values == tuple(expected) and noisy.ids == ("seed 0", "seed 1")
    assert not masked.higher_is_better and "2 seeds" in masked.protocol
    assert result.details["levels"][1]["values"] == tuple(expected)


def test_robustness_reads_the_text_of_the_perplexity_task(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("A text of one's own. " * 60)
    given = Settings(noise="0", mask="", seeds=1, window=32, sources=(f"perplexity={path}",), limit=3)
    undisturbed = run("robustness", tiny_model(), given).scores[0]
    plain = run("perplexity", tiny_model(), given).scores[0]
    assert undisturbed.value == pytest.approx(plain.value)
    assert plain.protocol in undisturbed.protocol and "own.txt" in undisturbed.protocol


def test_robustness_of_a_tasks_score(tiny_model: TinyModel, files: dict[str, Path], tmp_path: Path) -> None:
    """The references are the model's own answers, so that undisturbed it scores 1 and any change shows."""
    given = settings({"alpaca": files["alpaca.json"]}, tmp_path)
    run("generation", tiny_model(), given)
    stored = next((tmp_path / "answers").rglob("*.jsonl"))
    said = {row["id"]: row["answer"] for row in map(json.loads, stored.read_text().splitlines()[1:])}
    rows = json.loads(files["alpaca.json"].read_text())
    answered = [row | {"output": said[str(n)] + " the end"} for n, row in enumerate(rows, 1)]
    files["alpaca.json"].write_text(json.dumps(answered))
    before = stored.read_bytes()

    given = replace(given, noise="0,3", mask="", seeds=2, robust_task="generation")
    undisturbed, still, noisy = run("robustness", tiny_model(), given).scores
    assert undisturbed.value == still.value > 0.1
    assert noisy.value < undisturbed.value and noisy.higher_is_better
    assert stored.read_bytes() == before  # answers that noise made are never kept as the checkpoint's


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"robust_task": "speed"}, "--robust-task speed"),
        ({"robust_task": "nonsense"}, "there is no task 'nonsense'"),
        ({"noise": "", "mask": ""}, "at least one strength"),
        ({"noise": "-1"}, "standard deviation"),
    ],
)
def test_robustness_that_cannot_be_measured(tiny_model: TinyModel, more: dict[str, str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        run("robustness", tiny_model(), Settings(**more))  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{"noise": "a"}, {"seeds": 0}, {"reply_tokens": 0}, {"mask": "0.1;0.2"}])
def test_settings_are_checked_before_anything_runs(more: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="--"):
        Settings(**more)
