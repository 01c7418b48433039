"""Perplexity at equal bytes: our grids beside llama.cpp's quantiser and GPTQModel's solver, paired by window.

Every row quantises the linear layers of one model with the same calibration windows (32 x 512 tokens); embedding, head
and norms stay. Bits are of the linear layers, scales and all. Perplexity is of the first 16,384 tokens of each text in
windows of 512. llama.cpp's own functions quantise, with the importance matrix of those windows; rows whose width is no
multiple of 256 are padded with zeros for them, which its bits do not count.

    python -m benchmarks.fair_base shuffled
    python -m benchmarks.bytes_and_quality shuffled wiki.valid.raw wiki.test.raw c4.jsonl --ggml LIBRARY [--only NAME]

LIBRARY: a shared library that exports ggml_quantize_chunk, such as the extension module of the package xllamacpp. What
was measured before is kept in bytes_and_quality.json beside this file (or `--rows`), with the processor it was measured
on, and printed again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from benchmarks.gptq import library
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.manifest import write_bytes
from edgepress.checkpoints.runtime import Runtime, choose_dtype, machine
from edgepress.checkpoints.sources import open_source
from edgepress.checkpoints.tokens import TokenBatches, sample_windows
from edgepress.checkpoints.walk import Walk
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.eval.perplexity import Protocol, measure_passages
from edgepress.eval.results import exp_of, resampled
from edgepress.eval.text import Text, load_text
from edgepress.stages import gptq, tune
from edgepress.stages.hessian import hessians
from edgepress.stages.options import Gptq, Tune

# --quant and, where it is ours to choose, /--group.
GRIDS = {
    quant: {"quant": quant.partition("/")[0], **({"group": int(quant.partition("/")[2])} if "/" in quant else {})}
    for quant in (
        "gptq4/64", "gptq3/64", "gptq5-s/32", "gptq4-s/16", "gptq4-s/32", "gptq4-s/48", "gptq4-s/64", "gptq3-s/16",
        "gptq3-s/32", "gptq3-s/64", "gptq2-s/16", "gptq2-s/32", "q5_k", "q4_k", "q3_k", "q2_k",
    )
}  # fmt: skip
OURS: dict[str, dict[str, Any]] = GRIDS | {f"{name} high": {**grid, "effort": "high"} for name, grid in GRIDS.items()}
# The rows above leave nothing of the Hessian out.
OURS = {name: {**grid, "shrinkage": 0.0} for name, grid in OURS.items()}
OURS |= {f"{name} damping 0.1": {**grid, "damping": 0.1} for name, grid in OURS.items()}
OURS |= {f"{name} shrinkage 0.2": {**grid, "shrinkage": 0.2} for name, grid in OURS.items()}
OURS |= {f"{name} guidance 0.5": {**grid, "guidance": 0.5} for name, grid in OURS.items()}
# Then 100 steps of the stage tune on windows of the calibration text.
OURS |= {f"{name} tuned": {**grid, "tune": 100} for name, grid in OURS.items()}
# Those of the table; --only names any other.
TABLE = [*GRIDS, "gptq4-s/48 high", "gptq4-s/32 high", "gptq4-s/48 high tuned", "gptq3-s/32 tuned", "gptq2-s/16 tuned"]

# ggml's number of a type and its bits a weight come from the package gguf.
Mix = Callable[[str, int, int], str]


def _more(index: int, count: int) -> bool:
    """The blocks to which llama.cpp gives more bits: the first and last eighth, and every third between."""
    eighth = count // 8
    return index < eighth or index >= 7 * eighth or (index - eighth) % 3 == 2


def _q4_k_m(layer: str, index: int, count: int) -> str:
    return "Q6_K" if layer in ("v_proj", "down_proj") and _more(index, count) else "Q4_K"


def _q5_k_m(layer: str, index: int, count: int) -> str:
    return "Q6_K" if layer in ("v_proj", "down_proj") and _more(index, count) else "Q5_K"


def _q3_k_m(layer: str, index: int, count: int) -> str:
    if layer == "v_proj":
        return "Q5_K" if index < 2 else "Q4_K"
    if layer == "down_proj":
        return "Q5_K" if index < count // 16 else "Q4_K" if _more(index, count) else "Q3_K"
    return "Q4_K" if layer == "o_proj" else "Q3_K"


def _q2_k(layer: str, index: int, count: int) -> str:
    return "Q3_K" if layer in ("v_proj", "o_proj", "down_proj") else "Q2_K"


# llama_tensor_get_type of llama.cpp for a model of grouped-query attention with three queries a key.
MIXES: dict[str, Mix] = {"Q5_K_M": _q5_k_m, "Q4_K_M": _q4_k_m, "Q3_K_M": _q3_k_m, "Q2_K": _q2_k}
PURE = ("Q4_0", "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_S")
LIBRARY: dict[str, dict[str, Any]] = {
    "GPTQModel": {},
    "GPTQModel, asymmetric, act order": {"sym": False, "desc_act": True},
}

FAMILIES = {
    "edgepress": "#1f5fa8", "edgepress, high effort": "#0b2f5b", "edgepress, tuned": "#7a3fa0",
    "llama.cpp, importance matrix": "#c2571a", "GPTQModel": "#5b8c3a",
}  # fmt: skip


@dataclass
class Row:
    name: str
    bits: float
    seconds: float
    machine: str
    losses: dict[str, list[tuple[float, int]]]  # of each text: nats and predicted tokens of each window

    def perplexity(self, text: str) -> float:
        windows = self.losses[text]
        return exp_of(sum(nats for nats, _ in windows) / sum(n for _, n in windows))

    def against(self, other: Row, text: str) -> tuple[float, float]:
        """95 % of this perplexity minus the other's, paired by window."""
        mine, theirs = (list(zip(*row.losses[text], strict=True)) for row in (self, other))
        draws = resampled(mine[0], mine[1], "exp") - resampled(theirs[0], theirs[1], "exp")
        low, high = np.quantile(draws, [0.025, 0.975])
        return float(low), float(high)


