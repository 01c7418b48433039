"""The operators of one forward pass and the matrices they read, from shapes alone.

`forward` lists the operators in the order of computing, for decoding (one token) and for prefill (many), each
with its engine class, its operations, the weights it reads and the activations it reads and writes. What the
KV cache gives and takes is counted apart: it outlives the pass. Sizes are bytes, widths bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from edgepress.checkpoints.config import rotary_width, setting
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import DTYPE_BYTES, TensorShape, bytes_of
from edgepress.checkpoints.kv_format import KVFormat
from edgepress.checkpoints.packed_sizes import is_head, value_bits
from edgepress.checkpoints.shape import BlockShape, LinearShape, ModelShape
from edgepress.hardware.orders import (
    Order,
    branches_are_scaled,
    by_role,
    embedding_is_scaled,
    has_rope,
    logits_are_scaled,
    norm_name,
    of_norm,
    order_of,
    softcaps,
    window_of,
)
from edgepress.hardware.placement import SCALE_BITS, kv_block_bytes, kv_form, kv_written_bytes

ACCELERATOR, CORES = "accelerator", "cores"

# Operations on each element of what is written, where an operator is no matrix product. One for each step of the
# usual formula (softmax: maximum, difference, exponential, sum, quotient); a processor's own count differs.
ELEMENT_STEPS = {
    "embedding": 1, "norm": 4, "rope": 3, "append": 1, "softmax": 5, "softcap": 3, "add": 1, "activation": 4,
    "multiply": 1,
}  # fmt: skip

# How many kernels a compiled graph launches for an operator on the cores. Compiled microLlama has, for each block,
# 7 Transpose, 4 RequantizedGemm, 4 RequantShift, 3 RequantizedAdd, 2 RMSNorm, 2 Concat, softmax, Hardswish, Mul:
# 25 in all. The sums are Deeploy's; how transposes and requantisation fall to the operators is our reading.
KERNELS = {"rope": 4, "append": 3, "scores": 2, "softmax": 2, "values": 2, "activation": 2, "multiply": 2}


@dataclass(frozen=True)
class Activation:
    """A buffer of activations; operators that work in place read and write the same one."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Operator:
    """One step: `repeats` times a result of rows x columns.

    A matrix product sums over `depth`; of an elementwise operator `depth` is the operations on each element.
    """

    name: str
    kind: str  # linear, scores, values, or a key of ELEMENT_STEPS
    block: int | None
    rows: int
    columns: int
    depth: int
    reads: tuple[Activation, ...]
    writes: tuple[Activation, ...]
    repeats: int = 1
    weights: Weights | None = None
    weight_bytes: int = 0  # read in this pass; of an embedding only the rows looked up
    kv_read: int = 0
    kv_write: int = 0
    kv_held: int = 0  # bytes of this block's cache after the pass, for the operator that appends to it
    needed: int | None = None  # MACs without those that the causal mask throws away, where these are fewer
    activation_bits: int = 8
    kv_bits: int = 8
    kv_form: KVFormat | None = None  # of the keys or values it reads, where they have scales; None: codes alone

    @property
    def label(self) -> str:
        """A name that is unique in the pass: 3.q_proj."""
        return self.name if self.block is None else f"{self.block}.{self.name}"

    @property
    def engine(self) -> str:
        """Class of engine: constant weights are what an accelerator can multiply; the rest is the cores'."""
        return ACCELERATOR if self.kind == "linear" else CORES

    @property
    def macs(self) -> int:
        """Multiply-accumulates as executed; attention computes its whole rectangle and masks it afterwards."""
        return self.repeats * self.rows * self.columns * self.depth if self.kind not in ELEMENT_STEPS else 0

    @property
    def needed_macs(self) -> int:
        """MACs that a kernel which skips masked scores would execute."""
        return self.macs if self.needed is None else self.needed

    @property
    def element_operations(self) -> int:
        """Operations of an elementwise operator; 0 for matrix products."""
        return self.repeats * self.rows * self.columns * self.depth if self.kind in ELEMENT_STEPS else 0

    @property
    def kernels(self) -> int:
        """Kernels launched for it on the cores."""
        return KERNELS.get(self.kind, 1)


