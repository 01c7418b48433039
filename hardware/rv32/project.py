"""The text files of an exported program: model.h, model.c, Makefile; and the C sources beside them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from edgepress.checkpoints.config import setting, tied
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.hardware.rv32.build import FLAGS, GCC, ZIG
from edgepress.hardware.rv32.layout import EMBEDDING, FINAL_NORM, HEAD, LINEARS, NORMS, Layout, outer_dtype
from edgepress.hardware.rv32.memory import inner, rank

SOURCES = ("runtime.h", "runtime.c", "main.c", "start.S")


@dataclass(frozen=True)
class Run:
    """What the program does when it starts."""

    prompt: Sequence[int]  # tokens, at least one
    new_tokens: int
    ends: Sequence[int]  # tokens after which it stops
    context: int


def sources() -> dict[str, bytes]:
    """The files that are the same for every model."""
    folder = files("edgepress.hardware.rv32.runtime")
    return {name: (folder / name).read_bytes() for name in SOURCES}


def model_header(shape: ModelShape, layout: Layout, run: Run) -> str:
    """The sizes of the model as macros, and the names of the tables in model.c."""
    numbers = {
        "LAYERS": len(shape.blocks),
        "HIDDEN": shape.hidden_size,
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "HEAD_DIM": shape.head_dim,
        "INTERMEDIATE": inner(shape),
        "VOCABULARY": shape.vocabulary,
        "CONTEXT": run.context,
        "RANK": rank(shape),
        "PROMPT_TOKENS": len(run.prompt),
        "NEW_TOKENS": run.new_tokens,
        "END_TOKENS": len(run.ends),
        "FINAL_NORM": f"{layout.offset(FINAL_NORM)}u",
        "PIECE_STARTS": f"{layout.offset('piece_starts')}u",
        "PIECES": f"{layout.offset('pieces')}u",
        "EPSILON": _number(float(setting(shape.config, "rms_norm_eps"))),
    }
    return "\n".join(
        [
            "/* Written by `compress export`: the sizes of one model, and where its parts lie in weights.bin. */",
            "",
            "#ifndef MODEL_H",
            "#define MODEL_H",
            "",
            '#include "runtime.h"',
            "",
            *(f"#define {name} {value}" for name, value in numbers.items()),
            "",
            "extern const struct linear LINEARS[LAYERS][7];  /* q k v o gate up down */",
            "extern const unsigned NORMS[LAYERS][2];         /* before attention, before the feed-forward */",
            "extern const struct matrix EMBEDDING, HEAD;",
            "extern const float FREQUENCIES[HEAD_DIM / 2];   /* radians a position, of each rotated pair */",
            "extern const int PROMPT[PROMPT_TOKENS], ENDS[END_TOKENS + !END_TOKENS];",
            "",
            "#endif",
            "",
        ]
    )


def model_source(shape: ModelShape, layout: Layout, run: Run, frequencies: Sequence[float]) -> str:
    """The tables. frequencies: radians a position for each of the head_dim / 2 rotated pairs."""
    lines = [
        "/* Written by `compress export`: the tables of one model. */",
        "",
        '#include "model.h"',
        "",
        '#define TABLE __attribute__((section(".tables")))',
        "",
        "const struct linear LINEARS[LAYERS][7] TABLE = {",
    ]
    for index, block in enumerate(shape.blocks):
        by_name = {x.name: x for x in block.linears}
        lines.append("    {")
        lines += [f"        {_linear(by_name[name], f'{index}.{name}', layout)},  /* {name} */" for name in LINEARS]
        lines.append("    },")
    norms = ", ".join(
        "{" + ", ".join(str(layout.offset(f"{k}.{name}")) for name in NORMS) + "}" for k in range(len(shape.blocks))
    )
    head = EMBEDDING if tied(shape.config) else HEAD
    lines += [
        "};",
        f"const unsigned NORMS[LAYERS][2] TABLE = {{{norms}}};",
        f"const struct matrix EMBEDDING TABLE = {_matrix(shape, EMBEDDING, layout)};",
        f"const struct matrix HEAD TABLE = {_matrix(shape, head, layout)};",
        f"const float FREQUENCIES[HEAD_DIM / 2] TABLE = {{{', '.join(map(_number, frequencies))}}};",
        f"const int PROMPT[PROMPT_TOKENS] TABLE = {{{', '.join(map(str, run.prompt))}}};",
        f"const int ENDS[END_TOKENS + !END_TOKENS] TABLE = {{{', '.join(map(str, run.ends or [-1]))}}};",
        "",
    ]
    return "\n".join(lines)


def _linear(x: LinearShape, name: str, layout: Layout) -> str:
    form, group = x.dtype, x.in_features
    if isinstance(x.grid, Grid):
        form = f"Q{x.grid.bits}"
        group = x.in_features if x.grid.group == -1 else x.grid.group
    adapter = ("I8" if x.adapter_packed else x.adapter_dtype) if x.adapter_rank else "F32"
    stored = ", ".join(str(layout.offset(f"{name}.{kind}")) for kind in ("codes", "scales", "zeros", "bias"))
    beside = ", ".join(str(layout.offset(f"{name}.{kind}")) for kind in ("a", "b", "rank_scales"))
    return f"{{{x.out_features}, {x.in_features}, {form}, {group}, {stored}, {x.adapter_rank}, {adapter}, {beside}}}"


def _matrix(shape: ModelShape, name: str, layout: Layout) -> str:
    form = outer_dtype(shape, name) if shape.embedding_bits is None else f"U{shape.embedding_bits}"
    return f"{{{form}, {', '.join(str(layout.offset(f'{name}.{k}')) for k in ('codes', 'scales', 'minimum'))}}}"


def _number(value: float) -> str:
    """A float as C has it, exactly."""
    return f"{value.hex()}f"


def makefile() -> str:
    """The targets chip.elf, run and check, with the compiler that `build.find_compiler` would find."""
    return "\n".join(
        [
            "# Written by `compress export`. make run prints what the program writes, make check compares its tokens.",
            "# The compiler is Debian's gcc where it is installed, else clang as PyPI has it.",
            "PYTHON = python3",
            "ifneq ($(shell command -v riscv64-unknown-elf-gcc),)",
            f"COMPILE = riscv64-unknown-elf-gcc {' '.join(GCC)}",
            "else",
            f"COMPILE = $(PYTHON) -m ziglang cc {' '.join(ZIG)}",
            "endif",
            f"CFLAGS = {' '.join(FLAGS)}",
            "SIMULATE = $(PYTHON) -m edgepress.hardware.rv32.simulator",
            "",
            "chip.elf: runtime.c main.c model.c start.S model.h runtime.h weights.bin link.ld",
            "\t$(COMPILE) $(CFLAGS) -T link.ld runtime.c main.c model.c start.S -o $@",
            "",
            "run: chip.elf",
            "\t$(SIMULATE) .",
            "",
            "check: chip.elf",
            "\t$(SIMULATE) . --check",
            "",
            ".PHONY: run check",
            "",
        ]
    )
