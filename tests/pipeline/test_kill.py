"""SIGKILL at many moments; the same command again ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.pipeline

# Runs the command in a process that kills itself at the n-th step of progress or the n-th file made durable.
KILLER = """
import os, signal, sys
moment, count = int(sys.argv[1]), 0
def tick(*_):
    global count
    count += 1
    if count == moment:
        os.kill(os.getpid(), signal.SIGKILL)
import edgepress.checkpoints.manifest, edgepress.checkpoints.writer, edgepress.pipeline.progress
for owner, name in ((edgepress.pipeline.progress.Reporter, "step"), (edgepress.checkpoints.writer, "sync_folder"),
                    (edgepress.checkpoints.manifest, "sync_folder")):
    original = getattr(owner, name)
    def wrapped(*a, _original=original, **k):
        tick()
        return _original(*a, **k)
    setattr(owner, name, wrapped)
from edgepress.pipeline import cli
sys.argv = ["compress", *sys.argv[2:]]
cli.main()
"""


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    chain: Path, tiny_llama: Path, quick: list[str], tmp_path: Path, weight_hashes: Callable[[Path], dict[str, str]]
) -> None:
    out = tmp_path / "out"
    # Primes, so that the kills fall between and inside all kinds of writes; each run starts where the last died.
    moments = [1, 7, 13, 19, 23, 29, 31, 37, 41, 43, 10**9]
    codes = []
    for moment in moments:
        done = subprocess.run(
            [sys.executable, "-c", KILLER, str(moment), "--model", str(tiny_llama), "-o", str(out), *quick],
            capture_output=True,
            text=True,
            check=False,
        )
        codes.append(done.returncode)
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
    assert codes[-1] == 0
    assert len(codes) >= 5, "too few kills to have hit every stage"
    assert weight_hashes(out) == weight_hashes(chain)
    ours, undisturbed = (json.loads((o / "report.json").read_text()) for o in (out, chain))
    assert [s["fingerprint"] for s in ours["stages"]] == [s["fingerprint"] for s in undisturbed["stages"]]
    assert [s["perplexity"] for s in ours["stages"]] == [s["perplexity"] for s in undisturbed["stages"]]
