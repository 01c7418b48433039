"""What the program of a model will ask of each memory and how many instructions a token takes. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from edgepress.checkpoints.errors import PlanError, near
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.rv32.cost import code_bytes, instructions
from edgepress.hardware.rv32.layout import Layout, form_notes, require_runnable
from edgepress.hardware.rv32.memory import (
    Use,
    activation_bytes,
    cache_bytes,
    does_not_fit,
    memory_use,
    table_bytes,
)
from edgepress.hardware.rv32.project import Run
from edgepress.hardware.soc import Soc
from edgepress.hardware.units import count_text

KV_BITS = (8, 32)
ACTIVATIONS = ("float", "int8")
MOST_ROUNDED = 2**16  # inputs of a row: sums of 255 x 127 stay within 32 bits


@dataclass(frozen=True)
class Prediction:
    """A program that is not written yet."""

    model: str
    soc: str
    run: Run
    uses: tuple[Use, Use, Use]
    operators: dict[str, float]  # instructions a token, the mean over a run that fills the context
    notes: tuple[str, ...]
    misfit: str  # what is missing where; empty where all fits

    @property
    def fits(self) -> bool:
        return not self.misfit

    @property
    def instructions_a_token(self) -> float:
        return sum(self.operators.values())

    @property
    def summary(self) -> str:
        what = f"{self.model} as a program for one plain RV32 core"
        return f"{what} does not fit {self.soc}: {self.misfit}" if self.misfit else f"{what} fits {self.soc}."

    def lines(self) -> Iterator[str]:
        """The prediction for a terminal."""
        arithmetic = "float32 arithmetic" if self.run.activations == "float" else "codes times inputs of 8 bits"
        yield f"context {self.run.context}, KV cache {self.run.kv_bits} bit, prompt token by token, {arithmetic}"
        for use in self.uses:
            parts = ", ".join(f"{part} {nbytes:,}" for part, nbytes in use.parts.items())
            yield f"{use.name}: {use.nbytes:,} of {use.capacity:,} bytes ({parts})"
        largest = sorted(self.operators.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {taken / self.instructions_a_token:.0%}" for name, taken in largest[:8])
        taken = count_text(round(self.instructions_a_token))
        yield f"About {taken} instructions a token on one core, the mean over the context: {shares}."
        yield self.summary
        yield from self.notes

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "soc": self.soc,
            "program": "rv32",
            "context": self.run.context,
            "kv_bits": self.run.kv_bits,
            "activations": self.run.activations,
            "fits": self.fits,
            "summary": self.summary,
            "memories": [use.to_dict() for use in self.uses],
            "instructions_a_token": round(self.instructions_a_token),
            "operators": {name: round(taken) for name, taken in self.operators.items()},
            "notes": list(self.notes),
        }


def require_kv_bits(kv_bits: int) -> None:
    if kv_bits not in KV_BITS:
        raise PlanError(f"--kv-bits {kv_bits}: the program keeps keys and values in 8 or 32 bits")


def require_activations(shape: ModelShape, activations: str) -> None:
    """Raise PlanError for a name that is none, and where the model has no codes to multiply integers by."""
    if activations not in ACTIVATIONS:
        raise PlanError(f"--activations {activations}{near(activations, ACTIVATIONS)}: there is float and int8")
    if activations == "int8" and not any(isinstance(x.grid, Grid) for block in shape.blocks for x in block.linears):
        raise PlanError(
            "--activations int8: the model's linear layers hold no codes of an integer grid for integers to be "
            "multiplied by; quantise it first (--quant gptq4)"
        )
    widest = max(x.in_features for block in shape.blocks for x in block.linears)
    if activations == "int8" and widest > MOST_ROUNDED:
        raise PlanError(f"--activations int8: rows of {widest} inputs, whose sums are exact to {MOST_ROUNDED}")


def predict(
    shape: ModelShape, soc: Soc, run: Run, pieces: int, name: str = "", notes: tuple[str, ...] = ()
) -> Prediction:
    """The bytes are those that an export of the same run writes and links; code and stack are upper ends.

    pieces: bytes of all tokens' texts. Raises PlanError for what the program or the chip cannot do.
    """
    require_kv_bits(run.kv_bits)
    require_activations(shape, run.activations)
    require_runnable(shape, run.context)
    zeros = form_notes(shape)
    tables = table_bytes(shape, len(run.prompt), len(run.ends), run.context)
    weights, code = Layout(shape, pieces).nbytes, code_bytes(shape, run)
    uses = memory_use(shape, soc, weights, tables, run.context, run.kv_bits, code, run.activations)
    return Prediction(
        name or shape.family,
        soc.label,
        run,
        uses,
        instructions(shape, run),
        (*zeros, *notes),
        misfit(shape, run, uses),
    )


def misfit(shape: ModelShape, run: Run, uses: tuple[Use, Use, Use]) -> str:
    """What is missing where, and the longest context that would fit; empty where all fits."""
    missing, tiles = does_not_fit(uses), uses[1]
    if not tiles.missing:
        return missing

    def need(context: int) -> int:
        return _tiles(shape, replace(run, context=context))

    fitting, beyond = 0, run.context
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if need(middle) <= tiles.capacity else (fitting, middle)
    longest = f"--context {fitting} is the longest that it holds" if fitting else "it does not hold one token's"
    bits = f", --kv-bits 8 takes {size_text(need(run.context) - _tiles(shape, replace(run, kv_bits=8)))} less" * (
        run.kv_bits > 8
    )
    return f"{missing}; of {tiles.name}, {longest}{bits}"


def _tiles(shape: ModelShape, run: Run) -> int:
    kept = cache_bytes(shape, run.context, run.kv_bits)
    return kept + activation_bytes(shape, run.context, run.kv_bits, run.activations)
