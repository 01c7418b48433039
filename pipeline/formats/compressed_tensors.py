"""The format compressed-tensors: a model folder whose integer codes vLLM and transformers load as they are.

Layers are `pack-quantized`: weight_packed, codes in 32-bit words along a row; weight_scale (out, groups);
weight_zero_point, packed along the rows; weight_shape. The package's own functions pack them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.manifest import drafted_folder
from edgepress.checkpoints.packing import group_of, unpack_linear
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import OWN_KEY, LinearShape
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.pipeline.formats import Wanted, Written
from edgepress.pipeline.formats.hf import require_own
from edgepress.pipeline.formats.proof import exact_model, logits_of, require_same, some_tokens

PACKAGE = "compressed-tensors"
CONFIG = "quantization_config"
HINT = f"--to {PACKAGE} needs one more package: pip install 'edgepress[{PACKAGE}]'"
_MERGED = "take --to hf, the merged weights, which vLLM loads as they are"


def write(source: Checkpoint, wanted: Wanted, runtime: Runtime) -> Written:
    """Write the folder, load it with transformers, and compare its logits."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise PlanError(HINT)
    grid = _grid(source)
    require_own(wanted.out)
    ids = some_tokens(source.shape)
    logits = logits_of(exact_model(source), ids)
    with drafted_folder(wanted.out) as draft:
        _write(draft, source, grid)
        read = partial(_read, draft, ids)
        part = 1e-3 if grid.symmetric else 1e-2  # with zero points transformers decodes to the scales' float16
        difference = require_same(source.name, PACKAGE, logits, lambda: {"loaded by transformers": read()}, part)
    nbytes = sum(path.stat().st_size for path in wanted.out.iterdir())
    return Written(wanted.out, nbytes, tuple(_notes(source, grid, difference)), {
        "type": "pack-quantized", "runtime": f"{PACKAGE} {version(PACKAGE)}", "largest_logit_difference": difference,
    })  # fmt: skip


def _notes(source: Checkpoint, grid: Grid, difference: float) -> Iterator[str]:
    yield (
        f"codes, scales and zero points are the checkpoint's; transformers with {PACKAGE} {version(PACKAGE)} gives its "
        f"logits within {difference:.1g} in float32"
    )
    if not grid.symmetric:
        yield f"config.json has transformers decode on loading, to float16: with {PACKAGE} 0.20 zero points fail else"
    if source.shape.dense_dtype == "BF16":
        yield "loaded in bfloat16 the scales, which are float16, are rounded; dtype float16 or float32 keeps them"
    if grid.bits not in (4, 8):
        yield f"vLLM has kernels of {grid.bits} bits only in newer versions"


def _grid(source: Checkpoint) -> Grid:
    """The one form of all quantised layers. Raises PlanError for what the format, or vLLM with it, does not have."""
    shape = source.shape
    linears = [x for block in shape.blocks for x in block.linears]
    forms = {x.grid for x in linears if x.grid is not None}
    if not forms:
        raise PlanError(f"--to {PACKAGE}: no layer of this checkpoint is quantised; {_MERGED}")
    if any(x.adapted for x in linears):
        raise PlanError(
            f"--to {PACKAGE}: this checkpoint has an adapter, and with that merged its weights lie on no grid; "
            f"{_MERGED}, or give the stage before the adapter"
        )
    form = next(iter(forms))
    if len(forms) > 1 or not isinstance(form, Grid):
        told = " and ".join(sorted(form.describe() for form in forms))
        raise PlanError(f"--to {PACKAGE}: its layers have {told}, and the format one integer grid; {_MERGED}")
    if shape.activation_bits < 16:
        raise PlanError(
            f"--to {PACKAGE}: the inputs of its layers are rounded to {shape.activation_bits} bits by a rule that is "
            f"not the format's; {_MERGED}, without that rounding"
        )
    for index, block in enumerate(shape.blocks):
        stored = source.stored_block(index)
        for x in (x for x in block.linears if x.grid):
            if not stored[f"{x.name}.g_idx"].equal(group_of(x.in_features, form.group)):
                raise PlanError(
                    f"--to {PACKAGE}: block {index}: {x.name} has its groups out of storage order, which the format no "
                    f"longer has; {_MERGED}"
                )
            if form.group != -1 and x.in_features % form.group:
                raise PlanError(
                    f"--to {PACKAGE}: block {index}: {x.name} has {x.in_features} inputs, no whole number of groups of "
                    f"{form.group}; {_MERGED}"
                )
    return form


def _write(folder: Path, source: Checkpoint, grid: Grid) -> None:
    writer = CheckpointWriter(folder, source.shape.block_prefix)
    for index, block in enumerate(source.shape.blocks):
        tensors = dict(source.stored_block(index))
        for x in (x for x in block.linears if x.grid):
            tensors |= _packed(x, grid, {kind: tensors.pop(f"{x.name}.{kind}") for kind in grid.kinds})
        writer.write_block(index, tensors)
    writer.write_outer(source.outer())
    config = {key: value for key, value in source.config.items() if key not in (OWN_KEY, CONFIG)}
    writer.finish(config | {CONFIG: _config(source, grid)}, source)


def _packed(x: LinearShape, grid: Grid, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    pack: Any = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers").pack_to_int32
    codes, _, zeros = unpack_linear(stored, grid.bits)
    middle = 2 ** (grid.bits - 1)  # the format counts from there
    parts = {
        "weight_packed": pack((codes - middle).to(torch.int8), grid.bits),
        "weight_scale": stored["scales"].T,
        "weight_shape": torch.tensor([x.out_features, x.in_features]),
    }
    if not grid.symmetric:
        parts["weight_zero_point"] = pack((zeros - middle).to(torch.int8), grid.bits, packed_dim=0)
    return {f"{x.name}.{kind}": tensor.contiguous() for kind, tensor in parts.items()}


def _config(source: Checkpoint, grid: Grid) -> dict[str, Any]:
    kinds: Any = importlib.import_module("compressed_tensors.quantization")
    base: Any = importlib.import_module("compressed_tensors.base")
    how = {"strategy": "channel"} if grid.group == -1 else {"strategy": "group", "group_size": grid.group}
    weights = kinds.QuantizationArgs(num_bits=grid.bits, type="int", symmetric=grid.symmetric, **how)
    blocks = enumerate(source.shape.blocks)
    dense = [f"{source.shape.block_prefix}.{n}.{x.name}" for n, b in blocks for x in b.linears if x.grid is None]
    heads = {"lm_head"} | {t.name.removesuffix(".weight") for t in source.shape.outer if len(t.shape) == 2}
    told = kinds.QuantizationConfig(
        config_groups={"group_0": kinds.QuantizationScheme(targets=["Linear"], weights=weights)},
        format="pack-quantized", quantization_status="compressed", ignore=[*dense, *sorted(heads)],
    )  # fmt: skip
    config = {**told.model_dump(mode="json"), base.COMPRESSION_VERSION_NAME: version(PACKAGE), "quant_method": PACKAGE}
    # transformers 5.23 with versions up to 0.20 makes no room for packed zero points unless it decodes as it loads.
    return config if grid.symmetric else config | {"dequantize": True}


def _read(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
