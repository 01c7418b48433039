"""The format gguf: one file for llama.cpp at the checkpoint's own bit widths, and the adapter as a GGUF LoRA beside it.

Every matrix takes the smallest of ggml's types that holds its codes and scales without loss; what no type holds goes in
as dense weights, in their own precision. Names of tensors and keys are those of the package gguf.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from numpy.typing import NDArray
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.forms import Grid, TensorShape
from edgepress.checkpoints.llama2c import halves_to_pairs
from edgepress.checkpoints.manifest import drafted, folders_above
from edgepress.checkpoints.packed_sizes import aligned
from edgepress.checkpoints.packing import unpack_linear
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import BlockShape, LinearShape, ModelShape
from edgepress.checkpoints.super_blocks import GGUF_TYPES, SuperBlocks, ggml_rows
from edgepress.pipeline.formats import Wanted, Written

# Families -> llama.cpp's architecture. Mistral's blocks are LLaMA's.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_INSTEAD = "take --to hf, and llama.cpp's own converter where it knows the model"
_DENSE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_SMALLEST_FIRST = ("Q4_0", "Q5_0", "Q8_0")  # for codes less their zero point
_ENTRIES = 4096  # rows of an embedding at once
Rows = tuple[NDArray[np.uint8], str]  # a matrix in ggml's bytes (rows, bytes), and its type


def write(source: Checkpoint, wanted: Wanted, runtime: Runtime) -> Written:
    """Write the file, and unless --type merged an adapter's own. What llama.cpp would compute otherwise is refused."""
    architecture = _require_runnable(source, wanted.type)
    merged = wanted.type == "merged"
    adapter = None if merged or not _adapted(source) else wanted.out.with_name(f"{wanted.out.stem}-lora.gguf")
    if wanted.out.is_dir() or (adapter is not None and adapter.is_dir()):
        raise PlanError(f"{wanted.out} is a folder; name a file with -o")
    if adapter is not None and adapter.exists() and not wanted.out.exists():
        raise PlanError(f"{adapter}, where the adapter would lie, is there already; choose another name with -o")
    names = gguf.get_tensor_name_map(_key_of(architecture), len(source.shape.blocks))
    with folders_above(wanted.out), drafted(wanted.out) as draft:
        kinds, notes = _write_model(source, draft, architecture, names, merged, runtime)
    written = wanted.out.stat().st_size
    if adapter is not None:
        with drafted(adapter) as draft:
            _write_adapter(source, draft, architecture, names)
        written += adapter.stat().st_size
        notes.append(f"the adapter is {adapter}: llama-cli -m {wanted.out} --lora {adapter}")
    if source.shape.activation_bits < 16:
        notes.append(f"inputs are not rounded to {source.shape.activation_bits} bits there as they are here")
    facts = {"types": dict(kinds), "adapter": str(adapter) if adapter else None}
    return Written(wanted.out, written, tuple(notes), facts)


