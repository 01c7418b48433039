"""Codes of a fixed codebook, as bitsandbytes stores them: made from weights, and turned back into them.

The tests hold reading against bitsandbytes itself bit for bit, and writing up to ties and to 8-bit codes of the absmax,
where its choice on a CPU is not always the nearest. A layer's tensors: `weight`, two codes in a
byte, the first in the upper half, over the matrix in row order; `weight.absmax`, one a block; `weight.quant_map`, the
levels; with a second quantisation `weight.nested_absmax` and `weight.nested_quant_map`; and `weight.quant_state.…`,
JSON in bytes, which names blocks, shape, precision, and the mean that was taken off the absmax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from edgepress.checkpoints.errors import CheckpointError

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
    values = stored["weight.quant_map"][codes_of(stored, rows, columns).long()].flatten()
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
