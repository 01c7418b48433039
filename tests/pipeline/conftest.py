"""A tiny LLaMA with random weights that every stage can work on, and a way to run the command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.models import as_drawn, save_tiny

# Every stage with budgets of seconds. Rank 4 fits the 32 rows of k_proj.
QUICK = [
    *("--data", "embedded", "--window", "64", "--tokens", "1024", "--protect-first", "1", "--protect-last", "1"),
    *("--depth-samples", "4", "--depth-length", "32", "--wanda-samples", "4", "--wanda-length", "64"),
    *("--lora-samples", "16", "--lora-length", "64", "--lora-steps", "4", "--lora-batch", "4", "--lora-rank", "4"),
    *("--lora-save-steps", "1", "--quant-samples", "4", "--quant-length", "64", "--group", "32"),
    *("--eora", "4", "--eora-samples", "4", "--eora-length", "64"),
]


def _save(folder: Path, blocks: int = 6) -> Path:
    like = {"num_hidden_layers": blocks, "tie_word_embeddings": True, "pad_token_id": ..., "dtype": "bfloat16"}
    return save_tiny(folder, seed=7, weights=as_drawn, **like)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report's figures are not drawn where only the words matter: drawing takes most of a page's time."""
    from edgepress.pipeline.page import figures

    def named(key: str, title: str, alt: str, *_: object, **__: object) -> figures.Picture:
        return figures.Picture(key, title, alt, "data:,", "data:,", b"", True)

    monkeypatch.setattr(figures, "picture", named)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def compress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """Run the command as a person would, in this process: importing torch for every call would take minutes in all."""
    from edgepress.pipeline.cli import main

    def call(*arguments: object, cwd: Path | None = None) -> Done:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        if cwd:
            monkeypatch.chdir(cwd)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Done(int(ended.value.code or 0), said.out, said.err)

    before = signal.getsignal(signal.SIGINT)
    yield call
    signal.signal(signal.SIGINT, before)  # a run takes it over


@pytest.fixture(scope="session")
def quick() -> list[str]:
    return QUICK


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Path]:
    return _save


@pytest.fixture(scope="session")
def run_recipe() -> Callable[..., Any]:
    """Run a recipe in this process: run_recipe(out, model, depth__remove=1, …) -> RunResult."""
    from rich.console import Console

    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.recipe import build
    from edgepress.pipeline.run import run
    from edgepress.pipeline.store import Store

    values = _quick_values()

    def call(out: Path, model: Path, recipe: str | None = None, skip: str = "", **flags: object) -> Any:
        given = values | {"model": str(model)} | {key.replace("__", "."): value for key, value in flags.items()}
        with Store(out).opened(), Reporter(Console(), quiet=True) as reporter:
            return run(build(recipe, given, skip), out, reporter)

    return call


def _quick_values() -> dict[str, Any]:
    """QUICK as recipe keys."""
    from dataclasses import fields

    from edgepress.stages.options import STAGES

    keys = {f.metadata["flag"]: f"{stage}.{f.name}" for stage, o in STAGES.items() for f in fields(o)}
    pairs = zip(QUICK[::2], QUICK[1::2], strict=True)
    return {keys.get(flag, flag.removeprefix("--")): int(v) if v.isdigit() else v for flag, v in pairs}


@pytest.fixture(scope="session")
def weight_hashes() -> Callable[[Path], dict[str, str]]:
    """Sha256 of every safetensors file of every stage folder, by path within the store."""
    from edgepress.checkpoints.manifest import sha256_file

    def call(out: Path) -> dict[str, str]:
        return {str(p.relative_to(out)): sha256_file(p) for p in sorted(out.glob("[1-5]-*/**/*.safetensors"))}

    return call


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, run_recipe: Callable[..., Any]) -> Path:
    """An undisturbed run of all five stages; tests must not change it."""
    out: Path = tmp_path_factory.mktemp("chain") / "out"
    run_recipe(out, tiny_llama)
    return out
