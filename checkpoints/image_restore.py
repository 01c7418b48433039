"""From a packed image back to a checkpoint folder, every tensor as it was before packing."""

from __future__ import annotations

import platform
import resource
import shutil
import struct
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.image import Image, open_image, read_block, read_documents, read_outer
from edgepress.checkpoints.manifest import PARTIAL, Manifest, describe_files, fingerprint, write_bytes
from edgepress.checkpoints.peft_config import ia3_config, peft_config
from edgepress.checkpoints.runtime import Progress, Silent
from edgepress.checkpoints.sparsity import Sparsity, parse_sparsity
from edgepress.checkpoints.verify import prove_pattern
from edgepress.checkpoints.writer import CheckpointWriter

STAGE, STAGE_VERSION = "unpack", 1


def unpack_checkpoint(path: Path, folder: Path, progress: Progress | None = None) -> Checkpoint:
    """Restore the checkpoint folder that an image was packed from, one shard a block, with a manifest of its own.

    The folder appears at the end, whole. Raises CheckpointError for a file that is damaged or no image, PlanError
    where the folder is taken.
    """
    progress = progress or Silent()
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PlanError(f"{folder} is there already and is not an empty folder; choose another with -o")
    if not folder.absolute().parent.is_dir():
        raise PlanError(f"there is no folder {folder.absolute().parent} to write {folder.name} to")
    began = time.monotonic()
    image = open_image(path)
    draft = folder.absolute().with_name(f".{folder.absolute().name}{PARTIAL}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        _write(image, draft, progress)
        _write_manifest(image, draft, began)
        draft.replace(folder)
    # Whatever fails here was stated by the header: sides, offsets and scales that no tensor has.
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
            struct.error) as error:  # fmt: skip
        raise CheckpointError(f"{path} has a sound hash but contents that make no sense: {error!r}") from None
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Checkpoint.open(folder)


def _write(image: Image, draft: Path, progress: Progress) -> None:
    writer = CheckpointWriter(draft, image.table["block_prefix"])
    count = len(image.table["blocks"])
    progress.start("unpacking", count)
    for index in range(count):
        contents = read_block(image, index)
        writer.write_block(index, contents.tensor)
        if contents.adapter:
            writer.write_adapter_part(index, contents.adapter | contents.adapter_codes)
        progress.step(block=f"{index + 1}/{count}")
    outer = read_outer(image)
    writer.write_outer(outer.tensor)
    if outer.edge:
        writer.write_edge(outer.edge)
    if config := _adapter_config(image):
        writer.join_adapter(config)
    for name, data in read_documents(image).items():
        write_bytes(draft / name, data)
    writer.finish(image.table["config"], None)
    writer.work.remove()


def _adapter_config(image: Image) -> dict[str, Any] | None:
    """The adapter in PEFT's words, told by the names and shapes of its tensors; None where there is none."""
    entries = [entry for layout in image.table["layouts"] for entry in layout if "adapter" in entry["kind"]]
    shapes: dict[str, dict[str, list[int]]] = {
        kind: {e["name"].removesuffix(kind): e["shape"] for e in entries if e["name"].endswith(kind)}
        for kind in (".lora_A.weight", ".lora_magnitude_vector", ".ia3_l")
    }
    low_rank, magnitudes, scaled = shapes.values()
    if scaled:
        return ia3_config(scaled, [name for name, shape in scaled.items() if shape[1] != 1])
    if not low_rank:
        return None
    rank = max(shape[0] for shape in low_rank.values())
    return peft_config(rank, image.adapter_scale * rank, low_rank, dora=bool(magnitudes))


def _pattern(image: Image) -> Sparsity | None:
    found = {entry.get("pattern") for layout in image.table["layouts"] for entry in layout} - {None}
    return parse_sparsity(found.pop()) if len(found) == 1 else None


def _write_manifest(image: Image, draft: Path, began: float) -> None:
    """What the folder claims, proved on its files, so that `compress verify` can hold it to it."""
    result, pattern = Checkpoint(draft, None), _pattern(image)
    dtype = str(result.stored_dtype).removeprefix("torch.")
    options: dict[str, Any] = {"image": image.path.name, "sha256": image.sha256}
    Manifest(
        stage=STAGE,
        stage_version=STAGE_VERSION,
        options=options,
        fingerprint=fingerprint(image.sha256, STAGE, STAGE_VERSION, {}, None, 0, dtype),
        parent=None,
        seed=0,
        dtype=dtype,
        device="cpu",
        calibration=None,
        sparsity=prove_pattern(result, pattern) if pattern else None,
        seconds=time.monotonic() - began,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        versions={"python": platform.python_version(), "edgepress": version("edgepress")},
        files=describe_files(draft),
        **result.facts(pattern),
    ).write(draft)
