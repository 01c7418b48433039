"""Whatever happens in the memory-map check, the stages run, the report is written and the page can be made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgepress.pipeline.plan
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.plan import judge, to_dict

pytestmark = pytest.mark.pipeline

Compress = Callable[..., Any]
FAULTS = [PlanError("no engine runs this"), KeyError("input_layernorm"), ZeroDivisionError("by 0"), RecursionError()]


def broken(fault: Exception) -> Callable[..., Any]:
    def check(*_: object, **__: object) -> None:
        raise fault

    return check


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_fault_becomes_words(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    monkeypatch.setattr(edgepress.pipeline.plan, "check", broken(fault))
    said = judge(shape_from_config(PRESETS["stories260k"]), load_soc("siracusa"), "stories")
    assert isinstance(said, str) and said.startswith("no verdict: ") and str(fault) in said
    assert ("report it" in said) is not isinstance(fault, PlanError)
    assert to_dict(said) == {"fits": None, "summary": said}


def test_a_configuration_without_positions_is_no_fault() -> None:
    config = {key: value for key, value in PRESETS["stories260k"].items() if key != "max_position_embeddings"}
    shape = shape_from_config(config | {"max_position_embeddings": None})
    said = judge(shape, load_soc("siracusa"), "stories")
    assert isinstance(said, str) and "max_position_embeddings" in said


def test_the_stages_run_all_the_same(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path, quick: list[str]
) -> None:
    monkeypatch.setattr(edgepress.pipeline.plan, "check", broken(KeyError("input_layernorm")))
    out = tmp_path / "out"
    done = compress("--model", tiny_llama, *quick, "--depth", 1, "--skip", "wanda,lora,gptq,eora", "-o", out)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["hardware"]["fits"] is None and report["hardware"]["summary"].startswith("no verdict: ")
    assert done.stdout.count("no verdict: ") + done.stderr.count("no verdict: ") >= 3  # by plan, measured, at the end
    page = compress("report", out)
    assert page.returncode == 0, page.stderr
    assert "Memory map: no verdict: " in page.stdout + page.stderr
