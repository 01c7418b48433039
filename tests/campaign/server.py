"""A fork server: everything is imported once, and each command runs in a forked child under limits and a guard.

The child is what `compress` is: `pipeline.cli.main` with its own argv, working folder, streams and signal handlers.
An audit hook counts its file events, so that it can kill itself at the n-th, and reports what it touches outside the
folders it was given. Threads do not survive a fork, so torch must have one thread before anything is imported.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HANG_SECONDS = 30.0
MEMORY_ROOM = 4 * 2**30  # address space beyond what the server has; a bomb ends there and not on the machine
_GRACE_SECONDS = 5.0  # in which the children of a command that ended must be gone
_FILE_EVENTS = frozenset(
    ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HARMLESS = ("/dev/", "/proc/")


@dataclass(frozen=True)
class Stop:
    """When a child is stopped: after some seconds, or by itself at its n-th file event; the latter is repeatable."""

    seconds: float = 0.0
    event: int = 0
    signal: int = signal.SIGKILL

    def __str__(self) -> str:
        moment = f"event {self.event}" if self.event else f"{self.seconds:.2f} s"
        return f"{signal.Signals(self.signal).name} at {moment}"


@dataclass(frozen=True)
class Done:
    """How a child ended."""

    argv: tuple[str, ...]
    code: int  # negative: the signal that ended it
    out: str
    err: str
    seconds: float
    peak_bytes: int
    events: int = 0  # file events, where it lived to tell
    outside: tuple[str, ...] = ()  # what it wrote, changed or read where it had no business
    hung: bool = False
    orphans: bool = False  # processes it started were still there after it had ended
    stopped: bool = False  # the signal asked for was sent

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def command(self) -> str:
        return " ".join(self.argv)


@dataclass(frozen=True)
class Bounds:
    """Folders a command may write in, and folders it may not even read."""

    writable: tuple[Path, ...]
    forbidden: tuple[Path, ...] = ()
    most_file_bytes: int = 0  # of any file it writes, as on a disk that is full; 0: no bound
    more: dict[str, str] = field(default_factory=dict)  # environment


def prepare() -> None:
    """Import what commands import, once. Call it before the first `run`, and before torch is imported."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")
    sys.dont_write_bytecode = True
    from edgepress.checkpoints.quiet import quiet_libraries

    quiet_libraries()
    import torch

    torch.set_num_threads(1)
    import edgepress

    for module in pkgutil.walk_packages(edgepress.__path__, "edgepress."):
        if not module.name.endswith("__main__"):  # it runs the command
            with contextlib.suppress(ImportError):  # Ray and trackers are extras
                importlib.import_module(module.name)


def preload(names: Sequence[str]) -> None:
    """Import modules that a first command loaded; those that cannot be imported by name are left to the commands."""
    from edgepress.checkpoints.quiet import quiet_import

    with quiet_import():
        for name in names:
            if name not in sys.modules and not name.startswith(("tests.", "__")):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
    gc.collect()
    gc.freeze()


def compress(argv: Sequence[object], folder: Path, bounds: Bounds, stop: Stop | None = None, **more: Any) -> Done:
    """`compress ARGV` in a folder."""
    words = ("compress", *map(str, argv))

    def body() -> None:
        sys.argv = list(words)
        from edgepress.pipeline.cli import main

        main()

    return run(body, words, folder, bounds, stop, **more)


def run(
    body: Callable[[], None],
    name: Sequence[str],
    folder: Path,
    bounds: Bounds,
    stop: Stop | None = None,
    limit: float = HANG_SECONDS,
    victim: Callable[[int], None] | None = None,
) -> Done:
    """Run a body in a child; stops it at a moment, and in any case after `limit` seconds.

    victim: called with the child's process id at the moment of `stop` in place of sending the signal to the child.
    """
    with tempfile.TemporaryDirectory(prefix="campaign-") as scratch:
        streams = [Path(scratch) / name for name in ("out", "err", "told")]
        for stream in streams:
            stream.touch()
        sys.stdout.flush()
        sys.stderr.flush()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _live(body, folder, bounds, streams, stop.event if stop else 0, stop.signal if stop else 0)
        handle = os.pidfd_open(child)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        hung = stopped = False
        try:
            if stop is not None and not stop.event and not poll.poll(stop.seconds * 1000):
                stopped = True
                with contextlib.suppress(ProcessLookupError):
                    victim(child) if victim else os.kill(child, stop.signal)
            if not poll.poll(limit * 1000):
                hung = True
                _kill_group(child)
            _, status, usage = os.wait4(child, 0)
        finally:
            os.close(handle)
        seconds = time.monotonic() - began
        orphans = _outlived(child)
        code = os.waitstatus_to_exitcode(status)
        told = [json.loads(line) for line in streams[2].read_text().splitlines()]
        out, err = (stream.read_text(errors="replace") for stream in streams[:2])
    events = next((line["events"] for line in told if "events" in line), 0)
    outside = tuple(dict.fromkeys(f"{line['what']} {line['path']}" for line in told if "path" in line))
    stopped = stopped or bool(stop and stop.event and any("stopped" in line for line in told))
    peak = usage.ru_maxrss * 1024
    return Done(tuple(name), code, out, err, seconds, peak, events, outside, hung, orphans, stopped)


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _outlived(leader: int) -> bool:
    """Whether processes of an ended child's group are still there after the grace; they are killed then."""
    end = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < end:
        try:
            os.killpg(leader, 0)
        except (ProcessLookupError, PermissionError):
            return False
        time.sleep(0.02)
    _kill_group(leader)
    return True


