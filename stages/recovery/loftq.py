"""A and B begin as the best low-rank answer to the quantisation error: W ~ Q + s B A before the first step.

LoftQ (Li et al., arXiv 2310.08659), algorithm 1: by turns A and B are fitted to W - Q, and W - s B A is quantised to Q.
The first codes are the quantiser's; the later ones are the nearest in the same form (stages/quantisers/rounding.py). A
layer stops at the turn whose error is no longer the least, which the published loop does not look at. peft's own
initialisation quantises with a codebook of its own, and could not use the codes that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edgepress.stages.recovery import Start

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.stages.quantisers import Solved

QUANTISED = True
ARGUMENTS: Mapping[str, Any] = {}


def begin(layer: Any, W: Tensor, Q: Tensor, again: Callable[[Tensor], Solved], turns: int) -> Start:
    """Put the best A and B found into the layer, and say which codes they go with.

    W, Q (out, in): the weights before quantisation and after it; again: quantises such a matrix. A layer without an
    error keeps its usual start: A and B of zeros would never learn.
    """
    W, scale = W.float(), layer.scaling["default"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    whole = max(float(W.square().sum()), 1e-30)
    if not bool((W - Q).any()):
        return Start({}, [0.0] * turns, whole)
    b, a = best_of_rank((W - Q) / scale, len(A))
    solved, errors = None, [float((W - Q - scale * b @ a).square().sum())]
    for _ in range(turns - 1):
        following = again(W - scale * b @ a)
        Q = following.weight.to(Q.dtype)
        following_b, following_a = best_of_rank((W - Q) / scale, len(A))
        error = float((W - Q - scale * following_b @ following_a).square().sum())
        if error >= errors[-1]:
            break
        solved, b, a = following, following_b, following_a
        errors.append(error)
    A.data, B.data = a.to(A), b.to(B)
    return Start(solved.stored() if solved else {}, errors + [errors[-1]] * (turns - len(errors)), whole)


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
