"""`--homotopic K`: a little pruning, then a short distillation, K times, in place of depth, wanda and lora in full.

HomoDistil (Liang et al., arXiv 2302.09632) starts from the teacher and removes the least important parts a few at a
time, distilling in between, so that the student never falls far behind. Here a round is the stages themselves with a
part of their amounts, so every round has its checkpoint, its measurement and its place in the store. Other than in
the paper, what is removed are blocks and N:M zeros by the stages' own rankings, and the teacher's logits alone are
matched, not its hidden states.

The rounds together take the optimiser steps, the training windows and the removals of one run in full. Each round is
a training of its own, with its own warm-up and cosine, on windows of its own. Calibration of a ranking is not divided:
a statistic needs its samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from edgepress.checkpoints.sparsity import Part, Unstructured, parse_amount
from edgepress.stages.options import Depth, Lora, Options, Wanda

if TYPE_CHECKING:
    from edgepress.pipeline.recipe import Recipe

DISTILL = 0.5  # share of the loss that is the teacher's where the recipe gives none
_PARTS = ("depth", "wanda", "lora")


def in_rounds(recipe: Recipe, faults: list[str]) -> Recipe:
    """The recipe ready to be unrolled: distilling. What speaks against rounds is added to the faults."""
    faults += _against(recipe)
    stages: list[tuple[str, Options]] = []
    notes = list(recipe.notes)
    for name, options in recipe.stages:
        if isinstance(options, Lora) and options.distill == 0:
            options = replace(options, distill=DISTILL)
            notes.append(
                f"--homotopic distils: {DISTILL:g} of the loss is the uncompressed model's; --distill changes that"
            )
        stages.append((name, options))
    notes.append(f"--homotopic: each of the {recipe.homotopic} rounds is a run with its own warm-up and cosine")
    return replace(recipe, stages=tuple(stages), notes=tuple(notes))


def _against(recipe: Recipe) -> Iterator[str]:
    """Why a recipe cannot go in rounds; nothing if it can."""
    rounds, names = recipe.homotopic, [name for name, _ in recipe.stages]
    by_name = dict(recipe.stages)
    depth, lora = by_name.get("depth"), by_name.get("lora")
    here = [name for name in names if name in _PARTS]
    if rounds < 2:
        yield f"--homotopic {rounds}: it takes at least 2 rounds; leave it out for one of each stage"
    if isinstance(lora, Lora) and 2 * rounds > lora.total_steps:
        most = f"at most {lora.total_steps // 2} rounds, or " if lora.total_steps >= 4 else ""
        yield (
            f"--homotopic {rounds}: lora has {lora.total_steps} optimiser steps in all, and a round needs two, since "
            f"its first only warms up; give {most}more with --lora-steps"
        )
    if isinstance(lora, Lora) and lora.recovery.quantised:
        yield (
            f"--homotopic prunes after each training, and --recover {lora.recovery} trains beside weights that are "
            f"quantised by then; give --recover {lora.recovery.on_dense()}, or leave --homotopic out"
        )
        return
    if lora is None:
        yield "--homotopic distils after each pruning, and the stage lora, which does so, is left out"
    elif here[-1] != "lora":
        yield f"--homotopic ends each round with lora; here {here[-1]} comes after it"
    if here in ([], ["lora"]):
        yield "--homotopic has nothing to remove: give --depth, --wanda or both"
    if isinstance(depth, Depth) and depth.layers:
        yield "--homotopic cannot divide --layers, which says where to end and not in which order; give --depth"
    elif isinstance(depth, Depth) and "wanda" not in names and depth.remove < rounds:
        yield f"--homotopic {rounds}: only {depth.remove} blocks go, so at most {depth.remove} rounds prune"
    if here:
        between = names[names.index(here[0]) : names.index(here[-1]) + 1]
        for name in (name for name in between if name not in _PARTS):
            yield f"--homotopic repeats {', '.join(here)}, and {name} stands between them; put it before or after"


def unrolled(recipe: Recipe) -> Iterator[tuple[str, Options]]:
    """The stages in the order in which they run, those of the rounds once for each."""
    if not recipe.homotopic:
        yield from recipe.stages
        return
    repeated = [stage for stage in recipe.stages if stage[0] in _PARTS]
    for stage in recipe.stages:
        if stage[0] not in _PARTS:
            yield stage
        elif stage == repeated[0]:
            for number in range(recipe.homotopic):
                for name, options in repeated:
                    if (part := _part(options, number, recipe.homotopic)) is not None:
                        yield name, part


def _part(options: Options, number: int, rounds: int) -> Options | None:
    """What round `number`, from 0, does of a stage; None for nothing."""
    if isinstance(options, Depth):
        remove = share(options.remove, number, rounds)
        return replace(options, remove=remove) if remove else None
    if isinstance(options, Wanda):
        return replace(options, pattern=amount_after(options.pattern, number + 1, rounds))
    assert isinstance(options, Lora)
    steps = share(options.total_steps, number, rounds)
    # A round must fill a batch, however few windows there are to divide.
    windows = max(options.batch, share(options.samples - options.held_out, number, rounds))
    return replace(
        options,
        steps=steps,
        samples=windows + options.held_out,
        save_steps=min(options.save_steps, steps),  # or a short round would never look at what it held out
    )


def share(total: int, number: int, rounds: int) -> int:
    """How many of `total` fall to round `number`, from 0: spread evenly, the larger ones first (2 of 4: 1, 0, 1, 0)."""

    def until(count: int) -> int:
        return -(-total * count // rounds)

    return until(number + 1) - until(number)


def amount_after(pattern: str, done: int, rounds: int) -> str:
    """The zeros that are there after `done` of the rounds: in the end exactly the pattern, on the way a part of it.

    A part of N:M counts in the whole row and never takes more than N of an M, so the zeros can only grow into N:M.
    """
    amount = parse_amount(pattern)
    if done == rounds:
        return pattern
    if isinstance(amount, Unstructured):
        return str(Unstructured(amount.fraction * done / rounds))
    if isinstance(amount, Part):
        return str(Part(amount.part * done, amount.parts * rounds, amount.whole))
    return str(Part(done, rounds, amount))
