"""`compress eval --task generation,robustness` on every stage of a run, from local files, and `compare`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.eval.tasks import Settings, find_tasks
from edgepress.pipeline.evaluate import check_request

pytestmark = pytest.mark.pipeline

Command = Callable[..., Any]
SHORT = ("--reply-tokens", 8, "--sbert", "none")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    facts = [{"instruction": f"Explain {t}.", "context": "", "response": f"The {t}"} for t in ("for", "try", "if")]
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return path


def test_generation_and_robustness_of_a_run(compress: Command, chain: Path, rows: Path, tmp_path: Path) -> None:
    robust = ("--noise", "0.05", "--mask", "", "--seeds", 2, "--window", 64, "--tokens", 256)
    done = compress(
        "eval", chain, "--task", "generation,robustness", "--from", f"generation={rows}", *SHORT, *robust,
        "--answers", tmp_path / "answers", "-o", tmp_path / "report.json", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checkpoints = json.loads(done.stdout)["checkpoints"]
    assert len(checkpoints) == 6
    for checkpoint in checkpoints:
        generation, robustness = (checkpoint["results"][task]["scores"] for task in ("generation", "robustness"))
        assert [s["metric"] for s in generation[:4]] == ["rouge_l, rows", "f1, rows", "sbert, rows", "bleu, rows"]
        assert generation[2]["value"] is None and "not measured: --sbert none" in generation[2]["protocol"]
        assert [s["metric"] for s in robustness] == ["perplexity, undisturbed", "perplexity, gate-noise 0.05"]
        assert robustness[1]["low"] <= robustness[1]["value"] <= robustness[1]["high"]
        stored = tmp_path / "answers" / checkpoint["label"] / "generation-rows.jsonl"
        assert [json.loads(line)["expected"] for line in stored.read_text().splitlines()[1:]]
    sizes = [c["results"]["generation"]["scores"][-1]["value"] for c in checkpoints]
    assert sizes[1] < sizes[0] and sizes[4] < sizes[3]  # depth and quantisation make it smaller
    assert (tmp_path / "report.png").stat().st_size > 0

    first, last = (f"{tmp_path / 'report.json'}:{checkpoints[i]['label']}" for i in (0, -1))
    compared = compress("compare", first, last, "--task", "generation", "--json")
    assert compared.returncode == 0, compared.stderr
    metrics = [d["metric"] for d in json.loads(compared.stdout)["differences"]]
    assert metrics == ["rouge_l, rows", "f1, rows", "seconds, rows"]  # a corpus's BLEU has no items to pair


@pytest.mark.parametrize(
    ("tasks", "more", "words"),
    [
        ("generation", {"sources": ("generation=FILE",)}, "line 2: not JSON"),
        ("robustness", {"robust_task": "generation", "sources": ("generation=FILE",)}, "line 2: not JSON"),
        ("robustness", {"sources": ("generation=FILE",)}, "'generation' is not among the tasks"),
        ("robustness", {"robust_task": "speed"}, "--robust-task speed"),
        ("robustness", {"noise": "", "mask": "2"}, "a probability lies between 0 and 1"),
        ("speed", {"speed_tokens": 1}, "2 new tokens"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(rows: Path, tasks: str, more: dict[str, Any], words: str) -> None:
    rows.write_text(rows.read_text().splitlines()[0] + "\n{broken\n")
    if "sources" in more:
        more = more | {"sources": tuple(source.replace("FILE", str(rows)) for source in more["sources"])}
    with pytest.raises(PlanError, match=words):
        check_request(find_tasks([tasks]), Settings(**more))