# --- in the child ----------------------------------------------------------------------------------------------------


def _live(body: Callable[[], None], folder: Path, bounds: Bounds, streams: list[Path], last: int, deadly: int) -> None:
    code = 70
    try:
        os.setsid()
        for path, descriptor in zip((Path(os.devnull), *streams[:2]), (0, 1, 2), strict=True):
            handle = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_APPEND)
            os.dup2(handle, descriptor)
            os.close(handle)
        own_streams = [open(n, mode, closefd=False) for n, mode in ((0, "r"), (1, "w"), (2, "w"))]  # noqa: SIM115
        sys.stdin, sys.stdout, sys.stderr = own_streams
        told = os.open(streams[2], os.O_WRONLY | os.O_APPEND)
        own = Path(tempfile.mkdtemp(prefix="tmp-", dir=streams[2].parent))
        os.environ.update(bounds.more, TMPDIR=str(own))
        tempfile.tempdir = None
        os.chdir(folder)
        _as_a_program()
        _limit(bounds)
        watch = _Watch(bounds, (own, *streams), told, last, deadly)
        code = _code(body)
        watch.tell(events=watch.count)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _code(body: Callable[[], None]) -> int:
    """Exit code of a body, as the interpreter would give it to a program that ends so."""
    try:
        body()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _as_a_program() -> None:
    """Signals as a fresh interpreter has them, and workers of a sweep forked: a fresh import for each takes seconds."""
    import multiprocessing

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["__main__"] = types.ModuleType("__main__")
    forked = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forked  # type: ignore[assignment]


def _limit(bounds: Bounds) -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_ROOM, now + MEMORY_ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if bounds.most_file_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (bounds.most_file_bytes,) * 2)


class _Watch:
    """The audit hook: counts file events, ends the process at one of them, tells what lies out of bounds."""

    def __init__(self, bounds: Bounds, own: Sequence[Path], told: int, last: int, deadly: int) -> None:
        self._writable = tuple(os.path.realpath(p) for p in (*bounds.writable, *own))
        self._forbidden = tuple(os.path.realpath(p) for p in bounds.forbidden)
        self._told, self._last, self._deadly = told, last, deadly
        self._process = os.getpid()
        self.count = 0
        sys.addaudithook(self._hear)

    def tell(self, **facts: object) -> None:
        os.write(self._told, (json.dumps(facts) + "\n").encode())

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _FILE_EVENTS:
            return
        writing = event != "open" or bool((arguments[2] or 0) & _WRITING)
        if writing and os.getpid() == self._process:
            self.count += 1
            if self.count == self._last:
                self.tell(stopped=self._last)
                os.kill(os.getpid(), self._deadly)
        touched = (
            arguments[:2] if event in ("os.rename", "os.link") else arguments[1 if event == "os.symlink" else 0 :][:1]
        )
        for path in touched:
            if isinstance(path, str | bytes | os.PathLike):
                self._place(event, os.fsdecode(path), writing)

    def _place(self, event: str, path: str, writing: bool) -> None:
        if event in ("open", "os.chmod", "os.truncate"):
            real = os.path.realpath(path)
        else:  # these act on a link and not through it
            real = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
        if any(_within(real, folder) for folder in self._forbidden):
            self.tell(what=event if writing else "read", path=real)
        elif writing and not real.startswith(_HARMLESS) and not any(_within(real, f) for f in self._writable):
            self.tell(what=event, path=real)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def loaded_by(argv: Sequence[object], folder: Path) -> list[str]:
    """Modules that a command loads beyond those that are there, in their order: what `preload` takes."""
    there, found = set(sys.modules), folder / "modules.json"

    def body() -> None:
        from edgepress.pipeline.cli import main

        sys.argv = ["compress", *map(str, argv)]
        with contextlib.suppress(SystemExit):
            main()
        found.write_text(json.dumps([name for name in sys.modules if name not in there]))

    run(body, ("warm-up",), folder, Bounds((folder,)), limit=600)
    names: list[str] = json.loads(found.read_text()) if found.is_file() else []
    return names


def emptied(folder: Path) -> Path:
    """The folder, empty; what lies there is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
