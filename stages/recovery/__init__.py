"""The recovery methods of the lora stage (`--recover`): one file and one line each.

An adapter is what is trained beside a layer. A setting changes how a low-rank adapter is scaled, where it begins, or
on which weights it is trained. Names are joined with +: one adapter (lora where none is named) and any settings that it
takes. stages/README.md shows how to add one. No torch here nor at the top of the files: `--help` and plans read them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgepress.checkpoints.errors import PlanError, near
from edgepress.checkpoints.shape import LinearShape

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.stages.quantisers import Solved

ADAPTERS = {
    "lora": "edgepress.stages.recovery.lora",
    "dora": "edgepress.stages.recovery.dora",
    "ia3": "edgepress.stages.recovery.ia3",
    "full": "edgepress.stages.recovery.full",
}
SETTINGS = {
    "qlora": "edgepress.stages.recovery.qlora",
    "rslora": "edgepress.stages.recovery.rslora",
    "loftq": "edgepress.stages.recovery.loftq",
}
METHODS = (*ADAPTERS, *SETTINGS)


class Adapter(Protocol):
    """What every adapter's file holds. A layer is peft's, around one linear layer of the model.

    options: those of the stage, `stages.options.Lora`, which imports this file.
    """

    TAKES: frozenset[str]  # the settings that it goes with
    RANKED: bool  # whether it has a rank, an alpha and a dropout

    def beside(self, linear: LinearShape, options: Any) -> LinearShape:
        """The layer with the adapter beside it: from this, parameters and bytes are counted."""

    def config(self, names: Sequence[str], options: Any, arguments: Mapping[str, Any]) -> Any:
        """peft's configuration for the layers of these names; `arguments` are the settings'."""

    def kept_bytes(self, masked: bool) -> int:
        """What a training step keeps for each weight of an adapted layer, beyond the model itself: for the forecast."""

    def start(self, layer: Any, mask: Tensor | None) -> None:
        """Make a layer ready to train, so that it computes what it did before. mask (out, in): see `change`."""

    def change(self, layer: Any) -> dict[str, Tensor]:
        """What is added to `weight` (out, in), and perhaps `bias` (out,), to merge the adapter: float32.

        Zero wherever the mask is False, and what the layer computes with.
        """

    def tensors(self, layer: Any) -> dict[str, Tensor]:
        """The adapter as PEFT stores it, by names relative to the layer."""


@dataclass(frozen=True)
class Start:
    """How a layer begins: A and B are in it."""

    stored: dict[str, Tensor]  # the quantised layer that it goes with, as the file holds it; empty: as it came
    errors: list[float]  # squared norm of W - Q - s B A after each turn
    whole: float  # squared norm of W


Begin = Callable[[Any, "Tensor", "Tensor", Callable[["Tensor"], "Solved"], int], Start]


class Setting(Protocol):
    """What every setting's file holds."""

    QUANTISED: bool  # whether the weights under the adapter are quantised ones, which stay as they are
    ARGUMENTS: Mapping[str, Any]  # of peft's configuration

    # Fills A and B of a layer from its weights before quantisation and after it (out, in), a function that quantises
    # such a matrix anew, and how often it may; None: they begin as usual.
    begin: Begin | None


@dataclass(frozen=True)
class Recovery:
    """A method that was asked for."""

    adapter_name: str
    settings: tuple[str, ...]

    def __str__(self) -> str:
        """The one way to write it, so that what is the same has one name: qlora+dora+rslora."""
        names = [self.adapter_name, *self.settings]
        if len(names) > 1 and "lora" in names:
            names.remove("lora")
        if "loftq" in names and "qlora" in names:  # which says that weights are quantised, as loftq does
            names.remove("qlora")
        return "+".join(sorted(names, key=("qlora", *METHODS).index))

    @property
    def adapter(self) -> Adapter:
        return cast(Adapter, importlib.import_module(ADAPTERS[self.adapter_name]))

    @property
    def whole(self) -> bool:
        """Whether every parameter is trained, and no adapter."""
        return self.adapter_name == "full"

    def on_quantised(self) -> Recovery:
        """The same, on quantised weights; those cannot be trained as a whole."""
        if self.whole:
            return Recovery("lora", ("qlora",))
        return Recovery(self.adapter_name, tuple(dict.fromkeys(("qlora", *self.settings))))

    def on_dense(self) -> Recovery:
        """The same as far as it can be done on dense weights."""
        return Recovery(self.adapter_name, tuple(name for name in self.settings if not setting(name).QUANTISED))

    @property
    def quantised(self) -> bool:
        """Whether the adapter is trained on quantised weights and stays beside them."""
        return any(setting(name).QUANTISED for name in self.settings)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the settings give to peft's configuration."""
        return {key: value for name in self.settings for key, value in setting(name).ARGUMENTS.items()}

    @property
    def begin(self) -> Begin | None:
        """How A and B begin, where a setting says so."""
        return next((begin for name in self.settings if (begin := setting(name).begin) is not None), None)


def setting(name: str) -> Setting:
    """The file of this setting."""
    return cast(Setting, importlib.import_module(SETTINGS[name]))


def parse(text: str) -> Recovery:
    """Read names joined with +. Raises PlanError for unknown names and for those that do not go together."""
    names = [name.strip() for name in text.split("+")]
    if unknown := [name for name in names if name not in METHODS]:
        close = near(unknown[0], METHODS)
        raise PlanError(f"--recover {text}: '{unknown[0]}'{close} is none of {', '.join(METHODS)}, joined with +")
    if len(set(names)) < len(names):
        raise PlanError(f"--recover {text} names a method twice")
    adapters = [name for name in names if name in ADAPTERS]
    if len(adapters) > 1:
        raise PlanError(f"--recover {text}: {' and '.join(adapters)} are adapters, of which a layer takes one")
    chosen = Recovery(adapters[0] if adapters else "lora", tuple(name for name in SETTINGS if name in names))
    takes = chosen.adapter.TAKES
    if wrong := [name for name in chosen.settings if name not in takes]:
        raise PlanError(
            f"--recover {text}: {' and '.join(wrong)} set{'s' if len(wrong) == 1 else ''} up A and B of a low-rank "
            f"adapter, and {chosen.adapter_name} has none; it goes with {', '.join(sorted(takes)) or 'no setting'}"
        )
    return chosen
