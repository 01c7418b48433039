"""Where and how a stage computes: device, precision, random generators, progress."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, field
from typing import Protocol

from edgepress.checkpoints.errors import PlanError, near
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.memory import size_text


class Progress(Protocol):
    """What long work reports to: a terminal bar, plain lines, or nothing."""

    def start(self, task: str, steps: int) -> None: ...

    def step(self, **numbers: float | str) -> None:
        """One step further; numbers such as loss or block go beside the bar."""

    def note(self, message: str) -> None:
        """Something a person should know now and find again in the log."""

    def say(self, message: str) -> None:
        """A result, as a line for the person and the log."""


class Silent:
    """Progress that nobody watches."""

    def start(self, task: str, steps: int) -> None:
        pass

    def step(self, **numbers: float | str) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def say(self, message: str) -> None:
        pass


@dataclass(frozen=True)
class Runtime:
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = field(default_factory=lambda: torch.float32)
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    chunk_tokens: int = 4096  # tokens that go through a block at once
    spill_bytes: int = 64 * 2**20  # hidden states beyond this lie in a temporary file
    turn: int = 0  # of a stage that runs several times: each time draws anew

    def generator(self, purpose: str) -> torch.Generator:
        """A generator of its own for each purpose; the global random state is never touched."""
        again = f" {self.turn}" if self.turn else ""
        digest = hashlib.sha256(f"{self.seed} {purpose}{again}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


DEVICES, DTYPES = ("auto", "cpu", "cuda"), ("auto", "bfloat16", "float32")


def require_device(wanted: str) -> None:
    """Raise PlanError for a device that is not there. Only `cuda` asks torch."""
    if wanted not in DEVICES:
        raise PlanError(f"unknown device '{wanted}'{near(wanted, DEVICES)}; there are auto, cpu and cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise PlanError("--device cuda: torch sees no GPU here; use --device cpu, or install torch with CUDA")


def require_dtype(wanted: str) -> None:
    """Raise PlanError for a precision that there is none of."""
    if wanted not in DTYPES:
        close = near(wanted, DTYPES)
        raise PlanError(f"unknown precision '{wanted}'{close}; there are auto, {' and '.join(DTYPES[1:])}")


def choose_device(wanted: str) -> torch.device:
    """`auto` takes a GPU if torch sees one. Raises PlanError for a device that is not there."""
    require_device(wanted)
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(wanted: str, device: torch.device, stored: str) -> torch.dtype:
    """Precision of the forward passes. Statistics, Hessians and losses are float32 whatever it is.

    `auto`: float32 for a model stored in float32; otherwise bfloat16 where the processor multiplies it
    natively (twice to four times faster, measured in benchmarks/), else float32.
    """
    require_dtype(wanted)
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if stored == "F32":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return torch.bfloat16 if native else torch.float32


def machine() -> str:
    """What numbers were measured on, in words."""
    import psutil

    name = str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())
    memory = size_text(psutil.virtual_memory().total, "GiB", 0)
    where = f"{platform.system()}, Python {platform.python_version()}"
    return f"{psutil.cpu_count()} cores ({name}), {memory}, {where}"
