"""Pack a checkpoint into one file, `model.bin`, and restore it.

Little-endian throughout. 64 bytes of preamble: magic `EDGEPACK`; version (u32); bytes of the header (u32); bytes of
the file (u64); the adapter's scale, 0 without one (f64); sha256 of all bytes of the file but these 32. Then the
header, JSON, filled up with spaces to a multiple of 4,096. Then the data; every part begins at a multiple of 16 from
there. The header lists `config` (config.json), `block_prefix`, `layouts` (what a block holds, offsets from its own),
`blocks` (offset and layout of each), `outer` (embedding, last norm, head) and, if asked for, `documents` (tokenizer
files). An entry of kind `linear` has these parts:

- values: the kept weights, row by row, as a stream of codes of `bits` bits or as they are in `dtype`;
- index: which N of every M consecutive weights of a row are missing, in the form `packed_sizes.MaskIndex` tells.
  A missing weight is +0, and in a quantised layer has the zero point's code;
- scales (groups, out), float16; zeros (groups, out), `bits` bits each, the zero point minus one as in GPTQ's
  format, absent on a symmetric grid, whose zero point is 2^(bits - 1);
- order: the group of each column, only where GPTQ's activation order was left in the checkpoint.

One with a `zero_dtype` has real zero points and no mask: zeros (groups, out) are float16, as scales are, and a weight
is scale * (code - zero). One with a `codebook` has instead of scales, zeros and order, a missing weight having the code
of the level 0:

- absmax: of every `block` weights in row order; float32, or where `nested` is not 0 a code of the 8-bit dynamic map
  (`codebooks.dynamic_map`), to be multiplied by its nested absmax and added to the mean;
- nested: float32, the nested absmax of every `nested` of those, and last the mean.

One with `super_blocks` has, in the form that `super_blocks.SuperBlocks` describes: d and, with a `minimum`, e (out,
super-blocks), float16; scales and, with a minimum, minima (out, groups), `scale_bits` bits each. If it is `masked` a
missing weight is +0 and has no code, and there always is an index.

An adapter at 8 bits has entries of kind `adapter_codes`, `….codes` (int8) and `….scales` (float32, one for each
rank): A and B are codes x scales, rounded to the `dtype` of their `derived_adapter` entry, which has no bytes. The
streams' bit order stands in `bits.py`. The other kinds are told in `packed_sizes.Record`.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import resource
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgepress.checkpoints.bits import Bytes, Mask, choose_removed, pack_bits, pack_mask, unpack_bits, unpack_mask
from edgepress.checkpoints.checkpoint import Checkpoint, unpacked
from edgepress.checkpoints.config import beyond_plain, form_of, ia3_config, peft_config
from edgepress.checkpoints.documents import parse_json
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.forms import DTYPE_BYTES, Form
from edgepress.checkpoints.headers import ADAPTER_CONFIG, adapter_path
from edgepress.checkpoints.manifest import Manifest, describe_files, drafted_folder, fingerprint, replacing, write_bytes
from edgepress.checkpoints.packed_sizes import ALIGN, PAGE, PREAMBLE_BYTES, MaskIndex, aligned, header_text, image_table
from edgepress.checkpoints.packing import dequantise_rows
from edgepress.checkpoints.runtime import Progress, Silent
from edgepress.checkpoints.shape import Sparsity, parse_sparsity
from edgepress.checkpoints.writer import TOKENIZER_FILES, CheckpointWriter, prove_pattern

MAGIC, VERSION = b"EDGEPACK", 1
_FIXED = struct.Struct("<8sIIQd")  # and the digest
_CHUNK = 2**24  # bytes hashed at once


@dataclass(frozen=True)
class Image:
    """A sound image: its header, and what the preamble says."""

    path: Path
    table: dict[str, Any]
    nbytes: int
    data_at: int
    adapter_scale: float
    sha256: str


@dataclass(frozen=True)
class Contents:
    """Tensors of one block, or of what is outside the blocks, as the checkpoint's files hold them, by kind."""

    tensor: dict[str, Tensor] = field(default_factory=dict)  # of the shards
    adapter: dict[str, Tensor] = field(default_factory=dict)
    adapter_codes: dict[str, Tensor] = field(default_factory=dict)
    edge: dict[str, Tensor] = field(default_factory=dict)

    def of(self, kind: str) -> dict[str, Tensor]:
        """Where the tensors of a record of this kind are."""
        tensors: dict[str, Tensor] = getattr(self, kind)
        return tensors


