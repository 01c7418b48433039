"""Does a model fit a chip? The verdict behind `compress check CHECKPOINT --soc siracusa`.

Weights go to the memories with the role weights, KV cache and activations to those with the role tiles, one
operator's tile to the working memory. All must hold what is put there; off-chip memory only says where an excess
would go, and what streaming it costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.kv_format import FULL_BITS, KVFormat
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.attention import CacheRule, cache_rule, with_cache
from edgepress.hardware.clock import timed
from edgepress.hardware.footprint import shared_blocks, tensor_table
from edgepress.hardware.levers import find_levers
from edgepress.hardware.needs import Needs, Request, needs, operator_name
from edgepress.hardware.notes import notes
from edgepress.hardware.placement import RESIDENT, Placement, place
from edgepress.hardware.soc import Memory, Soc
from edgepress.hardware.units import times_text
from edgepress.hardware.verdict import Footprint, MemoryUse, Verdict


def check(
    shape: ModelShape,
    soc: Soc,
    *,
    context: int = 256,
    kv_bits: int = 8,
    kv_window: int = 0,
    kv_sinks: int = 4,
    kv_groups: bool = False,
    activation_bits: int = 8,
    prefill_chunk: int | None = None,
    name: str | None = None,
    file_bytes: int | None = None,
    levers: bool = False,
    timing: bool = False,
) -> Verdict:
    """Judge whether a model fits a chip with `context` tokens in its KV cache.

    `prefill_chunk` is how many prompt tokens pass at once (all of the context by default); `name` is what to call
    the model; `file_bytes` is what its files take on the disk, where there are any. The widths default to 8 bit,
    N-EUREKA's. `kv_window` and `kv_sinks` evict tokens from the cache, `kv_groups` counts its scales, zero points and
    tokens in full (checkpoints/kv_format.py). `levers` asks what would make a model fit that does not, `timing` for
    time and energy per token; a search over shapes needs neither. Raises PlanError for a context the model
    has no positions for, for widths that are none, and for operators that no engine runs, all in one message.
    """
    shape = shared_blocks(shape)
    if kv_groups and kv_bits >= FULL_BITS:
        raise PlanError(
            f"--kv-groups counts scales and zero points, and a cache of {kv_bits} bit has none; give --kv-bits 8 or 4"
        )
    form = KVFormat(kv_bits if kv_groups else FULL_BITS, kv_window, kv_sinks)
    if kv_window or kv_groups:
        shape = with_cache(shape, CacheRule(form, kv_groups))
    request = Request(context, kv_bits, activation_bits, prefill_chunk)
    request.require(shape, soc)
    found = needs(shape, soc, request)
    tensors = tensor_table(shape, soc.layout)
    copies = soc.count("kv_cache_copies") or 1
    placement = place(shape, tensors, soc, context, kv_bits, copies, found.arena)
    uses = _uses(soc, found, placement)
    model = name or str(shape.config.get("_name_or_path") or shape.family)
    verdict = Verdict(
        model=model,
        family=shape.family,
        parameters=shape.parameters_total,
        soc=soc.label,
        request=request,
        cache=cache_rule(shape),
        memories=uses,
        footprint=Footprint(
            file_bytes=shape.file_bytes if file_bytes is None else file_bytes,
            file_measured=file_bytes is not None,
            packed_bytes=packed_sizes(shape).total,
            chip=found.weights,
            layout=soc.layout.name,
            tensors=tuple(tensors),
        ),
        needs=found,
        placement=placement,
        summary=_summary(model, soc, found, uses),
        notes=tuple(notes(shape, soc, found)),
    )
    if levers and not verdict.fits:
        verdict = replace(verdict, levers=find_levers(shape, soc, request))
    return replace(verdict, timing=timed(shape, soc, request, placement)) if timing else verdict


# --- what each memory is asked to hold ---------------------------------------------------------------------------


def _uses(soc: Soc, found: Needs, placement: Placement) -> tuple[MemoryUse, ...]:
    """As placed; what found no room counts in the last memory of its role as well, where it is missing."""
    last = {role: soc.with_role(role)[-1].name for role in ("weights", "tiles")}
    held: dict[str, dict[str, int]] = {memory.name: {} for memory in soc.memories}
    for memory in soc.memories:
        if memory.reserved_bytes:
            held[memory.name]["code and stacks"] = memory.reserved_bytes
    for t in placement.tensors:
        role = "tiles" if t.part in ("KV cache", "activations") else "weights"
        if t.memory:
            held[t.memory][t.part] = held[t.memory].get(t.part, 0) + t.nbytes
        if t.state != RESIDENT:
            held[last[role]][t.part] = held[last[role]].get(t.part, 0) + t.nbytes
    tile = (f"tile of {operator_name(found.hardest)}", found.hardest.smallest_bytes)
    return tuple(_use(memory, held[memory.name], tile) for memory in soc.memories)


def _use(memory: Memory, parts: Mapping[str, int], tile: tuple[str, int]) -> MemoryUse:
    steady = tuple((part, size) for part, size in parts.items() if size and part != "activations")
    fleeting = tuple((part, size) for part, size in parts.items() if size and part == "activations")
    if memory.role == "working":
        fleeting = (tile,)  # its smallest: any larger one is a choice
    return MemoryUse(memory.name, memory.role, memory.capacity_bytes, steady, fleeting)


# --- words -----------------------------------------------------------------------------------------------------


def _summary(model: str, soc: Soc, found: Needs, uses: tuple[MemoryUse, ...]) -> str:
    """One sentence: what fits with how much room, or what does not and by how much."""
    words = {
        "weights": "weights need",
        "tiles": "KV cache and activations need",
        "working": f"the smallest tile of {operator_name(found.hardest)} needs",
        "staging": "code and stacks need",
    }
    fit, over = [], []
    for role, what in words.items():
        at = [use for use in uses if use.role == role]
        # Where code lies in the same memory as tensors, it takes from the room rather than adding to the need.
        taken = 0 if role == "staging" else sum(memory.reserved_bytes for memory in soc.with_role(role))
        need, room = sum(use.peak_bytes for use in at) - taken, sum(use.capacity_bytes for use in at) - taken
        held = f"the {size_text(room)} of {' + '.join(use.name for use in at)}"
        if need > room:
            # Below a tenth over, the factor says less than the difference.
            much = need > 1.1 * room and room > 0
            by = f"{times_text(need, room)} {held}" if much else f"{size_text(need - room)} more than {held}"
            over.append(f"{what} {size_text(need)}, {by}")
        elif role != "staging":
            fit.append(f"{what} {size_text(need)} of {held}")
    if over:
        return f"{model} does not fit {soc.label}: {'; '.join(over)}."
    return f"{model} fits {soc.label}: {'; '.join(fit)}."
