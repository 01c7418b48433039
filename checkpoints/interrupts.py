"""Ctrl-C, SIGTERM and SIGHUP end the command with one line and the exit code 128 + the signal's number.

While the command works, the first signal is raised as `Interrupted`, so that writers remove what is half written. The
exception can be lost: in a destructor Python prints and drops it, and libraries turn it into errors of their own. So
the signal is remembered, and raised again until `caught`. Before and after that work nothing is raised: the handler
itself ends the process. A process listens only if it is the command (`listen`) or runs it (`listening`).
Nothing heavy is imported here: this is the first module that the command loads.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 2.0  # seconds until a running step is not waited for, and a lost exception is raised again
_LEAVING = 5.0  # seconds the process may take to end once all is said
NEXT = "the same command goes on from the last finished block or step"
_ANEW = "the same command begins anew"

_BEFORE, _WORKING, _AFTER = range(3)
_phase = _AFTER
_owned = False  # the process is the command, and may be ended here
_ended: int | None = None  # the exit code, once the command has one
_heard = 0  # the first signal
_held, _waiting = False, 0  # signals wait, and which one does
_saying, _hurried, _told = False, False, False  # a line for it is being printed; another signal came; it is printed
_next = NEXT  # what a person is told of the same command
_gently: Callable[[], object] | None = None  # told first, where a loop of steps can stop by itself
_undo: dict[object, Callable[[], object]] = {}  # what a process that stops at once does first


class Interrupted(KeyboardInterrupt):
    """A signal was heard.

    Not KeyboardInterrupt itself: where that leaves code that a library has made from a string, as dataclasses do,
    CPython ends the process by SIGINT, even if it was caught later.
    """


def code() -> int:
    """The exit code of the signal that was heard; 0 without one."""
    return 128 + _heard if _heard else 0


# --- around the command ----------------------------------------------------------------------------------------------


def listen() -> None:
    """In a process that is the command, before it imports anything. A SIGHUP that nohup has switched off stays off."""
    global _owned, _phase
    _owned, _phase = True, _BEFORE
    _install()
    atexit.register(_leave)  # registered first, called last


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Around the command in a process that does other things too; the handlers of before are put back."""
    global _heard, _told, _hurried, _gently, _next
    _heard, _told, _hurried, _gently, _next = 0, False, False, None, NEXT
    before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGALRM)}
    _install()
    try:
        yield
    finally:
        if not _heard:  # else the process is about to end, and must not be stopped half-way
            for number, handler in before.items():
                signal.signal(number, handler)


def _install() -> None:
    for number in _SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def outcome(body: Callable[[], object]) -> BaseException | None:
    """Call the body, within which a signal is raised; what it raised. Once it has ended, nothing is raised any more."""
    global _phase
    hook = sys.unraisablehook
    sys.unraisablehook = lambda lost: _on_lost(lost, hook)
    try:
        _phase = _WORKING
        body()
    except BaseException as error:
        _phase = _AFTER  # first of all, and no call: Python looks for signals at calls and loops
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        return error
    _phase = _AFTER
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.unraisablehook = hook
    return None


