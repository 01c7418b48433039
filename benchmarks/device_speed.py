"""Instructions a token on a simulated RV32 core: the exported program against llama2.c and against a naive loop.

`python -m benchmarks.device_speed LLAMA2C` takes a folder with llama2.c's run.c and runq.c (github: karpathy/llama2.c),
which are not part of this repository. The shape is that of stories260K with a feed-forward part padded to 192 channels,
so that runq.c's groups of 32 divide it; weights are random, as none of the programs skips any. All are built by one
compiler with the same flags, and each is counted over the same positions with the logits of every token; what a program
does before its first token is not counted. From llama2.c come the functions up to `forward`, with memory from an array.
Its fabs and round become float operations here, which is in its favour: a core without doubles would call a library.
About a minute of one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.rv32_counts import Case, measured
from edgepress.checkpoints.families import PRESETS
from edgepress.checkpoints.forms import Grid
from edgepress.hardware.rv32.build import build, compilers, find_compiler
from edgepress.hardware.rv32.memory import Use, linker_script
from edgepress.hardware.rv32.project import sources
from edgepress.hardware.rv32.simulator import simulate

TOKENS, CONTEXT, GROUP = 64, 256, 32
SHAPE = PRESETS["stories260k"] | {"rms_norm_eps": 1e-5, "intermediate_size": 192}
GOAL = 0.5  # of runq.c's instructions

# What llama2.c includes, as far as its functions up to `forward` go.
HEADERS = ("stdio.h", "stdlib.h", "ctype.h", "time.h", "math.h", "string.h", "fcntl.h", "unistd.h", "sys/mman.h")
# Our own sources say which products and sums are one instruction; of others a compiler decides, as it does for them.
JOINED = """
#ifdef __clang__
#pragma STDC FP_CONTRACT ON
#else
#pragma GCC optimize("fp-contract=fast")
#endif
"""
LIBRARY = r"""
#ifndef LIBRARY_H
#define LIBRARY_H
#include <stddef.h>
#include <stdint.h>
#include "numbers.h"
typedef long ssize_t;
typedef struct file FILE;
#define stderr ((FILE *)0)
static inline int abs(int n) { return n < 0 ? -n : n; }
#define EXIT_FAILURE 1
#define SEEK_END 2
#define O_RDONLY 0
#define PROT_READ 1
#define MAP_PRIVATE 2
#define MAP_FAILED ((void *)-1)
#define fprintf(...) ((void)0)
#define fopen(...) ((FILE *)0)
#define fread(...) ((size_t)0)
#define fseek(...) ((void)0)
#define ftell(...) 0
#define fclose(...) ((void)0)
#define open(...) (-1)
#define close(...) ((void)0)
#define mmap(...) MAP_FAILED
#define munmap(...) ((void)0)
#define free(pointer) ((void)(pointer))
#define exit(code) __builtin_trap()
static char memory[3 << 20] __attribute__((aligned(16)));
static size_t taken;
static inline void *malloc(size_t n) { void *p = memory + taken; taken += (n + 15) / 16 * 16; return p; }
static inline void *calloc(size_t n, size_t size) { return malloc(n * size); } /* the memory is zero at the start */
void *memcpy(void *to, const void *from, size_t n);
void *memset(void *to, int value, size_t n);
#define sqrtf __builtin_sqrtf
#define fabs __builtin_fabsf
#define expf exponential
static inline float round_to_whole(float x) { return (float)(int)(x + (x < 0.0f ? -0.5f : 0.5f)); }
#define round round_to_whole
#define powf(base, x) exponential((x) * 9.21034037f) /* the only base is 10000 */
static inline float cosf(float x) { float c, s; turn(x, &c, &s); return c; }
static inline float sinf(float x) { float c, s; turn(x, &c, &s); return s; }
#endif
"""
MAIN = r"""
static void call(unsigned number, unsigned a, unsigned b, unsigned c) {
    register unsigned a0 __asm__("a0") = a, a1 __asm__("a1") = b, a2 __asm__("a2") = c, a7 __asm__("a7") = number;
    __asm__ volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a7) : "memory");
}
extern const unsigned char weights[];
static Transformer transformer;
int main(void) {
    Config config = {@CONFIG@};
    transformer.config = config;
    @PREPARE@
    memory_map_weights(&transformer.weights, &transformer.config, (void *)weights, 1);
    malloc_run_state(&transformer.state, &transformer.config);
    int token = 1;
    for (int position = 0; position < @TOKENS@; position++) {
        float *logits = forward(&transformer, token, position);
        token = 0;
        for (int i = 1; i < config.vocab_size; i++) if (logits[i] > logits[token]) token = i;
        call(1, (unsigned)token, 0, 0);
    }
    call(2, 0, 0, 0);
    return 0;
}
"""
# Our layers, written as a first version would have them: a row after the other, each number brought to its value.
NAIVE = r"""
#include "products.h"
static float half_at(const half *at) { return from_half(*at); }
void linear(const struct linear *l, const float *x, float *y, int add, const struct linear *like) {
    (void)like;
    const int bits = 4, unit = 8; /* what it is measured with */
    word group = 12 + (word)(4 * l->group * bits / 8); /* bytes of four rows' group */
    for (int row = 0; row < l->rows; row++) {
        const byte *four = weights + l->codes + (word)(row / 4 * (l->columns / l->group)) * group;
        int r = row % 4;
        float sum = 0.0f;
        for (int i = 0; i < l->columns; i++) {
            const byte *at = four + (word)(i / l->group) * group;
            int place = i % l->group;
            word codes = ((const word *)(at + 12))[place / unit * 4 + r];
            int code = (int)(codes >> place % unit * bits & ((1u << bits) - 1));
            sum += half_at((const half *)at + r) * (float)(code - (at[8 + r] + 1)) * x[i];
        }
        y[row] = add ? y[row] + sum : sum;
    }
}
static float weight(int token, int i) {
    float code = (float)weights[EMBEDDING.codes + (word)(token * HIDDEN + i)];
    const half *scales = (const half *)(weights + EMBEDDING.scales);
    const half *least = (const half *)(weights + EMBEDDING.minimum);
    return code * half_at(scales + token) + half_at(least + token);
}
void embed(int token, float *x) {
    for (int i = 0; i < HIDDEN; i++) x[i] = weight(token, i);
}
int likeliest(const float *x) {
    float best = 0.0f;
    int found = -1;
    for (int token = 0; token < VOCABULARY; token++) {
        float logit = 0.0f;
        for (int i = 0; i < HIDDEN; i++) logit += weight(token, i) * x[i];
        if (found < 0 || logit > best) best = logit, found = token;
    }
    return found;
}
"""


def ours(compiler: list[str], bits: int, kv_bits: int = 32, naive: bool = False, activations: str = "float") -> float:
    """Instructions a token of the exported program, or of the same with naive layers."""
    case = replace(
        Case("", SHAPE, Grid(bits, GROUP), embedding_bits=8, kv_bits=kv_bits, activations=activations), new=TOKENS
    )

    def simplify(folder: Path) -> None:
        (folder / "products.c").write_text(JOINED + NAIVE)

    with tempfile.TemporaryDirectory() as made:
        change = simplify if naive else None
        return measured(case, Path(made), change, context=CONTEXT, prompt=1, compiler=compiler).instructions_a_token


def llama2c(compiler: list[str], source: Path, weights: bytes, prepare: str) -> float:
    """Instructions a token of one of llama2.c's programs, with these weights in its own order."""
    text = source.read_text()
    end = text.find("} TokenIndex;")
    if end < 0:
        raise SystemExit(f"{source} is no run.c or runq.c of llama2.c")
    functions = text[: text.rindex("typedef struct", 0, end)]
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    config = ", ".join(str(SHAPE[key]) for key in keys.split()) + f", {CONTEXT}"

    def taken(tokens: int) -> int:
        main = MAIN.replace("@CONFIG@", config).replace("@PREPARE@", prepare).replace("@TOKENS@", str(tokens))
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            write_folder(folder, JOINED + functions + main, weights)
            build(folder, [*compiler, "-I.", "-Wno-unused-function", "-Wno-unused-variable"])
            return simulate(folder).instructions

    return (taken(TOKENS) - taken(0)) / TOKENS


