"""Stage 5: compensate the compression error with a low-rank adapter, without training.

EoRA (Liu et al., arXiv 2410.21271): the error dW is projected into the eigenspace of the layer's inputs,
scaled by the square roots of the eigenvalues, and the best rank-r approximation is taken there, where it
minimises the error of the layer's output instead of that of its weights. On request the adapter is rounded to 8-bit
codes with one scale a rank, which lie beside it; its own 16-bit tensors are then what the codes stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.config import peft_config
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.stages.hessian import hessians, shrunk
from edgepress.stages.options import Eora as Options
from edgepress.stages.pruning import HESSIANS
from edgepress.stages.requirements import Cost, forward_operations, linears, linked_bytes, tokens, walk_cost

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.writer import CheckpointWriter

VERSION = 1


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The shape with an adapter on every quantised layer. Raises PlanError where nothing was quantised."""
    if shape.grid is None:
        raise PlanError("eora compensates quantisation, and nothing is quantised before it; use --skip eora")
    if any(x.adapted for block in shape.blocks for x in block.linears):
        raise PlanError(
            "eora: this checkpoint already carries an adapter; give the quantised one without it, or leave eora out: "
            "--eora 0. A layer has room for one adapter"
        )
    rank = rank_of(shape, options)
    if options.rank > rank and options.rank != Options.rank:
        raise PlanError(f"--eora {options.rank}: the smallest quantised layer has rank {rank}; choose at most that")

    def compensated(linear: LinearShape) -> LinearShape:
        if linear.grid is None:
            return linear
        packed = options.bits == 8
        return replace(linear, adapter_rank=rank, adapter_dtype=linear.dtype, adapter_packed=packed)

    blocks = tuple(replace(block, linears=tuple(map(compensated, block.linears))) for block in shape.blocks)
    return replace(shape, blocks=blocks)


def rank_of(shape: ModelShape, options: Options) -> int:
    """What is asked for, or what the smallest quantised layer has where that is less."""
    limits = (min(x.out_features, x.in_features) for block in shape.blocks for x in block.linears if x.grid)
    return min(options.rank, *limits)


def remarks(shape: ModelShape, options: Options) -> list[str]:
    """What differs from what was asked, in words a person should read before the run."""
    if (rank := rank_of(shape, options)) == options.rank:
        return []
    return [f"eora: rank {rank}, which the smallest quantised layer has, and not {options.rank}"]


def cost(before: ModelShape, options: Options) -> Cost:
    """What the stage takes on a model of this shape: the covariance, its eigenvectors, the error's decomposition."""
    linked = linked_bytes(before, range(len(before.blocks)))
    solver = sum(x.in_features**2 * (tokens(options) + 9 * x.in_features) for x in linears(before))
    solver += sum(20 * x.weights * min(x.in_features, x.out_features) for x in linears(before))
    walk = walk_cost(before, options, HESSIANS, slowdown=3.1, linked=linked)
    return replace(walk, operations=2 * forward_operations(before, options) + solver)


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    from edgepress.checkpoints.image import TORCH_DTYPES
    from edgepress.checkpoints.scaling import rescaled, scaled_folders
    from edgepress.checkpoints.walk import Walk
    from edgepress.stages.reference import reference_weights

    reference, numbers = reference_weights(source, options.against)
    after, scaled = plan(source.shape, options), scaled_folders(source)
    options = replace(options, rank=rank_of(source.shape, options))
    walk = Walk(source, calibration.chunks(runtime.chunk_tokens), runtime, target.work, task="eora")
    for block in walk:
        if (first := after.firsts[block.index]) < block.index:  # one adapter for what is one block
            same = target.repeat_adapter_part(block.index, first)
            for name in (n.removesuffix(".lora_A.weight") for n in same if n.endswith(".lora_A.weight")):
                weight, (A, B) = block.linears[name].weight, (same[f"{name}.lora_{side}.weight"] for side in "AB")
                weight.copy_(weight.float() + (B.float() @ A.float()).to(weight.device))
            block.done(walk.facts[first])
            continue
        wanted = {x.name: x for x in after.blocks[block.index].linears if x.adapter_rank}
        dense = rescaled(scaled, block.index, reference.block(numbers[block.index]))
        adapter: dict[str, Tensor] = {}
        facts: dict[str, dict[str, float]] = {}
        for names, covariance in hessians(block).items():
            for name in (n for n in names if n in wanted):
                linear = block.linears[name]
                exact = dense[f"{name}.weight"].to(linear.weight.device).float()
                present = linear.weight.float()
                fit = fitted(exact - present, covariance, options, TORCH_DTYPES[wanted[name].adapter_dtype])
                linear.weight.copy_(present + fit.delta)
                adapter |= {f"{name}.{kind}": tensor.cpu() for kind, tensor in fit.tensors().items()}
                energy = max(output_energy(exact, covariance), 1e-30)
                facts[name] = {
                    "error_before": fit.before / energy,
                    "error_after": fit.after / energy,
                    "output_energy": energy,
                    "adapter_bytes": wanted[name].adapter_bytes,
                }
        target.write_adapter_part(block.index, adapter)
        block.done(facts)

    for index in range(len(source.shape.blocks)):
        target.copy_block(index, source, index)
    target.copy_outer(source)
    target.join_adapter(adapter_config(after, options.rank))
    target.finish(source.config, source)
    total = bought([layer for first in sorted(set(after.firsts)) for layer in walk.facts[first].values()])
    runtime.progress.say(f"  {in_words(total, options)}")
    return {
        "rank": options.rank,
        "against": options.against,
        "bits": options.bits,
        "total": total,
        "blocks": walk.facts,
    }


