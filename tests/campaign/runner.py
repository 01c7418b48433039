"""Which case has which kind, and several of them at once: each worker is a fork of the server that forks commands."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from tests.campaign import hostile, kills, planted  # noqa: F401  they register their kinds
from tests.campaign.case import KINDS, Case, Kind, attempted
from tests.campaign.world import World, warm_up


@dataclass(frozen=True)
class Wanted:
    seed: int
    kills: int
    hostile: int
    kind: str = ""
    minutes: float = 0


@dataclass(frozen=True)
class Result:
    """What is left of a case."""

    index: int
    kind: str
    group: str
    kills: int
    inputs: int
    seconds: float
    peak_bytes: int
    faults: dict[str, str]
    story: list[str]


def kind_of(seed: int, index: int) -> Kind:
    """The kind of a case: each comes as often as its weight says, in an order drawn anew for each round."""
    deck = [name for name, k in KINDS.items() for _ in range(k.weight)]
    turn, place = divmod(index, len(deck))
    random.Random(f"{seed}-deck-{turn}").shuffle(deck)
    return KINDS[deck[place]]


def replay(world: World, folder: Path, seed: int, index: int) -> Result:
    return run_case(world, folder, seed, index)


def run_case(world: World, folder: Path, seed: int, index: int) -> Result:
    chosen = kind_of(seed, index)
    began = time.monotonic()
    case = Case(world, folder / f"case-{index}", seed, index, chosen.name)
    with attempted(case):
        chosen.run(case)
        case.secret_kept()
        if case.canary.exists():
            case.fault("executed", "the canary is there")
    if chosen.group == "hostile":
        case.inputs = max(case.inputs, 1)
    for path in (case.folder, *case.folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(case.folder, ignore_errors=True)
    seconds = time.monotonic() - began
    return Result(
        index, chosen.name, chosen.group, case.kills, case.inputs, seconds, case.peak_bytes, case.faults, case.story
    )


def campaign(
    world: World, folder: Path, wanted: Wanted, jobs: int, log: Path | None = None, tell: TextIO | None = None
) -> list[Result]:
    """Cases from 0 on until the kills and inputs wanted are there, or the time is over."""
    if tell:
        print("making what cases start from …", file=tell, flush=True)
    warm_up(world)
    results: list[Result] = []
    began = time.monotonic()
    todo = _indices(wanted, results)
    busy: dict[int, tuple[int, Path]] = {}  # a worker's process: the case and where it writes its result
    spoken = began
    while True:
        late = wanted.minutes and time.monotonic() - began > wanted.minutes * 60
        while len(busy) < jobs and not late and (index := next(todo, None)) is not None:
            target = folder / f"result-{index}.json"
            worker = os.fork()
            if worker == 0:
                code = 1
                try:
                    target.write_text(json.dumps(asdict(run_case(world, folder, wanted.seed, index))))
                    code = 0
                finally:
                    os._exit(code)
            busy[worker] = (index, target)
        if not busy:
            return results
        done, status = os.wait()
        index, target = busy.pop(done)
        if status or not target.is_file():
            name = kind_of(wanted.seed, index)
            fault = {"message": f"the campaign's own process ended with status {status}"}
            results.append(Result(index, name.name, name.group, 0, 0, 0, 0, fault, []))
        else:
            results.append(Result(**json.loads(target.read_text())))
            target.unlink()
        if log:
            with log.open("a") as file:
                file.write(json.dumps(asdict(results[-1])) + "\n")
        if tell and results[-1].faults:
            print(f"case {index} ({results[-1].kind}): {results[-1].faults}", file=tell, flush=True)
        if tell and time.monotonic() - spoken > 20:
            spoken = time.monotonic()
            counts = f"{sum(r.kills for r in results)} kills, {sum(r.inputs for r in results)} inputs"
            print(f"{len(results)} cases, {counts}, {spoken - began:.0f} s", file=tell, flush=True)


def _indices(wanted: Wanted, results: list[Result]) -> Iterator[int]:
    """The next cases: of a group that has enough, no more."""
    index = 0
    while True:
        enough = {
            "kills": sum(r.kills for r in results) >= wanted.kills,
            "hostile": sum(r.inputs for r in results) >= wanted.hostile,
        }
        groups = {k.group for k in KINDS.values() if wanted.kind in k.name}
        if not groups or all(enough[group] for group in groups):
            return
        chosen = kind_of(wanted.seed, index)
        if wanted.kind in chosen.name and not enough[chosen.group]:
            yield index
        index += 1