def wind_up() -> None:
    """After a signal: say so, end the children, undo what is half done, and see to it that the process ends."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(code()))
    signal.setitimer(signal.ITIMER_REAL, 2 * _LEAVING)
    caught(lambda line: print(line, file=sys.stderr, flush=True))
    end_children()
    _undo_all()
    signal.setitimer(signal.ITIMER_REAL, _LEAVING if _owned else 0)  # another process ends when it likes


def end(ended: int) -> None:
    """End the process that `listen` was called in; a signal is heard until it is gone."""
    global _ended
    _ended = ended
    sys.exit(ended)


def _leave() -> None:
    """The last exit handler: what the interpreter does after it takes long with torch, and no signal is heard there."""
    if _ended is not None:
        _flush()
        os._exit(code() or _ended)


def begins_anew() -> None:
    """Say so, once interrupted: this command keeps nothing of what it has done."""
    global _next
    _next = _ANEW


@contextlib.contextmanager
def meanwhile(words: str) -> Iterator[None]:
    """What a person is told of the same command if it is interrupted within: work that keeps nothing till its end."""
    global _next
    before, _next = _next, words
    yield
    _next = before  # not after an interruption, which is told outside


# --- within the command ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gently(stop: Callable[[], object]) -> Iterator[None]:
    """Within, the first signal calls `stop`, so that a loop ends after its step; only then is it raised anywhere."""
    global _gently
    before, _gently = _gently, stop
    try:
        yield
    finally:
        _gently = before


def caught(say: Callable[[str], Any] | None = None, words: str = "") -> None:
    """The exception has arrived where the command can end in order: it is not raised again."""
    global _saying, _told
    if _heard and _phase == _WORKING:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if say and not _told:
        _saying = True
        try:
            with contextlib.suppress(OSError):  # of a terminal that was closed
                say(f"interrupted; {words or _next}")
        finally:
            _told, _saying = True, False
        if _hurried:
            _stop()


@contextlib.contextmanager
def or_undone(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` if what is within fails or the process stops, whatever signals come meanwhile."""
    key = object()
    _undo[key] = undo
    try:
        yield
    except BaseException:
        undo()  # a signal in here leaves it to `wind_up`
        _undo.pop(key, None)
        raise
    _undo.pop(key, None)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within, a signal waits. A child process started here has the signals blocked, until it calls `heed`."""
    global _held, _waiting
    _held = True
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _held = False
        if _waiting:
            number, _waiting = _waiting, 0
            signal.raise_signal(number)


@contextlib.contextmanager
def spawning() -> Iterator[None]:
    """As `held`, for children that multiprocessing spawns."""
    from multiprocessing import resource_tracker

    with held():
        resource_tracker.ensure_running()  # the first child starts it, which unblocks signals
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        yield


def heed(
    on_term: Callable[[int, FrameType | None], object] | int = signal.SIG_DFL, others: int = signal.SIG_IGN
) -> None:
    """In a child: leave Ctrl-C and SIGHUP, which its parent hears too, to the parent, and end at SIGTERM."""
    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, others)
    signal.signal(signal.SIGHUP, others)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def end_children() -> None:
    """Ask every child to end, then make it."""
    if "multiprocessing" not in sys.modules:
        return
    import multiprocessing

    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(2)
        if child.is_alive():
            child.kill()
            child.join()


# --- when a signal comes ---------------------------------------------------------------------------------------------


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _heard, _waiting, _hurried
    if _held:
        _waiting = _waiting or number
        return
    if _heard:
        if _saying and not _hurried:
            _hurried = True  # the line first
            return
        _stop("" if _told or _saying else "interrupted twice; stopped at once")
    _heard = number
    if _phase == _BEFORE:
        _stop("interrupted; nothing was begun")
    if _phase == _AFTER:
        if _owned:
            _stop("interrupted; the command had ended")
        _say("interrupted; the command had ended")
        return
    signal.signal(signal.SIGALRM, _again)
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE, _PATIENCE)
    if _gently is None:
        raise Interrupted
    _gently()


def _again(number: int, frame: FrameType | None) -> None:
    if _phase == _WORKING and not _held:
        raise Interrupted


def _on_lost(lost: Any, hook: Callable[[Any], Any]) -> None:
    if _heard and isinstance(lost.exc_value, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.01, _PATIENCE)
    else:
        hook(lost)


def _stop(line: str = "") -> None:
    """End the process here and now."""
    with contextlib.suppress(Exception):
        end_children()
    _undo_all()
    _flush()
    _say(line)
    os._exit(code())


def _say(line: str) -> None:
    global _told
    if line and not _told:
        _told = True
        with contextlib.suppress(OSError):  # of a terminal that was closed
            os.write(2, f"{line}\n".encode())


def _undo_all() -> None:
    for key, undo in list(_undo.items()):
        with contextlib.suppress(Exception):
            undo()
        _undo.pop(key, None)  # not before: another signal ends the process here, and tries again


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, full, or interrupted in this very call
            stream.flush()
