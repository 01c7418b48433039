"""What the program asks of each memory of a chip, and the linker script that holds it to them. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgepress.checkpoints.config import rotary_width
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.hardware.rv32.families import branches_are_buffered, layers, norms, rooms, rope_kinds, rope_sets
from edgepress.hardware.rv32.layout import CodeForm, code_form, most_ordered
from edgepress.hardware.soc import Memory, Soc

# Upper ends, in bytes, of what only a compiler knows. Of 4-bit codes with an adapter zig 0.17's clang makes 8.0 KiB of
# code for a Llama and 8.8 KiB for a Gemma 3, with 360 and 328 B of stack; the tests hold the compiler to these ends.
CODE_BYTES = 9 * 1024
STACK_BYTES = 1024
LINEAR_BYTES, MATRIX_BYTES = 11 * 4, 4 * 4  # of `struct linear` and `struct matrix` in runtime.h


@dataclass(frozen=True)
class Use:
    """One memory: where it lies, how much it has, and what the program puts there, in bytes by name."""

    name: str  # as a linker script can have it
    address: int
    access: str
    capacity: int
    parts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())

    @property
    def missing(self) -> int:
        """Bytes beyond the memory's end; 0 where all fits."""
        return max(0, self.nbytes - self.capacity)

    def to_dict(self) -> dict[str, Any]:
        where = {"name": self.name, "address": self.address, "access": self.access, "capacity": self.capacity}
        return {**where, "parts": dict(self.parts), "bytes": self.nbytes}


def table_bytes(shape: ModelShape, prompt: int, ends: int, context: int) -> int:
    """Bytes of the constants in model.c for a prompt of so many tokens and so many that end a text."""
    blocks, first = len(shape.blocks), shape.blocks[0]
    words = blocks * len(norms(shape, first)) + prompt + max(ends, 1)
    words += len(rope_kinds(shape)) * rotary_width(shape.config) // 2
    words += blocks if any(rope_sets(shape)) else 0
    words += blocks * len(layers(shape, first)) if most_ordered(shape) else 0
    words += blocks + 1 if len(set(rooms(shape, context))) > 1 else 0
    return blocks * len(layers(shape, first)) * LINEAR_BYTES + 2 * MATRIX_BYTES + 4 * words


def cache_bytes(shape: ModelShape, context: int, kv_bits: int) -> int:
    """Bytes of keys and values: of `context` tokens in every block, of a sliding window where that is less.

    Those of 8 bits have a scale of two bytes for each token and head.
    """
    head = shape.head_dim + 2 if kv_bits == 8 else 4 * shape.head_dim
    return 2 * sum(rooms(shape, context)) * shape.kv_heads * head


def activation_bytes(shape: ModelShape, context: int, kv_bits: int, activations: str = "float") -> int:
    """Bytes of the vectors that the program keeps: float32, but for rounded inputs."""
    hidden, query = shape.hidden_size, shape.heads * shape.head_dim
    gated = "gate" in {layer.role for layer in layers(shape, shape.blocks[0])}
    vectors = hidden + max(hidden, query) + (max(hidden, query) if branches_are_buffered(shape) else query)
    vectors += (2 if gated else 1) * inner(shape)
    vectors += 2 * shape.kv_heads * shape.head_dim if kv_bits == 8 else 0
    vectors += most_ordered(shape)
    vectors += prepared(shape, activations)
    vectors += input_words(shape) if activations == "int8" else most_groups(shape)
    angles = len(rope_kinds(shape)) * rotary_width(shape.config)
    return 4 * (vectors + abreast(shape) * max(rooms(shape, context)) + angles + max(rank(shape), 1))


def abreast(shape: ModelShape) -> int:
    """Heads whose scores lie there at a time: two where an even number of them reads the same keys and values."""
    return 1 if shape.heads // shape.kv_heads % 2 else 2


def inner(shape: ModelShape) -> int:
    """The widest feed-forward part."""
    return max(
        layer.shape.out_features for block in shape.blocks for layer in layers(shape, block) if layer.role == "up"
    )


def rank(shape: ModelShape) -> int:
    """The largest rank of an adapter, 0 without any."""
    return max(x.adapter_rank for block in shape.blocks for x in block.linears)


def prepared(shape: ModelShape, activations: str = "float") -> int:
    """The most numbers that the program makes of a vector before it multiplies a matrix with it in float32."""
    linears = [x for block in shape.blocks for x in block.linears if activations == "float" or x.grid is None]
    return max((code_form(shape, x).prepared(x.in_features) for x in linears), default=0)


def most_groups(shape: ModelShape) -> int:
    """The most groups in a row of a grid all of whose codes are stored: the program keeps a vector's sum in each."""
    grids = ((x, x.grid) for block in shape.blocks for x in block.linears)
    found = (grid.groups(x.in_features) for x, grid in grids if isinstance(grid, Grid) and not code_form(shape, x).of)
    return max(found, default=0)


