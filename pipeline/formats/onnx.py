"""The format onnx: a graph for ONNX Runtime, any batch and length, keys and values as inputs and outputs.

Inputs and outputs are called as optimum calls them: input_ids, attention_mask, position_ids, past_key_values.N.key and
.value; logits, present.N.key and .value. torch.onnx traces transformers' own forward; quantised layers become
MatMulNBits, ONNX Runtime's operator for blocks of codes.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.nn.utils.parametrize import register_parametrization

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Grid, RealGrid
from edgepress.checkpoints.manifest import drafted, folders_above, require_output
from edgepress.checkpoints.packing import group_of, unpack_linear, unpack_real
from edgepress.checkpoints.quiet import silenced
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import LinearShape
from edgepress.checkpoints.super_blocks import SuperBlocks
from edgepress.pipeline.formats import Wanted, Written
from edgepress.pipeline.formats.proof import exact_model, logits_of, require_same, some_tokens

DENSE, CODES = "dense", "codes"
HINT = "--to onnx needs more packages: pip install 'edgepress[onnx]'"
_ONE_FILE = 2**31 - 2**24  # bytes of weights: a protobuf message ends at 2 GiB
_LARGEST_BLOCK, _SMALLEST_BLOCK = 256, 16  # weights that share a scale in MatMulNBits


def write(source: Checkpoint, wanted: Wanted, runtime: Runtime) -> Written:
    """Write one file, beside it `NAME.data` where the weights are above 2 GB, and compare ONNX Runtime's logits."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise PlanError(HINT)
    require_output(wanted.out)
    why = _no_codes(source)
    if wanted.type == CODES and why:
        raise PlanError(f"--type codes: {why}; take --type dense, its effective weights")
    kind = wanted.type or (DENSE if why else CODES)
    model = exact_model(source) if kind == CODES else source.model(dtype=torch.float32)
    ids = some_tokens(source.shape)
    logits = logits_of(model, ids)
    layers = _with_codes(model, source) if kind == CODES else 0
    _narrow(model, source.stored_dtype)
    runtime.progress.note("torch.onnx traces the model")
    program = _exported(model, source)
    with _drafts(program, wanted.out) as draft:
        difference = require_same(source.name, "onnxruntime", logits, lambda: _read(draft, ids, source))
    paths = (wanted.out, _beside(wanted.out))
    nbytes = sum(path.stat().st_size for path in paths if path.is_file())
    return Written(wanted.out, nbytes, tuple(_notes(source, kind, layers, difference)), {
        "type": kind, "runtime": f"onnxruntime {version('onnxruntime')}", "largest_logit_difference": difference,
    })  # fmt: skip


def _notes(source: Checkpoint, kind: str, layers: int, difference: float) -> Iterator[str]:
    if kind == CODES:
        yield f"type codes: {layers} layers keep their codes, scales and zero points as they are"
    else:
        yield f"type dense: weights stored in {source.shape.dense_dtype} where that holds them exactly, computed in F32"
    reader = f"ONNX Runtime {version('onnxruntime')}"
    yield f"{reader}: its logits are the model's within {difference:.1g}, with the cache too"


# --- which layers' codes MatMulNBits holds ----------------------------------------------------------------------------


def _no_codes(source: Checkpoint) -> str:
    """Why the codes cannot go in as they are; empty where they can."""
    shape = source.shape
    forms = {x.grid: x for block in shape.blocks for x in block.linears if x.grid is not None}
    if not forms:
        return "no layer of this checkpoint is quantised"
    if shape.activation_bits < 16:
        return f"the inputs of its layers are rounded to {shape.activation_bits} bits, which MatMulNBits does not do"
    for form, x in forms.items():
        if isinstance(form, SuperBlocks):
            return f"its layers have {form.describe()}, whose scales are codes, where MatMulNBits has plain numbers"
        if not isinstance(form, Grid | RealGrid):
            return f"its codes are levels of {form.describe()}, and MatMulNBits has integers"
        if isinstance(form, RealGrid) and form.bits > 4:
            return f"its zero points are real numbers, which MatMulNBits has up to 4 bits and not with {form.bits}"
        if _block(form, x) < _SMALLEST_BLOCK:
            return f"its groups of {form.group} are no multiple of {_SMALLEST_BLOCK}"
    if any(x.adapter_vector for block in shape.blocks for x in block.linears):
        return "its adapter scales rows or columns, which lie in the codes once it is merged"
    for index, block in enumerate(shape.blocks):
        stored = source.stored_block(index)
        for x in block.linears:
            if isinstance(x.grid, Grid) and not stored[f"{x.name}.g_idx"].equal(group_of(x.in_features, x.grid.group)):
                return f"block {index}: {x.name} has its groups out of storage order"
    return ""


