"""The text files of an exported program: model.h, model.c, Makefile; and the C sources beside them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate

from edgepress.checkpoints.config import rotary_width, tied
from edgepress.checkpoints.forms import Grid, TensorShape
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.hardware.orders import order_of
from edgepress.hardware.rv32.build import FLAGS, GCC, INPUTS, ZIG
from edgepress.hardware.rv32.families import (
    Layer,
    Numbers,
    Rope,
    activation,
    branches_are_buffered,
    family_of,
    layers,
    norms,
    rooms,
    rope_sets,
)
from edgepress.hardware.rv32.layout import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    CodeForm,
    Layout,
    code_form,
    matrices,
    most_ordered,
    outer_dtype,
    shared,
)
from edgepress.hardware.rv32.memory import head_is_rounded, inner, input_words, most_groups, prepared, rank
from edgepress.hardware.rv32.simulator import AUTO, SIMULATORS

HEADERS = ("runtime.h", "numbers.h", "products.h")


@dataclass(frozen=True)
class Run:
    """What the program does when it starts."""

    prompt: Sequence[int]  # tokens, at least one
    new_tokens: int
    ends: Sequence[int]  # tokens after which it stops
    context: int
    kv_bits: int = 32  # of a number in the KV cache: 32, or 8 with a scale
    activations: str = "float"  # what linear layers multiply their codes by: float, or int8


def sources() -> dict[str, bytes]:
    """The files that are the same for every model."""
    folder = files("edgepress.hardware.rv32.runtime")
    return {name: (folder / name).read_bytes() for name in (*HEADERS, *INPUTS) if name != "model.c"}


def model_header(shape: ModelShape, layout: Layout, run: Run, numbers: Numbers, ropes: Sequence[Rope]) -> str:
    """The sizes of the model as macros, and the names of the tables in model.c.

    A macro for a part that the model's family has not is left out, or 0: the compiler then leaves out its code.
    """
    sizes = {
        "LAYERS": len(shape.blocks),
        "HIDDEN": shape.hidden_size,
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "HEAD_DIM": shape.head_dim,
        "INTERMEDIATE": inner(shape),
        "VOCABULARY": shape.vocabulary,
        "CONTEXT": run.context,
        "KV_BITS": run.kv_bits,
        "INPUT_BITS": 8 if run.activations == "int8" else 32,
        "RANK": rank(shape),
        "INPUT_NUMBERS": prepared(shape, run.activations),
        "GROUPS": most_groups(shape),
        "FORMATS": f"({' | '.join(f'1u << {name}' for name in formats(shape) if name[0] != 'Q' and '_' not in name)})",
        "PROMPT_TOKENS": len(run.prompt),
        "NEW_TOKENS": run.new_tokens,
        "END_TOKENS": len(run.ends),
        "FINAL_NORM": f"{layout.offset(FINAL_NORM)}u",
        "PIECE_STARTS": f"{layout.offset('piece_starts')}u",
        "PIECES": f"{layout.offset('pieces')}u",
        "EPSILON": _number(numbers.epsilon),
    }
    if run.activations == "int8":
        sizes["INPUT_WORDS"] = input_words(shape)
        sizes |= {"HEAD_BITS": str(shape.embedding_bits)} if head_is_rounded(shape) else {}
    linears, room, turns = layers(shape, shape.blocks[0]), rooms(shape, run.context), rope_sets(shape)
    tables = [
        f"extern const struct linear LINEARS[LAYERS][{len(linears)}];  /* {' '.join(x.role for x in linears)} */",
        "extern const unsigned NORMS[LAYERS][NORM_KINDS];  /* where their weights begin */",
        "extern const struct matrix EMBEDDING, HEAD;",
        "extern const float FREQUENCIES[ROPES][ROTARY / 2];  /* radians a position, of each rotated pair */",
        "extern const int PROMPT[PROMPT_TOKENS], ENDS[END_TOKENS + !END_TOKENS];",
    ]
    if len(set(room)) > 1:
        tables.append("extern const int ROOM_STARTS[LAYERS + 1];  /* the first position of each block's KV cache */")
    if ordered := most_ordered(shape):
        sizes["ORDERED"] = ordered
        tables.append(f"extern const unsigned ORDERS[LAYERS][{len(linears)}];  /* where the inputs' places lie */")
    if any(turns):
        tables.append("extern const int ROPE_SETS[LAYERS];  /* by which angles a block turns, -1 for none */")
    return "\n".join(
        [
            "/* Written by `compress export`: the sizes of one model, and where its parts lie in weights.bin. */",
            "",
            "#ifndef MODEL_H",
            "#define MODEL_H",
            "",
            '#include "runtime.h"',
            "",
            *(f"#define {name} {value}" for name, value in (sizes | _parts(shape, numbers, ropes)).items()),
            "",
            "/* A block's KV cache: its first position, a token's, and how many hold something then. */",
            *_positions(room, run.context),
            f"#define ROPE(layer) {'ROPE_SETS[layer]' if any(turns) else '0'}",
            "",
            *_grids(shape),
            *tables,
            "",
            "#endif",
            "",
        ]
    )


def _parts(shape: ModelShape, numbers: Numbers, ropes: Sequence[Rope]) -> dict[str, object]:
    """Macros for what differs between families."""
    found, family, order = norms(shape, shape.blocks[0]), family_of(shape), order_of(shape)
    parts: dict[str, object] = {kind: place for place, kind in enumerate(found)}
    parts |= {
        "NORM_KINDS": len(found),
        "CENTRED_NORMS": int(family.centred),
        "GATED": int(any(layer.role == "gate" for layer in layers(shape, shape.blocks[0]))),
        "PARALLEL": int(order.parallel),
        "BRANCH": int(branches_are_buffered(shape)),
        "ACTIVATION": f"ACT_{activation(shape.config).upper()}",
        "ROPES": len(ropes),
        "ROTARY": rotary_width(shape.config),
        "ATTENTION_SCALE": _number(numbers.attention_scale),
    }
    if "Q_NORM" in found:
        key = shape.kv_heads * shape.head_dim
        parts["Q_NORM_WIDTH"] = _norm_width(found["Q_NORM"], shape.heads * shape.head_dim, shape)
        parts["K_NORM_WIDTH"] = _norm_width(found["K_NORM"], key, shape)
        parts["OWN_HEAD_NORMS"] = int(len(found["Q_NORM"].shape) > 1)  # each head has weights of its own
        parts["ROPE_FIRST"] = int(order.rope_first)
    optional = {
        "EMBEDDING_SCALE": (numbers.embedding_scale, 1.0),
        "RESIDUAL_SCALE": (numbers.residual_scale, 1.0),
        "ATTENTION_CAP": (numbers.attention_cap, 0.0),
    }
    if any(rope.scale != 1 for rope in ropes):
        first, *others = (_number(rope.scale) for rope in ropes)
        parts["ROPE_SCALE(set)"] = f"((set) ? {others[0]} : {first})" if others else first
    return parts | {name: _number(value) for name, (value, none) in optional.items() if value != none}


def _grids(shape: ModelShape) -> list[str]:
    """The forms of the model's grids and of matrices without their zeros, for each of which a product is compiled."""
    found: dict[str, tuple[CodeForm, LinearShape]] = {}
    for x in (x for block in shape.blocks for x in block.linears):
        form = code_form(shape, x)
        if form.of or isinstance(x.grid, Grid):
            found[_c_format(shape, x)] = form, x
    if not found:
        return []
    grids, lists, numbers = [], [], []
    places: dict[str, object] = {}
    for name, (form, x) in sorted(found.items()):
        zeros = int(isinstance(x.grid, Grid) and not x.grid.symmetric)
        if form.dtype:
            numbers.append((name, f"LIST({name}, {form.dtype}, {form.kept}, {form.of})"))
        elif form.of:
            lists.append((name, f"LIST({name}, {form.bits}, {zeros}, {form.kept}, {form.of})"))
        else:
            grids.append((name, f"GRID({name}, {form.bits}, {zeros})"))
        if form.of:
            sets = ", ".join("{" + ", ".join(map(str, kept)) + "}" for kept in form.sets)
            about = {"SETS": len(form.sets), "SET_BITS": form.set_bits, "TABLED": int(form.tabled), "PLACES": sets}
            places |= {f"{what}_{form.kept}_{form.of}": value for what, value in about.items()}
    first, *others = [*(name for name, _ in (*grids, *lists)), "NUMBERS"]
    others += [f"{name} = NUMBERS" if k == 0 else name for k, (name, _) in enumerate(numbers)]

    def of(pairs: list[tuple[str, str]]) -> str:
        return " ".join(text for _, text in pairs)

    return [
        "/* Of each grid its name, the bits of a code, whether zero points lie beside the scales; in lists also how",
        " * many weights of how many are kept, in which sets of places. Lists of numbers have no grid. */",
        f"#define GRIDS(GRID) {of(grids)}",
        f"#define LISTS(LIST) {of(lists)}",
        f"#define NUMBER_LISTS(LIST) {of(numbers)}",
        f"#define LISTED {int(bool(lists))}  /* whether there are any */",
        f"#define NUMBERS_LISTED {int(bool(numbers))}",
        *(f"#define {name} {value}" for name, value in places.items()),
        f"enum grid {{ {', '.join([f'{first} = GRID', *others])} }};  /* NUMBERS: where lists of numbers begin */",
        "",
    ]


