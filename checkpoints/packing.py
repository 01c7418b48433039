"""GPTQ's storage: integer codes packed into 32-bit words, and the dense weights they stand for.

The layout is the one GPTQModel, transformers and vLLM read (format "gptq", version 1): codes run down the
input axis, zero points across the output axis and are stored minus one. The tests hold it against
GPTQModel's own packing. Real zero points lie beside such codes as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgepress.checkpoints.errors import PlanError

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
    """Codes (out, in), scales (out, groups) in float32 and zeros (out, groups), as `pack_linear` took them."""
    in_features = stored["g_idx"].shape[0]
    out_features = stored["scales"].shape[1]
    codes = unpack(stored["qweight"], bits, in_features).T
    zeros = unpack(stored["qzeros"].T.contiguous(), bits, out_features) + 1
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
