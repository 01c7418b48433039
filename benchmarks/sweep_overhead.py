"""A sweep of 12 configurations that share their beginnings, against the time of its distinct stage runs.

Goal: at most 5 % more. Both numbers are of the same run: the seconds of each node (a stage run with its proof, its
hashes and its measurement, or the measurement of the uncompressed model) are added up, and the sweep's own time
from opening the store to the written table is divided by their sum. What the same configurations would have taken
one by one is added up from the same seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks.shapes import write_random
from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.pipeline.cli_sweep import duration

RECIPE = """
name: overhead
data: embedded
tokens: 2048
stages:
  - depth: {samples: 4}
  - wanda: {samples: 8}
  - gptq: {samples: 4, group: 64}
sweep:
  configurations:
    - name: "depth {depth.remove} + width {wanda.pattern}, {stages}"
      grid:
        depth.remove: [1, 2]
        wanda.pattern: ["1:8", "2:4", "4:8"]
        stages: {pruned: [depth, wanda], quantised: [depth, wanda, gptq]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8, help="blocks of SmolLM2-135M's shape, random weights")
    blocks = parser.parse_args().blocks
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        model = write_random(Path(folder) / f"smollm2-{blocks}", "smollm2-135m", blocks)
        (Path(folder) / "overhead.yaml").write_text(RECIPE)
        measure(Path(folder), model)


def measure(folder: Path, model: Path) -> None:
    from edgepress.pipeline.results import write_results
    from edgepress.pipeline.store import Store
    from edgepress.pipeline.sweep import SweepView, carry_out, prepare, require_room, write_state
    from edgepress.pipeline.sweep_recipe import load_sweep
    from edgepress.pipeline.workers import Here

    out = folder / "out"
    sweep = load_sweep(str(folder / "overhead.yaml"), {"model": str(model)})
    began = time.monotonic()
    with Store(out).opened():
        tree = prepare(sweep, out)
        require_room(out, tree)
        with SweepView(Console(), out / "sweep.log") as view:
            result = carry_out(tree, out, Here(view.step), view, lambda name: None)
        write_results(out, sweep.name, result)
        write_state(out, sweep, result)
    whole = time.monotonic() - began
    runs = sum(outcome.seconds for outcome in result.outcomes.values())
    one_by_one = sum(result.outcomes[key].seconds for path in tree.paths.values() for key in path)
    print(f"{len(tree.paths)} configurations; {result.counts()}")
    print(f"sweep {whole:.1f} s, its distinct stage runs {runs:.1f} s: ratio {whole / runs:.3f}, goal 1.05")
    print(f"one by one the configurations would take {duration(one_by_one)}: {one_by_one / whole:.1f} times as long")


if __name__ == "__main__":
    main()
