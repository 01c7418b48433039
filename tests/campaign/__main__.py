"""`python -m tests.campaign`: run cases, print the table; `--seed N --case K` replays one and tells its story."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.campaign import server


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, action="append", help="replay this case alone and tell its story")
    parser.add_argument("--kills", type=int, default=1000, help="kills at least")
    parser.add_argument("--hostile", type=int, default=1500, help="hostile inputs at least")
    parser.add_argument("--kind", default="", help="only kinds whose name holds this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=0, help="no new case after this long; 0: no limit")
    parser.add_argument("--world", type=Path, help="folder of what cases start from; kept, and used again")
    parser.add_argument("--log", type=Path, help="write every case as a line of JSON")
    arguments = parser.parse_args()
    server.prepare()
    from tests.campaign import runner, table
    from tests.campaign.world import World

    with tempfile.TemporaryDirectory(prefix="campaign-") as scratch:
        folder = Path(scratch)
        wanted = runner.Wanted(arguments.seed, arguments.kills, arguments.hostile, arguments.kind, arguments.minutes)
        world = World(arguments.world or folder / "world")
        if arguments.case:
            results = [runner.replay(world, folder, arguments.seed, index) for index in arguments.case]
            print("\n".join(table.story(result) for result in results))
        else:
            results = runner.campaign(world, folder, wanted, arguments.jobs, arguments.log, tell=sys.stderr)
            print(table.table(results))
            print(table.failures(results, arguments.seed))
    return int(any(result.faults for result in results))


if __name__ == "__main__":
    sys.exit(main())
