"""Stage 4: quantise the linear layers by GPTQ, AWQ, HQQ, NF4 or plain rounding (`--quant`).

How the codes are chosen is the method's to say (`--quant`, stages/quantisers): GPTQ (Frantar et al., arXiv 2210.17323)
unless another is asked for. The statistics of a block are taken from the already quantised blocks before it. A mask
is kept by all. Packing and file format are GPTQModel's, of codebooks (nf4) bitsandbytes', of real zero points our own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Form, Grid, TensorShape
from edgepress.checkpoints.headers import usual_dtype
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.packed_sizes import is_head
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import DENSE_DTYPE, OWN_KEY, BlockShape, LinearShape, ModelShape, coded, with_form
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers import HESSIANS, METHODS, NOTHING, activation_bits, form, method, too_few_bits, w4a8
from edgepress.stages.requirements import (
    BASE_BYTES,
    Cost,
    backward_cost,
    block_bytes,
    block_weights,
    held_state_bytes,
    linears,
    linked_bytes,
    require_dense,
    tokens,
    walk_cost,
)

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.walk import BlockVisit
    from edgepress.checkpoints.writer import CheckpointWriter
    from edgepress.stages.refine import Tunable

VERSION = 1
REFINE_TOKENS = 1024  # in one step of refining; also what goes through a block at once


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The shape with a grid on every layer that the file format can hold. Raises PlanError."""
    require_dense(shape, "gptq")
    alike = _alike(shape, options)
    base = alike.grid
    assert base is not None
    heads = [t.name.removesuffix(".weight") for t in shape.outer if is_head(t.name)]
    damping = options.damping if method(options.quant).TUNES else None  # GPTQ's solver alone damps
    quantization = base.config(alike.dense_dtype, left_dense(shape, base), heads, damping)
    after = _with_rules(shape, alike, options) if options.layers else alike
    if isinstance(base, Grid) and (own := _own_grids(after, base)):
        quantization["dynamic"] = quantization.get("dynamic", {}) | own
    return replace(after, config=dict(shape.config) | {"quantization_config": quantization} | _own(after, options))


def _alike(shape: ModelShape, options: Options) -> ModelShape:
    """The shape with the stage's own form on every layer. Raises PlanError."""
    return with_form(shape, _wanted_form(shape, options), options.quant_embeddings)


def _with_rules(shape: ModelShape, alike: ModelShape, options: Options) -> ModelShape:
    """Each layer that has settings of its own in their form. Raises PlanError with all that cannot be, by rule."""
    rules, faults, dtype = options.rules, [], shape.dense_dtype
    for rule in rules:
        if METHODS[rule.quant][0] != METHODS[options.quant][0]:
            able = ", ".join(name for name, (file, _) in METHODS.items() if file == METHODS[options.quant][0])
            faults.append(
                f"--quant-layers: {rule.quant} cannot stand beside --quant {options.quant} in one model, whose files "
                f"know one kind of code; beside it there are {able}"
            )
        elif not any(rule.covers(i, x.name) for i, b in enumerate(shape.blocks) for x in b.linears):
            names = sorted({x.name.rpartition(".")[2] for b in shape.blocks for x in b.linears})
            faults.append(
                f"--quant-layers: no layer is called {rule.name} in those of {len(shape.blocks)} blocks that "
                f"{rule.quant} is for; there are {', '.join(names)}"
            )
    if faults:
        raise PlanError("\n".join(dict.fromkeys(faults)))
    forms: dict[tuple[str, int, int], Form] = {}

    def formed(index: int, before: LinearShape, x: LinearShape) -> LinearShape:
        own = options.of(index, x.name)
        if own is options:
            return x
        key = (own.quant, own.group, x.in_features)
        if key not in forms:
            forms[key] = _wanted_form(shape, own).fitted({x.in_features})
        return coded(before, forms[key], dtype)

    blocks = tuple(
        replace(b, linears=tuple(formed(i, *pair) for pair in zip(shape.blocks[i].linears, b.linears, strict=True)))
        for i, b in enumerate(alike.blocks)
    )
    return replace(alike, blocks=blocks)


