"""The ways in which a quantised layer is stored: codes on a grid, whole or real its zero points, and of a codebook.

`Grid`, `RealGrid` and `Codebook` have the same few names, and whoever plans, counts bytes or packs asks those: `kinds`,
`tensors`, `side_parts`, `side_bits`, `integer`, `loaders`, `unknown`, `about`, `describe`. No torch; what the stored
codes stand for is computed in `packing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

# In the order in which safetensors stores them (its Dtype enum, falling); the header's length depends on it.
DTYPE_BYTES = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# Of whatever safetensors can hold, so that a file with what is not read here still shows its header.
DTYPE_BITS = {dtype: 8 * size for dtype, size in DTYPE_BYTES.items()} | {
    "U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# As config.json names what no library knows: codebooks that are not bitsandbytes', and real zero points.
CODEBOOK_METHOD, REAL_METHOD = "edgepress-codebook", "edgepress-real-zeros"


@dataclass(frozen=True)
class TensorShape:
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class _Grouped:
    """Codes with a scale for every `group` weights of a row; -1 means the whole row."""

    bits: int
    group: int

    def groups(self, in_features: int) -> int:
        return 1 if self.group == -1 else -(-in_features // self.group)


@dataclass(frozen=True)
class Grid(_Grouped):
    """Integer codes of `bits` bits with one scale and zero point for every `group` weights of a row.

    group -1 means the whole row. Stored in GPTQ's format.
    """

    symmetric: bool = False

    kinds: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    integer: ClassVar[bool] = True  # an engine for integers can multiply the codes as they are
    loaders: ClassVar[tuple[str, ...]] = ("gptqmodel", "optimum")  # what transformers loads the folder with
    unknown: ClassVar[str] = ""  # what no library knows of it, where there are no loaders

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[TensorShape]:
        """What a layer (rows, columns) called `name` has in its shard."""
        groups, bits = self.groups(columns), self.bits
        yield TensorShape(f"{name}.qweight", (columns * bits // 32, rows), "I32")
        yield TensorShape(f"{name}.qzeros", (groups, rows * bits // 32), "I32")
        yield TensorShape(f"{name}.scales", (groups, rows), "F16")
        yield TensorShape(f"{name}.g_idx", (columns,), "I32")

    def side_parts(self, rows: int, columns: int, ordered: bool) -> dict[str, int]:
        """Bytes of what the packed image holds beside the codes. ordered: groups lie in storage order."""
        groups = self.groups(columns)
        parts = {"scales": groups * rows * DTYPE_BYTES["F16"]}
        if not self.symmetric:
            parts["zeros"] = bytes_of(groups * rows * self.bits)
        if not ordered:
            parts["order"] = bytes_of(columns * (groups - 1).bit_length())
        return parts

    def side_bits(self, rows: int, columns: int, scale_bits: int, zero_points: bool = True) -> int:
        """Bits of scales and zero points without gaps, of scales that take `scale_bits` on a chip."""
        zero = self.bits if zero_points and not self.symmetric else 0
        return rows * self.groups(columns) * (scale_bits + zero)

    def about(self) -> dict[str, Any]:
        """What a reader of the image must know of it."""
        return asdict(self)

    def describe(self) -> str:
        return f"{self.bits} bits"


@dataclass(frozen=True)
class RealGrid(_Grouped):
    """Integer codes of `bits` bits, and for every `group` weights of a row a scale and a zero point in float16.

    A weight is scale * (code - zero). The zero point is a real number, as HQQ has it, so no code need be exactly 0: not
    for layers with an N:M mask. Codes are packed as in GPTQ's format, but called `weight`: of a method that it does not
    know transformers reads the dense weights, and where there were none would make up random ones with a mere warning.
    At codes of another shape it stops.
    """

    kinds: ClassVar[tuple[str, ...]] = ("weight", "scales", "zeros")
    integer: ClassVar[bool] = False  # an engine for integers has no offset that is a real number
    loaders: ClassVar[tuple[str, ...]] = ()
    unknown: ClassVar[str] = "real zero points"

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[TensorShape]:
        """What a layer (rows, columns) called `name` has in its shard."""
        groups = self.groups(columns)
        yield TensorShape(f"{name}.weight", (columns * self.bits // 32, rows), "I32")
        yield TensorShape(f"{name}.scales", (groups, rows), "F16")
        yield TensorShape(f"{name}.zeros", (groups, rows), "F16")

    def side_parts(self, rows: int, columns: int, ordered: bool = True) -> dict[str, int]:
        """Bytes of what the packed image holds beside the codes."""
        size = self.groups(columns) * rows * DTYPE_BYTES["F16"]
        return {"scales": size, "zeros": size}

    def side_bits(self, rows: int, columns: int, scale_bits: int = 0, zero_points: bool = True) -> int:
        """Bits of the same. A chip's own width of scales does not count: no engine of integers reads them."""
        return 8 * sum(self.side_parts(rows, columns).values())

    def about(self) -> dict[str, Any]:
        """What a reader of the image must know of it."""
        return {**asdict(self), "zero_dtype": "F16"}

    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {"quant_method": REAL_METHOD, "bits": self.bits, "group_size": self.group}

    def describe(self) -> str:
        return f"{self.bits} bits with real zero points"


