"""The forms in which a quantised layer is stored: an integer grid, a grid with real zero points, a codebook.

Whoever plans, counts bytes, reads, writes or packs a layer asks its `Form`, never which form it is. No torch at the
top: the tensors are computed in `packing.py` and `codebooks.py`. `config.FORMS` lists the forms.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
WORD = 32  # bits that GPTQ's files pack codes into


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
class Layer:
    """A quantised layer that was found among the tensors of a file."""

    form: Form
    rows: int
    columns: int
    dtype: str = ""  # of the weights, where the file tells: BF16 and so on


# What the packed image holds beside the codes: the shape of each part, and its dtype or the bits of its whole numbers.
Sides = dict[str, tuple[tuple[int, ...], str | int]]


class Form(ABC):
    """How the layers of a model are stored. Below, a layer has `rows` output and `columns` input features.

    A form also has a verb `write`, which makes the stored tensors of what its quantisers solve for.
    """

    bits: int  # of a code
    group: int  # weights of a row that share a scale: -1 for the whole row, 0 where that is not how scales lie
    integer = False  # whether an engine for integers can multiply the codes as they are
    note = ""  # how the name of a layer's note begins, which tells its sides and more; empty: the tensors tell

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the middle code everywhere."""
        return False

    @property
    def exact_zero(self) -> bool:
        """Whether a weight can be exactly 0, so that an N:M mask can be kept."""
        return True

    @property
    def marks_zeros(self) -> bool:
        """Whether a removed weight has a mark in place of a code, so that a packed image must have the index."""
        return False

    @property
    @abstractmethod
    def kinds(self) -> tuple[str, ...]:
        """Last parts of the names of a layer's tensors, the codes' first."""

    @property
    def loaders(self) -> tuple[str, ...]:
        """The packages with which transformers loads the folder; none where no library knows the form."""
        return ()

    @property
    def unknown(self) -> str:
        """What no library knows of it, where there are no loaders."""
        return ""

    @property
    def on_cores(self) -> tuple[str, str]:
        """Where `integer` is False: what a chip's note calls the form, and what the codes are and the cores do."""
        return self.describe(), "levels, not for integers{instead}. The cores decode each one"

    @abstractmethod
    def describe(self) -> str:
        """The form in a few words."""

    def scales(self) -> str:
        """How the scales lie, in words."""
        return "one scale a row" if self.group == -1 else f"groups of {self.group}"

    def warnings(self, widths: Iterable[int]) -> Iterator[str]:
        """What is wrong with other libraries that load layers of these input widths."""
        return iter(())

    # --- planning and counting ---------------------------------------------------------------------------------

    def holds(self, rows: int, columns: int) -> bool:
        """Whether a layer of these sides can be stored so."""
        return True

    def fitted(self, widths: set[int]) -> Form:
        """The form for a model whose layers have these input widths: with the largest group that divides all."""
        return self

    def suited(self, rows: int, columns: int, masked: bool) -> Form:
        """The form for one layer, of those that `holds` lets in; masked: it has a pattern to keep."""
        return self

    def by_row(self) -> Form:
        """The form on a chip that has one scale for each row."""
        return self

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return 1

    @abstractmethod
    def tensors(self, name: str, rows: int, columns: int) -> Iterator[TensorShape]:
        """What a layer called `name` has in its shard."""

    @abstractmethod
    def sides(self, rows: int, columns: int, ordered: bool = True) -> Sides:
        """What the packed image holds beside the codes. ordered: groups lie in storage order."""

    def side_parts(self, rows: int, columns: int, ordered: bool = True) -> dict[str, int]:
        """Bytes of `sides`."""
        sides = self.sides(rows, columns, ordered).items()
        return {k: bytes_of(math.prod(n) * (how if isinstance(how, int) else DTYPE_BITS[how])) for k, (n, how) in sides}

    def side_bits(self, rows: int, columns: int, scale_bits: int = 0, zero_points: bool = True) -> int:
        """Bits of `sides` without gaps, of scales that take `scale_bits` on a chip whose engine reads the codes."""
        return 8 * sum(self.side_parts(rows, columns).values())

    # --- the documents that tell of it -------------------------------------------------------------------------

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What a reader of the image must know of it, `bits` included."""

    @classmethod
    @abstractmethod
    def from_about(cls, about: Mapping[str, Any]) -> Form | None:
        """The form that `about` told of; None where that is another."""

    @abstractmethod
    def config(
        self, dtype: str, dense: Sequence[str] = (), heads: Sequence[str] = (), damping: float | None = None
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        dtype: of the weights, BF16 and so on; dense: layers of blocks that stay as they are; heads: matrices outside
        them; damping: of GPTQ's solver, where that found the codes.
        """

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Form | None:
        """The form that a `quantization_config` states; None where that is another.

        Raises CheckpointError naming the field whose meaning would be lost.
        """

    def own(self, name: str, config: Mapping[str, Any]) -> Form:
        """The form of the layer of this full name, where `quantization_config` may state another for it."""
        return self

    def layer(self, name: str, members: Mapping[str, TensorShape]) -> Layer | None:
        """The layer called `name` if these tensors hold one in this form, told by their shapes."""
        return None

    def noted(self, note: bytes) -> Layer:
        """The layer that a note tells of. Raises ValueError, KeyError or TypeError where it makes no sense."""
        raise ValueError("this form has no notes")

    # --- the tensors of one layer, by their `kinds` --------------------------------------------------------------

    @abstractmethod
    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """The dense weights (out, in) in float32 that the stored tensors stand for."""

    @abstractmethod
    def split(
        self, name: str, stored: Mapping[str, Tensor], rows: int, columns: int, ordered: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The codes (out, in), and what lies beside them: at least what `sides` lists.

        Raises CheckpointError, which names the layer, where an image could not give the stored tensors back.
        """

    @abstractmethod
    def join(self, codes: Tensor, sides: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The stored tensors, from codes (out, in) uint8 and `sides`; dtype: of the weights. Undoes `split`."""

    def zero_codes(self, sides: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """The code (out, in) of a weight that is exactly 0."""
        raise NotImplementedError(f"{self.describe()}: no code stands for exactly 0")


@dataclass(frozen=True)
class _Grouped(Form):
    """Codes with a scale for every `group` weights of a row; -1 means the whole row."""

    bits: int
    group: int

    def holds(self, rows: int, columns: int) -> bool:
        """GPTQModel's kernels take layers whose sides are both multiples of 32."""
        return rows % WORD == 0 and columns % WORD == 0

    def fitted(self, widths: set[int]) -> _Grouped:
        return replace(self, group=largest_group(widths, self.group))

    def groups(self, columns: int) -> int:
        return 1 if self.group == -1 else -(-columns // self.group)


@dataclass(frozen=True)
class Grid(_Grouped):
    """Integer codes of `bits` bits with one scale and zero point for every `group` weights of a row.

    group -1 means the whole row. Stored in GPTQ's format.
    """

    symmetric: bool = False

    kinds = ("qweight", "qzeros", "scales", "g_idx")
    integer = True
    loaders = ("gptqmodel", "optimum")

    def describe(self) -> str:
        return f"{self.bits} bits"

    def by_row(self) -> Grid:
        return replace(self, group=-1)

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[TensorShape]:
        groups, bits = self.groups(columns), self.bits
        yield TensorShape(f"{name}.qweight", (columns * bits // WORD, rows), "I32")
        yield TensorShape(f"{name}.qzeros", (groups, rows * bits // WORD), "I32")
        yield TensorShape(f"{name}.scales", (groups, rows), "F16")
        yield TensorShape(f"{name}.g_idx", (columns,), "I32")

    def sides(self, rows: int, columns: int, ordered: bool = True) -> Sides:
        groups = self.groups(columns)
        sides: Sides = {"scales": ((groups, rows), "F16")}
        if not self.symmetric:
            sides["zeros"] = (groups, rows), self.bits  # less one, as in the file
        if not ordered:
            sides["order"] = (columns,), (groups - 1).bit_length()
        return sides

    def side_bits(self, rows: int, columns: int, scale_bits: int = 0, zero_points: bool = True) -> int:
        zero = self.bits if zero_points and not self.symmetric else 0
        return rows * self.groups(columns) * (scale_bits + zero)

    def about(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_about(cls, about: Mapping[str, Any]) -> Grid | None:
        return cls(about["bits"], about["group"], about["symmetric"]) if "symmetric" in about else None

    def config(
        self, dtype: str, dense: Sequence[str] = (), heads: Sequence[str] = (), damping: float | None = None
    ) -> dict[str, Any]:
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "sym": self.symmetric,
            "desc_act": False,  # groups are static and in storage order, whatever order solved them
            "static_groups": True,
            "lm_head": False,
            **({} if damping is None else {"damp_percent": damping}),
            "pack_dtype": "int32",
            # GPTQModel reads asymmetric files only from writers that store zero points the way it does
            "meta": {"quantizer": ["edgepress:" + version("edgepress"), "gptqmodel:" + _format_version()]},
        }
        if dense:
            config["dynamic"] = {f"-:.*{name.replace('.', chr(92) + '.')}$": {} for name in dense}
            config["modules_in_block_to_quantize"] = None
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Grid | None:
        if config.get("quant_method") != "gptq":
            return None
        _require_readable(config)
        return cls(_stated_bits(config), _stated_group(config), bool(config.get("sym", False)))

    def own(self, name: str, config: Mapping[str, Any]) -> Grid:
        for pattern, settings in (config.get("dynamic") or {}).items():
            if settings and re.match(pattern.removeprefix("+:"), name):  # the first that fits, as GPTQModel reads it
                return replace(self, bits=_stated_bits({"bits": self.bits} | settings),
                               group=_stated_group({"group_size": self.group} | settings))  # fmt: skip
        return self

    def layer(self, name: str, members: Mapping[str, TensorShape]) -> Layer | None:
        codes, order = members.get(f"{name}.qweight"), members.get(f"{name}.g_idx")
        if codes is None:
            return None
        words, rows = codes.shape
        return Layer(self, rows, words * WORD // self.bits if order is None else order.elements)

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        from edgepress.checkpoints.packing import dequantise

        return dequantise(stored, self.bits)

    def write(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """codes (out, in); scales and zeros (out, groups), zeros from 1 to 2^bits - 1."""
        from edgepress.checkpoints.packing import pack_linear

        return pack_linear(codes, scales, zeros, self.group, self.bits)

    def split(
        self, name: str, stored: Mapping[str, Tensor], rows: int, columns: int, ordered: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        from edgepress.checkpoints.packing import group_of, unpack_linear

        codes, _, zeros = unpack_linear(stored, self.bits)
        if self.symmetric and bool((zeros != 2 ** (self.bits - 1)).any()):
            raise CheckpointError(
                f"{name} is said to have a symmetric grid, but its zero points are not all the middle code"
            )
        order = stored["g_idx"]
        if ordered and not order.equal(group_of(columns, self.group)):
            raise CheckpointError(f"{name} has groups out of storage order, though config.json says desc_act is false")
        return codes, {"scales": stored["scales"], "zeros": zeros.T - 1, "order": order}

    def join(self, codes: Tensor, sides: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        scales, (zeros, order) = sides["scales"], self._zeros_and_order(sides, codes.shape[1])
        stored = self.write(codes, scales.T.float(), zeros.T)
        return stored | {"scales": scales, "g_idx": order}  # scales bit for bit, whatever they hold

    def zero_codes(self, sides: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        zeros, order = self._zeros_and_order(sides, columns)
        return zeros[order].T

    def _zeros_and_order(self, sides: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Tensor]:
        """Zero points (groups, out), and the group of each column (in,)."""
        from edgepress.checkpoints.packing import group_of

        middle = sides["scales"].new_full(sides["scales"].shape, 2 ** (self.bits - 1)).int()
        zeros = sides["zeros"] + 1 if "zeros" in sides else middle
        return zeros, sides["order"] if "order" in sides else group_of(columns, self.group)


@dataclass(frozen=True)
class RealGrid(_Grouped):
    """Integer codes of `bits` bits, and for every `group` weights of a row a scale and a zero point in float16.

    A weight is scale * (code - zero). The zero point is a real number, as HQQ has it, so no code need be exactly 0: not
    for layers with an N:M mask. Codes are packed as in GPTQ's format, but called `weight`: of a method that it does not
    know transformers reads the dense weights, and where there were none would make up random ones with a mere warning.
    At codes of another shape it stops.
    """

    kinds = ("weight", "scales", "zeros")
    symmetric = False
    exact_zero = False
    unknown = "real zero points"
    on_cores = (
        "Real zero points",
        "integers plus a fraction that differs from group to group{instead}. The cores compute with them",
    )

    def describe(self) -> str:
        return f"{self.bits} bits with real zero points"

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[TensorShape]:
        groups = self.groups(columns)
        yield TensorShape(f"{name}.weight", (columns * self.bits // WORD, rows), "I32")
        yield TensorShape(f"{name}.scales", (groups, rows), "F16")
        yield TensorShape(f"{name}.zeros", (groups, rows), "F16")

    def sides(self, rows: int, columns: int, ordered: bool = True) -> Sides:
        groups = self.groups(columns)
        return {"scales": ((groups, rows), "F16"), "zeros": ((groups, rows), "F16")}

    def about(self) -> dict[str, Any]:
        return {**asdict(self), "zero_dtype": "F16"}

    @classmethod
    def from_about(cls, about: Mapping[str, Any]) -> RealGrid | None:
        return cls(about["bits"], about["group"]) if "zero_dtype" in about else None

    def config(
        self, dtype: str, dense: Sequence[str] = (), heads: Sequence[str] = (), damping: float | None = None
    ) -> dict[str, Any]:
        return {"quant_method": REAL_METHOD, "bits": self.bits, "group_size": self.group}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RealGrid | None:
        return cls(_stated_bits(config), _stated_group(config)) if config.get("quant_method") == REAL_METHOD else None

    def layer(self, name: str, members: Mapping[str, TensorShape]) -> Layer | None:
        codes = members.get(f"{name}.weight")
        if codes is None or f"{name}.zeros" not in members:
            return None
        words, rows = codes.shape
        return Layer(self, rows, words * WORD // self.bits)

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        from edgepress.checkpoints.packing import dequantise_real, unpack_real

        return dequantise_real(*unpack_real(stored, self.bits))

    def write(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """codes (out, in); scales and zeros (out, groups)."""
        from edgepress.checkpoints.packing import pack_real

        return pack_real(codes, scales, zeros, self.bits)

    def split(
        self, name: str, stored: Mapping[str, Tensor], rows: int, columns: int, ordered: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        from edgepress.checkpoints.packing import unpack_real

        return unpack_real(stored, self.bits)[0], {kind: stored[kind] for kind in ("scales", "zeros")}

    def join(self, codes: Tensor, sides: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return self.write(codes, sides["scales"].T, sides["zeros"].T)


@dataclass(frozen=True)
class Codebook(Form):
    """4-bit codes of 16 fixed levels, times the largest magnitude (absmax) of every `block` weights in row order.

    With `nested`, the absmax less their mean are 8-bit codes of bitsandbytes' dynamic map, times a float32 absmax of
    every `nested` of them: the double quantisation of QLoRA (Dettmers et al., arXiv 2305.14314, section 3). 0 keeps
    them in float32. One level is exactly 0, so a weight that was removed stays removed. Stored as bitsandbytes does.
    """

    name: str
    levels: tuple[float, ...] = field(repr=False)  # rising
    block: int = 64
    nested: int = 0

    bits = 4
    group = 0  # blocks run on from row to row
    symmetric = False
    note = "weight.quant_state."
    state_bytes = 256  # bitsandbytes' note on a layer is JSON; spaces fill it to one length

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
    def on_cores(self) -> tuple[str, str]:
        return self.name, "levels of a codebook, not for integers{instead}. The cores look each one up"

    @property
    def zero(self) -> int:
        """The code of the level 0."""
        return self.levels.index(0.0)

    def describe(self) -> str:
        return self.name

    def scales(self) -> str:
        return f"blocks of {self.block}"

    def warnings(self, widths: Iterable[int]) -> Iterator[str]:
        misread = [str(width) for width in sorted(widths) if width % 16 == 0 and width % self.block]
        if self.foreign and misread:
            yield (
                f"bitsandbytes 0.50 misreads rows of {', '.join(misread)} on a CPU: a multiple of 16 that is none of "
                f"{self.block}. What it computes from this folder there will be wrong; this project reads it right"
            )

    def blocks(self, weights: int) -> int:
        return -(-weights // self.block)

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[TensorShape]:
        weights = rows * columns
        blocks = self.blocks(weights)
        maker = "bitsandbytes" if self.foreign else "edgepress"
        yield TensorShape(f"{name}.weight", (-(-weights // 2), 1), "U8")
        yield TensorShape(f"{name}.weight.absmax", (blocks,), "U8" if self.nested else "F32")
        yield TensorShape(f"{name}.weight.quant_map", (len(self.levels),), "F32")
        if self.nested:
            yield TensorShape(f"{name}.weight.nested_absmax", (-(-blocks // self.nested),), "F32")
            yield TensorShape(f"{name}.weight.nested_quant_map", (256,), "F32")
        yield TensorShape(f"{name}.{self.note}{maker}__{self.name}", (self.state_bytes,), "U8")

    def sides(self, rows: int, columns: int, ordered: bool = True) -> Sides:
        """absmax; with `nested`, theirs and the mean."""
        blocks = self.blocks(rows * columns)
        if not self.nested:
            return {"absmax": ((blocks,), "F32")}
        return {"absmax": ((blocks,), "U8"), "nested": ((-(-blocks // self.nested) + 1,), "F32")}

    def about(self) -> dict[str, Any]:
        return {"codebook": self.name, "bits": self.bits, "block": self.block, "nested": self.nested}

    @classmethod
    def from_about(cls, about: Mapping[str, Any]) -> Codebook | None:
        if "codebook" not in about:
            return None
        return replace(CODEBOOKS[about["codebook"]], block=about["block"], nested=about["nested"])

    def config(
        self, dtype: str, dense: Sequence[str] = (), heads: Sequence[str] = (), damping: float | None = None
    ) -> dict[str, Any]:
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
            "llm_int8_skip_modules": sorted({"lm_head", *heads}),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Codebook | None:
        method, name = config.get("quant_method"), config.get("codebook")
        if method == CODEBOOK_METHOD:
            return CODEBOOKS.get(name) if isinstance(name, str) else None
        four = config.get("load_in_4bit") and not config.get("load_in_8bit")
        known = method == "bitsandbytes" and four and config.get("bnb_4bit_quant_type") == "nf4"
        return CODEBOOKS["nf4"] if known else None

    def noted(self, note: bytes) -> Layer:
        told = json.loads(note)
        book = CODEBOOKS[told["quant_type"]]
        book = replace(book, block=int(told["blocksize"]), nested=int(told.get("nested_blocksize", 0)))
        rows, columns = map(int, told["shape"])
        return Layer(book, rows, columns, _DTYPES[told["dtype"]])

    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        from edgepress.checkpoints.packing import decode

        return decode(stored, self, rows, columns)

    def write(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """weight (out, in), each stored as the level nearest to it; dtype: what the weights are to be read as."""
        from edgepress.checkpoints.packing import encode

        return encode(weight, self, dtype)

    def split(
        self, name: str, stored: Mapping[str, Tensor], rows: int, columns: int, ordered: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        from edgepress.checkpoints.packing import codes_of, nested_scales, require_known

        require_known(name, stored, self)
        sides = {"absmax": stored["weight.absmax"]} | ({"nested": nested_scales(stored)} if self.nested else {})
        return codes_of(stored, rows, columns), sides

    def join(self, codes: Tensor, sides: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        from edgepress.checkpoints.packing import assemble

        scales, offset = {"weight.absmax": sides["absmax"]}, 0.0
        if self.nested:
            scales["weight.nested_absmax"], offset = sides["nested"][:-1], float(sides["nested"][-1])
        return assemble(codes, scales, offset, self, dtype)

    def zero_codes(self, sides: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return sides["absmax"].new_full((rows, columns), self.zero)


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


_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}


def _format_version() -> str:
    """Of the GPTQModel whose files ours are like: the one that is installed, else the oldest that reads them."""
    try:
        return version("gptqmodel")
    except PackageNotFoundError:
        return "7.7.0"


def bytes_of(bits: int) -> int:
    """Whole bytes that hold so many bits."""
    return -(-bits // 8)


def largest_group(widths: set[int], wanted: int) -> int:
    """Largest power-of-two group of at most `wanted` that divides every width (-1 stays -1).

    GPTQ's files carry one group size for the whole model: SmolLM2's widths 576 and 1536 take 64, not 128.
    """
    if wanted == -1:
        return -1
    group = 1 << (wanted.bit_length() - 1)
    while any(width % group for width in widths):
        group //= 2
    return group


# --- what a configuration states of codes in GPTQ's words ------------------------------------------------------------

# Fields of `quantization_config` for GPTQ that tell how the codes were found, or how to run them: not what they stand
# for. Which layers are quantised and which group a column belongs to is read from the files.
_HARMLESS = {
    "quant_method", "method", "bits", "group_size", "sym", "desc_act", "static_groups", "damp_percent",
    "damp_auto_increment", "true_sequential", "act_group_aware", "tokenizer", "dataset", "meta", "backend",
    "model_seqlen", "model_name_or_path", "model_file_base_name", "block_name_to_quantize", "batch_size",
    "module_name_preceding_first_block", "pad_token_id", "max_input_length", "cache_block_outputs", "use_exllama",
    "use_cuda_fp16", "exllama_config", "disable_exllama", "is_marlin_format", "modules_in_block_to_quantize",
    "modules_to_not_convert", "pack_impl", "device", "telemetry", "offload_to_disk", "offload_to_disk_path", "mse",
    "fallback", "version", "quantizer", "parallel_packing", "gc_mode", "compute_device_filter", "hessian", "v2",
    "v2_alpha", "v2_memory_device", "failsafe", "gptaq", "mock_quantization", "calibration_data_device",
    "wait_for_submodule_finalizers", "auto_forward_data_parallel", "dense_vram_strategy",
    "dense_vram_strategy_devices", "moe_vram_strategy", "moe_vram_strategy_devices", "moe",
}  # fmt: skip
BEFORE = "Give the checkpoint from before quantisation"


def _require_readable(quantization: Mapping[str, Any]) -> None:
    """Raise CheckpointError at a field of GPTQ's format that changes what the codes stand for."""
    for name in ("checkpoint_format", "format"):
        if (stated := str(quantization.get(name) or "gptq")) != "gptq":
            why = " (it stores zero points as they are, version 1 one less)" if stated == "gptq_v2" else ""
            raise CheckpointError(
                f"the weights are stored in {name} '{stated}'{why}; GPTQ's version 1, 'gptq', can be read. Save the "
                "model again in that format, or give the checkpoint from before quantisation"
            )
    if (word := str(quantization.get("pack_dtype") or "int32").removeprefix("torch.")) != "int32":
        raise CheckpointError(f"the codes are packed in words of {word} (pack_dtype); int32 can be read. {BEFORE}")
    if quantization.get("lm_head"):
        raise CheckpointError(f"the head is quantised as well (lm_head), which cannot be read. {BEFORE}")
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(
        not isinstance(own, Mapping) or own.keys() - {"bits", "group_size"} for own in dynamic.values()
    ):
        raise CheckpointError(
            f"single layers have settings of their own (dynamic: {json.dumps(dynamic)[:80]}), of which bits and "
            f"group_size can be read, and layers that are left out. {BEFORE}"
        )
    unknown = sorted(
        key
        for key, value in quantization.items()
        if key not in _HARMLESS | {"checkpoint_format", "format", "pack_dtype", "lm_head", "dynamic"} and value
    )
    if unknown:
        raise CheckpointError(
            f"quantization_config has {', '.join(unknown)}, and what that changes is not known here. {BEFORE}"
        )


def _stated_bits(quantization: Mapping[str, Any]) -> int:
    bits = quantization.get("bits")
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in (2, 3, 4, 8):
        raise CheckpointError(
            f"quantization_config says bits {bits!r}; codes of 2, 3, 4 or 8 bits can be read. {BEFORE}"
        )
    return bits


def _stated_group(quantization: Mapping[str, Any]) -> int:
    group = quantization.get("group_size")
    if isinstance(group, bool) or not isinstance(group, int) or (group < 1 and group != -1):
        raise CheckpointError(
            f"quantization_config says group_size {group!r}; a positive whole number or -1, the whole row, can be "
            f"read. {BEFORE}"
        )
    return group