def head_is_rounded(shape: ModelShape) -> bool:
    """Whether, with activations in int8, the head's products are in integers too: its rows are whole words of codes."""
    return shape.embedding_bits is not None and shape.hidden_size % (32 // shape.embedding_bits) == 0


def input_words(shape: ModelShape) -> int:
    """Words that hold a layer's inputs in 8 bits, of the layer that takes the most."""
    grids = ((x, x.grid) for block in shape.blocks for x in block.linears)
    sizes = [_input_words(x, grid, code_form(shape, x)) for x, grid in grids if isinstance(grid, Grid)]
    if head_is_rounded(shape):
        sizes.append(_all_words(shape.embedding_bits or 8, shape.hidden_size, -1))
    return max(sizes, default=0)


def _input_words(x: LinearShape, grid: Grid, form: CodeForm) -> int:
    """Of a list the scales of its groups, and its table, or four inputs in a word."""
    if not form.of:
        return _all_words(grid.bits, x.in_features, grid.group)
    return grid.groups(x.in_features) + (form.prepared(x.in_features) or x.in_features // 4)


def _all_words(bits: int, columns: int, group: int) -> int:
    """Two for a group, one for a chunk of columns, and one for four 8-bit inputs or two: as integers.c has them."""
    groups = columns // (columns if group == -1 else group)
    return 2 * groups + columns // chunk(bits, columns, group) + columns // (4 if bits == 8 else 2)


def chunk(bits: int, columns: int, group: int) -> int:
    """Columns whose products with rounded inputs are added up in one word."""
    group = columns if group == -1 else group
    return group if bits == 8 else min(group & -group, 128 if bits == 2 else 32)


def memory_use(
    shape: ModelShape, soc: Soc, weights: int, tables: int, context: int, kv_bits: int = 32, code: int = CODE_BYTES,
    activations: str = "float",
) -> tuple[Use, Use, Use]:  # fmt: skip
    """What lies in the memories for weights (code too), tiles and working, which are the chip's first of these roles.

    weights, tables, code: their bytes. Raises PlanError for a chip that does not say where these memories lie.
    """
    held = {
        "weights": {"code": code, "tables": tables, "weights": weights},
        "tiles": {
            "KV cache": cache_bytes(shape, context, kv_bits),
            "activations": activation_bytes(shape, context, kv_bits, activations),
        },
        "working": {"stack": STACK_BYTES},
    }
    if soc.no_rv32:
        raise PlanError(f"{soc.label} cannot run a program for RV32 cores: {soc.no_rv32}. Take --soc siracusa")
    memories = {role: soc.with_role(role)[0] for role in held if soc.with_role(role)}
    faults = [f"no memory has the role {role}" for role in held if role not in memories]
    for role, may in (("weights", "x"), ("tiles", "w"), ("working", "w")):
        if role not in memories:
            continue
        memory = memories[role]
        if memory.first_address is None:
            faults.append(f"memories.{memory.name} has no address and access")
        elif may not in memory.access:
            faults.append(f"memories.{memory.name} has access '{memory.access}', without the {may} that {role} need")
    if faults:
        raise PlanError(
            f"{soc.label} cannot hold a program as its file stands: {'; '.join(faults)}. Add them to a copy of the "
            "file (hardware/socs/SCHEMA.md), or take --soc siracusa"
        )
    first, second, third = (_use(memories[role], parts) for role, parts in held.items())
    return first, second, third


def _use(memory: Memory, parts: dict[str, int]) -> Use:
    name, address = re.sub(r"\W", "_", memory.name), memory.first_address
    assert address is not None
    return Use(name, address, memory.access, memory.capacity_bytes - memory.reserved_bytes, parts)


def does_not_fit(uses: tuple[Use, ...]) -> str:
    """What is missing where, in one line; empty where all fits."""
    short = [
        f"{use.name} would hold {use.nbytes:,} of {use.capacity:,} bytes, {size_text(use.missing)} too much"
        for use in uses
        if use.missing
    ]
    return "; ".join(short)


def linker_script(uses: tuple[Use, Use, Use], chip: str) -> str:
    """A script for GNU ld and lld that puts code, constants and weights in the first memory, and so on."""
    regions = [f"    {u.name} ({u.access}) : ORIGIN = {u.address:#x}, LENGTH = {u.capacity}" for u in uses]
    constant, tiles, working = (use.name for use in uses)
    return "\n".join(
        [
            f"/* The memories of {chip}, from its file. What does not fit is an error of the linker. */",
            "ENTRY(_start)",
            "MEMORY {",
            *regions,
            "}",
            "SECTIONS {",
            f"    .text : {{ *(.text.start) *(.text .text.* .rodata .rodata.* .srodata .srodata.*) }} > {constant}",
            f"    .tables : {{ . = ALIGN(4); *(.tables) }} > {constant}",
            f"    .weights : {{ *(.weights) }} > {constant}",
            f"    .kv (NOLOAD) : {{ *(.bss.kv) }} > {tiles}",
            f"    .bss (NOLOAD) : {{ *(.bss .bss.* .sbss .sbss.* COMMON) }} > {tiles}",
            f"    .stack (NOLOAD) : {{ . = . + {STACK_BYTES}; }} > {working}",
            f"    __stack_top = ORIGIN({working}) + LENGTH({working});",
            "    /* Initial values would have to be copied at the start: the program has none. */",
            "    .data : { *(.data .data.* .sdata .sdata.*) }",
            '    ASSERT(SIZEOF(.data) == 0, "the program has variables with initial values")',
            "    /DISCARD/ : { *(.comment) *(.note*) *(.riscv.attributes) *(.eh_frame*) }",
            "}",
            "",
        ]
    )
