"""How a family's attention departs from the plain one, block by block, as far as its configuration tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from edgepress.checkpoints import defaults
from edgepress.checkpoints.defaults import setting, slides
from edgepress.checkpoints.kv_format import KVFormat
from edgepress.checkpoints.shape import ModelShape

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
    return defaults.has_rope(shape.config, block, len(shape.blocks))


def softcaps(shape: ModelShape) -> tuple[bool, bool]:
    """Whether attention's scores and the head's logits are capped by a tanh (Gemma 2, if not switched off)."""
    if "gemma" not in shape.family or shape.family == "gemma":
        return False, False
    return tuple(bool(setting(shape.config, f"{of}_logit_softcapping")) for of in ("attn", "final"))  # type: ignore[return-value]
