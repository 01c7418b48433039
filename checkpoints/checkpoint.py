"""Open a model folder and read it one block at a time, as dense effective weights."""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from edgepress.checkpoints.config import beyond_plain, hf_config, read_config
from edgepress.checkpoints.errors import CheckpointError, require_unicode
from edgepress.checkpoints.forms import Codebook
from edgepress.checkpoints.headers import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_PACKED,
    EDGE,
    adapter_path,
    dense_tensors,
    different_head,
    require_same,
    same_values,
    shape_of,
    stored_tensors,
    weight_files,
)
from edgepress.checkpoints.manifest import (
    MANIFEST,
    WORK,
    Manifest,
    check_files,
    require_finished,
    require_inside,
    sha256_file,
)
from edgepress.checkpoints.masks import require_finite
from edgepress.checkpoints.memory import give_back
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.quiet import readable
from edgepress.checkpoints.shape import LinearShape, ModelShape, Sparsity, with_pattern
from edgepress.checkpoints.vocabulary import load_tokenizer

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from edgepress.checkpoints.shape import BlockShape


_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """A model folder of any stage, or any Hugging Face causal language model stored as safetensors.

    Reading a block costs that block's bytes and no more; nothing is unpickled and no remote code runs.
    """

    def __init__(self, folder: Path, manifest: Manifest | None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.config = read_config(folder)
        self._stored = stored_tensors(folder, self.config)
        self.shape: ModelShape = shape_of(folder, self.config, self._stored)

    @classmethod
    def open(cls, folder: Path, hashes: bool = False) -> Checkpoint:
        """Open after the cheap checks: manifest readable, every file there with its size, headers sound.

        hashes: compare every file's sha256 as well. Raises CheckpointError naming what is wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
        require_unicode(folder, f"the name of the folder {folder}")
        manifest = Manifest.read(folder) if (folder / MANIFEST).is_file() else None
        require_finished(folder)
        if manifest is not None:
            check_files(folder, manifest, hashes)
        return cls(folder, manifest)

    # --- identity ---------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """The manifest's, or for a foreign folder a hash over its configuration and weight files."""
        if self.manifest is not None:
            return self.manifest.fingerprint
        return foreign_fingerprint(self.folder)

    @property
    def name(self) -> str:
        """What tables call it: its folder's name, and for a model converted from one file that model's."""
        folder = self.folder.resolve().name
        if self.manifest is None or self.manifest.stage != "source":
            return folder
        return folder.removesuffix(f"-{self.manifest.options['sha256'][:12]}-v{self.manifest.stage_version}")

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The precision that most weights of this checkpoint have, or had before quantisation."""
        return _TORCH_DTYPES[self.shape.dense_dtype]

    def parent(self) -> Checkpoint:
        """The checkpoint this one was made from. Raises CheckpointError if it is gone or changed."""
        if self.manifest is None or self.manifest.parent is None:
            raise CheckpointError(f"{self.folder} was not made from another checkpoint")
        link = self.manifest.parent
        if not Path(link["path"]).is_absolute():  # within one store, `../NAME`
            told_by = f"{self.folder / MANIFEST}, the parent's path in it,"
            require_inside(self.folder.resolve().parent, [link["path"].removeprefix("../")], told_by)
        parent = Checkpoint.open((self.folder.resolve() / link["path"]).resolve())
        if parent.fingerprint != link["fingerprint"]:
            raise CheckpointError(f"{parent.folder} is not the checkpoint that {self.folder} was made from")
        return parent

    def ancestors(self) -> Iterator[Checkpoint]:
        """This checkpoint, its parent, and so on to the uncompressed model."""
        current = self
        while True:
            yield current
            if current.manifest is None or current.manifest.parent is None:
                return
            current = current.parent()

    # --- weights ----------------------------------------------------------------------------------------------

    def stored_block(self, index: int) -> dict[str, Tensor]:
        """The block's tensors as they lie on disk, names relative to the block; memory-mapped, not copied."""
        prefix = f"{self.shape.block_prefix}.{index}."
        return self._read([name for name in self._stored if name.startswith(prefix)], prefix)

    def block(self, index: int) -> dict[str, Tensor]:
        """The block's dense effective weights: codes dequantised, adapter added, in the stored precision.

        Raises NumericsError naming a tensor that holds NaN or infinity.
        """
        dense = self.stored_block(index)
        linears = self.shape.blocks[index].linears
        codes = {x.name: {k: dense.pop(f"{x.name}.{k}") for k in x.grid.kinds} for x in linears if x.grid}
        adapter = self.adapter_part(index)
        for x in linears:
            if x.grid:
                weight = self._dense(index, x, codes[x.name])
                dense[f"{x.name}.weight"] = weight.to(_TORCH_DTYPES[x.dtype])
            if x.adapted:
                own = {kind: dense[f"{x.name}.{kind}"] for kind in ("weight", "bias") if f"{x.name}.{kind}" in dense}
                beside = {t.name.removeprefix(f"{x.name}."): adapter[t.name] for t in x.adapter()}
                for kind, tensor in applied(own, beside, self.adapter_scale).items():
                    dense[f"{x.name}.{kind}"] = tensor
        for name, tensor in dense.items():
            require_finite(f"{self.folder.name}: {self.shape.block_prefix}.{index}.{name}", tensor)
        return dense

    def base_weight(self, index: int, linear: LinearShape) -> Tensor:
        """One layer's weights without the adapter (out, in), where an N:M mask can be seen."""
        prefix = f"{self.shape.block_prefix}.{index}.{linear.name}."
        if linear.grid is None:
            return self._read([f"{prefix}weight"], prefix)["weight"]
        stored = self._read([f"{prefix}{kind}" for kind in linear.grid.kinds], prefix)
        return self._dense(index, linear, stored)

    def packed_layers(
        self, index: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[dict[str, Tensor], dict[str, Callable[[], Tensor]]]:
        """The block's tensors as in `block`, but for quantised layers' weights; and for each of those what reads it.

        Raises NumericsError as `block` does.
        """
        tensors, readers = self.stored_block(index), dict[str, Callable[[], Tensor]]()
        for x in self.shape.blocks[index].linears:
            if x.grid is None:
                continue
            codes = {kind: tensors.pop(f"{x.name}.{kind}") for kind in x.grid.kinds}
            readers[x.name] = self.packed_reader(index, x, codes, device, dtype)
            require_finite(f"{self.folder.name}: {self.shape.block_prefix}.{index}.{x.name}.weight", readers[x.name]())
        return tensors, readers

    def packed_reader(
        self, index: int, x: LinearShape, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        """What dequantises a layer's stored tensors, by their kinds, whenever it is called.

        On a GPU bitsandbytes' kernels read nf4 where that package is installed; on a CPU they misread some widths.
        """
        if device.type == "cuda" and isinstance(x.grid, Codebook) and x.grid.foreign and find_spec("bitsandbytes"):
            from edgepress.checkpoints.packing import by_kernels

            read = by_kernels(stored, device)
            return lambda: read().to(dtype)
        codes = {kind: tensor.to(device) for kind, tensor in stored.items()}
        return partial(self._read_packed, index, x, codes, device, dtype)

    def _read_packed(
        self, index: int, x: LinearShape, codes: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        return self._dense(index, x, codes).to(_TORCH_DTYPES[x.dtype]).to(device, dtype)

    def _dense(self, index: int, linear: LinearShape, stored: Mapping[str, Tensor]) -> Tensor:
        assert linear.grid is not None
        try:
            return linear.grid.read(stored, linear.out_features, linear.in_features)
        except CheckpointError as error:
            layer = f"{self.shape.block_prefix}.{index}.{linear.name}"
            raise CheckpointError(f"{self.folder}: {layer}: {error}") from None

    def outer(self) -> dict[str, Tensor]:
        """Everything outside the blocks by its full name; memory-mapped."""
        tensors = self._read([t.name for t in self.shape.outer], "")
        for name, tensor in tensors.items():
            require_finite(f"{self.folder.name}: {name}", tensor)
        return tensors

    def _read(self, names: list[str], prefix: str) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._stored[name].path].append(name)
        tensors: dict[str, Tensor] = {}
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in members:
                    tensors[name.removeprefix(prefix)] = file.get_tensor(self._stored[name].name)
        return tensors

    def require_same_values(self, head: str, embedding: str) -> None:
        """Raise CheckpointError where the files hold another matrix for the head than for what it is tied to."""
        if not same_values(self._stored[head], self._stored[embedding]):
            raise different_head(self.folder, head)

    def adapter_part(self, index: int) -> dict[str, Tensor]:
        """The block's adapter as it is stored, names relative to the block; empty where it has none."""
        names = [t.name for t in self.shape.blocks[index].adapter()]
        if not names:
            return {}
        with safe_open(adapter_path(self.folder), framework="pt") as file:
            key = f"base_model.model.{self.shape.block_prefix}.{index}"
            return {name: file.get_tensor(f"{key}.{name}") for name in names}

    def adapter_codes_part(self, index: int) -> dict[str, Tensor]:
        """The block's adapter as 8-bit codes and scales, names relative to the block; empty where it has none."""
        names = [t.name for t in self.shape.blocks[index].packed_adapter()]
        if not names:
            return {}
        key = f"base_model.model.{self.shape.block_prefix}.{index}"
        with safe_open(self.folder / ADAPTER_PACKED, framework="pt") as file:
            present = set(file.keys())
            if missing := [name for name in names if f"{key}.{name}" not in present]:
                raise CheckpointError(f"{self.folder / ADAPTER_PACKED} lacks {key}.{missing[0]}")
            return {name: file.get_tensor(f"{key}.{name}") for name in names}

    def edge(self) -> dict[str, Tensor]:
        """The packed copies of embedding and head, by full name; empty where there are none."""
        names = [t.name for t in self.shape.edge_tensors()]
        if not names:
            return {}
        with safe_open(self.folder / EDGE, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}

    @cached_property
    def adapter_scale(self) -> float:
        """What B A is multiplied with; 1 where an adapter has neither.

        Raises CheckpointError where an adapter that was not written here asks for more than that.
        """
        path = adapter_path(self.folder, ADAPTER_CONFIG)
        config = json.loads(path.read_text())
        ranks = {x.name: x.adapter_rank for block in self.shape.blocks for x in block.linears if x.adapter_rank}
        if self.manifest is None and ranks:
            dora = any(x.adapter_vector == "magnitude" for block in self.shape.blocks for x in block.linears)
            if faults := beyond_plain(config, ranks, dora):
                raise CheckpointError(f"{path} asks for what is not read here: {'; '.join(faults)}. Merge the adapter")
        return adapter_scale(config)

    # --- transformers' objects ----------------------------------------------------------------------------------

    def hf_config(self) -> PreTrainedConfig:
        """The configuration as transformers reads it, without the note that weights are quantised."""
        config = hf_config(self.folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises CheckpointError if the folder holds none."""
        return load_tokenizer(self.folder)

    def model(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, packed: bool = False
    ) -> PreTrainedModel:
        """The whole model in memory with its effective dense weights; for training and generating.

        packed: quantised layers without an adapter keep their codes, and dequantise them whenever they compute.
        """

        return Skeleton(self).filled(torch.device(device), dtype or self.stored_dtype, packed)

    def facts(self, pattern: Sparsity | None = None) -> dict[str, Any]:
        """Counts measured on the files: parameters in total, non-zero, bytes of all safetensors files and packed.

        pattern: what the manifest will claim, as long as there is none to read it from.
        """
        zeros = 0
        for index in sorted(set(self.shape.firsts)):
            for linear in self.shape.blocks[index].linears:
                zeros += int((self.base_weight(index, linear) == 0).sum())
        return {
            "parameters_total": self.shape.parameters_total,
            "parameters_nonzero": self.shape.parameters_total - zeros,
            "file_bytes": sum(
                path.stat().st_size
                for path in self.folder.rglob("*.safetensors")
                if path.relative_to(self.folder).parts[0] != WORK
            ),
            "packed_bytes": packed_sizes(with_pattern(self.shape, pattern) if pattern else self.shape).total,
        }


def foreign_fingerprint(folder: Path) -> str:
    """Sha256 over the names and hashes of the files that make a model what it is."""
    digest = hashlib.sha256()
    names = set(weight_files(folder).values()) | {folder / "config.json"}
    names |= {path for name in (ADAPTER, ADAPTER_CONFIG) if (path := adapter_path(folder, name)).is_file()}
    names |= {path for pattern in ("*token*", "*.model") for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(names):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


# --- a model's code without its weights -------------------------------------------------------------------------------
# A model's code without its weights: embed, one block at a time, head.
#
# The blocks are found by their numbered names and driven through transformers' own forward, so a family needs no code
# here: what a block is called with (rotary tables, masks per layer type) is recorded once by a pass in which every
# block is replaced by a recorder.


# Families whose model goes on with the first of what a block returns: of a tensor alone it would take a sequence.
_BLOCKS_RETURN_TUPLES = {"falcon"}


class Skeleton:
    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device or torch.device("cpu")
        self.dtype = dtype or checkpoint.stored_dtype
        self.model = _build(checkpoint, self.dtype)
        prefix = checkpoint.shape.block_prefix
        self._owner_name, _, self._list_name = prefix.rpartition(".")
        try:
            self._owner = self.model.get_submodule(self._owner_name)
            self.blocks = cast(nn.ModuleList, self.model.get_submodule(prefix))
        except AttributeError:
            raise CheckpointError(
                f"{checkpoint.folder}: transformers builds this {checkpoint.shape.family} model without '{prefix}', "
                "where its files keep the blocks; this family is not supported"
            ) from None
        self._tuples = self.model.config.model_type in _BLOCKS_RETURN_TUPLES
        _require_complete(self.model, checkpoint)
        self._arguments: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    # --- one part at a time -------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, chunks: list[Tensor]) -> Iterator[Tensor]:
        """Hidden states (b, L, d) that enter the first block, for token ids (b, L) each, one at a time."""
        stand_ins = [_Recorder(block, self._tuples) for block in self.blocks]
        with self._outer_weights(), self._blocks_replaced(stand_ins) as recorders:
            for ids in chunks:
                yield self._record(ids, recorders)

    def _record(self, ids: Tensor, recorders: list[Any]) -> Tensor:
        base = self.model.get_submodule(self._owner_name)
        base(input_ids=ids.to(self.device), use_cache=False)
        # Sequences are never padded on the left, so what a block is called with depends on the shape alone.
        self._arguments[tuple(ids.shape)] = [recorder.arguments for recorder in recorders]
        states: Tensor = recorders[0].states
        return states.to("cpu")

    @contextmanager
    def block(self, index: int, weights: dict[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """The block with its effective weights on the device, its inputs rounded as it says; freed on leaving."""
        block = self.blocks[index]
        weights = weights if weights is not None else self.checkpoint.block(index)
        # A loaded tensor may be a view of the memory-mapped file; stages edit weights, so each gets a copy.
        own = {name: tensor.to(self.device, self.dtype, copy=True) for name, tensor in weights.items()}
        _assign(block, own, f"block {index} of {self.checkpoint.folder}")
        for module in block.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))
        shape = self.checkpoint.shape
        try:
            with rounded_inputs(block, shape.blocks[index], shape.activation_bits):
                yield block
        finally:
            block.to("meta")
            _restore_buffers(self.model, block)
            own.clear()
            give_back()

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, states: Tensor) -> Tensor:
        """The block's output (b, L, d) for hidden states (b, L, d), both in host memory."""
        arguments = self._arguments[tuple(states.shape[:2])][index]
        return self.call(block, arguments, states.to(self.device)).to("cpu")

    def call(self, block: nn.Module, arguments: dict[str, Any], states: Tensor) -> Tensor:
        output = block(states, **arguments)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    def arguments(self, index: int, states: Tensor) -> dict[str, Any]:
        """What transformers calls this block with, for hidden states of this shape."""
        return self._arguments[tuple(states.shape[:2])][index]

    @contextmanager
    def head(self) -> Iterator[Any]:
        """A function from the last block's output (b, L, d) to logits (b, L, vocabulary)."""
        entrance = _Entrance(self._tuples)
        with self._outer_weights(), self._blocks_replaced([entrance] * len(self.blocks)):

            def logits(states: Tensor) -> Tensor:
                entrance.states = states.to(self.device)
                result: Tensor = self.model(inputs_embeds=entrance.states, use_cache=False).logits
                return result

            yield logits

    @contextmanager
    def head_inputs(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """A function from the last block's output (b, L, d) to what the head's matrix multiplies, (b, L, d)."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(inputs[0])
            return (inputs[0][:, :1],)  # the logits of one token, since they are not wanted

        with self.head() as logits:
            output: nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
            hook = output.register_forward_pre_hook(keep)

            def inputs_of(states: Tensor) -> Tensor:
                logits(states)
                return seen.pop()

            try:
                yield inputs_of
            finally:
                hook.remove()

    # --- the whole model ----------------------------------------------------------------------------------------

    def filled(self, device: torch.device, dtype: torch.dtype, packed: bool = False) -> PreTrainedModel:
        """The model with all weights in memory, packed or dense, its inputs rounded as it says."""

        def copied(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """A part at a time: what is read is mapped memory, which goes when its copy is there."""
            return {prefix + name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}

        own = copied("", self.checkpoint.outer())
        for index in range(len(self.blocks)):
            adapted = any(x.adapted for x in self.checkpoint.shape.blocks[index].linears)
            part = self._packed(index, device, dtype) if packed and not adapted else self.checkpoint.block(index)
            own |= copied(f"{self.checkpoint.shape.block_prefix}.{index}.", part)
            del part
        _assign(self.model, own, str(self.checkpoint.folder), tied=self._tied_names())
        self.model.tie_weights()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        nn.Module.to(self.model, device)
        shape = self.checkpoint.shape
        for block, own_shape in zip(self.blocks, shape.blocks, strict=True):
            round_inputs(block, own_shape, shape.activation_bits)
        return self.model

    def _packed(self, index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Put packed layers into the block in place of its quantised ones; the tensors that are left to assign."""
        from edgepress.checkpoints.packed_linear import PackedLinear

        tensors, readers = self.checkpoint.packed_layers(index, device, dtype)
        for name, read in readers.items():
            parent, _, leaf = name.rpartition(".")
            old = self.blocks[index].get_submodule(name)
            layer = PackedLinear(old.out_features, old.in_features, old.bias, read)  # type: ignore[arg-type]
            setattr(self.blocks[index].get_submodule(parent), leaf, layer)
        return tensors

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The block's linear layers by their name relative to it."""
        return {name: m for name, m in self.blocks[index].named_modules() if isinstance(m, nn.Linear)}

    # --- placing weights ----------------------------------------------------------------------------------------

    def _tied_names(self) -> set[str]:
        return set(getattr(self.model, "all_tied_weights_keys", {}) or {})

    @contextmanager
    def _outer_weights(self) -> Iterator[None]:
        """Embedding, last norm and head on the device while needed; the blocks stay without weights."""
        outer = {n: t.to(self.device, self.dtype) for n, t in self.checkpoint.outer().items()}
        meta = dict(self.model.named_parameters())
        unknown = sorted(set(outer) - set(meta) - self._tied_names())
        if unknown:
            raise CheckpointError(f"{self.checkpoint.folder} holds {unknown[0]}, which transformers' model has not")
        for name, tensor in outer.items():
            if name in meta or name in self._tied_names():
                _set_parameter(self.model, name, tensor)
        self.model.tie_weights()
        for module in _outside(self.model, self.blocks):
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        try:
            yield
        finally:
            for name, parameter in meta.items():
                if name in outer:
                    _set_parameter(self.model, name, parameter)
            self.model.tie_weights()

    @contextmanager
    def _blocks_replaced(self, substitutes: list[Any]) -> Iterator[list[Any]]:
        setattr(self._owner, self._list_name, nn.ModuleList(substitutes))
        try:
            yield substitutes
        finally:
            setattr(self._owner, self._list_name, self.blocks)


class _Recorder(nn.Module):
    """Stands in for a block: remembers what it was called with and passes the hidden states on."""

    def __init__(self, block: nn.Module, tuples: bool) -> None:
        super().__init__()
        self.tuples = tuples
        # outside the module tree, so that the recorder has no weights of its own
        object.__setattr__(self, "block", block)
        self.arguments: dict[str, Any] = {}
        self.states: Tensor

    def __getattr__(self, name: str) -> Any:
        # some families ask a block for its attention type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor | tuple[Tensor]:
        self.states, self.arguments = hidden_states, arguments
        return (hidden_states,) if self.tuples else hidden_states


class _Entrance(nn.Module):
    """Stands in for all blocks: whatever comes in, the given hidden states go out."""

    states: Tensor

    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.tuples = tuples

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor | tuple[Tensor]:
        return (self.states,) if self.tuples else self.states


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, with real values in the buffers that no file holds (rotary tables)."""
    from transformers import AutoModelForCausalLM

    config = checkpoint.hf_config()
    # Nobody reads them here, and with them a model expects more of its blocks than the hidden states.
    config.output_attentions = config.output_hidden_states = False
    config.return_dict = True  # without it some forward passes of transformers cannot read their own results
    with torch.device("meta"), readable(f"{checkpoint.folder} is not a causal language model that transformers builds"):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=attention_kernels(config), trust_remote_code=False
        )
    model.eval()
    _restore_buffers(model, model)
    built: PreTrainedModel = model
    return built


def attention_kernels(config: PreTrainedConfig) -> str:
    """What transformers chooses where nobody asks for anything: PyTorch's own, else the plain formula.

    A configuration may name kernels of its writer's machine, which must neither be needed here nor change a number.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(known, "_supports_sdpa", False) else "eager"


def _require_complete(model: Any, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the files hold every parameter of the model, of its shape, and nothing else."""
    tied = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    found = dense_tensors(checkpoint.shape)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for copy, original in tied.items():
        if copy in found and original in found:
            checkpoint.require_same_values(copy, original)
        elif copy not in found:
            wanted.pop(copy, None)
    require_same(wanted, found, str(checkpoint.folder))


def _restore_buffers(model: Any, part: nn.Module) -> None:
    """Give every meta buffer its initial value, the way from_pretrained fills those that no file holds."""
    for module in part.modules():
        lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in lost:
            persistent = name not in module._non_persistent_buffers_set  # such a one is read from the files afterwards
            module.register_buffer(name, torch.empty_like(module.get_buffer(name), device="cpu"), persistent=persistent)
        if lost:
            model._init_weights(module)


def _outside(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    inside = {id(m) for m in blocks.modules()}
    return [m for m in model.modules() if id(m) not in inside]


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, parameter)


def _assign(module: nn.Module, tensors: dict[str, Tensor], what: str, tied: set[str] | None = None) -> None:
    result = module.load_state_dict(tensors, strict=False, assign=True)
    missing = [name for name in result.missing_keys if name not in (tied or set())]
    if missing or result.unexpected_keys:
        parts = [f"lacks {missing[0]}"] if missing else []
        parts += [f"has {result.unexpected_keys[0]}, which the model has not"] if result.unexpected_keys else []
        raise CheckpointError(f"{what} {' and '.join(parts)}")
    for parameter in module.parameters():
        parameter.requires_grad_(False)


# --- adapters ---------------------------------------------------------------------------------------------------------
# What an adapter in PEFT's format makes of a layer's weights: LoRA, DoRA and IA3.


def adapter_scale(config: Mapping[str, Any]) -> float:
    """What adapter_config.json multiplies B A with: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
    if "lora_alpha" not in config:
        return 1.0
    try:
        rank, alpha = float(config["r"]), float(config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        scale = math.nan
    if not math.isfinite(scale):
        raise CheckpointError(
            f"adapter_config.json states r = {config.get('r')!r} and lora_alpha = {config['lora_alpha']!r}; a rank "
            "above 0 and a number are wanted"
        )
    return scale


def applied(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A layer's effective weight, and its bias where the adapter acts on it too, in their own precision.

    base: weight (out, in) and perhaps bias (out,). adapter: PEFT's tensors, named relative to the layer.
    """
    weight = base["weight"]
    W = weight.float()
    if "ia3_l" in adapter:
        factor = adapter["ia3_l"].float()  # (out, 1) or (1, in)
        found = {"weight": (W * factor).to(weight.dtype)}
        if "bias" in base and factor.shape[1] == 1:  # what scales a layer's output scales its bias
            found["bias"] = (base["bias"].float() * factor.flatten()).to(base["bias"].dtype)
        return found
    W = W + scale * (adapter["lora_B.weight"].float() @ adapter["lora_A.weight"].float())
    if "lora_magnitude_vector" in adapter:
        W = W * dora_factor(W, adapter["lora_magnitude_vector"].float())
    return {"weight": W.to(weight.dtype)}


def dora_factor(direction: Tensor, magnitude: Tensor) -> Tensor:
    """m / norm(V) of each row (out, 1), for V (out, in) and m (out,): DoRA (arXiv 2402.09353), equation 5.

    A row of zeros has no direction: its factor is finite, and the row stays zero.
    """
    factor: Tensor = magnitude / direction.norm(dim=1).clamp_min(1e-12)
    return factor.unsqueeze(1)


# --- 8-bit adapters ---------------------------------------------------------------------------------------------------
# An adapter as 8-bit codes, beside the 16-bit tensors in PEFT's format that are what the codes stand for.


def eight_bit(matrix: Tensor, within: int) -> tuple[Tensor, Tensor]:
    """Codes int8 from -127 to 127 and float32 scales, one for each rank; `within` is the dimension that shares it.

    A's rows and B's columns share a scale, so a kernel scales the r values between the two products once.
    """
    scales = matrix.float().abs().amax(dim=within, keepdim=True) / 127
    codes = torch.round(matrix.float() / scales.clamp_min(torch.finfo(torch.float32).tiny)).clamp(-127, 127)
    return codes.to(torch.int8), scales


def unpacked(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, in the adapter's precision."""
    return (codes.float() * scales).to(dtype)


def differing(folder: Path) -> list[str]:
    """Names of the adapter's tensors in a checkpoint folder that are not exactly what its packed codes stand for."""
    packed, adapter = load_file(folder / ADAPTER_PACKED), load_file(adapter_path(folder))
    found = []
    for name, tensor in adapter.items():
        base = name.removesuffix(".weight")
        codes, scales = packed.get(f"{base}.codes"), packed.get(f"{base}.scales")
        if codes is None or scales is None or not torch.equal(unpacked(codes, scales, tensor.dtype), tensor):
            found.append(name)
    return found


# --- 8-bit inputs -----------------------------------------------------------------------------------------------------
# 8-bit inputs of quantised layers, simulated: what integer engines multiply, in the precision of the forward pass.
#
# Dynamic, one scale a token, symmetric: q = round(x / s) with s = max(abs(x)) / 127 over the token's features (the
# activations of SmoothQuant, arXiv 2211.10438, and QQQ, arXiv 2406.09904; thesis 001, section 3.3.1). A checkpoint
# states it in its configuration (`ModelShape.activation_bits`), and every forward pass over its weights here is made
# so. Other libraries do not know the key and leave the inputs as they are.


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """x (..., features) as codes of `bits` bits and a scale for each token stand for it, in x's precision.

    The gradient passes through the rounding.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded: Tensor = (wide / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().mul(scale).to(x.dtype)
    return rounded.detach() + (x - x.detach()) if x.requires_grad else rounded


@contextmanager
def rounded_inputs(block: nn.Module, shape: BlockShape, bits: int) -> Iterator[None]:
    """Round what enters the block's quantised layers until the context ends; nothing at 16 bits."""
    handles = round_inputs(block, shape, bits)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def round_inputs(block: nn.Module, shape: BlockShape, bits: int) -> list[RemovableHandle]:
    """The same for as long as the block lives, or until the handles are removed."""
    if bits >= 16:
        return []
    hook = _rounding(bits)
    names = [x.name for x in shape.linears if x.grid is not None]
    return [block.get_submodule(name).register_forward_pre_hook(hook) for name in names]


def _rounding(bits: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """One hook for a block's layers: those that share an input share the rounded one, which observers tell them by."""
    last: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None  # weak: the hook holds no memory

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal last
        x = inputs[0]
        rounded = last[1]() if last and last[0]() is x else None
        if rounded is None:
            rounded = round_tokens(x, bits)
            last = (weakref.ref(x), weakref.ref(rounded))
        return (rounded, *inputs[1:])

    return hook
