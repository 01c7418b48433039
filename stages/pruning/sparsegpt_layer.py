"""SparseGPT with a fraction counted as its authors count it: in each block of columns over all rows.

Frantar and Alistarh (arXiv 2301.00774), algorithm 1: of 128 columns the lowest costs go, whatever rows they are in. So
rows that matter less lose more, and the layer's error is smaller than where every row meets the fraction (`sparsegpt`);
a packed row then has no known length. N:M is the same for both.
"""

from __future__ import annotations

from edgepress.checkpoints.shape import EVERY, Amount, Sparsity, Unstructured, Within
from edgepress.stages.pruning.sparsegpt import NEEDS, prune

__all__ = ["NEEDS", "prune", "sparsity"]


def sparsity(amount: Amount) -> Sparsity:
    return Within(amount, EVERY) if isinstance(amount, Unstructured) else amount
