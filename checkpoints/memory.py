"""This process's memory, now and at its peak, and sizes in words."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def size_text(size: float, unit: str = "", decimals: int | None = None) -> str:
    """Bytes in words: 68.4 MiB, 256 KiB, -1.5 KiB, 12 B.

    unit: KiB, MiB, GiB or TiB; default: the one that fits. decimals: default: three digits in all.
    """
    if not unit and abs(size) < 1024:
        return f"{size} B"
    most = 999.5 if decimals is None else 1024  # 1,023 KiB would need a fourth digit
    unit = unit or next((name for name, factor in _UNITS.items() if abs(size) < most * factor), "TiB")
    return f"{size / _UNITS[unit]:{'.3g' if decimals is None else f'.{decimals}f'}} {unit}"


def resident_bytes() -> int:
    import psutil

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
    import psutil

    return int(psutil.virtual_memory().available)


# --- giving freed memory back -----------------------------------------------------------------------------------------
# Giving freed memory back to the operating system.


def give_back() -> None:
    """Return the allocator's free pages. Does nothing where the C library is not glibc.

    A walk frees and allocates blocks of the same sizes over and over, and glibc's heap grows by fragments of
    several megabytes a block: 1.4 GiB after 60 blocks of SmolLM2 where 0.8 GiB are in use. This keeps the peak
    independent of the depth.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
