"""Run a linked program on Spike or QEMU, with a monitor beside it that does what unicorn's host does. No torch.

The program is the same file: its bytes lie where they were linked to, in memories of the chip's addresses and sizes.
The monitor (runtime/monitor.S) lies in two pages further up. Physical memory protection, locked, so that it holds in
machine mode too, leaves the memories their rights and forbids the rest of the address space.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import PlanError
from edgepress.hardware.rv32.build import find_compiler
from edgepress.hardware.rv32.elf import Program

PROGRAMS = {"spike": "spike", "qemu": "qemu-system-riscv32"}
STACK, TRAP = 3, 0x100  # a message's first word at the end, and, plus a cause, of a trap; before it has a call's number
FILL = 0xA5  # of the working memory before the start: what differs from it afterwards was written
_PAGE, _FAR = 4096, 16 << 20  # the monitor's distance from the chip's last memory, at least
_OWN = 7  # instructions of the monitor that are counted between two messages
_LOCKED, _TO_TOP, _EVERYWHERE = 0x80, 0x08, 0x18  # how an entry of physical memory protection is configured
_LETTERS = {"r": 1, "w": 2, "x": 4}

_Node = dict[str, Any]  # of a device tree: bytes are properties, nodes are nodes


@dataclass(frozen=True)
class Message:
    """Four words of the monitor (monitor.S says which), and the instructions of the program since the last ones."""

    words: tuple[int, int, int, int]
    instructions: int


def path_of(simulator: str) -> str | None:
    """Where `spike` or `qemu` is: on the path, or beside this Python, as a virtual environment need not be on it."""
    beside = Path(sys.executable).parent / PROGRAMS[simulator]
    return shutil.which(PROGRAMS[simulator]) or (str(beside) if os.access(beside, os.X_OK) else None)


def messages(program: Program, memories: Sequence[Mapping[str, Any]], simulator: str) -> Iterator[Message]:
    """Run a program in these memories of memory.json; what it does, as it does it.

    Raises PlanError without a compiler, which the monitor is built with, or where the simulator itself fails.
    """
    with tempfile.TemporaryDirectory(prefix="edgepress-board-") as made:
        folder = Path(made)
        base = -(-max(memory["address"] + memory["capacity"] for memory in memories) // _FAR) * _FAR + _FAR
        _build(folder, program, memories, simulator, base)
        command = [path_of(simulator) or PROGRAMS[simulator], *_arguments(simulator, memories, base)]
        with subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            said, ended = [], False
            try:
                for line in process.stdout or ():
                    words = _words(line)
                    if words is None:
                        said.append(line.decode(errors="replace").strip())
                        continue
                    # A call is no instruction that retires, by the specification and in Spike; QEMU counts it.
                    calls = int(simulator == "spike" and words[0] < TRAP)
                    yield Message((words[0], words[1], words[2], words[3]), (words[4] + calls - _OWN) % 2**32)
                    ended = words[0] == STACK or words[0] >= TRAP
            finally:
                process.kill()
        if not ended:
            raise PlanError(f"{command[0]} ended before the program did: {' '.join(said)[:1000]}")


def _words(line: bytes) -> list[int] | None:
    try:
        found = [int(word, 16) for word in line.split()]
    except ValueError:  # what the simulator itself says
        return None
    return found if len(found) == 5 else None


def _arguments(simulator: str, memories: Sequence[Mapping[str, Any]], base: int) -> list[str]:
    if simulator == "spike":
        regions = [(memory["address"], memory["capacity"]) for memory in memories] + [(base, 2 * _PAGE)]
        where = ",".join(f"{address:#x}:{nbytes:#x}" for address, nbytes in sorted(regions))
        return ["--isa=rv32imf", "--priv=m", f"-m{where}", "--dtb=board.dtb", "board.elf"]
    # A core without devices, memory from address 0 on; a tick of its clock an instruction, so that they are counted.
    core = ["-M", "none", "-cpu", "rv32", "-m", f"{(base + _FAR) >> 20}M", "-icount", "shift=0,sleep=off"]
    none = ["-display", "none", "-monitor", "none", "-serial", "none"]
    output = ["-chardev", "stdio,id=out", "-semihosting-config", "enable=on,target=native,chardev=out"]
    return [*core, *none, *output, "-device", "loader,file=board.elf,cpu-num=0"]


# --- what it is built of ----------------------------------------------------------------------------------------------


def _build(folder: Path, program: Program, memories: Sequence[Mapping[str, Any]], simulator: str, base: int) -> None:
    """board.elf: the monitor, and the program's sections where they were linked to."""
    working = next(memory for memory in memories if "stack" in memory["parts"])
    end = working["address"] + working["capacity"]
    facts = {"WORKING": working["address"], "WORKING_END": end, "FILL": FILL * 0x01010101, "ENTRY": program.entry}
    facts |= {"SPIKE": 1} if simulator == "spike" else {}
    lines = [*(f"#define {name} {value:#x}" for name, value in facts.items()), '#include "monitor.S"']
    lines += _locks(memories, base)
    places = {base: ".monitor", base + _PAGE: ".state"}
    for number, section in enumerate(program.sections):
        if section.contents:
            name = places[section.address] = f".program{number}"
            (folder / name).write_bytes(section.contents)
            lines += [f'    .section {name}, "ax"', f'    .incbin "{name}"']
    # A header for each, so that nothing is loaded between them.
    headers = [f"    load{address:x} PT_LOAD;" for address in sorted(places)]
    sections = [f"    {name} {at:#x} : {{ *({name}) }} : load{at:x}" for at, name in sorted(places.items())]
    discarded = "    /DISCARD/ : { *(.comment) *(.note*) *(.riscv.attributes) }"
    script = ["ENTRY(_start)", "PHDRS {", *headers, "}", "SECTIONS {", *sections, discarded, "}"]
    (folder / "monitor.S").write_bytes((files("edgepress.hardware.rv32.runtime") / "monitor.S").read_bytes())
    (folder / "board.S").write_text("\n".join([*lines, ""]))
    (folder / "board.ld").write_text("\n".join([*script, ""]))
    (folder / "board.dtb").write_bytes(_device_tree())
    command = [*find_compiler(), "-mabi=ilp32f", "-g0", "-nostdlib", "-static"]
    command += ["-T", "board.ld", "board.S", "-o", "board.elf"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PlanError(f"{command[0]} could not build the monitor:\n{(done.stderr or done.stdout).strip()[:2000]}")


def _locks(memories: Sequence[Mapping[str, Any]], base: int) -> list[str]:
    """The routine that sets up physical memory protection: two entries a memory, and one that forbids the rest."""
    allowed = [(base, base + _PAGE, "rx"), (base + _PAGE, base + 2 * _PAGE, "rw")]
    allowed += [(m["address"], m["address"] + m["capacity"], m["access"]) for m in memories]
    addresses, settings = [], []
    for first, end, access in allowed:
        addresses += [first >> 2, end >> 2]
        settings += [_LOCKED, _LOCKED | _TO_TOP | sum(_LETTERS[letter] for letter in access)]
    addresses.append(0xFFFFFFFF)
    settings.append(_LOCKED | _EVERYWHERE)
    lines = ['    .section .monitor, "ax"', "lock:"]
    for number, address in enumerate(addresses):
        lines += [f"    li t1, {address:#x}", f"    csrw pmpaddr{number}, t1"]
    for first in range(0, len(settings), 4):
        word = sum(value << 8 * place for place, value in enumerate(settings[first : first + 4]))
        lines += [f"    li t1, {word:#x}", f"    csrw pmpcfg{first // 4}, t1"]
    return [*lines, "    jr t5"]


def _device_tree() -> bytes:
    """A flattened device tree (specification 0.4, version 17) of one core alone, for Spike.

    Its own has a serial port at 0x10000000, where Siracusa's first memory lies.
    """
    one, none = struct.pack(">I", 1), bytes(4)
    controller: _Node = {
        "#address-cells": none, "#interrupt-cells": one, "interrupt-controller": b"", "compatible": b"riscv,cpu-intc\0",
    }  # fmt: skip
    core: _Node = {
        "device_type": b"cpu\0", "reg": none, "status": b"okay\0", "compatible": b"riscv\0", "riscv,isa": b"rv32imf\0",
        "mmu-type": b"riscv,sv32\0", "riscv,pmpregions": struct.pack(">I", 16),
        "riscv,pmpgranularity": struct.pack(">I", 4), "interrupt-controller": controller,
    }  # fmt: skip
    frequency = struct.pack(">I", 10_000_000)
    cpus: _Node = {"#address-cells": one, "#size-cells": none, "timebase-frequency": frequency, "cpu@0": core}
    names = bytearray()
    tree = _node("", {"#address-cells": one, "#size-cells": one, "cpus": cpus}, names) + struct.pack(">I", 9)
    begin = 40 + 16  # the header, and an empty list of reserved memory
    sizes = (begin + len(tree) + len(names), begin, begin + len(tree), 40, 17, 16, 0, len(names), len(tree))
    return struct.pack(">10I", 0xD00DFEED, *sizes) + bytes(16) + tree + names


def _node(name: str, node: _Node, names: bytearray) -> bytes:
    found = struct.pack(">I", 1) + _padded(name.encode() + b"\0")
    for key, value in node.items():
        if isinstance(value, bytes):
            found += struct.pack(">III", 3, len(value), len(names)) + _padded(value)
            names += key.encode() + b"\0"
    found += b"".join(_node(key, value, names) for key, value in node.items() if not isinstance(value, bytes))
    return found + struct.pack(">I", 2)


def _padded(value: bytes) -> bytes:
    return value + bytes(-len(value) % 4)
