"""The pruning methods of the wanda stage (`--prune`): one file and one line each, or a part of one.

stages/README.md shows how to add one. No torch here: `--help` and planning read this list.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgepress.checkpoints.shape import Amount, Pattern, Sparsity

if TYPE_CHECKING:
    from edgepress.checkpoints.walk import BlockVisit

METHODS = {
    "wanda": "edgepress.stages.pruning.wanda",
    "magnitude": "edgepress.stages.pruning.magnitude",
    "sparsegpt": "edgepress.stages.pruning.sparsegpt",
    "sparsegpt-layer": "edgepress.stages.pruning.sparsegpt:WholeLayer",
    "fisher": "edgepress.stages.pruning.fisher",
    "gate-l1": "edgepress.stages.pruning.gate_l1",
}

# What a method needs to see besides the weights.
NOTHING, NORMS, HESSIANS, GRADIENTS = "nothing", "norms", "hessians", "gradients"


class Method(Protocol):
    """What every file of this folder holds."""

    # NOTHING: no calibration token is run; HESSIANS: the memory forecast counts them; GRADIENTS: `choose` of the file
    # is called before the first block, and what it keeps in the stage's work is there for `prune`.
    NEEDS: str

    def sparsity(self, amount: Amount) -> Sparsity:
        """Where the zeros of `--wanda AMOUNT` will lie: what the manifest states and every later stage must keep."""

    def prune(self, block: BlockVisit, groups: Mapping[str, Pattern]) -> dict[str, Any]:
        """Zero N of every M weights in the block's layers named in `groups`, in place; facts for the manifest.

        M may be a whole row's width, or a whole layer's size. A weight that is zero already must stay zero: an
        earlier mask may hold it. Where the pattern is Capped, no group of the N:M that it grows into may lose more
        than its N: `select.kept` sees to both.
        """


def method(name: str) -> Method:
    """The file of this name, or the part of it that stands after a colon."""
    file, _, part = METHODS[name].partition(":")
    found = importlib.import_module(file)
    return cast(Method, getattr(found, part) if part else found)
