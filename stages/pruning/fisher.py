"""Least predicted rise of the calibration text's loss first, and so of its perplexity: width chosen as depth is.

Without a weight w the loss rises by w^2 h / 2 to second order (Optimal Brain Damage, LeCun et al. 1989), where h is the
Hessian's diagonal, for which the empirical Fisher information stands here: the sum of g^2 over the calibration windows
with g a window's gradient. That ranks as abs(w) x norm of its gradients does (GBLM-Pruner, arXiv 2311.04902). Measuring
the perplexity without each weight, as depth does without each block, would take a pass for every weight.

The gradients are those of the model as it comes, and so are all masks: chosen backwards before the first block is
written, and kept until then, a bit a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.shape import Amount, Pattern, Sparsity
from edgepress.stages.gradients import Linears, backwards
from edgepress.stages.pruning import GRADIENTS
from edgepress.stages.pruning.select import kept, lost_share, set_zeros

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.runtime import Runtime
    from edgepress.checkpoints.tokens import TokenBatches
    from edgepress.checkpoints.walk import BlockVisit

NEEDS = GRADIENTS
FOLDER = "gradients"  # within the stage's work


def sparsity(amount: Amount) -> Sparsity:
    return amount


def choose(
    source: Checkpoint,
    calibration: TokenBatches,
    groups: Sequence[Mapping[str, Pattern]],
    runtime: Runtime,
    folder: Path,
) -> None:
    """Keep a mask for every layer that `groups` names, block by block, in the stage's work; nothing where it has them.

    A block that runs several times has the sum of all its runs.
    """
    from safetensors.torch import save_file

    from edgepress.checkpoints.checkpoint import Skeleton
    from edgepress.checkpoints.walk import Work

    count, firsts, work = len(groups), source.shape.firsts, Work(folder / FOLDER)
    if len(work.entries) == len(set(firsts)):
        return
    if work.entries:  # a kill came between them, and the gradients before it are gone
        work.remove()
        work = Work(work.folder)
    sums: dict[int, dict[str, Tensor]] = {}

    def add(index: int, linears: Linears) -> None:
        own = sums.setdefault(firsts[index], {})
        for name, linear in linears.items():
            assert linear.weight.grad is not None
            own[name] = own.get(name, 0) + linear.weight.grad.float().square()
            linear.weight.grad = None

    skeleton = Skeleton(source, runtime.device, runtime.dtype)
    windows = [ids for chunk in calibration.chunks(runtime.chunk_tokens) for ids in torch.split(chunk, 1)]
    runtime.progress.start("gradients", count)
    for index, linears in backwards(skeleton, range(count), windows, runtime, add):
        if firsts[index] == index:
            found: dict[str, Tensor] = {}
            for name, nm in groups[index].items():
                weight = linears[name].weight.detach()
                score = weight.float().square() * sums[index][name]
                if not bool(score.isfinite().all()):
                    raise NumericsError(f"the gradient of block {index}, {name} is not finite")
                mask = kept(score, nm, weight)
                found[name] = packed(mask)
                found[f"{name}.lost"] = torch.tensor(lost_share(score, mask))
            del sums[index]
            save_file(found, path := _path(work.folder, index))
            work.vouch(path)
            work.append({"block": index})
        runtime.progress.step(block=f"{count - index}/{count}")


def prune(block: BlockVisit, groups: Mapping[str, Pattern]) -> dict[str, Any]:
    from safetensors.torch import load_file

    assert block.work is not None, "the masks are chosen before the walk, and lie in its work"
    found, lost = load_file(_path(block.work.folder / FOLDER, block.index)), {}
    for name in groups:
        weight = block.linears[name].weight
        set_zeros(weight, unpacked(found[name], weight.shape).to(weight.device))
        lost[name] = float(found[f"{name}.lost"])
    return {"lost_score_share": lost}


def _path(folder: Path, index: int) -> Path:
    return folder / f"masks-{index:05d}.bin"


def packed(mask: Tensor) -> Tensor:
    """Eight places of a mask in a byte: uint8, the last one filled with zeros."""
    bits = torch.nn.functional.pad(mask.flatten().cpu().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def unpacked(found: Tensor, shape: torch.Size) -> Tensor:
    """The mask of this shape, bool."""
    bits = found.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten()[: shape.numel()].view(shape).bool()
