"""Quantise embedding and head to 8 or 4 bits, which GPTQ's file format has no place for.

The codes lie beside the model in `edge/embedding.safetensors`, and the model's own tensors become exactly
what the codes stand for, so what is measured anywhere is what the chip would compute.

One grid serves a whole row, a token. 8 bits are enough for the nearest codes between its least and largest weight. At
4 bits a tied matrix loses most of its quality so: of its columns a few have a hundred times the others' mean square as
the head's inputs. With those inputs' Hessian each row's range is searched for the least error weighted by them, and its
codes are GPTQ's (Frantar et al., arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgepress.checkpoints.packed_sizes import is_head
from edgepress.checkpoints.packing import dequantise_rows
from edgepress.stages.hessian import inverse_factor, live_diagonal
from edgepress.stages.quantisers.gptq import in_turn

SHRINKS = 11  # candidates of a row's range, each 5 % smaller than the one before
TURNS = 2  # of least squares between a row's codes and its grid
ROWS = 512  # solved at once: they stay in a processor's cache
SMALLEST_SCALE = 6.2e-5  # float16's smallest normal number is 6.1e-5


def quantise_outer(
    outer: Mapping[str, Tensor], bits: int, hessian: Tensor | None = None, damping: float = 0.01
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outer tensors with their matrices rounded, and the packed codes, one grid a row (a token).

    hessian: X^T X (d, d) of the inputs of the head, whose codes, or the tied embedding's, are then GPTQ's.
    """
    rounded = dict(outer)
    packed: dict[str, Tensor] = {}
    matrices = [name for name, tensor in outer.items() if tensor.dim() == 2]
    multiplied = [name for name in matrices if is_head(name)] or matrices
    for name in matrices:
        weight = outer[name].float()
        if hessian is not None and name in multiplied:
            codes, scales, minimum = solve_rows(weight, bits, hessian.to(weight.device), damping)
        else:
            codes, scales, minimum = quantise_rows(weight, bits)
        codes, scales, minimum = pack_bytes(codes, bits), scales.to(torch.float16), minimum.to(torch.float16)
        base = name.removesuffix(".weight")
        packed |= {f"{base}.codes": codes, f"{base}.scales": scales, f"{base}.minimum": minimum}
        rounded[name] = dequantise_rows(codes, scales, minimum, bits).to(outer[name].dtype)
    return rounded, packed


def quantise_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, columns) uint8, scales and minima (rows, 1) in float32 holding float16 values."""
    scales, minimum = _range(weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True), bits)
    return _nearest(weight, scales, minimum, bits).to(torch.uint8), scales, minimum


def solve_rows(weight: Tensor, bits: int, hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantise_rows`, with small tr(dW H dW^T): weight (rows, d), hessian (d, d)."""
    H, _ = live_diagonal(hessian)
    importance = H.diagonal() / H.diagonal().mean()
    order = importance.argsort(descending=True, stable=True)
    U, _, _ = inverse_factor(H[order][:, order], damping)
    found = []
    for rows in torch.split(weight, ROWS):
        scales, minimum = fit_rows(rows, bits, importance)
        S, Z = scales.expand_as(rows), (-minimum / scales).expand_as(rows)
        codes, _ = in_turn(rows[:, order], U, S, Z, 2**bits - 1, None)
        found.append((codes[:, order.argsort()].to(torch.uint8), scales, minimum))
    codes, scales, minimum = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, scales, minimum


def fit_rows(weight: Tensor, bits: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima (rows, 1) with the least squared error of the nearest codes, weighted by importance (d,).

    Of each row the ranges from its least to its largest weight and smaller ones, each followed by turns of weighted
    least squares between the codes and the weights.
    """
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    total = importance.sum()
    mean = _sums(weight, importance) / total
    best, least = _range(low, high, bits), torch.full_like(low, torch.inf)
    for shrink in range(SHRINKS):
        scales, minimum = _range(low * (1 - 0.05 * shrink), high * (1 - 0.05 * shrink), bits)
        for turn in range(TURNS + 1):
            codes = _nearest(weight, scales, minimum, bits)
            error = _sums((codes * scales + minimum - weight).square(), importance)
            better = error < least
            best = torch.where(better, scales, best[0]), torch.where(better, minimum, best[1])
            least = torch.where(better, error, least)
            if turn < TURNS:
                middle = _sums(codes, importance) / total
                centred = codes - middle
                spread = _sums(centred.square(), importance).clamp(min=1e-9)
                slope = _sums(centred * (weight - mean), importance) / spread
                scales = _float16(slope.clamp(min=SMALLEST_SCALE))
                minimum = _float16(mean - scales * middle)
    return best


def _range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    minimum = _float16(low)
    return _float16(((high - minimum) / (2**bits - 1)).clamp(min=SMALLEST_SCALE)), minimum


def _nearest(weight: Tensor, scales: Tensor, minimum: Tensor, bits: int) -> Tensor:
    return torch.round((weight - minimum) / scales).clamp(0, 2**bits - 1)


def _sums(values: Tensor, importance: Tensor) -> Tensor:
    return (values @ importance).unsqueeze(1)


def _float16(x: Tensor) -> Tensor:
    return x.to(torch.float16).float()


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Two 4-bit codes a byte, the lower column in the lower half; 8-bit codes as they are."""
    return codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4
