"""The Hessian of a layer's squared output error, and what its solvers share.

For a layer W (out, in) with inputs X (tokens, in) the error of a change dW is tr(dW H dW^T) with H = X^T X: the same
H for every row (OBS, Hassibi and Stork 1993; GPTQ, arXiv 2210.17323; SparseGPT, arXiv 2301.00774).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.checkpoint import Skeleton
    from edgepress.checkpoints.walk import BlockVisit


def hessians(block: BlockVisit) -> dict[tuple[str, ...], Tensor]:
    """X^T X over all calibration tokens for each distinct input, (in, in) float32.

    Where the block weighs its tokens, X^T diag(s) X for each layer, with its weights s (GuidedQuant, arXiv 2505.07004,
    section 3, with one group for all outputs).
    """
    sums: dict[tuple[str, ...], Tensor] = {}
    seen: dict[tuple[str, ...], int] = {}

    def add(names: tuple[str, ...], x: Tensor) -> None:
        x, start = x.float(), seen.get(names, 0)
        seen[names] = start + len(x)
        for own, times in _weighed(block, names):
            y = x if times is None else x * times[start : start + len(x), None].to(x.device)
            if own in sums:
                sums[own].addmm_(x.T, y)
            else:
                sums[own] = x.T @ y

    block.observe(add)
    return sums


def _weighed(block: BlockVisit, names: tuple[str, ...]) -> list[tuple[tuple[str, ...], Tensor | None]]:
    """The layers that share an input, together or each with the weights of its tokens."""
    return [((name,), block.token_weights[name]) for name in names] if block.token_weights else [(names, None)]


def of_head(skeleton: Skeleton, states: Iterable[Tensor]) -> Tensor:
    """X^T X (d, d) float32 of what the head's matrix multiplies, from the last block's outputs (b, L, d)."""
    total = torch.zeros(())
    with skeleton.head_inputs() as inputs_of, torch.no_grad():
        for chunk in states:
            x = inputs_of(chunk).flatten(0, -2).float()
            total = total.to(x.device) + x.T @ x
    return total


def live_diagonal(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of H that can be inverted where calibration never used a feature, and which those are: (in,) bool.

    Such a feature's diagonal becomes the mean of the others; its rows and columns are zero, so it touches no other.
    """
    H = hessian.clone()
    unused = H.diagonal() == 0
    H.diagonal()[unused] = 1 if bool(unused.all()) else H.diagonal()[~unused].mean()
    return H, unused


def shrunk(hessian: Tensor, shrinkage: float) -> Tensor:
    """H (in, in) with what lies off its diagonal reduced by a share (Schaefer and Strimmer 2005, target D)."""
    return hessian.lerp(hessian.diagonal().diag(), shrinkage) if shrinkage else hessian


def inverse_factor(hessian: Tensor, damping: float, shrinkage: float = 0.0) -> tuple[Tensor, float, bool]:
    """Upper Cholesky factor U of the damped inverse Hessian, H^-1 = U^T U; damping used; whether in float64.

    shrinkage: as `shrunk` takes it, first. Tries float32, then float64, then ten times the damping, until 1. Raises
    NumericsError saying so.
    """
    mean = float(hessian.diagonal().mean())
    hessian = shrunk(hessian, shrinkage)
    tried = []
    while damping <= 1:
        for dtype in (torch.float32, torch.float64):
            H = hessian.to(dtype).clone()
            H.diagonal().add_(damping * mean)
            L, failed = torch.linalg.cholesky_ex(H)
            if not int(failed):
                U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
                if not int(failed) and bool(torch.isfinite(U).all()):
                    return U.float(), damping, dtype == torch.float64
            tried.append(f"{damping:g} in {str(dtype).removeprefix('torch.')}")
        damping *= 10
    raise NumericsError(f"the Hessian stays singular; damping tried: {', '.join(tried)}. Give other calibration text")


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """Relative squared error of the layer's output over the calibration tokens."""
    delta = weight - approximation
    return float(((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum().clamp_min(1e-30))
