"""stories260K through the whole chain, as the README's section "Will it fit?" has it, and onto the chip."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.installed import README, ROOT, Installed

DATA = Path(os.environ.get("EDGEPRESS_DATA") or ROOT.parent / "shared" / "data")

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}"),
]


def test_the_readme_s_stories260k_goes_through_every_stage_and_fits(installed: Installed, tmp_path: Path) -> None:
    command = re.search(r"^compress --model stories260K\.bin .*$", README, flags=re.M)
    assert command is not None
    (tmp_path / "stories260K.bin").symlink_to(DATA / "stories260K" / "stories260K.bin")
    (tmp_path / "tok512.bin").symlink_to(DATA / "stories260K" / "tok512.bin")
    (tmp_path / "tinystories.txt").symlink_to(DATA / "tinystories" / "tinystories.txt")
    done = installed.run(command[0], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    stages = {s["stage"]: s for s in report["stages"]}
    assert list(stages) == ["pad", "depth", "wanda", "lora", "gptq", "eora"]
    assert stages["pad"]["perplexity"]["after"] == pytest.approx(report["baseline"]["perplexity"], rel=1e-4)
    assert stages["lora"]["perplexity"]["after"] < 0.75 * stages["wanda"]["perplexity"]["after"]
    assert stages["eora"]["perplexity"]["after"] < stages["gptq"]["perplexity"]["after"]
    assert all(stages[s]["sparsity"]["holds"] for s in ("wanda", "lora", "gptq", "eora"))

    fits = installed.run("compress check tiny/result --json", cwd=tmp_path)
    assert fits.returncode == 0, fits.stdout + fits.stderr
    assert installed.run("compress verify tiny/result", cwd=tmp_path).returncode == 0

    # benchmarks/chip_tokens.py compares 200 tokens of five prompts for other patterns and widths.
    ran = installed.run("compress simulate tiny/result --tokens 60", cwd=tmp_path)
    assert ran.returncode == 0 and "tokens are those of Python in float32" in ran.stdout, ran.stdout + ran.stderr
