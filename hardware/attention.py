"""How a family's attention departs from the plain one, block by block, as far as its configuration tells.

The defaults are those of the families' configuration classes in transformers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from checkpoints.kv_format import KVFormat
from checkpoints.shape import ModelShape

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
    """Tokens that the queries of a block see with a sliding window of the model's own, None where they see all.

    `layer_types` decides where the configuration states it for each block; after depth pruning without such a
    list the rule is applied to the blocks that are left.
    """
    config, family = shape.config, shape.family
    gemma = family in ("gemma2", "gemma3_text")
    window = config.get("sliding_window", 4096 if gemma else None)
    switched = family in ("qwen2", "qwen3", "smollm3")  # these heed the window only when told so
    if not window or (switched and not config.get("use_sliding_window")):
        return None
    types = config.get("layer_types")
    if types and len(types) == len(shape.blocks):
        sliding = types[block] == "sliding_attention"
    elif gemma:
        sliding = (block + 1) % (2 if family == "gemma2" else config.get("sliding_window_pattern", 6)) != 0
    elif family == "smollm3":
        sliding = not has_rope(shape, block)
    elif family in ("qwen2", "qwen3"):
        sliding = block >= config.get("max_window_layers", 28)
    else:
        sliding = family in ("mistral", "phi3")
    return int(window) if sliding else None


def has_rope(shape: ModelShape, block: int) -> bool:
    """Whether a block rotates queries and keys: SmolLM3 leaves every fourth as they are."""
    if shape.family != "smollm3":
        return True
    stated = shape.config.get("no_rope_layers")  # despite its name, 1 where there is rope
    if stated and len(stated) == len(shape.blocks):
        return bool(stated[block])
    return (block + 1) % int(shape.config.get("no_rope_layer_interval", 4)) != 0


def softcaps(shape: ModelShape) -> tuple[bool, bool]:
    """Whether attention's scores and the head's logits are capped by a tanh (Gemma 2, if not switched off)."""
    default = shape.family == "gemma2"
    scores, logits = "attn_logit_softcapping", "final_logit_softcapping"
    if not shape.family.startswith("gemma"):
        return False, False
    return bool(shape.config.get(scores, default)), bool(shape.config.get(logits, default))
