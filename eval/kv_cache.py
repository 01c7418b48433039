"""The KV cache of a KVFormat on a whole model, for generation, and on one block of a walk, for perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.kv_format import KVFormat
from edgepress.checkpoints.shape import ModelShape
from edgepress.eval.disturb import find_attention
from edgepress.eval.kv_layer import CompressedLayer


class KVCache(Cache):
    """One CompressedLayer a block; works on a model inside `on_model` only."""

    def __init__(self, form: KVFormat, config: PreTrainedConfig, padding: Tensor) -> None:
        windows = own_windows(config)
        self.compressed = [CompressedLayer(form.for_layer(w), padding, is_sliding=w is not None) for w in windows]
        super().__init__(layers=list(self.compressed))

    @property
    def nbytes(self) -> int:
        """Bytes held between two tokens, all layers and sequences."""
        return sum(layer.nbytes for layer in self.compressed)


def own_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer, None where it sees all. Raises CheckpointError for other kinds of layers."""
    windows: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise CheckpointError(
                f"a layer of this {config.model_type} model keeps more than keys and values ({type(layer).__name__}); "
                "leave --kv-bits and --kv-window out"
            )
        windows.append(layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None)
    return windows


@contextmanager
def on_model(model: PreTrainedModel, shape: ModelShape, form: KVFormat, padding: Tensor) -> Iterator[KVCache | None]:
    """A cache to give to `generate` as past_key_values; None, transformers' own, for a plain format.

    padding (b,): how many tokens at the left of each prompt are none.
    """
    if form.plain:
        yield None
        return
    cache = KVCache(form, model.config, padding)
    with ExitStack() as stack:
        for index, layer in enumerate(cache.compressed):
            block = model.get_submodule(f"{shape.block_prefix}.{index}")
            hook = find_attention(block, index).register_forward_pre_hook(_widening(layer), with_kwargs=True)
            stack.callback(hook.remove)
        yield cache


@contextmanager
def on_block(block: nn.Module, index: int, config: PreTrainedConfig, form: KVFormat) -> Iterator[None]:
    """Every forward pass of this block sees keys and values as `form` keeps them.

    Each pass is one of whole sequences, from their first token on; they may be padded on the right, where no token
    sees it.
    """
    if form.plain:
        yield
        return
    window = own_windows(config)[index]

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = _states(args, kwargs)
        layer = CompressedLayer(form.for_layer(window), torch.zeros(len(states), dtype=torch.long))
        mask = layer.mask(kwargs["attention_mask"], states)
        return args, kwargs | {"attention_mask": mask, "past_key_values": _Alone(layer)}

    handle = find_attention(block, index).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Alone(Cache):
    """The cache of one layer, wherever in the model that lies."""

    def __init__(self, layer: CompressedLayer) -> None:
        super().__init__(layers=[layer])
        self._layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._layer.update(key_states, value_states)


def _widening(layer: CompressedLayer) -> Any:
    """A prompt's keys come twice from `layer`: a mask for both."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if layer.get_seq_length():
            return args, kwargs
        return args, kwargs | {"attention_mask": layer.mask(kwargs["attention_mask"], _states(args, kwargs))}

    return hook


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states