def _key_of(architecture: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def _adapted(source: Checkpoint) -> bool:
    return any(x.adapted for block in source.shape.blocks for x in block.linears)


def _require_runnable(source: Checkpoint, kind: str) -> str:
    """llama.cpp's architecture. Raises PlanError for what it would compute otherwise."""
    shape, config = source.shape, source.hf_config().to_dict()
    if shape.family not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise PlanError(f"--to gguf: the family {shape.family} is not written; {known} are. {_INSTEAD}")
    rope, faults = dict(config.get("rope_parameters") or {}), []
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        faults.append(f"a sliding window ({config['sliding_window']})")
    if str(config.get("hidden_act")) not in ("silu", "swish"):
        faults.append(f"the activation {config.get('hidden_act')}")
    if (scaling := str(rope.get("rope_type", "default"))) not in ("default", "linear", "llama3"):
        faults.append(f"rotary scaling '{scaling}'")
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        faults.append("heads that turn in part")
    linears = [x for block in shape.blocks for x in block.linears]
    if any(x.bias and (".mlp." in f".{x.name}" or x.name.endswith("o_proj")) for x in linears):
        faults.append("biases of feed-forward or output layers")
    if kind != "merged" and any(x.adapter_vector for x in linears):
        faults.append("an adapter with factors or magnitudes (--type merged takes them into dense weights)")
    if faults:
        raise PlanError(
            f"--to gguf: llama.cpp's {_ARCHITECTURES[shape.family]} has no place for {'; '.join(faults)}; {_INSTEAD}"
        )
    return _ARCHITECTURES[shape.family]


# --- the model --------------------------------------------------------------------------------------------------------


def _write_model(
    source: Checkpoint, path: Path, architecture: str, names: gguf.TensorNameMap, merged: bool, runtime: Runtime
) -> tuple[Counter[str], list[str]]:
    writer = GGUFWriter(path, architecture, use_temp_file=True)
    _settings(writer, source)
    notes = _tokenizer(writer, source)
    kinds: Counter[str] = Counter()

    def put(name: str, rows: Rows) -> None:
        data, kind = rows
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
        kinds[kind] += 1

    outer, packed = source.outer(), source.edge() if source.shape.embedding_bits else {}
    for name, tensor in outer.items():
        stem, _, last = name.rpartition(".")
        theirs = f"{names.get_name(stem)}.{last}"
        if tensor.dim() == 1:
            writer.add_tensor(theirs, tensor.float().numpy())
        else:
            own = {kind: packed[f"{stem}.{kind}"] for kind in ("codes", "scales", "minimum") if packed}
            put(theirs, _table(tensor, own, notes))
    if (factors := _rope_factors(source)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    runtime.progress.start("gguf", len(source.shape.blocks))
    for index, block in enumerate(source.shape.blocks):
        stored = source.stored_block(index)
        effective = source.block(index) if merged else {}
        for x in block.linears:
            stem = names.get_name(f"{source.shape.block_prefix}.{index}.{x.name}")
            put(f"{stem}.weight", _matrix(source, index, x, stored, effective.get(f"{x.name}.weight"), architecture))
            if x.bias:
                bias = effective.get(f"{x.name}.bias", stored[f"{x.name}.bias"]).float()
                writer.add_tensor(f"{stem}.bias", _turned(bias, x.name, source, architecture).numpy())
        for t in block.others:
            stem, _, last = t.name.rpartition(".")
            theirs = names.get_name(f"{source.shape.block_prefix}.{index}.{stem}")
            writer.add_tensor(f"{theirs}.{last}", stored[t.name].float().numpy())
        runtime.progress.step(block=f"{index + 1}/{len(source.shape.blocks)}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    wide = sum(kinds[kind] for kind in _DENSE.values())
    notes.insert(0, f"matrices: {listed}; codes and scales are the checkpoint's")
    if wide and any(x.grid is not None for block in source.shape.blocks for x in block.linears):
        notes.append(
            f"{wide} matrices are dense: embeddings, what was not quantised, and codes that no type of ggml holds "
            "without loss (real zero points, codebooks, marked zeros, rows that 32 does not divide); the grids of "
            "--quant q4_k and its like are ggml's own"
        )
    return kinds, notes


def _turned(tensor: Tensor, name: str, source: Checkpoint, architecture: str) -> Tensor:
    """Rows of queries and keys in the order in which llama.cpp's llama turns them: pairs side by side."""
    last = name.rpartition(".")[2]
    if architecture != "llama" or last not in ("q_proj", "k_proj"):
        return tensor
    heads = source.shape.heads if last == "q_proj" else source.shape.kv_heads
    return halves_to_pairs(tensor.view(len(tensor), -1), heads).reshape(tensor.shape)


def _matrix(
    source: Checkpoint,
    index: int,
    x: LinearShape,
    stored: Mapping[str, Tensor],
    merged: Tensor | None,
    architecture: str,
) -> Rows:
    """One layer's base weights, or the effective ones where these are given."""
    if merged is not None and (x.adapted or x.grid is None):
        return dense_rows(_turned(merged, x.name, source, architecture))
    if x.grid is None:
        return dense_rows(_turned(stored[f"{x.name}.weight"], x.name, source, architecture))
    own = {kind: stored[f"{x.name}.{kind}"] for kind in x.grid.kinds}
    found = _coded(x, own)
    if found is None:
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[x.dtype]
        return dense_rows(_turned(source.base_weight(index, x).to(dtype), x.name, source, architecture))
    form, codes, sides = found
    turned = {name: _turned(side, x.name, source, architecture).numpy() for name, side in sides.items()}
    return ggml_rows(form, _turned(codes, x.name, source, architecture).numpy(), turned), form.name


def dense_rows(weight: Tensor) -> Rows:
    """(rows, columns) as they are, in their own precision."""
    return weight.contiguous().view(torch.uint8).view(len(weight), -1).numpy(), _DENSE[weight.dtype]


def _coded(x: LinearShape, own: Mapping[str, Tensor]) -> tuple[SuperBlocks, Tensor, dict[str, Tensor]] | None:
    """ggml's type, codes (out, in) uint8 and what lies beside them, exactly the layer's; None where no type can be."""
    if isinstance(x.grid, SuperBlocks):
        codes, sides = x.grid.split(x.name, own, x.out_features, x.in_features, ordered=True)
        if x.grid.gguf:
            return x.grid, codes, sides
        # A row's d and e for each of ggml's super-blocks, and a group's scale for each of its groups of 32.
        form = _k_type(x.grid, x.in_features)
        if form is None:
            return None
        each, blocks = x.grid.group // form.group, x.in_features // (form.group * form.per)
        wider = {name: sides[name].repeat_interleave(each, dim=1) for name in ("scales", "minima")}
        return form, codes, wider | {name: sides[name].expand(-1, blocks) for name in ("d", "e")}
    size = x.in_features if x.grid is not None and x.grid.group == -1 else getattr(x.grid, "group", 0)
    if not isinstance(x.grid, Grid) or x.in_features % size or size % 32:
        return None
    codes, scales, zeros = unpack_linear(own, x.grid.bits)
    order = own["g_idx"].long()
    if not order.equal(torch.arange(x.in_features) // size):
        return None
    levels = codes - zeros[:, order]
    low, high = int(levels.min()), int(levels.max())
    for name in _SMALLEST_FIRST:
        form = GGUF_TYPES[name]
        if -form.middle <= low and high < form.middle:
            sides = {"d": scales[:, order[::32]].to(torch.float16)}
            return form, (levels + form.middle).to(torch.uint8), sides
    return None


def _k_type(own: SuperBlocks, columns: int) -> SuperBlocks | None:
    """The type that holds a form of this project without loss, where there is one."""
    form = GGUF_TYPES["Q4_K" if own.bits <= 4 else "Q5_K"]
    fits = not own.masked and columns % (form.group * form.per) == 0 and own.group % form.group == 0
    return form if fits else None


def _table(tensor: Tensor, packed: Mapping[str, Tensor], notes: list[str]) -> Rows:
    """An embedding or head; its packed codes where a type holds them."""
    rows, columns = tensor.shape
    if not packed or columns % 32:
        return dense_rows(tensor)
    codes, scales, minimum = (packed[kind] for kind in ("codes", "scales", "minimum"))
    if codes.shape[1] * 2 == columns:
        both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
        sides = {"d": scales.expand(-1, columns // 32), "e": -minimum.expand(-1, columns // 32)}
        return ggml_rows(GGUF_TYPES["Q4_1"], both.numpy(), {name: side.numpy() for name, side in sides.items()}), "Q4_1"
    parts, worst = [], 0.0
    for start in range(0, rows, _ENTRIES):
        exact = tensor[start : start + _ENTRIES].float().numpy()
        parts.append(gguf.quants.quantize(exact, GGMLQuantizationType.Q8_0))
        worst = max(worst, float(np.abs(gguf.quants.dequantize(parts[-1], GGMLQuantizationType.Q8_0) - exact).max()))
    notes.append(
        "the embedding's 8-bit codes with a minimum a row have no type in ggml: rounded to Q8_0, at most "
        f"{worst:.2g} off, {worst / float(tensor.abs().max()):.2g} of the largest"
    )
    return np.concatenate(parts), "Q8_0"


def _settings(writer: GGUFWriter, source: Checkpoint) -> None:
    shape, config = source.shape, source.hf_config().to_dict()
    rope = dict(config.get("rope_parameters") or {})
    writer.add_name(source.name)
    writer.add_block_count(len(shape.blocks))
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_vocab_size(shape.vocabulary)


# --- bytes before there are weights -----------------------------------------------------------------------------------


class FileBytes:
    """Bytes of the file that `write` makes of a model, and of its adapter's beside it, by its shape."""

    def __init__(self, source: Checkpoint) -> None:
        """source: a checkpoint with the tokenizer that the file will have. Raises PlanError for what is not written."""
        self._architecture = _require_runnable(source, "")
        self._source, self._factors = source, _rope_factors(source)

    @cached_property
    def _keys(self) -> int:
        """Bytes of the header and of what is not tensors, without the model's name."""
        name = len(self._source.name.encode())

        def fill(writer: GGUFWriter) -> None:
            _settings(writer, self._source)
            _tokenizer(writer, self._source)

        return self._begun(fill) - name

    @cached_property
    def _adapter_keys(self) -> int:
        return self._begun(lambda writer: _adapter_settings(writer, 1, 1.0))

    def _begun(self, fill: Callable[[GGUFWriter], object]) -> int:
        with tempfile.TemporaryDirectory(prefix="edgepress-gguf-") as folder:
            writer = GGUFWriter(path := Path(folder) / "keys.gguf", self._architecture)
            fill(writer)
            writer.add_tensor("none", np.zeros(1, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            return path.stat().st_size

    def of(self, shape: ModelShape, name: str) -> int:
        """Of both files. name: the model's, which is its folder's. Raises PlanError where the codes decide the type."""
        tensors, adapters = [self._outer(t, shape) for t in shape.outer], list[tuple[int, int]]()
        if self._factors is not None:
            tensors.append(_tensor_bytes("rope_freqs.weight", self._factors.shape, "F32"))
        for index, block in enumerate(shape.blocks):
            own, beside = self._block(index, block, shape)
            tensors, adapters = tensors + own, adapters + beside
        whole = _file_bytes(self._keys + len(name.encode()), tensors)
        return whole + (_file_bytes(self._adapter_keys, adapters) if adapters else 0)

    def of_block(self, shape: ModelShape, block: BlockShape) -> int:
        """Of a block's tensors, those of its adapters included."""
        own, beside = self._block(0, block, shape)
        return sum(info + data for info, data in own + beside)

    def _block(
        self, index: int, block: BlockShape, shape: ModelShape
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        names = _names(self._architecture, len(shape.blocks))
        tensors, adapters = list[tuple[int, int]](), list[tuple[int, int]]()
        for x in block.linears:
            stem = names.get_name(f"{shape.block_prefix}.{index}.{x.name}")
            tensors.append(_tensor_bytes(f"{stem}.weight", (x.out_features, x.in_features), _type_of(x)))
            if x.bias:
                tensors.append(_tensor_bytes(f"{stem}.bias", (x.out_features,), "F32"))
            if x.adapter_rank:
                sides = {"a": (x.adapter_rank, x.in_features), "b": (x.out_features, x.adapter_rank)}
                adapters += [_tensor_bytes(f"{stem}.weight.lora_{side}", size, "F32") for side, size in sides.items()]
        for t in block.others:
            stem, _, last = t.name.rpartition(".")
            theirs = names.get_name(f"{shape.block_prefix}.{index}.{stem}")
            tensors.append(_tensor_bytes(f"{theirs}.{last}", t.shape, "F32"))
        return tensors, adapters

    def _outer(self, t: TensorShape, shape: ModelShape) -> tuple[int, int]:
        stem, _, last = t.name.rpartition(".")
        name = f"{_names(self._architecture, len(shape.blocks)).get_name(stem)}.{last}"
        kind = "F32" if len(t.shape) == 1 else t.dtype
        if len(t.shape) == 2 and shape.embedding_bits and t.shape[1] % 32 == 0:
            kind = "Q4_1" if shape.embedding_bits == 4 else "Q8_0"
        return _tensor_bytes(name, t.shape, kind)


@cache
def _names(architecture: str, blocks: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(_key_of(architecture), blocks)


def _type_of(x: LinearShape) -> str:
    """ggml's type, as `_matrix` finds it with the codes. Raises PlanError where only they decide."""
    if isinstance(x.grid, SuperBlocks):
        form = x.grid if x.grid.gguf else _k_type(x.grid, x.in_features)
        return x.dtype if form is None else form.name
    if not isinstance(x.grid, Grid):
        return x.dtype
    if not x.grid.symmetric:
        raise PlanError(
            "which of ggml's types a layer takes depends on its zero points, so the bytes of the GGUF file are not "
            "known before; give --quant q4_k, whose family are ggml's own types, or --symmetric"
        )
    size = x.in_features if x.grid.group == -1 else x.grid.group
    if x.in_features % size or size % 32:
        return x.dtype
    return next(name for name in _SMALLEST_FIRST if GGUF_TYPES[name].bits >= x.grid.bits)


def _tensor_bytes(name: str, shape: Sequence[int], kind: str) -> tuple[int, int]:
    """Of a tensor's entry in the table, and of its data with what fills it up."""
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = math.prod(shape) // block * size
    return 8 + len(name.encode()) + 4 + 8 * len(shape) + 4 + 8, aligned(data, gguf.GGUF_DEFAULT_ALIGNMENT)


def _file_bytes(begun: int, tensors: Sequence[tuple[int, int]]) -> int:
    table = begun + sum(info for info, _ in tensors)
    return aligned(table, gguf.GGUF_DEFAULT_ALIGNMENT) + sum(data for _, data in tensors)


def _rope_factors(source: Checkpoint) -> NDArray[np.float32] | None:
    """By which llama.cpp divides the rotary frequencies, for Llama 3's scaling."""
    config = source.hf_config()
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    size = source.shape.head_dim
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2).float() / size)
    factors: NDArray[np.float32] = (plain / scaled).numpy()
    return factors


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def _tokenizer(writer: GGUFWriter, source: Checkpoint) -> list[str]:
    """Tokens, merges and special ones. Raises PlanError for a tokenizer that llama.cpp would not follow."""
    tokenizer = source.tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = core["model"], {t["id"]: t for t in core["added_tokens"]}
    if model["type"] != "BPE":
        raise PlanError(f"--to gguf: a tokenizer of the kind {model['type']} is not written, BPE is; {_INSTEAD}")
    pieces = {index: piece for piece, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    words = bool(model.get("byte_fallback"))
    tokens, kinds = [], []
    for index in range(source.shape.vocabulary):
        piece = pieces.get(index)
        tokens.append(f"[PAD{index}]" if piece is None else piece)
        kinds.append(_kind_of(piece, added.get(index), words, index == tokenizer.unk_token_id))
    writer.add_tokenizer_model("llama" if words else "gpt2")
    if not words:
        writer.add_tokenizer_pre(_way_of_splitting(core))
    writer.add_token_list(tokens)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if words:
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        writer.add_token_scores([-float(ranks[piece]) if piece in ranks else 0.0 for piece in tokens])
        writer.add_add_space_prefix(str(tokenizer.convert_ids_to_tokens(_plain(tokenizer, "x"))[0]).startswith("▁"))
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(int(number))
    begun = list(tokenizer("x").input_ids)
    writer.add_add_bos_token(bool(begun) and begun[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return []


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _kind_of(piece: str | None, added: Mapping[str, Any] | None, words: bool, unknown: bool) -> TokenType:
    if piece is None:
        return TokenType.UNUSED
    if unknown:
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if words and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _way_of_splitting(core: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text. Raises PlanError where it has none."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    parts = list(_splits(core.get("pre_tokenizer")))
    regular = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    digits = any(part["type"] == "Digits" and part.get("individual_digits") for part in parts)
    if len(regular) == 1:
        for name in ("llama-bpe", "qwen2", "gpt-4o", "tekken"):
            if GGUF_PRE_TOKENIZER_SPLITS.get(name) == regular[0]:
                return name
    elif not regular and any(part["type"] == "ByteLevel" and part.get("use_regex", True) for part in parts):
        return "smollm" if digits else "gpt-2"
    raise PlanError(
        "--to gguf: llama.cpp has no name for how this tokenizer splits text "
        f"({str(regular or parts)[:80]}); {_INSTEAD}"
    )


def _splits(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if step is not None and step["type"] == "Sequence":
        for part in step["pretokenizers"]:
            yield from _splits(part)
    elif step is not None:
        yield step


# --- the adapter ------------------------------------------------------------------------------------------------------


def _write_adapter(source: Checkpoint, path: Path, architecture: str, names: gguf.TensorNameMap) -> None:
    """A GGUF LoRA: W + alpha / rank B A for each layer, in float32."""
    ranks = {x.adapter_rank for block in source.shape.blocks for x in block.linears if x.adapter_rank}
    if len(ranks) != 1:
        raise CheckpointError(f"{source.folder}: adapters of several ranks ({sorted(ranks)}); take --type merged")
    writer = GGUFWriter(path, architecture)
    _adapter_settings(writer, ranks.pop(), source.adapter_scale)
    for index, block in enumerate(source.shape.blocks):
        parts = source.adapter_part(index)
        for x in block.linears:
            if x.adapter_rank:
                stem = names.get_name(f"{source.shape.block_prefix}.{index}.{x.name}")
                a, b = (parts[f"{x.name}.lora_{side}.weight"].float() for side in "AB")
                writer.add_tensor(f"{stem}.weight.lora_a", a.contiguous().numpy())
                turned = _turned(b, x.name, source, architecture)
                writer.add_tensor(f"{stem}.weight.lora_b", turned.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adapter_settings(writer: GGUFWriter, rank: int, scale: float) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * rank)
