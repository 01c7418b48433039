"""Resident size of this process: now, and its peak since a point in time."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import psutil

from edgepress.checkpoints.allocator import give_back

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def release() -> None:
    """Give back what the last stage left: reference cycles of its model, and the allocator's free pages."""
    gc.collect()
    give_back()


def reset_peak() -> None:
    """Start measuring anew. Linux can; elsewhere the peak stays that of the whole process."""
    release()
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Most bytes resident since `reset_peak`; plus, with a GPU, the most that torch had allocated there."""
    import torch

    peak = 0
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak = int(line.split()[1]) * 1024
    if not peak:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak += torch.cuda.max_memory_allocated()
    return peak


def available_bytes() -> int:
    """Memory that a new process could take without swapping."""
    return int(psutil.virtual_memory().available)
