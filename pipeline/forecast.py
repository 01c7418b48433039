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
from edgepress.stages.needs import HESSIANS, NOTHING, needs
from edgepress.stages.recovery.shapes import adapters

# Seconds measured over seconds that the arithmetic alone would take, in the README's demo (SmolLM2-135M, bfloat16, two
# cores that multiply 4e11 times a second); and what every stage run costs besides.
_FACTOR = {"source": 4.0, "depth": 2.1, "wanda": 3.9, "lora": 2.9, "gptq": 4.5, "eora": 3.1}
_FIXED_SECONDS = 1.0
_DORA_STEPS = 400  # multiply-adds in whose time one weight's direction, norm and gradient pass by
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
        max((n.step.peak_memory_bytes for n in runs if n.step), default=0),
        _machine(),
    )


def node_seconds(node: Node, speed: float) -> float:
    """speed: multiply-adds per second, from measured_speed."""
    seconds = (
        measuring_operations(node.recipe, node.step.shape if node.step else node.before) / speed * _FACTOR["source"]
    )
    if node.step is None:
        return seconds
    work = stage_seconds(node.stage, node.step.options, node.before, speed)
    return seconds + work + node.step.shape.file_bytes / _DISK_BYTES_PER_SECOND


def stage_seconds(stage: str, options: Any, shape: ModelShape, speed: float) -> float:
    """Of a stage's own work, without measuring and writing. speed: as for node_seconds."""
    return stage_operations(stage, options, shape) / speed * _FACTOR.get(stage, 1.0) + _FIXED_SECONDS


def stage_operations(stage: str, options: Any, shape: ModelShape) -> float:
    """Multiply-adds of one stage's run on a model of this shape; vocabulary and pad only copy."""
    if stage in ("vocabulary", "pad"):
        return 0.0
    tokens = int(options.samples * options.length)
    block = max(sum(x.weights for x in b.linears) for b in shape.blocks)
    head = shape.vocabulary * shape.hidden_size
    count = len(shape.blocks)
    forward = float(tokens * count * block)
    if stage == "depth":
        return _depth_operations(options, tokens, block, head, count)
    if stage == "lora":
        trained = int(options.total_steps * options.batch * options.length)
        passes = 3 + bool(options.checkpointing) + bool(options.distill)
        looks = int((options.total_steps // options.save_steps + 1) * options.held_out * options.length)
        return float((passes * trained + looks) * (count * block + head)) + _adapter_operations(options, shape)
    layers = [x for b in shape.blocks for x in b.linears]
    solver = 0
    if needs(options) == NOTHING:
        return float(count * block)
    if stage == "eora":  # the covariance, its eigenvectors, and a decomposition of the error
        narrow = [min(x.in_features, x.out_features) for x in layers]
        solver = sum(x.in_features**2 * (tokens + 9 * x.in_features) for x in layers)
        solver += sum(20 * x.weights * n for x, n in zip(layers, narrow, strict=True))
    elif needs(options) == HESSIANS:  # the Hessian, its factor, and the columns one after the other
        solver = sum(x.in_features**2 * (tokens + x.out_features + 2 * x.in_features) for x in layers)
    return 2 * forward + solver


def _adapter_operations(options: Any, shape: ModelShape) -> float:
    """What a method computes with whole matrices besides: in each micro-batch, and to find where to begin."""
    found = adapters(shape, options)
    weights, work = sum(x.weights for x in found), 0.0
    if any(x.adapter_vector == "magnitude" for x in found):
        batches = options.total_steps * (options.batch // options.micro_batch)
        work += float(batches * weights * (3 * options.rank + _DORA_STEPS))
    if options.recovery.begin is not None:  # eigenvectors of the smaller Gram matrix
        narrow = [min(x.in_features, x.out_features) for x in found]
        work += float(sum(2 * x.weights * n + 9 * n**3 for x, n in zip(found, narrow, strict=True)))
    return work


def _depth_operations(options: Any, tokens: int, block: int, head: int, count: int) -> float:
    forward = float(tokens * count * block)
    if options.layers or options.metric in ("magnitude", "influence"):
        return forward
    if options.metric == "taylor":
        return 3 * (forward + tokens * head)
    # The walk runs only the blocks behind each candidate, on average half of them, and one head a candidate.
    candidates = max(1, count - int(options.protect_first) - int(options.protect_last))
    once = tokens * (block * (count + candidates * count / 2) + head * (candidates + 1))
    return float(once * (int(options.remove) if options.rerank else 1))


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
