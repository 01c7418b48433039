"""What the verdict's numbers do not say: what an engine asks of a model beyond fitting, and where sources disagree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edgepress.checkpoints.kv_format import FULL_BITS, GROUP
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.hardware.attention import cache_rule, own_window
from edgepress.hardware.footprint import PACKED, PLAIN, weight_bytes
from edgepress.hardware.needs import Needs
from edgepress.hardware.soc import Engine, Soc


def notes(shape: ModelShape, soc: Soc, found: Needs) -> Iterator[str]:
    """Each a sentence or two."""
    linears = [x for block in shape.blocks for x in block.linears]
    yield from _patterns(shape, linears, soc, found)
    yield from _no_integers(linears, soc, found)
    if soc.accelerator is not None:
        yield from _accelerator(shape, linears, soc, soc.accelerator, found)
    if (soc.count("kv_cache_copies") or 1) == 1 and any(s.name == "kv_copies" for s in soc.settings):
        yield (
            "One KV cache is counted, updated in place. A graph that takes it in and gives it out grown, as Deeploy's "
            "do, holds two: --set kv_copies=2."
        )
    yield from _cache(shape)
    if any(own_window(shape, index) for index in range(len(shape.blocks))):
        yield "Blocks with a sliding window keep no more of the KV cache than the window."
    for memory in soc.memories:
        if memory.note:
            yield memory.note


def _cache(shape: ModelShape) -> Iterator[str]:
    rule = cache_rule(shape)
    if rule is None:
        return
    form = rule.form
    if form.window:
        yield (
            f"The KV cache keeps the first {form.sinks} and the newest {form.window} tokens, at their places in the "
            "text; blocks with a sliding window of their own keep no more tokens than that, and no first ones."
        )
    if rule.groups:
        yield (
            f"The KV cache is counted with float16 scales and zero points, of keys by channel over {GROUP} tokens and "
            f"of values by token over at most {GROUP} channels, and with {form.sinks} sinks and one open group of "
            f"{GROUP} tokens at {FULL_BITS} bit. A token is written in full, and again as codes with its group."
        )


def _patterns(shape: ModelShape, linears: list[LinearShape], soc: Soc, found: Needs) -> Iterator[str]:
    patterns = ", ".join(sorted({str(x.pattern) for x in linears if x.pattern is not None}))
    if not patterns:
        return
    if soc.layout.patterns:
        in_full = weight_bytes(shape, replace(soc.layout, patterns=False)).total
        saved = in_full - found.weights.total
        engine = soc.accelerator
        how = f", to be unpacked by the cores since {engine.name} has no use of them" if engine else ""
        if saved:
            yield (
                f"The {patterns} layers lie as kept values and their index{how}: {size_text(saved)} less than with "
                "their zeros."
            )
        else:
            yield f"The {patterns} layers lie with their zeros: kept values and their index would take no less."
        return
    plain, packed = weight_bytes(shape, PLAIN).total, weight_bytes(shape, PACKED).total
    yield (
        f"The {soc.layout.name} layout has no use of the {patterns} pattern: its zeros take the room and time of any "
        f"weight. Packed as kept values with their index, all weights would take {size_text(packed)} instead of "
        f"{size_text(plain)}, to be unpacked in software."
    )


def _no_integers(linears: list[LinearShape], soc: Soc, found: Needs) -> Iterator[str]:
    names: dict[str, set[str]] = {}
    for name, words in (x.grid.on_cores for x in linears if x.grid is not None and not x.grid.integer):
        names.setdefault(words, set()).add(name)
    size = size_text(found.weights.block_codes + found.weights.scales_and_zeros)
    instead = f", so {soc.accelerator.name} cannot use them" if soc.accelerator else ""
    for words, of in names.items():
        yield (
            f"{' and '.join(sorted(of))}: {size} of codes stand for {words.format(instead=instead)}. "
            "Quantise with --quant gptq4 to have integers."
        )


def _accelerator(
    shape: ModelShape, linears: list[LinearShape], soc: Soc, engine: Engine, found: Needs
) -> Iterator[str]:
    grids = [(x.grid, x.in_features) for x in linears if x.grid is not None and x.grid.integer]
    if not engine.group_scales:
        groups = sorted({grid.group for grid, width in grids if grid.groups(width) > 1})
        if groups:
            counted = ". One scale per channel is counted here" if soc.layout.scale_per == "channel" else ""
            yield (
                f"{engine.name} has one scale per output channel: groups of {', '.join(map(str, groups))} need one job "
                f"per group and a rescale on the cores. Quantise with --quant gptq4-channel to avoid that{counted}."
            )
        if any(not grid.symmetric for grid, _ in grids):
            yield (
                f"{engine.name} has one weight offset per layer: zero points per row or group are corrected on the "
                "cores. Quantise with --symmetric to avoid that."
            )
    slot, block = soc.count("weight_slot"), soc.count("weight_input_block")
    if slot and block and soc.layout.slot_bits is None:
        own = replace(soc.layout, slot_bits=slot, input_block=block, patterns=False)
        full = weight_bytes(shape, own).total
        if full > found.weights.total:
            room = sum(memory.capacity_bytes - memory.reserved_bytes for memory in soc.with_role("weights"))
            fate = ", which does not fit" if found.weights.total <= room < full else ""
            yield (
                f"{engine.name} reads weights in slots of {slot} bit, inputs padded to {block}. Stored so, all weights "
                f"would take {size_text(full)} instead of {size_text(found.weights.total)}{fate}; as counted here the "
                "cores unpack them tile by tile, which the times leave out."
            )
    widest = soc.constants.get("weight_bits")
    head = 0 if shape.embedding_bits else found.weights.head or found.weights.embedding
    adapters = sum(t.nbytes for x in linears if not x.adapter_packed for t in x.adapter() if t.name.endswith(".weight"))
    unquantised = found.weights.dense_linears + adapters + head
    if widest and unquantised:
        yield (
            f"{engine.name} takes integer weights of at most {widest.high or widest.value:g} bit: "
            f"{size_text(unquantised)} of matrices (unquantised linear layers, adapters, head) cannot run on it."
        )
