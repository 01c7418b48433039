"""Run a recipe: take each stage from the store where it is finished, else compute and measure it."""

from __future__ import annotations

import importlib
import platform
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError, installed, missing
from edgepress.checkpoints.manifest import MANIFEST, Manifest, describe_files, fingerprint, sealed, write_json
from edgepress.checkpoints.memory import available_bytes, peak_bytes, reset_peak, size_text
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.runtime import Progress, Runtime, choose_device, choose_dtype, machine
from edgepress.checkpoints.shape import ModelShape
from edgepress.checkpoints.writer import CheckpointWriter, prove_pattern
from edgepress.eval.perplexity import Protocol, measure, measurement_key
from edgepress.eval.text import NAMED
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.calibration import Calibration, corpus_fault, training_specs
from edgepress.pipeline.plan import StagePlan, examined, judge, plan, say_measured, say_planned, to_dict
from edgepress.pipeline.progress import Reporter
from edgepress.pipeline.recipe import Draft, Recipe
from edgepress.pipeline.store import REPORT, Store, open_model, require_apart
from edgepress.stages.options import Options, decisive

_PACKAGES = ("torch", "transformers", "peft", "gptqmodel", "safetensors", "edgepress")
_SHOULD_IMPROVE = ("lora", "tune", "eora")


@dataclass
class StageResult:
    """One stage of a run, as it stands in report.json."""

    checkpoint: Checkpoint
    reused: bool
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def manifest(self) -> Manifest:
        assert self.checkpoint.manifest is not None
        return self.checkpoint.manifest

    def to_dict(self) -> dict[str, Any]:
        manifest = self.manifest
        sparsity = manifest.sparsity or {"pattern": None, "holds": None}
        return {
            "stage": manifest.stage,
            "path": str(self.checkpoint.folder),
            "fingerprint": manifest.fingerprint,
            "reused": self.reused,
            "seconds": manifest.seconds,
            "peak_memory_bytes": manifest.peak_memory_bytes,
            "file_bytes": manifest.file_bytes,
            "packed_bytes": manifest.packed_bytes,
            "parameters_total": manifest.parameters_total,
            "parameters_nonzero": manifest.parameters_nonzero,
            "sparsity": sparsity,
            "bits_per_byte": {"before": self.before["bits_per_byte"], "after": self.after["bits_per_byte"]},
            "perplexity": {
                "before": self.before["perplexity"],
                "after": self.after["perplexity"],
                "protocol": self.after["protocol"],
                "text": self.after["text"],
            },
        }


@dataclass
class RunResult:
    report: dict[str, Any]
    source: Checkpoint
    stages: list[StageResult]
    computed: int  # stages that were not in the store already


