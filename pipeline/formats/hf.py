"""The format hf: one plain dense model, as transformers' save_pretrained leaves it, with the adapter merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint, applied
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.forms import TORCH_NAMES
from edgepress.checkpoints.headers import INDEX, SINGLE, dense_tensors
from edgepress.checkpoints.manifest import MANIFEST, drafted_folder, require_own_links, write_bytes, write_json
from edgepress.checkpoints.masks import require_finite
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import OWN_KEY
from edgepress.checkpoints.writer import TOKENIZER_FILES
from edgepress.pipeline.formats import Wanted, Written

SHARD_BYTES = 5 * 10**9  # of a file, as save_pretrained had it for years; blocks are not cut
_OUTER = -1


def write(source: Checkpoint, wanted: Wanted, runtime: Runtime) -> Written:
    """Write the folder, a shard in memory at a time."""
    require_own(wanted.out)
    stored = TORCH_NAMES[source.shape.dense_dtype]
    kind = wanted.type or stored
    with drafted_folder(wanted.out) as draft:
        _write_weights(source, draft, getattr(torch, kind), runtime)
        config = {key: value for key, value in source.config.items() if key not in (OWN_KEY, "quantization_config")}
        write_json(draft / "config.json", {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": kind})
        require_own_links(source.folder)
        for name in TOKENIZER_FILES:
            if (source.folder / name).is_file():
                write_bytes(draft / name, (source.folder / name).read_bytes())
        Checkpoint.open(draft)  # the files hold what the configuration asks for, and nothing else
    nbytes = sum(path.stat().st_size for path in wanted.out.glob("*.safetensors"))
    return Written(wanted.out, nbytes, tuple(_notes(source, kind, stored, nbytes)), {"type": kind})


def _notes(source: Checkpoint, kind: str, stored: str, nbytes: int) -> Iterator[str]:
    linears = [x for block in source.shape.blocks for x in block.linears]
    if any(x.grid or x.adapted for x in linears):
        before = size_text(source.shape.file_bytes, "MiB", 1)
        yield f"weights are dense, the adapter merged: {size_text(nbytes, 'MiB', 1)} where the checkpoint has {before}"
    if kind == stored and any(x.grid or x.adapted for x in linears):
        yield f"the codes' numbers are rounded to {kind}, as every measurement here has them; --type float32 keeps them"
    elif torch.finfo(getattr(torch, kind)).bits < torch.finfo(getattr(torch, stored)).bits or {kind, stored} == {
        "float16",
        "bfloat16",
    }:
        yield f"weights were {stored} and are rounded to {kind}"
    if source.shape.activation_bits < 16:
        yield f"that the layers' inputs are rounded to {source.shape.activation_bits} bits is not in it"


def exact_block(source: Checkpoint, index: int) -> dict[str, Tensor]:
    """A block's effective weights, those of quantised and adapted layers in float32 and rounded nowhere.

    `Checkpoint.block` has them in the precision that the model was stored in.
    """
    dense, adapter = source.stored_block(index), source.adapter_part(index)
    for x in source.shape.blocks[index].linears:
        for kind in x.grid.kinds if x.grid else ():
            del dense[f"{x.name}.{kind}"]
        if x.grid or x.adapted:
            own = {"weight": source.base_weight(index, x).float()}
            own |= {"bias": dense[f"{x.name}.bias"]} if x.bias else {}
            if x.adapted:
                beside = {t.name.removeprefix(f"{x.name}."): adapter[t.name] for t in x.adapter()}
                own |= applied(own, beside, source.adapter_scale)
            dense |= {f"{x.name}.{kind}": tensor for kind, tensor in own.items()}
    for name, tensor in dense.items():
        require_finite(f"{source.folder.name}: {source.shape.block_prefix}.{index}.{name}", tensor)
    return dense


def _write_weights(source: Checkpoint, folder: Path, dtype: torch.dtype, runtime: Runtime) -> None:
    """The weights in as few files as hold them, and an index where there are several."""
    shards = _shards(source, dtype.itemsize)
    runtime.progress.start("writing", len(source.shape.blocks))
    places: dict[str, str] = {}
    total = 0
    for number, parts in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for part in parts:
            for key, tensor in _part(source, part, dtype).items():
                narrow = tensor.to(dtype).contiguous()
                if not bool(torch.isfinite(narrow).all()):
                    raise NumericsError(f"{key} has numbers beyond float16; take --type bfloat16 or float32")
                tensors[key] = narrow
            if part != _OUTER:
                runtime.progress.step(block=f"{part + 1}/{len(source.shape.blocks)}")
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _part(source: Checkpoint, part: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What lies outside the blocks, or a block, by full names."""
    if part == _OUTER:
        return source.outer()
    block = source.block(part) if dtype == source.stored_dtype else exact_block(source, part)
    return {f"{source.shape.block_prefix}.{part}.{name}": tensor for name, tensor in block.items()}


def _shards(source: Checkpoint, width: int) -> list[list[int]]:
    """Which blocks lie in each file, with the rest before them."""
    sizes: dict[int, int] = {_OUTER: 0}
    for name, sides in dense_tensors(source.shape).items():
        start = f"{source.shape.block_prefix}."
        part = int(name.removeprefix(start).split(".")[0]) if name.startswith(start) else _OUTER
        sizes[part] = sizes.get(part, 0) + width * torch.Size(sides).numel()
    shards: list[list[int]] = [[]]
    filled = 0
    for part, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    return shards


def require_own(folder: Path) -> None:
    """Raise PlanError where something else than a model folder would be written over."""
    if folder.is_dir() and any(folder.iterdir()):
        names = {path.name for path in folder.iterdir() if path.is_file()}
        if any(path.is_dir() for path in folder.iterdir()) or "config.json" not in names or MANIFEST in names:
            raise PlanError(f"{folder} holds other things than an exported model; name another folder with -o")
    elif folder.exists() and not folder.is_dir():
        raise PlanError(f"{folder} is a file; name a folder with -o")
