"""Read a .gguf file through transformers' loader, and refuse what that loader would leave out or make up.

The layout and the keys: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.quiet import readable

_INSTEAD = "Give the model's folder of safetensors files"


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """The configuration, the tensors by transformers' names and the tokenizer of a .gguf file.

    Quantised weights are dequantised once, to bfloat16; floating-point ones keep the precision they have. Raises
    CheckpointError for a damaged file, and for a setting or tensor that the loader does not carry over.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with readable(f"{path} cannot be read as a GGUF file"):
        _require_counts(path)
        reader = GGUFReader(path)
        stated = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("tokenizer.") or key in _OF_TOKENIZER
        }
        kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2}
        sides = {t.name: tuple(int(side) for side in reversed(t.shape.tolist())) for t in reader.tensors}
        _require_places(reader)
        del reader  # it maps the file
    _require_whole(path, stated, set(sides))
    _require_split(path, stated)
    matrices = _kept_by(kinds)
    dtype = torch.float32 if matrices else torch.bfloat16
    # transformers prefers a file of the same name in the working directory, and reads what lies beside the file.
    with tempfile.TemporaryDirectory(prefix="edgepress-gguf-") as folder:
        link = Path(folder) / f"{Path(folder).name}.gguf"
        link.symlink_to(path.resolve())
        with readable(f"transformers cannot read {path}"):
            config = AutoConfig.from_pretrained(folder, gguf_file=link.name)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        _require_carried(path, stated, set(sides), config)
        _require_tensors(path, stated, sides, empty)
        with readable(f"transformers cannot read {path}"):
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=link.name, dtype=dtype)
        with readable(f"transformers cannot make a tokenizer of what {path} holds"):
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=link.name)
    # The loader leaves a note that the weights are quantised, which they no longer are.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tensors = {
        name: tensor.detach().to(matrices if matrices and tensor.dim() == 2 else dtype)
        for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    stored = str(matrices or dtype).removeprefix("torch.")
    told = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "dtype": stored}
    return told, tensors, tokenizer


# --- the file itself ----------------------------------------------------------------------------------------------

# Bytes of GGUF's plain values by their number; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Values in arrays, in a file: the readers make objects of each. Gemma's tokenizer, the largest, has 1.3 million.
_MOST_OF_TOKENIZER, _MOST_OF_OTHERS = 1 << 21, 1 << 16
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _kept_by(kinds: set[str]) -> torch.dtype | None:
    """The narrowest type that keeps all matrices exactly; None if some are codes."""
    if not kinds or not kinds <= set(_FLOATS):
        return None
    return _FLOATS[kinds.pop()] if len(kinds) == 1 else torch.float32


def _require_counts(path: Path) -> None:
    """Raise ValueError where a GGUF header counts more than the file can hold: its reader would loop over all of it."""
    with path.open("rb") as file:
        size = path.stat().st_size
        held = {True: 0, False: 0}  # values in arrays, of the tokenizer's keys and of the others

        def number(width: int) -> int:
            data = file.read(width)
            if len(data) < width:
                raise ValueError("its header is cut off")
            return int.from_bytes(data, "little")

        def skip(length: int) -> None:
            if length > size - file.tell():
                raise ValueError(f"its header counts {length} bytes where {size - file.tell()} are left")
            file.seek(length, os.SEEK_CUR)

        def key() -> bytes:
            if (length := number(8)) > 1 << 16:  # the layout's own limit
                raise ValueError(f"its header has a key of {length} bytes")
            return file.read(length)

        def value(kind: int, depth: int, of_tokenizer: bool) -> None:
            if kind == 8:
                skip(number(8))
            elif kind == 9:
                inner, count = number(4), number(8)
                held[of_tokenizer] += count
                most = _MOST_OF_TOKENIZER if of_tokenizer else _MOST_OF_OTHERS
                if depth > 2 or count > size or held[of_tokenizer] > most:
                    raise ValueError(f"its header counts {count} values of an array")
                if inner in _SIZES:
                    skip(count * _SIZES[inner])
                else:
                    for _ in range(count):
                        value(inner, depth + 1, of_tokenizer)
            elif kind in _SIZES:
                skip(_SIZES[kind])
            else:
                raise ValueError(f"its header has values of kind {kind}")

        if file.read(4) != b"GGUF" or number(4) not in (2, 3):
            raise ValueError("it does not begin as little-endian GGUF files of version 2 or 3 do")
        tensors, settings = number(8), number(8)
        if max(tensors, settings) > size:
            raise ValueError(f"its header counts {tensors} tensors and {settings} settings")
        for _ in range(settings):
            of_tokenizer = key().startswith(b"tokenizer.")
            value(number(4), 0, of_tokenizer)
        for _ in range(tensors):
            skip(number(8))
            if (sides := number(4)) > 8:
                raise ValueError(f"its header has a tensor of {sides} sides")
            skip(8 * sides + 12)


