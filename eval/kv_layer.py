"""One layer of a KV cache that holds packed codes and forgets tokens, for transformers' models.

Every token, of the prompt or generated, sees what it would see if the tokens came one by one: its own group in full,
earlier groups as they come back from their codes, sinks in full, nothing that was evicted. For a prompt, which
passes at once, a layer gets each key twice, decoded and in full, and a mask that picks one for each query. Groups
count from a sequence's first real token, so padding on the left changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from edgepress.checkpoints.kv_format import GROUP, KVFormat
from edgepress.eval.kv_codes import Stored, decode_keys, decode_values, encode_keys, encode_values

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
