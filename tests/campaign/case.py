"""One case of the campaign: its folders, its random generator, the commands it runs and what was wrong with them."""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.campaign import server
from tests.campaign.server import Bounds, Done, Stop
from tests.campaign.world import EVAL, World, number, plain_perplexity

FAULTS = ("silently wrong", "executed", "outside", "traceback", "hang", "memory", "left over", "message")
MOST_BYTES = 2 * 2**30
SECRET = "the-secret-that-no-output-may-hold"


@dataclass
class Case:
    """work: where commands run and write. inputs: given, and not to be changed. outside: not their business."""

    world: World
    folder: Path
    seed: int
    index: int
    kind: str
    kills: int = 0
    inputs: int = 0  # hostile inputs tried
    peak_bytes: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    story: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = random.Random(f"{self.seed}-{self.index}-{self.kind}")
        server.emptied(self.folder)
        self.work, self.given, self.outside = (self.folder / name for name in ("work", "given", "outside"))
        for place in (self.work, self.given, self.outside):
            place.mkdir()
        self.canary = self.outside / "canary"
        self.cache = self.folder / "cache"
        self.environment = {"XDG_CACHE_HOME": str(self.cache), "HOME": str(self.cache)}
        self.environment["HF_HOME"] = str(self.cache / "hub")
        (self.outside / "secret.txt").write_text(f"{SECRET}\n" * 400)
        (self.outside / "victim.txt").write_text("must stay as it is\n")

    def fault(self, column: str, words: str) -> None:
        self.faults.setdefault(column, words)

    def tell(self, words: str) -> None:
        self.story.append(words)

    def copy(self, source: Path, name: str = "") -> Path:
        """A file or folder of the world among what the case is given; its links stay links."""
        return _copied(source, self.given / (name or source.name))

    def work_copy(self, source: Path, name: str = "out") -> Path:
        """The same where commands write."""
        return _copied(source, self.work / name)

    # --- commands ----------------------------------------------------------------------------------------------------

    def compress(self, *argv: object, stop: Stop | None = None, codes: Sequence[int] = (0, 2), **more: Any) -> Done:
        """Run a command, hold it against what every command must keep, and give what it said.

        codes: exit codes that it may end with where nothing stops it.
        """
        bounds = Bounds((self.work, self.cache), (self.outside,), more.pop("most_file_bytes", 0), self.environment)
        before, cut = _state(self.given, self.outside), _half_written(self.work)
        done = server.compress(argv, self.work, bounds, stop, **more)
        self.judge(done, codes, stop)
        if done.code >= 0 and not done.hung and (left := _half_written(self.work) - cut):
            self.fault("left over", ", ".join(sorted(left)[:3]))
        if _state(self.given, self.outside) != before:
            self.fault("outside", f"what was given or lies outside was changed by {done.command}")
        return done

    def judge(self, done: Done, codes: Sequence[int], stop: Stop | None = None) -> None:
        self.tell(f"{done.command} -> {done.code} in {done.seconds:.2f} s: {_last_words(done)}")
        self.peak_bytes = max(self.peak_bytes, done.peak_bytes)
        killed = done.stopped and done.code == -signal.SIGKILL
        if self.canary.exists():
            self.fault("executed", done.command)
        if done.outside:
            self.fault("outside", "; ".join(done.outside[:3]))
        if SECRET in done.said:
            self.fault("outside", "the secret was printed")
        if done.hung:
            self.fault("hang", done.command)
            return
        if done.orphans:
            self.fault("left over", "processes it started outlived it")
        if done.peak_bytes > MOST_BYTES:
            self.fault("memory", f"{done.peak_bytes / 2**20:.0f} MiB")
        if "Traceback (most recent call last)" in done.said:
            self.fault("traceback", f"{_last_words(done)} {_where(done)}")
        elif done.code < 0 and not killed:
            column = "message" if stop and done.code == -stop.signal else "traceback"
            self.fault(column, f"ended by signal {-done.code}")
        elif done.stopped and done.code == 128 + (stop.signal if stop else 0):
            if len(done.said.strip()) == 0:
                self.fault("message", f"{stop} and not a word")
        elif not killed and done.code not in codes:
            self.fault("message", f"exit code {done.code}: {_last_words(done)}")
        elif done.code == 2 and len(re.findall(r"^error: |^Usage: ", done.said, re.MULTILINE)) != 1:
            self.fault("message", f"not exactly one message: {_last_words(done)}")

    def until_done(
        self, argv: Sequence[object], stops: Callable[[int], Stop], most: int, codes: Sequence[int] = (0,)
    ) -> Done:
        """The same command again and again, each time stopped at another moment, until it ends by itself."""
        for attempt in range(most):
            done = self.compress(*argv, stop=stops(attempt), codes=codes)
            if not done.stopped:
                return done
            self.kills += 1
            if done.code == 0:  # the signal came when all was done
                return done
        return self.compress(*argv, codes=codes)

    # --- comparing ---------------------------------------------------------------------------------------------------

    def same(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            self.fault("silently wrong", f"{what}: {_difference(found, expected)}")

    def eval(self, model: Path | str, *more: object, text: Path | None = None) -> Done:
        return self.compress("eval", model, "--text", text or self.world.text, *EVAL, *more)

    def like_plain(self, done: Done, folder: Path, unchanged: float, gguf: str | None = None) -> None:
        """An evaluation that gave a number must agree with plain transformers, or, where that fails, with the number
        from before the change, which then was none to us."""
        if done.code != 0:
            return
        ours, target = number(done.out), self.folder / "plain"
        text = self.world.text.read_text()
        plain = server.run(
            lambda: plain_perplexity(folder, text, target, gguf),
            ("plain",),
            self.folder,
            Bounds((self.folder,)),
            limit=60,
        )
        theirs = float(target.read_text()) if plain.code == 0 and target.is_file() else unchanged
        self.tell(
            f"ours {ours}, plain {theirs if plain.code == 0 else 'fails: ' + _last_words(plain)}, before {unchanged}"
        )
        close = math.isfinite(ours) and abs(ours - theirs) <= 2e-4 * theirs
        if not close:
            whose = "plain transformers" if plain.code == 0 else "before the change (plain transformers fails)"
            self.fault("silently wrong", f"{ours} where {whose} has {theirs}")

    def secret_kept(self) -> None:
        """No file that was written holds the secret."""
        for path in self.work.rglob("*"):
            small = path.is_file() and not path.is_symlink() and path.stat().st_size < 2**24
            if small and SECRET.encode() in path.read_bytes():
                self.fault("outside", f"the secret was read into {path.relative_to(self.work)}")


def _copied(source: Path, target: Path) -> Path:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy(source, target)
    return target


def _state(*folders: Path) -> dict[str, tuple[Any, ...]]:
    """Everything in folders, by what would show that it was changed."""
    found = {}
    for folder in folders:
        for path, inner, files in os.walk(folder):
            for name in (*inner, *files):
                facts = os.lstat(os.path.join(path, name))
                found[os.path.join(path, name)] = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_mode)
    return found