def _own_grids(after: ModelShape, base: Grid) -> dict[str, Any]:
    """GPTQModel's `dynamic`: the bits and groups of layers that have others than the rest, by a pattern of names."""
    blocks: dict[tuple[str, Grid], list[str]] = {}
    for index, block in enumerate(after.blocks):
        for x in block.linears:
            if isinstance(x.grid, Grid) and x.grid != base:
                blocks.setdefault((x.name, x.grid), []).append(str(index))
    prefix = re.escape(after.block_prefix)
    return {
        f"+:^{prefix}\\.({'|'.join(numbers)})\\.{re.escape(name)}$": {"bits": grid.bits, "group_size": grid.group}
        for (name, grid), numbers in blocks.items()
    }


def cost(before: ModelShape, options: Options) -> Cost:
    """What the stage takes on a model of this shape."""
    needs, states = method(options.quant).NEEDS, held_state_bytes(before, options)
    linked = linked_bytes(before, beside=() if options.quant_embeddings else None)
    high = options.effort == "high"
    beside = states if high else 0  # of the dense blocks' walk
    if needs != HESSIANS:
        beside += 8 * max(x.weights for x in linears(before)) * 4
    if options.smooth:
        beside += 2 * block_bytes(before)  # its weights in 32 bits
    walk = walk_cost(before, options, needs, slowdown=4.5, linked=linked, beside=beside)
    if options.smooth:
        passed = w4a8.THRESHOLDS * w4a8.SEARCHED_TOKENS  # tokens
        walk = replace(walk, operations=walk.operations + passed * len(before.blocks) * block_weights(before))
    if options.guidance:  # first, while the walk's own states wait
        first = backward_cost(before, options, linked)
        walk = replace(
            walk,
            peak_memory_bytes=max(walk.peak_memory_bytes, first.peak_memory_bytes + states),
            scratch_bytes=walk.scratch_bytes + first.scratch_bytes,
            operations=walk.operations + first.operations * first.slowdown / walk.slowdown,
        )
    if not high:
        return walk
    # Afterwards all layers of a block at once: positions, gradients, Adam's two moments, levels, weights and a float32
    # copy in passing, codes and mask; what one step's tokens leave for the gradient; and the states of both walks.
    block, live = block_bytes(before), max(min(tokens(options), REFINE_TOKENS), options.length)
    inner = max(x.out_features for x in linears(before))
    tuned = 3 * block + (7 * 4 + 2 + 2) * block // 2 + live * (14 * before.hidden_size + 6 * inner) * 4 + 2 * states
    return replace(walk, peak_memory_bytes=max(walk.peak_memory_bytes, BASE_BYTES + tuned))


def _own(after: ModelShape, options: Options) -> dict[str, Any]:
    """The entry of the configuration that says what transformers has no word for; none where there is nothing.

    That is the rounding of inputs, and the precision that the codes stand for where the files will not tell: norms in
    float32 beside bfloat16 matrices would be all that is left to go by.
    """
    own: dict[str, Any] = {"activation_bits": bits} if (bits := activation_bits(options)) < 16 else {}
    dtype = after.dense_dtype
    if any(usual_dtype(_left_beside(block)) != dtype for block in after.blocks):
        own[DENSE_DTYPE] = dtype
    return {OWN_KEY: {**after.config.get(OWN_KEY, {}), **own}} if own else {}


def _left_beside(block: BlockShape) -> list[TensorShape]:
    """What stays in floating point where a block is quantised."""
    dense = [t for x in block.linears for t in x.stored() if x.grid is None or t.name == f"{x.name}.bias"]
    return [*dense, *block.others]


def _wanted_form(shape: ModelShape, options: Options) -> Form:
    """Raises PlanError with all that the method cannot do."""
    faults = []
    if options.effort == "high" and not method(options.quant).TUNES:
        able = ", ".join(name for name in METHODS if method(name).TUNES)
        faults.append(
            f"--quant-effort high tunes what GPTQ's solver leaves, and {options.quant} has no such solution; it goes "
            f"with {able}, or leave the effort normal"
        )
    try:
        wanted = form(options, shape.pattern is not None)
    except PlanError as error:
        faults.append(str(error))
    if faults:
        raise PlanError(". ".join(faults))
    return wanted


