"""`compress export` as a person meets it: names, places that cannot be written, options without effect, Ctrl-C."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.manifest import drafted, drafted_folder, require_place
from edgepress.pipeline.cli import app
from edgepress.pipeline.formats import FORMATS, llama2c
from tests.conftest import TinyModel
from tests.pipeline.test_export import compressed

pytestmark = pytest.mark.pipeline

NOT_THERE = {"/proc/x": "no file can be made in /proc", "/proc/x/y": "no file can be made in /proc"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    """4-bit codes of a llama that every format takes."""
    model = tiny_model(num_hidden_layers=2, dtype="bfloat16", rms_norm_eps=1e-5, tie_word_embeddings=True)
    return compressed(tmp_path_factory.mktemp("export") / "stage", model, None, 4, group=32, symmetric=True)


def _commands_with_output() -> list[str]:
    from typer.main import get_command

    group: Any = get_command(app)
    named = [name for name, command in group.commands.items() if any(p.name == "out" for p in command.params)]
    return sorted(name for name in named if name != "report")  # its OUT is what it reads


def test_every_command_refuses_a_place_that_cannot_be_written(
    compress: Callable[..., Any], tmp_path: Path, stage: Path
) -> None:
    """One message that names what was given, at once, and nothing is made anywhere."""
    names = ["", *_commands_with_output()]
    assert {"run", "sweep", "ablate", "rank", "eval", "pack", "unpack", "export"} <= set(names)
    (tmp_path / "file").write_text("mine")
    places = NOT_THERE | {str(tmp_path / "file" / "x"): f"{tmp_path / 'file'} is a file, not a folder"}
    first = {"": [], "run": [], "sweep": ["sweep-two-minutes"], "ablate": []}
    for name in names:
        for place, why in places.items():
            done = compress(*([name] if name else []), *first.get(name, [stage]), "-o", place)
            assert (done.returncode, done.stdout) == (2, ""), name
            assert done.stderr.startswith(f"error: {place} cannot be written: {why}"), (name, done.stderr)
            assert ".partial" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_and_a_full_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[..., Any], stage: Path
) -> None:
    import tempfile

    def denied(*_: Any, **given: Any) -> None:
        raise PermissionError(13, "Permission denied", str(given["dir"]))

    with monkeypatch.context() as patched:  # root may write everywhere
        patched.setattr(tempfile, "TemporaryFile", denied)
        with pytest.raises(CheckpointError, match=re.escape(f"no file can be made in {tmp_path} (Permission denied)")):
            require_place(tmp_path / "a" / "b")
        with pytest.raises(CheckpointError, match=r"no file can be made \(Permission denied\); name another place"):
            require_place(tmp_path)
    done = compress("export", stage, "--to", "gguf", "-o", tmp_path / ("x" * 300))
    assert done.returncode == 2 and "File name too long" in done.stderr and ".partial" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_error_as_it_writes_names_what_was_asked_for(tmp_path: Path) -> None:
    for context, name in ((drafted, ""), (drafted_folder, "/shard")):
        wanted = tmp_path / "above" / "wanted" if name else tmp_path / "wanted"

        def fill(context: Any = context, wanted: Path = wanted, name: str = name) -> None:
            with context(wanted) as draft:
                assert draft.name == ".wanted.partial"
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{draft}{name}")

        with pytest.raises(OSError, match="No space left") as raised:
            fill()
        assert raised.value.filename == f"{wanted}{name}" and not list(tmp_path.iterdir())


def test_a_device_is_never_replaced(compress: Callable[..., Any], stage: Path) -> None:
    before = os.stat("/dev/null").st_rdev
    for form in ("gguf", "hf"):
        done = compress("export", stage, "--to", form, "-o", "/dev/null", "--force")
        assert done.returncode == 2 and done.stderr.startswith("error: /dev/null is a ")
    assert os.stat("/dev/null").st_rdev == before


def test_the_current_folder_is_not_replaced(compress: Callable[..., Any], stage: Path, tmp_path: Path) -> None:
    done = compress("export", stage, "--to", "hf", "-o", ".", cwd=tmp_path)
    assert done.returncode == 2 and "the current folder" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("llama.cpp", "what it reads is gguf"), ("vLLM", "what it reads is compressed-tensors"),
        ("transformers", "what it reads is hf or compressed-tensors"), ("onnxruntime", "what it reads is onnx"),
        ("ggfu", "(near: gguf)"), ("awq", "there is rv32, deeploy, hf, gguf"),
    ],
)  # fmt: skip
def test_a_programs_name_leads_to_what_it_reads(
    compress: Callable[..., Any], stage: Path, named: str, words: str
) -> None:
    done = compress("export", stage, "--to", named)
    assert done.returncode == 2 and words in done.stderr.replace("--to ", "") and done.stderr.count("\n") == 1


def test_a_run_folder_stands_for_its_result_in_a_graph_too(
    compress: Callable[..., Any], stage: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr("edgepress.pipeline.cli_deeploy.checkpoint_folder", lambda named: opened.append(named) or stage)
    compress("export", "run-folder", "--to", "deeploy", "-o", tmp_path / "graph", "--context", 0)
    assert opened == [Path("run-folder")]


def test_options_that_would_change_nothing_are_refused(compress: Callable[..., Any], stage: Path) -> None:
    for flag, value in {"--soc": "esp32-s3", "--kv-bits": 8, "--prompt": "A", "--tokens": 9, "--context": 9}.items():
        done = compress("export", stage, "--to", "gguf", flag, value)
        assert (done.returncode, done.stderr) == (
            2, f"error: {flag} would change nothing of --to gguf; leave it out\n"
        )  # fmt: skip


def test_what_is_there_is_written_over_only_by_force(compress: Callable[..., Any], stage: Path, tmp_path: Path) -> None:
    for form, kind in (("gguf", "model.gguf"), ("hf", "model-hf")):
        out = tmp_path / "deep" / kind
        assert compress("export", stage, "--to", form, "-o", out).returncode == 0
        done = compress("export", stage, "--to", form, "-o", out)
        assert done.returncode == 2 and done.stderr == (
            f"error: {out} is there already; write over it with --force, or choose another with -o\n"
        )
        assert compress("export", stage, "--to", form, "-o", out, "--force").returncode == 0
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"model.gguf", "model-hf"}


@pytest.mark.parametrize("form", [*FORMATS, "rv32"])
def test_ctrl_c_in_the_middle_leaves_nothing(
    compress: Callable[..., Any], stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    if form == "executorch":
        pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install 'edgepress[executorch]'")
    monkeypatch.setattr(llama2c, "tokenizer_file", lambda source: b"")  # which needs SentencePiece's kind
    sent: list[Path] = []

    def struck(method: str) -> None:
        original = getattr(Path, method)

        def strike(self: Path, *given: Any, **how: Any) -> Any:
            done = original(self, *given, **how)
            if self.name.endswith(".partial") and not sent:
                sent.append(self)
                os.kill(os.getpid(), signal.SIGINT)
            return done

        monkeypatch.setattr(Path, method, strike)

    struck("mkdir")
    struck("open")
    done = compress("export", stage, "--to", form, "-o", tmp_path / "new" / "out", cwd=tmp_path)
    assert (bool(sent), done.returncode) == (True, 130), done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted; the same command begins anew"
    assert done.stderr.count("interrupted") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
