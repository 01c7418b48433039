"""Store the factors between a checkpoint's weights and those of the model it was made from.

A quantiser may scale the rows and columns of a block's layers so that the block computes the same (AWQ). Whoever then
compares with the dense weights, as EoRA does, has to scale those alike. The factors lie beside the shards, in a
file a block that no model file names and that counts as no model's bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from edgepress.checkpoints.errors import CheckpointError

if TYPE_CHECKING:
    from edgepress.checkpoints.checkpoint import Checkpoint

FOLDER = "scaling"


def scaling_name(index: int) -> str:
    return f"{FOLDER}/block-{index:05d}.factors"


def factors(folder: Path, index: int) -> dict[str, Tensor]:
    """Of a block's scaled layers, `NAME.rows` (out,) and `NAME.columns` (in,); empty where none was scaled."""
    path = folder / scaling_name(index)
    return load_file(path) if path.is_file() else {}


def scaled_folders(source: Checkpoint) -> list[Path]:
    """The checkpoints between the dense one and `source` whose blocks were scaled.

    Raises CheckpointError where blocks went after they were scaled.
    """
    found = []
    for checkpoint in source.ancestors():
        if checkpoint.shape.grid is None:
            break
        if not (checkpoint.folder / FOLDER).is_dir():
            continue
        if len(checkpoint.shape.blocks) != len(source.shape.blocks):
            raise CheckpointError(
                f"{checkpoint.folder} has scaled its blocks, and {source.folder} has others; quantise after that"
            )
        found.append(checkpoint.folder)
    return found


def rescaled(folders: Iterable[Path], index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block's dense weights, taken from before quantisation, as the quantised ones stand for them.

    folders: those of `scaled_folders`. weights: by their names relative to the block; only those of linear layers are
    changed.
    """
    found = dict(weights)
    for folder in folders:
        for name, factor in factors(folder, index).items():
            layer, _, side = name.rpartition(".")
            key = f"{layer}.weight"
            factor = factor.to(found[key].device)
            found[key] = found[key].float() * (factor.unsqueeze(1) if side == "rows" else factor)
    return found
