"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
# Of each script, what it prints, and what it leaves.
SCRIPTS = {
    "compress_and_check.py": ("siracusa: fits", "example-compress/result"),
    "own_ablation.py": ("2:4       sparsegpt", "example-ablation/result"),
    "evaluate_and_export.py": ("gptq     perplexity", "example-program/weights.bin"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_does_what_it_says(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, script: str
) -> None:
    model = tiny_model(num_hidden_layers=8, max_position_embeddings=512)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, str(model)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    said, left = SCRIPTS[script]
    assert said in capsys.readouterr().out
    assert (tmp_path / left).exists()


def test_every_script_is_run() -> None:
    assert SCRIPTS.keys() == {path.name for path in EXAMPLES.glob("*.py")}


def test_the_notebook_runs_and_shows_whole_lines(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # as it is kept; a run's outputs are not
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = ["".join(o.get("text", "") or o.get("data", {}).get("text/plain", "")) for o in outputs]
    said = "\n".join(texts)
    for words in ("1/3 depth", "3 gptq", "fits Siracusa", "95 % between", "no keyword 'wandaa' (near: wanda"):
        assert words in said
    assert not [text for text in texts if "\r" in text or "\x1b[" in text]
    assert not [o for o in outputs if o.output_type == "error"]
