"""Hidden states of many sequences between two blocks: in memory, or in a file when they are many or must last."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

import torch
from torch import Tensor

from edgepress.checkpoints.manifest import sha256_file


class States:
    """Chunks of hidden states, each (b, L, d). With a path they live in that file, one chunk in memory at a time."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, path: Path | None = None) -> None:
        self.path = path
        self.chunks: Sequence[Tensor]
        if path is None:
            self.chunks = [torch.empty(shape, dtype=dtype) for shape in shapes]
        else:
            self.chunks = _FileChunks(path, shapes, dtype)

    def write(self, index: int, states: Tensor) -> None:
        """Replace one chunk."""
        if isinstance(self.chunks, _FileChunks):
            self.chunks.write(index, states)
        else:
            self.chunks[index].copy_(states)

    def flush(self) -> None:
        """Wait until the file is on the disk."""
        if self.path is not None:
            handle = os.open(self.path, os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def sha256(self) -> str:
        """Of the file that holds the states; they must have one."""
        assert self.path is not None
        return sha256_file(self.path)


class _FileChunks(Sequence[Tensor]):
    """Chunks one after the other in a file, read when asked for. Reading by mapping would count as resident."""

    def __init__(self, path: Path, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        self._path, self._shapes, self._dtype = path, shapes, dtype
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        with path.open("ab") as file:  # creates it; a file that is there keeps what it holds
            if file.tell() < self._offsets[-1]:
                file.truncate(self._offsets[-1])

    def __len__(self) -> int:
        return len(self._shapes)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index >= len(self):
            raise IndexError(index)
        start, end = self._offsets[index], self._offsets[index + 1]
        with self._path.open("rb") as file:
            file.seek(start)
            data = bytearray(file.read(end - start))
        return torch.frombuffer(data, dtype=self._dtype).view(self._shapes[index])

    def write(self, index: int, states: Tensor) -> None:
        data = states.to("cpu", self._dtype).contiguous().view(torch.uint8).flatten().numpy()
        with self._path.open("rb+") as file:
            file.seek(self._offsets[index])
            file.write(data.data)


class Scratch:
    """Room for states that need not outlive the process: memory up to a limit, then a temporary folder."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was spilled."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @property
    def spilled(self) -> bool:
        return self._folder is not None

    def states(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, like: States | None = None) -> States:
        """New states; with `like`, a copy of those."""
        size = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
        path = None
        if size > self._left:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="edgepress-states-")
            self._files += 1
            path = Path(self._folder.name) / f"{self._files}.bin"
        else:
            self._left -= size
        made = States(shapes, dtype, path)
        if like is not None:
            for index, chunk in enumerate(like.chunks):
                made.write(index, chunk)
        return made