# Kinds of which the image holds only what they are made from: where such a tensor lies, and where its codes.
_DERIVED = {"derived": ("tensor", "edge"), "derived_adapter": ("adapter", "adapter_codes")}


# --- packing -------------------------------------------------------------------------------------------------------


def pack_checkpoint(
    checkpoint: Checkpoint, path: Path, tokenizer: bool = False, progress: Progress | None = None
) -> Image:
    """Write a checkpoint of any stage as one packed image, block by block; what is at `path` is replaced at the end.

    tokenizer: take its files along, beyond the predicted size. Raises PlanError where `path` is taken by something
    else, CheckpointError where a layer does not hold the pattern that its manifest claims.
    """
    progress = progress or Silent()
    path = Path(path)
    if path.is_dir() or (path.is_file() and not is_image(path)):
        raise PlanError(f"{path} is there already and is not a packed image; choose another file with -o")
    if not path.parent.is_dir():
        raise PlanError(f"there is no folder {path.parent} to write {path.name} to")
    documents = tokenizer_documents(checkpoint.folder) if tokenizer else {}
    table, data_bytes = image_table(checkpoint.shape, {name: len(data) for name, data in documents.items()})
    text = header_text(table)
    data_at = aligned(PREAMBLE_BYTES + len(text), PAGE)
    scale = adapter_scale(checkpoint)
    fixed = _FIXED.pack(MAGIC, VERSION, len(text), data_at + data_bytes, scale)
    with _replacing(path) as file:
        sink = _Sink(file, fixed)
        sink.write(text.ljust(data_at - PREAMBLE_BYTES))
        progress.start("packing", len(table["blocks"]))
        for index, block in enumerate(table["blocks"]):
            contents = Contents(
                tensor=checkpoint.stored_block(index),
                adapter=checkpoint.adapter_part(index),
                adapter_codes=checkpoint.adapter_codes_part(index),
            )
            place = f"{checkpoint.shape.block_prefix}.{index}."
            if (first := checkpoint.shape.firsts[index]) < index:
                _require_same(checkpoint, contents, first, place)
                progress.step(block=f"{index + 1}/{len(table['blocks'])}")
                continue
            for entry in table["layouts"][block["layout"]]:
                sink.parts(entry, _encode(entry, contents, place))
            progress.step(block=f"{index + 1}/{len(table['blocks'])}")
        contents = Contents(tensor=checkpoint.outer(), edge=checkpoint.edge())
        for entry in table["outer"]["records"]:
            sink.parts(entry, _encode(entry, contents, ""))
        for name in table.get("documents", {}):
            sink.padded(documents[name])
        digest = sink.finish()
    return Image(path, table, data_at + data_bytes, data_at, scale, digest)


def _require_same(checkpoint: Checkpoint, contents: Contents, first: int, place: str) -> None:
    """Raise CheckpointError where a block that is said to have the first one's weights has others."""
    same = checkpoint.stored_block(first), checkpoint.adapter_part(first), checkpoint.adapter_codes_part(first)
    for own, other in zip((contents.tensor, contents.adapter, contents.adapter_codes), same, strict=True):
        for name, tensor in own.items():
            if name not in other or not torch.equal(tensor, other[name]):
                raise CheckpointError(
                    f"cannot be packed: {place}{name} is not the same as block {first}'s, though config.json says that "
                    "they are one block"
                )