class Ggml:
    """llama.cpp's quantiser, called in its own library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._chunk = self._library.ggml_quantize_chunk
        self._chunk.restype = ctypes.c_size_t
        floats = ctypes.POINTER(ctypes.c_float)
        self._chunk.argtypes = [
            ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats,
        ]  # fmt: skip

    def rounded(self, weight: Tensor, importance: Tensor, kind: str) -> Tensor:
        """weight (out, in) as this type stands for it, with importance (in,), the mean square of each input."""
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        rows, columns = weight.shape
        width = -(-columns // block) * block
        w = np.zeros((rows, width), dtype=np.float32)
        w[:, :columns] = weight.float().numpy()
        x = np.zeros(width, dtype=np.float32)
        x[:columns] = importance.float().numpy()
        raw = np.zeros(rows * width // block * size, dtype=np.uint8)
        floats = ctypes.POINTER(ctypes.c_float)
        done = self._chunk(
            int(number), w.ctypes.data_as(floats), raw.ctypes.data, 0, rows, width, x.ctypes.data_as(floats)
        )
        if done != len(raw):
            raise RuntimeError(f"{kind}: ggml wrote {done} bytes of {len(raw)}")
        dense = gguf.dequantize(raw.reshape(rows, -1), number)
        return torch.from_numpy(dense[:, :columns].copy()).to(weight.dtype)


def bits_of(kind: str) -> float:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return 8.0 * int(size) / int(block)


def ours_bits(checkpoint: Checkpoint) -> float:
    """What the codes and their scales take, at their real widths."""
    bits = weights = 0
    for x in (x for block in checkpoint.shape.blocks for x in block.linears):
        if x.grid is None:
            raise RuntimeError(f"{x.name} is not quantised")
        bits += x.weights * x.grid.bits
        for (rows, columns), width in x.grid.sides(x.out_features, x.in_features).values():
            bits += rows * columns * (16 if width == "F16" else int(width))
        weights += x.weights
    return bits / weights


def importances(source: Checkpoint, windows: TokenBatches, runtime: Runtime) -> list[dict[str, Tensor]]:
    """Of each block's layers the mean square of each input, (in,), of the model as it is: the importance matrix."""
    found = []
    for block in Walk(source, windows.chunks(runtime.chunk_tokens), runtime):
        sums = hessians(block)
        found.append({name: H.diagonal() / windows.ids.numel() for names, H in sums.items() for name in names})
        block.done()
    return found