def _block(form: Grid | RealGrid, x: LinearShape) -> int:
    """Weights of a block: the group, or a part of it where that is no power of two up to 256."""
    return _LARGEST_BLOCK if form.group == -1 else math.gcd(form.group, _LARGEST_BLOCK)


class _Codes(nn.Module):
    """A layer as MatMulNBits computes it, with its adapter beside it. Nothing but torch.onnx can run it."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None

    def __init__(
        self, x: LinearShape, stored: Mapping[str, Tensor], beside: Mapping[str, Tensor], scale: float
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.scale = x.out_features, x.in_features, scale
        codes, scales, zeros, self.bits, self.block = _blocks(x, stored)
        tensors = {"codes": codes, "scales": scales, "zeros": zeros, "bias": stored.get("bias")}
        tensors |= {side: beside.get(f"lora_{side}.weight") for side in ("A", "B")}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        zeros = self.zeros.float() if self.zeros is not None and self.zeros.is_floating_point() else self.zeros
        attributes: dict[str, Any] = {"K": self.columns, "N": self.rows, "bits": self.bits, "block_size": self.block}
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", (x, self.codes, self.scales.float(), *([] if zeros is None else [zeros])),
            attributes, dtype=x.dtype, shape=(*x.shape[:-1], self.rows), version=1,
        )  # fmt: skip
        if self.bias is not None:
            y = y + self.bias.float()
        if self.A is not None and self.B is not None:
            y = y + self.scale * linear(linear(x, self.A.float()), self.B.float())
        return y


def _blocks(x: LinearShape, stored: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """Codes (out, blocks, bytes of a block), scales (out, blocks), zero points (out, bytes of a row's), bits, block.

    Codes of 3 bits take 4: the operator has 2, 4 and 8. The last block of a row is filled up with zeros.
    """
    form = x.grid
    assert isinstance(form, Grid | RealGrid)
    if isinstance(form, Grid):
        codes, scales, zeros = unpack_linear(stored, form.bits)
    else:
        codes, scales, zeros = unpack_real(stored, form.bits)
    bits, block = 4 if form.bits == 3 else form.bits, _block(form, x)
    blocks = -(-x.in_features // block)
    repeat = blocks if form.group == -1 else form.group // block
    scales, zeros = (part.repeat_interleave(repeat, dim=1)[:, :blocks] for part in (scales, zeros))
    filled = pad(codes, (0, blocks * block - x.in_features)).view(x.out_features, blocks, block)
    scales = scales.to(torch.float16)  # as it was stored
    if isinstance(form, RealGrid):
        return _in_bytes(filled, bits), scales, zeros.to(torch.float16), bits, block
    middle = bool((zeros == 2 ** (bits - 1)).all())  # what the operator takes where there are no zero points
    return _in_bytes(filled, bits), scales, None if middle else _in_bytes(zeros, bits), bits, block


def _in_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes along the last axis packed into bytes, the first in the lowest bits."""
    each = 8 // bits
    padded = pad(codes, (0, -codes.shape[-1] % each)).to(torch.uint8)
    parts = padded.view(*padded.shape[:-1], -1, each)
    packed: Tensor = (parts << torch.arange(0, 8, bits, dtype=torch.uint8)).sum(-1).to(torch.uint8)
    return packed


def _with_codes(model: Any, source: Checkpoint) -> int:
    """Put _Codes in the place of every quantised layer; how many there are."""
    count = 0
    for index, block in enumerate(source.shape.blocks):
        stored, adapter = source.stored_block(index), source.adapter_part(index)
        for x in (x for x in block.linears if x.grid is not None):
            name = f"{source.shape.block_prefix}.{index}.{x.name}"
            model.set_submodule(
                name, _Codes(x, _own(stored, x), _own(adapter, x), source.adapter_scale if x.adapted else 1.0)
            )
            count += 1
    return count


def _own(tensors: Mapping[str, Tensor], x: LinearShape) -> dict[str, Tensor]:
    return {k.removeprefix(f"{x.name}."): tensor for k, tensor in tensors.items() if k.startswith(f"{x.name}.")}


# --- the graph --------------------------------------------------------------------------------------------------------


class _Widened(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.float()


def _narrow(model: Any, dtype: torch.dtype) -> None:
    """Store matrices in the precision that they had, where that holds them exactly; ONNX Runtime widens them."""
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # a head that is tied to the embedding stays so
    for module in [m for m in model.modules() if getattr(m, "_parameters", {}).get("weight") is not None]:
        weight = module.weight
        if weight.dim() != 2 or not weight.to(dtype).float().equal(weight):
            continue
        _, narrow = made.setdefault(id(weight), (weight, nn.Parameter(weight.to(dtype), requires_grad=False)))
        register_parametrization(module, "weight", _Widened(), unsafe=True)
        module.parametrizations.weight.original = narrow


class _WithCache(nn.Module):
    """The model from and to plain tensors; past: a key and a value (batch, heads, tokens before, head_dim) a block."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
        from transformers import DynamicCache

        found = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=DynamicCache(past),
            use_cache=True,
        )
        return found.logits, [(layer.keys, layer.values) for layer in found.past_key_values.layers]


def _exported(model: Any, source: Checkpoint) -> Any:
    shape = source.shape
    batch, new, before = 2, 5, 3  # of the example: numbers that stand for nothing else
    past = [tuple(torch.zeros(batch, shape.kv_heads, before, shape.head_dim) for _ in range(2)) for _ in shape.blocks]
    ids = torch.zeros(batch, new, dtype=torch.long)
    mask, positions = (
        torch.ones(batch, before + new, dtype=torch.long),
        torch.arange(before, before + new).expand(batch, new),
    )
    inputs, outputs = _names(len(shape.blocks))
    sizes = {0: "batch", 1: "tokens"}
    kept = {0: "batch", 2: "tokens_before"}
    with silenced("torch.onnx"), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                _WithCache(model).eval(), (ids, mask, positions, past), input_names=inputs, output_names=outputs,
                dynamic_shapes=(sizes, {0: "batch", 1: "tokens_in_all"}, sizes, [(kept, kept)] * len(past)),
                dynamo=True, verbose=False,
            )  # fmt: skip
        except Exception as error:
            lines = str(error).strip().splitlines()
            why = lines[0] if lines else type(error).__name__
            raise PlanError(f"torch.onnx cannot write this {shape.family} model with its cache: {why}") from None
        # Every node came with the lines of source that it was traced from, paths of this machine among them.
        importlib.import_module("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(program.model)
    return program


def _names(blocks: int) -> tuple[list[str], list[str]]:
    sides = [(index, side) for index in range(blocks) for side in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}.{side}" for n, side in sides)]
    return inputs, ["logits", *(f"present.{n}.{side}" for n, side in sides)]


# --- files, and what reads them ---------------------------------------------------------------------------------------


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


@contextlib.contextmanager
def _drafts(program: Any, out: Path) -> Iterator[Path]:
    """The draft of the file, which ONNX Runtime can load; it takes its name at the end."""
    ir: Any = importlib.import_module("onnx_ir")
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    with contextlib.ExitStack() as drafts:
        drafts.enter_context(folders_above(out))
        file = drafts.enter_context(drafted(out))
        if weights <= _ONE_FILE:
            ir.save(program.model, file)
            yield file
            return
        data = drafts.enter_context(drafted(_beside(out)))
        ir.save(program.model, file, external_data=data.name)
        yield file
        _point_to(file, _beside(out).name)


def _point_to(file: Path, data: str) -> None:
    """Tell the graph the name that the file of its weights will have."""
    onnx: Any = importlib.import_module("onnx")
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = data if entry.key == "location" else entry.value
    file.write_bytes(model.SerializeToString())


def _read(path: Path, ids: Tensor, source: Checkpoint) -> dict[str, Tensor]:
    """ONNX Runtime's logits: of the whole sequence, and of its second half token by token with what came before."""
    ort: Any = importlib.import_module("onnxruntime")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names, (count, shape) = _names(len(source.shape.blocks))[0][3:], (ids.shape[1], source.shape)
    tokens = ids.numpy()

    def run(start: int, end: int, past: list[Any]) -> tuple[Any, list[Any]]:
        found = session.run(None, {
            "input_ids": tokens[:, start:end], "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None], **dict(zip(names, past, strict=True)),
        })  # fmt: skip
        return found[0], found[1:]

    empty = [np.zeros((1, shape.kv_heads, 0, shape.head_dim), np.float32)] * len(names)
    parts, past = [], empty
    for start, end in [(0, count // 2), *((n, n + 1) for n in range(count // 2, count))]:
        logits, past = run(start, end, past)
        parts.append(logits)
    return {
        "the whole sequence": torch.from_numpy(run(0, count, empty)[0]),
        "token by token": torch.from_numpy(np.concatenate(parts, axis=1)),
    }
