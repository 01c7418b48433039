"""Describe a KV cache: its precision, which tokens stay, and its bytes.

Precision after KIVI (arXiv 2402.02750): keys share a scale and a zero point by channel over a group of tokens,
values by token over a group of channels. A group's tokens stay in full precision until all of them are there, so a
token sees its own group in full and every earlier one quantised. Eviction after StreamingLLM (arXiv 2309.17453): the
first tokens, where attention sinks, and the newest stay; the others are forgotten. Departures: the sinks are never
quantised, keys and values are quantised at the same moment, and kept keys keep the places they had in the text, so
the length stays bounded by the model's positions.

No torch: the command line and the hardware module count with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgepress.checkpoints.errors import PlanError

GROUP = 32  # tokens of a key's group, and channels of a value's group at most
FULL_BITS = 16  # of a value that is not quantised, and of each scale and zero point
BITS = (16, 8, 4)


@dataclass(frozen=True)
class KVFormat:
    """bits 16 and no window: the cache as the model has it."""

    bits: int = 16
    window: int = 0  # newest tokens that a token sees, itself among them, beside the sinks; 0: all
    sinks: int = 4  # first tokens that are neither quantised nor evicted

    def __post_init__(self) -> None:
        faults = []
        if self.bits not in BITS:
            faults.append(f"--kv-bits {self.bits}: there are {', '.join(map(str, BITS))}")
        if self.sinks < 0:
            faults.append(f"--kv-sinks {self.sinks}: 0 or more")
        if self.window < 0:
            faults.append(f"--kv-window {self.window}: a number of tokens, or 0 for all")
        elif 0 < self.window < self.sinks + 1:
            faults.append(
                f"--kv-window {self.window} with --kv-sinks {self.sinks}: the window must be larger than the sinks; "
                f"give at least {self.sinks + 1}, or fewer sinks"
            )
        if faults:
            raise PlanError("\n".join(faults))

    @property
    def plain(self) -> bool:
        return self.bits == FULL_BITS and not self.window

    def __str__(self) -> str:
        if self.plain:
            return "KV cache in full"
        kept = f", window {self.window}" if self.window else ""
        sinks = f", {self.sinks} sinks" if self.sinks else ""
        return f"KV cache {self.bits} bit{kept}{sinks}"

    def key(self) -> dict[str, Any]:
        """What must be the same for two measurements to be one; empty for a plain cache."""
        return {} if self.plain else {"kv_cache": [self.bits, self.window, self.sinks]}

    def for_layer(self, own_window: int | None) -> KVFormat:
        """The same for a layer with a sliding window of its own: it forgets sinks, as it always did."""
        if own_window is None:
            return self
        return KVFormat(self.bits, min(own_window, self.window + self.sinks) if self.window else own_window, 0)

    # --- which tokens are held ----------------------------------------------------------------------------------

    def groups(self, tokens: int) -> tuple[int, int]:
        """First group that the next token sees, and the number of groups finished, after so many tokens."""
        finished = max(tokens - self.sinks, 0) // GROUP
        first = max(tokens + 1 - self.window - self.sinks, 0) // GROUP if self.window else 0
        return min(first, finished), finished

    def in_full(self, tokens: int) -> int:
        """Tokens that are not quantised when so many are in view, at most: the sinks and an open group."""
        return tokens if self.bits == FULL_BITS else min(tokens, self.sinks + GROUP)

    # --- bytes --------------------------------------------------------------------------------------------------

    def capacity_bytes(self, context: int, heads: int, head_dim: int, full_bits: int = FULL_BITS) -> int:
        """The most that one layer holds while tokens 1 to `context` are computed."""
        # The count of groups grows up to the window's length and has the period of one group from there on.
        befores = range(max(0, context - 1 - GROUP), max(context, 1))
        groups = max(finished - first for first, finished in map(self.groups, befores))
        full = min(context, self.sinks + GROUP) * self.token_bytes(heads, head_dim, full_bits)
        return full + groups * self.group_bytes(heads, head_dim, full_bits)

    def token_bytes(self, heads: int, head_dim: int, full_bits: int = FULL_BITS) -> int:
        """One token's key and value, not quantised."""
        return 2 * heads * head_dim * full_bits // 8

    def read_bytes(self, tokens: int, heads: int, head_dim: int) -> tuple[int, int]:
        """Bytes of the keys and of the values that a query reads with so many tokens in view."""
        full = self.in_full(tokens)
        quantised = tokens - full
        codes = head_dim * (full * FULL_BITS + quantised * self.bits)
        key_grids = -(-quantised // GROUP) * head_dim * 2 * FULL_BITS
        value_grids = quantised * (head_dim // value_group(head_dim)) * 2 * FULL_BITS
        return -(-heads * (codes + key_grids) // 8), -(-heads * (codes + value_grids) // 8)

    def written_bytes(self, tokens: int, heads: int, head_dim: int) -> int:
        """Bytes that so many new tokens write: each in full, and its share of its group's codes and grids later."""
        full = tokens * self.token_bytes(heads, head_dim)
        return full if self.bits == FULL_BITS else full + -(-tokens * self.group_bytes(heads, head_dim) // GROUP)

    def group_bytes(self, heads: int, head_dim: int, full_bits: int = FULL_BITS) -> int:
        """Codes, scales and zero points of the keys and values of one group of tokens."""
        if self.bits == FULL_BITS:
            return GROUP * self.token_bytes(heads, head_dim, full_bits)
        codes = 2 * GROUP * head_dim * self.bits
        key_grids = head_dim * 2 * FULL_BITS
        value_grids = GROUP * (head_dim // value_group(head_dim)) * 2 * FULL_BITS
        return heads * (codes + key_grids + value_grids) // 8


PLAIN = KVFormat()


def value_group(head_dim: int) -> int:
    """Channels of a value that share a scale: the largest divisor of the head's width up to 32."""
    return next(size for size in range(min(GROUP, head_dim), 0, -1) if head_dim % size == 0)