def _half_written(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*.partial") if p.name.startswith(".")}


def _last_words(done: Done) -> str:
    lines = [line.strip() for line in (done.err or done.out).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(nothing)"


def _where(done: Done) -> str:
    """The last place in our own code that a traceback names."""
    root = str(Path(__file__).parents[2])
    places = re.findall(rf'File "{re.escape(root)}/((?!\.venv|tests)[^"]+)", line (\d+)', done.said)
    return f"({places[-1][0]}:{places[-1][1]})" if places else ""


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [k for k in {**found, **expected} if found.get(k) != expected.get(k)]
        return f"{len(keys)} differ, e.g. {keys[:2]}"
    if isinstance(found, list) and isinstance(expected, list):
        place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
        if place is None:
            return f"{len(found)} in place of {len(expected)}: {str((found + expected)[-3:])[:150]}"
        found, expected = found[place : place + 3], expected[place : place + 3]
    return f"{str(found)[:150]} in place of {str(expected)[:150]}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


@contextmanager
def attempted(case: Case) -> Iterator[None]:
    """An error in the campaign's own code is told as such, never counted as right."""
    try:
        yield
    except Exception as error:
        import traceback

        case.fault("message", f"the campaign itself failed: {type(error).__name__}: {error}")
        case.tell(traceback.format_exc())


CaseFunction = Callable[[Case], None]


@dataclass(frozen=True)
class Kind:
    """A kind of case: what it does to the product, how often it comes up, and whether it kills or feeds."""

    name: str
    group: str  # "kills" or "hostile"
    weight: int
    run: CaseFunction
    about: str


KINDS: dict[str, Kind] = {}


def kind(group: str, weight: int) -> Callable[[CaseFunction], CaseFunction]:
    """Register a function as a kind; its docstring's first line is shown in the table's legend."""

    def register(function: CaseFunction) -> CaseFunction:
        name = function.__name__.replace("_", " ")
        KINDS[name] = Kind(name, group, weight, function, (function.__doc__ or "").split("\n")[0])
        return function

    return register
