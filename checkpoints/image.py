"""A whole checkpoint in one file for the edge, and back: `model.bin`, the packed image.

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

An adapter at 8 bits has entries of kind `adapter_codes`, `….codes` (int8) and `….scales` (float32, one for each
rank): A and B are codes x scales, rounded to the `dtype` of their `derived_adapter` entry, which has no bytes. The
streams' bit order stands in `bits.py`. The other kinds are told in `packed_sizes.Record`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from edgepress.checkpoints import image_tensors as form
from edgepress.checkpoints.bits import Bytes
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.documents import parse_json
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.manifest import replacing
from edgepress.checkpoints.packed_sizes import ALIGN, PAGE, PREAMBLE_BYTES, aligned, header_text, image_table
from edgepress.checkpoints.peft_config import beyond_plain
from edgepress.checkpoints.runtime import Progress, Silent
from edgepress.checkpoints.writer import ADAPTER_CONFIG, TOKENIZER_FILES

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
    documents = _documents(checkpoint.folder) if tokenizer else {}
    table, data_bytes = image_table(checkpoint.shape, {name: len(data) for name, data in documents.items()})
    text = header_text(table)
    data_at = aligned(PREAMBLE_BYTES + len(text), PAGE)
    scale = _adapter_scale(checkpoint)
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


def _adapter_scale(checkpoint: Checkpoint) -> float:
    """0 without an adapter. Raises CheckpointError where one number does not tell how layers are scaled."""
    adapted = [x for block in checkpoint.shape.blocks for x in block.linears if x.adapted]
    if not adapted:
        return 0.0
    ranks = {x.name: x.adapter_rank for x in adapted if x.adapter_rank}
    config = json.loads((checkpoint.folder / ADAPTER_CONFIG).read_text())
    if not ranks:
        return 1.0  # IA3: its vectors are all there is
    if faults := beyond_plain(config, ranks, dora=any(x.adapter_vector == "magnitude" for x in adapted)):
        raise CheckpointError(
            f"cannot be packed: {checkpoint.folder / ADAPTER_CONFIG} asks for what an image has no place for: "
            f"{'; '.join(faults)}. An image holds A and B of one rank and one scale, DoRA's magnitudes, IA3's factors"
        )
    return checkpoint.adapter_scale


def _encode(entry: form.Entry, contents: Contents, at: str) -> dict[str, Bytes]:
    kind, name = entry["kind"], entry["name"]
    try:
        if kind == "linear":
            at_name = f"{name}."
            own = {key.removeprefix(at_name): t for key, t in contents.tensor.items() if key.startswith(at_name)}
            return form.encode_linear(entry, own)
        if kind in _DERIVED:
            whole, packed = _DERIVED[kind]
            return form.encode_derived(entry, contents.of(packed), contents.of(whole)[name])
        return form.encode_tensor(entry, contents.of(kind)[name])
    except CheckpointError as error:
        raise CheckpointError(f"cannot be packed: {at}{error}") from None


def _documents(folder: Path) -> dict[str, bytes]:
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

    def parts(self, entry: form.Entry, parts: Mapping[str, Bytes]) -> None:
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
            tensors = form.decode_linear(entry, parts)
            found.tensor.update({f"{entry['name']}.{key}": tensor for key, tensor in tensors.items()})
        elif entry["kind"] not in _DERIVED:
            found.of(entry["kind"])[entry["name"]] = form.decode_tensor(entry, parts)
    for entry in entries:
        if entry["kind"] in _DERIVED:
            whole, packed = _DERIVED[entry["kind"]]
            found.of(whole)[entry["name"]] = form.decode_derived(entry, found.of(packed))
    return found


def _read(image: Image, at: int, size: int) -> Bytes:
    with image.path.open("rb") as file:
        return np.fromfile(file, np.uint8, size, offset=image.data_at + at)
