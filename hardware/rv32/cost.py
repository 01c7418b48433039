"""How many instructions a token takes on one RV32 core, and the program's bytes of code, told from the shape. No torch.

An operator's instructions are a sum of counts times constants: of a linear layer its weights, groups and rows, of
attention the cached numbers it reads, and so on. The constants are fitted on counts of simulated programs
(`python -m benchmarks.rv32_counts --write`), with clang of the package ziglang.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

from edgepress.checkpoints.config import rotary_width
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.hardware.rv32.build import compilers
from edgepress.hardware.rv32.families import (
    Layer,
    activation,
    branches_are_buffered,
    family_of,
    layers,
    norms,
    rooms,
    rope_kinds,
    rope_sets,
)
from edgepress.hardware.rv32.layout import EMBEDDING, CodeForm, code_form, is_ordered, matrices, most_ordered
from edgepress.hardware.rv32.memory import abreast, chunk, head_is_rounded
from edgepress.hardware.rv32.project import Run, adapter_format, formats, linear_format, matrix_format

CONSTANTS = "instructions.toml"
_SPARE = 512  # bytes of code for what no model of the benchmark had
Amounts = dict[str, float]
Counts = dict[str, Amounts]  # by operator: how often a token does what, on average


def instructions(shape: ModelShape, run: Run) -> dict[str, float]:
    """Instructions a token by operator, the mean over the tokens that a run feeds if nothing ends it."""
    known = constants("instructions")
    return {
        name: sum(known.get(what, 0.0) * count for what, count in counts.items())
        for name, counts in token_counts(shape, run).items()
    }


def code_bytes(shape: ModelShape, run: Run, compiler: str = "") -> int:
    """An upper end of the program's code in bytes. compiler: gcc or clang; else what would be taken here, or clang."""
    compiler = compiler or next(iter(compilers()), "clang")
    known = constants("code gcc" if compiler == "gcc" else "code")
    found = sum(known.get(what, 0.0) * count for what, count in code_parts(shape, run).items())
    return 4 * round((found + known["most over"] + _SPARE) / 4)


@cache
def constants(table: str) -> dict[str, float]:
    """Instructions, or bytes of code, for one of each of what is counted here."""
    text = (files("edgepress.hardware.rv32") / CONSTANTS).read_text()
    return {name: float(value) for name, value in tomllib.loads(text)[table].items()}


def token_counts(shape: ModelShape, run: Run) -> Counts:
    """What the constants are multiplied by. The operators' names are the simulator's."""
    fed, blocks = fed_tokens(run), len(shape.blocks)
    found: Counts = {}
    for block in shape.blocks:
        own = layers(shape, block)
        for layer in own:
            sums = found.setdefault(f"linear {layer.role}", {})
            made = any(_is_made(shape, other, layer) for other in own)
            for what, count in _linear(shape, layer.shape, run, made).items():
                sums[what] = sums.get(what, 0.0) + count
            if is_ordered(shape, layer.shape):
                sums = found.setdefault("order of inputs", {"ordered": 0.0})
                sums["ordered"] += layer.shape.in_features
    found["attention"] = _attention(shape, run)
    if run.kv_bits < 32:
        heads = 2 * blocks * shape.kv_heads
        found["KV cache"] = {"kept head": heads, "kept channel": heads * shape.head_dim}
    found["norm"] = _norms(shape, run.new_tokens / fed)
    pairs = rotary_width(shape.config) // 2
    turned = sum(number >= 0 for number in rope_sets(shape) or [0] * blocks) * (shape.heads + shape.kv_heads)
    angles = len(rope_kinds(shape)) * pairs
    found["rotary"] = {"rotary head": turned, "rotary pair": turned * pairs, "angle": angles}
    found["activation"] = _activation(shape)
    form = matrix_format(shape, EMBEDDING)
    found["embedding"] = {"embedding": 1, f"{form} embedded": shape.hidden_size}
    found["head"] = _head(shape, run, run.new_tokens / fed)
    found["other"] = {"token": 1, "block": blocks}
    if branches_are_buffered(shape):
        found["other"]["branch channel"] = 2 * blocks * shape.hidden_size
    return found


def fed_tokens(run: Run) -> int:
    """Tokens that a run feeds if nothing ends it: the last one made is not fed."""
    return len(run.prompt) + run.new_tokens - 1


def _is_made(shape: ModelShape, before: Layer, layer: Layer) -> bool:
    """Whether a layer takes what the one before it made of the same inputs: their codes lie alike."""
    own, other = layer.shape, before.shape
    if {"k": "q", "v": "k", "gate": "up"}.get(layer.role) != before.role or is_ordered(shape, own):
        return False
    return isinstance(own.grid, Grid) and own.grid == other.grid and code_form(shape, own) == code_form(shape, other)