def _require_places(reader: Any) -> None:
    """Raise ValueError for a tensor that does not begin at a multiple of the alignment, or lies over another."""
    end, before = int(reader.data_offset), "the header"
    for tensor in sorted(reader.tensors, key=lambda t: int(t.data_offset)):
        start = int(tensor.data_offset)
        if start < end:
            raise ValueError(f"{tensor.name} lies over {before}")
        if (start - int(reader.data_offset)) % int(reader.alignment):
            raise ValueError(f"{tensor.name} begins at byte {start}, no multiple of {reader.alignment}")
        end, before = start + int(tensor.n_bytes), tensor.name


def _require_whole(path: Path, stated: Mapping[str, Any], names: set[str]) -> None:
    """Raise CheckpointError for a part of a model, and for one that does not state its sizes."""
    if (parts := stated.get("split.count")) not in (None, 0, 1):
        raise CheckpointError(f"{path} is one of {parts} parts of a model; join them: llama-gguf-split --merge")
    family = stated.get("general.architecture")
    blocks = len({name.split(".")[1] for name in names if name.startswith("blk.")})
    told = stated.get(f"{family}.block_count")
    if told != blocks:  # transformers would make up the weights of those that are missing
        raise CheckpointError(f"{path} states {told} blocks and holds {blocks}; the file is damaged")


