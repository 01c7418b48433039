"""What a linked program says of itself: sections and symbols of a 32-bit little-endian ELF file. No torch."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgepress.checkpoints.errors import PlanError


@dataclass(frozen=True)
class Section:
    name: str
    address: int
    nbytes: int
    contents: bytes  # empty for what is not stored


@dataclass(frozen=True)
class Symbol:
    address: int
    nbytes: int  # 0 where the program's source does not say
    is_function: bool

    def __contains__(self, address: int) -> bool:
        return self.address <= address < self.address + self.nbytes


@dataclass(frozen=True)
class Program:
    entry: int
    sections: tuple[Section, ...]  # that take memory
    symbols: Mapping[str, Symbol]

    def read(self, address: int, nbytes: int) -> bytes:
        """The program's own bytes; empty where it has none stored."""
        for section in self.sections:
            at = address - section.address
            if 0 <= at <= len(section.contents) - nbytes:
                return section.contents[at : at + nbytes]
        return b""

    def place(self, address: int) -> str:
        """The function that an address lies in, or else the last one before it; empty where there is none."""
        functions = {name: symbol for name, symbol in self.symbols.items() if symbol.is_function}
        inside = [name for name, symbol in functions.items() if address in symbol]
        before = [name for name, symbol in functions.items() if symbol.address <= address]
        return max(inside or before, key=lambda name: functions[name].address, default="")


def read_elf(path: Path) -> Program:
    """Raises PlanError for another kind of file."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x01\x01":
        raise PlanError(f"{path} is no program for a 32-bit little-endian core")
    entry, _, table = struct.unpack_from("<III", data, 24)
    size, count, names_at = struct.unpack_from("<HHH", data, 46)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    headers = [struct.unpack_from("<10I", data, table + size * k) for k in range(count)]

    def text(strings: int, at: int) -> str:
        start = headers[strings][4] + at
        return data[start : data.index(b"\0", start)].decode()

    sections, symbols = [], {}
    for name, kind, flags, address, offset, nbytes, link, *_ in headers:
        if flags & 2 and nbytes:  # takes memory
            contents = b"" if kind == 8 else data[offset : offset + nbytes]
            sections.append(Section(text(names_at, name), address, nbytes, contents))
        if kind == 2:
            for at in range(offset, offset + nbytes, 16):
                label, value, length, info, _, _ = struct.unpack_from("<IIIBBH", data, at)
                if info & 15 in (1, 2):  # objects and functions
                    symbols[text(link, label)] = Symbol(value, length, info & 15 == 2)
    return Program(entry, tuple(sections), symbols)
