"""Write a checkpoint as an integer graph for Deeploy, with the perplexity of exactly that arithmetic."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.packing import unpack
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.eval.perplexity import Perplexity, Protocol, measure, token_windows
from edgepress.eval.text import Text, load_text
from edgepress.hardware.deeploy.arithmetic import Array
from edgepress.hardware.deeploy.files import files, onnx
from edgepress.hardware.deeploy.graph import Graph, Weights
from edgepress.hardware.deeploy.memory import memory_use
from edgepress.hardware.deeploy.model import (
    LINEARS,
    Block,
    Model,
    continued,
    eight_bit_rotations,
    eight_bit_rows,
    in_even_parts,
    require_expressible,
    texts,
)
from edgepress.hardware.rv32.memory import Use
from edgepress.hardware.soc import Soc
from edgepress.pipeline.export import ends_of, write_files

CHOSEN_ON, MEASURED_ON = 4096, 16384  # tokens
FACTS = "deeploy.json"  # a folder that has it was written here, and may be written anew
_NUMBERS_AT_ONCE = 2**25  # of the largest tensor


@dataclass(frozen=True)
class Export:
    """A graph that can be made of a checkpoint, and what it asks of each memory."""

    checkpoint: Checkpoint
    soc: Soc
    context: int
    prompt: list[int]
    new_tokens: int
    ends: frozenset[int]
    choose: Text  # the text that constants are chosen on
    test: Text  # the text that the perplexity is measured on
    uses: tuple[Use, Use, Use]


@dataclass(frozen=True)
class Written:
    """kept: linear layers whose codes went in unchanged. weight_error: squared, relative, of the others' rounding."""

    kept: int
    layers: int
    weight_error: float
    floating: Perplexity
    integer: float  # perplexity
    tokens: list[int]

    def to_dict(self) -> dict[str, Any]:
        return {
            "kept_layers": self.kept, "layers": self.layers, "weight_error": self.weight_error,
            "perplexity": self.floating.perplexity, "integer_perplexity": self.integer,
            "protocol": self.floating.protocol, "text": self.floating.text, "tokens": self.tokens,
        }  # fmt: skip


