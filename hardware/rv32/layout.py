"""Where each number of a model lies in the program's `weights.bin`, told from the shape alone. No torch.

`FORMAT.md` beside this file describes the layout for those who read it. What the program cannot run is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgepress.checkpoints.config import tied
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.hardware.rv32.families import Layer, faults, layers, norms

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
MAGIC = b"edgepress rv32 2"  # the file's first bytes: no part lies at offset 0, which the tables read as none
_DENSE = {"F32": 4, "F16": 2, "BF16": 2}
ROWS = 4  # of a grid's matrix that lie side by side
_FARTHEST = 12_000  # positions whose angles the program's own sine reduces without losing digits


@dataclass(frozen=True)
class Part:
    """A run of bytes of `weights.bin`."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class CodeForm:
    """How the codes of a grid's matrix lie in weights.bin."""

    bits: int

    @property
    def name(self) -> str:
        return f"Q{self.bits}"

    @property
    def unit(self) -> int:
        """The least columns whose codes fill whole words."""
        return 32 if self.bits == 3 else 32 // self.bits

    def nbytes(self, x: LinearShape, grid: Grid) -> int:
        """Bytes of a matrix with its scales and zero points; its rows are filled up to whole fours."""
        fours, groups = -(-x.out_features // ROWS), grid.groups(x.in_features)
        sides = 2 * ROWS + (0 if grid.symmetric else ROWS)
        return fours * (groups * sides + ROWS * x.in_features * self.bits // 8)


def code_form(grid: Grid) -> CodeForm:
    return CodeForm(grid.bits)


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
            for kind, nbytes in _linear_parts(layer.shape):
                if kind not in shared(layer):
                    yield f"{index}.{layer.name}.{kind}", nbytes
            if is_ordered(shape, layer.shape) and not layer.first:
                yield f"{index}.{layer.name}.order", 2 * layer.shape.in_features
    yield "piece_starts", 4 * (shape.vocabulary + 1)
    yield "pieces", pieces


def _linear_parts(x: LinearShape) -> Iterator[tuple[str, int]]:
    if isinstance(x.grid, Grid):
        yield "codes", code_form(x.grid).nbytes(x, x.grid)
    else:
        yield "codes", x.weights * _DENSE[x.dtype]
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
        what = "real zero points" if x.grid.exact_zero is False else f"the codebook {x.grid.describe()}"
        yield f"{what}: quantise to an integer grid instead (--quant gptq4)"
    else:
        group = x.in_features if x.grid.group == -1 else x.grid.group
        unit = code_form(x.grid).unit
        if x.in_features % group or group % unit:
            yield (
                f"groups of {group} in rows of {x.in_features} {x.grid.bits}-bit codes: a row must be whole groups, "
                f"and these multiples of {unit}"
            )
