"""The format llama2c: a folder with `model.bin` for llama2.c's run.c (float32) or runq.c (int8), and `tokenizer.bin`.

Layouts: https://github.com/karpathy/llama2.c, `export.py:legacy_export` (version 0) and `version2_export`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.llama2c import VERSIONED_MAGIC, halves_to_pairs
from edgepress.checkpoints.manifest import drafted_folder, write_bytes
from edgepress.checkpoints.packing import unpack_linear
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import LinearShape
from edgepress.pipeline.formats import Wanted, Written
from edgepress.pipeline.formats.hf import exact_block

MODEL, TOKENIZER = "model.bin", "tokenizer.bin"
_INSTEAD = "take --to gguf or --to hf"
_HEADER_BYTES = 256  # of version 2
_MOST_IN_GROUP = 64  # as llama2.c's own export has it
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def write(source: Checkpoint, wanted: Wanted, runtime: Runtime) -> Written:
    """Write the folder. What llama2.c would compute otherwise is refused."""
    require_runnable(source)
    _require_own(wanted.out)
    tokenizer = tokenizer_file(source)
    with drafted_folder(wanted.out) as draft:
        notes = (_write_int8 if wanted.type == "int8" else _write_float32)(source, draft / MODEL)
        write_bytes(draft / TOKENIZER, tokenizer)
    program = "runq" if wanted.type == "int8" else "run"
    notes.append(f"./{program} {wanted.out / MODEL} -z {wanted.out / TOKENIZER} -t 0 -i 'Once upon a time'")
    return Written(wanted.out, (wanted.out / MODEL).stat().st_size, tuple(notes), {"type": wanted.type or "float32"})


def require_runnable(source: Checkpoint) -> None:
    """Raise PlanError for all that run.c has no code for, with the constants that are compiled into it."""
    shape, config = source.shape, source.hf_config().to_dict()
    rope = dict(config.get("rope_parameters") or {})
    heads, width = config["num_attention_heads"], config["hidden_size"]
    faults = []
    if shape.family not in ("llama", "mistral"):
        faults.append(f"the family {shape.family} (llama and mistral without a window are run)")
    if any(x.bias for block in shape.blocks for x in block.linears):
        faults.append("biases")
    if shape.family in ("llama", "mistral"):
        if config.get("sliding_window"):
            faults.append(f"a sliding window ({config['sliding_window']})")
        if str(config.get("hidden_act")) not in ("silu", "swish"):
            faults.append(f"the activation {config.get('hidden_act')} (silu is run)")
        if rope.get("rope_type", "default") != "default":
            faults.append(f"rotary scaling '{rope['rope_type']}'")
        if float(rope.get("rope_theta", 10000.0)) != 10000.0:
            faults.append(f"rope_theta {rope['rope_theta']:g} (10000 is compiled in)")
        if abs(float(config.get("rms_norm_eps", 0.0)) - 1e-5) > 1e-9:
            faults.append(f"rms_norm_eps {config.get('rms_norm_eps'):g} (1e-5 is compiled in)")
        if (config.get("head_dim") or width // heads) * heads != width:
            faults.append(f"{heads} heads of {config['head_dim']}, which do not make the width {width}")
    if shape.activation_bits < 16:
        faults.append(f"inputs rounded to {shape.activation_bits} bits")
    if faults:
        raise PlanError(f"--to llama2c: llama2.c has no code for {'; '.join(faults)}; {_INSTEAD}")


# --- float32 ----------------------------------------------------------------------------------------------------------


def _sizes(source: Checkpoint, tied_in_sign: bool) -> tuple[int, ...]:
    config, shape = source.hf_config().to_dict(), source.shape
    vocabulary = shape.vocabulary if not tied_in_sign or _tied(source) else -shape.vocabulary
    return (
        shape.hidden_size, config["intermediate_size"],
        len(shape.blocks), config["num_attention_heads"], config["num_key_value_heads"], vocabulary, shape.positions,
    )  # fmt: skip


def _tied(source: Checkpoint) -> bool:
    return not any(t.name == "lm_head.weight" for t in source.shape.outer)


def _write_float32(source: Checkpoint, path: Path) -> list[str]:
    outer, count = source.outer(), len(source.shape.blocks)
    width, _, _, heads, kv_heads, _, length = _sizes(source, tied_in_sign=True)
    with path.open("wb") as file:

        def put(tensor: Tensor) -> None:
            file.write(tensor.float().contiguous().numpy().tobytes())

        file.write(struct.pack("<7i", *_sizes(source, tied_in_sign=True)))
        put(outer["model.embed_tokens.weight"])
        order = (_NORMS[0], *_ATTENTION, _NORMS[1], *_MLP)
        for name in order:  # the file has each kind of all blocks together, and one block in memory suffices
            for index in range(count):
                put(_in_pairs(name, exact_block(source, index)[f"{name}.weight"], heads, kv_heads))
        put(outer["model.norm.weight"])
        angles = torch.outer(
            torch.arange(length).float(), 10000.0 ** -(torch.arange(0, width // heads, 2).float() / (width // heads))
        )
        put(angles.cos())
        put(angles.sin())
        if not _tied(source):
            put(outer["lm_head.weight"])
    return ["weights are float32, codes decoded and the adapter merged; nothing is rounded"]


def _in_pairs(name: str, weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    if name == "self_attn.q_proj":
        return halves_to_pairs(weight, heads)
    return halves_to_pairs(weight, kv_heads) if name == "self_attn.k_proj" else weight


# --- int8 -------------------------------------------------------------------------------------------------------------


def _write_int8(source: Checkpoint, path: Path) -> list[str]:
    """Whole numbers of 8 bits with a float32 scale for each group, in which codes of a grid are what they were."""
    outer, count, shape = source.outer(), len(source.shape.blocks), source.shape
    width, hidden, _, heads, kv_heads, _, _ = _sizes(source, tied_in_sign=False)
    group = _group(source, width, hidden)
    kept, rounded, worst = 0, 0, 0.0
    with path.open("wb") as file:

        def put(levels: Tensor, scales: Tensor) -> None:
            file.write(levels.to(torch.int8).contiguous().numpy().tobytes())
            file.write(scales.float().contiguous().numpy().tobytes())

        head = struct.pack("<Ii7iBi", VERSIONED_MAGIC, 2, *_sizes(source, False), int(_tied(source)), group)
        file.write(head.ljust(_HEADER_BYTES, b"\0"))
        for name in _NORMS:
            for index in range(count):
                file.write(source.stored_block(index)[f"{name}.weight"].float().numpy().tobytes())
        file.write(outer["model.norm.weight"].float().numpy().tobytes())
        tables = [outer["model.embed_tokens.weight"]] + ([] if _tied(source) else [outer["lm_head.weight"]])
        put(*rounded_to_8_bits(tables[0].float(), group))
        linears = [{x.name: x for x in block.linears} for block in shape.blocks]
        for name in (*_ATTENTION, *_MLP):
            for index in range(count):
                found = levels_of(source, index, linears[index][name], group)
                kept, rounded = kept + (found is not None), rounded + (found is None)
                if found is None:
                    weight = exact_block(source, index)[f"{name}.weight"].float()
                    found = rounded_to_8_bits(weight, group)
                    worst = max(worst, _error(weight, *found))
                put(*(_in_pairs(name, part, heads, kv_heads) for part in found))
        for table in tables[1:]:
            put(*rounded_to_8_bits(table.float(), group))
    notes = [f"{kept} matrices have the checkpoint's own codes and scales, in groups of {group}"] if kept else []
    if rounded:
        notes.append(
            f"{rounded} matrices are rounded to 8 bits in groups of {group}: at most {worst:.2g} of the largest weight"
        )
    off = max(_error(t.float(), *rounded_to_8_bits(t.float(), group)) for t in tables)
    notes.append(f"the embedding is rounded to 8 bits: at most {off:.2g} of its largest weight")
    return [*notes, "runq.c rounds the inputs of every matrix to 8 bits in the same groups"]


def _group(source: Checkpoint, width: int, hidden: int) -> int:
    """The largest power of two up to 64 that divides the widths, and the groups of all grids where it can."""
    linears = [x for block in source.shape.blocks for x in block.linears]
    groups = {x.grid.group for x in linears if isinstance(x.grid, Grid) and x.grid.group > 0}
    group = _MOST_IN_GROUP
    while width % group or hidden % group or (group > 8 and any(size % group for size in groups)):
        group //= 2
    return group


def levels_of(source: Checkpoint, index: int, x: LinearShape, group: int) -> tuple[Tensor, Tensor] | None:
    """Codes less their zero points (out, in) and scales (out, in / group), where these are the weights; else None.

    Without an adapter, with groups in storage order, and with differences that go into 8 bits.
    """
    if not isinstance(x.grid, Grid) or x.adapted or x.in_features % group:
        return None
    width = x.in_features if x.grid.group == -1 else x.grid.group
    stored = source.stored_block(index)
    own = {kind: stored[f"{x.name}.{kind}"] for kind in x.grid.kinds}
    codes, scales, zeros = unpack_linear(own, x.grid.bits)
    order = own["g_idx"].long()
    if width % group or x.in_features % width or not order.equal(torch.arange(x.in_features) // width):
        return None
    levels = codes - zeros[:, order]
    if int(levels.min()) < -128 or int(levels.max()) > 127:
        return None
    return levels, scales[:, order[::group]]


def rounded_to_8_bits(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Levels -127 … 127 (rows, columns) and a scale for each group (rows, columns / group): the largest is 127."""
    parts = weight.view(weight.shape[0], -1, group)
    scales = parts.abs().amax(-1) / 127
    levels = (parts / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round()
    return levels.view(weight.shape), scales


def _error(weight: Tensor, levels: Tensor, scales: Tensor) -> float:
    """The largest difference, as a part of the largest weight."""
    read = levels.view(*scales.shape, -1) * scales.unsqueeze(-1)
    largest = float(weight.abs().max())
    return float((read.view(weight.shape) - weight).abs().max()) / largest if largest else 0.0


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def tokenizer_file(source: Checkpoint) -> bytes:
    """tokenizer.bin. Raises PlanError for a tokenizer that run.c cannot have."""
    core = json.loads(source.tokenizer().backend_tokenizer.to_str())
    model = core["model"]
    pieces = _pieces(model, core["added_tokens"], source.shape.vocabulary)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        ranks.setdefault(left + right, rank)
    found = []
    for index, piece in enumerate(pieces):
        text = f"\n{piece}\n" if index in (1, 2) else piece.replace("\u2581", " ")
        found.append((float(-ranks[piece]) if piece in ranks else 0.0, text.encode()))
    longest = max(len(text) for _, text in found)
    return struct.pack("<I", longest) + b"".join(struct.pack("<fi", s, len(text)) + text for s, text in found)


def _pieces(model: Mapping[str, Any], added: list[Mapping[str, Any]], vocabulary: int) -> list[str]:
    by_id = {index: piece for piece, index in model.get("vocab", {}).items()} if model["type"] == "BPE" else {}
    by_id |= {token["id"]: token["content"] for token in added}
    faults = list(_faults(model, by_id, vocabulary))
    if faults:
        raise PlanError(f"--to llama2c: run.c cannot have this tokenizer: {'; '.join(faults)}; {_INSTEAD}")
    return [by_id[index] for index in range(vocabulary)]


def _faults(model: Mapping[str, Any], by_id: Mapping[int, str], vocabulary: int) -> Iterator[str]:
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        yield "it has no pieces for single bytes beside its words, as SentencePiece's have"
    elif set(by_id) != set(range(vocabulary)):
        yield f"it has {len(by_id)} pieces, and the model {vocabulary} tokens"
    elif [by_id[3 + byte] for byte in range(256)] != [f"<0x{byte:02X}>" for byte in range(256)]:
        yield "the tokens 3 to 258 are not the bytes"


def _require_own(folder: Path) -> None:
    """Raise PlanError where something else than such a folder would be written over."""
    if folder.is_dir():
        if {path.name for path in folder.iterdir()} - {MODEL, TOKENIZER}:
            raise PlanError(f"{folder} holds other things than an exported model; name another folder with -o")
    elif folder.exists():
        raise PlanError(f"{folder} is a file; name a folder with -o")