@dataclass(frozen=True)
class Fit:
    """One layer's adapter in the stored precision, and its objective norm((dW - B A) X)^2 without and with it."""

    B: Tensor  # (out, r)
    A: Tensor  # (r, in)
    before: float
    after: float
    packed: dict[str, Tensor]  # codes and scales of A and B, empty for 16 bits

    @property
    def delta(self) -> Tensor:
        """B A (out, in) float32, as whoever loads the adapter computes it."""
        return self.B.float() @ self.A.float()

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.A, "lora_B.weight": self.B, **self.packed}


def fitted(error: Tensor, covariance: Tensor, options: Options, dtype: torch.dtype) -> Fit:
    """The adapter for error dW (out, in) on inputs with covariance X^T X (in, in), rounding included.

    Rounding can undo a correction that was tiny to begin with: the adapter is zero where it would not help, so
    the objective is never above that without an adapter. options.shrinkage: the adapter is the best one on the
    covariance without that share of what lies off its diagonal, which serves text unlike the calibration's better.
    Candidates are compared, and errors told, on the whole covariance.
    """
    believed = shrunk(covariance, options.shrinkage)
    B, A = compensate(error, believed, options.rank)
    before = output_energy(error, covariance)
    nothing = stored(torch.zeros_like(B), torch.zeros_like(A), options.bits, dtype)
    best = Fit(*nothing[:2], before, before, nothing[2])
    for candidate in candidates(B, A, error, believed, options.bits, dtype):
        B, A, packed = stored(*candidate, options.bits, dtype)
        after = output_energy(error - B.float() @ A.float(), covariance)
        if after < best.after:
            best = Fit(B, A, before, after, packed)
    return best


