"""The file formats of `compress export --to`: one module and one line each. No torch here: `--help` reads the list."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.runtime import Runtime

__all__ = ["FORMATS", "Format", "Module", "Wanted", "Written", "module_of"]


@dataclass(frozen=True)
class Format:
    """What `--help` says of a format, and where it is written."""

    module: str
    default: str  # name of the file or folder without -o
    reader: str  # who loads it
    loses: str  # what of a checkpoint is not in it, a sentence without its full stop
    types: tuple[str, ...] = ()  # values of --type; none where there is no choice


@dataclass(frozen=True)
class Wanted:
    """What the caller asked for."""

    out: Path  # not there yet, or --force was given
    type: str = ""  # one of the format's types; empty: the format's own choice for this checkpoint


@dataclass(frozen=True)
class Written:
    """What came of it."""

    path: Path
    nbytes: int
    notes: tuple[str, ...] = ()  # what was lost, and what it costs, a sentence each
    facts: Mapping[str, Any] = field(default_factory=dict)  # the same for --json


class Module(Protocol):
    """What every file of this folder holds."""

    def write(self, source: Checkpoint, wanted: Wanted, runtime: Runtime) -> Written:
        """Write the file or folder as a draft, and rename it once it is whole.

        Raises PlanError, before anything is written, for what the format cannot hold, with what would work; and with
        the install command where its library is missing.
        """


FORMATS: dict[str, Format] = {}


def module_of(form: Format) -> Module:
    """The module that writes this format."""
    return cast(Module, importlib.import_module(form.module))
