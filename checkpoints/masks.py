"""N:M masks of weights, and the proof that a model still holds one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.shape import Sparsity


def group_zeros(weight: Tensor, m: int) -> Tensor:
    """Zeros in every run of M consecutive weights of a row: (out, in / M). weight (out, in).

    M may be the whole layer's size: (1, 1).
    """
    rows, columns = weight.shape
    if m == rows * columns:
        return (weight == 0).sum().view(1, 1)
    if columns % m:
        raise PlanError(f"a width of {columns} is not divisible by {m}")
    return (weight == 0).view(rows, columns // m, m).sum(dim=-1)


def holds(weight: Tensor, pattern: Sparsity) -> bool:
    """Whether every group of M has at least N zeros."""
    nm = pattern.on(weight.shape[1], weight.shape[0])
    return bool((group_zeros(weight, nm.of) >= nm.removed).all())


@dataclass
class MaskProof:
    """Counts over many layers: zeros the pattern asks for, how many are there, and mask positions lost."""

    pattern: Sparsity
    expected: int = 0
    kept: int = 0
    refilled: int = 0

    def add(self, weight: Tensor, mask: Tensor | None = None) -> None:
        """Count one layer. weight (out, in); mask (out, in) is True where a weight may live.

        N zeros are asked of every group of M; with a mask also that each of its zeros is still one.
        """
        nm = self.pattern.on(weight.shape[1], weight.shape[0])
        zeros = group_zeros(weight, nm.of).clamp(max=nm.removed)
        self.expected += zeros.numel() * nm.removed
        self.kept += int(zeros.sum())
        if mask is not None:
            self.refilled += int(((weight != 0) & ~mask).sum())

    @property
    def holds(self) -> bool:
        return self.kept == self.expected and not self.refilled

    def facts(self) -> dict[str, Any]:
        return {
            "pattern": str(self.pattern),
            "expected_zeros": self.expected,
            "kept_zeros": self.kept,
            "refilled_zeros": self.refilled,
            "holds": self.holds,
        }


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise NumericsError naming the tensor if it holds NaN or infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # What is NaN comes out of aminmax as both. It takes a twentieth of the time of looking at every value.
    if all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
        return
    # In slices: on all of it at once, isfinite would allocate twice the tensor's size, an embedding's too.
    bad = sum(int((~torch.isfinite(part)).sum()) for part in torch.split(tensor.flatten(), 2**22))
    if bad:
        raise NumericsError(f"{name} holds {bad} values that are NaN or infinite; the model cannot be compressed")
