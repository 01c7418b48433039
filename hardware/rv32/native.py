"""An exported program as a library of this machine: what it computes here is, to the last bit, what a chip computes.

The C sources say which products and sums are one, have their own exponential and sine, and leave a compiler no freedom
to reorder sums, so that nothing but the time differs. No torch.
"""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgepress.checkpoints.errors import NumericsError, PlanError

SOURCES = ("runtime.c", "products.c", "lists.c", "integers.c", "model.c")
# fmaf is one instruction of every 64-bit Arm, and of nearly every x86: there a compiler must be told.
_HERE = ("-march=native",) if platform.machine().lower() in ("x86_64", "amd64") else ()
FLAGS = ("-O2", "-std=c11", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-shared", "-DEVERY_LOGIT", *_HERE)
INSTALL = "apt-get install gcc, or pip install ziglang"


class Native:
    """An exported folder's `forward`, compiled for this machine."""

    def __init__(self, folder: Path, compiler: Sequence[str] = ()) -> None:
        """Raises PlanError where there is no compiler, or with its own words where it fails."""
        compiler = compiler or find_compiler()
        weights = (folder / "weights.bin").read_bytes()
        (vocabulary,) = re.findall(r"#define VOCABULARY (\d+)", (folder / "model.h").read_text())
        with tempfile.TemporaryDirectory(prefix="edgepress-native-") as made:
            held, library = Path(made) / "held.c", Path(made) / "program.so"
            held.write_text(
                f"unsigned char weights[{len(weights)}] __attribute__((aligned(16)));\nfloat logits[{vocabulary}];\n"
            )
            command = [*compiler, *FLAGS, *SOURCES, str(held), "-o", str(library), "-lm"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode or not library.is_file():
                words = (done.stderr or done.stdout).strip()[:2000]
                raise PlanError(f"{compiler[0]} could not build {folder} for this machine:\n{words}")
            self._program = ctypes.CDLL(str(library))
        ctypes.memmove((ctypes.c_ubyte * len(weights)).in_dll(self._program, "weights"), weights, len(weights))
        self._logits = (ctypes.c_float * int(vocabulary)).in_dll(self._program, "logits")

    def feed(self, token: int, position: int) -> int:
        """The likeliest token after this one, as the program chooses it. Positions are fed in turn from 0 on."""
        return int(self._program.forward(token, position, 1))

    def logits(self, token: int, position: int) -> np.ndarray:
        """The head's results (vocabulary,) after this token, float32, before a cap or a factor of all of them."""
        self.feed(token, position)
        return np.array(self._logits, np.float32)

    def losses(self, tokens: Sequence[int], factor: float, cap: float) -> float:
        """Nats that a text's tokens after the first cost, summed; `factor` and `cap` as in families.Numbers."""
        found = 0.0
        for position, (token, after) in enumerate(pairwise(tokens)):
            logits = self.logits(token, position).astype(np.float64) * factor
            logits = cap * np.tanh(logits / cap) if cap else logits
            top = logits.max()
            found += float(top + np.log(np.exp(logits - top).sum()) - logits[after])
        return found

    def continued(self, prompt: Sequence[int], new_tokens: int, ends: Sequence[int]) -> list[int]:
        """The prompt and the likeliest tokens after it, the one that ends the text included.

        Raises NumericsError where the logits are not finite.
        """
        tokens = list(prompt)
        for position, token in enumerate(tokens[:-1]):
            self._program.forward(token, position, 0)
        for _ in range(new_tokens):
            chosen = self.feed(tokens[-1], len(tokens) - 1)
            if not np.isfinite(np.array(self._logits)).all():
                raise NumericsError(f"after the token {tokens[-1]} of its text the program's logits are not finite")
            tokens.append(chosen)
            if tokens[-1] in ends:
                break
        return tokens


def find_compiler() -> list[str]:
    """The command that begins a compilation for this machine. Raises PlanError where there is none."""
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise PlanError(f"no C compiler for this machine was found: {INSTALL}")
