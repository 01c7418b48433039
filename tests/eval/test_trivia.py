"""Question answering after the thesis: prompts, the forms of files, what is counted, what is wrong with a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError, TextError
from edgepress.checkpoints.runtime import Runtime
from edgepress.eval import trivia
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings

pytestmark = pytest.mark.unit

CLOSED_FORM = {"context": "Question: Who wrote it?\nAnswer:", "answer": "Ann Lee", "aliases": ["A. Lee", "Ann Lee"]}
OPEN_FORM = {
    "question": "who wrote it",
    "answers": ["Ann Lee"],
    "ctxs": [{"text": "A long passage on Ann Lee."}, {"text": "Ann Lee did."}, {"text": " "}],
}
HUB_FORM = {
    "question": "Who wrote it?",
    "question_id": "q_1",
    "answer": {"value": "Ann Lee", "aliases": ["Lee"]},
    "search_results": {"search_context": ["", "The long story.", "Short."]},
}


def settings_for(tmp_path: Path, rows: list[Any], task: str = "triviaqa-closed", **more: Any) -> Settings:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return Settings(sources=(f"{task}={path}",), **more)


def asked(tmp_path: Path, tiny_model: Callable[..., Path], task: str, rows: list[Any], **more: Any) -> list[Any]:
    """The lines of the answer file that a task writes, without its header."""
    settings = settings_for(tmp_path, rows, task, new_tokens=3, answers=str(tmp_path / "answers"), **more)
    run = trivia.closed if task == "triviaqa-closed" else trivia.opened
    run(task, Subject(Checkpoint.open(tiny_model()), Runtime(), "tiny"), settings)
    lines = (tmp_path / "answers" / "tiny" / f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


@pytest.mark.parametrize("row", [CLOSED_FORM, OPEN_FORM | {"question": "Who wrote it?"}, HUB_FORM])
def test_closed_prompts_are_the_thesis_s_whatever_the_file(
    tmp_path: Path, tiny_model: Callable[..., Path], row: dict[str, Any]
) -> None:
    (line,) = asked(tmp_path, tiny_model, "triviaqa-closed", [row])
    assert line["prompt"] == "Question: Who wrote it? Answer:"
    assert line["expected"][0] == "Ann Lee"


@pytest.mark.parametrize(("row", "context"), [(OPEN_FORM, "Ann Lee did."), (HUB_FORM, "Short.")])
def test_open_prompts_have_the_shortest_context_that_is_not_empty(
    tmp_path: Path, tiny_model: Callable[..., Path], row: dict[str, Any], context: str
) -> None:
    (line,) = asked(tmp_path, tiny_model, "triviaqa-open", [row])
    assert line["prompt"] == f"Context: {context} Question: {row['question']} Answer:"


def test_a_context_beyond_the_model_s_positions_is_cut_and_counted(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    long = OPEN_FORM | {"ctxs": [{"text": "Ann Lee did it again. " * 200}]}
    settings = settings_for(tmp_path, [OPEN_FORM, long], "triviaqa-open", new_tokens=5)
    subject = Subject(Checkpoint.open(tiny_model()), Runtime())
    result = trivia.opened("triviaqa-open", subject, settings)
    assert "1 contexts cut to the model's positions" in result.scores[0].protocol
    prompt, cut = trivia._with_context(trivia.load_items("triviaqa-open", settings)[1], subject, settings)
    assert cut and prompt.endswith(" Question: who wrote it Answer:")
    assert 150 < len(subject.tokenizer(prompt)["input_ids"]) <= 256 - 5


def test_tiers_are_counted_apart_and_add_up(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["Ann Lee", "by Ann Lee", "Lee, Ann", "nobody", "Joann Leeds"]
    rows = [CLOSED_FORM | {"context": f"Question: Number {i}?\nAnswer:"} for i in range(5)]
    rows = [row | {"aliases": []} for row in rows]
    monkeypatch.setattr(trivia, "answer_all", _answering(said))
    subject = Subject(Checkpoint.open(tiny_model()), Runtime())
    result = trivia.closed("triviaqa-closed", subject, settings_for(tmp_path, rows))
    values = {score.metric: score.value for score in result.scores}
    assert values == pytest.approx({"accuracy": 0.8, "exact": 0.2, "substring": 0.4, "words": 0.2})
    assert result.details["substring_inside_a_word"] == 1
    assert [score.n for score in result.scores] == [5] * 4


def _answering(said: list[str]) -> Any:
    def answer_all(subject: Any, questions: Any, settings: Any, task: str, grade: Any) -> Any:
        return [trivia.Answer(q, s, 1, 0.1, grade(q, s)) for q, s in zip(questions, said, strict=True)]

    return answer_all


def test_the_thesis_s_number_of_questions_unless_told(tmp_path: Path) -> None:
    rows = [CLOSED_FORM] * 1300
    assert len(trivia.load_items("triviaqa-closed", settings_for(tmp_path, rows))) == 1200
    assert len(trivia.load_items("triviaqa-closed", settings_for(tmp_path, rows, limit=1250))) == 1250


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("", "line 2: empty"),
        ("{oops", "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ({"question": "who?"}, "line 2: no answer"),
        ({"question": "who?", "answers": ["?!"]}, "line 2: no answer"),
        ({"question": " ", "answers": ["a"]}, "line 2: no question"),
        ({"answer": "a"}, "line 2: no question"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(TextError, match=words):
        trivia.check("triviaqa-closed", settings_for(tmp_path, [CLOSED_FORM, row, CLOSED_FORM]))


def test_a_question_without_context_and_a_file_without_questions(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="line 1: no context"):
        trivia.check("triviaqa-open", settings_for(tmp_path, [CLOSED_FORM], "triviaqa-open"))
    with pytest.raises(TextError, match=r"holds no row\. Expected rows of question"):
        trivia.check("triviaqa-closed", settings_for(tmp_path, [], limit=3))
    with pytest.raises(PlanError, match="no such file"):
        trivia.check("triviaqa-closed", Settings(sources=("triviaqa-closed=nowhere.jsonl",)))


def test_the_hub_s_rows_are_read_and_its_absence_names_the_file_form(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked_for = []

    def load_dataset(*arguments: Any, **keywords: Any) -> list[dict[str, Any]]:
        asked_for.append((arguments, keywords))
        return [HUB_FORM | {"search_results": {"search_context": []}, "question_id": "q_0"}, HUB_FORM]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (item,) = trivia.load_items("triviaqa-open", Settings(limit=7))  # the first row has no context
    assert (item.id, item.expected) == ("q_1", ("Ann Lee", "Lee"))
    assert asked_for == [(("mandarjoshi/trivia_qa", "rc"), {"split": "validation", "streaming": True})]

    def unreachable(*arguments: Any, **keywords: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        TextError, match=r"no network\nPass instead a .jsonl, .json or .parquet file with --from triviaqa-closed=FILE"
    ):
        trivia.load_items("triviaqa-closed", Settings(limit=7))