def adapter_scale(checkpoint: Checkpoint) -> float:
    """0 without an adapter. Raises CheckpointError where one number does not tell how layers are scaled."""
    adapted = [x for block in checkpoint.shape.blocks for x in block.linears if x.adapted]
    if not adapted:
        return 0.0
    ranks = {x.name: x.adapter_rank for x in adapted if x.adapter_rank}
    path = adapter_path(checkpoint.folder, ADAPTER_CONFIG)
    config = json.loads(path.read_text())
    if not ranks:
        return 1.0  # IA3: its vectors are all there is
    if faults := beyond_plain(config, ranks, dora=any(x.adapter_vector == "magnitude" for x in adapted)):
        raise CheckpointError(
            f"cannot be packed: {path} asks for what an image has no place for: "
            f"{'; '.join(faults)}. An image holds A and B of one rank and one scale, DoRA's magnitudes, IA3's factors"
        )
    return checkpoint.adapter_scale


def _encode(entry: Entry, contents: Contents, at: str) -> dict[str, Bytes]:
    kind, name = entry["kind"], entry["name"]
    try:
        if kind == "linear":
            at_name = f"{name}."
            own = {key.removeprefix(at_name): t for key, t in contents.tensor.items() if key.startswith(at_name)}
            return encode_linear(entry, own)
        if kind in _DERIVED:
            whole, packed = _DERIVED[kind]
            return encode_derived(entry, contents.of(packed), contents.of(whole)[name])
        return encode_tensor(entry, contents.of(kind)[name])
    except CheckpointError as error:
        raise CheckpointError(f"cannot be packed: {at}{error}") from None


def tokenizer_documents(folder: Path) -> dict[str, bytes]:
    found = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not found:
        raise CheckpointError(f"{folder} holds no tokenizer files that could be taken along")
    return found


