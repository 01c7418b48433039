"""Every weight as the nearest code of a form with fixed levels, as the form itself writes it. No calibration.

`nf4`: 4-bit NormalFloat with double quantisation, QLoRA (Dettmers et al., arXiv 2305.14314). `nf4-thesis`: the
codebook of the thesis on approximate computing, equation 2.26. Both hold an exact 0, so a mask stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Form
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers import NOTHING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edgepress.checkpoints.walk import BlockVisit

NEEDS = NOTHING
TUNES = False


class Rounding(Protocol):
    """A form that writes weights as they are, each by its nearest code."""

    def write(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]: ...
    def read(self, stored: Mapping[str, Tensor], rows: int, columns: int) -> Tensor: ...


def form(options: Options, masked: bool, stored_as: Form) -> Form:
    if options.symmetric:
        raise PlanError(f"--symmetric: {options.quant} has fixed levels; leave it out, or use --quant gptq4")
    return stored_as


def quantise(
    block: BlockVisit, masks: Mapping[str, Tensor | None], forms: Mapping[str, Rounding], options: Options
) -> dict[str, Coded]:
    return {name: Coded.nearest(block.linears[name].weight, forms[name], block.stored_dtype) for name in masks}


@dataclass
class Coded:
    """One layer as its form stores it."""

    tensors: dict[str, Tensor]
    form: Rounding
    shape: torch.Size  # (out, in)

    @classmethod
    def nearest(cls, weight: Tensor, form: Rounding, dtype: torch.dtype) -> Coded:
        return cls(form.write(weight, dtype), form, weight.shape)

    @property
    def weight(self) -> Tensor:
        return self.form.read(self.tensors, *self.shape)

    def stored(self) -> dict[str, Tensor]:
        return self.tensors

    def scaling(self) -> dict[str, Tensor]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {}
