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

__all__ = ["FORMATS", "Format", "Module", "Wanted", "Written", "formats_for", "module_of"]


@dataclass(frozen=True)
class Format:
    """What `--help` says of a format, and where it is written."""

    module: str
    default: str  # name of the file or folder without -o
    reader: str  # who loads it
    loses: str  # what of a checkpoint is not in it, a sentence without its full stop
    types: tuple[str, ...] = ()  # values of --type; none where there is no choice
    has_cache: bool = False  # the file has a KV cache, of --context tokens


@dataclass(frozen=True)
class Wanted:
    """What the caller asked for."""

    out: Path  # not there yet, or --force was given
    type: str = ""  # one of the format's types; empty: the format's own choice for this checkpoint
    context: int = 256  # tokens in the KV cache, where the file has one


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


FORMATS: dict[str, Format] = {
    "hf": Format(
        "edgepress.pipeline.formats.hf", "model-hf", "transformers, and whatever reads its folders",
        "Effective weights with the adapter merged, in the model's own precision or that of --type: codes and zeros of "
        "a pattern take the room of dense weights", ("bfloat16", "float16", "float32"),
    ),
    "gguf": Format(
        "edgepress.pipeline.formats.gguf", "model.gguf", "llama.cpp",
        "Codes of 2, 3, 4 and 8 bits take the smallest type that holds them without loss (Q4_0, Q5_0, Q8_0), the grids "
        "of --quant q2_k to q6_k are GGUF's own; what no type holds is dense. Zeros of a pattern take room. lora: the "
        "adapter is a file beside; merged: its layers become dense", ("lora", "merged"),
    ),
    "llama2c": Format(
        "edgepress.pipeline.formats.llama2c", "model-llama2c", "llama2.c",
        "float32 (run.c): codes decoded, the adapter merged, nothing rounded; int8 (runq.c): codes of up to 4 bits go "
        "in as they are, all else is rounded to 8 bits. Zeros of a pattern take room, special tokens are plain text",
        ("float32", "int8"),
    ),
    "onnx": Format(
        "edgepress.pipeline.formats.onnx", "model.onnx", "ONNX Runtime",
        "codes (of quantised weights): codes, scales and zero points of 2, 3, 4 and 8 bits go in as they are, 3 "
        "in the room of 4, and an adapter beside them; dense: effective weights with the adapter merged. No zeros of a "
        "pattern are left out, and the tokenizer stays in the checkpoint", ("codes", "dense"),
    ),
    "executorch": Format(
        "edgepress.pipeline.formats.executorch", "model.pte", "ExecuTorch",
        "Effective weights with the adapter merged, as float32 for XNNPACK, also of quantised checkpoints: codes (not "
        "made torchao's int4), zeros of a pattern and 16-bit weights take its room. The KV cache has the tokens of "
        "--context; the tokenizer stays in the checkpoint", has_cache=True,
    ),
    "compressed-tensors": Format(
        "edgepress.pipeline.formats.compressed_tensors", "model-compressed-tensors", "vLLM and transformers",
        "Codes of 2, 3, 4 and 8 bits, scales and zero points go in as they are; a checkpoint without codes or with an "
        "adapter is refused, as merged weights lie on no grid. Zeros of a pattern are stored as codes: the package has "
        "no 2:4 format any more",
    ),
}  # fmt: skip


def formats_for(program: str) -> list[str]:
    """The formats that a program of this name reads: people name it where the format is asked for."""
    spelled = "".join(program.lower().split())
    return [
        name for name, form in FORMATS.items() if len(spelled) > 3 and spelled in form.reader.lower().replace(" ", "")
    ]


def module_of(form: Format) -> Module:
    """The module that writes this format."""
    return cast(Module, importlib.import_module(form.module))