def write_folder(folder: Path, main: str, weights: bytes) -> None:
    """A folder like an exported one whose program is one file."""
    uses = (
        Use("MRAM", 0x10400000, "rx", 4 << 20, {"code": 0, "tables": 0, "weights": 0}),
        Use("SRAM", 0x10800000, "rw", 4 << 20, {"KV cache": 0, "activations": 0}),
        Use("L1", 0x10000000, "rw", 256 << 10, {"stack": 0}),
    )
    for name, content in sources().items():
        (folder / name).write_bytes(content if name.endswith((".S", ".h")) else b"typedef int nothing;\n")
    (folder / "sys").mkdir()
    for name in HEADERS:
        (folder / name).write_text(f'#include "{"../" if "/" in name else ""}library.h"\n')
    (folder / "library.h").write_text(LIBRARY)
    (folder / "model.c").write_text("typedef int nothing;\n")
    (folder / "main.c").write_text(main)
    (folder / "weights.bin").write_bytes(weights)
    (folder / "link.ld").write_text(linker_script(uses, "a benchmark"))
    (folder / "memory.json").write_text(json.dumps({"memories": [use.to_dict() for use in uses]}))


def tensors() -> tuple[list[int], list[int]]:
    """How many numbers the norms have, and each matrix, all layers, in runq.c's order."""
    hidden, inner, layers = (SHAPE[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    key = hidden // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    sizes = [hidden * hidden, hidden * key, hidden * key, hidden * hidden, *[hidden * inner] * 3]
    return [(2 * layers + 1) * hidden], [SHAPE["vocab_size"] * hidden, *(n for n in sizes for _ in range(layers))]


def float_weights(dice: np.random.Generator) -> bytes:
    norms, matrices = tensors()
    rotary = CONTEXT * SHAPE["hidden_size"] // SHAPE["num_attention_heads"]  # which the file has and run.c skips
    return dice.normal(0, 0.1, sum(norms) + sum(matrices) + rotary).astype(np.float32).tobytes()


def int8_weights(dice: np.random.Generator) -> bytes:
    norms, matrices = tensors()
    parts = [np.ones(sum(norms), np.float32).tobytes()]
    for count in matrices:
        parts.append(dice.integers(-127, 128, count, np.int8).tobytes())
        parts.append(dice.uniform(0.001, 0.002, count // GROUP).astype(np.float32).tobytes())
    return b"".join(parts)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("llama2c", type=Path, help="the folder with run.c and runq.c")
    arguments.add_argument("--compiler", choices=[*compilers()], default=next(iter(compilers()), None))
    asked = arguments.parse_args()
    folder, compiler = asked.llama2c, compilers().get(asked.compiler) or find_compiler()
    dice = np.random.default_rng(1)
    rows: dict[str, Callable[[], float]] = {
        "llama2.c run.c, float32": lambda: llama2c(compiler, folder / "run.c", float_weights(dice), ""),
        "llama2.c runq.c, int8": lambda: llama2c(compiler, folder / "runq.c", int8_weights(dice), f"GS = {GROUP};"),
        "naive loop, 4 bit": lambda: ours(compiler, 4, naive=True),
    }
    for bits, kv_bits, activations in product((4, 8), (32, 8), ("float", "int8")):
        name = (
            f"exported, {bits} bit"
            + ", 8-bit KV cache" * (kv_bits == 8)
            + ", int8 activations" * (activations != "float")
        )
        rows[name] = partial(ours, compiler, bits, kv_bits, activations=activations)
    print(f"compiler: {' '.join(compiler)}")
    counts = {name: count() for name, count in rows.items()}
    base = counts["llama2.c runq.c, int8"]
    print(f"{'program':<52}{'instructions a token':>22}{'of runq.c':>11}")
    for name, count in counts.items():
        print(f"{name:<52}{count:>22,.0f}{count / base:>11.3f}")
    print(f"goal: at most {GOAL} of runq.c")


if __name__ == "__main__":
    main()
