"""Turn Ctrl-C, SIGTERM and SIGHUP into a KeyboardInterrupt, and end with 128 + the signal's number.

The exception lets writers remove what is half written. It can be lost: in a destructor Python prints and drops it,
and libraries turn it into errors of their own. So the signal is remembered, and raised again until `caught`.
Nothing heavy is imported here, so that a signal during the command line's own imports is heard too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 2.0  # seconds until a running step is not waited for, and a lost exception is raised again
_LEAVING = 5.0  # seconds the process may take to end once all is said
NEXT = "the same command goes on from the last finished block or step"

_heard = 0  # the first signal
_told = False  # a line was printed for it
_gently: Callable[[], object] | None = None  # told first, where a loop of steps can stop by itself


def code() -> int:
    """The exit code of the signal that was heard; 0 without one."""
    return 128 + _heard if _heard else 0


def told() -> bool:
    return _told


def listen_early() -> None:
    """While the command line itself is imported there is nothing to clean up: say so and end."""
    for number in _SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end_early)


def _end_early(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted; nothing was begun\n")
    os._exit(128 + number)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Around the whole command. A SIGHUP that nohup has switched off stays off."""
    global _heard, _told, _gently
    _heard, _told, _gently = 0, False, None
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    hook = sys.unraisablehook
    for number in _SIGNALS:
        if number != signal.SIGHUP or before[number] != signal.SIG_IGN:
            signal.signal(number, _on_signal)
    sys.unraisablehook = lambda lost: _on_lost(lost, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if not _heard:  # else the process is about to end, and must not be stopped half-way
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def gently(stop: Callable[[], object]) -> Iterator[None]:
    """Within, the first signal calls `stop`, so that a loop ends after its step; only then is it raised anywhere."""
    global _gently
    before, _gently = _gently, stop
    try:
        yield
    finally:
        _gently = before


def caught(say: Callable[[str], Any] | None = None, words: str = NEXT) -> None:
    """The exception has arrived where the command can end in order: it is not raised again."""
    global _told
    if _heard:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if say and not _told:
        _told = True
        say(f"interrupted; {words}")


def leave() -> None:
    """All is said: end. A library's exit handler that hangs is given a few seconds.

    Python's own way out takes longer than that on a busy machine, and gives the alarm back its default, which kills.
    """
    if _heard:
        signal.signal(signal.SIGALRM, lambda *_: os._exit(code()))
        signal.setitimer(signal.ITIMER_REAL, _LEAVING)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code())


def end_children() -> None:
    """Ask every child to end, then make it."""
    import multiprocessing

    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(2)
        if child.is_alive():
            child.kill()
            child.join()


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _heard
    if _heard:
        with contextlib.suppress(Exception):
            end_children()
        os.write(2, b"interrupted twice; stopped at once\n")
        os._exit(128 + _heard)
    _heard = number
    signal.signal(signal.SIGALRM, _again)
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE, _PATIENCE)
    if _gently is None:
        raise KeyboardInterrupt
    _gently()


def _again(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _on_lost(lost: Any, hook: Callable[[Any], Any]) -> None:
    if _heard and isinstance(lost.exc_value, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.01, _PATIENCE)
    else:
        hook(lost)