def _norm_width(norm: TensorShape, channels: int, shape: ModelShape) -> int:
    """How many channels are normed together."""
    return channels if norm.shape == (channels,) else shape.head_dim


def _positions(room: Sequence[int], context: int) -> list[str]:
    """A cache with fewer positions than the context is a ring: a token takes the place of the oldest."""
    size, start = str(room[0]), f"((layer) * {room[0]})"
    if len(set(room)) > 1:
        size, start = "(ROOM_STARTS[(layer) + 1] - ROOM_STARTS[layer])", "ROOM_STARTS[layer]"
    slot, seen = "(position)", "((position) + 1)"
    if min(room) < context:
        slot, seen = f"((position) % {size})", f"((position) < {size} ? (position) + 1 : {size})"
    return [
        f"#define MOST_ROOM {max(room)}",
        f"#define ALL_ROOM {sum(room)}",
        f"#define ROOM_START(layer) {start}",
        f"#define SLOT(layer, position) {slot}",
        f"#define SEEN(layer, position) {seen}",
    ]


def model_source(shape: ModelShape, layout: Layout, run: Run, ropes: Sequence[Rope]) -> str:
    """The tables; ropes: as many as `rope_kinds` has."""
    linears = layers(shape, shape.blocks[0])
    lines = [
        "/* Written by `compress export`: the tables of one model. */",
        "",
        '#include "model.h"',
        "",
        '#define TABLE __attribute__((section(".tables")))',
        "",
        f"const struct linear LINEARS[LAYERS][{len(linears)}] TABLE = {{",
    ]
    for index, block in enumerate(shape.blocks):
        lines.append("    {")
        lines += [f"        {_linear(shape, x, index, layout)},  /* {x.name} */" for x in layers(shape, block)]
        lines.append("    },")
    table = ", ".join(
        "{" + ", ".join(str(layout.offset(f"{k}.{kind}")) for kind in norms(shape, block)) + "}"
        for k, block in enumerate(shape.blocks)
    )
    head = EMBEDDING if tied(shape.config) else HEAD
    angles = ", ".join("{" + ", ".join(map(_number, rope.frequencies)) + "}" for rope in ropes)
    lines += [
        "};",
        f"const unsigned NORMS[LAYERS][NORM_KINDS] TABLE = {{{table}}};",
        f"const struct matrix EMBEDDING TABLE = {_matrix(shape, EMBEDDING, layout)};",
        f"const struct matrix HEAD TABLE = {_matrix(shape, head, layout)};",
        f"const float FREQUENCIES[ROPES][ROTARY / 2] TABLE = {{{angles}}};",
        f"const int PROMPT[PROMPT_TOKENS] TABLE = {{{', '.join(map(str, run.prompt))}}};",
        f"const int ENDS[END_TOKENS + !END_TOKENS] TABLE = {{{', '.join(map(str, run.ends or [-1]))}}};",
    ]
    if len(set(room := rooms(shape, run.context))) > 1:
        starts = ", ".join(map(str, accumulate(room, initial=0)))
        lines.append(f"const int ROOM_STARTS[LAYERS + 1] TABLE = {{{starts}}};")
    if most_ordered(shape):
        orders = [
            [_place(x, index, "order", layout) for x in layers(shape, block)]
            for index, block in enumerate(shape.blocks)
        ]
        table = ", ".join("{" + ", ".join(map(str, row)) + "}" for row in orders)
        lines.append(f"const unsigned ORDERS[LAYERS][{len(linears)}] TABLE = {{{table}}};")
    if any(turns := rope_sets(shape)):
        lines.append(f"const int ROPE_SETS[LAYERS] TABLE = {{{', '.join(map(str, turns))}}};")
    return "\n".join([*lines, ""])


