"""What the program does in the blocks of each family, told from the model's shape and settings alone. No torch.

Norms and their order come from `hardware/orders.py`; the table here says what that leaves open. Read from
transformers' modelling code; the tests hold every family's program against transformers' model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgepress.checkpoints.config import has_rope, rotary_width, setting, slides
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import TensorShape
from edgepress.checkpoints.shape import BlockShape, LinearShape, ModelShape
from edgepress.hardware.orders import by_role, norm_name, order_of


@dataclass(frozen=True)
class Family:
    """How a family departs from Llama."""

    one_more: bool = False  # norms multiply by one more than their weights
    centred: bool = False  # norms subtract the mean
    neighbours: bool = False  # rotary embeddings turn the channels 2i and 2i + 1, where Llama turns i and i + half
    partial: bool = False  # rotary embeddings may turn a head's first channels alone
    two_ropes: bool = False  # blocks whose attention slides have rotary angles of their own
    capped: bool = False  # attention's scores may be capped by a tanh
    embedding: str = ""  # the setting by which the embedding is multiplied; root: the hidden size's square root
    attention: str = ""  # the setting that attention's scores are multiplied by; root: by the inverse square root of it
    logits: str = ""  # the setting by which logits are multiplied or divided: the likeliest token stays the same
    residual: str = ""  # the setting by which a branch is multiplied before it is added
    epsilon: str = "rms_norm_eps"


_GEMMA = Family(one_more=True, embedding="root")
_GEMMA2 = Family(one_more=True, embedding="root", attention="root query_pre_attn_scalar", capped=True)
_MULTIPLIED = Family(
    embedding="embedding_multiplier", attention="attention_multiplier", logits="logits_scaling",
    residual="residual_multiplier",
)  # fmt: skip
_NEIGHBOURS = Family(neighbours=True)
_COHERE = Family(centred=True, neighbours=True, logits="logit_scale", epsilon="layer_norm_eps")
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("arcee", "cwm", "exaone4", "hunyuan_v1_dense", "internlm3", "iquestcoder", "llama", "ministral", "ministral3",
         "mistral", "olmo2", "qwen2", "qwen3", "seed_oss", "smollm3"), Family(),
    ),
    **dict.fromkeys(("ernie4_5", "helium"), _NEIGHBOURS),
    **dict.fromkeys(("glm", "glm4"), replace(_NEIGHBOURS, partial=True)),
    "phi3": Family(partial=True),
    **dict.fromkeys(("cohere", "cohere2"), _COHERE),
    **dict.fromkeys(("granite", "hyperclovax"), _MULTIPLIED),
    "gemma": _GEMMA,
    **dict.fromkeys(("gemma2", "vaultgemma"), _GEMMA2),
    "gemma3_text": replace(_GEMMA2, capped=False, two_ropes=True),
    "olmo3": Family(two_ropes=True),
}  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")
SAME = {"swish": "silu", "gelu_python": "gelu", "gelu_python_tanh": "gelu_pytorch_tanh"}  # one function, other names


def family_of(shape: ModelShape) -> Family:
    return FAMILIES[shape.family]


def activation(config: Mapping[str, Any]) -> str:
    """The activation function's name; a configuration has it under one of two keys."""
    key = "hidden_activation" if config.get("model_type") in ("gemma2", "gemma3_text", "vaultgemma") else "hidden_act"
    name = str(setting(config, key))
    return SAME.get(name, name)


# --- norms ------------------------------------------------------------------------------------------------------------


def norms(shape: ModelShape, block: BlockShape) -> dict[str, TensorShape]:
    """The weights of a block's norms by what the program calls them, in the order of its table."""
    order, found = order_of(shape), {norm_name(t): t for t in block.others if t.name.endswith(".weight")}
    names = {
        "ATTENTION_IN": order.attention_in,
        "ATTENTION_OUT": order.attention_out,
        "MLP_IN": order.mlp_in,
        "MLP_OUT": order.mlp_out,
        "Q_NORM": order.q_norm,
        "K_NORM": order.k_norm,
    }
    return {kind: found[name] for kind, name in names.items() if name in found}


