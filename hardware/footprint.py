"""Bytes a model needs on a chip: weights, KV cache, activations, and the working set of each layer.

Arithmetic on a ModelShape; no weights are read. All sizes are in bytes, all widths in bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from checkpoints.packed_sizes import bytes_of, is_head, packed_bits, value_bits
from checkpoints.shape import DTYPE_BYTES, LinearShape, ModelShape

SCALE_BITS = 16  # scales, and the row minimum of a packed embedding, are float16 in the checkpoints


def scale_bits(linear: LinearShape) -> int:
    """Bits of scales and zero points of one row; 0 where there is no grid."""
    if linear.grid is None:
        return 0
    return linear.grid.groups(linear.in_features) * (SCALE_BITS + (0 if linear.grid.symmetric else linear.grid.bits))


def row_extra_bits(linear: LinearShape) -> int:
    """Bits of one row beside its weights: scales, zero points and bias."""
    return scale_bits(linear) + linear.bias * DTYPE_BYTES[linear.dtype] * 8


def last_part(name: str) -> str:
    """The part of a dotted name after the last dot."""
    return name.rpartition(".")[2]


# --- weights ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's parameters, codes packed without gaps at their own width.

    A GPTQ file's `g_idx` is left out: groups lie in storage order, so a chip needs no index of them. A
    symmetric grid has no zero points either: they are all the middle code. Scales are float16, as the checkpoint
    stores them; an engine with wider ones (N-EUREKA: 8 or 32 bit) needs them converted.
    """

    block_codes: int
    scales_and_zeros: int
    dense_linears: int
    adapters: int
    embedding: int  # also the head, if the two are tied
    head: int
    norms: int
    biases: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(asdict(self).values())

    def parts(self) -> dict[str, int]:
        """Parts that are not empty, by a readable name."""
        return {name.replace("_", " "): size for name, size in asdict(self).items() if size}


def weight_bytes(shape: ModelShape, *, packed: bool = False) -> WeightBytes:
    """Bytes of each part of the model.

    With `packed`, a layer with an N:M pattern counts its kept values and their index alone (`packed_bits`);
    that is what a kernel which unpacks them would need. Without, zeros take the room of any weight.
    """
    codes = scales = dense = adapters = norms = biases = 0
    for block in shape.blocks:
        for linear in block.linears:
            stored = bytes_of(packed_bits(linear) if packed else linear.weights * value_bits(linear))
            if linear.grid is None:
                dense += stored
            else:
                codes += stored
                scales += bytes_of(linear.out_features * scale_bits(linear))
            biases += linear.bias * linear.out_features * DTYPE_BYTES[linear.dtype]
            adapters += linear.adapter_bytes
        for tensor in block.others:
            if tensor.name.endswith(".bias"):
                biases += tensor.nbytes
            else:
                norms += tensor.nbytes
    embedding = head = 0
    for tensor in shape.outer:
        if len(tensor.shape) == 2:
            base = tensor.name.removesuffix(".weight")
            packed_copy = [t for t in shape.edge_tensors() if t.name.rpartition(".")[0] == base]
            size = sum(t.nbytes for t in packed_copy or [tensor])
            if is_head(tensor.name):
                head += size
            else:
                embedding += size
        elif tensor.name.endswith(".bias"):
            biases += tensor.nbytes
        else:
            norms += tensor.nbytes
    return WeightBytes(codes, scales, dense, adapters, embedding, head, norms, biases)


