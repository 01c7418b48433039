"""The wheel in a stranger's hands: README's lines run from an empty folder, beside packages with the same names."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.installed import FOLDERS, ROOT, TAKEN, Installed, readme_commands, readme_python

pytestmark = pytest.mark.pipeline

# Lines of README that are left to tests/real, which runs all of them with the wheel, by what they need.
LEFT_OUT = {
    r"demo(/result)?\b": "what `make demo` makes of the packaged model",
    r"my-out(/result)?\b": "a run of all stages with the budgets of a real one, or what it makes",
    r"compress rank": "measures every block of a model",
    r"compress eval \./my-model": "measures a model; test_cli_evaluate.py does in less time",
    r"\bsweep\b": "a sweep of the packaged model, or what it makes",
    r"compress unpack": "the file that `compress pack demo/result` makes",
}


def reasons(line: str) -> list[str]:
    return [pattern for pattern in LEFT_OUT if re.search(pattern, line.split("#")[0])]


LINES = [line for line in readme_commands() if not reasons(line)]


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """A folder with what README's lines name, and a Python file of the stranger's own."""
    for name in ("my-model", "demo/result"):
        shutil.copytree(tiny_model(num_hidden_layers=12, max_position_embeddings=512), tmp_path / name)
    (tmp_path / "eval.py").write_text(TAKEN)
    return tmp_path


def test_the_wheel_holds_one_package_with_all_that_the_clone_has(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"edgepress", "edgepress-0.1.0.dist-info"}
    patterns = [f"{folder}/**/*.py" for folder in FOLDERS]
    patterns += [
        "recipes/*.yaml",
        "hardware/socs/*.toml",
        "hardware/rv32/runtime/*.[chS]",
        "hardware/rv32/*.toml",
        "pipeline/page/templates/*",
    ]
    found = [{str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)} for pattern in patterns]
    assert all(found)
    held = {f"edgepress/{file}" for files in found for file in files} | {"edgepress/py.typed"}
    assert not held - names
    assert {name for name in names - held if name.endswith(".py")} == {"edgepress/__init__.py", "edgepress/__main__.py"}


def test_the_clone_is_not_there(installed: Installed, tmp_path: Path) -> None:
    done = installed.run("python -c", "import edgepress; print(edgepress.__file__)", cwd=tmp_path)
    assert Path(done.stdout.strip()).is_relative_to(installed.binaries.parent)
    for name in (*FOLDERS, "tests", "benchmarks"):
        assert installed.run("python -c", f"import {name}", cwd=tmp_path).returncode == 1


def test_the_module_is_the_command(installed: Installed, workplace: Path) -> None:
    done = installed.run("python -m edgepress plan --recipe two-minutes", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "5 eora" in done.stdout


def test_an_exported_program_is_compiled_and_checked_by_its_own_makefile(installed: Installed, workplace: Path) -> None:
    exported = installed.run("compress export my-model --context 32 --tokens 4 -o chip", cwd=workplace)
    assert exported.returncode == 0, exported.stderr
    python = installed.binaries / "python"
    done = subprocess.run(
        ["make", "-C", workplace / "chip", "check", f"PYTHON={python}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens are those of Python in float32" in done.stdout


def test_the_readme_s_python_runs(installed: Installed, workplace: Path) -> None:
    done = installed.run("python -c", readme_python(), cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 1
    assert "3 gptq" in done.stdout and "fits Siracusa" in done.stdout


def test_mypy_sees_the_types_of_the_readme_s_python(installed: Installed, workplace: Path) -> None:
    # torch and its like take mypy a minute to read; the example meets none of their types.
    others = ",".join(f"{name}.*" for name in ("torch", "transformers", "peft", "numpy", "rich", "tokenizers"))
    (workplace / "mypy.ini").write_text(f"[mypy]\nstrict = true\n[mypy-{others}]\nfollow_imports = skip\n")
    (workplace / "example.py").write_text(readme_python())
    (workplace / "wrong.py").write_text(readme_python() + 'checkpoint.block("0")\nedgepress.compress(wandaa="2:4")\n')
    done = installed.run("python -m mypy example.py", cwd=workplace)
    assert done.returncode == 0, done.stdout
    done = installed.run("python -m mypy wrong.py", cwd=workplace)
    assert 'Argument 1 to "block" of "Checkpoint" has incompatible type "str"' in done.stdout
    assert 'Unexpected keyword argument "wandaa" for "compress"' in done.stdout


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("#")[0].strip())
def test_the_readme_s_commands_run(installed: Installed, workplace: Path, line: str) -> None:
    installed.readme(line, workplace)


def test_no_line_is_left_out_without_need() -> None:
    found = [reasons(line) for line in readme_commands()]
    assert {pattern for patterns in found for pattern in patterns if len(patterns) == 1} == LEFT_OUT.keys()
    assert len(LINES) >= 6