def remarks(shape: ModelShape, options: Options) -> list[str]:
    """What differs from what was asked, in words a person should read before the run."""
    after, wanted = _alike(shape, options), form(options, shape.pattern is not None)
    stored = after.grid
    assert stored is not None
    said = _form_remarks(shape, after, stored, wanted, options)
    if options.layers:
        own = [options.of(i, x.name) for i, block in enumerate(shape.blocks) for x in block.linears]
        ways = Counter(f"{o.quant}/{o.group}" for o in own if o is not options)
        of = ", ".join(f"{count} {way}" for way, count in sorted(ways.items()))
        said.append(f"gptq: of {len(own)} layers have settings of their own: {of}")
        if "optimum" in stored.loaders and ways:
            said.append(
                "gptq: transformers itself loads one setting for all layers alone, and refuses this folder; GPTQModel "
                "loads it, and export --to hf writes weights that transformers loads"
            )
    quants = dict.fromkeys([options.quant, *(rule.quant for rule in options.rules)])
    said += [f"gptq: {warning}" for quant in quants if (warning := too_few_bits(quant))]
    if options.embedding_codes == "nearest" and options.quant_embeddings == 4:
        said.append(
            "gptq: the nearest 4-bit codes of embeddings lose several times what GPTQ's lose, which --embedding-codes "
            "gptq takes with a quantiser that looks at text"
        )
    if stored.unknown:
        said.append(f"gptq: no library knows {stored.unknown}: only this project loads the folder")
    if (bits := activation_bits(options)) < 16:
        said.append(
            f"gptq: the inputs of quantised layers are rounded to {bits} bits in all measurements; other libraries "
            "that load the folder leave them as they are"
        )
    if options.effort == "high":
        said.append(
            f"gptq: --quant-effort high takes {options.effort_steps} gradient steps in each of {len(shape.blocks)} "
            "blocks, several times as long as normal effort"
        )
    return said


def _form_remarks(shape: ModelShape, after: ModelShape, stored: Form, wanted: Form, options: Options) -> list[str]:
    said = []
    if stored.integer and not form(options, masked=False).integer:
        said.append(
            f"gptq: {options.quant} has whole zero points here, not the real ones of the published method, since a "
            f"weight that {shape.pattern} removes must be exactly 0"
        )
    widths = {x.in_features for block in shape.blocks for x in block.linears}
    said += [f"gptq: {warning}" for warning in stored.warnings(widths)]
    if wanted.group != options.group != Options.group:
        said.append(f"gptq: {options.quant} has {wanted.scales()}; --group {options.group} is not used")
    others: dict[str, set[str]] = {}
    for x in (x for block in after.blocks for x in block.linears):
        if x.grid is not None and x.grid.describe() != wanted.describe():
            others.setdefault(x.grid.describe(), set()).add(x.name)
    for form_name, names in others.items():
        said.append(
            f"gptq: {', '.join(sorted(names))} take {form_name}, the next type of GGUF: no super-block of "
            f"{wanted.describe()} divides their rows; gptq{wanted.bits}-s has super-blocks that do"
        )
    if stored.group != wanted.group and not others:
        said.append(f"gptq: groups of {stored.group}: {wanted.group} does not divide every layer")
    if dense := left_dense(shape, stored):
        said.append(
            f"gptq: {', '.join(dense)} stay in 16 or 32 bits: sides that are no multiple of 32 do not fit the format"
        )
    return said


