"""Carry hidden states through a model one block at a time, in memory that does not grow with its depth.

Hidden states go through the model one block at a time: load block i's weights, let a stage look at its
inputs and change its weights, run it for its outputs, free it. Peak memory is one block, the embedding or
the head, and the hidden states, whatever the depth.

    for block in Walk(source, batches, runtime, work):
        statistics = block.observe(...)
        ...                                   # change block.linears[...].weight
        target.write_block(block.index, block.weights())
        block.done({"what": "was measured"})
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgepress.checkpoints.checkpoint import Checkpoint, Skeleton
from edgepress.checkpoints.errors import CheckpointError, NumericsError
from edgepress.checkpoints.manifest import SEAL, WORK, require_inside, seal_holds, sealed, sha256_file, write_bytes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import ModelShape

Observer = Callable[[tuple[str, ...], Tensor], None]


class Work:
    """A stage's durable progress inside its unfinished folder: a journal with one line a block.

    A line carries the sha256 of the files written since the line before, and of itself and all lines before it. What
    was changed between a kill and the next run is so found when the journal is read. `vouched` is all those files:
    name from the stage's folder -> sha256.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError naming the line or file that is not as it was written.

        A last line that is cut or damaged is left out, and its step is done again. A journal without hashes, of an
        earlier version, is left out as a whole.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._home = folder.parent
        self._journal = folder / "journal.jsonl"
        self.entries: list[dict[str, Any]] = []
        self.vouched: dict[str, str] = {}
        self._new: dict[str, str] = {}  # of `vouched`, what no line carries yet
        self._last = ""  # the last line's hash
        self._began = time.monotonic()
        if self._journal.is_file():
            self._read()
        self._earlier = float(self.entries[-1]["seconds"]) if self.entries else 0.0

    @property
    def seconds(self) -> float:
        """Time spent on this stage, up to the last entry of earlier runs and in this one."""
        return self._earlier + time.monotonic() - self._began

    def _read(self) -> None:
        data = self._journal.read_bytes()
        lines = data.split(b"\n")
        kept = []
        for number, line in enumerate(lines[:-1], 1):  # behind the last newline: what a kill cut short
            entry = _parsed(line)
            if number == 1 and entry is not None and SEAL not in entry:
                break
            if entry is None or not seal_holds(entry, self._last):
                if number == len(lines) - 1:
                    break
                raise self._damaged(f"line {number} of its {self._journal.name}")
            self._last = str(entry.pop(SEAL))
            self.entries.append(entry)
            self.vouched |= entry.get("files", {})
            kept.append(line + b"\n")
        require_inside(self._home, self.vouched, str(self._journal))
        for name, digest in self.vouched.items():
            path = self._home / name
            if not path.is_file() or sha256_file(path) != digest:
                raise self._damaged(name)
        if (sound := b"".join(kept)) != data:
            write_bytes(self._journal, sound)

    def _damaged(self, what: str) -> CheckpointError:
        home = self._home if self.folder.name == WORK else self.folder
        return CheckpointError(
            f"the unfinished {home} is damaged: {what} is not as it was written. It was neither used nor removed; "
            "move the folder away and run the same command again to compute it anew"
        )

    def vouch(self, path: Path) -> str:
        """Take down a finished file's sha256, for the next line and for `require_as_written`."""
        name = path.relative_to(self._home).as_posix()
        self.vouched[name] = self._new[name] = sha256_file(path)
        return self.vouched[name]

    def remove_rest(self) -> None:
        """Remove from the stage's folder what no line vouches for: a kill left it, and the stage writes it again."""
        for path in [p for p in self._home.rglob("*") if not p.is_dir() or p.is_symlink()]:
            name = path.relative_to(self._home)
            if name.parts[0] != WORK and name.as_posix() not in self.vouched:
                path.unlink()

    def require_as_written(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise CheckpointError unless `files`, a folder's as a manifest lists them, are those that were written.

        A weight file that no step wrote does not belong to the stage, whoever put it there.
        """
        for name, digest in self.vouched.items():
            if Path(name).parts[0] != WORK and files.get(name, {}).get("sha256") != digest:
                raise self._damaged(name)
        if strays := [name for name in files if name.endswith(".safetensors") and name not in self.vouched]:
            raise self._damaged(f"{strays[0]}, which no step of the stage wrote,")

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line and wait until it is on the disk; floats survive the round trip through JSON exactly."""
        files = {"files": self._new} if self._new else {}
        line = sealed(entry | {"seconds": round(self.seconds, 3)} | files, self._last)
        self.entries.append(json.loads(json.dumps({key: value for key, value in line.items() if key != SEAL})))
        with self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._last, self._new = str(line[SEAL]), {}

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


@dataclass
class BlockVisit:
    """One block, dense, with its effective weights on the device, and the hidden states before it."""

    index: int
    count: int
    module: nn.Module
    linears: dict[str, nn.Linear]
    _walk: Walk
    finished: bool = field(default=False)
    token_weights: Mapping[str, Tensor] = field(default_factory=dict)  # (tokens,) of a layer; none: all count alike

    def observe(self, observer: Observer) -> None:
        """Send all inputs through the block; observer(names, x) sees each distinct input once.

        names are the linear layers that share the input (q, k and v; gate and up); x (tokens, in).
        """
        groups: dict[str, tuple[str, ...]] | None = None
        for states in self._walk.states.chunks:
            arriving: list[tuple[str, Tensor]] = []
            hooks = [
                linear.register_forward_pre_hook(_remember(arriving, name))
                for name, linear in self.linears.items()
                if groups is None or name in groups
            ]
            try:
                self._walk.skeleton.run(self.module, self.index, states)
            finally:
                for hook in hooks:
                    hook.remove()
            if groups is None:
                groups = _shared_inputs(arriving)
            for name, x in arriving:
                if name in groups:
                    observer(groups[name], x.reshape(-1, x.shape[-1]))

    @property
    def name(self) -> str:
        """Where the model keeps it, e.g. model.layers.3."""
        return f"{self.model.block_prefix}.{self.index}"

    @property
    def model(self) -> ModelShape:
        """The shape of the whole model."""
        return self._walk.source.shape

    @property
    def inputs(self) -> Sequence[Tensor]:
        """The hidden states before this block, (b, L, d) each, in host memory."""
        return self._walk.states.chunks

    def forward(self, states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """The output (b, L, d) with some weights in place of the block's own, differentiable in them."""
        skeleton = self._walk.skeleton
        arguments = skeleton.arguments(self.index, states)
        output = functional_call(self.module, weights, (states.to(skeleton.device),), arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @property
    def work(self) -> Work | None:
        """The stage's work, if it keeps any."""
        return self._walk.work

    @property
    def stored_dtype(self) -> torch.dtype:
        """The precision in which `weights` gives the block to its file."""
        return self._walk.source.stored_dtype

    def weights(self) -> dict[str, Tensor]:
        """The block's tensors in host memory, each in the precision that it was stored in.

        Where a tensor was computed with in fewer bits than it is stored in, a float32 norm beside bfloat16 matrices,
        every number that the stage left alone is the stored one.
        """
        source = self._walk.source
        before, found = source.stored_block(self.index), {}
        for name, tensor in self.module.state_dict().items():
            now, was = tensor.detach().to("cpu"), before.get(name)
            if was is None or not was.is_floating_point():  # codes, which the stage writes itself
                found[name] = now.to(self.stored_dtype)
            elif torch.promote_types(was.dtype, now.dtype) == now.dtype:
                found[name] = now.to(was.dtype)
            else:
                found[name] = torch.where(was.to(now.dtype) == now, was, now.to(was.dtype))
        return found

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the weights of another block of the same shape: dense ones, by names relative to it."""
        for name, parameter in self.module.named_parameters():
            parameter.data.copy_(tensors[name])

    def done(self, facts: dict[str, Any] | None = None) -> None:
        """Carry the hidden states through the block as it is now, and make the step durable."""
        self._walk.advance(self, facts or {})
        self.finished = True


class Walk:
    """Iterate over the blocks of `source`, carrying the hidden states of `chunks` (token ids, (b, L) each).

    With `work`, every finished block is durable: the states lie in one of two files that take turns, so the
    inputs of the block that a kill interrupts are still there. last_outputs: also run the last block for its
    outputs, which only a head needs.
    """

    def __init__(
        self,
        source: Checkpoint,
        chunks: list[Tensor],
        runtime: Runtime,
        work: Work | None = None,
        last_outputs: bool = False,
        task: str = "blocks",
    ) -> None:
        self.source, self.runtime, self.work = source, runtime, work
        self.skeleton = Skeleton(source, runtime.device, runtime.dtype)
        self._last_outputs = last_outputs
        self._task = task
        self._ids = chunks
        self._shapes = [(*ids.shape, source.shape.hidden_size) for ids in chunks]
        self._next = len(work.entries) if work else 0
        # Without `work` two sets of states take turns, in memory or spilled; with it, two files that last.
        self._scratch = Scratch(runtime.spill_bytes)
        self._turns = [] if work else [self._scratch.states(self._shapes, runtime.dtype) for _ in range(2)]
        self.states = self._states(self._next)
        for index, states in enumerate(self.skeleton.embed(chunks)):  # to the end: it also learns the blocks' arguments
            if self._next == 0:
                self.states.write(index, states)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What `done` was given for each block, earlier runs included."""
        return [entry["facts"] for entry in self.work.entries] if self.work else []

    def __iter__(self) -> Generator[BlockVisit]:
        count = len(self.skeleton.blocks)
        self.runtime.progress.start(self._task, count - self._next)
        while self._next < count:
            index = self._next
            with self.skeleton.block(index) as module:
                visit = BlockVisit(index, count, module, self.skeleton.linears(index), self)
                yield visit
            if not visit.finished:
                raise RuntimeError("a stage left a block without calling done()")

    def advance(self, visit: BlockVisit, facts: dict[str, Any]) -> None:
        entry: dict[str, Any] = {"block": visit.index, "facts": facts}
        if visit.index + 1 < visit.count or self._last_outputs:
            following = self._states(visit.index + 1)
            for number, before in enumerate(self.states.chunks):
                after = self.skeleton.run(visit.module, visit.index, before)
                if not bool(torch.isfinite(after).all()):
                    raise NumericsError(f"the hidden states after block {visit.index} are not finite")
                following.write(number, after)
            following.flush()
            self.states = following
            if self.work:
                entry["states"] = following.sha256()
        if self.work:
            self.work.append(entry)
        self._next = visit.index + 1
        self.runtime.progress.step(block=f"{visit.index + 1}/{visit.count}")

    def _states(self, index: int) -> States:
        if self.work is None:
            return self._turns[index % 2]
        path = self.work.folder / f"states-{index % 2}.bin"
        resumed = 0 < index == self._next and (index < len(self.skeleton.blocks) or self._last_outputs)
        if resumed and not (path.is_file() and path.stat().st_size == self._states_bytes):
            raise CheckpointError(f"{self.work.folder} has lost the hidden states of block {index}; move it away")
        if resumed and sha256_file(path) != self.work.entries[-1]["states"]:
            raise CheckpointError(
                f"{self.work.folder}: the hidden states of block {index} in {path.name} are not as they were written; "
                "move it away"
            )
        return States(self._shapes, self.runtime.dtype, path)

    @property
    def _states_bytes(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes) * self.runtime.dtype.itemsize


def _remember(arriving: list[tuple[str, Tensor]], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        arriving.append((name, inputs[0]))

    return hook


def _shared_inputs(arriving: list[tuple[str, Tensor]]) -> dict[str, tuple[str, ...]]:
    """First layer of each group that got the very same tensor -> the group."""
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in arriving:
        for other, names in groups:
            if other is x:
                names.append(name)
                break
        else:
            groups.append((x, [name]))
    return {names[0]: tuple(names) for _, names in groups}


# --- hidden states ----------------------------------------------------------------------------------------------------
# Hidden states of many sequences between two blocks: in memory, or in a file when they are many or must last.


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
