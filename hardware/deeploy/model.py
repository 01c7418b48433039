"""One decode step of a LLaMA-like model in the operators of `graph`, for a KV cache of a fixed length. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepress.checkpoints.config import has_rope, rotary_width, setting, slides
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.deeploy.arithmetic import Array
from edgepress.hardware.deeploy.graph import MASKED, Graph, Tensor, Weights

FAMILIES = ("llama", "mistral", "qwen2")
LINEARS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
ROPES = ("default", "linear", "llama3")  # angles that do not depend on how long the text is
# UniformRequantShift and iRMSnorm write past the end of what eight cores cannot share in even parts.
EVEN = 16
RESIDUAL_STEPS = 2.0**14  # that the largest number of the embedding counts; the sums of all layers stay below 2^24


@dataclass(frozen=True)
class Block:
    attention_norm: Array  # (width,), as the others below
    feed_forward_norm: Array
    linears: Mapping[str, Weights]  # q, k, v, o, gate, up, down


@dataclass(frozen=True)
class Model:
    """Sizes, weights and the two matrices outside the blocks.

    embedding (vocabulary, width) as real numbers, codes and steps (vocabulary,): a row is codes * steps units.
    frequencies (head_dim / 2,): of the rotary embedding, radians a token.
    """

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    frequencies: Array
    blocks: tuple[Block, ...]
    final_norm: Array
    embedding: Array
    codes: Array
    steps: Array
    unit: float
    head: Weights


def in_even_parts(linears: Mapping[str, Weights]) -> dict[str, Weights]:
    """The linear layers of a block, the feed-forward part widened by zeros to what the kernels can share."""
    extra = -len(linears["up"].codes) % EVEN
    below = {name: widened(linears[name], extra, 0) for name in ("gate", "up")}
    return {**linears, **below, "down": widened(linears["down"], 0, extra)}


def widened(weights: Weights, rows: int, columns: int) -> Weights:
    """The same layer with so many outputs more, which are zero, and inputs, which count nothing."""

    def padded(values: Array) -> Array:
        return np.pad(values, [(0, rows), (0, columns)][: values.ndim])

    bias = None if weights.bias is None else padded(weights.bias)
    scales = np.pad(weights.scales, (0, rows), constant_values=float(weights.scales.max()))
    return Weights(padded(weights.codes), scales, padded(weights.real), bias)


def eight_bit_rows(rows: Array) -> tuple[Array, Array, float]:
    """codes (rows, width), steps (rows,) and a unit, of which codes * steps * unit are the rows, rounded."""
    unit = max(float(np.abs(rows).max()), 1e-9) / RESIDUAL_STEPS
    steps = np.maximum(np.ceil(np.abs(rows).max(axis=1) / (127 * unit)), 1)
    return np.round(rows / (steps[:, None] * unit)), steps, unit


def rotations(model: Model, positions: Array) -> Array:
    """(positions, head_dim, head_dim): what turns a row vector, channels paired as Hugging Face does."""
    half = model.head_dim // 2
    angles = positions[:, None] * model.frequencies
    found, k = np.zeros((len(positions), model.head_dim, model.head_dim)), np.arange(half)
    found[:, k, k] = found[:, k + half, k + half] = np.cos(angles)
    found[:, k, k + half], found[:, k + half, k] = np.sin(angles), -np.sin(angles)
    return found


def eight_bit_rotations(model: Model, slots: int) -> Array:
    """As `rotations` of the first `slots` positions, in steps of 1 / 127."""
    return np.round(127 * rotations(model, np.arange(slots, dtype=np.float64)))


def texts(model: Model, ids: Any, chosen: dict[str, Any]) -> Graph:
    """Whole texts ids (texts, tokens), all tokens at once; the first output has logits (texts, tokens, 1, vocabulary).

    Each of them is what `step` gives for a cache of as many slots as the texts have tokens: masked slots count nothing,
    and sums do not ask for an order. Where `chosen` is empty, the constants are chosen on these texts.
    """
    ids = np.asarray(ids)
    slots = ids.shape[1]
    choosing = not chosen
    value = (model.codes[ids] * model.steps[ids][..., None])[:, :, None]
    real = model.embedding[ids][:, :, None] if choosing else None
    graph = Graph(chosen)
    width = model.embedding.shape[1]
    x = graph.input((1, 1, width), value, model.unit, real)
    positions = np.arange(slots, dtype=np.float64)
    turn = graph.input(
        (1, 1, model.head_dim, model.head_dim), eight_bit_rotations(model, slots)[None, :, None], 1 / 127,
        rotations(model, positions)[None, :, None] if choosing else None,
    )  # fmt: skip
    later = np.where(np.tri(slots, dtype=bool), 0.0, float(MASKED))
    mask = graph.input((1, 1, 1, slots), later[None, :, None, None])
    _decode(graph, model, x, turn, mask, [(None, None)] * len(model.blocks), slots)
    return graph


def step(model: Model, x: Array, position: int, past: Array, slots: int, chosen: Mapping[str, Any]) -> Graph:
    """The graph of one token x (width,) at a position, with its inputs' and outputs' values.

    past (blocks, 2, kv_heads, slots - 1, head_dim): keys and values of the tokens before it in the first `position`
    slots, whole numbers. Outputs: logits, then the token's own keys and values of each block.
    """
    graph, rows = Graph(dict(chosen)), model.heads // model.kv_heads
    token = graph.input((1, 1, len(x)), x[None, None, None], model.unit)
    turn = eight_bit_rotations(model, position + 1)[-1]
    turning = graph.input((1, 1, *turn.shape), turn[None, None, None], 1 / 127)
    hidden = np.where(np.arange(slots - 1) < position, 0.0, float(MASKED))
    mask = np.broadcast_to(np.append(hidden, 0.0), (1, 1, model.kv_heads, rows, slots))
    masking = graph.input(mask.shape[1:], mask)
    caches = []
    for keys, values in past:
        a, b = (graph.input((1, *part.shape), part[None, None]) for part in (keys, values))
        caches.append((a, b))
    _decode(graph, model, token, turning, masking, caches, slots)
    return graph


def _decode(
    graph: Graph,
    model: Model,
    x: Tensor,
    turn: Tensor,
    mask: Tensor,
    caches: Sequence[tuple[Tensor | None, Tensor | None]],
    slots: int,
) -> None:
    kv, rows, width = model.kv_heads, model.heads // model.kv_heads, model.head_dim
    new: list[Tensor] = []
    for index, (block, (past_keys, past_values)) in enumerate(zip(model.blocks, caches, strict=True)):
        at, w = f"block {index}: ", block.linears
        normed = _normed(graph, x, block.attention_norm, model.eps, f"{at}attention norm")
        q, k, v = (graph.linear(normed, w[name], f"{at}{name}") for name in ("q", "k", "v"))
        q = graph.matmul(graph.reshape(q, (1, 1, model.heads, width)), turn, f"{at}turned q")
        k = graph.matmul(graph.reshape(k, (1, 1, kv, width)), turn, f"{at}turned k")
        q = graph.reshape(q, (1, kv, rows, width))
        k, v = graph.reshape(k, (1, kv, 1, width)), graph.reshape(v, (1, kv, 1, width))
        keys, values = graph.join(past_keys, k, slots), graph.join(past_values, v, slots)
        weights = graph.softmax_of(q, graph.transpose(keys), mask, width**-0.5, f"{at}softmax")
        mixed = graph.matmul(weights, values, f"{at}mixed values", mask.value == 0)
        mixed = graph.reshape(mixed, (1, 1, model.heads * width))
        x = graph.add(x, graph.counted_in(graph.linear(mixed, w["o"], f"{at}o", model.unit), model.unit))
        normed = _normed(graph, x, block.feed_forward_norm, model.eps, f"{at}feed-forward norm")
        inner = graph.gated(
            graph.linear(normed, w["gate"], f"{at}gate"), graph.linear(normed, w["up"], f"{at}up"), f"{at}gated"
        )
        x = graph.add(x, graph.counted_in(graph.linear(inner, w["down"], f"{at}down", model.unit), model.unit))
        new += [k, v]
    normed = _normed(graph, x, model.final_norm, model.eps, "final norm")
    logits = graph.linear(normed, model.head, "head")
    for tensor in (logits, *new):
        graph.output(tensor)


def _normed(graph: Graph, x: Tensor, weight: Array, eps: float, name: str) -> Tensor:
    importance = None
    if x.real is not None:
        importance = weight**2 / (np.mean(x.real**2, axis=-1, keepdims=True) + eps)
    return graph.rms_norm(graph.narrowed(x, f"{name}: eight bits", importance), weight, eps, name)


# --- tokens one after the other ---------------------------------------------------------------------------------------


def continued(
    model: Model, chosen: Mapping[str, Any], prompt: list[int], new: int, slots: int, ends: frozenset[int] = frozenset()
) -> tuple[list[int], Graph]:
    """The prompt and the likeliest tokens after it, at most `new` or until one of `ends`; and the last step's graph."""
    tokens, past = list(prompt), np.zeros((len(model.blocks), 2, model.kv_heads, slots - 1, model.head_dim))
    position = 0
    while True:
        token = tokens[position]
        graph = step(model, model.codes[token] * model.steps[token], position, past, slots, chosen)
        position += 1
        if position == len(tokens):
            tokens.append(int(graph.outputs[0].value.argmax()))
            if len(tokens) == len(prompt) + new or tokens[-1] in ends:
                return tokens, graph
        for place, tensor in enumerate(graph.outputs[1:]):
            past[place // 2, place % 2, :, position - 1] = tensor.value[0, 0, :, 0]


# --- what cannot be expressed -----------------------------------------------------------------------------------------


def require_expressible(shape: ModelShape, context: int) -> None:
    """Raise PlanError that names everything the graph cannot express of this model at this context."""
    if faults := list(_faults(shape, context)):
        head = f"this {shape.family} model cannot be exported to deeploy:"
        raise PlanError("\n".join([head, *(f"  - {fault}" for fault in faults)]))


def _faults(shape: ModelShape, context: int) -> Iterator[str]:
    config, blocks = shape.config, len(shape.blocks)
    if shape.family not in FAMILIES:
        yield f"the family '{shape.family}': the graph knows the blocks of {', '.join(FAMILIES)}"
        return
    if not 2 <= context <= shape.positions:
        yield f"a context of {context} tokens: the model has positions for 2 to {shape.positions}"
    if (activation := setting(config, "hidden_act")) != "silu":
        yield f"the activation function '{activation}': silu can be expressed"
    window = setting(config, "sliding_window")
    if any(slides(config, k, blocks) for k in range(blocks)) and window < context:
        yield f"attention over a sliding window of {window} tokens: give --context {window} or fewer"
    if not all(has_rope(config, k, blocks) for k in range(blocks)) or rotary_width(config) != shape.head_dim:
        yield "rotary embeddings on a part of the blocks or channels: all of them can be turned"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
    if kind not in ROPES:
        yield f"rotary embeddings of type '{kind}': {', '.join(ROPES)} can be expressed"
    if shape.hidden_size % EVEN:
        yield f"a width of {shape.hidden_size}: Deeploy's kernels need multiples of {EVEN}"
    if shape.heads * context % EVEN:
        unit = EVEN // math.gcd(EVEN, shape.heads)
        yield f"a context of {context} tokens for {shape.heads} heads: Deeploy's kernels need multiples of {unit}"
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        yield f"{shape.heads} heads of {shape.head_dim} channels over {shape.kv_heads} key-value heads"
    for block in shape.blocks:
        if {x.name for x in block.linears} != set(LINEARS.values()) or {t.name for t in block.others} != NORMS:
            yield "blocks with other parts than two norms, q, k, v, o, and a gated feed-forward's three layers"
            return