def left_dense(shape: ModelShape, form: Form) -> list[str]:
    linears = [x for block in shape.blocks for x in block.linears]
    return sorted({x.name for x in linears if not form.holds(x.out_features, x.in_features)})


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    from edgepress.checkpoints.checkpoint import rounded_inputs
    from edgepress.checkpoints.walk import Walk
    from edgepress.stages import edge
    from edgepress.stages.gradients import token_squares
    from edgepress.stages.hessian import of_head
    from edgepress.stages.refine import DenseOutputs

    chosen, after = method(options.quant), plan(source.shape, options)
    grid, masked = _alike(source.shape, options).grid, source.shape.pattern is not None
    assert grid is not None
    refined = options.effort == "high"
    # Weights alone need no hidden states: the walk then carries none, and no block is run.
    tokens = REFINE_TOKENS if refined else runtime.chunk_tokens
    chunks = calibration.chunks(tokens) if chosen.NEEDS != NOTHING else []
    by_head = options.embedding_codes == "gptq"
    walk = Walk(source, chunks, runtime, target.work, last_outputs=by_head, task=options.quant)
    squares = token_squares(walk.skeleton, chunks, runtime) if options.guidance else {}
    dense = DenseOutputs(source, chunks, runtime) if refined else None
    for block in walk:
        block.token_weights = {name: _weights(x, options.guidance) for name, x in squares.get(block.index, {}).items()}
        if (first := after.firsts[block.index]) < block.index:  # one set of codes for what is one block
            block.take(_dense(target.repeat_block(block.index, first), after.blocks[first]))
            with rounded_inputs(block.module, after.blocks[first], after.activation_bits):
                block.done(walk.facts[first])
            continue
        forms = {x.name: x.grid for x in after.blocks[block.index].linears if x.grid is not None}
        masks = {name: block.linears[name].weight != 0 if masked else None for name in forms}
        solved = dict(chosen.quantise(block, masks, forms, options))
        facts: dict[str, Any] = {name: s.facts() for name, s in solved.items()}
        if dense is not None:
            generator = runtime.generator(f"refine block {block.index}")
            solutions, targets = cast("dict[str, Tunable]", solved), dense.of(block.index)
            facts["refined"] = refine_block(block, solutions, masks, targets, options.effort_steps, generator)
        for name, s in solved.items():
            block.linears[name].weight.copy_(s.weight)
        tensors = {n: t for n, t in block.weights().items() if n.removesuffix(".weight") not in solved}
        for name, s in solved.items():
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in s.stored().items()}
        target.write_block(block.index, tensors)
        target.write_scaling(block.index, {f"{n}.{k}": t for n, s in solved.items() for k, t in s.scaling().items()})
        with rounded_inputs(block.module, after.blocks[block.index], after.activation_bits):
            block.done(facts)  # later blocks see what they will get
    target.copy_outer(source)
    if options.quant_embeddings:
        # The 16-bit tensors become what the packed codes stand for, so every loader sees the same model.
        hessian = of_head(walk.skeleton, walk.states.chunks) if by_head else None
        outer, packed = edge.quantise_outer(source.outer(), options.quant_embeddings, hessian, options.damping)
        target.write_outer(outer)
        target.write_edge(packed)
    own = {key: after.config[key] for key in ("quantization_config", OWN_KEY) if key in after.config}
    target.finish(source.config | own, source)
    return {**grid.about(), "blocks": walk.facts}


def _weights(squares: Tensor, power: float) -> Tensor:
    """Of tokens, 1 on average, by the squares (tokens,) of the gradients there."""
    weights = (squares / squares.mean().clamp_min(1e-30)) ** power
    return weights / weights.mean() if bool(weights.any()) else torch.ones_like(weights)


def _dense(tensors: dict[str, Tensor], block: BlockShape) -> dict[str, Tensor]:
    """A block's stored tensors with the weights that its codes stand for."""
    for x in block.linears:
        if x.grid is None:
            continue
        codes = {kind: tensors.pop(f"{x.name}.{kind}") for kind in x.grid.kinds}
        tensors[f"{x.name}.weight"] = x.grid.read(codes, x.out_features, x.in_features)
    return tensors


def refine_block(
    block: BlockVisit,
    solved: dict[str, Tunable],
    masks: Mapping[str, Tensor | None],
    targets: Sequence[Tensor],
    steps: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Put better codes and scales into `solved`, and tune the block's norms; the block's error before and after."""
    from edgepress.stages.refine import refine

    layers = {name: s.tuned(masks[name]) for name, s in solved.items()}
    errors = refine(block, layers, targets, steps, generator)
    for name, layer in layers.items():
        solved[name] = solved[name].settled(layer)
    return errors
