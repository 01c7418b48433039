"""An adapter's description in PEFT's own words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from checkpoints.quiet import quiet_import


def peft_config(rank: int, alpha: float, linears: Iterable[str]) -> dict[str, Any]:
    """adapter_config.json for adapters on these linear layers, named relative to their block."""
    with quiet_import():
        from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=0.0,
        target_modules=sorted({name.rpartition(".")[2] for name in linears}),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