def formats(shape: ModelShape) -> list[str]:
    """The formats of runtime.h in which this model has a matrix."""
    linears = [x for block in shape.blocks for x in block.linears]
    found = {linear_format(shape, x) for x in linears} | {adapter_format(x) for x in linears if x.adapter_rank}
    return sorted(found | {matrix_format(shape, name) for name in matrices(shape)})


def linear_format(shape: ModelShape, x: LinearShape) -> str:
    return code_form(shape, x).name


def _c_format(shape: ModelShape, x: LinearShape) -> str:
    """A symmetric grid's own code has no zero points."""
    name = linear_format(shape, x)
    return f"{name}_SYMMETRIC" if isinstance(x.grid, Grid) and x.grid.symmetric else name


def adapter_format(x: LinearShape) -> str:
    return "I8" if x.adapter_packed else x.adapter_dtype


def matrix_format(shape: ModelShape, name: str) -> str:
    return outer_dtype(shape, name) if shape.embedding_bits is None else f"U{shape.embedding_bits}"


def _linear(shape: ModelShape, layer: Layer, index: int, layout: Layout) -> str:
    x = layer.shape
    form, group = _c_format(shape, x), x.in_features
    if isinstance(x.grid, Grid) and x.grid.group != -1:
        group = x.grid.group
    adapter = adapter_format(x) if x.adapter_rank else "F32"

    def places(*kinds: str) -> str:
        return ", ".join(str(_place(layer, index, kind, layout)) for kind in kinds)

    stored, beside = places("codes", "bias"), places("a", "b", "rank_scales")
    return f"{{{x.out_features}, {x.in_features}, {form}, {group}, {stored}, {x.adapter_rank}, {adapter}, {beside}}}"


def _place(layer: Layer, index: int, kind: str, layout: Layout) -> int:
    """Where a part of a block's linear layer begins; 0 where it has none."""
    return layout.offset(f"{index}.{layer.first if kind in shared(layer) else layer.name}.{kind}")


def _matrix(shape: ModelShape, name: str, layout: Layout) -> str:
    offsets = ", ".join(str(layout.offset(f"{name}.{kind}")) for kind in ("codes", "scales", "minimum"))
    return f"{{{matrix_format(shape, name)}, {offsets}}}"


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
            f"# {', '.join(SIMULATORS)}; auto is the first that is there.",
            f"SIMULATOR = {AUTO}",
            "SIMULATE = $(PYTHON) -m edgepress.hardware.rv32.simulator --simulator $(SIMULATOR)",
            "",
            f"chip.elf: {' '.join((*INPUTS, *HEADERS))} model.h weights.bin link.ld",
            f"\t$(COMPILE) $(CFLAGS) -T link.ld {' '.join(INPUTS)} -o $@",
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