def forward(
    shape: ModelShape, *, tokens: int = 1, context: int = 256, activation_bits: int = 8, kv_bits: int = 8
) -> list[Operator]:
    """Operators of one pass of `tokens` new tokens, the last of `context` tokens in view.

    tokens 1 is a step of decoding, tokens = context prefill in one go. Embedding, last norm and head appear as
    far as the shape has them; the head computes one token. Raises PlanError for tokens or a context that cannot
    be, and for linear layers that no family known here has.
    """
    _validate(shape, tokens, context)
    return list(_Pass(shape, order_of(shape), tokens, context, activation_bits, kv_bits).operators())


def weights_read(shape: ModelShape) -> dict[str, int]:
    """Every constant a pass reads, by full name, with its packed bytes: what a placement must name."""
    found = {}
    for operator in forward(shape, tokens=1, context=1):
        if operator.weights is not None:
            found[operator.weights.name] = operator.weights.nbytes
    return found


def _validate(shape: ModelShape, tokens: int, context: int) -> None:
    faults = []
    if tokens < 1 or context < 1:
        faults.append(f"{tokens} tokens at a context of {context}: both must be at least 1")
    elif tokens > context:
        faults.append(f"{tokens} tokens do not fit in a context of {context}")
    if faults:
        raise PlanError("; ".join(faults))