@dataclass(frozen=True)
class Codebook:
    """4-bit codes of 16 fixed levels, times the largest magnitude (absmax) of every `block` weights in row order.

    With `nested`, the absmax less their mean are 8-bit codes of bitsandbytes' dynamic map, times a float32 absmax of
    every `nested` of them: the double quantisation of QLoRA (Dettmers et al., arXiv 2305.14314, section 3). 0 keeps
    them in float32. One level is exactly 0, so a weight that was removed stays removed. Stored as bitsandbytes does.
    """

    name: str
    levels: tuple[float, ...] = field(repr=False)  # rising
    block: int = 64
    nested: int = 0

    bits: ClassVar[int] = 4
    integer: ClassVar[bool] = False
    state_bytes: ClassVar[int] = 256  # bitsandbytes' note on a layer is JSON; spaces fill it to one length

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(t.name.removeprefix(".") for t in self.tensors("", 1, 1))

    @property
    def loaders(self) -> tuple[str, ...]:
        return ("bitsandbytes",) if self.foreign else ()

    @property
    def unknown(self) -> str:
        return "" if self.foreign else f"the levels of {self.name}"

    @property
    def foreign(self) -> bool:
        """Whether bitsandbytes knows it: its kernels have the levels of nf4 built in and no others."""
        return self.name == "nf4"

    @property
    def zero(self) -> int:
        """The code of the level 0."""
        return self.levels.index(0.0)

    def blocks(self, weights: int) -> int:
        return -(-weights // self.block)

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[TensorShape]:
        """What a layer (rows, columns) called `name` has in its shard."""
        weights = rows * columns
        blocks = self.blocks(weights)
        maker = "bitsandbytes" if self.foreign else "edgepress"
        yield TensorShape(f"{name}.weight", (-(-weights // 2), 1), "U8")
        yield TensorShape(f"{name}.weight.absmax", (blocks,), "U8" if self.nested else "F32")
        yield TensorShape(f"{name}.weight.quant_map", (len(self.levels),), "F32")
        if self.nested:
            yield TensorShape(f"{name}.weight.nested_absmax", (-(-blocks // self.nested),), "F32")
            yield TensorShape(f"{name}.weight.nested_quant_map", (256,), "F32")
        yield TensorShape(f"{name}.weight.quant_state.{maker}__{self.name}", (self.state_bytes,), "U8")

    def side_parts(self, rows: int, columns: int, ordered: bool = True) -> dict[str, int]:
        """Bytes of what the packed image holds beside the codes: absmax; with `nested`, theirs and the mean."""
        blocks = self.blocks(rows * columns)
        if not self.nested:
            return {"absmax": 4 * blocks}
        return {"absmax": blocks, "nested": 4 * (-(-blocks // self.nested) + 1)}

    def side_bits(self, rows: int, columns: int, scale_bits: int = 0, zero_points: bool = True) -> int:
        """Bits of the same. A chip's own width of scales does not count: no engine of integers reads them."""
        return 8 * sum(self.side_parts(rows, columns).values())

    def about(self) -> dict[str, Any]:
        """What a reader of the image must know of it."""
        return {"codebook": self.name, "bits": self.bits, "block": self.block, "nested": self.nested}

    def quantization_config(self, dtype: str, dense: Sequence[str]) -> dict[str, Any]:
        """What config.json says of it. dtype: of the weights, BF16 and so on; dense: modules that stay as they are."""
        if not self.foreign:
            # A name no loader knows, and `weight` of another shape: transformers stops instead of misreading.
            return {"quant_method": CODEBOOK_METHOD, "codebook": self.name, "levels": list(self.levels)}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": bool(self.nested),
            "bnb_4bit_compute_dtype": TORCH_NAMES[dtype],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(dense),
        }

    def describe(self) -> str:
        return self.name


Form = Grid | RealGrid | Codebook

# QLoRA, appendix E: quantiles of the standard normal distribution, scaled to [-1, 1], with an exact zero.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# The thesis on approximate computing, equation 2.26: nf4's negative half, rounded, mirrored, with 0.8682 besides.
_THESIS = (
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0911, 0.1848, 0.2844, 0.3949, 0.5251, 0.6962, 0.8682, 1.0,
)  # fmt: skip

CODEBOOKS = {
    "nf4": Codebook("nf4", _NF4, nested=256),
    # Its equations 3.5 to 3.8 keep one absmax a block and no second quantisation; with float32 for them, equation
    # 2.55 gives the 1,164 MB of its tables for Llama-3.2-1B to the last digit.
    "nf4-thesis": Codebook("nf4-thesis", _THESIS),
}


def bytes_of(bits: int) -> int:
    """Whole bytes that hold so many bits."""
    return -(-bits // 8)
