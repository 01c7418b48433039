"""Smallest abs(weight) of the gate projections alone, every other layer left dense.

The pruning of the approximate-computing thesis (sections 2.2.3 and 3.3.2), which takes 5 % of each gate projection:
a fraction counts over the whole layer, as torch's `l1_unstructured` counts it, so one threshold serves all rows and a
row may lose all its weights. N:M takes N of every M weights of a row, as everywhere.
"""

from __future__ import annotations

from edgepress.checkpoints.shape import Amount, Sparsity, Within
from edgepress.stages.pruning.magnitude import NEEDS, prune

__all__ = ["NEEDS", "prune", "sparsity"]


def sparsity(amount: Amount) -> Sparsity:
    return Within(amount, "gate_proj")
