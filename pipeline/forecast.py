"""How long stage runs will take on this machine: their arithmetic, over the speed it multiplies at.

A rough forecast to decide by: each stage's multiply-adds are counted from shapes, and one factor a stage, fitted to
a measured run on a processor, says how much slower than a large matrix product its own work is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from edgepress.checkpoints.shape import ModelShape
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.tree import Node, Tree

_MEASURING_SLOWDOWN = 4.0  # as stages.cost.Cost.slowdown
_DISK_BYTES_PER_SECOND = 400e6  # a stage's files are written, hashed, and read again by its check
_TRIAL_SECONDS = 0.5  # long enough that a busy machine is idle for once
_ROWS_TEXT_TOKENS = 290_000  # WikiText-2's test split, which `tokens: 0` measures whole


@dataclass(frozen=True)
class Forecast:
    asked: int
    distinct: int
    shared: int
    configurations: int
    seconds: float  # one after the other
    disk_bytes: int
    peak_memory_bytes: int
    machine: str

    def to_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)


def forecast(tree: Tree) -> Forecast:
    """Of all distinct stage runs and the measurements after them; nothing in the store is counted as done."""
    speeds = {key: measured_speed(*key) for key in {(n.recipe.device, n.recipe.dtype) for n in tree.nodes.values()}}
    runs = tree.stage_runs().values()
    sources = [node for node in tree.nodes.values() if node.step is None]
    return Forecast(
        tree.asked,
        tree.distinct,
        tree.shared,
        len(tree.paths),
        sum(node_seconds(n, speeds[n.recipe.device, n.recipe.dtype]) for n in (*sources, *runs)),
        sum(n.step.written_bytes for n in runs if n.step),
        max((n.step.cost.peak_memory_bytes for n in runs if n.step), default=0),
        _machine(),
    )


def node_seconds(node: Node, speed: float) -> float:
    """speed: multiply-adds per second, from measured_speed."""
    shape = node.step.shape if node.step else node.before
    seconds = measuring_operations(node.recipe, shape) / speed * _MEASURING_SLOWDOWN
    if node.step is None:
        return seconds
    return seconds + node.step.cost.seconds(speed) + shape.file_bytes / _DISK_BYTES_PER_SECOND


def measuring_operations(recipe: Recipe, shape: ModelShape) -> float:
    """Multiply-adds of one measurement of perplexity."""
    weights = sum(sum(x.weights for x in b.linears) for b in shape.blocks) + shape.vocabulary * shape.hidden_size
    return float((recipe.tokens or _ROWS_TEXT_TOKENS) * weights)


def measured_speed(device: str, dtype: str) -> float:
    """Multiply-adds per second of one large matrix product here, in the precision the recipe would run in."""
    import torch

    from edgepress.checkpoints.runtime import choose_device, choose_dtype

    where = choose_device(device)
    precision = choose_dtype(dtype, where, "BF16")
    size = 4096 if where.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=precision, device=where)
    # On a processor the time of one thread, times their number: so what others run beside us does not count.
    threads = torch.get_num_threads()
    shares, clock = (threads, time.thread_time) if where.type == "cpu" else (1, time.perf_counter)
    torch.set_num_threads(1)
    best, until = float("inf"), time.perf_counter() + _TRIAL_SECONDS
    while time.perf_counter() < until:
        began = clock()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, clock() - began)
    torch.set_num_threads(threads)
    return shares * size**3 / best


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''} of this processor"
