"""Read the weights that a quantised checkpoint was made from, against which its error is measured."""

from __future__ import annotations

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.manifest import check_files


def reference_weights(source: Checkpoint, against: str) -> tuple[Checkpoint, list[int]]:
    """The checkpoint whose weights are to be reached, and its block number for each block of the source.

    Its files' hashes are compared first: what is missed there would go into every later stage.
    """
    chain = list(source.ancestors())
    if against == "parent":
        dense = next((c for c in chain if c.shape.grid is None), None)
        if dense is None:
            raise CheckpointError(f"{source.folder} has no dense ancestor in the store to compensate against")
    else:
        dense = chain[-1]
    if dense.manifest is not None:
        check_files(dense.folder, dense.manifest, hashes=True)
    count = len(source.shape.blocks)
    if len(dense.shape.blocks) == count:
        return dense, list(range(count))
    kept = source.manifest.origin.get("blocks") if source.manifest else None
    if kept is None or len(kept) != count:
        raise CheckpointError(f"it is not recorded which blocks of {dense.folder} are left in {source.folder}")
    return dense, list(kept)
