"""`compress eval` and `compress compare` as a person runs them: all stages at once, resume, and mistakes."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.pipeline


Command = Callable[..., Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local files for every task."""
    folder = tmp_path_factory.mktemp("data")
    rows: dict[str, list[dict[str, Any]]] = {
        "triviaqa-closed": [
            {"context": f"Question: What is {i}?\nAnswer:", "answer": "e", "aliases": ["a"]} for i in range(12)
        ],
        "triviaqa-open": [
            {"question": f"what is {i}", "answers": ["number"], "ctxs": [{"text": f"{i} is a number."}]}
            for i in range(12)
        ],
        "hellaswag": [
            {"activity_label": "A", "ctx_a": f"{i} men run.", "ctx_b": "they", "endings": list("abcd"), "label": "1"}
            for i in range(4)
        ],
        "arc_easy": [
            {"question": f"{i}?", "choices": {"text": list("wxyz"), "label": list("ABCD")}, "answerKey": "C"}
            for i in range(4)
        ],
        "piqa": [{"goal": f"open {i}", "sol1": "turn", "sol2": "eat", "label": 0} for i in range(4)],
    }
    for name, items in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    (folder / "wikitext2.raw").write_text("Some words that are measured, line by line.\n" * 80)
    for split in ("dev", "test"):
        (folder / "mmlu" / split).mkdir(parents=True)
        with (folder / "mmlu" / split / f"anatomy_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[f"{i}?", "1", "2", "3", "4", "ABCD"[i % 4]] for i in range(5)])
    return folder


def sources(data: Path, tasks: str) -> list[str]:
    places = {"wikitext2": "wikitext2.raw", "mmlu": "mmlu"}
    return [f"--from={task}={data / places.get(task, f'{task}.jsonl')}" for task in tasks.split(",")]


@pytest.fixture
def store(chain: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, since answers and reports are written into it."""
    shutil.copytree(chain, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


def _score(measured: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    return next(s for s in measured["results"][task]["scores"] if s["metric"] == metric)


def _paired(one: dict[str, Any], two: dict[str, Any]) -> tuple[float, float]:
    """95 % of two - one over windows drawn with replacement, the same windows of both: numpy alone."""
    drawn = np.random.default_rng(0)
    places = [drawn.integers(one["n"], size=one["n"]) for _ in range(2000)]
    values = [[np.array(s[name]) for name in ("values", "weights")] for s in (one, two)]
    a, b = (np.array([math.exp(v[p].sum() / w[p].sum()) for p in places]) for v, w in values)
    return tuple(np.quantile(b - a, [0.025, 0.975]).tolist())


def test_all_stages_of_a_run_give_one_table_and_one_figure(compress: Command, store: Path, data: Path) -> None:
    tasks = "wikitext2,triviaqa-closed,piqa"
    short = ["--window", 32, "--limit", 4, "--new-tokens", 4]
    done = compress("eval", store, "--task", tasks, *short, *sources(data, tasks))
    assert done.returncode == 0, done.stderr
    stages = sorted(path.name for path in store.glob("[1-5]-*"))
    assert len(stages) == 5 and all(f" {stage} " in done.stdout for stage in stages)
    assert "triviaqa-closed: closed book; triviaqa-closed.jsonl; greedy, 1 to 4 tokens" in done.stdout
    assert "windows of 32, first 128 tokens" in done.stdout and "rows cut to 32" in done.stdout
    report = json.loads((store / "evaluation.json").read_text())
    assert [m["label"] for m in report["checkpoints"][1:]] == stages
    for m in report["checkpoints"]:
        assert list(m["results"]) == tasks.split(",")
        for result in m["results"].values():
            assert all(s["protocol"] and s["low"] <= s["value"] <= s["high"] for s in result["scores"])
    assert (store / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    # each stage against the one before it, paired as `compare` pairs two checkpoints
    assert [(c["a"], c["b"]) for c in report["changes"]] == list(pairwise(m["label"] for m in report["checkpoints"]))
    assert "each stage against the one before it, paired" in done.stdout
    for before, after, change in zip(report["checkpoints"], report["checkpoints"][1:], report["changes"], strict=False):
        assert {d["task"] for d in change["differences"]} == set(tasks.split(",")) and not change["unpaired"]
        for d in change["differences"]:
            one, two = (_score(m, d["task"], d["metric"]) for m in (before, after))
            assert (d["a"], d["b"]) == (one["value"], two["value"])
            if d["metric"] == "perplexity":
                assert (d["low"], d["high"]) == pytest.approx(_paired(one, two))
    # the report is enough to compare two stages later
    names = [f"{store / 'evaluation.json'}:{stage}" for stage in stages]
    compared = compress("compare", names[0], names[1], "--task", "wikitext2", "--json")
    assert compared.returncode == 0, compared.stderr
    for row in json.loads(compared.stdout)["differences"]:
        assert row["n"] == (4 if "windows" in row["metric"] else row["n"])
        assert row["verdict"] in ("within noise", "B is better", "B is worse")


def test_every_task_runs_from_local_files(compress: Command, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    tasks = "perplexity,wikitext2,triviaqa-closed,triviaqa-open,mmlu,hellaswag,arc_easy,piqa"
    places = sources(data, tasks.removeprefix("perplexity,"))
    call = ["eval", tiny_llama, "--task", tasks, *places, "--window", 32, "--limit", 2, "--new-tokens", 3, "--json"]
    done = compress(*call, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["checkpoints"]
    assert list(found["results"]) == tasks.split(",")
    assert all(r["seconds"] > 0 and r["scores"][0]["n"] == 2 for r in found["results"].values())


def test_compare_runs_both_and_tells_noise_from_difference(
    compress: Command, make_tiny: Callable[..., Path], tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    other = make_tiny(tmp_path / "other", blocks=2)
    tasks = "triviaqa-closed,perplexity"
    call = ["compare", tiny_llama, other, "--task", tasks, *sources(data, "triviaqa-closed"), "--new-tokens", 3]
    call += ["--window", 32, "--tokens", 640]
    done = compress(*call, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {(row["task"], row["metric"]): row for row in json.loads(done.stdout)["differences"]}
    loss = rows["perplexity", "perplexity"]
    assert loss["difference"] == pytest.approx(loss["b"] - loss["a"])
    assert loss["n"] == 20 and loss["test"] == "paired bootstrap"
    assert rows["triviaqa-closed", "accuracy"]["test"] == "exact McNemar"
    shown = compress(*call, cwd=tmp_path)  # the second time from the kept answers
    assert shown.returncode == 0 and "A: tiny-llama" in shown.stdout and loss["verdict"] in shown.stdout
    assert (tmp_path / "answers" / "other" / "triviaqa-closed.jsonl").is_file()


def test_one_checkpoint_gives_its_numbers_as_json_and_as_a_table(
    compress: Command, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    call = ["eval", tiny_llama, "--task", "triviaqa-open", *sources(data, "triviaqa-open"), "--new-tokens", 3]
    done = compress(*call, "--answers", "none", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["checkpoints"]
    assert [s["metric"] for s in found["results"]["triviaqa-open"]["scores"]] == [
        *("accuracy", "exact", "substring", "words")
    ]
    assert not list(tmp_path.iterdir())
    shown = compress(*call, "-o", "report/mine.json", cwd=tmp_path)
    assert shown.returncode == 0 and "accuracy" in shown.stdout and "%" in shown.stdout
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["answers", "mine.json"]
    report = tmp_path / "report" / "mine.json"
    assert compress("compare", report, report).returncode == 0
    report.write_text(report.read_text().replace('"n": ', '"n": 1', 1))
    done = compress("compare", report, report)
    assert done.returncode == 2 and "is damaged or was edited: it does not have the sha256" in done.stderr


def test_a_report_goes_to_a_device_and_nothing_beside_it(
    compress: Command, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    call = ["eval", tiny_llama, "--task", "triviaqa-open", *sources(data, "triviaqa-open"), "--new-tokens", 2]
    before = sorted(Path("/dev").iterdir())
    assert compress(*call, "-o", "/dev/null", cwd=tmp_path).returncode == 0
    assert sorted(Path("/dev").iterdir()) == before
    for out, words in ((tmp_path, "is a folder"), (tiny_llama / "config.json" / "x.json", "is a file, not a folder")):
        done = compress(*call, "-o", out, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "--task", "mmlu,mmlu_magic"], ["there is no task 'mmlu_magic'", "triviaqa-closed"]),
        (["MODEL", "--task", "piqa", "--from", "mmlu=x"], ["'mmlu' is not among the tasks piqa"]),
        (["MODEL", "--task", "piqa,mmlu", "--from", "piqa=a", "--from", "mmlu=b"], ["piqa=a: there", "mmlu=b: there"]),
        (["UNFINISHED", "nowhere", "--task", "perplexity"], ["still being written", "there is no model 'nowhere'"]),
        (["MODEL", "MODEL"], ["is named twice"]),
        (["MODEL", "--limit", "-3"], ["--limit -3"]),
        (["STORE"], ["has no result yet"]),
    ],
)
def test_mistakes_are_named_at_once(
    compress: Command, tiny_llama: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "unfinished" / ".work").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".edgepress").touch()
    places = {"MODEL": tiny_llama, "UNFINISHED": tmp_path / "unfinished", "STORE": tmp_path / "store"}
    done = compress("eval", *(places.get(a, a) for a in arguments), cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert all(word in done.stderr.replace("\n", " ") for word in words)


def test_answers_of_another_checkpoint_are_not_taken_over(
    compress: Command, make_tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    call = ["--task", "triviaqa-closed", *sources(data, "triviaqa-closed"), "--new-tokens", 2, "--limit", 3]
    for place, blocks in (("a", 2), ("b", 3)):
        model = make_tiny(tmp_path / place / "model", blocks=blocks)
        done = compress("eval", model, *call, cwd=tmp_path)
    assert done.returncode == 2
    assert "holds answers of another evaluation: checkpoint model" in done.stderr and "--answers FOLDER" in done.stderr


def test_compare_takes_two_of_a_kind(compress: Command, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{}")
    for pair, words in (
        ((tiny_llama, "r.json"), "two reports, or two checkpoints"),
        (("r.json", "r.json"), "is not a report"),
    ):
        done = compress("compare", *pair, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr
