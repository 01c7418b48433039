"""Scales of scales: few-bit scales and minima of small groups, under float16 ones of a super-block.

llama.cpp's k-quants and its older types are such forms, exactly (`GGUF_TYPES`), and so are those of this project, whose
super-block is a whole row and so divides any width. No torch at the top.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.forms import TORCH_NAMES, WORD, Form, Layer, Sides, TensorShape, largest_group

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

METHOD = "edgepress-super-blocks"
SMALLEST_GROUP = 16
NOTE_BYTES = 192  # the note on a layer is JSON; spaces fill it to one length


@dataclass(frozen=True)
class SuperBlocks(Form):
    """Integer codes with a scale for every `group` weights of a row, itself a code under a super-block's float16.

    A weight is d s q - e m with codes q of `bits` bits, s and m of `scale_bits` bits for each group, and float16 d and
    e for each super-block of `per` groups, 0 for the row. Without a minimum it is d s (q - 2^(bits - 1)), and s has a
    sign; with scale_bits 0 there are neither s nor m, and a group is its own super-block. (ggml's block_q4_K and its
    like; the codes of a row lie in the row's order here.)

    A real minimum leaves no code for exactly 0. With `masked` the file therefore marks the weights that an N:M pattern
    removed: they have no code, and are 0.
    """

    name: str
    bits: int
    group: int
    per: int = 0
    scale_bits: int = 6
    minimum: bool = True
    masked: bool = False

    note = "weight.form."
    unknown = "scales of scales"

    @property
    def symmetric(self) -> bool:
        return not self.minimum

    @property
    def exact_zero(self) -> bool:
        return self.masked or not self.minimum

    @property
    def marks_zeros(self) -> bool:
        return self.masked

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(t.name.removeprefix(".") for t in self.tensors("", 1, 1))

    @property
    def on_cores(self) -> tuple[str, str]:
        return (
            self.describe(),
            "integers whose scales are codes themselves{instead}. The cores compute with them",
        )

    @property
    def gguf(self) -> str:
        """Its type in GGUF; empty for a form of this project."""
        return self.name if self.name in GGUF_TYPES else ""

    @property
    def middle(self) -> int:
        """The code that stands for 0 where there is no minimum."""
        return 0 if self.minimum else 2 ** (self.bits - 1)

    def describe(self) -> str:
        return self.gguf or f"{self.bits} bits with scales of scales"

    def scales(self) -> str:
        return f"groups of {self.group}"

    # --- planning and counting ---------------------------------------------------------------------------------

    def holds(self, rows: int, columns: int) -> bool:
        """Whether it, or what stands in for it, divides the width into whole groups, and the codes fill words."""
        return columns % (WORD if self.gguf else SMALLEST_GROUP) == 0 and columns * self.bits % WORD == 0

    def fitted(self, widths: set[int]) -> SuperBlocks:
        """Groups of any multiple of 16 that divides every width, else of the largest power of two that does."""
        if self.gguf or (self.group % SMALLEST_GROUP == 0 and not any(width % self.group for width in widths)):
            return self
        return replace(self, group=max(largest_group(widths, self.group), SMALLEST_GROUP))

    def suited(self, rows: int, columns: int, masked: bool) -> SuperBlocks:
        """This form, or GGUF's next larger type where the width is no multiple of the super-block."""
        form = self if not self.per or columns % (self.group * self.per) == 0 else GGUF_TYPES[_STAND_INS[self.name]]
        return replace(form, masked=masked and form.minimum)

    def groups(self, columns: int) -> int:
        return -(-columns // self.group)

    def supers(self, columns: int) -> int:
        """Super-blocks of a row."""
        return -(-self.groups(columns) // self.per) if self.per else 1

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[TensorShape]:
        groups, supers = self.groups(columns), self.supers(columns)
        yield TensorShape(f"{name}.weight", (columns * self.bits // WORD, rows), "I32")
        yield TensorShape(f"{name}.weight.d", (rows, supers), "F16")
        if self.minimum:
            yield TensorShape(f"{name}.weight.e", (rows, supers), "F16")
        if self.scale_bits:
            yield TensorShape(f"{name}.weight.scales", (rows, groups), "U8")
        if self.scale_bits and self.minimum:
            yield TensorShape(f"{name}.weight.minima", (rows, groups), "U8")
        if self.masked:
            yield TensorShape(f"{name}.weight.kept", (-(-rows * columns // 8),), "U8")
        yield TensorShape(f"{name}.{self.note}super_blocks", (NOTE_BYTES,), "U8")

    def sides(self, rows: int, columns: int, ordered: bool = True) -> Sides:
        groups, supers = self.groups(columns), self.supers(columns)
        sides: Sides = {"d": ((rows, supers), "F16")}
        if self.minimum:
            sides["e"] = (rows, supers), "F16"
        if self.scale_bits:
            sides["scales"] = (rows, groups), self.scale_bits
        if self.scale_bits and self.minimum:
            sides["minima"] = (rows, groups), self.scale_bits
        return sides

    # --- the documents that tell of it -------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        return {
            "super_blocks": self.name, "bits": self.bits, "group": self.group, "per": self.per,
            "scale_bits": self.scale_bits, "minimum": self.minimum, "masked": self.masked,
        }  # fmt: skip

    @classmethod
    def from_about(cls, about: Mapping[str, Any]) -> SuperBlocks | None:
        if "super_blocks" not in about:
            return None
        names = ("bits", "group", "per", "scale_bits", "minimum", "masked")
        return cls(about["super_blocks"], *(about[name] for name in names))

    def config(
        self, dtype: str, dense: Sequence[str] = (), heads: Sequence[str] = (), damping: float | None = None
    ) -> dict[str, Any]:
        # A name no loader knows, and `weight` of another shape: transformers stops instead of misreading.
        return {"quant_method": METHOD, "form": self.name, "bits": self.bits, "group_size": self.group}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SuperBlocks | None:
        if config.get("quant_method") != METHOD:
            return None
        return cls(str(config.get("form")), int(config.get("bits") or 0), int(config.get("group_size") or 0))

    def noted(self, note: bytes) -> Layer:
        told = json.loads(note)
        form = SuperBlocks.from_about(told)
        if form is None or not all(0 < n <= 256 for n in (form.bits, form.group)) or form.bits > 8:
            raise ValueError(f"not the note of a layer: {told}")
        rows, columns = map(int, told["shape"])
        return Layer(form, rows, columns, str(told["dtype"]))

    # --- the tensors of one layer --------------------------------------------------------------------------------

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        codes, sides = self.split("", stored, rows, columns, ordered=True)
        dense = self.dense(codes.clamp(max=2**self.bits - 1), sides)
        return dense if not self.masked else dense.masked_fill_(codes == 2**self.bits, 0.0)

    def dense(self, codes: Tensor, sides: Mapping[str, Tensor]) -> Tensor:
        """(out, in) float32 of codes (out, in) and `sides`, every one taken as kept."""
        scale, least = self.steps(sides, codes.shape[1])
        levels = codes.view(*scale.shape, -1).float() - self.middle
        return (scale.unsqueeze(-1) * levels - least.unsqueeze(-1)).view(codes.shape)

    def steps(self, sides: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Tensor]:
        """What multiplies a code of each group, and what is taken off: both (out, groups) float32."""
        groups = self.groups(columns)
        each = groups // self.supers(columns)
        scale = sides["d"].float().repeat_interleave(each, dim=1)
        least = sides["e"].float().repeat_interleave(each, dim=1) if self.minimum else scale.new_zeros(scale.shape)
        if self.scale_bits:
            scale = scale * (sides["scales"].float() - (0 if self.minimum else 2 ** (self.scale_bits - 1)))
        if self.scale_bits and self.minimum:
            least = least * sides["minima"].float()
        return scale, least

    def write(
        self, codes: Tensor, sides: Mapping[str, Tensor], kept: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """codes (out, in); `sides` as that method lists them; kept (out, in) bool, None where all are."""
        if self.masked and kept is not None:
            codes = codes.masked_fill(~kept, 2**self.bits)
        return self.join(codes, sides, dtype)

    def split(
        self, name: str, stored: Mapping[str, Tensor], rows: int, columns: int, ordered: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A weight without a code has 2^bits in place of one."""
        import numpy as np
        import torch

        from edgepress.checkpoints.packing import unpack

        codes = unpack(stored["weight"], self.bits, columns).T.contiguous().to(torch.uint8)
        if self.masked:
            kept = np.unpackbits(stored["weight.kept"].numpy(), count=rows * columns, bitorder="little")
            codes[~torch.from_numpy(kept).view(rows, columns).bool()] = 2**self.bits
        return codes, {side: stored[f"weight.{side}"] for side in self.sides(rows, columns)}

    def join(self, codes: Tensor, sides: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        import numpy as np
        import torch

        from edgepress.checkpoints.packing import pack

        rows, columns = codes.shape
        stored = {}
        if self.masked:
            kept = codes < 2**self.bits
            packed = np.packbits(kept.flatten().numpy(), bitorder="little")
            stored["weight.kept"] = torch.from_numpy(packed)
            codes = codes * kept
        stored["weight"] = pack(codes.T.contiguous(), self.bits)
        for side, (_, how) in self.sides(rows, columns).items():
            stored[f"weight.{side}"] = sides[side].to(torch.float16 if isinstance(how, str) else torch.uint8)
        names = {name: short for short, name in TORCH_NAMES.items()}
        told = self.about() | {"shape": [rows, columns], "dtype": names[str(dtype).removeprefix("torch.")]}
        text = json.dumps(told, separators=(",", ":")).encode().ljust(NOTE_BYTES)
        stored[f"{self.note}super_blocks"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return stored

    def zero_codes(self, sides: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        if not self.exact_zero:
            return super().zero_codes(sides, rows, columns)
        import torch

        return torch.full((rows, columns), 2**self.bits if self.masked else self.middle, dtype=torch.int32)


# ggml's types: bits of a code, group, groups of a super-block, bits of a scale, whether there is a minimum.
GGUF_TYPES = {
    form.name: form
    for form in (
        SuperBlocks("Q2_K", 2, 16, 16, 4),
        SuperBlocks("Q3_K", 3, 16, 16, 6, minimum=False),
        SuperBlocks("Q4_K", 4, 32, 8, 6),
        SuperBlocks("Q5_K", 5, 32, 8, 6),
        SuperBlocks("Q6_K", 6, 16, 16, 8, minimum=False),
        SuperBlocks("Q4_0", 4, 32, 1, 0, minimum=False),
        SuperBlocks("Q4_1", 4, 32, 1, 0),
        SuperBlocks("Q5_0", 5, 32, 1, 0, minimum=False),
        SuperBlocks("Q5_1", 5, 32, 1, 0),
        SuperBlocks("Q8_0", 8, 32, 1, 0, minimum=False),
    )
}
# For widths that 256 does not divide: the smallest type with groups of 32 that has at least as many bits, and a minimum
# where the k-quant has one.
_STAND_INS = {"Q2_K": "Q4_1", "Q3_K": "Q4_0", "Q4_K": "Q4_1", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


# --- ggml's bytes -----------------------------------------------------------------------------------------------------


def ggml_rows(form: SuperBlocks, codes: NDArray[Any], sides: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The rows of a matrix as ggml lays out `form.gguf`: (rows, bytes) uint8.

    codes (rows, columns) uint8; `sides` as `SuperBlocks.sides` lists them. The structs are ggml-common.h's; ggml adds a
    minimum where this form takes it off, in the types without scales of scales.
    """
    import numpy as np

    rows, columns = codes.shape
    size = form.group * max(form.per, 1)
    count = columns // size
    q = codes.reshape(rows, count, size)
    d = sides["d"].astype("<f2").reshape(rows, count, 1).view(np.uint8)
    e = sides["e"].astype("<f2").reshape(rows, count, 1) if form.minimum else np.empty((rows, count, 0), "<f2")
    s, m = (sides[name].reshape(rows, count, -1) if name in sides else q[..., :0] for name in ("scales", "minima"))
    least = (e if form.scale_bits else -e).view(np.uint8)

    def nibbles(x: NDArray[Any], run: int) -> NDArray[Any]:
        """Two 4-bit numbers in a byte: of every 2 run numbers the first half lies in the lower halves."""
        pairs = (x & 15).reshape(*x.shape[:2], -1, 2, run)
        packed: NDArray[Any] = pairs[..., 0, :] | pairs[..., 1, :] << 4
        return packed.reshape(*x.shape[:2], -1)

    def spread(x: NDArray[Any], width: int, run: int, stride: int) -> NDArray[Any]:
        """Numbers of `width` bits: of every `stride`, byte l has those at l, l + run, l + 2 run and so on."""
        parts = x.reshape(*x.shape[:2], -1, stride // run, run).astype(np.uint8)
        packed = np.zeros((*x.shape[:2], parts.shape[2], run), np.uint8)
        for place in range(stride // run):
            packed |= parts[..., place, :] << width * place
        return packed.reshape(*x.shape[:2], -1)

    if form.name in ("Q4_K", "Q5_K"):
        low, high = slice(0, 4), slice(4, 8)
        heads = (s[..., low] | s[..., high] >> 4 << 6, m[..., low] | m[..., high] >> 4 << 6)
        steps = [d, least, *heads, s[..., high] & 15 | (m[..., high] & 15) << 4]
        fifth = [spread(q >> 4, 1, 32, 256)] if form.bits == 5 else []
        parts = [*steps, *fifth, nibbles(q, 32)]
    elif form.name == "Q2_K":
        parts = [s | m << 4, spread(q, 2, 32, 128), d, least]
    elif form.name == "Q3_K":
        low4 = (s[..., :8] & 15) | (s[..., 8:] & 15) << 4
        parts = [spread(q >> 2, 1, 32, 256), spread(q & 3, 2, 32, 128), low4, spread(s >> 4, 2, 4, 16), d]
    elif form.name == "Q6_K":
        parts = [nibbles(q, 64), spread(q >> 4, 2, 32, 128), s ^ 128, d]
    elif form.name == "Q8_0":
        parts = [d, q ^ 128]
    else:
        fifth = [np.packbits(q >> 4, axis=-1, bitorder="little")] if form.bits == 5 else []
        parts = [d, least, *fifth, nibbles(q, 16)]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)