class _Sink:
    """The file being written, and the hash of what has been."""

    def __init__(self, file: IO[bytes], fixed: bytes) -> None:
        self._file, self._hash = file, hashlib.sha256(fixed)
        file.write(fixed.ljust(PREAMBLE_BYTES, b"\0"))

    def write(self, data: Any) -> None:
        self._file.write(data)
        self._hash.update(data)

    def padded(self, data: Any) -> None:
        self.write(data)
        self.write(bytes(aligned(len(data), ALIGN) - len(data)))

    def parts(self, entry: Entry, parts: Mapping[str, Bytes]) -> None:
        """The parts of one entry, in the order of their offsets. What was announced must be what comes."""
        listed = sorted(entry["parts"].items(), key=lambda item: item[1])
        sizes = {name: part.size for name, part in parts.items() if part.size}
        if sizes != {name: size for name, (_, size) in listed}:
            raise CheckpointError(f"{entry['name']} packs into {sizes}, but its shape says {dict(listed)}")
        for name, _ in listed:
            self.padded(np.ascontiguousarray(parts[name]).data)

    def finish(self) -> str:
        self._file.seek(_FIXED.size)
        self._file.write(self._hash.digest())
        return self._hash.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place once it is whole and on the disk, and is gone if that fails."""
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror or error}") from None


# --- reading -------------------------------------------------------------------------------------------------------


def is_image(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_image(path: Path) -> Image:
    """Check a file whole: magic, version, size, hash. Raises CheckpointError saying which of them fails."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    with path.open("rb") as file:
        preamble = file.read(PREAMBLE_BYTES)
        if not preamble.startswith(MAGIC):
            raise CheckpointError(f"{path} is not a packed image; `compress pack CHECKPOINT -o model.bin` writes one")
        if len(preamble) < PREAMBLE_BYTES:
            raise CheckpointError(f"{path} is cut off after {len(preamble)} bytes; copy it anew")
        _, version, header_bytes, nbytes, scale = _FIXED.unpack_from(preamble)
        if version != VERSION:
            raise CheckpointError(f"{path} is a packed image of version {version}; this one reads version {VERSION}")
        size = path.stat().st_size
        if size != nbytes:
            raise CheckpointError(f"{path} has {size} bytes where its beginning announces {nbytes}; copy it anew")
        text = file.read(header_bytes)
        digest = hashlib.sha256(preamble[: _FIXED.size])
        file.seek(PREAMBLE_BYTES)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.digest() != preamble[_FIXED.size : _FIXED.size + 32]:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one it carries; copy it anew")
    try:
        table = dict(parse_json(text, "the header"))
    except (ValueError, TypeError, CheckpointError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON: {error}") from None
    return Image(path, table, nbytes, aligned(PREAMBLE_BYTES + header_bytes, PAGE), scale, digest.hexdigest())


def read_block(image: Image, index: int) -> Contents:
    """One block's tensors, names relative to it."""
    block = image.table["blocks"][index]
    return _contents(image, image.table["layouts"][block["layout"]], block["at"])


def read_outer(image: Image) -> Contents:
    outer = image.table["outer"]
    return _contents(image, outer["records"], outer["at"])


def read_documents(image: Image) -> dict[str, bytes]:
    """The files that travelled along. Raises CheckpointError for one that is not a tokenizer's."""
    found = {}
    for name, (at, size) in image.table.get("documents", {}).items():
        if name not in TOKENIZER_FILES:
            raise CheckpointError(f"{image.path} carries a file {name!r}, which no tokenizer has")
        found[name] = _read(image, at, size).tobytes()
    return found


def _contents(image: Image, entries: list[dict[str, Any]], at: int) -> Contents:
    found = Contents()
    for entry in entries:
        parts = {name: _read(image, at + offset, size) for name, (offset, size) in entry["parts"].items()}
        if entry["kind"] == "linear":
            tensors = decode_linear(entry, parts)
            found.tensor.update({f"{entry['name']}.{key}": tensor for key, tensor in tensors.items()})
        elif entry["kind"] not in _DERIVED:
            found.of(entry["kind"])[entry["name"]] = decode_tensor(entry, parts)
    for entry in entries:
        if entry["kind"] in _DERIVED:
            whole, packed = _DERIVED[entry["kind"]]
            found.of(whole)[entry["name"]] = decode_derived(entry, found.of(packed))
    return found


def _read(image: Image, at: int, size: int) -> Bytes:
    with image.path.open("rb") as file:
        return np.fromfile(file, np.uint8, size, offset=image.data_at + at)


# --- from an image to a folder ----------------------------------------------------------------------------------------
# From a packed image back to a checkpoint folder, every tensor as it was before packing.


STAGE, STAGE_VERSION = "unpack", 1


class Source(Protocol):
    """What a folder is restored from: a packed image's data, or another layout's."""

    def block(self, index: int) -> Contents:
        """One block's tensors, names relative to it."""

    def outer(self) -> Contents: ...

    def documents(self) -> dict[str, bytes]:
        """The tokenizer's files that travelled along."""


@dataclass(frozen=True)
class _Packed:
    image: Image

    def block(self, index: int) -> Contents:
        return read_block(self.image, index)

    def outer(self) -> Contents:
        return read_outer(self.image)

    def documents(self) -> dict[str, bytes]:
        return read_documents(self.image)


def unpack_checkpoint(path: Path, folder: Path, progress: Progress | None = None) -> Checkpoint:
    """Restore the checkpoint folder that an image was packed from, one shard a block, with a manifest of its own.

    The folder appears at the end, whole. Raises CheckpointError for a file that is damaged or no image, PlanError
    where the folder is taken.
    """
    _require_free(Path(folder))
    image = open_image(path)
    return restore(image, folder, _Packed(image), progress)


def restore(image: Image, folder: Path, source: Source, progress: Progress | None = None) -> Checkpoint:
    """Write a checkpoint folder from what a source holds; `image` has the table of its shape (`image_table`)."""
    progress = progress or Silent()
    folder = Path(folder)
    _require_free(folder)
    began = time.monotonic()
    try:
        with drafted_folder(folder) as draft:
            _write(image, draft, source, progress)
            _write_manifest(image, draft, began)
    # Whatever fails here was stated by the header: sides, offsets and scales that no tensor has.
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
            struct.error) as error:  # fmt: skip
        raise CheckpointError(f"{image.path} has a sound hash but contents that make no sense: {error!r}") from None
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error.strerror or error}") from None
    return Checkpoint.open(folder)


