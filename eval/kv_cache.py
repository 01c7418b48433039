"""Quantised and windowed KV caches, for generation and for perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from edgepress.checkpoints.disturb import find_attention
from edgepress.checkpoints.errors import CheckpointError, NumericsError
from edgepress.checkpoints.kv_format import GROUP, KVFormat, value_group
from edgepress.checkpoints.shape import ModelShape


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


# --- codes ------------------------------------------------------------------------------------------------------------
# Keys and values of whole groups of tokens as packed codes, and back.
#
# Asymmetric grids after KIVI (arXiv 2402.02750, section 3): x ~ code * scale + least with code in 0 .. 2^bits - 1,
# least = min(x), scale = (max(x) - min(x)) / (2^bits - 1) over the elements that share them. Scale and least are
# float16: a bfloat16 minimum would err by more than an 8-bit step where a channel lies far from zero.


Stored = tuple[Tensor, ...]  # each (b, heads, groups, ...): codes, scale, least; or the values themselves at 16 bit


def encode_keys(keys: Tensor, bits: int) -> Stored:
    """keys (b, heads, groups, tokens, head_dim): a grid for each channel of each group."""
    return _encode(keys.transpose(-1, -2), bits) if bits < 16 else (keys,)


def encode_values(values: Tensor, bits: int) -> Stored:
    """values (b, heads, groups, tokens, head_dim): a grid for each token and up to 32 of its channels."""
    if bits == 16:
        return (values,)
    width, head_dim = value_group(values.shape[-1]), values.shape[-1]
    return _encode(values.reshape(*values.shape[:3], GROUP * head_dim // width, width), bits)


def decode_keys(stored: Stored, bits: int, dtype: torch.dtype) -> Tensor:
    return _decode(stored, bits, dtype).transpose(-1, -2) if bits < 16 else stored[0]


def decode_values(stored: Stored, bits: int, dtype: torch.dtype, head_dim: int) -> Tensor:
    if bits == 16:
        return stored[0]
    values = _decode(stored, bits, dtype)
    return values.reshape(*values.shape[:3], GROUP, head_dim)


def _encode(x: Tensor, bits: int) -> Stored:
    """x (b, heads, groups, grids, elements) with one grid for each row of elements."""
    x = x.float()
    least, most = x.aminmax(dim=-1)
    levels = 2**bits - 1
    least, scale = least.half(), ((most - least) / levels).half()
    if not bool((torch.isfinite(scale) & torch.isfinite(least)).all()):
        raise NumericsError("a cached key or value is too large for a float16 scale; use --kv-bits 16")
    # A range too small for a float16 scale becomes its minimum.
    step = torch.where(scale > 0, scale, torch.ones_like(scale)).float().unsqueeze(-1)
    codes = ((x - least.float().unsqueeze(-1)) / step).round_().clamp_(0, levels)
    codes = (codes * (scale > 0).unsqueeze(-1)).to(torch.uint8).flatten(3)
    return (_pack(codes) if bits == 4 else codes), scale, least


def _decode(stored: Stored, bits: int, dtype: torch.dtype) -> Tensor:
    codes, scale, least = stored
    codes = _unpack(codes) if bits == 4 else codes
    codes = codes.reshape(*scale.shape, codes.shape[-1] // scale.shape[-1])
    return torch.addcmul(least.float().unsqueeze(-1), codes.float(), scale.float().unsqueeze(-1)).to(dtype)


def _pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the earlier in the low half; 32 tokens make an even number of codes."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


# --- one layer --------------------------------------------------------------------------------------------------------
# One layer of a KV cache that holds packed codes and forgets tokens, for transformers' models.
#
# Every token, of the prompt or generated, sees what it would see if the tokens came one by one: its own group in
# full, earlier groups as they come back from their codes, sinks in full, nothing that was evicted. For a prompt,
# which passes at once, a layer gets each key twice, decoded and in full, and a mask that picks one for each query.
# Groups count from a sequence's first real token, so padding on the left changes nothing.


_FAR = 2**40  # a window that nothing leaves


class CompressedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values (b, heads, tokens, head_dim) of one layer.

    padding (b,): how many tokens at the left of each sequence are none. `update` returns, for the first tokens, those
    decoded and those in full side by side (2 L, see `mask`), and for each later one the tokens it sees, at the right.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self, form: KVFormat, padding: Tensor, is_sliding: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._form, self._padding, self.is_sliding = form, padding, is_sliding
        self._window = form.window or _FAR
        self._seen = 0  # tokens, padding included
        self._groups: tuple[Stored, Stored]
        self._first: Tensor  # (b,) number of the first group held
        self._finished: Tensor  # (b,) and of the one after the last
        # (b, heads, sinks + GROUP, head_dim): the sinks, then the group that is not finished
        self.keys: Tensor
        self.values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept from one token to the next."""
        return sum(t.nbytes for t in (self.keys, self.values, *self._groups[0], *self._groups[1]))

    # --- transformers' interface --------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self._head_dim = key_states.dtype, key_states.device, key_states.shape[-1]
        self._padding = self._padding.to(self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._seen:
            self.lazy_initialization(key_states, value_states)
            return self._take_prompt(key_states, value_states)
        if key_states.shape[2] != 1:
            raise RuntimeError("after the prompt, tokens come one by one")
        self._append(key_states, value_states)
        index = self._visible()
        found = self._gathered(index)
        self._settle()
        return found

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What is returned lies at the right: whichever tokens those are, they stand as the newest."""
        if not self._seen:
            return query_length, 0
        held = int(self._kept(self._seen + 1 - self._padding).max())
        return held, self._seen + 1 - held

    def get_seq_length(self) -> int:
        return self._seen

    def get_max_length(self) -> int:
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these sequences alone."""
        self._padding, self._first, self._finished = (t[indices] for t in (self._padding, self._first, self._finished))
        self.keys, self.values = self.keys[indices], self.values[indices]
        room = self._room()
        keys, values = (tuple(t[indices, :, :room] for t in part) for part in self._groups)
        self._groups = keys, values

    # --- the first tokens, at once ------------------------------------------------------------------------------

    def mask(self, base: Tensor | None, states: Tensor) -> Tensor:
        """Which of the 2 L keys of a prompt each of its L tokens sees: decoded ones, then those in full.

        base (b or 1, 1, L, L) as the model makes it, True or 0 where visible; None: plain causal. states (b, L, d).
        """
        length, self._padding = states.shape[1], self._padding.to(states.device)
        place = torch.arange(length, device=self._padding.device)
        real = place - self._padding.unsqueeze(1)  # (b, L) place among the sequence's own tokens
        group = (real - self._form.sinks).div(GROUP, rounding_mode="floor")
        query, key = real.unsqueeze(2), real.unsqueeze(1)  # (b, L, 1), (b, 1, L)
        sink = key < self._form.sinks
        held = (place <= place.unsqueeze(1)) & ((query - key < self._window) | sink) & (key >= 0)
        # A token of the padding sees itself: seeing nothing would make it not a number.
        held |= (query < 0) & torch.eye(length, dtype=torch.bool, device=place.device)
        full = (group.unsqueeze(2) == group.unsqueeze(1)) | sink
        allowed = torch.cat((held & ~full, held & full), dim=-1).unsqueeze(1)  # (b, 1, L, 2 L)
        if base is None:
            return allowed
        twice = torch.cat((base, base), dim=-1)
        if base.dtype == torch.bool:
            return twice & allowed | self._padding_alone(allowed, length)
        least = torch.finfo(base.dtype).min
        return torch.where(self._padding_alone(allowed, length), 0.0, twice.masked_fill(~allowed, least))

    def _padding_alone(self, allowed: Tensor, length: int) -> Tensor:
        rows = torch.arange(length, device=allowed.device) < self._padding.unsqueeze(1)
        return allowed & rows[:, None, :, None]

    def _take_prompt(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        length, sinks = keys.shape[2], self._form.sinks
        self._seen = length
        count = -(-max(length - sinks, 0) // GROUP)
        slots = torch.arange(sinks + count * GROUP, device=self.device)
        # Each sequence's own tokens from the left on, nothing after them.
        source = slots + self._padding.unsqueeze(1)
        there = (source < length)[:, None, :, None]
        own = [_take(x, source.clamp(max=length - 1)).masked_fill(~there, 0) for x in (keys, values)]
        grouped = [_groups_of(x[:, :, sinks:]) for x in own]
        stored = self._encoded(*grouped)
        back = (torch.arange(length, device=self.device) - self._padding.unsqueeze(1)).clamp(min=0)
        decoded = [
            _take(torch.cat((x[:, :, :sinks], y.flatten(2, 3)), dim=2), back)
            for x, y in zip(own, self._decoded(*stored), strict=True)
        ]
        own_length = length - self._padding
        self._first, self._finished = self._numbers(own_length)
        # The open group begins after the finished ones; beyond the end there are zeros.
        opened = sinks + self._finished.unsqueeze(1) * GROUP + torch.arange(GROUP, device=self.device)
        padded = [torch.nn.functional.pad(x, (0, 0, 0, GROUP)) for x in own]
        self.keys, self.values = (torch.cat((x[:, :, :sinks], _take(x, opened)), dim=2) for x in padded)
        numbers = self._first.unsqueeze(1) + torch.arange(self._room(), device=self.device)
        self._groups = self._chosen(stored, numbers.clamp(max=max(count - 1, 0)))
        return torch.cat((decoded[0], keys), dim=2), torch.cat((decoded[1], values), dim=2)

    # --- one token after another ----------------------------------------------------------------------------------

    def _append(self, key: Tensor, value: Tensor) -> None:
        place = self._seen - self._padding  # of the new token
        inside = place - self._form.sinks - self._finished * GROUP
        slot = torch.where(place < self._form.sinks, place, self._form.sinks + inside)
        slot = slot.clamp(min=0).view(-1, 1, 1, 1)  # what is padding will be overwritten by the first token
        self.keys.scatter_(2, slot.expand_as(key), key)
        self.values.scatter_(2, slot.expand_as(value), value)
        self._seen += 1

    def _kept(self, tokens: Tensor) -> Tensor:
        """How many of a sequence's tokens its newest one sees."""
        return tokens.clamp(1, self._window + self._form.sinks)

    def _visible(self) -> Tensor:
        """Places (b, K) of the tokens that the newest one sees, in order, at the right; negative at the left."""
        tokens = (self._seen - self._padding).unsqueeze(1)
        kept = self._kept(tokens)
        held = int(kept.max())
        nth = torch.arange(held, device=self.device) - (held - kept)
        return torch.where((nth < self._form.sinks) | (tokens == kept), nth, tokens - kept + nth)

    def _gathered(self, places: Tensor) -> tuple[Tensor, Tensor]:
        sinks, room = self._form.sinks, self._room()
        inside = places - sinks
        finished = self._finished.unsqueeze(1)
        in_group = sinks + inside - self._first.unsqueeze(1) * GROUP
        in_open = sinks + room * GROUP + inside - finished * GROUP
        slot = torch.where(inside < 0, places.clamp(min=0), torch.where(inside < finished * GROUP, in_group, in_open))
        keys, values = (
            _take(torch.cat((x[:, :, :sinks], y.flatten(2, 3), x[:, :, sinks:]), dim=2), slot)
            for x, y in zip((self.keys, self.values), self._decoded(*self._groups), strict=True)
        )
        return keys, values

    def _settle(self) -> None:
        """Encode the groups that are finished now, and drop those that no later token sees."""
        first, finished = self._numbers(self._seen - self._padding)
        if torch.equal(first, self._first) and torch.equal(finished, self._finished):
            return
        room, sinks = self._room(), self._form.sinks
        fresh = self._encoded(*(x[:, :, sinks:].unsqueeze(2) for x in (self.keys, self.values)))
        numbers = first.unsqueeze(1) + torch.arange(int((finished - first).max()), device=self.device)
        slot = torch.where(numbers < self._finished.unsqueeze(1), numbers - self._first.unsqueeze(1), room)
        both = [tuple(map(_side_by_side, old, new)) for old, new in zip(self._groups, fresh, strict=True)]
        self._first, self._finished = first, finished
        self._groups = self._chosen((both[0], both[1]), slot.clamp(max=room))

    # --- groups ---------------------------------------------------------------------------------------------------

    def _numbers(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """KVFormat.groups of each sequence."""
        found = torch.tensor([self._form.groups(n) for n in tokens.tolist()], device=self.device)
        return found[:, 0], found[:, 1]

    def _room(self) -> int:
        return int((self._finished - self._first).max())

    def _chosen(self, stored: tuple[Stored, Stored], index: Tensor) -> tuple[Stored, Stored]:
        """The groups at index (b, groups), in memory of their own."""
        keys, values = (tuple(_take(t, index) for t in part) for part in stored)
        return keys, values

    def _encoded(self, keys: Tensor, values: Tensor) -> tuple[Stored, Stored]:
        return encode_keys(keys, self._form.bits), encode_values(values, self._form.bits)

    def _decoded(self, keys: Stored, values: Stored) -> tuple[Tensor, Tensor]:
        bits, dtype = self._form.bits, self.dtype
        return decode_keys(keys, bits, dtype), decode_values(values, bits, dtype, self._head_dim)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Entries index (b, n) of x (b, heads, entries, ...) along its third axis."""
    return torch.take_along_dim(x, index.view(index.shape[0], 1, index.shape[1], *[1] * (x.dim() - 3)), dim=2)


def _groups_of(x: Tensor) -> Tensor:
    """(b, heads, groups * GROUP, head_dim) as (b, heads, groups, GROUP, head_dim)."""
    return x.reshape(*x.shape[:2], x.shape[2] // GROUP, GROUP, x.shape[-1])


def _side_by_side(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat((old, new), dim=2)