def with_types(
    source: Checkpoint, kinds: Mix, matrix: list[dict[str, Tensor]], ggml: Ggml, folder: Path, runtime: Runtime
) -> float:
    """Write the model with every linear layer as ggml rounds it; its bits a weight."""
    target, bits, weights = CheckpointWriter(folder), 0.0, 0
    for block in Walk(source, [], runtime):
        for name, linear in block.linears.items():
            kind = kinds(name.rsplit(".", 1)[-1], block.index, block.count)
            linear.weight.copy_(ggml.rounded(linear.weight.detach(), matrix[block.index][name], kind))
            bits += bits_of(kind) * linear.weight.numel()
            weights += linear.weight.numel()
        tensors = block.weights() | {f"{n}.weight": x.weight.detach().clone() for n, x in block.linears.items()}
        target.write_block(block.index, tensors)
        block.done()
    target.copy_outer(source)
    target.finish(source.config, source)
    return bits / weights


class Made(Checkpoint):
    """A checkpoint without a manifest that knows what it was made from."""

    def __init__(self, folder: Path, source: Checkpoint) -> None:
        super().__init__(folder, None)
        self._source = source

    def ancestors(self) -> Iterator[Checkpoint]:
        yield self
        yield from self._source.ancestors()


@dataclass
class Bench:
    source: Checkpoint
    windows: TokenBatches
    training: TokenBatches
    texts: list[Text]
    runtime: Runtime
    ggml: Ggml | None
    rows: Path
    matrix: list[dict[str, Tensor]] | None = None

    def row(self, name: str) -> Row | None:
        """Measured now or before; None where the library for it is not given."""
        kept = json.loads(self.rows.read_text()) if self.rows.is_file() else {}
        if name in kept:
            return Row(name=name, **kept[name])
        with tempfile.TemporaryDirectory() as folder:
            found = self._measured(name, Path(folder) / "out")
        if found is not None:
            kept[name] = {key: value for key, value in vars(found).items() if key != "name"}
            lines = (f"{json.dumps(n)}: {json.dumps(kept[n])}" for n in sorted(kept))
            write_bytes(self.rows, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
        return found

    def _measured(self, name: str, folder: Path) -> Row | None:
        began = time.perf_counter()
        bits = self._write(name, folder)
        seconds = time.perf_counter() - began
        if bits is None:
            return None
        model = self.source if name == "dense" else Checkpoint(folder, None)
        losses = {t.name: list(self._losses(model, t)) for t in self.texts}
        return Row(name, bits or ours_bits(model), round(seconds), machine(), losses)

    def _write(self, name: str, folder: Path) -> float | None:
        """Quantise into the folder; the bits a weight, 0 where the folder tells them, None where nothing can."""
        if name == "dense":
            return 16.0
        if name in OURS:
            options = dict(OURS[name])
            steps = options.pop("tune", 0)
            first = folder if not steps else folder.with_name("quantised")
            gptq.run(self.source, CheckpointWriter(first), self.windows, Gptq(**options), self.runtime)
            if steps:
                tune.run(
                    Made(first, self.source),
                    CheckpointWriter(folder),
                    self.training,
                    Tune(steps, micro_batch=4),
                    self.runtime,
                )
            return 0.0
        if name in LIBRARY:
            library(self.source, self.windows, folder, **LIBRARY[name])
            return 0.0
        if self.ggml is None:
            return None
        if self.matrix is None:
            self.matrix = importances(self.source, self.windows, self.runtime)
        mix = MIXES.get(name, lambda *_: name)
        return with_types(self.source, mix, self.matrix, self.ggml, folder, self.runtime)

    def _losses(self, model: Checkpoint, text: Text) -> Iterator[tuple[float, int]]:
        for passage in measure_passages(model, text, Protocol(), self.runtime):
            yield round(passage.nll, 3), passage.scored


def rival(row: Row, rows: Mapping[str, Row], text: str) -> Row | None:
    """The best of the others' at the same or more bytes, up to half a bit more."""
    others = [r for r in rows.values() if r.name not in OURS and row.bits <= r.bits <= row.bits + 0.5]
    return min(others, key=lambda r: r.perplexity(text), default=None)


def table(rows: Mapping[str, Row], texts: list[str]) -> str:
    lines = ["| method | bits | " + " | ".join(texts) + " | seconds |", "|---|---|" + "---|" * (len(texts) + 1)]
    for row in sorted(rows.values(), key=lambda r: r.bits):
        cells = []
        for text in texts:
            cell = f"{row.perplexity(text):.2f}"
            if row.name in OURS and (other := rival(row, rows, text)):
                low, high = row.against(other, text)
                cell += f" ({low:+.2f} to {high:+.2f} of {other.name})"
            cells.append(cell)
        lines.append(f"| {row.name} | {row.bits:.3f} | {' | '.join(cells)} | {row.seconds:.0f} |")
    return "\n".join(lines)


def family(name: str) -> str:
    """Whose rounding a row is, for the figure's colours."""
    if name in OURS:
        own = OURS[name]
        return "edgepress, tuned" if "tune" in own else "edgepress, high effort" if "effort" in own else "edgepress"
    return "GPTQModel" if name in LIBRARY else "llama.cpp, importance matrix"


def draw(rows: Mapping[str, Row], texts: list[str], path: Path) -> None:
    """A panel a text: perplexity over bits a weight, the dense model's as a line, rows of one hand joined."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    quantised = [row for row in rows.values() if row.name != "dense"]
    figure, axes = pyplot.subplots(1, len(texts), figsize=(5.2 * len(texts), 4.4), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        for hand, colour in FAMILIES.items():
            found = sorted((row.bits, row.perplexity(text)) for row in quantised if family(row.name) == hand)
            # What a row of more bits does not beat would only make the line go up and down.
            best = [(b, p) for b, p in found if all(p <= q for c, q in found if c <= b)]
            if found:
                axis.plot(*zip(*found, strict=True), "o", color=colour, markersize=4, label=hand)
                axis.plot(*zip(*best, strict=True), "-", color=colour, linewidth=1)
        if "dense" in rows:
            axis.axhline(rows["dense"].perplexity(text), color="#777777", linewidth=0.8, linestyle=":", label="dense")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(labelsize=8, which="both")
        axis.set_title(text, fontsize=10)
        axis.set_xlabel("bits a weight of the linear layers", fontsize=9)
        axis.grid(which="both", alpha=0.25)
    axes[0][0].set_ylabel("perplexity", fontsize=9)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--ggml", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--figure", type=Path, help="a PNG of what was measured")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    runtime = Runtime(dtype=choose_dtype("auto", torch.device("cpu"), "BF16"))
    ids = load_text(arguments.calibration, "whole").token_ids(source.tokenizer())
    windows = sample_windows("calibration", ids, 32, 512, torch.Generator().manual_seed(0))
    samples = min(Tune().samples, ids.numel() // 512)
    drawn = sample_windows("training", ids, samples, 512, torch.Generator().manual_seed(1))
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(2))
    training = TokenBatches("training", drawn.ids[order].contiguous())
    texts = [load_text(name, "whole") for name in arguments.texts]
    ggml = Ggml(arguments.ggml) if arguments.ggml else None
    bench = Bench(source, windows, training, texts, runtime, ggml, arguments.rows)
    rows: dict[str, Row] = {}
    for name in arguments.only or ["dense", *TABLE, *MIXES, *PURE, *LIBRARY]:
        if (row := bench.row(name)) is not None:
            rows[name] = row
            print(name, f"{row.bits:.3f}", *(f"{row.perplexity(t.name):.2f}" for t in texts), flush=True)
    print(table(rows, [t.name for t in texts]))
    if arguments.figure:
        draw(rows, [t.name for t in texts], arguments.figure)


if __name__ == "__main__":
    main()