def branches_are_buffered(shape: ModelShape) -> bool:
    """Whether a branch's result is changed before it is added to the state, and needs a place of its own."""
    order = order_of(shape)
    return bool(order.attention_out or order.mlp_out or family_of(shape).residual)


# --- linear layers ----------------------------------------------------------------------------------------------------

# What the program calls them, in the order of its table.
ROLES = ("q", "k", "v", "o", "up", "down", "gate")


@dataclass(frozen=True)
class Layer:
    """A linear layer of the program: all rows of one of the block's, or those that a fused one has for it."""

    role: str
    name: str  # of its parts in weights.bin
    shape: LinearShape
    source: LinearShape
    rows: tuple[int, ...] | None = None  # of the source, in the program's order; None: all, as they are
    first: str = ""  # the layer whose adapter's A it shares; "": it has its own


def layers(shape: ModelShape, block: BlockShape) -> list[Layer]:
    """A block's linear layers in the order of ROLES; a feed-forward part without a gate lacks the last."""
    roles = by_role(block)
    found: dict[str, Layer] = {}
    for role, x in roles.items():
        parts = _parts_of(shape, role, x)
        at, first = 0, ""
        for part, rows in parts.items():
            alone = len(parts) == 1
            name = x.name if alone else f"{x.name}.{part}"
            chosen = None if alone else tuple(range(at, at + rows))
            found[part] = Layer(part, name, replace(x, out_features=rows), x, chosen, first)
            at, first = at + rows, first or name
    for role in ("q", "k") if family_of(shape).neighbours else ():
        layer, order = found[role], halves_first(shape, found[role].shape.out_features)
        found[role] = replace(layer, rows=tuple(layer.rows[i] for i in order) if layer.rows else tuple(order))
    return [found[role] for role in ROLES if role in found]