@dataclass(frozen=True)
class _Pass:
    shape: ModelShape
    order: Order
    tokens: int
    context: int
    activation_bits: int
    kv_bits: int

    def operators(self) -> Iterator[Operator]:
        shape, hidden = self.shape, self.shape.hidden_size
        residual = self._buffer("residual", self.tokens * hidden)
        matrices = [outer_weights(t, shape) for t in shape.outer if len(t.shape) == 2]
        embedding = next((w for w in matrices if not is_head(w.name)), None)
        head = next((w for w in matrices if is_head(w.name)), embedding)
        if embedding is not None:
            read = bytes_of(self.tokens * (embedding.columns * embedding.bits + embedding.row_bits))
            yield self._element("embed", "embedding", None, self.tokens, hidden, (), residual, embedding, read)
            if embedding_is_scaled(shape):
                yield self._element("scale", "multiply", None, self.tokens, hidden, (residual,), residual)
        for index, block in enumerate(shape.blocks):
            yield from self._block(index, block, residual)
        rows = 1 if head is not None else self.tokens  # only the last token's successor is wanted
        normed = self._buffer("normed", rows * hidden)
        vectors = {t.name: t for t in shape.outer if len(t.shape) == 1}
        for name, tensor in vectors.items():
            if not name.endswith(".bias"):
                last = norm_weights(name, tensor, vectors.get(f"{name.removesuffix('.weight')}.bias"))
                yield self._element("last norm", "norm", None, rows, hidden, (residual,), normed, last)
        if self.order.weightless:
            yield self._element("last norm", "norm", None, rows, hidden, (residual,), normed)
        if head is not None:
            logits = self._buffer("logits", head.rows)
            yield self._product("head", None, 1, head, (normed,), (logits,))
            if logits_are_scaled(shape):
                yield self._element("scale logits", "multiply", None, 1, head.rows, (logits,), logits)
            if softcaps(shape)[1]:
                yield self._element("cap logits", "softcap", None, 1, head.rows, (logits,), logits)

    def _block(self, index: int, block: BlockShape, residual: Activation) -> Iterator[Operator]:
        order, hidden = self.order, self.shape.hidden_size
        linears = by_role(block)

        def own(name: str) -> Activation:
            return self._buffer(f"{index}.{name}", self.tokens * hidden)

        def norm(name: str, source: Activation, target: Activation) -> Iterator[Operator]:
            if name:
                yield from self._norm(index, block, name, source, target)

        def branch(name: str, end: str, result: Activation) -> Iterator[Operator]:
            yield from norm(end, result, result)
            if branches_are_scaled(self.shape):
                yield self._element(f"scale {name}", "multiply", index, self.tokens, hidden, (result,), result)

        def add(name: str, *others: Activation) -> Operator:
            return self._element(name, "add", index, self.tokens, hidden, (residual, *others), residual)

        attended, mlp = own("attended"), own("mlp")
        normed = own("normed") if order.attention_in else residual
        yield from norm(order.attention_in, residual, normed)
        yield from self._attended(index, block, linears, normed, attended)
        yield from branch("attended", order.attention_out, attended)
        normed2 = normed
        if not order.parallel:
            yield add("first residual", attended)
            normed2 = residual
        if order.mlp_in:
            normed2 = own("normed2")
            yield from norm(order.mlp_in, residual, normed2)
        yield from self._mlp(index, block, linears, normed2, mlp)
        yield from branch("mlp", order.mlp_out, mlp)
        if order.parallel:
            yield add("first residual", attended)
        yield add("second residual", mlp)

    def _norm(
        self, index: int, block: BlockShape, name: str, source: Activation, target: Activation, elements: int = 0
    ) -> Iterator[Operator]:
        """Over the last dimension; elements: of the source for one token, of which each `width` are a vector."""
        elements = elements or self.shape.hidden_size
        pairs = list(of_norm(block, name))
        if not pairs and self.order.weightless:
            yield self._element(name, "norm", index, self.tokens, elements, (source,), target)
        for weights, bias in pairs:  # with a norm of its own for each head, each does its part
            width = weights.elements
            rows = self.tokens if len(pairs) > 1 else self.tokens * elements // width
            read = norm_weights(f"{self.shape.block_prefix}.{index}.{weights.name}", weights, bias)
            label = name if len(pairs) == 1 else f"{name}.{last_part(read.name)}"
            yield self._element(label, "norm", index, rows, width, (source,), target, read)

    def _attended(
        self, index: int, block: BlockShape, linears: dict[str, LinearShape], source: Activation, attended: Activation
    ) -> Iterator[Operator]:
        """From the attention's input to what its output layer makes."""
        order = self.order
        q, k, v = (self._buffer(f"{index}.{n}", self.tokens * self._width(n)) for n in "qkv")
        for role, target in (("q", (q,)), ("k", (k,)), ("v", (v,)), ("qkv", (q, k, v))):
            if role in linears:
                yield from self._linear(index, linears[role], source, target)
        normed = [
            operator
            for name, buffer, n in ((order.q_norm, q, "q"), (order.k_norm, k, "k"))
            if any(norm_name(t) == name for t in block.others)
            for operator in self._norm(index, block, name, buffer, buffer, self._width(n))
        ]
        turned = list(self._rope(index, q, k))
        yield from (*turned, *normed) if order.rope_first else (*normed, *turned)
        mixed = self._buffer(f"{index}.mixed", self.tokens * self._width("q"))
        yield from self._attention(index, q, k, v, mixed)
        if order.mixed_norm:
            yield from self._norm(index, block, order.mixed_norm, mixed, mixed, self._width("q"))
        yield from self._linear(index, linears["o"], mixed, (attended,))

    def _rope(self, index: int, q: Activation, k: Activation) -> Iterator[Operator]:
        shape, width = self.shape, rotary_width(self.shape.config)
        if has_rope(shape, index):
            for name, buffer, count in (("rope q", q, shape.heads), ("rope k", k, shape.kv_heads)):
                yield self._element(name, "rope", index, self.tokens * count, width, (buffer,), buffer)

    def _attention(
        self, index: int, q: Activation, k: Activation, v: Activation, mixed: Activation
    ) -> Iterator[Operator]:
        shape, tokens = self.shape, self.tokens
        heads, head_dim, kv = shape.heads, shape.head_dim, shape.kv_heads * shape.head_dim
        window = window_of(shape, index) or self.context
        view = min(self.context, window + tokens - 1)  # keys that some query of the pass sees
        first = self.context - tokens + 1  # keys before and at the first query
        append = self._element("append to KV cache", "append", index, tokens, 2 * kv, (k, v), None)
        held = kv_block_bytes(shape, index, self.context, self.kv_bits)
        yield replace(append, kv_write=kv_written_bytes(shape, index, tokens, self.kv_bits), kv_held=held)
        scores = self._buffer(f"{index}.scores", heads * tokens * view)
        form, codes = kv_form(shape, index, self.kv_bits), bytes_of(kv * view * self.kv_bits)
        keys, values = (codes, codes) if form is None else form.read_bytes(view, shape.kv_heads, head_dim)
        pairs = sum(min(first + i, window) for i in range(tokens))  # of a query and a key that it may see

        def product(kind: str, columns: int, depth: int, source: Activation, to: Activation, read: int) -> Operator:
            name = {"scores": "scores", "values": "weighted values"}[kind]
            return Operator(
                name, kind, index, tokens, columns, depth, (source,), (to,), repeats=heads, kv_read=read,
                needed=heads * pairs * head_dim, activation_bits=self.activation_bits, kv_bits=self.kv_bits,
                kv_form=form,
            )  # fmt: skip

        yield product("scores", view, head_dim, q, scores, keys)
        if softcaps(shape)[0]:
            yield self._element("cap scores", "softcap", index, heads * tokens, view, (scores,), scores)
        yield self._element("softmax", "softmax", index, heads * tokens, view, (scores,), scores)
        yield product("values", head_dim, view, scores, mixed, values)

    def _mlp(
        self, index: int, block: BlockShape, linears: dict[str, LinearShape], source: Activation, mlp: Activation
    ) -> Iterator[Operator]:
        inner, config = linears["down"].in_features, self.shape.config
        gated, upped = (self._buffer(f"{index}.{name}", self.tokens * inner) for name in ("gated", "upped"))
        is_gated = "gate" in linears or "gate_up" in linears
        for role, target in (("gate", (gated,)), ("up", (upped,)), ("gate_up", (gated, upped))):
            if role in linears:
                yield from self._linear(index, linears[role], source, target)
        function = str(setting(config, "hidden_activation") or setting(config, "hidden_act") or "silu")
        result = gated if is_gated else upped
        learnt = self._learnt(index, block)
        yield self._element(function, "activation", index, self.tokens, inner, (result,), result, learnt)
        if is_gated:
            yield self._element("gate x up", "multiply", index, self.tokens, inner, (gated, upped), gated)
        if self.order.inner_norm:
            yield from self._norm(index, block, self.order.inner_norm, result, result, inner)
        yield from self._linear(index, linears["down"], result, (mlp,))

    def _learnt(self, index: int, block: BlockShape) -> Weights | None:
        """The numbers that the activation function learns, as one row."""
        own = [t for t in block.others if norm_name(t) == "act_fn"]
        if not own:
            return None
        name = f"{self.shape.block_prefix}.{index}.{own[0].name.rpartition('.')[0]}"
        return norm_weights(name, TensorShape(name, (sum(t.elements for t in own),), own[0].dtype))

    def _linear(
        self, index: int, x: LinearShape, source: Activation, targets: tuple[Activation, ...]
    ) -> Iterator[Operator]:
        name, prefix = last_part(x.name), f"{self.shape.block_prefix}.{index}"
        tensors = {t.name.removesuffix(".weight").rpartition(".")[2]: t for t in x.adapter()}
        if x.adapter_vector == "columns":  # IA3 on a feed-forward layer scales what comes in
            yield self._scaled(f"{prefix}.{x.name}", tensors["ia3_l"], index, (source,))
        yield self._product(name, index, self.tokens, linear_weights(prefix, x), (source,), targets)
        if x.adapter_rank:
            low = self._buffer(f"{index}.{name}.lora", self.tokens * x.adapter_rank)
            down, up = (
                adapter_weights(f"{prefix}.{t.name}", t, x.adapter_packed)
                for t in (tensors["lora_A"], tensors["lora_B"])
            )
            yield self._product(f"{name}.lora_A", index, self.tokens, down, (source,), (low,))
            yield self._product(f"{name}.lora_B", index, self.tokens, up, (low, *targets), targets)
        if x.adapter_vector == "rows":
            yield self._scaled(f"{prefix}.{x.name}", tensors["ia3_l"], index, targets)
        elif x.adapter_vector == "magnitude":  # divided by the rows' norms once, before the model is put on the chip
            yield self._scaled(f"{prefix}.{x.name}", tensors["lora_magnitude_vector"], index, targets)

    def _scaled(self, name: str, vector: TensorShape, index: int, buffers: tuple[Activation, ...]) -> Operator:
        """Each feature of these buffers times its own factor, in place."""
        kind = last_part(vector.name)
        weights = norm_weights(f"{name}.{kind}", vector)
        label = f"{last_part(name)}.{kind}"
        scaled = self._element(label, "multiply", index, self.tokens, vector.elements, buffers, None, weights)
        return replace(scaled, writes=buffers)

    # --- makers -----------------------------------------------------------------------------------------------

    def _buffer(self, name: str, elements: int) -> Activation:
        return Activation(name, bytes_of(elements * self.activation_bits))

    def _width(self, name: str) -> int:
        return (self.shape.heads if name == "q" else self.shape.kv_heads) * self.shape.head_dim

    def _product(
        self, name: str, block: int | None, rows: int, weights: Weights,
        reads: tuple[Activation, ...], writes: tuple[Activation, ...],
    ) -> Operator:  # fmt: skip
        return Operator(
            name, "linear", block, rows, weights.rows, weights.columns, reads, writes,
            weights=weights, weight_bytes=weights.nbytes, activation_bits=self.activation_bits, kv_bits=self.kv_bits,
        )  # fmt: skip

    def _element(
        self, name: str, kind: str, block: int | None, rows: int, columns: int,
        reads: tuple[Activation, ...], write: Activation | None,
        weights: Weights | None = None, read: int | None = None,
    ) -> Operator:  # fmt: skip
        nbytes = 0 if weights is None else weights.nbytes if read is None else read
        return Operator(
            name, kind, block, rows, columns, ELEMENT_STEPS[kind], reads, () if write is None else (write,),
            weights=weights, weight_bytes=nbytes, activation_bits=self.activation_bits, kv_bits=self.kv_bits,
        )  # fmt: skip


