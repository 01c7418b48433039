"""Where each number of a model lies in the program's `weights.bin`, told from the shape alone. No torch.

`FORMAT.md` beside this file describes the layout for those who read it. What the program cannot run is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from edgepress.checkpoints.config import tied
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.hardware.rv32.families import Layer, faults, layers, norms

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
MAGIC = b"edgepress rv32 3"  # the file's first bytes: no part lies at offset 0, which the tables read as none
_DENSE = {"F32": 4, "F16": 2, "BF16": 2}
ROWS = 4  # of a grid's matrix that lie side by side
_SETS, _TABLE = 256, 8  # the most sets of an N:M pattern, and numbers an input that a table of them may have
_FARTHEST = 12_000  # positions whose angles the program's own sine reduces without losing digits


@dataclass(frozen=True)
class Part:
    """A run of bytes of `weights.bin`."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class CodeForm:
    """How the codes or numbers of a matrix lie in weights.bin: all, or of an N:M pattern those of the kept weights.

    Of the latter each group of the pattern has the number of the set of places that are kept.
    """

    bits: int
    kept: int = 0  # of each `of` weights; 0 of 0: all are stored
    of: int = 0
    dtype: str = ""  # of numbers without a grid

    @property
    def name(self) -> str:
        own = self.dtype or f"Q{self.bits}"
        return f"{own}_{self.kept}_{self.of}" if self.of else own

    @property
    def unit(self) -> int:
        """Columns that lie together: the least whose codes fill whole words; 32 where zeros are left out."""
        return 32 if self.bits == 3 or self.of else 32 // self.bits

    @property
    def sets(self) -> list[tuple[int, ...]]:
        """The places that a group of the pattern may keep, by their number."""
        return list(combinations(range(self.of), self.kept))

    @property
    def set_bits(self) -> int:
        return (math.comb(self.of, self.kept) - 1).bit_length()

    @property
    def index_bytes(self) -> int:
        """Bytes of the sets' numbers in a row's unit."""
        return -(-self.unit // self.of * self.set_bits // 8) if self.of else 0

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes or numbers in a row's unit."""
        return -(-self.unit * self.kept * self.bits // (8 * self.of)) if self.of else self.unit * self.bits // 8

    @property
    def entry(self) -> int:
        """Numbers of a set in the program's table: the kept inputs and their sum, filled up to a power of two."""
        return 1 << self.kept.bit_length()

    @property
    def tabled(self) -> bool:
        """Whether the program makes a table of the inputs that each set keeps, or gathers them one by one."""
        return 0 < math.comb(self.of, self.kept) * self.entry <= _TABLE * self.of

    def prepared(self, columns: int) -> int:
        """Numbers that the program makes of a vector of inputs before it multiplies."""
        if self.of:
            return columns // self.of * math.comb(self.of, self.kept) * self.entry if self.tabled else 0
        return columns if self.bits < 8 else 0

    def nbytes(self, x: LinearShape) -> int:
        """Bytes of a matrix, with the scales and zero points of its grid; its rows are filled up to whole fours."""
        fours, units = -(-x.out_features // ROWS), ROWS * x.in_features // self.unit
        if isinstance(x.grid, Grid):
            sides = 2 * ROWS + (0 if x.grid.symmetric else ROWS)
            return fours * (x.grid.groups(x.in_features) * sides + units * (self.index_bytes + self.code_bytes))
        return fours * units * (self.index_bytes + self.code_bytes) if self.of else x.weights * self.bits // 8


def code_forms(shape: ModelShape, x: LinearShape) -> list[CodeForm]:
    """The forms that a matrix can have; the first stores all codes or numbers."""
    if isinstance(x.grid, Grid):
        forms = [CodeForm(x.grid.bits)]
        group = x.in_features if x.grid.group == -1 else x.grid.group
    else:
        forms, group = [CodeForm(8 * _DENSE[x.dtype], dtype=x.dtype)], x.in_features
    if x.pattern is not None and not is_ordered(shape, x):
        pattern = x.pattern.on(x.in_features, x.out_features)
        n, m = pattern.removed, pattern.of
        if n and 32 % m == 0 and group % 32 == 0 and math.comb(m, n) <= _SETS:
            forms.append(replace(forms[0], kept=m - n, of=m))
    return forms


def code_form(shape: ModelShape, x: LinearShape) -> CodeForm:
    """The smallest form of a matrix, of equals the simplest."""
    return min(code_forms(shape, x), key=lambda form: form.nbytes(x))


def form_facts(shape: ModelShape) -> list[dict[str, Any]]:
    """Of each matrix with an N:M pattern its form, and the bytes of each that it can have."""
    return [
        {
            "name": f"{index}.{layer.name}",
            "pattern": str(layer.shape.pattern),
            "form": code_form(shape, layer.shape).name,
            "bytes": {form.name: form.nbytes(layer.shape) for form in code_forms(shape, layer.shape)},
        }
        for index, block in enumerate(shape.blocks)
        for layer in layers(shape, block)
        if layer.shape.pattern is not None
    ]


def form_notes(shape: ModelShape) -> list[str]:
    """What became of the zeros of N:M patterns, in a line for each pattern and form."""
    sums: dict[tuple[str, str, bool], list[int]] = {}
    for facts in form_facts(shape):
        other = max(facts["bytes"].values()) if len(facts["bytes"]) > 1 else 0
        found = sums.setdefault((facts["pattern"], facts["form"], other > 0), [0, 0, 0])
        found[0] += 1
        found[1] += facts["bytes"][facts["form"]]
        found[2] += other
    notes = []
    for (pattern, form, both), (count, taken, other) in sums.items():
        if "_" in form:
            whole = "codes" if form.startswith("Q") else "numbers"
            why = f"left out of {count} matrices: {taken:,} bytes where all {whole} take {other:,}"
        elif both:
            why = f"stored in {count} matrices: {taken:,} bytes, and {other:,} with them left out"
        else:
            why = f"stored in {count} matrices, {taken:,} bytes: they cannot be left out (FORMAT.md)"
        notes.append(f"zeros of {pattern} are {why}")
    return notes


class Layout:
    """The parts of `weights.bin` in their order, each at a multiple of four bytes.

    pieces: bytes of all tokens' texts together.
    """

    def __init__(self, shape: ModelShape, pieces: int) -> None:
        self.parts: dict[str, Part] = {}
        end = len(MAGIC)
        for name, nbytes in _parts(shape, pieces):
            self.parts[name] = Part(name, end, nbytes)
            end += -(-nbytes // 4) * 4
        self.nbytes = end

    def offset(self, name: str) -> int:
        """Where a part begins; 0 where the model has none of this name."""
        return self.parts[name].offset if name in self.parts else 0

    def joined(self, contents: Mapping[str, bytes]) -> bytes:
        """The file from the bytes of each part. A part of another size than planned is a bug: RuntimeError."""
        if contents.keys() != self.parts.keys():
            raise RuntimeError(f"parts other than planned: {sorted(contents.keys() ^ self.parts.keys())}")
        file = bytearray(MAGIC)
        for name, part in self.parts.items():
            if len(contents[name]) != part.nbytes or len(file) != part.offset:
                raise RuntimeError(f"{name} has {len(contents[name])} bytes at {len(file)}, planned were {part}")
            file += contents[name] + bytes(-part.nbytes % 4)
        return bytes(file)


def _parts(shape: ModelShape, pieces: int) -> Iterator[tuple[str, int]]:
    for name in matrices(shape):
        rows, columns = shape.vocabulary, shape.hidden_size
        if shape.embedding_bits is None:
            yield f"{name}.codes", rows * columns * _DENSE[outer_dtype(shape, name)]
        else:
            yield f"{name}.codes", rows * (columns * shape.embedding_bits // 8)
            yield f"{name}.scales", rows * 2
            yield f"{name}.minimum", rows * 2
    yield FINAL_NORM, 4 * shape.hidden_size
    for index, block in enumerate(shape.blocks):
        for kind, norm in norms(shape, block).items():
            yield f"{index}.{kind}", 4 * norm.elements
        for layer in layers(shape, block):
            for kind, nbytes in _linear_parts(shape, layer.shape):
                if kind not in shared(layer):
                    yield f"{index}.{layer.name}.{kind}", nbytes
            if is_ordered(shape, layer.shape) and not layer.first:
                yield f"{index}.{layer.name}.order", 2 * layer.shape.in_features
    yield "piece_starts", 4 * (shape.vocabulary + 1)
    yield "pieces", pieces


def _linear_parts(shape: ModelShape, x: LinearShape) -> Iterator[tuple[str, int]]:
    yield "codes", code_form(shape, x).nbytes(x)
    if x.bias:
        yield "bias", 4 * x.out_features
    if x.adapter_rank:
        size = 1 if x.adapter_packed else _DENSE[x.adapter_dtype]
        yield "a", size * x.adapter_rank * x.in_features
        yield "b", size * x.adapter_rank * x.out_features
        yield "rank_scales", 4 * x.adapter_rank


def shared(layer: Layer) -> tuple[str, ...]:
    """The parts that a layer has from another one's: all rows of a fused layer multiply one adapter's A x."""
    return ("a", "rank_scales", "order") if layer.first else ()


def is_ordered(shape: ModelShape, x: LinearShape) -> bool:
    """Whether a layer's groups may lie out of storage order (GPTQ's desc_act), so that its inputs are rearranged."""
    stated = shape.config.get("quantization_config") or {}
    return isinstance(x.grid, Grid) and bool(stated.get("desc_act", False))


def most_ordered(shape: ModelShape) -> int:
    """Inputs of the widest layer that has them rearranged; 0 without any."""
    return max(x.in_features if is_ordered(shape, x) else 0 for block in shape.blocks for x in block.linears)


def matrices(shape: ModelShape) -> tuple[str, ...]:
    """The matrices outside the blocks that the program holds: the embedding, and the head unless that is the same."""
    return (EMBEDDING,) if tied(shape.config) else (EMBEDDING, HEAD)


def outer_dtype(shape: ModelShape, name: str) -> str:
    """The precision of a matrix outside the blocks."""
    return next(t.dtype for t in shape.outer if t.name == f"{name}.weight")


# --- what cannot be run -----------------------------------------------------------------------------------------------


def require_runnable(shape: ModelShape, context: int) -> None:
    """Raise PlanError that names everything the program cannot do for this model at this context."""
    faults = [*_family_faults(shape, context)] or [*_weight_faults(shape)]
    if faults:
        head = f"this {shape.family} model cannot be exported to rv32:"
        raise PlanError("\n".join([head, *(f"  - {fault}" for fault in faults)]))


def _family_faults(shape: ModelShape, context: int) -> Iterator[str]:
    if not 1 <= context <= shape.positions:
        yield f"a context of {context} tokens: the model has positions for 1 to {shape.positions}"
    if context > _FARTHEST:
        yield f"a context of {context} tokens: the program's angles are exact to {_FARTHEST}"
    yield from faults(shape, context)
    if shape.activation_bits < 16:
        yield f"inputs of {shape.activation_bits} bits: the program computes in float32"


def _weight_faults(shape: ModelShape) -> Iterator[str]:
    wanted = {f"{name}.weight" for name in matrices(shape)} | {f"{FINAL_NORM}.weight"}
    # A head that is stored besides the embedding it is tied to is the same matrix, which opening it has proved.
    names = {t.name for t in shape.outer} - ({f"{HEAD}.weight"} if tied(shape.config) else set())
    if names != wanted:
        yield f"tensors outside the blocks: {', '.join(sorted(names ^ wanted))}"
    found: dict[str, None] = {}
    for block in shape.blocks:
        try:
            own = norms(shape, block)
        except PlanError as error:  # a block that its family has no order of computing for
            found[str(error)] = None
            continue
        odd = {t.name for t in block.others} - {t.name for t in own.values()}
        if odd or own.keys() != norms(shape, shape.blocks[0]).keys():
            found[f"blocks with {', '.join(sorted(odd)) or 'unlike norms'}"] = None
            continue
        for x in block.linears:
            found |= dict.fromkeys(_linear_faults(x))
            if is_ordered(shape, x) and x.in_features > 2**16:
                found[f"the order of {x.in_features} inputs (desc_act): {2**16} can be told apart"] = None
    yield from found
    if shape.embedding_bits not in (None, 4, 8):
        yield f"an embedding of {shape.embedding_bits} bits: 8 and 4 can be read, or 16 and 32 without codes"
    if shape.embedding_bits == 4 and shape.hidden_size % 2:
        yield f"rows of {shape.hidden_size} 4-bit codes: they must fill whole bytes"


def _linear_faults(x: LinearShape) -> Iterator[str]:
    if x.adapter_vector:
        yield f"the adapter's vectors ({x.adapter_vector}): only low-rank adapters can be run beside the weights"
    if x.grid is None:
        if x.dtype not in _DENSE:
            yield f"weights in {x.dtype}: {', '.join(_DENSE)} can be read"
    elif not isinstance(x.grid, Grid):
        yield f"weights in {x.grid.describe()}: quantise to an integer grid instead (--quant gptq4)"
    else:
        group = x.in_features if x.grid.group == -1 else x.grid.group
        unit = CodeForm(x.grid.bits).unit
        if x.in_features % group or group % unit:
            yield (
                f"groups of {group} in rows of {x.in_features} {x.grid.bits}-bit codes: a row must be whole groups, "
                f"and these multiples of {unit}"
            )
