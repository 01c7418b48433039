"""torch by names that import it when they are first used.

`import torch` takes two seconds, and a forecast needs no tensor: modules whose shapes, bytes and rules `compress plan`
reads take torch from here, and what they take of modules that build on it they import in the functions that need it.
A module that imports torch at its top works as well; a plan that reads it only takes longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["F", "nn", "torch"]

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import nn
else:
    from importlib import import_module

    class _Lazy:
        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self._module), name)

    torch, nn, F = _Lazy("torch"), _Lazy("torch.nn"), _Lazy("torch.nn.functional")