def _parts_of(shape: ModelShape, role: str, x: LinearShape) -> dict[str, int]:
    if role == "qkv":
        key = shape.kv_heads * shape.head_dim
        return {"q": shape.heads * shape.head_dim, "k": key, "v": key}
    if role == "gate_up":
        return {"gate": x.out_features // 2, "up": x.out_features // 2}
    return {role: x.out_features}


def halves_first(shape: ModelShape, channels: int) -> list[int]:
    """The channels of queries or keys so ordered that i and i + half turn together, not 2i and 2i + 1.

    Scores are the same for any one order of a head's channels in queries and keys.
    """
    width, turned = shape.head_dim, rotary_width(shape.config)
    one = [*range(0, turned, 2), *range(1, turned, 2), *range(turned, width)]
    return [head + i for head in range(0, channels, width) for i in one]


# --- positions --------------------------------------------------------------------------------------------------------


def rooms(shape: ModelShape, context: int) -> list[int]:
    """Positions that each block's KV cache has: the context, or the sliding window where that is shorter."""
    blocks = len(shape.blocks)
    window = int(setting(shape.config, "sliding_window") or context)
    return [min(window, context) if slides(shape.config, k, blocks) else context for k in range(blocks)]


def rope_sets(shape: ModelShape) -> list[int]:
    """Which of the model's sets of rotary angles each block turns by; -1 for none."""
    kinds, blocks = rope_kinds(shape), len(shape.blocks)
    sets = [kinds.index(_rope_kind(shape, k)) for k in range(blocks)]
    return [number if has_rope(shape.config, k, blocks) else -1 for k, number in enumerate(sets)]


def rope_kinds(shape: ModelShape) -> list[str]:
    """The names of the model's sets of rotary angles, as transformers has them; "" where there is one for all."""
    return sorted({_rope_kind(shape, k) for k in range(len(shape.blocks))})


def _rope_kind(shape: ModelShape, block: int) -> str:
    if not family_of(shape).two_ropes:
        return ""
    return "sliding_attention" if slides(shape.config, block, len(shape.blocks)) else "full_attention"


def rope_types(config: Mapping[str, Any]) -> set[str]:
    """How the angles of the model's rotary embeddings are made, by transformers' names."""
    stated = [config.get(key) for key in ("rope_parameters", "rope_scaling")]
    flat: list[Any] = []
    for rope in stated:
        inner = [part for part in rope.values() if isinstance(part, Mapping)] if isinstance(rope, Mapping) else []
        flat += inner or [rope]
    return {
        str(rope.get("rope_type", rope.get("type")) or "default") if isinstance(rope, Mapping) else str(rope)
        for rope in flat
        if rope
    }


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """One set of rotary angles: radians a position of each turned pair, and a factor of their sines and cosines."""

    frequencies: Sequence[float]
    scale: float


@dataclass(frozen=True)
class Numbers:
    """What a family's formulas take from the configuration."""

    epsilon: float
    attention_scale: float
    attention_cap: float  # 0: none
    embedding_scale: float
    residual_scale: float
    logit_factor: float  # of all logits, after which they are
    logit_cap: float  # capped by a tanh; 0: none. Neither changes which is the largest


def numbers_of(shape: ModelShape, settings: Mapping[str, Any], context: int) -> Numbers:
    """settings: the configuration as transformers' class has it, with all that it fills in.

    Raises PlanError for one by which another token than the head's largest would be the likeliest, and for queries
    that are scaled by their position within the context.
    """
    family = family_of(shape)
    if family.logits and not float(settings[family.logits]) > 0:
        raise PlanError(f"{family.logits} is {settings[family.logits]}: the program takes the head's largest number")
    rope = settings.get("rope_parameters") or {}
    for part in (rope, *(inner for inner in rope.values() if isinstance(inner, Mapping))):
        reach = int(part.get("original_max_position_embeddings") or context)
        if context > reach and (part.get("llama_4_scaling_beta") or part.get("rope_type") == "longrope"):
            raise PlanError(
                f"a context of {context} tokens: queries or angles are made otherwise in texts of more than {reach} "
                f"tokens; give --context {reach} or fewer"
            )
    scale, embedding = float(shape.head_dim) ** -0.5, 1.0
    if family.attention:
        how, _, key = family.attention.rpartition(" ")
        scale = float(settings[key]) ** -0.5 if how == "root" else float(settings[key])
    if family.embedding:
        embedding = shape.hidden_size**0.5 if family.embedding == "root" else float(settings[family.embedding])
    return Numbers(
        epsilon=float(settings[family.epsilon]),
        attention_scale=scale,
        attention_cap=float(settings.get("attn_logit_softcapping") or 0) if family.capped else 0.0,
        embedding_scale=embedding,
        residual_scale=float(settings[family.residual]) if family.residual else 1.0,
        logit_factor=float(settings[family.logits]) ** (-1 if shape.family == "granite" else 1)
        if family.logits
        else 1.0,
        logit_cap=float(settings.get("final_logit_softcapping") or 0),
    )


def faults(shape: ModelShape, context: int) -> Iterator[str]:
    """What the program cannot do for the family and its settings, in words."""
    if shape.family not in FAMILIES:
        yield f"the family '{shape.family}': the program knows the blocks of {', '.join(sorted(FAMILIES))}"
        return
    config = shape.config
    if (name := activation(config)) not in ACTIVATIONS:
        yield f"the activation function '{name}': {', '.join(ACTIVATIONS)} can be run"
    # Their angles do not depend on how long the text is, as long as the model has positions for it; of longrope
    # `numbers_of` tells how long that is.
    allowed = {"default", "dynamic", "linear", "llama3", "longrope", "yarn"}
    for kind in sorted(rope_types(config) - allowed):
        yield f"rotary embeddings of type '{kind}': {', '.join(sorted(allowed))} can be run"
    if rotary_width(config) != shape.head_dim and not family_of(shape).partial:
        yield "rotary embeddings on a part of a head's channels, which this family has not"
    if rotary_width(config) % 2:
        yield f"rotary embeddings of {rotary_width(config)} channels: they turn pairs"
    if config.get("use_bidirectional_attention"):
        yield "attention to later tokens (use_bidirectional_attention)"
    if min(rooms(shape, context)) < 1:
        yield "a sliding window of no tokens"
