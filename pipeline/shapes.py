"""The shape of the model that a user names, without torch where none is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepress.checkpoints.config import read_config, stated_form
from edgepress.checkpoints.errors import CheckpointError, PlanError, near
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.headers import INDEX, shape_from_folder
from edgepress.checkpoints.manifest import MANIFEST, MARKER, Manifest, check_files, require_finished
from edgepress.checkpoints.shape import LinearShape, ModelShape, with_bits, with_form
from edgepress.pipeline.store import checkpoint_folder

if TYPE_CHECKING:
    from edgepress.hardware.soc import Soc

PACKAGED_PRESET = "smollm2-135m"  # the packaged model's shape


def model_shape(model: str | None) -> ModelShape:
    """From a preset, a config.json, or the headers of a folder's files; no weights are read.

    An output folder stands for its result. A .gguf or .bin file or a hub id is opened as a source. Raises
    CheckpointError or PlanError saying what was looked for.
    """
    if model is None:
        return shape_from_config(PRESETS[PACKAGED_PRESET])
    path = _folder(model)
    if path.is_dir():
        require_finished(path)
        has_weights = (path / INDEX).is_file() or (path / "model.safetensors").is_file()
        return shape_from_folder(path) if has_weights else stated_shape(path)
    if path.is_file() and path.name == "config.json":
        return stated_shape(path.parent)
    if model.lower() in PRESETS:
        return shape_from_config(PRESETS[model.lower()])
    if path.is_file() or "/" in model or model.lower() == "smollm2-135m-instruct":
        from edgepress.checkpoints.sources import open_source  # reads the file or asks the hub, and needs torch

        return open_source(model).shape
    raise CheckpointError(
        f"there is no model '{model}'{near(model.lower(), PRESETS)}: no such folder or file, and not one of the "
        f"presets {', '.join(PRESETS)}"
    )


def stated_shape(folder: Path) -> ModelShape:
    """The shape that a config.json alone states, its quantisation on every layer that it says nothing else of.

    Raises CheckpointError or PlanError for what it states and nothing here reads.
    """
    config = read_config(folder)
    form, shape = stated_form(config), shape_from_config(config)
    if form is None:
        return shape
    alike, stated = with_form(shape, form, 0), config["quantization_config"]

    def own(index: int, x: LinearShape) -> LinearShape:
        return replace(x, grid=x.grid.own(f"{shape.block_prefix}.{index}.{x.name}", stated)) if x.grid else x

    blocks = tuple(replace(b, linears=tuple(own(i, x) for x in b.linears)) for i, b in enumerate(alike.blocks))
    return replace(alike, blocks=blocks)


def tokenizer_folder(model: str | None) -> Path:
    """The folder where the tokenizer of the model a user names lies. Raises PlanError for a preset, which has none."""
    path = _folder(model or "")
    if model and path.is_dir():
        return path.resolve()
    if path.is_file() and path.name == "config.json":
        return path.parent.resolve()
    if model and model.lower() in PRESETS and not path.exists():
        raise PlanError(
            f"'{model}' is a preset: it has no tokenizer to count a corpus's tokens with. Give the model's folder, "
            "or --vocabulary-size N alone to plan with N tokens"
        )
    from edgepress.checkpoints.sources import open_source  # converts what is not a folder yet, and needs torch

    return open_source(model).folder


def measured_bytes(model: str | None) -> int | None:
    """Bytes of the safetensors files of a folder with weights, as they lie on the disk; None for anything else."""
    folder = _folder(model) if model else None
    if folder is None or not folder.is_dir():
        return None
    sizes = [path.stat().st_size for path in folder.rglob("*.safetensors") if not _hidden(path, folder)]
    return sum(sizes) or None


def require_consistent(model: str | None, shape: ModelShape) -> None:
    """Raise CheckpointError, all faults at once, where a checkpoint's manifest disagrees with its files.

    Sizes and counts are compared, which takes no time; `compress verify` compares every hash as well.
    """
    folder = _folder(model) if model else None
    if folder is None or not (folder / MANIFEST).is_file():
        return
    manifest = Manifest.read(folder)
    faults = []
    try:
        check_files(folder, manifest, hashes=False)
    except CheckpointError as error:
        faults.append(str(error))
    for key in ("parameters_total", "file_bytes"):
        claimed, held = getattr(manifest, key), getattr(shape, key)
        if claimed != held:
            faults.append(f"{folder}: the manifest says {key} {claimed}, the files hold {held}")
    strays = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*.safetensors")
        if str(path.relative_to(folder)) not in manifest.files and not _hidden(path, folder)
    )
    if strays:
        faults.append(f"{folder}: the manifest does not list {', '.join(strays[:5])}")
    if faults:
        raise CheckpointError("\n".join(faults))


def with_other_bits(shape: ModelShape, bits: int, embedding_bits: int, chip: Soc) -> ModelShape:
    """The shape as if the stage gptq had left so many bits; 0 leaves them. Raises PlanError for bits that are none."""
    from edgepress.hardware.levers import stage_group

    faults = []
    if bits not in (0, 3, 4, 8):
        faults.append(f"--bits {bits}: there are 8, 4 and 3, or 0 for the model as it is")
    if embedding_bits not in (0, 4, 8):
        faults.append(f"--embedding-bits {embedding_bits}: there are 8 and 4, or 0 for the model as it is")
    if faults:
        raise PlanError("\n".join(faults))
    if bits:
        shape = with_bits(shape, bits, stage_group(chip, bits))
    return replace(shape, embedding_bits=embedding_bits) if embedding_bits else shape


def _folder(model: str) -> Path:
    """The path that a user names; of an output folder, the folder of its result."""
    path = Path(model).expanduser()
    if (path / MARKER).is_file():
        return checkpoint_folder(path)
    return path


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
