"""The campaign in CI: a short part of it always, the whole with `pytest -m campaign`.

Each runs in a process of its own, since the fork server must have one thread before torch is imported.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.campaign", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.pipeline
def test_a_short_campaign_finds_nothing_wrong() -> None:
    done = run("--seed", 11, "--kills", 20, "--hostile", 60, "--minutes", 3)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:] for line in done.stdout.splitlines() if line.startswith("|")
    }
    assert int(rows["**all hostile**"][1]) >= 20, done.stdout  # it did run, on a slow machine too
    assert int(rows["**all hostile**"][3]) == int(rows["**all kills**"][3]) == 0


@pytest.mark.campaign
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("seed", [1])
def test_the_whole_campaign_finds_nothing_wrong(seed: int) -> None:
    done = run("--seed", seed)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
