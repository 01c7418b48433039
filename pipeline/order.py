"""The order of the stages where no recipe lists them: the usual one, but for adapters trained on quantised weights."""

from __future__ import annotations

from edgepress.stages.options import Lora, Options

Stages = list[tuple[str, Options]]


def in_working_order(stages: Stages, eora_asked: bool, notes: list[str]) -> Stages:
    """The stages as they can run; what was moved or left out is added to the notes.

    eora_asked: somebody set one of its options, so it is not left out, and the plan says why it cannot run.
    """
    names = [name for name, _ in stages]
    method = next((o.method for _, o in stages if isinstance(o, Lora) and o.recovery.quantised), None)
    if method is None or "gptq" not in names:
        return stages
    place, lora = names.index("gptq"), stages[names.index("lora")]
    moved = [*stages[: place + 1], lora, *stages[place + 1 :]]
    moved.remove(lora)  # the first of the two
    notes.append(f"lora comes after gptq: --recover {method} trains on the quantised weights")
    if "eora" in names and not eora_asked:
        moved = [entry for entry in moved if entry[0] != "eora"]
        notes.append("eora is left out: a layer has room for one adapter, and lora's lies there")
    return moved