def _require_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PlanError(f"{folder} is there already and is not an empty folder; choose another with -o")
    if not folder.absolute().parent.is_dir():
        raise PlanError(f"there is no folder {folder.absolute().parent} to write {folder.name} to")


def _write(image: Image, draft: Path, source: Source, progress: Progress) -> None:
    writer = CheckpointWriter(draft, image.table["block_prefix"])
    count = len(image.table["blocks"])
    progress.start("unpacking", count)
    for index in range(count):
        contents = source.block(index)
        writer.write_block(index, contents.tensor)
        if contents.adapter:
            writer.write_adapter_part(index, contents.adapter | contents.adapter_codes)
        progress.step(block=f"{index + 1}/{count}")
    outer = source.outer()
    writer.write_outer(outer.tensor)
    if outer.edge:
        writer.write_edge(outer.edge)
    if config := _adapter_config(image):
        writer.join_adapter(config)
    for name, data in source.documents().items():
        write_bytes(draft / name, data)
    writer.finish(image.table["config"], None)
    writer.work.remove()


def _adapter_config(image: Image) -> dict[str, Any] | None:
    """The adapter in PEFT's words, told by the names and shapes of its tensors; None where there is none."""
    entries = [entry for layout in image.table["layouts"] for entry in layout if "adapter" in entry["kind"]]
    shapes: dict[str, dict[str, list[int]]] = {
        kind: {e["name"].removesuffix(kind): e["shape"] for e in entries if e["name"].endswith(kind)}
        for kind in (".lora_A.weight", ".lora_magnitude_vector", ".ia3_l")
    }
    low_rank, magnitudes, scaled = shapes.values()
    if scaled:
        return ia3_config(scaled, [name for name, shape in scaled.items() if shape[1] != 1])
    if not low_rank:
        return None
    rank = max(shape[0] for shape in low_rank.values())
    return peft_config(rank, image.adapter_scale * rank, low_rank, dora=bool(magnitudes))


def _pattern(image: Image) -> Sparsity | None:
    found = {entry.get("pattern") for layout in image.table["layouts"] for entry in layout} - {None}
    return parse_sparsity(found.pop()) if len(found) == 1 else None


def _write_manifest(image: Image, draft: Path, began: float) -> None:
    """What the folder claims, proved on its files, so that `compress verify` can hold it to it."""
    result, pattern = Checkpoint(draft, None), _pattern(image)
    dtype = str(result.stored_dtype).removeprefix("torch.")
    options: dict[str, Any] = {"image": image.path.name, "sha256": image.sha256}
    Manifest(
        stage=STAGE,
        stage_version=STAGE_VERSION,
        options=options,
        fingerprint=fingerprint(image.sha256, STAGE, STAGE_VERSION, {}, None, 0, dtype),
        parent=None,
        seed=0,
        dtype=dtype,
        device="cpu",
        calibration=None,
        sparsity=prove_pattern(result, pattern) if pattern else None,
        seconds=time.monotonic() - began,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        versions={"python": platform.python_version(), "edgepress": version("edgepress")},
        files=describe_files(draft),
        **result.facts(pattern),
    ).write(draft)


# --- tensors ----------------------------------------------------------------------------------------------------------
# One layer or tensor between a checkpoint's form and the parts that the packed image holds of it.
#
# The parts are those of `packed_sizes.Record`; a reader needs only the entry that the image's header lists.


TORCH_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
Entry = Mapping[str, Any]  # a record as the header lists it
_ROWS = 4096  # of an embedding at once, which would be four times its size in float32


# --- plain tensors -------------------------------------------------------------------------------------------------


