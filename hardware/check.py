"""Does a model fit a chip? The verdict behind `compress check CHECKPOINT --soc siracusa`.

Weights go to the memories with the role weights, KV cache and activations to those with the role tiles, one
layer's tile to the working memory. All must hold what is put there; off-chip memory only says where an excess
would go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from checkpoints.errors import PlanError
from checkpoints.shape import LinearShape, ModelShape
from hardware.footprint import Layer, WeightBytes, activation_peak, kv_cache_bytes, layers, slotted_bytes, weight_bytes
from hardware.soc import Accelerator, Memory, Soc
from hardware.verdict import LayerFit, MemoryUse, Verdict, size_text, times_text


def check(
    shape: ModelShape,
    soc: Soc,
    *,
    context: int = 256,
    kv_bits: int = 8,
    activation_bits: int = 8,
    prefill_chunk: int | None = None,
    name: str | None = None,
) -> Verdict:
    """Judge whether a model fits a chip with `context` tokens in its KV cache.

    `prefill_chunk` is how many prompt tokens pass at once (all of the context by default); `name` is what to
    call the model. The widths default to 8 bit, N-EUREKA's. Of the operators only matrix products with weights
    are held against the working memory; attention's tiles are not. Raises PlanError for a context the model has
    no positions for and for widths that are none, all faults in one message.
    """
    chunk = context if prefill_chunk is None else prefill_chunk
    _validate(shape, context, kv_bits, activation_bits, chunk)
    weights = weight_bytes(shape)
    linears = [x for block in shape.blocks for x in block.linears]
    packed = weight_bytes(shape, packed=True) if any(x.pattern for x in linears) else None
    decode = activation_peak(shape, 1, context, activation_bits)
    prefill = activation_peak(shape, chunk, context, activation_bits)
    cache = kv_cache_bytes(shape, context, kv_bits)
    # Every activation grows with the tokens that pass at once, so prefill never needs less than decoding.
    tiles = {"KV cache": cache, "activations": prefill.nbytes}

    step, buffers = soc.count("tile_output_channels") or 1, soc.count("tile_buffers") or 1
    working = soc.with_role("working")[0]
    fits = {layer: _layer_fit(layer, working, step, buffers, activation_bits) for layer in layers(shape)}
    largest = max(fits, key=lambda layer: fits[layer].working_set_bytes)

    on_chip = [
        *_fill(weights.parts(), soc.with_role("weights")),
        *_fill(tiles, soc.with_role("tiles")),
        _use(working, largest.working_set(step, buffers, activation_bits)),
        *_fill({"code, stacks and vectors": soc.count("staging_reserved") or 0}, soc.with_role("staging")),
    ]
    excess = {
        f"{what} beyond the chip": sum(max(0, -use.headroom_bytes) for use in on_chip if use.role == role)
        for what, role in (("weights", "weights"), ("KV cache and activations", "tiles"))
    }
    uses = {use.name: use for use in (*on_chip, *_fill(excess, soc.with_role("off_chip")))}
    model = name or str(shape.config.get("_name_or_path") or shape.family)
    return Verdict(
        model=model,
        family=shape.family,
        parameters=shape.parameters_total,
        soc=soc.name,
        context=context,
        kv_bits=kv_bits,
        activation_bits=activation_bits,
        prefill_chunk=chunk,
        memories=tuple(uses[memory.name] for memory in soc.memories),
        weights=weights,
        packed_weights=packed,
        decode=decode,
        prefill=prefill,
        largest_layer=fits[largest],
        layers_too_large=tuple(fit for fit in fits.values() if not fit.largest_tile),
        summary=_summary(model, soc, fits[largest], on_chip),
        notes=(
            *_pattern_notes(linears, soc.accelerator, weights, packed),
            *(_accelerator_notes(shape, linears, soc, soc.accelerator, weights) if soc.accelerator else ()),
            *_tile_notes(shape, soc, cache),
            *(f"{memory.name}: {memory.note}" for memory in soc.memories if memory.note),
        ),
    )


def _validate(shape: ModelShape, context: int, kv_bits: int, activation_bits: int, chunk: int) -> None:
    faults = []
    if context < 1:
        faults.append(f"a context of {context} tokens holds nothing; it must be at least 1")
    elif context > shape.positions:
        faults.append(
            f"a context of {context} tokens is beyond the model's {shape.positions} positions "
            f"(max_position_embeddings); ask for {shape.positions} or fewer"
        )
    for what, bits in (("KV cache", kv_bits), ("activation", activation_bits)):
        if not 1 <= bits <= 32:
            faults.append(f"a {what} width of {bits} bit is not between 1 and 32")
    if context >= 1 and not 1 <= chunk <= context:
        faults.append(f"a prefill chunk of {chunk} tokens is not between 1 and the context of {context}")
    if faults:
        raise PlanError("\n".join(faults))


def _fill(parts: Mapping[str, int], memories: tuple[Memory, ...]) -> list[MemoryUse]:
    """Parts fill the memories of a role in order; what is left over lies in the last, beyond its capacity."""
    left, uses = dict(parts), []
    for memory in memories:
        room = sum(left.values()) if memory is memories[-1] else memory.capacity_bytes
        placed = {}
        for part, size in left.items():
            placed[part] = min(size, room)
            room -= placed[part]
        left = {part: size - placed[part] for part, size in left.items()}
        uses.append(_use(memory, placed))
    return uses


def _use(memory: Memory, parts: Mapping[str, int]) -> MemoryUse:
    filled = tuple((part, size) for part, size in parts.items() if size)
    return MemoryUse(memory.name, memory.role, memory.capacity_bytes, filled)


def _layer_fit(layer: Layer, working: Memory, step: int, buffers: int, activation_bits: int) -> LayerFit:
    smallest = sum(layer.working_set(step, buffers, activation_bits).values())
    largest_tile = layer.largest_tile(working.capacity_bytes, step, buffers, activation_bits)
    return LayerFit(layer.name, layer.repeats, smallest, largest_tile)


# --- words -----------------------------------------------------------------------------------------------------


def _summary(model: str, soc: Soc, largest: LayerFit, on_chip: list[MemoryUse]) -> str:
    """One sentence: what fits with how much room, or what does not and by how much."""
    words = {
        "weights": "weights need",
        "tiles": "KV cache and activations need",
        "working": f"the smallest tile of {largest.name} needs",
        "staging": "code, stacks and vectors need",
    }
    fit, over = [], []
    for role, what in words.items():
        uses = [use for use in on_chip if use.role == role]
        need, room = sum(use.used_bytes for use in uses), sum(use.capacity_bytes for use in uses)
        held = f"the {size_text(room)} of {' + '.join(use.name for use in uses)}"
        if need > room:
            # Below a tenth over, the factor says less than the difference.
            by = (
                f"{times_text(need, room)} {held}"
                if need > 1.1 * room
                else f"{size_text(need - room)} more than {held}"
            )
            over.append(f"{what} {size_text(need)}, {by}")
        elif role != "staging":
            fit.append(f"{what} {size_text(need)} of {held}")
    if over:
        return f"{model} does not fit {soc.name}: {'; '.join(over)}."
    return f"{model} fits {soc.name}: {'; '.join(fit)}."


def _pattern_notes(
    linears: list[LinearShape], engine: Accelerator | None, weights: WeightBytes, packed: WeightBytes | None
) -> Iterator[str]:
    if packed is None:
        return
    patterns = ", ".join(sorted({str(x.pattern) for x in linears if x.pattern is not None}))
    gain = f"The zeros of the {patterns} pattern are counted like any weight"
    if engine and not engine.skips_zeros:
        gain += f", since {engine.name} cannot skip them: they save neither room nor time"
    change = "less" if packed.total < weights.total else "no less"
    yield (
        f"{gain}. Packed as kept values with their index, to be unpacked in software, all weights would take "
        f"{size_text(packed.total)}, {change} than {size_text(weights.total)}."
    )


def _accelerator_notes(
    shape: ModelShape, linears: list[LinearShape], soc: Soc, engine: Accelerator, weights: WeightBytes
) -> Iterator[str]:
    """What the engine asks of a model beyond fitting."""
    grids = [(x.grid, x.in_features) for x in linears if x.grid is not None]
    if not engine.group_scales:
        groups = sorted({grid.group for grid, width in grids if grid.groups(width) > 1})
        if groups:
            yield (
                f"{engine.name} has one scale per output channel: groups of {', '.join(map(str, groups))} need one job "
                "per group and a rescale on the cores. Quantise with group size -1 to avoid that."
            )
        if any(not grid.symmetric for grid, _ in grids):
            yield (
                f"{engine.name} has one weight offset per layer: zero points per row or group are corrected on the "
                "cores. Quantise on a symmetric grid to avoid that."
            )
    slot, block = soc.count("weight_slot"), soc.count("weight_input_block")
    if slot and block:
        slotted = slotted_bytes(shape, slot, block)
        everything = weights.total - weights.block_codes + slotted
        if slotted > weights.block_codes:
            room = sum(memory.capacity_bytes for memory in soc.with_role("weights"))
            fate = ", which does not fit" if weights.total <= room < everything else ""
            yield (
                f"{engine.name} keeps each weight of a linear layer in a slot of {slot} bit, inputs padded to {block}: "
                f"to run there directly the blocks' codes take {size_text(slotted)} instead of "
                f"{size_text(weights.block_codes)}, all weights {size_text(everything)}{fate}."
            )
    widest = soc.constants.get("weight_bits")
    head = 0 if shape.embedding_bits else weights.head or weights.embedding
    unquantised = weights.dense_linears + weights.adapters + head
    if widest and unquantised:
        yield (
            f"{engine.name} takes integer weights of at most {widest.high or widest.value:g} bit: "
            f"{size_text(unquantised)} of matrices (unquantised linear layers, adapters, head) cannot run on it."
        )


def _tile_notes(shape: ModelShape, soc: Soc, cache_bytes: int) -> Iterator[str]:
    copies = soc.count("kv_cache_copies")
    if copies and copies > 1:
        yield (
            "One KV cache is counted; a graph that takes it in and gives it out grown, as Deeploy's do, holds "
            f"{copies}: {size_text(copies * cache_bytes)}."
        )
    if shape.config.get("sliding_window"):
        yield "The KV cache is counted with the full context in every block; a sliding window would need less."
