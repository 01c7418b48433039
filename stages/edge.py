"""Quantise embedding and head to 8 or 4 bits, which GPTQ's file format has no place for.

The codes lie beside the model in `edge/embedding.safetensors`, and the model's own tensors become exactly
what the codes stand for, so what is measured anywhere is what the chip would compute.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgepress.checkpoints.packing import dequantise_rows


def quantise_outer(outer: Mapping[str, Tensor], bits: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outer tensors with their matrices rounded, and the packed codes, one grid a row (a token)."""
    rounded = dict(outer)
    packed: dict[str, Tensor] = {}
    for name, tensor in outer.items():
        if tensor.dim() != 2:
            continue
        codes, scales, minimum = quantise_rows(tensor.float(), bits)
        codes, scales, minimum = pack_bytes(codes, bits), scales.to(torch.float16), minimum.to(torch.float16)
        base = name.removesuffix(".weight")
        packed |= {f"{base}.codes": codes, f"{base}.scales": scales, f"{base}.minimum": minimum}
        rounded[name] = dequantise_rows(codes, scales, minimum, bits).to(tensor.dtype)
    return rounded, packed


def quantise_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, columns) uint8, scales and minima (rows, 1) in float32 holding float16 values."""
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    minimum = low.to(torch.float16).float()
    scales = ((high - minimum) / (2**bits - 1)).clamp(min=6.2e-5).to(torch.float16).float()
    codes = torch.round((weight - minimum) / scales).clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, scales, minimum


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Two 4-bit codes a byte, the lower column in the lower half; 8-bit codes as they are."""
    return codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4
