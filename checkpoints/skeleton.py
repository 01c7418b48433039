"""A model's code without its weights: embed, one block at a time, head.

The blocks are found by their numbered names and driven through transformers' own forward, so a family needs
no code here: what a block is called with (rotary tables, masks per layer type) is recorded once by a pass in
which every block is replaced by a recorder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from edgepress.checkpoints.allocator import give_back
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.headers import dense_tensors, require_same
from edgepress.checkpoints.quiet import readable
from edgepress.checkpoints.rounded_inputs import round_inputs, rounded_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from edgepress.checkpoints.checkpoint import Checkpoint


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

    # --- the whole model ----------------------------------------------------------------------------------------

    def filled(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model with all weights in memory, its inputs rounded as it says."""
        tensors = dict(self.checkpoint.outer())
        for index in range(len(self.blocks)):
            prefix = f"{self.checkpoint.shape.block_prefix}.{index}."
            tensors |= {prefix + name: tensor for name, tensor in self.checkpoint.block(index).items()}
        own = {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors.items()}
        _assign(self.model, own, str(self.checkpoint.folder), tied=self._tied_names())
        self.model.tie_weights()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        nn.Module.to(self.model, device)
        shape = self.checkpoint.shape
        for block, own_shape in zip(self.blocks, shape.blocks, strict=True):
            round_inputs(block, own_shape, shape.activation_bits)
        return self.model

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
