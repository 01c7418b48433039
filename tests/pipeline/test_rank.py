"""`compress rank`: the table, the picture and the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.pipeline

Command = Callable[..., Any]


@pytest.mark.parametrize("metric", ["perplexity", "taylor", "magnitude", "influence"])
def test_rank_prints_every_block_and_writes_png_and_json(
    compress: Command, tiny_llama: Path, tmp_path: Path, metric: str
) -> None:
    done = compress(
        "rank", tiny_llama, "--metric", metric, "--data", "embedded", "--samples", 2, "--length", 32,
        "-o", tmp_path / "ranking",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert list(ranking["scores"]) == [str(i) for i in range(6)]
    assert ranking["order"] == sorted(range(6), key=lambda i: (ranking["scores"][str(i)], i))
    assert done.stdout.count("█") >= 6
    assert (tmp_path / "ranking.png").read_bytes()[:4] == b"\x89PNG"


def test_text_that_the_model_writes_for_a_ranking_is_kept_in_the_cache(
    compress: Command, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    ranking = ["rank", tiny_llama, "--metric", "influence", "--data", "self", "--samples", 2, "--length", 32, "--json"]
    found = []
    for _ in range(2):
        done = compress(*ranking, cwd=tmp_path / "here")
        assert done.returncode == 0, done.stderr
        found.append((done.stdout, [(p, p.stat().st_mtime_ns) for p in (tmp_path / "cache").rglob("self-*")]))
    assert found[0] == found[1] and len(found[0][1]) == 1
    assert not list((tmp_path / "here").iterdir())


def test_rank_leaves_protected_blocks_out_and_refuses_unknown_metrics(compress: Command, tiny_llama: Path) -> None:
    arguments = ["rank", tiny_llama, "--data", "embedded", "--samples", 2, "--length", 32, "--json"]
    done = compress(*arguments, "--metric", "magnitude", "--protect-first", 2, "--protect-last", 1)
    assert list(json.loads(done.stdout)["scores"]) == ["2", "3", "4"]
    done = compress(*arguments, "--metric", "luck")
    assert done.returncode == 2 and "there are perplexity" in done.stderr
