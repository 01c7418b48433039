"""Giving freed memory back to the operating system."""

from __future__ import annotations

import contextlib
import ctypes


def give_back() -> None:
    """Return the allocator's free pages. Does nothing where the C library is not glibc.

    A walk frees and allocates blocks of the same sizes over and over, and glibc's heap grows by fragments of
    several megabytes a block: 1.4 GiB after 60 blocks of SmolLM2 where 0.8 GiB are in use. This keeps the peak
    independent of the depth.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