def require_room_for(folder: Path) -> None:
    """Raise PlanError where other things than an earlier export lie in the folder."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / FACTS).is_file()):
        raise PlanError(f"{folder} is there and holds no graph for Deeploy; name another folder with -o")


def plan_export(checkpoint: Checkpoint, soc: Soc, prompt: str, new_tokens: int, context: int, text: str) -> Export:
    """The graph of a decode step in a cache of `context` tokens. No weights are read.

    text: chooses the constants with its first part, and measures with the rest. Raises PlanError for what the graph or
    the chip cannot do, TextError for a text that cannot be read.
    """
    onnx()
    require_expressible(checkpoint.shape, context)
    tokenizer: Any = checkpoint.tokenizer()
    ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    if not ids or max(ids) >= checkpoint.shape.vocabulary:
        raise PlanError("the prompt gives no token of the model's vocabulary to begin with: write a word")
    if new_tokens < 1 or len(ids) + new_tokens > context:
        raise PlanError(
            f"a prompt of {len(ids)} tokens and {new_tokens} new ones: at least one must be new, and all must go into "
            f"the context of {context}; change --tokens or --context"
        )
    ends = frozenset(ends_of(checkpoint, tokenizer))
    uses = memory_use(checkpoint.shape, soc, context)
    choose, test = load_text(text, "calibrate"), load_text(text, "evaluate")
    return Export(checkpoint, soc, context, ids, new_tokens, ends, choose, test, uses)


@torch.no_grad()
def write(export: Export, folder: Path, runtime: Runtime) -> Written:
    """Choose the constants, measure the integer form, and write the graph, its arrays and what a host program needs.

    Raises TextError where a part of the text has no whole window, NumericsError where numbers outgrow their registers.
    """
    checkpoint, context, tokenizer = export.checkpoint, export.context, export.checkpoint.tokenizer()
    model, kept, error = read_model(checkpoint)
    together = _together(checkpoint.shape, context)
    windows = token_windows(export.choose, tokenizer, Protocol("windows", context, 0))
    windows = windows[: max(1, min(CHOSEN_ON // context, together))]
    enough = max(MEASURED_ON, context)
    protocol = Protocol("windows", context, enough if export.test.token_ids(tokenizer).numel() >= enough else 0)
    scored = token_windows(export.test, tokenizer, protocol)
    chosen: dict[str, Any] = {}
    try:
        runtime.progress.note(f"scales are chosen on {windows.numel():,} tokens of '{export.choose.name}'")
        texts(model, windows.numpy(), chosen)
        runtime.progress.note(f"the integer form is measured on {scored.numel():,} tokens of '{export.test.name}'")
        integer = perplexity(model, chosen, scored, together)
        tokens, graph = continued(model, chosen, export.prompt, export.new_tokens, context, export.ends)
    except OverflowError as overflow:
        raise NumericsError(f"{checkpoint.name}: the integer form outgrows its registers: {overflow}") from None
    floating = measure(checkpoint, export.test, protocol, runtime)
    result = Written(kept, len(model.blocks) * len(LINEARS), error, floating, integer, tokens)
    facts = {"soc": export.soc.label, "context": context, **result.to_dict()}
    facts["memories"] = [use.to_dict() for use in export.uses]
    _write(folder, graph, model, context, facts)
    return result


def _write(folder: Path, graph: Graph, model: Model, context: int, facts: Mapping[str, Any]) -> None:
    contents = files(graph, "edgepress") | {"host.npz": _host(model, context)}
    write_files(folder, contents | {FACTS: json.dumps(facts, indent=2).encode() + b"\n"}, mark=FACTS)


def _host(model: Model, context: int) -> bytes:
    """What the program around the graph looks up: a token's input is codes[token] * steps[token], a position's turn."""
    file = io.BytesIO()
    np.savez(
        file, codes=model.codes.astype(np.int8), steps=model.steps.astype(np.int16),
        turns=eight_bit_rotations(model, context).astype(np.int8),
    )  # fmt: skip
    return file.getvalue()


def _together(shape: ModelShape, context: int) -> int:
    """Texts of `context` tokens that are computed at once."""
    return max(1, _NUMBERS_AT_ONCE // (context * max(shape.vocabulary, shape.heads * context)))


def perplexity(model: Model, chosen: dict[str, Any], windows: Tensor, together: int) -> float:
    """Of the integer arithmetic, over windows (texts, tokens): exp of the mean loss of each token but the first."""
    total = 0.0
    for chunk in torch.split(windows, together):
        logits = texts(model, chunk.numpy(), chosen).outputs[0]
        values = torch.from_numpy(logits.value[:, :-1, 0] * logits.scale).flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(values, chunk[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


# --- the weights ------------------------------------------------------------------------------------------------------


def read_model(checkpoint: Checkpoint) -> tuple[Model, int, float]:
    """The model, how many linear layers' codes went in unchanged, and the others' squared relative rounding error."""
    shape, outer = checkpoint.shape, checkpoint.outer()
    config: Any = checkpoint.hf_config()
    embedding = _array(outer["model.embed_tokens.weight"])
    codes, steps, unit = eight_bit_rows(embedding)
    head = Weights(codes, steps * unit, embedding)
    if (own := outer.get("lm_head.weight")) is not None:
        head = _rounded(_array(own), None)
    blocks, kept = [], 0
    errors = np.zeros(2)
    for index, block in enumerate(shape.blocks):
        dense, stored = checkpoint.block(index), checkpoint.stored_block(index)
        by_name = {x.name: x for x in block.linears}
        linears = {}
        for short, name in LINEARS.items():
            x, bias = by_name[name], dense.get(f"{name}.bias")
            offset = None if bias is None else _array(bias)
            if is_int8(x):
                kept += 1
                whole = unpack(stored[f"{name}.qweight"], 8, x.in_features).T.double().numpy() - 128
                scales = _array(stored[f"{name}.scales"][0])
                linears[short] = Weights(whole, scales, whole * scales[:, None], offset)
                continue
            linears[short] = weights = _rounded(_array(dense[f"{name}.weight"]), offset)
            lost = weights.codes * weights.scales[:, None] - weights.real
            errors += np.sum(lost**2), np.sum(weights.real**2)
        before, between = (_array(dense[f"{name}_layernorm.weight"]) for name in ("input", "post_attention"))
        blocks.append(Block(before, between, in_even_parts(linears)))
    frequencies = _array(checkpoint.model(dtype=torch.float32).model.rotary_emb.inv_freq)
    model = Model(
        shape.heads, shape.kv_heads, shape.head_dim, float(config.rms_norm_eps), frequencies, tuple(blocks),
        _array(outer["model.norm.weight"]), embedding, codes, steps, unit, head,
    )  # fmt: skip
    return model, kept, float(errors[0] / errors[1]) if errors[1] else 0.0


def is_int8(x: LinearShape) -> bool:
    """Whether a layer's codes are what the accelerator reads: 8 bits, a scale an output channel, no zero point."""
    grid = x.grid
    whole = isinstance(grid, Grid) and grid.bits == 8 and grid.symmetric and grid.groups(x.in_features) == 1
    return whole and not x.adapted


def _rounded(weight: Array, bias: Array | None) -> Weights:
    scales = np.maximum(np.abs(weight).max(axis=1), 1e-9) / 127
    return Weights(np.round(weight / scales[:, None]), scales, weight, bias)


def _array(tensor: Tensor) -> Array:
    return tensor.double().numpy()


# --- words ------------------------------------------------------------------------------------------------------------


def in_words(written: Written) -> Iterator[str]:
    """What went in, and what the integer form costs."""
    if written.kept == written.layers:
        yield f"all {written.layers} linear layers' codes go in unchanged"
    else:
        yield (
            f"{written.layers - written.kept} of {written.layers} linear layers requantised to 8 bits an output "
            f"channel: {written.weight_error:.2e} of their squared weights lost"
        )
    floating = written.floating
    yield (
        f"perplexity {floating.perplexity:.4f} in floating point, {written.integer:.4f} in integers "
        f"({written.integer / floating.perplexity:.3f} x; {floating.protocol}; {floating.text})"
    )
