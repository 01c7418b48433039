"""`compress eval --task generation,robustness` on every stage of a run, from local files, and `compare`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.pipeline

Command = Callable[..., "subprocess.CompletedProcess[str]"]
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
    ("arguments", "words"),
    [
        (["--task", "generation", "--from", "generation=FILE"], "line 2: not JSON"),
        (["--task", "robustness", "--robust-task", "generation", "--from", "generation=FILE"], "line 2: not JSON"),
        (["--task", "robustness", "--noise", "much"], "--noise much"),
        (["--task", "robustness", "--robust-task", "speed"], "--robust-task speed"),
        (["--task", "speed", "--speed-tokens", "1"], "2 new tokens"),
    ],
)
def test_mistakes_before_a_model_is_loaded(compress: Command, rows: Path, arguments: list[str], words: str) -> None:
    rows.write_text(rows.read_text().splitlines()[0] + "\n{broken\n")
    done = compress("eval", rows.parent / "no-model", *[a.replace("FILE", str(rows)) for a in arguments])
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
