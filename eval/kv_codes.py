"""Keys and values of whole groups of tokens as packed codes, and back.

Asymmetric grids after KIVI (arXiv 2402.02750, section 3): x ~ code * scale + least with code in 0 .. 2^bits - 1,
least = min(x), scale = (max(x) - min(x)) / (2^bits - 1) over the elements that share them. Scale and least are
float16: a bfloat16 minimum would err by more than an 8-bit step where a channel lies far from zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.kv_format import GROUP, value_group

Stored = tuple[Tensor, ...]  # each (b, heads, groups, ...): codes, scale, least; or the values themselves at 16 bit


def encode_keys(keys: Tensor, bits: int) -> Stored:
    """keys (b, heads, groups, tokens, head_dim): a grid for each channel of each group."""
    return _encode(keys.transpose(-1, -2), bits) if bits < 16 else (keys,)


def encode_values(values: Tensor, bits: int) -> Stored:
    """values (b, heads, groups, tokens, head_dim): a grid for each token and up to 32 of its channels."""
    if bits == 16:
        return (values,)
    width, head_dim = value_group(values.shape[-1]), values.shape[-1]
    return _encode(values.reshape(*values.shape[:3], GROUP * head_dim // width, width), bits)


def decode_keys(stored: Stored, bits: int, dtype: torch.dtype) -> Tensor:
    return _decode(stored, bits, dtype).transpose(-1, -2) if bits < 16 else stored[0]


def decode_values(stored: Stored, bits: int, dtype: torch.dtype, head_dim: int) -> Tensor:
    if bits == 16:
        return stored[0]
    values = _decode(stored, bits, dtype)
    return values.reshape(*values.shape[:3], GROUP, head_dim)


def _encode(x: Tensor, bits: int) -> Stored:
    """x (b, heads, groups, grids, elements) with one grid for each row of elements."""
    x = x.float()
    least, most = x.aminmax(dim=-1)
    levels = 2**bits - 1
    least, scale = least.half(), ((most - least) / levels).half()
    if not bool((torch.isfinite(scale) & torch.isfinite(least)).all()):
        raise NumericsError("a cached key or value is too large for a float16 scale; use --kv-bits 16")
    # A range too small for a float16 scale becomes its minimum.
    step = torch.where(scale > 0, scale, torch.ones_like(scale)).float().unsqueeze(-1)
    codes = ((x - least.float().unsqueeze(-1)) / step).round_().clamp_(0, levels)
    codes = (codes * (scale > 0).unsqueeze(-1)).to(torch.uint8).flatten(3)
    return (_pack(codes) if bits == 4 else codes), scale, least


def _decode(stored: Stored, bits: int, dtype: torch.dtype) -> Tensor:
    codes, scale, least = stored
    codes = _unpack(codes) if bits == 4 else codes
    codes = codes.reshape(*scale.shape, codes.shape[-1] // scale.shape[-1])
    return torch.addcmul(least.float().unsqueeze(-1), codes.float(), scale.float().unsqueeze(-1)).to(dtype)


def _pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the earlier in the low half; 32 tokens make an even number of codes."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