# --- matrices ---------------------------------------------------------------------------------------------------------
# The constants that operators read: matrices and norms with their widths, packed and in an engine's slots.


@dataclass(frozen=True)
class Weights:
    """A constant matrix (or a norm's vector: one row) that an operator reads."""

    name: str  # in full, without `.weight`: model.layers.0.self_attn.q_proj
    rows: int  # output features
    columns: int  # input features
    bits: int  # of one weight
    row_bits: int = 0  # scales, zero points and bias of one row
    groups: int = 1  # scales a row
    offsets: bool = False  # zero points (or minima) that differ from row to row
    other_bits: int = 0  # of the matrix as a whole: what its scales take beyond `row_bits`
    integer: bool = (
        True  # whether an engine for integers can multiply the codes: neither levels of a codebook nor real offsets
    )

    @property
    def nbytes(self) -> int:
        """Bytes with codes packed without gaps, scales, zero points and bias included."""
        return bytes_of(self.rows * (self.columns * self.bits + self.row_bits) + self.other_bits)

    def slotted_bytes(self, slot_bits: int, input_block: int) -> int:
        """Bytes with each weight in a slot of `slot_bits`, inputs padded to `input_block`; scales as in `nbytes`."""
        padded = -(-self.columns // input_block) * input_block
        return bytes_of(self.rows * (padded * max(slot_bits, self.bits) + self.row_bits))


def linear_weights(prefix: str, x: LinearShape) -> Weights:
    """A block's linear layer, as stored or quantised."""
    name, bias = f"{prefix}.{x.name}", x.bias * DTYPE_BYTES[x.dtype] * 8
    if x.grid is None:
        return Weights(name, x.out_features, x.in_features, value_bits(x), bias)
    sides = x.grid.side_bits(x.out_features, x.in_features, SCALE_BITS)
    scales, other = divmod(sides, x.out_features)
    integer = x.grid.integer
    groups, offsets = (x.grid.groups(x.in_features), not x.grid.symmetric) if integer else (1, False)
    return Weights(name, x.out_features, x.in_features, value_bits(x), scales + bias, groups, offsets, other, integer)


def adapter_weights(name: str, tensor: TensorShape, packed: bool = False) -> Weights:
    """One of the two matrices of a low-rank adapter, or its 8-bit codes; their scale a rank is no row's."""
    rows, columns = tensor.shape
    return Weights(name.removesuffix(".weight"), rows, columns, 8 if packed else DTYPE_BYTES[tensor.dtype] * 8)


def norm_weights(name: str, tensor: TensorShape, bias: TensorShape | None = None) -> Weights:
    """A norm's vector, as one row, and its bias beside it."""
    extra = 0 if bias is None else bias.nbytes * 8
    return Weights(name.removesuffix(".weight"), 1, tensor.elements, DTYPE_BYTES[tensor.dtype] * 8, extra)


def outer_weights(tensor: TensorShape, shape: ModelShape) -> Weights:
    """Embedding or head, or its packed copy for the edge where the model has one; a bias, where there is one, too."""
    name, (rows, columns) = tensor.name.removesuffix(".weight"), tensor.shape
    bias = next((DTYPE_BYTES[t.dtype] * 8 for t in shape.outer if t.name == f"{name}.bias"), 0)
    if shape.embedding_bits is None:
        return Weights(name, rows, columns, DTYPE_BYTES[tensor.dtype] * 8, bias)
    return Weights(name, rows, columns, shape.embedding_bits, 2 * SCALE_BITS + bias, 1, True)  # scale, minimum a row


def last_part(name: str) -> str:
    """The part of a dotted name after the last dot."""
    return name.rpartition(".")[2]
