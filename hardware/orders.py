"""The order in which a family's block computes: its norms, its attention, its parallel branches.

Read from transformers' modelling code; the tests compare the products, the norms and the tensors read with those of
the modules. A family that is not here gets no verdict, and so does a block with a tensor that its order has no use of:
a guess would be a wrong number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from edgepress.checkpoints import config
from edgepress.checkpoints.config import setting, slides
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import TensorShape
from edgepress.checkpoints.kv_format import KVFormat
from edgepress.checkpoints.shape import BlockShape, LinearShape, ModelShape

# What a linear layer does, by the last part of its name.
ROLES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "qkv_proj": "qkv", "query_key_value": "qkv", "o_proj": "o",
    "dense": "o", "gate_proj": "gate", "gate_up_proj": "gate_up", "up_proj": "up", "fc1": "up", "c_fc": "up",
    "dense_h_to_4h": "up", "down_proj": "down", "fc2": "down", "c_proj": "down", "dense_4h_to_h": "down",
}  # fmt: skip
_ATTENTION = ({"q", "k", "v", "o"}, {"qkv", "o"})
_FEED_FORWARD = ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"})
_COMPLETE = [a | f for a in _ATTENTION for f in _FEED_FORWARD]


@dataclass(frozen=True)
class Order:
    """Norms by their names in the block; "" where there is none."""

    attention_in: str = "input_layernorm"
    attention_out: str = ""
    mlp_in: str = "post_attention_layernorm"
    mlp_out: str = ""
    parallel: bool = False  # attention and feed-forward take the same input and are added together
    q_norm: str = "q_norm"  # computed where the block has one
    k_norm: str = "k_norm"
    rope_first: bool = False  # queries and keys are rotated before their norm
    mixed_norm: str = ""  # of what attention gathers, before the output layer
    inner_norm: str = ""  # of what goes into the last feed-forward layer
    weightless: bool = False  # the norms have no weights

    def norms(self) -> set[str]:
        named = (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out, self.mixed_norm, self.inner_norm)
        return {name for name in named if name}


_PLAIN = Order()
_ENDS = Order("", "post_attention_layernorm", "", "post_feedforward_layernorm")
_SANDWICH = Order(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_ONE_NORM = Order(mlp_in="", parallel=True)
_LAYER_NORMS = replace(_PLAIN, q_norm="q_layernorm", k_norm="k_layernorm")
_ORDERS = {
    **dict.fromkeys(
        ("arcee", "cwm", "ernie4_5", "gemma", "glm", "granite", "helium", "internlm3", "iquestcoder", "jais2", "llama",
         "ministral", "ministral3", "mistral", "nemotron", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
         "starcoder2"), _PLAIN,
    ),
    "apertus": Order("attention_layernorm", mlp_in="feedforward_layernorm"),
    "bitnet": Order(mixed_norm="attn_sub_norm", inner_norm="ffn_sub_norm"),
    "cohere": _ONE_NORM,
    "cohere2": _ONE_NORM,
    "exaone4": _ENDS,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "glm4": Order(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"),
    "hunyuan_v1_dense": Order(q_norm="query_layernorm", k_norm="key_layernorm", rope_first=True),
    "hyperclovax": Order(attention_out="post_norm1", mlp_out="post_norm2"),
    "olmo": Order(weightless=True),
    "olmo2": _ENDS,
    "olmo3": _ENDS,
    "persimmon": _LAYER_NORMS,
    "phi": replace(_LAYER_NORMS, mlp_in="", parallel=True),
    "stablelm": _LAYER_NORMS,
    "vaultgemma": Order(mlp_in="pre_feedforward_layernorm"),
}  # fmt: skip


def order_of(shape: ModelShape) -> Order:
    """Raises PlanError where the order of computing is not known, or has no use of something in a block."""
    order = _ORDERS.get(shape.family)
    if order is None:
        raise PlanError(
            f"no verdict: the order of computing of a '{shape.family}' model is not known here; known are "
            f"{', '.join(sorted(_ORDERS))}. `compress` runs its stages all the same"
        )
    if shape.family == "stablelm" and setting(shape.config, "use_parallel_residual"):
        order = replace(order, mlp_in="", parallel=True)
    if shape.family == "hyperclovax" and not setting(shape.config, "use_post_norm"):
        order = replace(order, attention_out="", mlp_out="")
    for block in {id(block): block for block in shape.blocks}.values():
        _require(order, block, shape.family)
    return order


def _require(order: Order, block: BlockShape, family: str) -> None:
    unknown = sorted({leaf for x in block.linears if (leaf := _leaf(x.name)) not in ROLES})
    if unknown:
        raise PlanError(
            f"no order of computing is known for the linear layers {', '.join(unknown)} of this {family} model"
        )
    if set(by_role(block)) not in _COMPLETE or len(by_role(block)) != len(block.linears):
        names = ", ".join(x.name for x in block.linears)
        raise PlanError(f"no order of computing is known for a {family} block with the linear layers {names}")
    found = {norm_name(t) for t in block.others}
    stray = sorted(found - order.norms() - {order.q_norm, order.k_norm, "act_fn"})
    lost = sorted(order.norms() - found) if not order.weightless else []
    if stray or lost:
        what = f"has {', '.join(stray)}" if stray else f"lacks {', '.join(lost)}"
        raise PlanError(f"a block of this {family} model {what}: no order of computing is known for such a one")


def by_role(block: BlockShape) -> dict[str, LinearShape]:
    return {ROLES[_leaf(x.name)]: x for x in block.linears if _leaf(x.name) in ROLES}


def norm_name(tensor: TensorShape) -> str:
    """The module in the block that a tensor belongs to; of a norm for each head the one name they share."""
    module = tensor.name.rpartition(".")[0]
    return _leaf(module.partition(".norms.")[0])


def of_norm(block: BlockShape, name: str) -> Iterator[tuple[TensorShape, TensorShape | None]]:
    """The weights of a norm and its bias, if it has one; a pair for each head where each has its own."""
    members = {t.name: t for t in block.others if norm_name(t) == name}
    for key, tensor in members.items():
        if key.endswith(".weight"):
            yield tensor, members.get(f"{key.removesuffix('.weight')}.bias")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def embedding_is_scaled(shape: ModelShape) -> bool:
    """By the square root of the hidden size (Gemma), or by a factor of the configuration's."""
    return "gemma" in shape.family or _is_factor(shape, "embedding_multiplier")


