"""An adapter as 8-bit codes, beside the 16-bit tensors in PEFT's format that are what the codes stand for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from edgepress.checkpoints.headers import ADAPTER, ADAPTER_PACKED


def eight_bit(matrix: Tensor, within: int) -> tuple[Tensor, Tensor]:
    """Codes int8 from -127 to 127 and float32 scales, one for each rank; `within` is the dimension that shares it.

    A's rows and B's columns share a scale, so a kernel scales the r values between the two products once.
    """
    scales = matrix.float().abs().amax(dim=within, keepdim=True) / 127
    codes = torch.round(matrix.float() / scales.clamp_min(torch.finfo(torch.float32).tiny)).clamp(-127, 127)
    return codes.to(torch.int8), scales


def unpacked(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, in the adapter's precision."""
    return (codes.float() * scales).to(dtype)


def differing(folder: Path) -> list[str]:
    """Names of the adapter's tensors in a checkpoint folder that are not exactly what its packed codes stand for."""
    packed, adapter = load_file(folder / ADAPTER_PACKED), load_file(folder / ADAPTER)
    found = []
    for name, tensor in adapter.items():
        base = name.removesuffix(".weight")
        codes, scales = packed.get(f"{base}.codes"), packed.get(f"{base}.scales")
        if codes is None or scales is None or not torch.equal(unpacked(codes, scales, tensor.dtype), tensor):
            found.append(name)
    return found
