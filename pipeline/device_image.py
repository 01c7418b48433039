"""weights.bin of a program for RV32, with what gives the checkpoint back behind it (`compress pack --layout rv32`).

The file begins with exactly the bytes that `compress export` writes (hardware/rv32/FORMAT.md); a chip needs no more of
it. Behind them lie, not aligned: a description as JSON (the shape, the configuration, the adapter's scale); a
safetensors file of those tensors that the program's parts do not give back to the bit, such as the norms of families
that multiply by one more than the weights; the tokenizer's files, if asked for. The last 72 bytes are the lengths of
these four (u64 each), the sha256 of all bytes before it, and `EPDEVICE`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.config import tied
from edgepress.checkpoints.documents import parse_json
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.forms import Grid, TensorShape
from edgepress.checkpoints.image import (
    TORCH_DTYPES,
    Contents,
    Image,
    adapter_scale,
    decode_derived,
    restore,
    tokenizer_documents,
)
from edgepress.checkpoints.manifest import write_bytes
from edgepress.checkpoints.packed_sizes import image_table
from edgepress.checkpoints.packing import group_of, pack
from edgepress.checkpoints.runtime import Progress
from edgepress.checkpoints.shape import BlockShape, LinearShape, ModelShape, parse_sparsity
from edgepress.checkpoints.writer import TOKENIZER_FILES
from edgepress.hardware.rv32.families import Layer, layers, norms
from edgepress.hardware.rv32.layout import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MAGIC,
    CodeForm,
    Layout,
    code_form,
    matrices,
    require_runnable,
)
from edgepress.hardware.rv32.rows import decode, decode_numbers
from edgepress.pipeline.export import program_contents, token_pieces

END = b"EPDEVICE"
_DTYPES = TORCH_DTYPES | {"U16": torch.uint16}
_FOOTER = struct.Struct("<4Q32s8s")


@dataclass(frozen=True)
class DeviceImage:
    """A written file: all of its bytes, and those at its beginning that the chip needs."""

    nbytes: int
    program_bytes: int
    sha256: str


def pack_device(checkpoint: Checkpoint, path: Path, tokenizer: bool = False) -> DeviceImage:
    """Write a checkpoint's device layout with what gives it back.

    Raises PlanError for a model that the program cannot run or a `path` taken by something else.
    """
    if path.is_dir() or (path.is_file() and not is_device_image(path)):
        raise PlanError(f"{path} is there already and is not an image of this layout; choose another file with -o")
    if not path.parent.is_dir():
        raise PlanError(f"there is no folder {path.parent} to write {path.name} to")
    shape = checkpoint.shape
    require_runnable(shape, 1)
    pieces = token_pieces(checkpoint.folder, shape.vocabulary)
    layout = Layout(shape, sum(map(len, pieces)))
    weights = layout.joined(program_contents(checkpoint, pieces))
    documents = dict(sorted((tokenizer_documents(checkpoint.folder) if tokenizer else {}).items()))
    scale = adapter_scale(checkpoint)
    about = {
        "shape": _shape_facts(shape),
        "pieces": layout.parts["pieces"].nbytes,
        "adapter_scale": scale,
        "documents": {name: len(data) for name, data in documents.items()},
    }
    others = {  # the program has only their products
        f"{index}/adapter_codes:{name}": tensor.contiguous()
        for index in range(len(shape.blocks))
        for name, tensor in checkpoint.adapter_codes_part(index).items()
        if name.endswith(".scales")
    }
    reader = _Reader(shape, layout, weights, others)
    for index in range(len(shape.blocks)):
        own = Contents(
            tensor=checkpoint.stored_block(index),
            adapter=checkpoint.adapter_part(index),
            adapter_codes=checkpoint.adapter_codes_part(index),
        )
        others |= {f"{index}/{name}": tensor for name, tensor in _unlike(own, reader.block(index)).items()}
    outer = Contents(tensor=checkpoint.outer(), edge=checkpoint.edge())
    others |= {f"outer/{name}": tensor for name, tensor in _unlike(outer, reader.outer()).items()}
    text, kept = json.dumps(about, sort_keys=True).encode(), save(others)
    files = b"".join(documents.values())
    body = weights + text + kept + files
    digest = hashlib.sha256(body)
    footer = _FOOTER.pack(len(weights), len(text), len(kept), len(files), digest.digest(), END)
    write_bytes(path, body + footer)
    return DeviceImage(len(body) + len(footer), len(weights), digest.hexdigest())


def is_device_image(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(END)))
        return file.read() == END


def unpack_device(path: Path, folder: Path, progress: Progress | None = None) -> Checkpoint:
    """Restore the checkpoint folder that a file was packed from. Raises CheckpointError for a damaged file."""
    data = path.read_bytes()
    if len(data) < _FOOTER.size:
        raise CheckpointError(f"{path} is cut off after {len(data)} bytes; copy it anew")
    *lengths, digest, _ = _FOOTER.unpack_from(data, len(data) - _FOOTER.size)
    if sum(lengths) + _FOOTER.size != len(data):
        raise CheckpointError(f"{path} has {len(data)} bytes where its end announces others; copy it anew")
    body = data[: -_FOOTER.size]
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one it carries; copy it anew")
    ends = [sum(lengths[: k + 1]) for k in range(4)]
    weights, text, kept, files = (body[end - size : end] for end, size in zip(ends, lengths, strict=True))

    try:
        about = dict(parse_json(text, "the description"))
        shape = _shape_of(about["shape"])
        layout = Layout(shape, int(about["pieces"]))
        documents, at = {}, 0
        for name, size in about["documents"].items():
            documents[name], at = files[at : at + size], at + size
        if not weights.startswith(MAGIC):
            raise CheckpointError(f"{path} has an older layout; pack the checkpoint anew")
        if layout.nbytes != len(weights) or set(documents) - set(TOKENIZER_FILES):
            raise ValueError("other bytes of weights or other files than its shape has")
        table, _ = image_table(shape)
        image = Image(path, table, len(data), 0, float(about["adapter_scale"]), digest.hex())
        reader = _Reader(shape, layout, weights, load(kept), documents)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, SafetensorError, PlanError) as error:
        raise CheckpointError(f"{path} has a sound hash but a description that makes no sense: {error!r}") from None
    return restore(image, folder, reader, progress)


# --- a checkpoint's tensors from the program's parts ------------------------------------------------------------------


class _Reader:
    """What `restore` asks for; `others` are the tensors that stand in the file as they are, by place and name."""

    def __init__(
        self, shape: ModelShape, layout: Layout, weights: bytes, others: Mapping[str, Tensor],
        documents: Mapping[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        self._shape, self._layout, self._weights, self._others = shape, layout, weights, others
        self._documents = dict(documents or {})
        self._table, _ = image_table(shape)

    def documents(self) -> dict[str, bytes]:
        return self._documents

    def block(self, index: int) -> Contents:
        shape, block = self._shape, self._shape.blocks[index]
        found = Contents()
        for kind, norm in norms(shape, block).items():
            found.tensor[norm.name] = self._part(f"{index}.{kind}", "F32", norm.shape).to(TORCH_DTYPES[norm.dtype])
        for x in block.linears:
            own = [layer for layer in layers(shape, block) if layer.source == x]
            parts: dict[str, Tensor] = {}
            for layer in own:
                for kind, stored in self._parts_of(index, layer).items():
                    if kind in ("a", "rank_scales") or layer.rows is None:
                        parts[kind] = stored
                    else:
                        full = parts.setdefault(kind, stored.new_zeros((x.out_features, *stored.shape[1:])))
                        full[torch.tensor(layer.rows)] = stored
            places = [f"{index}.{layer.name}.order" for layer in own]
            for name in places if isinstance(x.grid, Grid) else ():
                if name in self._layout.parts:
                    parts["order"] = self._part(name, "U16", (-1,)).long()
            self._linear(x, parts, found)
        self._take(found, f"{index}/")
        layout = self._table["layouts"][self._table["blocks"][index]["layout"]]
        return self._derive(found, layout)

    def outer(self) -> Contents:
        shape, found = self._shape, Contents()
        dtypes = {t.name: t for t in shape.outer}
        norm = dtypes[f"{FINAL_NORM}.weight"]
        found.tensor[norm.name] = self._part(FINAL_NORM, "F32", norm.shape).to(TORCH_DTYPES[norm.dtype])
        for t in shape.edge_tensors():
            found.edge[t.name] = self._part(t.name, t.dtype, t.shape)
        for name in matrices(shape) if shape.embedding_bits is None else ():
            t = dtypes[f"{name}.weight"]
            found.tensor[t.name] = self._part(f"{name}.codes", t.dtype, t.shape)
        self._take(found, "outer/")
        self._derive(found, self._table["outer"]["records"])
        head = f"{HEAD}.weight"
        if tied(shape.config) and head in dtypes and head not in found.tensor:  # stored, though it is the embedding
            found.tensor[head] = found.tensor[f"{EMBEDDING}.weight"].to(TORCH_DTYPES[dtypes[head].dtype])
        return found

    def _part(self, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        part = self._layout.parts[name]
        data = bytearray(self._weights[part.offset : part.offset + part.nbytes])
        return torch.frombuffer(data, dtype=_DTYPES[dtype]).view(shape)

    def _parts_of(self, index: int, layer: Layer) -> dict[str, Tensor]:
        """The parts of one layer of the program: codes, scales and zeros (rows, ...) of a grid apart."""
        x, found = layer.shape, dict[str, Tensor]()
        form = code_form(self._shape, x)
        for kind, (dtype, width) in _kinds(x, form).items():
            name = f"{index}.{layer.name}.{kind}"
            if name not in self._layout.parts:
                continue
            stored = self._part(name, dtype, (-1, *width))
            if kind == "codes" and isinstance(x.grid, Grid):
                sizes = x.out_features, x.in_features, x.grid.groups(x.in_features)
                apart = decode(form, stored.numpy().tobytes(), *sizes, not x.grid.symmetric)
                found |= {kind: torch.from_numpy(array) for kind, array in apart.items()}
            elif kind == "codes" and form.of:
                numbers = decode_numbers(form, stored.numpy().tobytes(), x.out_features, x.in_features)
                found[kind] = torch.frombuffer(bytearray(numbers.tobytes()), dtype=_DTYPES[x.dtype]).view(numbers.shape)
            else:
                found[kind] = stored
        return found

    def _linear(self, x: LinearShape, parts: Mapping[str, Tensor], found: Contents) -> None:
        if isinstance(x.grid, Grid):
            bits, groups = x.grid.bits, x.grid.groups(x.in_features)
            middle = torch.full((x.out_features, groups), 2 ** (bits - 1) - 1, dtype=torch.uint8)
            codes, groups_of = parts["codes"].T, group_of(x.in_features, x.grid.group)
            if "order" in parts:  # the program's columns lie group by group
                codes, groups_of = _put_back(codes, parts["order"]), _put_back(groups_of, parts["order"])
            found.tensor[f"{x.name}.qweight"] = pack(codes, bits)
            found.tensor[f"{x.name}.scales"] = parts["scales"].T.contiguous()
            found.tensor[f"{x.name}.qzeros"] = pack(parts.get("zeros", middle).int(), bits).T.contiguous()
            found.tensor[f"{x.name}.g_idx"] = groups_of
        else:
            found.tensor[f"{x.name}.weight"] = parts["codes"]
        if x.bias:
            found.tensor[f"{x.name}.bias"] = parts["bias"].flatten().to(TORCH_DTYPES[x.bias_dtype or x.dtype])
        if x.adapter_rank:
            kind, end = (found.adapter_codes, "codes") if x.adapter_packed else (found.adapter, "weight")
            a = _put_back(parts["a"].T, parts["order"]).T.contiguous() if "order" in parts else parts["a"]
            kind[f"{x.name}.lora_A.{end}"], kind[f"{x.name}.lora_B.{end}"] = a, parts["b"]

    def _take(self, found: Contents, place: str) -> None:
        for name, tensor in self._others.items():
            if name.startswith(place):
                kind, _, own = name.removeprefix(place).partition(":")
                found.of(kind)[own] = tensor

    def _derive(self, found: Contents, entries: list[dict[str, Any]]) -> Contents:
        """Add what an image stores only as codes: the 16-bit embedding beside its packed copy, the 16-bit adapter."""
        sources = {"derived": ("tensor", "edge"), "derived_adapter": ("adapter", "adapter_codes")}
        for entry in entries:
            if entry["kind"] in sources:
                whole, packed = sources[entry["kind"]]
                found.of(whole)[entry["name"]] = decode_derived(entry, found.of(packed))
        return found


def _put_back(rows: Tensor, order: Tensor) -> Tensor:
    """The rows of which `rows` are those of this order."""
    found = torch.empty_like(rows)
    found[order] = rows
    return found


def _kinds(x: LinearShape, form: CodeForm) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of each part of a layer the numbers' precision, and how many a row has."""
    adapter = "I8" if x.adapter_packed else x.adapter_dtype
    codes: tuple[str, tuple[int, ...]] = (x.dtype, (x.in_features,))
    return {
        "codes": ("U8", ()) if isinstance(x.grid, Grid) or form.of else codes,
        "bias": ("F32", (1,)),
        "a": (adapter, (x.in_features,)),
        "b": (adapter, (x.adapter_rank,)),
    }


