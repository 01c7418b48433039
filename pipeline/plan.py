"""What a recipe will make, before any weight is touched: shapes, bytes, memory; all faults at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from edgepress.checkpoints.errors import EdgepressError, PlanError, RecipeError, TextError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.shape import ModelShape, safetensors_bytes
from edgepress.checkpoints.tokens import beyond_positions
from edgepress.pipeline.homotopic import unrolled
from edgepress.pipeline.plan_texts import text_faults
from edgepress.pipeline.recipe import Draft, Recipe
from edgepress.pipeline.vocabulary import counted
from edgepress.stages.needs import HESSIANS, NOTHING, needs
from edgepress.stages.options import Depth, Eora, Gptq, Lora, Options, Pad, Vocabulary, flag_of
from edgepress.stages.recovery.shapes import training_bytes

# Resident size of Python with torch, transformers and a model's code, and what peft, GPTQModel and the Trainer add,
# measured on Linux with torch 2.14 and transformers 5.23 (benchmarks/peak_memory.py).
_BASE_BYTES = 850 * 2**20
_TRAINER_BYTES = 220 * 2**20
_SPILL_BYTES = 64 * 2**20  # Runtime.spill_bytes
_CHUNK_TOKENS = 4096  # Runtime.chunk_tokens
_REFINE_TOKENS = 1024  # edgepress.stages.refine.REFINE_TOKENS


@dataclass(frozen=True)
class StagePlan:
    stage: str
    options: Options
    shape: ModelShape  # what comes out
    peak_memory_bytes: int
    remarks: tuple[str, ...] = ()
    scratch_bytes: int = 0  # of disk while the stage runs, given back when it is finished
    turn: int = 0  # how often the stage came before in the same recipe
    written_bytes: int = 0  # of its files, those that it does not share with the stage before by hard links

    def to_dict(self) -> dict[str, Any]:
        pattern = self.shape.pattern
        return {
            "stage": self.stage,
            "parameters_total": self.shape.parameters_total,
            "parameters_nonzero": self.shape.parameters_nonzero,
            "file_bytes": self.shape.file_bytes,
            "packed_bytes": self.shape.packed_bytes,
            "model_mib": self.shape.model_mib,
            "blocks": len(self.shape.blocks),
            "pattern": str(pattern) if pattern else None,
            "bits": self.shape.grid.bits if self.shape.grid else None,
            "peak_memory_bytes": self.peak_memory_bytes,
            "scratch_bytes": self.scratch_bytes,
            "written_bytes": self.written_bytes,
            "remarks": list(self.remarks),
        }


def examined(
    drafted: Draft, shape_of: Callable[[Recipe], ModelShape], texts: bool = True
) -> tuple[ModelShape, list[StagePlan]]:
    """The model's shape and every stage's outcome. Raises RecipeError with all that is wrong, of every kind, at once:
    options, measuring, device, chip, model, stages, and unless told not to look, texts."""
    recipe, faults = drafted.recipe, [*drafted.faults]
    faults += condition_faults(recipe)
    shape, plans = None, list[StagePlan]()
    try:
        shape = shape_of(recipe)
    except EdgepressError as error:
        faults += [] if set(str(error).split("\n")) <= {*faults} else [str(error)]  # it may ask the same as above
        if (preset := (recipe.model or "").lower()) in PRESETS:  # no weights to run with, but a shape to plan with
            shape = shape_from_config(PRESETS[preset])
    try:
        if shape is not None and recipe.protocol == "windows":
            beyond_positions(shape, recipe.window, "--window")
    except TextError as error:
        faults.append(str(error))
    try:
        plans = plan(recipe, shape, drafted.refused) if shape is not None else []
    except RecipeError as error:
        faults += error.faults
    if texts:
        faults += text_faults(recipe, [(p.stage, p.options) for p in plans] or recipe.stages)
    if faults:
        raise RecipeError(dict.fromkeys(faults))
    assert shape is not None
    return shape, plans


def condition_faults(recipe: Recipe) -> list[str]:
    """What cannot be in how a recipe is measured and where it runs."""
    from edgepress.checkpoints.runtime import choose_device, choose_dtype
    from edgepress.eval.perplexity import Protocol
    from edgepress.hardware.soc_file import load_soc

    checks: tuple[Callable[[], object], ...] = (
        lambda: Protocol(recipe.protocol, recipe.window, recipe.tokens),
        lambda: choose_device(recipe.device),
        lambda: choose_dtype(recipe.dtype, choose_device("cpu"), "F32"),
        lambda: load_soc(recipe.soc),
    )
    faults: list[str] = []
    for check in checks:
        try:
            check()
        except EdgepressError as error:
            faults += str(error).split("\n")
    return faults


def plan(recipe: Recipe, shape: ModelShape, refused: Set[str] = frozenset()) -> list[StagePlan]:
    """Every stage's outcome, in order. Raises RecipeError with the faults of all stages at once.

    refused: stages that somebody wants and that are not in the recipe, since their options cannot be.
    """
    plans: list[StagePlan] = []
    faults: list[str] = []
    unquantised = "gptq" in refused  # though a quantiser is there: it was refused
    for name, options in unrolled(recipe):
        if unquantised and _works_on_codes(options):
            continue  # it would complain of dense weights, which is not the recipe's fault
        module = importlib.import_module(f"edgepress.stages.{name}")
        try:
            if isinstance(options, Vocabulary):
                options = counted(recipe, options)
            after = module.plan(shape, options)
            remarks = tuple(module.remarks(shape, options)) if hasattr(module, "remarks") else ()
            if not isinstance(options, Vocabulary | Pad):
                remarks += tuple(filter(None, [beyond_positions(shape, options.length, flag_of(options, "length"))]))
            scratch = forecast_scratch(name, options, shape)
            turn = sum(earlier.stage == name for earlier in plans)
            memory = forecast_memory(name, options, shape)
            # The model may lie in one file, or on another disk: of its shards the first stage may share none.
            written = forecast_written(name, options, shape, after) if plans else after.file_bytes
            plans.append(StagePlan(name, options, after, memory, remarks, scratch, turn, written))
            shape = after
        except EdgepressError as error:
            faults.append(str(error) if isinstance(error, PlanError) else f"{name}: {error}")
            unquantised |= name == "gptq"
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))  # each round of --homotopic would say the same
    return plans


def _works_on_codes(options: Options) -> bool:
    """Whether a stage needs quantised weights before it."""
    return isinstance(options, Eora) or (isinstance(options, Lora) and options.recovery.quantised)


def forecast_memory(stage: str, options: Any, before: ModelShape) -> int:
    """Forecast of the process's peak resident size in bytes while the stage runs."""
    from edgepress.stages.distill import teacher_kind

    if isinstance(options, Vocabulary):  # the whole outer part as it was and what is kept of it
        return int(_BASE_BYTES + 2 * sum(t.nbytes for t in before.outer))
    if isinstance(options, Pad):
        return _BASE_BYTES + 4 * max(sum(t.nbytes for t in b.stored()) for b in before.blocks)
    block = max(sum(t.elements for t in b.stored()) for b in _dense(before).blocks) * 2
    outer = sum(t.nbytes for t in before.outer)
    tokens = options.samples * options.length
    hidden, vocabulary = before.hidden_size, before.vocabulary
    states = min(2 * tokens * hidden * 2, _SPILL_BYTES)
    widest = max(x.in_features for b in before.blocks for x in b.linears)
    inner = max(x.out_features for b in before.blocks for x in b.linears)
    biggest = max(x.weights for b in before.blocks for x in b.linears)
    if stage == "lora":
        dense = outer + len(before.blocks) * block
        live = options.micro_batch * options.length
        activations = live * (len(before.blocks) * (14 * hidden + 4 * inner) * 2 + 3 * vocabulary * 4)
        # A held teacher is a second model; a streamed one keeps its embedding, norm and head to make logits with.
        teacher = {"none": 0, "held": dense, "streamed": outer}[teacher_kind(before, options)]
        own = training_bytes(before, options)
        return int(_BASE_BYTES + _TRAINER_BYTES + 2 * dense + teacher + activations + own)
    # Either a block is on: mapped from its file, copied to be edited, and its activations; or the outer part is.
    at_block = 3 * block + states + 12 * min(tokens, _CHUNK_TOKENS) * max(widest, inner)
    at_ends = outer + states
    if stage == "depth":
        candidates = len(before.blocks) - options.protect_first - options.protect_last
        kept_states = {"perplexity": candidates, "taylor": len(before.blocks)}.get(options.metric, 2)
        held = min(kept_states * tokens * hidden * 2, _SPILL_BYTES)
        gradients = 2 * block if options.metric == "taylor" else 0
        at_block, at_ends = at_block + held + gradients, at_ends + held + options.length * vocabulary * 10
    elif needs(options) == HESSIANS:
        inputs = {x.in_features for b in before.blocks for x in b.linears}
        # Hessians, their factor in float64, and a layer's weights in several float32 copies.
        at_block += sum(2 * n * n * 4 for n in inputs) + 3 * widest * widest * 8 + 8 * biggest * 4
        if stage == "gptq" and options.effort == "high":
            # Afterwards all layers of a block at once: positions, gradients, Adam's two moments, levels, weights and
            # a float32 copy in passing, codes and mask; what one step's tokens leave for the gradient; and the states
            # of the dense blocks' walk.
            live = max(min(tokens, _REFINE_TOKENS), options.length)
            tuned = 3 * block + (7 * 4 + 2 + 2) * block // 2 + live * (14 * hidden + 6 * inner) * 4 + 2 * states
            at_block = max(at_block + states, tuned)
    elif stage == "gptq":
        at_block += 8 * biggest * 4
    return int(_BASE_BYTES + max(at_block, at_ends))


