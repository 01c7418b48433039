"""What the core does without its extras, and what it says where one is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from edgepress.checkpoints.errors import EXTRAS, PlanError, in_words, require_package

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
# Modules of packages that no extra-less installation has, and whose absence every command must survive.
BEYOND = ("datasets", "pyarrow", "pandas", "lm_eval", "sacrebleu", "rouge_score", "gptqmodel", "optimum", "ray")
# Runs the command where imports of those, and questions for their versions, fail as if they were not installed.
WITHOUT = """
import importlib.metadata, json, sys
hidden = set(json.loads(sys.argv.pop(1)))
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
real, spec = importlib.metadata.version, __import__("importlib.util").util.find_spec
def version(name):
    if name.replace("-", "_") in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in hidden else spec(name, package)
from edgepress.pipeline.cli import main
main()
"""


@pytest.mark.unit
def test_every_package_beyond_the_core_is_in_the_extra_that_is_named() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=]", requirement)[0].lower().replace("-", "_") for requirement in requirements}

    extras = PROJECT["optional-dependencies"]
    for module, extra in EXTRAS.items():
        package = {"mlflow": "mlflow_skinny"}.get(module, module)
        assert package in names(extras[extra]), f"{module} is not in [{extra}]"
        assert package not in names(PROJECT["dependencies"])
    assert set(BEYOND) <= EXTRAS.keys()


@pytest.mark.unit
def test_a_missing_package_is_one_line_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        PlanError, match=r"^mmlu needs lm-eval, which is not installed: pip install 'edgepress\[eval\]'$"
    ):
        require_package("lm_eval", "mmlu")
    with pytest.raises(ModuleNotFoundError) as raised:
        import lm_eval  # noqa: F401
    assert in_words(raised.value) == "this needs lm-eval, which is not installed: pip install 'edgepress[eval]'"
    assert in_words(ModuleNotFoundError("No module named 'nobody_s'", name="nobody_s")) is None


@pytest.mark.pipeline
def test_all_stages_run_without_any_extra(tiny_llama: Path, quick: list[str], tmp_path: Path) -> None:
    done = without(BEYOND, "--model", tiny_llama, *quick, "--depth", "1", "--wanda", "2:4", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    names = [path.name.split("-")[1] for path in sorted((tmp_path / "out").glob("[0-9]-*"))]
    assert names == ["depth", "wanda", "lora", "gptq4", "eora4"] or names[:4] == ["depth", "wanda", "lora", "gptq4"]
    manifest = json.loads((tmp_path / "out" / "result" / "manifest.json").read_text())
    assert "gptqmodel" not in manifest["versions"] and "torch" in manifest["versions"]
    quantization = json.loads((tmp_path / "out" / "result" / "config.json").read_text())["quantization_config"]
    assert quantization["meta"]["quantizer"][1].startswith("gptqmodel:7.")

    measured = without(BEYOND, "eval", tmp_path / "out", "--text", "embedded", "--window", "64", "--tokens", "256")
    assert measured.returncode == 0, measured.stderr


@pytest.mark.pipeline
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--data wikitext2 -o out", "the text 'wikitext2' needs datasets"),
        ("eval --task mmlu", "mmlu needs lm-eval"),
        ("eval --task nobodys_task", "the task 'nobodys_task' needs lm-eval"),
        ("eval --task generation", "generation needs sacrebleu"),
        ("sweep sweep-two-minutes -o out", "a sweep's results.csv and results.parquet needs pandas"),
        ("sweep sweep-two-minutes -o out --ray local", "needs"),
    ],
)
def test_what_needs_an_extra_says_so_before_it_begins(tiny_llama: Path, tmp_path: Path, line: str, said: str) -> None:
    words = [str(tmp_path / word) if word == "out" else word for word in line.split()]
    done = without(BEYOND, *words, "--model", tiny_llama)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "pip install 'edgepress[" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def without(packages: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, json.dumps(packages), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