def _linear(shape: ModelShape, x: LinearShape, run: Run, made: bool = False) -> Amounts:
    """made: what is made of the inputs before they are multiplied lies there."""
    codes, form = code_form(shape, x), _product(linear_format(shape, x), run)
    found: Amounts = {f"{form} layer": 1, f"{form} row": x.out_features, f"{form} weight": x.weights}
    if codes.of:
        kind, own = _listed(codes, run), _product(codes.dtype or f"Q{codes.bits}", run)
        found = {
            f"{kind} layer": 1,
            f"{kind} row": x.out_features,
            f"{kind} set": x.weights // codes.of,
            f"{own} {kind} weight": x.weights // codes.of * codes.kept,
        }
        if codes.tabled:
            found[f"{kind} number"] = 0 if made else codes.prepared(x.in_features)
        if isinstance(x.grid, Grid):
            found[f"{kind} group"] = x.out_features * x.grid.groups(x.in_features)
    elif isinstance(x.grid, Grid):
        found[f"{form} column"] = 0 if made else x.in_features  # of which products are prepared, once for all rows
        found[f"{form} group"] = x.out_features * x.grid.groups(x.in_features)
        if run.activations == "int8":
            found[f"{form} chunk"] = x.out_features * (x.in_features // chunk(x.grid.bits, x.in_features, x.grid.group))
    if x.bias:
        found["bias"] = x.out_features
    if x.adapter_rank:
        own = adapter_format(x)
        found[f"{own} adapter row"] = x.adapter_rank + x.out_features
        found[f"{own} adapter weight"] = x.adapter_rank * (x.in_features + x.out_features)
    return found


def _listed(form: CodeForm, run: Run) -> str:
    """How a matrix without its zeros is multiplied."""
    kind = "tabled" if form.tabled else "gathered"
    return f"{kind} numbers" if form.dtype else _product("Q", run).replace("Q", kind)


def _product(form: str, run: Run) -> str:
    """What codes are multiplied by has its own constants."""
    return f"int8 {form}" if run.activations == "int8" and form[0] in "QU" else form


def _attention(shape: ModelShape, run: Run) -> Amounts:
    """A token reads the keys and values of itself and of those before it that its block's cache still has."""
    fed, blocks, form = fed_tokens(run), len(shape.blocks), f"kv{run.kv_bits}"
    seen = sum(min(position + 1, room) for room in rooms(shape, run.context) for position in range(fed)) / fed
    found: Amounts = {
        f"{form} attention head": blocks * shape.heads,
        f"{form} attention channel": blocks * shape.heads * shape.head_dim,
        f"{form} seen": shape.heads * seen,
        f"{form} seen channel": shape.heads * seen * shape.head_dim,
        f"{form} read channel": shape.heads // abreast(shape) * seen * shape.head_dim,
    }
    if family_of(shape).capped and shape.config.get("attn_logit_softcapping"):
        found["capped seen"] = shape.heads * seen
    return found


def _norms(shape: ModelShape, with_head: float) -> Amounts:
    kind = "centred" if family_of(shape).centred else "norm"
    calls, channels = with_head, with_head * shape.hidden_size
    for block in shape.blocks:
        for name, weight in norms(shape, block).items():
            heads = {"Q_NORM": shape.heads, "K_NORM": shape.kv_heads}.get(name, 1)
            wide = heads * shape.head_dim if name in ("Q_NORM", "K_NORM") else shape.hidden_size
            calls += 1 if weight.shape == (wide,) else heads
            channels += wide
    return {f"{kind} call": calls, f"{kind} channel": channels}


def _activation(shape: ModelShape) -> Amounts:
    found = [x for block in shape.blocks for x in layers(shape, block) if x.role == "up"]
    gated = " gated" if any(x.role == "gate" for x in layers(shape, shape.blocks[0])) else ""
    channels = sum(x.shape.out_features for x in found)
    return {f"activation{gated}": len(found), f"{activation(shape.config)} channel": channels}


def _head(shape: ModelShape, run: Run, with_head: float) -> Amounts:
    form, rows = matrix_format(shape, matrices(shape)[-1]), with_head * shape.vocabulary
    rounded = run.activations == "int8" and head_is_rounded(shape)
    form = _product(form, run) if rounded else form
    found = {f"{form} head row": rows, f"{form} head weight": rows * shape.hidden_size}
    return found | ({f"{form} head column": with_head * shape.hidden_size} if rounded else {})


def code_parts(shape: ModelShape, run: Run) -> Amounts:
    """What the program has code for; what a model has not is not compiled."""
    family, first = family_of(shape), shape.blocks[0]
    linears = [x for block in shape.blocks for x in block.linears]
    parts: Amounts = {"program": 1, f"kv{run.kv_bits}": 1, activation(shape.config): 1}
    parts |= {name if name[0] == "U" else _product(name, run): 1 for name in formats(shape) if "_" not in name}
    if run.activations == "int8" and head_is_rounded(shape):
        parts[f"int8 U{shape.embedding_bits} head"] = 1
    listed = {code_form(shape, x) for x in linears}
    for form in (form for form in listed if form.of):
        kind, sets = _listed(form, run), form.unit // form.of
        own = _product(form.dtype or f"Q{form.bits}", run)
        more = {kind: 1, f"{kind} sets": sets, f"{own} {kind} kept": sets * form.kept}
        more |= {"table": len(form.sets) * form.kept} if form.tabled else {}
        parts |= {name: parts.get(name, 0) + count for name, count in more.items()}
    parts |= {
        "adapter": any(x.adapter_rank for x in linears),
        "short heads": shape.head_dim <= 16,  # which compilers unroll
        "abreast": abreast(shape) - 1,
        "norms": len(norms(shape, first)),
        "branches": branches_are_buffered(shape),
        "capped": family.capped,
        "ordered": most_ordered(shape) > 0,
        "centred": family.centred,
        "ring": min(rooms(shape, run.context)) < run.context,
    }
    return {name: float(count) for name, count in parts.items() if count}