_OF_TOKENIZER = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
# Names of byte-level tokenizers that split text as GPT-2's does, and of those that also take each digit alone: for
# these transformers splits as for GPT-2, which differs in runs of blanks before a digit only (no merge has a digit).
# From llama.cpp, src/llama-vocab.cpp.
_AS_GPT2 = {
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum",
    "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code", "roberta-bpe", "modern-bert",
}  # fmt: skip
_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def _require_split(path: Path, stated: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a byte-level tokenizer whose way of splitting text transformers does not know.

    It would split as GPT-2's does, and count other tokens.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    model, way = (stated.get(key) for key in _OF_TOKENIZER)
    if model == "gpt2" and way is not None and str(way) not in _AS_GPT2 | _DIGITS | set(GGUF_PRE_TOKENIZER_SPLITS):
        raise CheckpointError(
            f"{path}: transformers' reader does not know how a tokenizer of the kind {way} splits text, so every "
            f"number would be of other tokens. {_INSTEAD}"
        )


# --- what transformers made of it ---------------------------------------------------------------------------------

# GGUF's keys behind the architecture's name -> where transformers' configuration has them.
_SETTINGS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "context_length": "max_position_embeddings",
    "logit_scale": "logit_scale", "residual_scale": "residual_multiplier", "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier", "vocab_size": "vocab_size",
}  # fmt: skip
_EPSILONS = ("layer_norm_eps", "norm_epsilon", "norm_eps")  # one setting, by the family
_ROPE_SETTINGS = {
    "rope.freq_base": "rope_theta", "rope.scaling.type": "rope_type", "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}  # fmt: skip
# Keys that change nothing at these values, and those that never do.
_NEUTRAL = {
    "attention.causal": True, "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "expert_count": 0,
    "expert_used_count": 0, "nextn_predict_layers": 0, "pooling_type": 0, "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
}  # fmt: skip
_IDLE = {"rope.scaling.finetuned", "tensor_data_layout", "use_parallel_residual"}
_NEEDED = ("embedding_length", "feed_forward_length", "context_length", "attention.head_count",
           "attention.head_count_kv")  # fmt: skip
_WINDOWED = {"gemma2"}  # llama.cpp has the configuration class's window where the file has none


def _require_carried(path: Path, stated: Mapping[str, Any], names: set[str], config: Any) -> None:
    """Raise CheckpointError at what the file says of the computing and the configuration does not."""
    family = str(stated.get("general.architecture"))
    own = {key.removeprefix(f"{family}."): value for key, value in stated.items() if key.startswith(f"{family}.")}
    missing = [f"{family}.{key}" for key in _NEEDED if key not in own]
    if not any(key in own for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")):
        missing.append(f"{family}.attention.layer_norm_rms_epsilon")
    if missing:
        raise CheckpointError(f"{path} does not state {', '.join(missing)}; transformers would make it up. {_INSTEAD}")
    found = _found(config)
    lost = []
    # Without the key llama.cpp's base is 10000, and there is no window.
    for key, value in {"rope.freq_base": 10000.0, **own}.items():
        wanted = None if key == "attention.sliding_window" and value == 0 else value
        if key == "rope.scaling.factor" and own.get("rope.scaling.type") == "none":
            continue
        if key in _IDLE or (key in _NEUTRAL and _same(wanted, _NEUTRAL[key])):
            continue
        if key in _NEUTRAL or key not in found:
            lost.append("a mixture of experts" if key.startswith("expert_") else f"{family}.{key} = {wanted}")
            continue
        several = set(wanted) if isinstance(wanted, list) else {wanted}
        if len(several) != 1 or not _same(several.pop(), found[key]):
            lost.append(f"{family}.{key} = {wanted} (the configuration has {found[key]})")
    if "attention.sliding_window" not in own and found["attention.sliding_window"] and family not in _WINDOWED:
        lost.append(f"that there is no window (the configuration has {found['attention.sliding_window']})")
    if (scale := getattr(config, "query_pre_attn_scalar", None)) is not None:
        # The file does not state it; llama.cpp's rule for Gemma tells the largest by its number of blocks.
        largest = own.get("block_count") == {"gemma2": 46, "gemma3": 62}.get(family)
        wanted = config.hidden_size // config.num_attention_heads if largest else found["attention.key_length"]
        if scale != wanted:
            lost.append(f"that attention scores are divided by the root of {wanted} (the configuration has {scale})")
    if "rope_freqs.weight" in names:
        lost.append("rope_freqs.weight, factors of the rotary frequencies")
    if lost:
        raise CheckpointError(
            f"{path}: transformers' reader leaves out {'; '.join(dict.fromkeys(lost))}, so every number would be of "
            f"another model. {_INSTEAD}"
        )


def _found(config: Any) -> dict[str, Any]:
    """What transformers' configuration has for each of GGUF's keys; None where it has nothing."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    found = {key: getattr(config, name, None) for key, name in _SETTINGS.items()}
    found |= {key: rope.get(name) for key, name in _ROPE_SETTINGS.items()}
    found["rope.scaling.type"] = {"default": "none"}.get(str(rope.get("rope_type")), rope.get("rope_type"))
    found["attention.layer_norm_epsilon"] = next((v for n in _EPSILONS if (v := getattr(config, n, None))), None)
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if found["attention.key_length"] is None and hidden and heads:
        found["attention.key_length"] = found["attention.value_length"] = hidden // heads
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if found["attention.key_length"] is not None:
        found["rope.dimension_count"] = int(found["attention.key_length"] * part)
    return found


def _require_tensors(path: Path, stated: Mapping[str, Any], sides: Mapping[str, tuple[int, ...]], model: Any) -> None:
    """Raise CheckpointError unless the file's tensors are the module's, by gguf's own table of names, and their shapes.

    transformers draws those that are missing at random, and drops those that it does not know.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    family = str(stated.get("general.architecture"))
    known = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == family]
    if not known:
        raise CheckpointError(f"{path} holds a model of the kind {family}, for which there are no names of tensors")
    table = get_tensor_name_map(known[0], int(stated[f"{family}.block_count"]))
    wanted = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        theirs = table.get_name(stem)
        wanted[f"{theirs}.{kind}" if theirs else name] = tuple(tensor.shape)
    faults = [f"no {name}" for name in wanted if name not in sides]
    faults += [f"{name}, which the configuration has no place for" for name in sides if name not in wanted]
    faults += [
        f"{name} of shape {sides[name]} where the configuration has {shape}"
        for name, shape in wanted.items()
        if name in sides and sides[name] != shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more faults" if len(faults) > 3 else ""
        raise CheckpointError(f"{path} holds {'; '.join(faults[:3])}{more}. {_INSTEAD}")


def _same(stated: Any, found: Any) -> bool:
    if isinstance(stated, (int, float)) and isinstance(found, (int, float)):
        return math.isclose(stated, found, rel_tol=1e-5)
    return bool(stated == found)
