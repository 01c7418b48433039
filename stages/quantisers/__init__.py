"""The quantisers of the gptq stage (`--quant`): one file and one line each.

stages/README.md shows how to add one. No torch here: `--help` and planning read this list.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgepress.checkpoints.forms import CODEBOOKS, Form
from edgepress.stages.pruning import HESSIANS, NOTHING

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.walk import BlockVisit

__all__ = [
    "HESSIANS", "METHODS", "NOTHING", "Method", "Solved", "activation_bits", "form", "method", "smallest_group",
    "too_few_bits",
]  # fmt: skip

# The file of each name, and what its `form` is told besides the options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq4": ("edgepress.stages.quantisers.gptq", {"bits": 4}),
    "gptq3": ("edgepress.stages.quantisers.gptq", {"bits": 3}),
    "gptq8": ("edgepress.stages.quantisers.gptq", {"bits": 8}),
    "gptq4-channel": ("edgepress.stages.quantisers.gptq", {"bits": 4, "group": -1}),
    "gptq8-channel": ("edgepress.stages.quantisers.gptq", {"bits": 8, "group": -1}),
    "q2_k": ("edgepress.stages.quantisers.super_blocks", {"gguf": "Q2_K"}),
    "q3_k": ("edgepress.stages.quantisers.super_blocks", {"gguf": "Q3_K"}),
    "q4_k": ("edgepress.stages.quantisers.super_blocks", {"gguf": "Q4_K"}),
    "q5_k": ("edgepress.stages.quantisers.super_blocks", {"gguf": "Q5_K"}),
    "q6_k": ("edgepress.stages.quantisers.super_blocks", {"gguf": "Q6_K"}),
    "gptq2-s": ("edgepress.stages.quantisers.super_blocks", {"bits": 2}),
    "gptq3-s": ("edgepress.stages.quantisers.super_blocks", {"bits": 3}),
    "gptq4-s": ("edgepress.stages.quantisers.super_blocks", {"bits": 4}),
    "gptq5-s": ("edgepress.stages.quantisers.super_blocks", {"bits": 5}),
    "int8": ("edgepress.stages.quantisers.absmax", {"bits": 8}),
    "int4": ("edgepress.stages.quantisers.absmax", {"bits": 4}),
    "hqq4": ("edgepress.stages.quantisers.hqq", {"bits": 4}),
    "hqq2": ("edgepress.stages.quantisers.hqq", {"bits": 2, "group": 64}),
    "awq4": ("edgepress.stages.quantisers.awq", {"bits": 4}),
    "w4a8": ("edgepress.stages.quantisers.w4a8", {}),
    "nf4": ("edgepress.stages.quantisers.nf4", {"stored_as": CODEBOOKS["nf4"]}),
    "nf4-thesis": ("edgepress.stages.quantisers.nf4", {"stored_as": CODEBOOKS["nf4-thesis"]}),
}
ACTIVATION_BITS = {"w4a8": 8}  # of methods that are about the inputs as well as the weights


class Options(Protocol):
    """What is read here of the stage's options, `stages.options.Gptq`; a method's file may read all of them."""

    @property
    def quant(self) -> str:
        """The method's name."""

    @property
    def activation_bits(self) -> int:
        """Bits of the inputs, 16 for none."""


class Solved(Protocol):
    """One layer, quantised."""

    @property
    def weight(self) -> Tensor:
        """(out, in) float32: the dense weights that the stored tensors stand for, exactly 0 where the mask is."""

    def stored(self) -> dict[str, Tensor]:
        """The layer's tensors in the checkpoint by the last part of their name, in host memory."""

    def scaling(self) -> dict[str, Tensor]:
        """rows (out,) and columns (in,) that the dense weight was multiplied with; empty where it was not."""

    def facts(self) -> dict[str, Any]:
        """For the manifest, as JSON."""


class Method(Protocol):
    """What every file of this folder holds."""

    NEEDS: str  # NOTHING: no calibration token is run; HESSIANS: the memory forecast counts them
    TUNES: bool  # whether --quant-effort high can go on from its solutions, which then are gptq's

    def form(self, options: Options, masked: bool, **parameters: Any) -> Form:
        """How a layer will be stored, its group the largest wanted: the stage takes the largest that fits the model.

        masked: the model has zeros to keep, so the form must have a code that is exactly 0.
        """

    def quantise(
        self, block: BlockVisit, masks: Mapping[str, Tensor | None], forms: Mapping[str, Form], options: Options
    ) -> Mapping[str, Solved]:
        """Each layer that `masks` names, stored as its form says; a weight where its mask (out, in) is False is 0.

        The stage writes the block with these in place of the layers. What else the method changes in the block, such
        as a norm, it changes in place. Raises NumericsError that names the layer.
        """


def method(name: str) -> Method:
    """The file of this name."""
    return cast(Method, importlib.import_module(METHODS[name][0]))


def activation_bits(options: Options) -> int:
    """Of the inputs of quantised layers: what the method means, or else what is asked for; 16 leaves them."""
    return ACTIVATION_BITS.get(options.quant, options.activation_bits)


def form(options: Options, masked: bool) -> Form:
    """What the method asked for wants to store. masked: an N:M pattern is to be kept."""
    return method(options.quant).form(options, masked, **METHODS[options.quant][1])


def smallest_group(quant: str) -> int:
    """Weights that a scale serves at least: 16 where scales are codes of 6 bits themselves, else GPTQ's 32."""
    return 16 if METHODS.get(quant, ("",))[0] == METHODS["gptq4-s"][0] else 32


def too_few_bits(quant: str) -> str:
    """What a person should know of a method that rounds to fewer than 3 bits without calibration; else empty."""
    if quant not in METHODS or method(quant).NEEDS != NOTHING or METHODS[quant][1].get("bits", 4) > 2:
        return ""
    return (
        f"{quant} rounds to 2 bits without looking at calibration text, and a small model then answers noise (of "
        "SmolLM2-135M perplexity 10^6); gptq2-s and q2_k have as few bits and stay usable"
    )