def forecast_scratch(stage: str, options: Any, before: ModelShape) -> int:
    """Bytes that the stage's unfinished folder takes for hidden states, before and after a block, in 16 bit."""
    from edgepress.stages.distill import teacher_disk_bytes, teacher_kind

    if stage == "lora":
        return teacher_disk_bytes(before, options) if teacher_kind(before, options) == "streamed" else 0
    if stage not in ("wanda", "gptq", "eora") or needs(options) == NOTHING:  # depth's need not last
        return 0
    return int(2 * options.samples * options.length * before.hidden_size * 2)


def forecast_written(stage: str, options: Any, before: ModelShape, after: ModelShape) -> int:
    """Bytes of a stage's safetensors files without those that are hard links to its source's.

    Which blocks a ranking removes is not known yet: the protected first ones stay shards of their number.
    """
    count, blocks = len(after.blocks), list[int]()
    if stage in ("vocabulary", "eora") or (isinstance(options, Lora) and options.recovery.quantised):
        blocks = list(range(count))
    elif isinstance(options, Depth) and options.layers:
        blocks = [new for new, old in enumerate(options.sequence) if new == old]
    elif isinstance(options, Depth):
        blocks = list(range(min(options.protect_first, count)))
    shards = before.shard_bytes()
    shared = sum(shards[i] for i in blocks)
    if not isinstance(options, Vocabulary) and not (isinstance(options, Gptq) and options.quant_embeddings):
        shared += sum(safetensors_bytes(tensors) for tensors in (list(before.outer), before.edge_tensors()) if tensors)
    if isinstance(options, Vocabulary):
        beside = (before.adapter_tensors(), before.packed_adapter_tensors())
        shared += sum(safetensors_bytes(tensors) for tensors in beside if tensors)
    return after.file_bytes - shared


def _dense(shape: ModelShape) -> ModelShape:
    from dataclasses import replace

    def dense(x: Any) -> Any:
        return replace(x, grid=None, adapter_rank=0, adapter_vector="")

    return replace(shape, blocks=tuple(replace(b, linears=tuple(map(dense, b.linears))) for b in shape.blocks))