def candidates(
    B: Tensor, A: Tensor, error: Tensor, covariance: Tensor, bits: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """The optimum, and at 8 bits also the best B for the A that rounding leaves: least squares in B alone."""
    yield B, A
    if bits == 8:
        _, A, _ = stored(B, A, bits, dtype)
        AC = A.double() @ covariance.double()  # (r, in)
        inverse = torch.linalg.pinv(AC @ A.double().T, hermitian=True, rtol=1e-9)
        yield (error.double() @ AC.T @ inverse).float(), A.float()


def stored(B: Tensor, A: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """B and A as the files hold them, and at 8 bits the codes that they are made of."""
    if bits == 16:
        return B.to(dtype), A.to(dtype), {}
    from edgepress.checkpoints.checkpoint import eight_bit, unpacked

    packed = {}
    for side, matrix, within in (("lora_A", A, 1), ("lora_B", B, 0)):
        packed[f"{side}.codes"], packed[f"{side}.scales"] = eight_bit(matrix, within)
    A, B = (unpacked(packed[f"{side}.codes"], packed[f"{side}.scales"], dtype) for side in ("lora_A", "lora_B"))
    return B, A, packed


def output_energy(matrix: Tensor, covariance: Tensor) -> float:
    """norm(M X)^2 over the calibration tokens: matrix M (out, in), covariance X^T X (in, in)."""
    return max(float(((matrix @ covariance) * matrix).sum()), 0.0)


def bought(layers: list[dict[str, float]]) -> dict[str, float]:
    """What the adapter did for all layers together: their summed objectives, relative to their outputs' energy.

    bought: share of the quantisation error that is gone; bought_per_kib: that share for each KiB of adapter.
    """
    energy = sum(layer["output_energy"] for layer in layers)
    before, after = (
        sum(layer[f"error_{when}"] * layer["output_energy"] for layer in layers) for when in ("before", "after")
    )
    size = sum(layer["adapter_bytes"] for layer in layers)
    share = (before - after) / before if before else 0.0
    return {
        "error_before": before / energy,
        "error_after": after / energy,
        "adapter_bytes": size,
        "bought": share,
        "bought_per_kib": share / (size / 1024),
    }


def in_words(total: dict[str, float], options: Options) -> str:
    """The same in one line."""
    return (
        f"output error of the quantised layers {100 * total['error_before']:.3g} % -> "
        f"{100 * total['error_after']:.3g} %: {100 * total['bought']:.1f} % of it bought back by "
        f"{size_text(total['adapter_bytes'], 'KiB', 1)} of {options.bits}-bit adapter, "
        f"{100 * total['bought_per_kib']:.2g} % a KiB"
    )


def compensate(error: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in), float32, with B A the best rank-r answer to `error` on these inputs.

    error dW (out, in) = wanted - present; covariance (in, in) = X^T X. With X^T X = Q L Q^T and
    Q' = Q sqrt(L): dW Q' = U S V^T, B = U_r S_r, A = V_r^T Q'^-1 (EoRA, equations 3 to 5). It minimises
    norm(dW X - B A X), so it is never worse than no adapter. Any Q' with X^T X = Q' Q'^T has the same B A: where the
    covariance has an inverse it is Cholesky's factor, ten times as fast. S is shared evenly between B and A, which
    halves the range that 16-bit storage has to cover.
    """
    root, unroot = _root(covariance.double())
    projected = error.double() @ root  # (out, in)
    out, columns = projected.shape
    # The leading singular vectors from the smaller Gram matrix: cheaper than a full decomposition.
    if out <= columns:
        _, U = torch.linalg.eigh(projected @ projected.T)
        U = U[:, -rank:].flip(1)  # (out, r)
        SV = U.T @ projected  # (r, in) = S V^T
    else:
        _, V = torch.linalg.eigh(projected.T @ projected)
        V = V[:, -rank:].flip(1)  # (in, r)
        US = projected @ V  # (out, r)
        S = US.norm(dim=0)
        U = US / S.clamp_min(1e-300)
        SV = S.unsqueeze(1) * V.T
    S = SV.norm(dim=1)
    B = U * S.sqrt()
    A = unroot(SV / S.sqrt().clamp_min(1e-150).unsqueeze(1))
    return B.float(), A.float()


def _root(covariance: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Q' (in, in) with covariance = Q' Q'^T, and what multiplies a matrix (r, in) by its inverse from the right."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    diagonal = factor.diagonal()
    if not failed and bool(diagonal.min() > 1e-6 * diagonal.max()):
        return factor, lambda x: torch.linalg.solve_triangular(factor, x, upper=False, left=False)
    L, Q = torch.linalg.eigh(covariance)
    # Directions without input cannot matter, and their inverse would only amplify noise.
    size = L.clamp_min(0).sqrt()
    live = size > size.max() * 1e-6
    inverse = torch.where(live, 1 / size.clamp_min(1e-300), torch.zeros_like(size))
    return Q * size, lambda x: x * inverse @ Q.T


def adapter_config(shape: ModelShape, rank: int) -> dict[str, Any]:
    """The adapter's description in PEFT's own words."""
    adapted = [x.name for block in shape.blocks for x in block.linears if x.adapter_rank]
    return peft_config(rank, rank, adapted)
