"""Instructions a token on a simulated RV32 core, counted and estimated; with --write the estimate's constants anew.

Programs with random weights are made from shapes alone. The constants of hardware/rv32/instructions.toml are fitted
(least squares of relative errors, none negative) on those of MODELS; those of OTHERS, of other sizes and families, tell
how far the estimate is off. The bytes of code are fitted on all. `python -m benchmarks.rv32_counts [--write]`, about a
minute of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from edgepress.checkpoints.config import rotary_width
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import LinearShape, ModelShape, Pattern
from edgepress.hardware.rv32 import cost
from edgepress.hardware.rv32.build import build, compilers, find_compiler
from edgepress.hardware.rv32.elf import read_elf
from edgepress.hardware.rv32.families import Rope, layers, numbers_of, rope_kinds
from edgepress.hardware.rv32.layout import Layout, code_form
from edgepress.hardware.rv32.memory import LINEAR_BYTES, linker_script, memory_use, table_bytes
from edgepress.hardware.rv32.project import Run, model_header, model_source, sources
from edgepress.hardware.rv32.rows import encode, encode_numbers
from edgepress.hardware.rv32.simulator import Outcome, simulate
from edgepress.hardware.soc import load_soc

CONSTANTS = Path(cost.__file__).parent / cost.CONSTANTS


@dataclass(frozen=True)
class Case:
    """A model and how its weights are stored."""

    name: str
    config: dict[str, Any]
    grid: Grid | None = None
    dtype: str = "F32"
    embedding_bits: int | None = None
    kv_bits: int = 32
    activations: str = "float"
    linear: dict[str, Any] = field(default_factory=dict)  # further fields of every linear layer
    new: int = 4

    def shape(self) -> ModelShape:
        shape = shape_from_config(self.config)
        fields: dict[str, Any] = {"grid": self.grid, "dtype": self.dtype, **self.linear}
        blocks = tuple(replace(b, linears=tuple(replace(x, **fields) for x in b.linears)) for b in shape.blocks)
        outer = tuple(replace(t, dtype=self.dtype) for t in shape.outer)
        return replace(shape, blocks=blocks, outer=outer, embedding_bits=self.embedding_bits)

    def run(self) -> Run:
        return Run(range(1, 5), self.new, [], 64, self.kv_bits, self.activations)


def llama(hidden: int, inner: int, heads: int, kv: int, vocabulary: int = 256, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv, "vocab_size": vocabulary, "max_position_embeddings": 256}
    defaults = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "float32", "hidden_act": "silu"}
    return {"model_type": "llama", **sizes, **defaults, **more}


SMALL, WIDE, THIRD = llama(64, 128, 4, 2, 400), llama(128, 192, 4, 4, 160), llama(96, 256, 6, 2)
_GEMMA = {"query_pre_attn_scalar": 16, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 16, "head_dim": 16}
_GEMMA |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _models() -> Iterator[Case]:
    for bits in (2, 3, 4, 8):
        yield Case(f"{bits} bit, group 32", SMALL, Grid(bits, 32))
        edge = 8 if bits > 3 else 4
        yield Case(f"{bits} bit, one group a row", WIDE, Grid(bits, -1), embedding_bits=edge, new=12)
        yield Case(
            f"{bits} bit, adapter of 8", THIRD, Grid(bits, 32), linear={"adapter_rank": 4, "adapter_packed": True}
        )
    for bits in (2, 3, 4, 8):
        yield Case(f"int8, {bits} bit, group 32", SMALL, Grid(bits, 32), activations="int8")
        edge = 8 if bits > 3 else 4
        whole = Case(f"int8, {bits} bit, one group a row", WIDE, Grid(bits, -1), embedding_bits=edge, new=12)
        yield replace(whole, activations="int8")
        small = Case(f"int8, {bits} bit, small head", SMALL, Grid(bits, 64), embedding_bits=edge, new=12)
        yield replace(small, activations="int8")
    for bits, pattern in [(b, p) for p in ("2:4", "4:8") for b in (2, 3, 4, 8)] + [(8, "1:8"), (4, "1:4"), (4, "2:8")]:
        left_out = {"pattern": Pattern.parse(pattern)}
        yield Case(f"{bits} bit, {pattern}", SMALL, Grid(bits, 32), linear=left_out)
        yield Case(f"{bits} bit, {pattern}, one group a row", WIDE, Grid(bits, -1), linear=left_out)
        yield Case(f"int8, {bits} bit, {pattern}", SMALL, Grid(bits, 32), linear=left_out, activations="int8")
        whole = Case(f"int8, {bits} bit, {pattern}, one group a row", WIDE, Grid(bits, -1), linear=left_out)
        yield replace(whole, activations="int8")
    for dtype, pattern in [(d, p) for d in ("F32", "F16", "BF16") for p in ("2:4", "4:8")] + [("F32", "1:8")]:
        for name, config in (("", SMALL), (", wide", WIDE)):
            yield Case(f"{dtype}, {pattern}{name}", config, dtype=dtype, linear={"pattern": Pattern.parse(pattern)})
    for dtype in ("F32", "F16", "BF16"):
        yield Case(f"dense {dtype}", SMALL, dtype=dtype)
        yield Case(f"dense {dtype}, wide", WIDE, dtype=dtype, new=12)
        beside = {"adapter_rank": 8, "adapter_dtype": dtype}
        yield Case(f"4 bit, adapter {dtype}", SMALL, Grid(4, 32), dtype, embedding_bits=8, linear=beside)
        yield Case(f"4 bit, wider adapter {dtype}", THIRD, Grid(4, 32), dtype, embedding_bits=8, linear=beside)
    for act in ("gelu", "gelu_pytorch_tanh", "relu", "relu2"):
        yield Case(act, SMALL | {"hidden_act": act}, Grid(4, 32))
    for kv_bits in (8, 32):
        yield Case(f"heads of 8, {kv_bits} bit cache", llama(64, 128, 8, 4), Grid(4, 32), kv_bits=kv_bits, new=16)
    for name, more in (("small", SMALL), ("wide", WIDE)):
        yield Case(f"8 bit cache, {name}", more, Grid(4, 32), kv_bits=8)
        yield Case(f"8 bit cache, {name}, longer", more, Grid(4, 32), kv_bits=8, new=16)
        yield Case(f"gemma2, {name}", more | _GEMMA | {"model_type": "gemma2"}, Grid(4, 32))
        cohere = {"model_type": "cohere", "layer_norm_eps": 1e-5, "logit_scale": 0.1, "use_qk_norm": False}
        yield Case(f"cohere, {name}", more | cohere, Grid(4, 32))
        yield Case(f"desc_act, {name}", more | {"quantization_config": {"desc_act": True}}, Grid(4, 32))
        yield Case(f"biases, {name}", more | {"attention_bias": True, "mlp_bias": True}, Grid(4, 32))


MODELS = [*_models()]
OTHERS = [
    Case("stories260k, dense", PRESETS["stories260k"] | {"rms_norm_eps": 1e-5}),
    Case(
        "stories260k, padded, 4 bit, adapter",
        PRESETS["stories260k"] | {"rms_norm_eps": 1e-5, "intermediate_size": 192}, Grid(4, 32), embedding_bits=8,
        linear={"adapter_rank": 4, "adapter_packed": True}, new=16,
    ),
    Case(
        "the same, int8",
        PRESETS["stories260k"] | {"rms_norm_eps": 1e-5, "intermediate_size": 192}, Grid(4, 32), embedding_bits=8,
        linear={"adapter_rank": 4, "adapter_packed": True}, activations="int8", new=16,
    ),
    Case("llama, 4 bit, 2:4", llama(192, 384, 6, 3, 300), Grid(4, 64), linear={"pattern": Pattern(2, 4)}),
    Case("2:4, int8", llama(192, 384, 6, 3, 300), Grid(4, 64), linear={"pattern": Pattern(2, 4)}, activations="int8"),
    Case("llama, bfloat16, 2:4", llama(192, 384, 6, 3, 300), dtype="BF16", linear={"pattern": Pattern(2, 4)}),
    Case("llama, 3 bit, 8-bit cache", llama(192, 512, 6, 3, 1000), Grid(3, 64), embedding_bits=8, kv_bits=8),
    Case("qwen3, 8 bit", llama(128, 384, 4, 2, 600, model_type="qwen3", head_dim=32), Grid(8, 128), embedding_bits=4),
    Case("gemma2, 4 bit", llama(128, 320, 8, 8, 400) | _GEMMA | {"model_type": "gemma2"}, Grid(4, 32, True)),
    Case("the same, int8, 8 bit", llama(128, 320, 8, 8, 400) | _GEMMA | {"model_type": "gemma2"}, Grid(8, 64),
         embedding_bits=4, activations="int8"),
    Case("mistral, bfloat16", llama(64, 224, 4, 1, 300, model_type="mistral", sliding_window=12), dtype="BF16"),
]  # fmt: skip


def measured(
    case: Case, folder: Path, change: Callable[[Path], None] | None = None, context: int = 64, prompt: int = 4,
    compiler: list[str] | None = None,
) -> Outcome:  # fmt: skip
    """What the program of a model with random weights takes. change: done to its files before they are built.

    compiler: clang where it is installed if none is given.
    """
    shape = case.shape()
    run = replace(case.run(), context=context, prompt=range(1, 1 + prompt))
    layout = Layout(shape, 0)
    dice = np.random.default_rng(1)
    contents = {name: _random(name, part.nbytes, case, dice) for name, part in layout.parts.items()}
    for index, block in enumerate(shape.blocks):
        for x in layers(shape, block):
            if case.grid:
                contents[f"{index}.{x.name}.codes"] = _codes(shape, x.shape, dice)
            elif code_form(shape, x.shape).of:
                contents[f"{index}.{x.name}.codes"] = _numbers(shape, x.shape, dice)
    tables = table_bytes(shape, len(run.prompt), len(run.ends), run.context)
    uses = memory_use(
        shape, load_soc("siracusa"), layout.nbytes, tables, run.context, run.kv_bits, activations=run.activations
    )
    numbers = numbers_of(shape, {"rope_parameters": None, **shape.config}, run.context)
    pairs = rotary_width(shape.config) // 2
    ropes = [Rope([10000.0 ** (-i / pairs) for i in range(pairs)], 1.0) for _ in rope_kinds(shape)]
    roles = [layer.role for layer in layers(shape, shape.blocks[0])]
    facts = {"memories": [use.to_dict() for use in uses], "linears": {"roles": roles, "bytes": LINEAR_BYTES}}
    files = {
        **sources(),
        "weights.bin": layout.joined(contents),
        "model.h": model_header(shape, layout, run, numbers, ropes).encode(),
        "model.c": model_source(shape, layout, run, ropes).encode(),
        "link.ld": linker_script(uses, "a benchmark").encode(),
        "memory.json": json.dumps(facts).encode(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if change is not None:
        change(folder)
    build(folder, compiler or compilers().get("clang") or find_compiler())
    return simulate(folder)


def _codes(shape: ModelShape, x: LinearShape, dice: np.random.Generator) -> bytes:
    assert isinstance(x.grid, Grid)
    sides = x.out_features, x.grid.groups(x.in_features)
    codes, zeros = (dice.integers(0, 2**x.grid.bits - 1, size, np.uint8) for size in ((sides[0], x.in_features), sides))
    scales = dice.uniform(0.01, 0.02, sides).astype(np.float16)
    form = code_form(shape, x)
    if form.of:
        points = np.full(sides, 2 ** (x.grid.bits - 1)) if x.grid.symmetric else zeros + 1
        gone = np.arange(x.in_features) % form.of < form.of - form.kept
        codes = np.where(gone, points.repeat(x.in_features // sides[1], 1), codes)
    return encode(form, codes, scales, None if x.grid.symmetric else zeros)


def _numbers(shape: ModelShape, x: LinearShape, dice: np.random.Generator) -> bytes:
    form, numbers = code_form(shape, x), dice.normal(0, 0.3, (x.out_features, x.in_features)).astype(np.float32)
    numbers[:, np.arange(x.in_features) % form.of < form.of - form.kept] = 0
    if x.dtype == "F32":
        return encode_numbers(form, numbers.view(np.uint32))
    halves = numbers.astype(np.float16).view(np.uint16)
    return encode_numbers(form, halves if x.dtype == "F16" else (numbers.view(np.uint32) >> 16).astype(np.uint16))


def _random(name: str, nbytes: int, case: Case, dice: np.random.Generator) -> bytes:
    kind = name.rpartition(".")[2]
    if kind in ("piece_starts", "pieces", "order"):
        return bytes(nbytes)
    if kind in ("scales", "minimum"):
        return dice.uniform(0.01, 0.02, nbytes // 2).astype(np.float16).tobytes()
    outer = name.startswith(("model.embed_tokens", "lm_head"))
    if (kind == "codes" and outer and case.embedding_bits) or (kind in "ab" and case.linear.get("adapter_packed")):
        return dice.integers(0, 256, nbytes, np.uint8).tobytes()
    form = case.linear.get("adapter_dtype", "F32") if kind in "ab" else case.dtype if kind == "codes" else "F32"
    numbers = dice.normal(0, 0.3, nbytes // (4 if form == "F32" else 2)).astype(np.float32)
    if form == "F16":
        return numbers.astype(np.float16).tobytes()
    return numbers.tobytes() if form == "F32" else (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def fitted(outcomes: dict[str, Outcome]) -> dict[str, float]:
    """The constants for which the models' operators are least off, each relative to its own count."""
    rows: list[dict[str, float]] = []
    for case in MODELS:
        outcome = outcomes[case.name]
        for operator, counts in cost.token_counts(case.shape(), case.run()).items():
            taken = outcome.operators.get(operator, 0) / outcome.fed
            rows += [{what: count / taken for what, count in counts.items()}] if taken else []
    return _solved(rows, [1.0] * len(rows))