def slotted_bytes(shape: ModelShape, slot_bits: int, input_block: int) -> int:
    """Bytes of the blocks' quantised linears when every weight of up to `slot_bits` bits takes a full slot.

    N-EUREKA's 1x1 mode: (out, ceil(in / 32), 32 B), pulp-nnx `NeurekaWeight.encode`. Wider codes keep their width.
    """
    total = 0
    for block in shape.blocks:
        for x in block.linears:
            if x.grid is not None:
                padded = -(-x.in_features // input_block) * input_block
                total += bytes_of(x.out_features * padded * max(slot_bits, x.grid.bits))
    return total


# --- KV cache and activations ----------------------------------------------------------------------------------


def kv_cache_bytes(shape: ModelShape, context: int, kv_bits: int) -> int:
    """Keys and values of `context` tokens in every block, without scales.

    For families with a sliding window an upper bound: every block is counted with the full context.
    """
    return bytes_of(2 * len(shape.blocks) * shape.kv_heads * shape.head_dim * context * kv_bits)


@dataclass(frozen=True)
class Operator:
    """One step of a block: the tensors it reads and the tensors it writes, by name."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


# The order in which a block computes. Rotary embedding, softmax, activation, gate x up and residual additions
# work in place: each output element needs one row or one element of its own size. Keys and values leave for
# the KV cache, which is counted apart. Norms on a branch (Gemma, Qwen 3) are in place too. A fused qkv or gate_up
# projection writes the same bytes at once that the separate ones leave behind.
_BLOCK = (
    Operator("input norm", ("residual",), ("normed",)),
    Operator("query", ("normed",), ("q",)),
    Operator("key", ("normed",), ("k",)),
    Operator("value", ("normed",), ("v",)),
    Operator("append to KV cache", ("k", "v"), ()),
    Operator("scores and softmax", ("q",), ("scores",)),
    Operator("weighted values", ("scores",), ("mixed",)),
    Operator("attention output", ("mixed",), ("attended",)),
    Operator("first residual", ("residual", "attended"), ("residual",)),
    Operator("second norm", ("residual",), ("normed2",)),
    Operator("gate", ("normed2",), ("gated",)),
    Operator("up", ("normed2",), ("upped",)),
    Operator("gate x up", ("gated", "upped"), ("gated",)),
    Operator("down", ("gated",), ("mlp",)),
    Operator("second residual", ("residual", "mlp"), ("residual",)),
)
# After the last block, for the one token whose successor is wanted.
_HEAD = (Operator("last norm", ("residual",), ("normed",)), Operator("head", ("normed",), ("logits",)))


@dataclass(frozen=True)
class Peak:
    """The most bytes of activations alive at once, the operator at which, and what is alive there."""

    nbytes: int
    operator: str
    alive: tuple[str, ...]


def activation_peak(shape: ModelShape, tokens: int, context: int, activation_bits: int) -> Peak:
    """Peak of the activations while `tokens` new tokens pass through the model with `context` tokens in view.

    tokens 1 is a step of decoding, tokens = context prefill in one go, anything between a prefill in chunks.
    Scores are held whole, heads x tokens x context, at the width of the other activations.
    """
    hidden, inner = shape.hidden_size, shape.number("intermediate_size")
    attention, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = {"q": attention, "k": kv, "v": kv, "mixed": attention, "gated": inner, "upped": inner}
    sizes = {name: width * tokens for name, width in widths.items()}
    sizes |= dict.fromkeys(("residual", "normed", "attended", "normed2", "mlp"), hidden * tokens)
    sizes["scores"] = shape.heads * tokens * context
    block = peak_alive(_BLOCK, sizes, "residual")
    head = peak_alive(_HEAD, {"residual": hidden * tokens, "normed": hidden, "logits": shape.vocabulary}, "logits")
    elements, operator, alive = max(block, head, key=lambda peak: peak[0])
    return Peak(bytes_of(elements * activation_bits), operator, alive)


def peak_alive(
    operators: Sequence[Operator], sizes: Mapping[str, int], result: str
) -> tuple[int, str, tuple[str, ...]]:
    """Elements alive at the fullest operator, that operator's name, and what is alive there.

    Alive at an operator are its reads, its writes, and every tensor written before (or given at the start)
    that is read later without being written anew first; `result` is read by whoever comes next.
    """
    needed = {result}
    fullest: tuple[int, str, tuple[str, ...]] = (0, "", ())
    for operator in reversed(operators):
        alive = needed | set(operator.reads) | set(operator.writes)
        size = sum(sizes[name] for name in alive)
        if size >= fullest[0]:  # of equals the first in the order of computing
            fullest = (size, operator.name, tuple(sorted(alive, key=lambda name: (-sizes[name], name))))
        needed = (needed - set(operator.writes)) | set(operator.reads)
    return fullest


# --- the working set of one layer ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A matrix as the tiler sees it: a tile is some of its output rows over the full input width."""

    name: str
    out_features: int
    in_features: int
    row_bits: int  # weights of one row with its scales, zero points and bias
    repeats: int = 1  # how many blocks have this very layer

    def working_set(self, rows: int, buffers: int, activation_bits: int) -> dict[str, int]:
        """Bytes by part while a tile of `rows` outputs is computed for one token.

        The input vector stays; weights (with scales, zero points, bias) and outputs stream, so both have
        `buffers` tiles: Deeploy's DBTiler, sum of size x buffers <= level size.
        """
        rows = min(rows, self.out_features)
        return {
            "input vector": bytes_of(self.in_features * activation_bits),
            "weight tiles": buffers * bytes_of(rows * self.row_bits),
            "output tiles": buffers * bytes_of(rows * activation_bits),
        }

    def largest_tile(self, working_bytes: int, step: int, buffers: int, activation_bits: int) -> int:
        """The most output rows, a multiple of `step` or the whole layer, that fit; 0 if not even `step` do."""
        most = 0
        for rows in range(step, self.out_features + step, step):
            if sum(self.working_set(rows, buffers, activation_bits).values()) > working_bytes:
                break
            most = min(rows, self.out_features)
        return most


def layers(shape: ModelShape) -> list[Layer]:
    """Every distinct matrix product of the model: the blocks' linears, their adapters, the head."""
    counted: dict[Layer, int] = {}
    for block in shape.blocks:
        for linear in block.linears:
            for layer in _linear_layers(linear):
                counted[layer] = counted.get(layer, 0) + 1
    found = [Layer(x.name, x.out_features, x.in_features, x.row_bits, repeats) for x, repeats in counted.items()]
    matrices = [t for t in shape.outer if len(t.shape) == 2]
    for tensor in [t for t in matrices if is_head(t.name)] or matrices[:1]:  # tied: the embedding is the head
        rows, columns = tensor.shape
        bits = shape.embedding_bits
        row_bits = columns * DTYPE_BYTES[tensor.dtype] * 8 if bits is None else columns * bits + 2 * SCALE_BITS
        tied = "" if is_head(tensor.name) else " as head"
        found.append(Layer(last_part(tensor.name.removesuffix(".weight")) + tied, rows, columns, row_bits))
    return found


def _linear_layers(x: LinearShape) -> Iterator[Layer]:
    bits = x.in_features * value_bits(x) + row_extra_bits(x)
    yield Layer(x.name, x.out_features, x.in_features, bits)
    codes = (t for t in x.packed_adapter() if t.name.endswith(".codes"))  # two scales a rank are no row's
    for tensor in codes if x.adapter_packed else x.adapter():
        rows, columns = tensor.shape
        yield Layer(tensor.name.rpartition(".")[0], rows, columns, columns * DTYPE_BYTES[tensor.dtype] * 8)