def branches_are_scaled(shape: ModelShape) -> bool:
    return _is_factor(shape, "residual_multiplier")


def logits_are_scaled(shape: ModelShape) -> bool:
    return _is_factor(shape, "logits_scaling") or _is_factor(shape, "logit_scale")


def _is_factor(shape: ModelShape, key: str) -> bool:
    heeds = {"granite", "hyperclovax"} if key != "logit_scale" else {"cohere", "cohere2"}
    return shape.family in heeds and setting(shape.config, key) not in (None, 1, 1.0)


# --- attention --------------------------------------------------------------------------------------------------------
# How a family's attention departs from the plain one, block by block, as far as its configuration tells.


_KV_CACHE = "edgepress_kv_cache"  # beside the family's own settings, since it changes what a block sees as they do


@dataclass(frozen=True)
class CacheRule:
    """What is asked of the KV cache beyond its width.

    form: eviction, and with `groups` also the bytes of scales, zero points and tokens in full; without, a cached
    value is its code alone: one static scale a tensor, which the code that multiplies it knows.
    """

    form: KVFormat
    groups: bool = False


def with_cache(shape: ModelShape, rule: CacheRule) -> ModelShape:
    """The shape with its KV cache kept by a rule, whatever is then counted on it."""
    return replace(shape, config={**shape.config, _KV_CACHE: asdict(rule)})


def cache_rule(shape: ModelShape) -> CacheRule | None:
    stated = shape.config.get(_KV_CACHE)
    return None if stated is None else CacheRule(KVFormat(**stated["form"]), stated["groups"])


def window_of(shape: ModelShape, block: int) -> int | None:
    """Tokens that the queries of a block see, sinks included, by its own window or by eviction; None: all."""
    own, rule = own_window(shape, block), cache_rule(shape)
    if rule is None or not rule.form.window:
        return own
    most = rule.form.window + rule.form.sinks
    return most if own is None else min(own, most)


def own_window(shape: ModelShape, block: int) -> int | None:
    """Tokens that the queries of a block see with a sliding window of the model's own, None where they see all."""
    return shape.number("sliding_window") if slides(shape.config, block, len(shape.blocks)) else None


def has_rope(shape: ModelShape, block: int) -> bool:
    """Whether a block rotates queries and keys."""
    return config.has_rope(shape.config, block, len(shape.blocks))


def softcaps(shape: ModelShape) -> tuple[bool, bool]:
    """Whether attention's scores and the head's logits are capped by a tanh (Gemma 2, if not switched off)."""
    if "gemma" not in shape.family or shape.family == "gemma":
        return False, False
    return tuple(bool(setting(shape.config, f"{of}_logit_softcapping")) for of in ("attn", "final"))  # type: ignore[return-value]