def code_with_gcc(folder: Path) -> int:
    """Bytes of an exported program's code as gcc makes it."""
    return next(s.nbytes for s in read_elf(build(folder, compilers()["gcc"])).sections if s.name == ".text")


def fitted_code(sizes: dict[str, int]) -> dict[str, float]:
    """Bytes of code by what a model has, and `most over`: what the program of any of them has beyond their sum."""
    cases = [*MODELS, *OTHERS]
    rows = [cost.code_parts(case.shape(), case.run()) for case in cases]
    bytes_of = [float(sizes[case.name]) for case in cases]
    found = _solved(rows, bytes_of)
    over = [size - sum(found[name] * n for name, n in row.items()) for row, size in zip(rows, bytes_of, strict=True)]
    return found | {"most over": max(over)}


def _solved(rows: list[dict[str, float]], wanted: list[float]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row})
    matrix = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    unit = np.abs(matrix).max(axis=0)  # so that no constant is smaller than rounding
    found, _ = nnls(matrix / unit, np.array(wanted), maxiter=100 * len(names))
    return {name: float(value) for name, value in zip(names, found / unit, strict=True)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--write", action="store_true", help="fit the constants anew and write them")
    write = arguments.parse_args().write
    cases = (*(MODELS if write else ()), *OTHERS)
    if write and compilers().keys() != {"gcc", "clang"}:
        raise SystemExit(
            "the constants are those of gcc and of clang: apt-get install gcc-riscv64-unknown-elf, and "
            "pip install ziglang"
        )
    outcomes, gcc = {}, {}
    for case in cases:
        with tempfile.TemporaryDirectory() as made:
            outcomes[case.name] = measured(case, Path(made))
            gcc |= {case.name: code_with_gcc(Path(made))} if write else {}
            print(f"{case.name}: {outcomes[case.name].instructions:,} instructions", file=sys.stderr, flush=True)
    if write:
        text = "# Instructions, and bytes of code, for one of each; by `python -m benchmarks.rv32_counts --write`.\n"
        clang = {name: outcome.sections[".text"] for name, outcome in outcomes.items()}
        tables = {"instructions": fitted(outcomes), "code": fitted_code(clang), "code gcc": fitted_code(gcc)}
        for table, found in tables.items():
            lines = [f'"{name}" = {value:.4g}' for name, value in found.items() if value]
            text += "\n".join([f'["{table}"]' if " " in table else f"[{table}]", *lines, ""])
        CONSTANTS.write_text(text)
        cost.constants.cache_clear()
    print(f"{'model':<38}{'counted':>12}{'estimated':>12}{'off':>8}{'code':>7}{'at most':>8}  worst operator")
    used = "clang" if "clang" in compilers() else "gcc"
    for case in cases:
        outcome, guess = outcomes[case.name], cost.instructions(case.shape(), case.run())
        counted = {name: taken / outcome.fed for name, taken in outcome.operators.items()}
        large = {n: guess.get(n, 0.0) / x - 1 for n, x in counted.items() if x > 0.02 * sum(counted.values())}
        worst = max(large, key=lambda name: abs(large[name]))
        total = sum(guess.values())
        print(
            f"{case.name:<38}{outcome.instructions_a_token:>12,.0f}{total:>12,.0f}"
            f"{total / outcome.instructions_a_token - 1:>8.1%}{outcome.sections['.text']:>7,}"
            f"{cost.code_bytes(case.shape(), case.run(), used):>8,}  {worst} {large[worst]:+.1%}"
        )


if __name__ == "__main__":
    main()