def encode_tensor(entry: Entry, tensor: Tensor) -> dict[str, Bytes]:
    """Its bytes, little-endian, row-major. Raises CheckpointError if it is not of the form that the entry says."""
    found = (list(tensor.shape), tensor.dtype)
    if found != (list(entry["shape"]), TORCH_DTYPES[entry["dtype"]]):
        raise CheckpointError(f"{entry['name']} is {found[0]} in {found[1]}, not {entry['shape']} in {entry['dtype']}")
    return {"values": _raw(tensor)}


def decode_tensor(entry: Entry, parts: Mapping[str, Bytes]) -> Tensor:
    return _tensor(parts.get("values", np.empty(0, np.uint8)), entry["dtype"], entry["shape"])


def _raw(tensor: Tensor) -> Bytes:
    raw: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw


def _tensor(data: NDArray[Any], dtype: str, shape: list[int]) -> Tensor:
    return torch.from_numpy(data.view(np.uint8)).view(TORCH_DTYPES[dtype]).view(shape)


# --- a block's matrices --------------------------------------------------------------------------------------------


def encode_linear(entry: Entry, stored: Mapping[str, Tensor]) -> dict[str, Bytes]:
    """stored: the layer's tensors by their names within it.

    Raises CheckpointError where the layer does not hold its pattern, or is stored in a way that the image has no
    place for.
    """
    form = form_of(entry)
    if form is not None:
        return _encode_codes(entry, form, stored)
    weight = stored["weight"]
    encode_tensor(entry, weight)
    values = _raw(weight).view(f"<u{DTYPE_BYTES[entry['dtype']]}").reshape(entry["shape"])
    # Of dense weights only +0 is left out, so that every sign comes back.
    index, kept = _leave_out(entry, values, lambda: values == 0)
    return index | {"values": kept.view(np.uint8)}


def decode_linear(entry: Entry, parts: Mapping[str, Bytes]) -> dict[str, Tensor]:
    """The layer's tensors as the checkpoint had them, by their names within it."""
    form = form_of(entry)
    if form is not None:
        return _decode_codes(entry, form, parts)
    kept = parts["values"].view(f"<u{DTYPE_BYTES[entry['dtype']]}")
    values = _put_back(entry, parts, kept, np.zeros(entry["shape"], kept.dtype))
    return {"weight": _tensor(values.reshape(-1), entry["dtype"], entry["shape"])}


def _encode_codes(entry: Entry, form: Form, stored: Mapping[str, Tensor]) -> dict[str, Bytes]:
    if "pattern" in entry and not form.exact_zero:
        raise CheckpointError(
            f"{entry['name']} is said to hold {entry['pattern']}, but with {form.unknown} no weight is exactly zero"
        )
    (rows, columns), ordered = entry["shape"], "order" not in entry["parts"]
    codes, sides = form.split(entry["name"], stored, rows, columns, ordered)
    values = codes.numpy()
    index, kept = _leave_out(entry, values, lambda: values == form.zero_codes(sides, rows, columns).numpy())
    parts = index | {"values": pack_bits(kept, form.bits)}
    for name, (_, how) in form.sides(rows, columns, ordered).items():
        parts[name] = _raw(sides[name]) if isinstance(how, str) else pack_bits(sides[name].numpy(), how)
    return parts


def _decode_codes(entry: Entry, form: Form, parts: Mapping[str, Bytes]) -> dict[str, Tensor]:
    (rows, columns), ordered = entry["shape"], "order" not in entry["parts"]
    sides = {}
    for name, (shape, how) in form.sides(rows, columns, ordered).items():
        if isinstance(how, str):
            sides[name] = _tensor(parts[name], how, list(shape))
        else:
            numbers = unpack_bits(parts[name], how, math.prod(shape)).astype(np.int32)
            sides[name] = torch.from_numpy(numbers.reshape(shape))
    empty = form.zero_codes(sides, rows, columns).numpy().astype(np.uint8) if "index" in parts else np.empty(0)
    codes = _put_back(entry, parts, unpack_bits(parts["values"], form.bits, _kept(entry)), empty)
    return form.join(torch.from_numpy(codes), sides, TORCH_DTYPES[entry["dtype"]])


