"""Ctrl-C, SIGTERM and SIGHUP at any moment, a closed pipe, and what is made of errors: one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import CheckpointError, in_words
from edgepress.pipeline import cli

pytestmark = pytest.mark.pipeline

ROOT = Path(__file__).parents[2]

# The command in a process that signals itself at the n-th durable file, the n-th step, or when a module is imported.
SELF = """
import os, signal, sys, time
number, at, sys.argv = int(sys.argv[1]), sys.argv[2], ["compress", *sys.argv[3:]]
from edgepress.pipeline import cli
def shoot(*_):
    os.kill(os.getpid(), number)
if at.startswith("import:"):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == at.removeprefix("import:"):
                sys.meta_path.remove(self)
                shoot()
    sys.meta_path.insert(0, Finder())
else:
    from edgepress.checkpoints import writer
    from edgepress.pipeline import progress
    owner, name = {"file": (writer, "sync_folder"), "step": (progress.Reporter, "step"),
                   "lost": (progress.Reporter, "start"), "twice": (progress.Reporter, "start")}[at]
    original = getattr(owner, name)
    class Dropped:
        def __del__(self):
            shoot()
    def wrapped(*a, **k):
        if at == "lost":
            Dropped()
        elif at == "twice":
            try:
                shoot()
                time.sleep(9)
            finally:
                shoot()
        else:
            shoot()
        return original(*a, **k)
    setattr(owner, name, wrapped)
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "at"),
    [
        (signal.SIGINT, "import:transformers"),
        (signal.SIGTERM, "import:torch"),
        (signal.SIGTERM, "file"),
        (signal.SIGHUP, "step"),
        (signal.SIGINT, "lost"),
        (signal.SIGINT, "twice"),
    ],
)
def test_a_signal_ends_in_one_line_and_its_code(
    tiny_llama: Path, quick: list[str], tmp_path: Path, number: signal.Signals, at: str
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", SELF, str(int(number)), at, "--model", str(tiny_llama), "-o", str(out), *quick]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 128 + number, said
    assert said.count("interrupted") == 1 and "Traceback" not in said and "KeyboardInterrupt" not in said
    assert not list(out.rglob("*.partial"))


def entries() -> dict[str, str]:
    """What a person types, as Python: the module, and the text that installers make of pyproject.toml."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["compress"].partition(":")
    script = f"import sys\nfrom {module} import {function}\nif __name__ == '__main__':\n    sys.exit({function}())"
    return {
        "module": "import runpy\nrunpy.run_module('edgepress', run_name='__main__', alter_sys=True)",
        "script": script,
    }


# Before the command starts: `shoot` is called when it imports typer, the first of its modules that takes long.
AT_TYPER = """
import atexit, os, signal, sys
number = int(sys.argv.pop(1))
def kill():
    os.kill(os.getpid(), number)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            sys.meta_path.remove(self)
            shoot()
sys.meta_path.insert(0, Finder())
"""


def _shot(
    entry: str, shoot: str, number: signal.Signals, *words: str, before: str = ""
) -> subprocess.CompletedProcess[str]:
    code = f"{AT_TYPER}def shoot():\n    {shoot}\n{before}\n{entries()[entry]}"
    command = [sys.executable, "-c", code, str(int(number)), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("entry", entries())
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_first_imports(entry: str, number: signal.Signals) -> None:
    done = _shot(entry, "kill()", number, "--help")
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "interrupted; nothing was begun\n")


def test_a_hangup_that_nohup_switched_off_stays_off() -> None:
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    done = _shot("script", "kill()", signal.SIGHUP, "socs", before=ignored)
    assert done.returncode == 0 and done.stderr == "" and "siracusa" in done.stdout


def test_a_signal_in_the_exit_handlers() -> None:
    done = _shot("script", "atexit.register(kill)", signal.SIGTERM, "socs")
    assert (done.returncode, done.stderr) == (143, "interrupted; the command had ended\n")
    assert "siracusa" in done.stdout


def test_a_signal_in_code_made_from_a_string() -> None:
    """CPython ends a process by SIGINT in which KeyboardInterrupt itself has left such code."""
    code = """
import os, signal
from edgepress.checkpoints import interrupts
interrupts.listen()
from edgepress.pipeline import cli
cli.app = lambda **_: exec("os.kill(os.getpid(), signal.SIGINT)")
interrupts.end(cli.perform())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr.count("interrupted") == 1 and "Traceback" not in done.stderr


def test_a_draft_goes_though_a_signal_stops_its_removal(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from edgepress.checkpoints import manifest
from edgepress.pipeline import cli
original = manifest._remove
sent = []
def remove(draft):
    if not sent:
        sent.append(draft)
        os.kill(os.getpid(), signal.SIGTERM)
    original(draft)
def app(**_):
    with manifest.drafted(Path(sys.argv[1])) as draft:
        draft.write_text("half of it")
        raise ValueError
manifest._remove, cli.app = remove, app
cli.main()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 143 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_program_that_imports_the_package_keeps_its_handlers() -> None:
    code = (
        "import signal\nof = lambda: [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]\n"
        "before = of()\nimport edgepress.__main__, edgepress.pipeline.cli, edgepress.pipeline.workers\n"
        "assert of() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_with_json_the_line_is_on_standard_error(tiny_llama: Path, quick: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", SELF, str(int(signal.SIGTERM)), "step", "--model", str(tiny_llama), "--json"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out"), *quick], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 143 and done.stdout == ""
    assert done.stderr.count("interrupted") == 1 and "goes on" in done.stderr


def test_a_swallowed_signal_is_raised_again() -> None:
    code = (
        "import os, signal, sys, time\nfrom edgepress.pipeline import cli\n"
        "def app(**_):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "    except BaseException:\n        pass\n"
        "    time.sleep(60)\n"
        "cli.app = app\ncli.main()"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143 and time.monotonic() - began < 20, done.stderr
    assert done.stderr.count("interrupted") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "seconds", "send"),
    [
        (signal.SIGTERM, 4.0, os.kill),
        (signal.SIGINT, 0.2, os.killpg),
    ],  # in their steps; at a terminal, in their imports
)
def test_a_sweeps_children_go_with_it(
    tiny_llama: Path,
    quick: list[str],
    tmp_path: Path,
    number: signal.Signals,
    seconds: float,
    send: Callable[[int, int], None],
) -> None:
    out, recipe = tmp_path / "out", tmp_path / "s.yaml"
    recipe.write_text("name: s\nsweep:\n  grid: {depth.remove: [1, 2], gptq.quant: [gptq4, gptq8]}\n")
    command = [sys.executable, "-m", "edgepress", "sweep", str(recipe), "--jobs", "2", "-o", str(out)]
    command += ["--model", str(tiny_llama), *quick]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    log = out / "sweep.log"
    while process.poll() is None and not (log.is_file() and "started" in log.read_text()):
        time.sleep(0.05)
    time.sleep(seconds)
    if process.poll() is not None:
        pytest.fail(str(process.communicate()[0]))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    send(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert said.count("interrupted") == 1 and "Traceback" not in said
    assert children
    until = time.monotonic() + 10  # multiprocessing's resource tracker ends by itself, a moment later
    while left := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < until, left
        time.sleep(0.05)
    assert not list(out.rglob("*.partial"))


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m edgepress socs | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b"), "/a/b: No space left on device; free some space"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/b"), "read-only; name another folder"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied; change its permissions"),
        (RecursionError("maximum"), "nested too deeply"),
        (MemoryError(), "not enough memory"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not UTF-8"),
        (CheckpointError("this folder"), "this folder"),
    ],
)
def test_an_error_that_is_not_a_bug_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, words: str
) -> None:
    monkeypatch.setattr(cli, "app", _raising(error))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and "Traceback" not in said