def _unlike(own: Contents, other: Contents) -> dict[str, Tensor]:
    """The checkpoint's tensors that the program's parts do not give back to the bit, by kind and name."""
    found = {}
    for kind in ("tensor", "adapter", "adapter_codes", "edge"):
        given = other.of(kind)
        for name, tensor in own.of(kind).items():
            back = given.get(name)
            same = back is not None and back.dtype == tensor.dtype and back.shape == tensor.shape
            if not same or not torch.equal(_bits(back), _bits(tensor)):
                found[f"{kind}:{name}"] = tensor.contiguous()
    return found


def _bits(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.contiguous().flatten().view(torch.uint8)


# --- the shape as JSON ------------------------------------------------------------------------------------------------


def _shape_facts(shape: ModelShape) -> dict[str, Any]:
    blocks: dict[BlockShape, int] = {}
    order = [blocks.setdefault(block, len(blocks)) for block in shape.blocks]
    return {
        "family": shape.family,
        "config": dict(shape.config),
        "layouts": [_block_facts(block) for block in blocks],
        "blocks": order,
        "outer": [asdict(t) for t in shape.outer],
        "block_prefix": shape.block_prefix,
        "embedding_bits": shape.embedding_bits,
    }


def _block_facts(block: BlockShape) -> dict[str, Any]:
    linears = []
    for x in block.linears:
        facts = asdict(x) | {"pattern": None if x.pattern is None else str(x.pattern)}
        linears.append(facts | {"grid": asdict(x.grid) if isinstance(x.grid, Grid) else None})
    return {"linears": linears, "others": [asdict(t) for t in block.others]}


def _shape_of(facts: Mapping[str, Any]) -> ModelShape:
    layouts = [
        BlockShape(tuple(map(_linear_of, x["linears"])), tuple(map(_tensor_of, x["others"]))) for x in facts["layouts"]
    ]
    return ModelShape(
        family=facts["family"],
        config=facts["config"],
        blocks=tuple(layouts[k] for k in facts["blocks"]),
        outer=tuple(map(_tensor_of, facts["outer"])),
        block_prefix=facts["block_prefix"],
        embedding_bits=facts["embedding_bits"],
    )


def _linear_of(facts: Mapping[str, Any]) -> LinearShape:
    pattern, grid = facts["pattern"], facts["grid"]
    whole = {"pattern": parse_sparsity(pattern) if pattern else None, "grid": Grid(**grid) if grid else None}
    return LinearShape(**{**facts, **whole})


def _tensor_of(facts: Mapping[str, Any]) -> TensorShape:
    return TensorShape(facts["name"], tuple(facts["shape"]), facts["dtype"])
