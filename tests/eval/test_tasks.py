"""The registry answers without torch, knows lm-eval's names, and the perplexity tasks say what they measured."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.runtime import Runtime
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.results import Result
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import TASKS, Settings, find_tasks
from edgepress.eval.text import Text, load_text

pytestmark = pytest.mark.unit


def test_names_and_mistakes_need_no_torch() -> None:
    code = (
        "import sys\nfrom edgepress.eval.tasks import find_tasks\n"
        "try: find_tasks(['helaswag'])\nexcept Exception as e: assert 'hellaswag' in str(e), e\n"
        "else: raise SystemExit('found')\nassert 'torch' not in sys.modules and 'lm_eval' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_place_of_the_registry_exists() -> None:
    for task in TASKS.values():
        if "harness:" not in task.place:  # importing lm-eval takes seconds; the harness tests do
            assert callable(task.load())


def test_unknown_tasks_are_all_named_with_those_there_are() -> None:
    with pytest.raises(PlanError) as raised:
        find_tasks(["mmlu", "arc_eazy", "nonsense"])
    message = str(raised.value)
    assert "'arc_eazy' (near: arc_easy" in message and "'nonsense'" in message
    assert all(name in message for name in TASKS)
    with pytest.raises(PlanError, match="names no task"):
        find_tasks([])


def test_any_task_or_group_of_lm_eval_is_found_by_name() -> None:
    names = ["winogrande", "mmlu_anatomy", "arc_challenge", "mmlu"]
    assert [task.name for task in find_tasks([*names, "mmlu"])] == names


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit": -1}, "--limit -1"),
        ({"new_tokens": 0}, "--new-tokens 0"),
        ({"batch_tokens": 0}, "--batch-tokens 0"),
        ({"shots": -2}, "--shots -2"),
    ],
)
def test_impossible_settings(settings: dict[str, int], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Settings(**settings)  # type: ignore[arg-type]


def test_sources_must_be_task_and_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="expected TASK=FILE"):
        Settings(sources=("questions.jsonl",)).files_of("triviaqa-closed")
    (tmp_path / "a").touch()
    settings = Settings(sources=(f"t={tmp_path / 'a'}", f"u={tmp_path / 'b'}"))
    assert settings.files_of("t") == [tmp_path / "a"]
    with pytest.raises(PlanError, match="no such file or folder"):
        settings.files_of("u")


def run(name: str, folder: Path, settings: Settings) -> Result:
    (task,) = find_tasks([name])
    task.check(settings)
    return task.load()(name, Subject(Checkpoint.open(folder), Runtime()), settings)


def test_wikitext2_gives_both_protocols_and_each_equals_the_plain_measure(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text(load_text("embedded", "whole").documents[0][:6000])
    result = run("wikitext2", tiny_model(), Settings(sources=(f"wikitext2={path}",), window=32, tokens=0, limit=20))
    scores = {score.metric: score for score in result.scores}
    for kind in ("windows", "rows"):
        plain = measure(
            Checkpoint.open(tiny_model()),
            load_text(str(path), "whole"),
            Protocol(kind, 32, 640),
            Runtime(),
        )
        score = scores[f"perplexity, {kind}"]
        assert score.value == pytest.approx(plain.perplexity, rel=1e-9)
        assert scores[f"bits per byte, {kind}"].value == pytest.approx(plain.bits_per_byte, rel=1e-9)
        assert str(Protocol(kind, 32, 640)) in score.protocol and "wiki.raw" in score.protocol
        assert score.low < score.value < score.high
        assert sum(score.weights) == plain.scored_tokens
    assert len(scores["perplexity, windows"].ids) == 20


def test_passages_are_in_the_text_s_order_and_named_by_their_tokens(tiny_model: Callable[..., Path]) -> None:
    from edgepress.eval.perplexity import measure_passages

    rows = ["a much longer row than the other rows", "short row", "short row", "a row of middling length"]
    checkpoint = Checkpoint.open(tiny_model())
    passages = measure_passages(checkpoint, Text("t", ("\n".join(rows),)), Protocol("rows", 64, 0), Runtime())
    lengths = [len(checkpoint.tokenizer()(row)["input_ids"]) for row in rows]
    assert [p.read for p in passages] == lengths
    assert len({p.id for p in passages}) == 4  # equal rows at two places are two items
    assert passages[1].id.split("-")[1] == passages[2].id.split("-")[1]
    assert passages[1].nll == pytest.approx(passages[2].nll)
    assert math.isfinite(sum(p.nll for p in passages))


def test_a_task_that_cannot_compress_the_cache_says_so() -> None:
    for name in ("speed", "robustness", "mmlu"):
        with pytest.raises(PlanError, match="perplexity, wikitext2"):
            find_tasks([name])[0].check(Settings(kv_bits=4))