# --- zeros ---------------------------------------------------------------------------------------------------------


def entry_index(entry: Entry) -> MaskIndex | None:
    """The form of a layer's mask, None where all its weights are stored."""
    if "index" not in entry:
        return None
    rows, columns = entry["shape"]
    pattern = parse_sparsity(entry["pattern"]).on(columns, rows)
    form = entry["index"]
    return MaskIndex(form["form"], pattern.removed, pattern.of, form["bits"], form["groups"])


def _kept(entry: Entry) -> int:
    rows, columns = entry["shape"]
    index = entry_index(entry)
    count: int = rows * columns
    return count if index is None else count // index.of * (index.of - index.removed)


def _leave_out(entry: Entry, values: NDArray[Any], zero: Any) -> tuple[dict[str, Bytes], NDArray[Any]]:
    """The index, and the values (out, in) without those it says are removed; `zero` says where a zero stands."""
    index = entry_index(entry)
    if index is None:
        return {}, values.reshape(-1)
    removed: Mask = choose_removed(zero().reshape(-1, index.of), index.removed)
    short = int((removed.sum(axis=1) != index.removed).sum())
    if short:
        raise CheckpointError(
            f"{entry['name']} is said to hold {entry['pattern']}, but {short} of its {len(removed)} groups have fewer "
            "zeros (a zero with a minus sign is not one that can be left out)"
        )
    return {"index": pack_mask(removed, index)}, values.reshape(-1, index.of)[~removed]


def _put_back(entry: Entry, parts: Mapping[str, Bytes], kept: NDArray[Any], empty: NDArray[Any]) -> NDArray[Any]:
    """All values (out, in): the kept ones at their places in `empty`, which holds what a removed weight is."""
    index = entry_index(entry)
    if index is None:
        return kept.reshape(entry["shape"])
    groups = np.ascontiguousarray(empty).reshape(-1, index.of)
    groups[~unpack_mask(parts["index"], index, len(groups))] = kept
    return groups.reshape(entry["shape"])


# --- embeddings and adapters of which codes are stored ----------------------------------------------------------------


def stands_for(packed: Mapping[str, Tensor], entry: Entry) -> Iterator[tuple[int, Tensor]]:
    """The 16- or 32-bit tensor that packed codes stand for, some rows at a time, with the first row's number."""
    base, dtype = entry["name"].removesuffix(".weight"), TORCH_DTYPES[entry["dtype"]]
    codes, scales = packed[f"{base}.codes"], packed[f"{base}.scales"]
    if entry["kind"] == "derived_adapter":
        yield 0, unpacked(codes, scales, dtype)
        return
    minimum = packed[f"{base}.minimum"]
    bits = 8 * codes.shape[1] // entry["shape"][1]
    for row in range(0, entry["shape"][0], _ROWS):
        here = slice(row, row + _ROWS)
        yield row, dequantise_rows(codes[here], scales[here], minimum[here], bits).to(dtype)


def encode_derived(entry: Entry, packed: Mapping[str, Tensor], tensor: Tensor) -> dict[str, Bytes]:
    """No bytes. Raises CheckpointError where the codes do not stand for the tensor, which would be lost."""
    encode_tensor(entry, tensor)
    for row, rows in stands_for(packed, entry):
        if not np.array_equal(_raw(rows), _raw(tensor[row : row + len(rows)])):
            raise CheckpointError(f"{entry['name']} is not what the packed codes beside it stand for")
    return {}


def decode_derived(entry: Entry, packed: Mapping[str, Tensor]) -> Tensor:
    tensor = torch.empty(entry["shape"], dtype=TORCH_DTYPES[entry["dtype"]])
    for row, rows in stands_for(packed, entry):
        tensor[row : row + len(rows)] = rows
    return tensor
