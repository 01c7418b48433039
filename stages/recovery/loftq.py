"""A and B begin as the best low-rank answer to the quantisation error: W ~ Q + s B A before the first step.

LoftQ (Li et al., arXiv 2310.08659), equation 6 with one iteration: the codes Q are the quantiser's and stay. peft's own
initialisation quantises anew with a codebook of its own, and could not use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

QUANTISED = True
ARGUMENTS: Mapping[str, Any] = {}


def begin(layer: Any, error: Tensor) -> None:
    """error (out, in): W - Q. A layer without one keeps its usual start: A and B of zeros would never learn."""
    if not bool(error.any()):
        return
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b, a = best_of_rank(error / layer.scaling["default"], len(A))
    A.data, B.data = a.to(A), b.to(B)


def best_of_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) float32 with B A nearest to error (out, in) by the Frobenius norm.

    Its leading singular vectors, from the smaller Gram matrix; the singular values are shared evenly.
    """
    import torch

    E = error.double()
    if E.shape[0] > E.shape[1]:
        A, B = best_of_rank(E.T, rank)
        return B.T.contiguous(), A.T.contiguous()
    _, U = torch.linalg.eigh(E @ E.T)
    U = U[:, -rank:].flip(1)  # (out, r)
    SV = U.T @ E  # (r, in)
    root = SV.norm(dim=1).sqrt()
    return (U * root).float(), (SV / root.clamp_min(1e-150).unsqueeze(1)).float()
