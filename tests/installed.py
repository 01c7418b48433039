"""The wheel in an environment of its own, as a stranger has it: the clone is not there, and its names are taken."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FOLDERS = sorted(path.name for path in (ROOT / "src" / "edgepress").iterdir() if path.is_symlink())
# What torchtune's recipes/__init__.py does, and what a person's own eval.py may.
TAKEN = 'raise ModuleNotFoundError("this is not edgepress\'s")\n'


def readme_commands() -> list[str]:
    """The lines of README's sh blocks that run the command, with their comments, which may state the exit status."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S) for line in block.splitlines()]
    return [line for line in lines if line.startswith("compress ")]


def readme_python() -> str:
    """README's first Python block, which uses edgepress."""
    return re.findall(r"```python\n(.*?)```", README, flags=re.S)[0]


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel and, by a path only, the third-party packages of the one that tests run in."""

    wheel: Path
    binaries: Path

    def run(self, line: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs by a line as a shell has it, with further words."""
        program, *rest = shlex.split(line, comments=True)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            [self.binaries / program, *rest, *words], cwd=cwd, capture_output=True, text=True, check=False,
            env=environment,
        )  # fmt: skip

    def readme(self, line: str, cwd: Path) -> None:
        """Run a line of README; AssertionError if it ends otherwise than its comment says."""
        stated = re.search(r"# exits with (\d)", line)
        done = self.run(line, cwd=cwd)
        assert done.returncode == int(stated[1] if stated else 0), done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def install(folder: Path) -> Installed:
    """Build the wheel of a copy of the clone without what earlier builds left, and install it; no network is used."""
    clone = folder / "clone"
    for name in ("src", *FOLDERS):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    _pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", folder, clone)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    # A path in a .pth file is searched last, and the .pth files in it, the clone's among them, are not read.
    (packages / "third-party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _pip(environment / "bin" / "python", "install", "--ignore-installed", wheel)
    for name in FOLDERS:
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text(TAKEN)
    return Installed(wheel, environment / "bin")


def _pip(python: str | Path, *words: str | Path) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    done = subprocess.run([python, "-m", "pip", *words, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
