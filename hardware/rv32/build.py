"""Find a compiler for RV32 and build an exported program with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from edgepress.checkpoints.errors import PlanError

# No errno: a square root is one instruction. No contraction: the sources say which products and sums are one.
FLAGS = (
    *("-mabi=ilp32f", "-O2", "-std=c11", "-Wall", "-Wextra", "-ffreestanding", "-fno-builtin", "-fno-math-errno"),
    *("-ffp-contract=off", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables", "-nostdlib", "-static"),
)
# What gcc and zig call the same core. gcc of Debian's riscv64 package has libraries for this one; for some others of
# 32 bits it links those of 64 without a word.
GCC = ("-march=rv32imf",)
ZIG = ("-target", "riscv32-freestanding-none", "-mcpu=generic_rv32+m+f", "-fno-sanitize=undefined")
# What is compiled and linked; model.c is written for each model.
INPUTS = ("runtime.c", "products.c", "lists.c", "integers.c", "main.c", "model.c", "start.S")
INSTALL = "apt-get install gcc-riscv64-unknown-elf, or pip install ziglang"


def compilers() -> dict[str, list[str]]:
    """The commands that begin a compilation, of the compilers that are there."""
    found = {}
    if gcc := shutil.which("riscv64-unknown-elf-gcc"):
        found["gcc"] = [gcc, *GCC]
    if find_spec("ziglang"):
        found["clang"] = [sys.executable, "-m", "ziglang", "cc", *ZIG]
    return found


def find_compiler() -> list[str]:
    """The first of them. Raises PlanError where there is none, naming what to install."""
    for command in compilers().values():
        return command
    raise PlanError(f"no compiler for RV32 was found: {INSTALL}")


def build(folder: Path, compiler: list[str]) -> Path:
    """Compile and link an exported folder; the program's path.

    Raises PlanError with the compiler's own words where it fails, which it does for what does not fit a memory.
    """
    program = folder / "chip.elf"
    command = [*compiler, *FLAGS, "-T", "link.ld", *INPUTS, "-o", program.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not program.is_file():
        raise PlanError(f"{compiler[0]} could not build {folder}:\n{(done.stderr or done.stdout).strip()[:2000]}")
    return program