@dataclass(frozen=True)
class Conditions:
    """What all stage runs of a recipe share: where they start, on what they calibrate, how they are measured."""

    recipe: Recipe
    source: Checkpoint
    calibration: Calibration
    protocol: Protocol
    runtime: Runtime
    store: Store

    @classmethod
    def prepare(cls, recipe: Recipe, out: Path, progress: Progress) -> Conditions:
        device = choose_device(recipe.device)
        protocol = Protocol(recipe.protocol, recipe.window, recipe.tokens)
        source = open_model(recipe.model)
        dtype = choose_dtype(recipe.dtype, device, source.shape.dense_dtype)
        runtime = Runtime(device, dtype, recipe.seed, progress, spill_bytes=recipe.spill_mib * 2**20)
        return cls(recipe, source, Calibration(recipe, source, out, runtime), protocol, runtime, Store(out))

    def fingerprints(self, plans: list[StagePlan]) -> list[str]:
        return _fingerprints(self.recipe, self.source, plans, self.calibration, self.runtime)

    def measured(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return _measured(checkpoint, self.calibration, self.protocol, self.runtime, self.store)


def prepared(drafted: Draft, out: Path) -> Recipe:
    """The recipe, if it can run. Raises RecipeError with all that is wrong with it and its model, before any work."""
    require_apart(drafted.recipe.model, out)
    if fault := corpus_fault(drafted.recipe):
        drafted = replace(drafted, faults=(*drafted.faults, fault))
    if (hub := [spec for spec in training_specs(drafted.recipe) if spec in NAMED[1:]]) and not installed("datasets"):
        fault = missing("datasets", f"the text '{hub[0]}'") + ". Or name a file with --data, or give --data embedded"
        drafted = replace(drafted, faults=(*drafted.faults, fault))
    examined(drafted, lambda recipe: open_model(recipe.model).shape)
    return drafted.recipe


def run(recipe: Recipe, out: Path, reporter: Reporter) -> RunResult:
    """Carry out a recipe in the output folder. The caller holds the store open (Store.opened)."""
    soc = load_soc(recipe.soc)
    at = Conditions.prepare(recipe, out, reporter)
    source, store = at.source, at.store
    plans = plan(recipe, source.shape)
    keys = at.fingerprints(plans)
    _require_room(out, store, plans, keys)
    store.forget_result(store.stage_folder(len(plans), plans[-1].options.label, keys[-1]) if plans else None)
    if not plans:
        reporter.note("every stage is skipped: the model is measured, and no checkpoint is written")
    say_planned(reporter, plans[-1].shape if plans else source.shape, soc, _name(recipe))
    for note in dict.fromkeys((*recipe.notes, *(remark for p in plans for remark in p.remarks))):
        reporter.note(note)

    before = baseline = at.measured(source)
    reporter.say(
        f"{_name(recipe)}: {size_text(source.shape.file_bytes, decimals=1)}, perplexity {before['perplexity']:.2f} "
        f"({before['protocol']}; {at.calibration.evaluation.name}; {before['dtype']})"
    )
    current, results = source, []
    for position, (step, key) in enumerate(zip(plans, keys, strict=True), 1):
        reporter.say(f"{position}/{len(plans)} {step.stage}  {_settings(step.options)}", style="bold")
        results.append(run_stage(step, position, key, current, at, before))
        _say_stage(reporter, results[-1], current)
        current, before = results[-1].checkpoint, results[-1].after
        say_measured(reporter, step.shape, current.shape, soc, _name(recipe))

    verdict = judge(current.shape, soc, _name(recipe), file_bytes=current.shape.file_bytes, timing=True)
    if results:
        store.link_result(current.folder)
    report = {
        "model": _name(recipe),
        "machine": machine(),
        "source": {
            "path": str(source.folder),
            "fingerprint": source.fingerprint,
            "file_bytes": source.shape.file_bytes,
            "packed_bytes": packed_sizes(source.shape).total,
        },
        "recipe": recipe.to_dict(),
        "baseline": baseline,
        "stages": [result.to_dict() for result in results],
        "hardware": to_dict(verdict),
    }
    write_json(out / REPORT, sealed(report))
    return RunResult(report, source, results, sum(not r.reused for r in results))


def run_stage(
    step: StagePlan, position: int, key: str, parent: Checkpoint, at: Conditions, before: dict[str, Any]
) -> StageResult:
    """One stage run: from the store if it is finished there, else computed; measured either way.

    Whoever else wants the same stage run waits until this one is finished, and then finds it in the store.
    """
    folder = at.store.stage_folder(position, step.options.label, key)
    with at.store.claimed(folder):
        done = at.store.finished(folder, key)
        reused = done is not None
        if done is None:
            done = _compute(step, parent, folder, key, at.calibration, at.protocol, at.runtime, at.store, before)
        return StageResult(done, reused, before, at.measured(done))


def _compute(
    step: StagePlan, parent: Checkpoint, folder: Path, key: str, calibration: Calibration, protocol: Protocol,
    runtime: Runtime, store: Any, before: dict[str, Any],
) -> Checkpoint:  # fmt: skip
    """Run one stage, prove and measure what lies on the disk, and only then write the manifest."""
    module = importlib.import_module(f"edgepress.stages.{step.stage}")
    target = CheckpointWriter(folder, parent.shape.block_prefix)
    work = target.work  # from the start, so that a kill at any moment leaves a folder that is known to be unfinished
    work.remove_rest()
    windows = calibration.windows(step.stage, step.options, step.turn)
    reset_peak()
    facts = module.run(parent, target, windows, step.options, replace(runtime, turn=step.turn))
    seconds, peak = work.seconds, peak_bytes()

    files = describe_files(folder)
    work.require_as_written(files)
    result = Checkpoint(folder, None)
    counted = result.facts(step.shape.pattern)
    plans = {"file_bytes": step.shape.file_bytes, "packed_bytes": packed_sizes(step.shape).total}
    for (count, planned), what in zip(plans.items(), ("on disk", "packed"), strict=True):
        if counted[count] != planned:
            runtime.progress.note(
                f"{step.stage}: {counted[count]} bytes {what}, the plan said {planned}; "
                "the forecast is wrong for this model, please report it"
            )
    manifest = Manifest(
        stage=step.stage,
        stage_version=_version(step),
        options=asdict(step.options),
        fingerprint=key,
        parent={"path": _path_from(folder, parent.folder), "fingerprint": parent.fingerprint},
        seed=runtime.seed,
        dtype=str(runtime.dtype).removeprefix("torch."),
        device=str(runtime.device),
        calibration=windows.facts(),
        sparsity=_sparsity(step.shape, result, parent),
        seconds=seconds,
        peak_memory_bytes=peak,
        versions={"python": platform.python_version()} | _versions(),
        files=files,
        origin=_origin(parent, facts),
        facts=facts,
        **counted,
    )
    measured = Checkpoint(folder, manifest)
    after = _measured(measured, calibration, protocol, runtime, store)
    manifest.quality = {"before": before, "after": after}
    manifest.write(folder)
    work.remove()
    return Checkpoint.open(folder)


def _versions() -> dict[str, str]:
    """Of what computed, as far as it is installed."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _masks(result: Checkpoint, parent: Checkpoint) -> Checkpoint | None:
    """The checkpoint whose zeros are the result's mask: the last before quantisation.

    Codes may stand for 0 where nothing was removed, which the stage tune need not keep.
    """
    masked = [c for c in parent.ancestors() if c.shape.pattern and len(c.shape.blocks) == len(result.shape.blocks)]
    return next((c for c in masked if c.shape.grid is None), masked[0] if masked else None)


def _sparsity(shape: ModelShape, result: Checkpoint, parent: Checkpoint) -> dict[str, Any] | None:
    """Proof from the files themselves that the planned pattern is there; raises NumericsError if it is not."""
    if shape.pattern is None:
        return None
    facts = prove_pattern(result, shape.pattern, _masks(result, parent))
    if not facts["holds"]:
        raise NumericsError(
            f"{result.folder}: of the {shape.pattern} pattern {facts['kept_zeros']} of {facts['expected_zeros']} zeros "
            f"are left, and {facts['refilled_zeros']} of the mask's zeros were filled. The stage did not keep its "
            "mask; the folder is left unfinished and is not used"
        )
    return facts


def _origin(parent: Checkpoint, facts: dict[str, Any]) -> dict[str, Any]:
    """Which blocks of the uncompressed model are left."""
    count = len(parent.shape.blocks)
    left = (parent.manifest.origin.get("blocks") if parent.manifest else None) or list(range(count))
    kept = facts.get("kept_blocks", list(range(count)))
    return {"blocks": [left[i] for i in kept]}


def _fingerprints(
    recipe: Recipe, source: Checkpoint, plans: list[StagePlan], calibration: Calibration, runtime: Runtime
) -> list[str]:
    keys, parent = [], source.fingerprint
    for step in plans:
        windows = calibration.windows(step.stage, step.options, step.turn)
        parent = fingerprint(
            parent, step.stage, _version(step), decisive(step.options), windows.sha256, recipe.seed, str(runtime.dtype)
        )
        keys.append(parent)
    return keys


def _version(step: StagePlan) -> int:
    """The stage's; one more with an adapter beside the weights, which since then lies where transformers finds it, and
    where blocks run several times, which since then are one."""
    adapted = any(x.adapted for block in step.shape.blocks for x in block.linears)
    again = len(step.shape.own_blocks) < len(step.shape.blocks)
    return int(importlib.import_module(f"edgepress.stages.{step.stage}").VERSION) + adapted + again


def _measured(
    checkpoint: Checkpoint, calibration: Calibration, protocol: Protocol, runtime: Runtime, store: Any
) -> dict[str, Any]:
    """The perplexity, measured now or, with the same checkpoint and protocol, before."""
    key = measurement_key(checkpoint.fingerprint, calibration.evaluation, protocol, runtime.dtype, calibration.bos)
    known = store.measurement(key, runtime.progress.note)
    if known is None:
        known = measure(checkpoint, calibration.evaluation, protocol, runtime).to_dict()
        store.keep_measurement(key, known)
    return dict(known)


def _require_room(out: Path, store: Any, plans: list[StagePlan], keys: list[str]) -> None:
    """Raise PlanError if disk or memory will not do, by the forecast of the stages not yet in the store."""
    todo = [
        step
        for position, (step, key) in enumerate(zip(plans, keys, strict=True), 1)
        if not (store.stage_folder(position, step.options.label, key) / MANIFEST).is_file()
    ]
    disk = sum(step.written_bytes for step in todo) + max((step.cost.scratch_bytes for step in todo), default=0)
    free = shutil.disk_usage(out).free
    faults = []
    if disk > free:
        wanted, there = size_text(disk, decimals=1), size_text(free, decimals=1)
        faults.append(f"the stages will write {wanted} to {out}, where {there} are free")
    for step in todo:
        if (peak := step.cost.peak_memory_bytes) > available_bytes():
            faults.append(
                f"{step.stage} will need {size_text(peak, decimals=1)} of memory by the forecast; "
                f"{size_text(available_bytes(), decimals=1)} are available"
            )
    if faults:
        raise PlanError("; ".join(faults) + ". `compress plan` shows the forecast of every stage")


def _say_stage(reporter: Reporter, result: StageResult, parent: Checkpoint) -> None:
    """The same three lines after every stage."""
    manifest = result.manifest
    how = "  (from the store)" if result.reused else ""
    before, after = result.before["perplexity"], result.after["perplexity"]
    reporter.say(f"  {manifest.seconds:.0f} s, peak memory {size_text(manifest.peak_memory_bytes, decimals=1)}{how}")
    kept = manifest.sparsity
    zeros = f", {kept['pattern']} holds: {kept['kept_zeros']} of {kept['expected_zeros']} zeros" if kept else ""
    sizes = (parent.shape.file_bytes, manifest.file_bytes, packed_sizes(parent.shape).total, manifest.packed_bytes)
    was, now, packed, packed_now = (size_text(size, decimals=1) for size in sizes)
    reporter.say(f"  {was} -> {now}, packed {packed} -> {packed_now}{zeros}")
    reporter.say(f"  perplexity {before:.2f} -> {after:.2f}")
    if manifest.stage == "vocabulary":
        bits = (result.before["bits_per_byte"], result.after["bits_per_byte"])
        reporter.say(f"  other tokens count in it now: compare bits per byte, {bits[0]:.3f} -> {bits[1]:.3f}")
    if manifest.stage in _SHOULD_IMPROVE and after >= before:
        reporter.note(f"{manifest.stage} should have lowered the perplexity and did not")


def _settings(options: Options) -> str:
    return ", ".join(f"{key} {value}" for key, value in asdict(options).items() if value not in ("", False))


def _name(recipe: Recipe) -> str:
    from edgepress.checkpoints.sources import PACKAGED

    return recipe.model or PACKAGED


def _path_from(folder: Path, parent: Path) -> str:
    """Relative within one store, so that a store can be moved; absolute to a model elsewhere."""
    parent = parent.resolve()
    return f"../{parent.name}" if parent.parent == folder.resolve().parent else str(parent)