def test_a_bug_shows_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "app", _raising(KeyError("weight")))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" in said and "this is a bug" in said.splitlines()[-1]


def test_a_readers_own_error_is_told() -> None:
    from safetensors import SafetensorError

    assert "safetensors file cannot be used" in str(in_words(SafetensorError("invalid header")))
    assert in_words(ZeroDivisionError()) is None


def test_what_torch_says_of_disk_and_memory_is_told(tmp_path: Path) -> None:
    code = """
import os, resource, signal, sys, torch
from edgepress.checkpoints.errors import in_words
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def told(work):
    try:
        work()
    except BaseException as error:
        print(in_words(error))
weights = torch.zeros(10**4)
torch.save(weights, sys.argv[1])
whole = os.path.getsize(sys.argv[1])
for least in (1, 5000, whole // 2, *range(whole - 300, whole, 3)):  # near the end torch says it in other words
    resource.setrlimit(resource.RLIMIT_FSIZE, (least, resource.RLIM_INFINITY))
    told(lambda: torch.save(weights, sys.argv[1]))
told(lambda: torch.empty(2**50))
told(lambda: torch.zeros(2) @ torch.zeros(3))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.pt")], capture_output=True, text=True, check=True
    )
    *disk, memory, bug = done.stdout.splitlines()
    assert len(disk) > 50 and {line.partition(":")[0] for line in disk} == {"a file could not be written whole"}
    assert memory.startswith("there is not enough memory")
    assert bug == "None"


def _raising(error: Exception) -> Callable[..., Any]:
    def app(**_: object) -> None:
        raise error

    return app


def test_what_begins_anew_does_not_say_that_it_goes_on(
    tiny_llama: Path, compress: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """rank keeps nothing, a run keeps its blocks: each says so when a signal comes as its model is opened."""

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    for where in ("rank", "run"):
        monkeypatch.setattr(f"edgepress.pipeline.{where}.open_model", killed)
    ranked = compress("rank", tiny_llama)
    assert (ranked.returncode, ranked.stderr.splitlines()[-1]) == (130, "interrupted; the same command begins anew")
    ran = compress("run", tiny_llama, "-o", tmp_path / "out")
    assert ran.returncode == 130 and "interrupted; the same command goes on from" in ran.stdout + ran.stderr
