"""Kinds that stop the product at a random moment and run the same command again."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import psutil

from tests.campaign.case import Case, digest, kind
from tests.campaign.server import Stop
from tests.campaign.world import CHAINS, perplexities, weights


def _moment(case: Case, longest: float, events: int, signals: tuple[int, ...] = (signal.SIGKILL,)) -> Stop:
    """Half by the clock, half at a file event, which falls between two steps of a write."""
    number = case.draw.choice(signals)
    if case.draw.random() < 0.5:
        return Stop(seconds=case.draw.uniform(0.05, longest), signal=number)
    return Stop(event=case.draw.randrange(1, events), signal=number)


def _chain(case: Case, signals: tuple[int, ...], most: int, longest: float = 1.2) -> None:
    chain = case.draw.choice(list(CHAINS))
    case.tell(f"chain {chain}")
    world, out = case.world, case.work / "out"
    expected = world.undisturbed(chain)
    events = max(20, world.events(chain) // 3)
    done = case.until_done(world.chain_argv(chain, out), lambda _: _moment(case, longest, events, signals), most)
    if done.code == 0:
        case.same("weights", weights(out), weights(expected))
        case.same("report", perplexities(out), perplexities(expected))
        case.same("result", os.readlink(out / "result"), os.readlink(expected / "result"))
        if left := [str(p.relative_to(out)) for p in out.rglob(".work")]:
            case.fault("left over", f"{left} after the end")
    else:
        case.fault("message", f"the run could not be resumed: exit code {done.code}")


@kind("kills", 40)
def chain_killed(case: Case) -> None:
    """SIGKILL at a random moment of a chain, again and again; at the end bytes, fingerprints and perplexities match."""
    _chain(case, (signal.SIGKILL,), most=14)


@kind("kills", 10)
def chain_stopped(case: Case) -> None:
    """SIGINT, SIGTERM or SIGHUP in a chain: 130, 143 or 129, one line, nothing cut; then the same bytes."""
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
    _chain(case, tuple(codes), most=5)


@kind("kills", 8)
def sweep_killed(case: Case) -> None:
    """A sweep with --jobs 2, killed as a whole or one of its workers; at the end all bytes and rows match."""
    world, out = case.world, case.work / "out"
    expected = world.swept
    argv = ["sweep", world.sweep, "--jobs", "2", "-o", out]

    def victim(leader: int) -> None:
        workers = psutil.Process(leader).children(recursive=True)
        os.kill(case.draw.choice(workers).pid if workers and case.draw.random() < 0.4 else leader, signal.SIGKILL)

    for _ in range(5):
        done = case.compress(*argv, stop=Stop(seconds=case.draw.uniform(0.2, 2.5)), victim=victim, codes=(0, 1))
        case.kills += done.stopped
        if done.code == 0:
            break
    else:
        done = case.compress(*argv, codes=(0,))
    if done.code == 0:
        case.same("weights", weights(out), weights(expected))
        case.same("results", _rows(out), _rows(expected))


def _rows(out: Path) -> list[str]:
    """What a sweep's table says of each stage run, without times and memory."""
    import csv

    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return sorted(
        json.dumps({k: v for k, v in row.items() if not re.search("second|memory|machine|reused|path|folder", k)})
        for row in rows
        if not re.search("second|memory|reused", row.get("metric", ""))
    )


@kind("kills", 12)
def pack_killed(case: Case) -> None:
    """`pack` killed: the old image or the whole new one lies there, never a part."""
    image, expected = case.work / "image.bin", digest(case.world.image)
    old = case.draw.random() < 0.5
    if old:
        case.work_copy(case.world.image, "image.bin")
    for _ in range(3):
        argv = ["pack", case.world.last("five"), "--tokenizer", "--force", "-o", image]
        done = case.compress(*argv, stop=_moment(case, 0.35, 12))
        case.kills += done.stopped
        if digest(image) not in ({expected} if old else {expected, "none"}):
            case.fault("silently wrong", "a part of an image lies under its name")
    case.compress(*argv, codes=(0,))
    case.same("image", digest(image), expected)


@kind("kills", 12)
def unpack_killed(case: Case) -> None:
    """`unpack` killed: no folder, or the whole one."""
    out, expected = case.work / "restored", weights(case.world.restored)
    argv = ["unpack", case.world.image, "-o", out]
    for _ in range(3):
        done = case.compress(*argv, stop=_moment(case, 0.5, 60))
        case.kills += done.stopped
        if out.exists():
            case.same("restored", weights(out), expected)
            case.compress("verify", out, codes=(0,))
            return
    if case.compress(*argv, codes=(0,)).code == 0:
        case.same("restored", weights(out), expected)


@kind("kills", 16)
def eval_killed(case: Case) -> None:
    """`eval` of questions killed: the kept answers go on, and the scores are those of an undisturbed run."""
    world = case.world
    expected = _scores(world.answered / "scores.json")
    argv = world.eval_argv(world.model, case.work)
    signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    done = case.until_done(argv, lambda _: _moment(case, 0.6, 14, signals), most=5)
    if done.code == 0:
        case.same("scores", _scores(case.work / "scores.json"), expected)


def _scores(path: Path) -> list[object]:
    """What a report of `eval` says of each item."""
    kept = ("metric", "value", "low", "high", "ids", "values")
    checkpoints = json.loads(path.read_text())["checkpoints"]
    results = [(name, result) for c in checkpoints for name, result in c["results"].items()]
    return [(name, [score[key] for key in kept]) for name, result in results for score in result["scores"]]


@kind("kills", 8)
def report_killed(case: Case) -> None:
    """`report` killed: the page is the old one, none, or whole; afterwards it is whole."""
    out = case.work_copy(case.world.undisturbed("five"))
    argv = ["report", out, "--samples", "0"]
    for _ in range(2):
        done = case.compress(*argv, stop=_moment(case, 1.5, 20))
        case.kills += done.stopped
        page = out / "report.html"
        if page.exists() and not page.read_text().rstrip().endswith("</html>"):
            case.fault("silently wrong", "a part of a page lies under its name")
    if case.compress(*argv, codes=(0,)).code == 0 and not (out / "report.html").read_text().rstrip().endswith(
        "</html>"
    ):
        case.fault("silently wrong", "the page is not whole")


@kind("kills", 6)
def disk_full(case: Case) -> None:
    """Files cannot grow beyond a random size: one message, nothing cut; with room the run goes on to the same bytes."""
    chain = case.draw.choice(list(CHAINS))
    case.tell(f"chain {chain}")
    argv, out = case.world.chain_argv(chain, case.work / "out"), case.work / "out"
    expected = case.world.undisturbed(chain)
    for _ in range(2):
        bound = int(2 ** case.draw.uniform(14, 17))  # the command's own words are in a file, too
        done = case.compress(*argv, most_file_bytes=bound)
        case.tell(f"at most {bound} bytes a file")
        case.kills += 1
        if done.code == 0:
            break
    done = case.compress(*argv, codes=(0,))
    if done.code == 0:
        case.same("weights", weights(out), weights(expected))
        case.same("report", perplexities(out), perplexities(expected))
