"""The errors a person can cause, and so must be able to read.

Each carries one message: what is wrong, where, what exists, what to do next. The command line prints it
and exits with code 2; the Python API raises it.
"""

from __future__ import annotations

from collections.abc import Iterable


class EdgepressError(Exception):
    """Something the user can mend."""


class PlanError(EdgepressError):
    """The request cannot be carried out, known before any weight is touched."""


class CheckpointError(EdgepressError):
    """A folder or file is missing, damaged, unfinished, or belongs to something else."""


class TextError(EdgepressError):
    """A text cannot be found, read, or is too short for what is asked of it."""


class NumericsError(EdgepressError):
    """A value is not finite, or a matrix stays singular after everything that was tried."""


class RecipeError(PlanError):
    """Every fault of a recipe at once."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        count = len(self.faults)
        head = "1 error in the recipe" if count == 1 else f"{count} errors in the recipe"
        super().__init__("\n".join([f"{head}:", *(f"  - {fault}" for fault in self.faults)]))
