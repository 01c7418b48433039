"""Encode weights as codes and decode them: GPTQ's 32-bit words, codebooks, 8-bit adapters.

The layout is the one GPTQModel, transformers and vLLM read (format "gptq", version 1): codes run down the
input axis, zero points across the output axis and are stored minus one. The tests hold it against
GPTQModel's own packing. Real zero points lie beside such codes as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from edgepress.checkpoints.errors import CheckpointError, PlanError

WORD = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (rows, columns), 0 … 2^bits - 1, along the rows: (rows * bits / 32, columns) int32.

    Bit i of the stream of one column is bit i % 32 of word i / 32, so 3-bit codes cross word borders.
    """
    rows, columns = codes.shape
    if rows * bits % WORD:
        raise PlanError(f"{rows} codes of {bits} bits do not fill whole 32-bit words")
    if WORD % bits == 0:
        # (words, codes per word, columns): one shift per place in the word
        parts = codes.to(torch.int64).view(-1, WORD // bits, columns)
        shifts = torch.arange(0, WORD, bits, device=codes.device).view(1, -1, 1)
        words = (parts << shifts).sum(dim=1)
    else:
        places = torch.arange(bits, device=codes.device).view(1, bits, 1)
        stream = (codes.to(torch.int64).unsqueeze(1) >> places & 1).reshape(-1, WORD, columns)
        words = (stream << torch.arange(WORD, device=codes.device).view(1, -1, 1)).sum(dim=1)
    # int64 -> int32 keeps the low 32 bits: the top bit becomes the sign
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack`: codes (rows, columns) as int32."""
    columns = words.shape[1]
    wide: Tensor = words.to(torch.int64) & 0xFFFFFFFF
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, device=words.device).view(1, -1, 1)
        codes: Tensor = wide.unsqueeze(1) >> shifts & (2**bits - 1)
        return codes.reshape(rows, columns).to(torch.int32)
    stream = wide.unsqueeze(1) >> torch.arange(WORD, device=words.device).view(1, -1, 1) & 1
    places = torch.arange(bits, device=words.device).view(1, bits, 1)
    joined: Tensor = (stream.reshape(rows, bits, columns) << places).sum(dim=1)
    return joined.to(torch.int32)


def pack_linear(codes: Tensor, scales: Tensor, zeros: Tensor, group: int, bits: int) -> dict[str, Tensor]:
    """The stored tensors of one layer.

    codes (out, in); scales and zeros (out, groups), zeros from 1 to 2^bits - 1: a stored zero point is one
    less, and kernels that add it back nibble by nibble would carry at 0.
    """
    return {
        "qweight": pack(codes.T.contiguous(), bits),
        "qzeros": pack((zeros - 1).contiguous(), bits).T.contiguous(),
        "scales": scales.T.to(torch.float16).contiguous(),
        "g_idx": group_of(codes.shape[1], group),
    }


def group_of(columns: int, group: int) -> Tensor:
    """The group of each column (in,), int32, where groups lie in storage order; group -1: all columns."""
    return (torch.arange(columns) // (columns if group == -1 else group)).to(torch.int32)


def unpack_linear(stored: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), scales (out, groups) in float32 and zeros (out, groups), as `pack_linear` took them.

    Raises CheckpointError for a column of a group that is not there, and for zero points that readers disagree on: of
    one stored as the highest code some make 0, some 2^bits, and some carry into its neighbour.
    """
    in_features = stored["g_idx"].shape[0]
    groups, out_features = stored["scales"].shape
    if bool(((stored["g_idx"] < 0) | (stored["g_idx"] >= groups)).any()):
        raise CheckpointError(f"g_idx puts a column in a group that is not one of its {groups}; the file is damaged")
    codes = unpack(stored["qweight"], bits, in_features).T
    zeros = unpack(stored["qzeros"].T.contiguous(), bits, out_features) + 1
    if bool((zeros == 2**bits).any()):
        raise CheckpointError(
            f"qzeros holds a zero point of 0, stored as {2**bits - 1}, which readers of the format take differently; "
            "give the checkpoint from before quantisation"
        )
    return codes, stored["scales"].T.float(), zeros


def pack_real(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> dict[str, Tensor]:
    """The stored tensors of a layer with real zero points: codes (out, in); scales and zeros (out, groups)."""
    return {
        "weight": pack(codes.T.contiguous(), bits),
        "scales": scales.T.to(torch.float16).contiguous(),
        "zeros": zeros.T.to(torch.float16).contiguous(),
    }


def unpack_real(stored: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), scales and zeros (out, groups) in float32, as `pack_real` took them."""
    in_features = stored["weight"].shape[0] * WORD // bits
    return unpack(stored["weight"], bits, in_features).T, stored["scales"].T.float(), stored["zeros"].T.float()


def dequantise_rows(codes: Tensor, scales: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """The matrix (rows, columns) in float32 that the packed copy of an embedding or head stands for.

    codes (rows, columns * bits / 8) uint8, of two 4-bit codes in a byte the lower column in the lower half;
    scales and minimum (rows, 1): code * scale + minimum.
    """
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    return codes * scales.float() + minimum.float()


def dequantise(stored: Mapping[str, Tensor], bits: int) -> Tensor:
    """The dense weights (out, in) in float32 that the stored codes stand for: scale * (code - zero)."""
    codes, scales, zeros = unpack_linear(stored, bits)
    g_idx = stored["g_idx"].long()
    dense: Tensor = scales[:, g_idx] * (codes - zeros[:, g_idx])
    return dense


def dequantise_real(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The dense weights (out, in) in float32: scale * (code - zero) with real zeros, group by group."""
    levels = codes.reshape(*scales.shape, -1) - zeros.unsqueeze(-1)
    dense: Tensor = (scales.unsqueeze(-1) * levels).view(codes.shape)
    return dense


# --- codebooks --------------------------------------------------------------------------------------------------------
# Codes of a fixed codebook, as bitsandbytes stores them: made from weights, and turned back into them.
#
# The tests hold reading against bitsandbytes itself bit for bit, and writing up to ties and to 8-bit codes of the
# absmax, where its choice on a CPU is not always the nearest. A layer's tensors: `weight`, two codes in a byte, the
# first in the upper half, over the matrix in row order; `weight.absmax`, one a block; `weight.quant_map`, the levels;
# with a second quantisation `weight.nested_absmax` and `weight.nested_quant_map`; and `weight.quant_state.…`, JSON in
# bytes, which names blocks, shape, precision, and the mean that was taken off the absmax.


_SMALLEST = 1e-38  # absmax of a block of zeros: its reciprocal still is a number
STATE = "weight.quant_state."


class Codebook(Protocol):
    """What is asked here of `forms.Codebook`."""

    @property
    def name(self) -> str: ...
    @property
    def levels(self) -> tuple[float, ...]: ...
    @property
    def block(self) -> int: ...
    @property
    def nested(self) -> int: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...
    @property
    def zero(self) -> int: ...
    @property
    def state_bytes(self) -> int: ...


@cache
def dynamic_map() -> Tensor:
    """The 256 levels of the 8-bit dynamic data type, rising: (256,) float32 in [-1, 1].

    Dettmers et al., arXiv 2110.02861, section 2.1: for each decade 10^-6 … 10^0 the middles of 1, 2, … 64 equal
    parts of its [0.1, 1], with both signs; 0 and 1 besides.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2)
        levels += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(levels))


def encode(weight: Tensor, codebook: Codebook, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored tensors of a layer, by the names of `codebook.kinds`, in host memory.

    weight (out, in); dtype: what the weights are to be read as. Every weight takes the level nearest
    to it over its block's absmax as it was before that was rounded, as QLoRA does; an exact 0 takes the level 0.
    """
    blocks = _blocks(weight.detach().float().flatten(), codebook.block)
    absmax = blocks.abs().amax(dim=1)
    codes = nearest(blocks / absmax.clamp(min=_SMALLEST).unsqueeze(1), levels(codebook, weight.device))
    scales, offset = _encode_absmax(absmax, codebook)
    codes = codes.flatten()[: weight.numel()].to("cpu", torch.uint8)
    stored = {name: tensor.cpu() for name, tensor in scales.items()}
    rows, columns = weight.shape
    return assemble(codes.view(rows, columns), stored, offset, codebook, dtype)


def by_kernels(stored: Mapping[str, Tensor], device: torch.device) -> Callable[[], Tensor]:
    """What dequantises a layer's stored nf4 tensors to (out, in) on `device` by bitsandbytes' kernels, which are to be
    installed. The values and their precision are those of `decode` in the precision that the layer notes.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    codes = stored["weight"].to(device)
    state = QuantState.from_dict({name: tensor for name, tensor in stored.items() if name != "weight"}, device)
    return lambda: dequantize_4bit(codes, state)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each value, of equals the lower; levels (n,) rising."""
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2)


def levels(codebook: Codebook, device: torch.device | str = "cpu") -> Tensor:
    """(16,) float32, rising."""
    return torch.tensor(codebook.levels, device=device)


def _encode_absmax(absmax: Tensor, codebook: Codebook) -> tuple[dict[str, Tensor], float]:
    """What is stored of the blocks' absmax (blocks,), and their mean, 0 where they are not quantised."""
    if not codebook.nested:
        return {"weight.absmax": absmax}, 0.0
    mean = absmax.mean()
    blocks = _blocks(absmax - mean, codebook.nested)
    nested = blocks.abs().amax(dim=1)
    codes = nearest(blocks / nested.clamp(min=_SMALLEST).unsqueeze(1), dynamic_map().to(absmax.device))
    scales = {"weight.absmax": codes.flatten()[: absmax.numel()].to(torch.uint8), "weight.nested_absmax": nested}
    return scales, float(mean)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """(blocks, size), the last one filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def assemble(
    codes: Tensor, scales: Mapping[str, Tensor], offset: float, codebook: Codebook, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The stored tensors from codes (out, in) uint8, what is stored of the absmax, and their mean."""
    flat = torch.nn.functional.pad(codes.flatten(), (0, codes.numel() % 2), value=codebook.zero)
    stored = {"weight": (flat[::2] << 4 | flat[1::2]).unsqueeze(1), **scales, "weight.quant_map": levels(codebook)}
    state: dict[str, Any] = {
        "quant_type": codebook.name,
        "blocksize": codebook.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(codes.shape),
    }
    if codebook.nested:
        stored["weight.nested_quant_map"] = dynamic_map().clone()  # two tensors of one file may not share memory
        state |= {"nested_blocksize": codebook.nested, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state).encode().ljust(codebook.state_bytes)
    stored[_state_kind(codebook)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return stored


def state_of(stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """The layer's own note on its blocks, shape and precision."""
    note = next(tensor for name, tensor in stored.items() if name.startswith(STATE))
    return dict(json.loads(bytes(note.tolist())))


def nested_scales(stored: Mapping[str, Tensor]) -> Tensor:
    """The absmax of the quantised absmax and, last, the mean that was taken off these: (nested blocks + 1,) float32."""
    mean = torch.tensor([state_of(stored)["nested_offset"]], dtype=torch.float32)
    return torch.cat([stored["weight.nested_absmax"], mean])


def codes_of(stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    """The codes (out, in) as uint8."""
    pairs = stored["weight"].flatten()
    return torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: rows * columns].view(rows, columns)


def decode(stored: Mapping[str, Tensor], codebook: Codebook, rows: int, columns: int) -> Tensor:
    """The dense weights (out, in) in float32: each code's level times its block's absmax."""
    absmax = stored["weight.absmax"]
    if codebook.nested:
        each = stored["weight.nested_quant_map"][absmax.long()]
        absmax = each * stored["weight.nested_absmax"].repeat_interleave(codebook.nested)[: absmax.numel()]
        absmax = absmax + state_of(stored)["nested_offset"]
    values = stored["weight.quant_map"][codes_of(stored, rows, columns).int()].flatten()  # 64 bits take twice as much
    dense = _blocks(values, codebook.block) * absmax.unsqueeze(1)
    return dense.flatten()[: rows * columns].view(rows, columns)


def require_known(name: str, stored: Mapping[str, Tensor], codebook: Codebook) -> None:
    """Raise CheckpointError where a layer's tables are not those that its codebook's name stands for."""
    known = {"weight.quant_map": levels(codebook)}
    if codebook.nested:
        known["weight.nested_quant_map"] = dynamic_map()
    for kind, table in known.items():
        if not torch.equal(stored[kind], table):
            raise CheckpointError(f"{name}.{kind} does not hold the levels of {codebook.name}")


def _state_kind(codebook: Codebook) -> str:
    return next(kind for kind in codebook.kinds if kind.startswith(STATE))
