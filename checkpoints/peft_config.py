"""An adapter's description in PEFT's own words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgepress.checkpoints.quiet import quiet_import


def peft_config(rank: int, alpha: float, linears: Iterable[str], dora: bool = False) -> dict[str, Any]:
    """adapter_config.json for low-rank adapters on these linear layers, named relative to their block."""
    with quiet_import():
        from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=0.0,
        target_modules=last_parts(linears),
        task_type="CAUSAL_LM",
        use_dora=dora,
    )
    return described(config)


def ia3_config(linears: Iterable[str], feedforward: Iterable[str]) -> dict[str, Any]:
    """The same for IA3's vectors; those of the layers in `feedforward` scale the input."""
    with quiet_import():
        from peft import IA3Config

    names = {"target_modules": last_parts(linears), "feedforward_modules": last_parts(feedforward)}
    return described(IA3Config(**names, task_type="CAUSAL_LM"))


def described(config: Any) -> dict[str, Any]:
    """A PEFT configuration as adapter_config.json says it, without what only training needs and where it was."""
    found = config.to_dict() | {"inference_mode": True, "base_model_name_or_path": None}
    if "lora_dropout" in found:
        found["lora_dropout"] = 0.0
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}


def last_parts(names: Iterable[str]) -> list[str]:
    """The parts of dotted names after the last dot, each once."""
    return sorted({name.rpartition(".")[2] for name in names})


# What says where an adapter comes from or how it was trained, but not what it computes.
_HISTORY = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout",
    "peft_version", "revision", "r", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def beyond_plain(config: Mapping[str, Any], ranks: Mapping[str, int], dora: bool = False) -> list[str]:
    """What an adapter_config.json asks for beyond plain LoRA on these layers (name -> rank), one item each.

    Plain is what `peft_config` writes: x A^T B^T lora_alpha / r, with one r and one lora_alpha for all layers, and with
    DoRA a magnitude in each of them. lora_alpha / sqrt(r), as in rsLoRA, is one scale too.
    """
    rank = config.get("r")
    plain = peft_config(max(ranks.values()), 1.0, ranks, dora)
    faults = [f"r is {rank}, but A has rank {found}" for found in sorted(set(ranks.values()) - {rank})]
    for key in sorted(config.keys() - _HISTORY):
        # Empty, None and False all say "not asked for"; a newer peft may have settings that this one does not know.
        if (config[key] or None) != (plain.get(key) or None):
            faults.append(f"{key} {config[key]}")
    return faults
