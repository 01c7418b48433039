"""Proof that a finished checkpoint is what it claims: hashes, N:M pattern, finite values, true numbers."""

from __future__ import annotations

from typing import Any

from edgepress.checkpoints.adapter_codes import differing
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.headers import ADAPTER_PACKED
from edgepress.checkpoints.manifest import check_files
from edgepress.checkpoints.nm import MaskProof
from edgepress.checkpoints.sparsity import Sparsity, parse_sparsity


def prove_pattern(checkpoint: Checkpoint, pattern: Sparsity, masks_from: Checkpoint | None = None) -> dict[str, Any]:
    """Count, over the linear layers of all blocks that the pattern covers, the zeros expected and kept.

    masks_from: a checkpoint with the same blocks whose zeros must all still be zeros; without it the pattern
    alone is asked for. An adapter that is stored beside the weights is not part of them.
    """
    proof = MaskProof(pattern)
    for index, block in enumerate(checkpoint.shape.blocks):
        masks = {x.name: x for x in masks_from.shape.blocks[index].linears} if masks_from else {}
        for linear in (x for x in block.linears if pattern.covers(x.name)):
            mask = masks_from.base_weight(index, masks[linear.name]) != 0 if masks_from else None
            proof.add(checkpoint.base_weight(index, linear), mask)
    return proof.facts()


def verify(checkpoint: Checkpoint) -> list[str]:
    """Re-check everything the manifest claims; what was found, one line each. Raises CheckpointError."""
    manifest = checkpoint.manifest
    if manifest is None:
        raise CheckpointError(f"{checkpoint.folder} has no manifest, so there is nothing to verify it against")
    check_files(checkpoint.folder, manifest, hashes=True)
    found = [f"{len(manifest.files)} files have the size and sha256 that the manifest says"]
    found.append(
        "the manifest has the sha256 that it states of itself"
        if manifest.sealed
        else "the manifest carries no hash of itself, as those of earlier versions: an edit of it could not be seen"
    )
    checkpoint.outer()
    for index in range(len(checkpoint.shape.blocks)):
        checkpoint.block(index)  # raises NumericsError naming what is not finite
    found.append(f"{len(checkpoint.shape.blocks)} blocks, embedding and head are finite")
    if manifest.sparsity is not None:
        facts = prove_pattern(checkpoint, parse_sparsity(manifest.sparsity["pattern"]))
        if not facts["holds"]:
            raise CheckpointError(
                f"{checkpoint.folder} claims {facts['pattern']} but holds {facts['kept_zeros']} of "
                f"{facts['expected_zeros']} zeros"
            )
        found.append(f"{facts['pattern']}: {facts['kept_zeros']} of {facts['expected_zeros']} zeros are there")
    if (checkpoint.folder / ADAPTER_PACKED).is_file():
        if wrong := differing(checkpoint.folder):
            raise CheckpointError(f"{checkpoint.folder}: {wrong[0]} is not what its packed codes stand for")
        found.append("the adapter is exactly what its 8-bit codes stand for")
    for key, value in checkpoint.facts().items():
        claimed = getattr(manifest, key)
        if claimed != value:
            raise CheckpointError(f"{checkpoint.folder}: the manifest says {key} {claimed}, the files hold {value}")
        found.append(f"{key} {value}")
    return found
