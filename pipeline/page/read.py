"""Read an output folder: a run's report.json or a sweep's results, and the manifests of the stages."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.manifest import MANIFEST, MARKER, Manifest, seal_holds, sha256_file
from edgepress.eval.results import Result
from edgepress.pipeline.store import require_own
from edgepress.pipeline.tables import read_cell
from edgepress.stages.quantisers import too_few_bits

_RUN, _SWEEP, _TABLES = "report.json", "sweep.json", ("results.parquet", "results.csv")
EVALUATION = "evaluation.json"  # of `compress eval OUT`: answers, speed, and a loss for each window
_NEEDED = (
    *("sweep", "configurations", "result_of", "model", "position", "stage", "fingerprint", "folder", "metric"),
    *("value", "protocol", "text", "dtype", "seconds", "peak_memory_bytes", "file_bytes", "packed_bytes"),
    *("parameters_total", "parameters_nonzero", "pattern"),
)


def read_study(out: Path) -> Study:
    """Raises PlanError where the folder is no store or nothing in it is finished, CheckpointError for damage."""
    if not out.is_dir():
        raise PlanError(f"there is no folder {out}; give the -o of a finished `compress` or `compress sweep`")
    require_own(out)
    found = [path for name in (_RUN, *_TABLES) if (path := out / name).is_file()]
    if not found and not (out / MARKER).is_file():
        names = ", ".join(sorted(clean(p.name) for p in out.iterdir())[:5]) or "nothing"
        raise PlanError(f"{out} is not an output folder of compress (it holds {names}); give the -o of a run or sweep")
    if not found:
        stages = [p.parent.name for p in sorted(out.glob(f"*/{MANIFEST}"))]
        done = f"finished so far: {', '.join(stages)}" if stages else "no stage is finished"
        raise PlanError(f"{out}: the run has not ended ({done}); run the same command again, then report")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    both = len({path.name == _RUN for path in found}) == 2
    study = _read_run(out) if newest.name == _RUN else _read_sweep(out, newest)
    if both:
        other = "an older sweep" if newest.name == _RUN else "an older single run"
        study = _with_notes(study, f"{out} also holds {other}, which is not shown")
    evaluated, faults = _evaluated(out)
    study = replace(_with_notes(study, *faults), evaluated=evaluated)
    kinds = {run.measured for run in study.runs}
    if len(kinds) > 1:
        study = _with_notes(study, f"perplexity was measured in {len(kinds)} ways; only rows measured alike compare")
    return study


def clean(text: object, most: int = 400) -> str:
    """A name fit for a page and a figure: one line, without control characters or lone surrogates."""
    plain = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+", " ", str(text)).strip()
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def stem(model: str) -> str:
    """What to call a model: the last part of its path or hub id; of a run's `result` the run's too."""
    parts = [part for part in re.split(r"[/\\]+", model) if part not in ("", ".", "~")] or [model]
    name = re.sub(r"\.(gguf|bin|safetensors)$", "", parts[-1])
    return f"{parts[-2]}/{name}" if name == "result" and len(parts) > 1 else name


def _with_notes(study: Study, *notes: str) -> Study:
    return replace(study, notes=(*study.notes, *notes))


# --- one run ---------------------------------------------------------------------------------------------------------


def _read_run(out: Path) -> Study:
    report = _json(out / _RUN)
    try:
        return _run_study(out, report)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(out / _RUN, error) from None


def _run_study(out: Path, report: dict[str, Any]) -> Study:
    first, source, notes = report["baseline"], report["source"], list[str]()
    measured = (clean(first["protocol"]), clean(first["text"]), clean(first["dtype"]))
    folder = _on_disk(out, source["path"])
    parameters = _parameters(folder)
    begin = StageRun(
        0, SOURCE, SOURCE, source["fingerprint"], folder, float(first["perplexity"]),
        first.get("bits_per_byte"), measured, source["file_bytes"], source.get("packed_bytes"), *parameters,
    )  # fmt: skip
    runs = [begin]
    for position, stage in enumerate(report["stages"], 1):
        folder = _on_disk(out, Path(stage["path"]).name)
        manifest = _manifest(folder, notes)
        quality = manifest.quality.get("after", {}) if manifest else {}
        after = stage["perplexity"]["after"]
        bits = quality.get("bits_per_byte") if quality.get("perplexity") == after else None
        runs.append(
            StageRun(
                position=position,
                stage=clean(stage["stage"]),
                label=_label(Path(stage["path"]).name, clean(stage["stage"])),
                fingerprint=stage["fingerprint"],
                folder=folder,
                perplexity=float(after),
                bits_per_byte=stage.get("bits_per_byte", {}).get("after", bits),
                measured=measured,
                file_bytes=stage["file_bytes"],
                packed_bytes=stage.get("packed_bytes"),
                parameters_total=stage["parameters_total"],
                parameters_nonzero=stage["parameters_nonzero"],
                pattern=clean(stage["sparsity"]["pattern"] or ""),
                seconds=stage["seconds"],
                peak_memory_bytes=stage["peak_memory_bytes"],
                manifest=manifest,
            )
        )
    recipe, model = report["recipe"], clean(report["model"])
    chain = Configuration(model, tuple(runs), recipe)
    return Study(
        "run",
        model,
        model,
        out,
        (chain,),
        soc=str(recipe["soc"]),
        verdict=report["hardware"],
        notes=tuple(notes),
        machine=clean(report.get("machine", "")),
    )


# --- a sweep ---------------------------------------------------------------------------------------------------------


def _read_sweep(out: Path, path: Path) -> Study:
    import pandas as pd

    try:
        table = (
            pd.read_parquet(path)
            if path.suffix == ".parquet"
            else pd.read_csv(path, keep_default_na=True).map(read_cell)
        )
    except (ValueError, OSError) as error:  # pandas' and pyarrow's errors are of these kinds
        raise _damaged(path, error) from None
    if missing := [name for name in _NEEDED if name not in table.columns]:
        raise CheckpointError(f"{path} lacks the columns {', '.join(missing)}; run the sweep again to write it anew")
    rows = [{key: _known(value) for key, value in row.items()} for row in table.to_dict("records")]
    if not any(row["metric"] == "perplexity" for row in rows):
        raise PlanError(f"{path} holds no measurement: nothing is finished; run the same sweep again, then report")
    state = _json(out / _SWEEP) if (out / _SWEEP).is_file() else {}
    if state.get("tables", {}).get(path.name, "") not in ("", sha256_file(path)):
        raise _damaged(path, ValueError(f"it was edited or damaged: {_SWEEP} states another sha256"))
    try:
        return _sweep_study(out, rows, state)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise _damaged(path, error) from None


def _sweep_study(out: Path, rows: list[dict[str, Any]], state: dict[str, Any]) -> Study:
    notes = [clean(note) for note in state.get("notes", ())]
    told = {entry["name"]: entry for entry in state.get("configurations", ())}
    bits = {_node(row): row["value"] for row in rows if row["metric"] == "bits_per_byte"}
    through: dict[str, list[StageRun]] = {}
    ends: list[str] = []
    for row in (row for row in rows if row["metric"] == "perplexity"):
        run = _sweep_run(out, row, bits.get(_node(row)), notes)
        for name in json.loads(row["configurations"]):
            through.setdefault(name, []).append(run)
        ends += json.loads(row["result_of"])
    done = [name for name in through if name in ends]
    if not done:
        raise PlanError(f"{out}: no configuration of the sweep is finished; run the same sweep again, then report")
    configurations = tuple(
        Configuration(
            clean(name), tuple(sorted(through[name], key=lambda r: r.position)), told.get(name, {}).get("recipe")
        )
        for name in done
    )
    failures = {clean(name): clean(entry["failure"]) for name, entry in told.items() if entry.get("failure")}
    unfinished = [clean(n) for n, entry in told.items() if n not in done and not entry.get("failure")]
    if unfinished:
        notes.append(f"not finished: {', '.join(unfinished)}")
    models = {clean(row["model"] or "smollm2-135m-instruct"): None for row in rows}
    if len(models) > 1:
        notes.append("several models: perplexities of different tokenizers do not compare, bits per byte do")
    socs = {str(entry["recipe"]["soc"]) for entry in told.values()}
    return Study(
        "sweep", clean(rows[0]["sweep"]), ", ".join(models), out, configurations, failures,
        soc=min(socs) if socs else "siracusa", about=clean(state.get("about", "")),
        counts=dict(state.get("stage_runs", {})), notes=tuple(notes), machine=clean(state.get("machine", "")),
    )  # fmt: skip


def _sweep_run(out: Path, row: dict[str, Any], bits: float | None, notes: list[str]) -> StageRun:
    source = row["stage"] == SOURCE
    folder = _on_disk(out, row["folder"] or "")
    stage = clean(row["stage"])
    return StageRun(
        position=int(row["position"]),
        stage=stage,
        label=SOURCE if source else _label(Path(str(row["folder"])).name, stage),
        fingerprint=str(row["fingerprint"]),
        folder=folder,
        perplexity=math.nan if row["value"] is None else float(row["value"]),
        bits_per_byte=bits,
        measured=(clean(row["protocol"]), clean(row["text"]), clean(row["dtype"])),
        file_bytes=int(row["file_bytes"]),
        packed_bytes=_whole(row["packed_bytes"]),
        parameters_total=_whole(row["parameters_total"]),
        parameters_nonzero=_whole(row["parameters_nonzero"]),
        pattern=clean(row["pattern"] or ""),
        seconds=float(row["seconds"] or 0),
        peak_memory_bytes=_whole(row["peak_memory_bytes"]),
        manifest=None if source else _manifest(folder, notes),
    )


def _node(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one measured stage run from another."""
    return tuple(row[key] for key in ("fingerprint", "position", "protocol", "text", "dtype"))


def _known(value: Any) -> Any:
    """None for the several ways in which a table says that there is no value."""
    import pandas as pd

    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


# --- both ------------------------------------------------------------------------------------------------------------


def _evaluated(out: Path) -> tuple[dict[str, dict[str, Result]], list[str]]:
    """What `compress eval` measured, by fingerprint and task; where its file cannot be read, a note why."""
    if not (out / EVALUATION).is_file():
        return {}, []
    try:
        entries = _json(out / EVALUATION)["checkpoints"]
        return {
            str(entry["fingerprint"]): {
                clean(task): Result.from_dict(found) for task, found in entry["results"].items()
            }
            for entry in entries
        }, []
    except CheckpointError as error:
        return {}, [clean(error)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return {}, [clean(_damaged(out / EVALUATION, error))]


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise _damaged(path, error) from None
    if not isinstance(data, dict):
        raise _damaged(path, ValueError("it holds no object"))
    if not seal_holds(data):
        raise _damaged(
            path, ValueError("it was edited or damaged: it has not the sha256 of itself that it was written with")
        )
    return data


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = f"the key {error} is missing" if isinstance(error, KeyError) else clean(error)
    return CheckpointError(f"{path} cannot be read ({reason}); run the command that wrote it again")


def _on_disk(out: Path, path: str) -> Path | None:
    """Where a folder is now: a store may have been moved, and its stages lie directly in it."""
    inside = out / Path(path).name
    places = [inside, Path(path), out / path] if path else []
    return next((place for place in places if (place / "config.json").is_file()), None)


def _parameters(folder: Path | None) -> tuple[int | None, int | None]:
    """Of the uncompressed model, which report.json does not count: in total and not zero, where its files are here."""
    from edgepress.pipeline.shapes import model_shape

    if folder is None:
        return None, None
    try:
        shape = model_shape(str(folder))
    except (CheckpointError, PlanError):
        return None, None
    return shape.parameters_total, shape.parameters_nonzero


def _manifest(folder: Path | None, notes: list[str]) -> Manifest | None:
    if folder is None:
        return None
    found = None
    try:
        found = Manifest.read(folder)
        note = too_few_bits(str(found.options.get("quant"))) if found.stage == "gptq" else ""
    except CheckpointError as error:
        note = clean(error)
    if note and note not in notes:
        notes.append(note)
    return found


def _label(folder: str, stage: str) -> str:
    """`wanda-1of8` of `2-wanda-1of8-b74b15bb`."""
    match = re.fullmatch(r"\d+-(.+)-[0-9a-f]{8}", folder)
    return clean(match[1]) if match else stage


# --- what a report is about -------------------------------------------------------------------------------------------
# What a report is about: the stage runs of one run or of a sweep, and the configurations they make up.


SOURCE = "source"


@dataclass(frozen=True)
class StageRun:
    """One finished checkpoint and what was measured on it; the uncompressed model is the one at position 0."""

    position: int
    stage: str
    label: str  # as in the folder's name: wanda-1of8
    fingerprint: str
    folder: Path | None  # None: not on this disk
    perplexity: float
    bits_per_byte: float | None
    measured: tuple[str, str, str]  # protocol, text, precision: only equal ones compare
    file_bytes: int
    packed_bytes: int | None
    parameters_total: int | None
    parameters_nonzero: int | None
    pattern: str = ""
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    manifest: Manifest | None = None

    @property
    def name(self) -> str:
        return "uncompressed" if self.stage == SOURCE else self.label


@dataclass(frozen=True)
class Configuration:
    """A way from the uncompressed model (first) to a result (last)."""

    name: str
    runs: tuple[StageRun, ...]
    recipe: dict[str, Any] | None = None  # as Recipe.to_dict()

    @property
    def source(self) -> StageRun:
        return self.runs[0]

    @property
    def result(self) -> StageRun:
        return self.runs[-1]

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(run.stage for run in self.runs[1:])


@dataclass(frozen=True)
class Study:
    """All that lies in one output folder."""

    kind: str  # run or sweep
    name: str
    model: str
    out: Path
    configurations: tuple[Configuration, ...]
    failures: dict[str, str] = field(default_factory=dict)  # configuration -> reason
    soc: str = "siracusa"
    verdict: dict[str, Any] | None = None  # of the run's result, as Verdict.to_dict()
    about: str = ""
    machine: str = ""  # that the command ran on
    counts: dict[str, int] = field(default_factory=dict)  # of a sweep: stage runs asked, distinct, shared
    notes: tuple[str, ...] = ()
    evaluated: dict[str, dict[str, Result]] = field(default_factory=dict)  # by fingerprint and task

    @property
    def title(self) -> str:
        return stem(self.name) if self.kind == "run" else self.name

    @property
    def model_title(self) -> str:
        return ", ".join(stem(model) for model in self.model.split(", "))

    @property
    def source(self) -> StageRun:
        return self.configurations[0].source

    @property
    def runs(self) -> tuple[StageRun, ...]:
        """Every stage run once, the sources included, in the order of the configurations."""
        return tuple({(r.fingerprint, r.measured): r for c in self.configurations for r in c.runs}.values())

    def of_stage(self, stage: str) -> list[StageRun]:
        """The runs of one stage, each fingerprint once."""
        return list({r.fingerprint: r for r in self.runs if r.stage == stage}.values())

    def users(self, run: StageRun) -> list[str]:
        """The configurations that go through a stage run."""
        return [c.name for c in self.configurations if any(r.fingerprint == run.fingerprint for r in c.runs)]

    @property
    def candidates(self) -> list[Choice]:
        """What there is to choose from: a run's stages, or a sweep's configurations."""
        if self.kind == "run":
            return [Choice(r.name, r, self.source) for r in self.configurations[0].runs]
        return [Choice(c.name, c.result, c.source) for c in self.configurations]

    @property
    def by_bits(self) -> bool:
        """Whether tokens are not the same everywhere, so that bits per byte compare and perplexities do not."""
        several = len({c.source.fingerprint for c in self.configurations}) > 1
        changed = several or any(run.stage == "vocabulary" for run in self.runs)
        return changed and all(run.bits_per_byte is not None for run in self.runs)

    @property
    def quality_name(self) -> str:
        return "bits per byte" if self.by_bits else "perplexity"

    def quality(self, run: StageRun) -> float:
        """What checkpoints are compared by: less is better."""
        return run.bits_per_byte if self.by_bits and run.bits_per_byte is not None else run.perplexity

    @property
    def comparable(self) -> list[Choice]:
        """The candidates measured like most of them, with a finite perplexity."""
        kinds = Counter(c.run.measured for c in self.candidates)
        usual = kinds.most_common(1)[0][0]
        return [c for c in self.candidates if c.run.measured == usual and math.isfinite(c.run.perplexity)]

    @property
    def front(self) -> list[Choice]:
        """The comparable candidates that no other beats in both bytes and quality, the smallest first."""
        choices = self.comparable
        kept = pareto([(self.size(c.run), self.quality(c.run)) for c in choices])
        return sorted((choices[i] for i in kept), key=lambda c: self.size(c.run))

    @property
    def all_packed(self) -> bool:
        """Whether packed bytes are known of every stage run; else file bytes are compared."""
        return all(run.packed_bytes is not None for run in self.runs)

    def size(self, run: StageRun) -> int:
        """Bytes that sizes are compared by: packed for the edge, or of the files where one run did not say."""
        return run.packed_bytes if self.all_packed and run.packed_bytes is not None else run.file_bytes

    @property
    def size_name(self) -> str:
        return "packed bytes" if self.all_packed else "file bytes"

    def configuration_of(self, choice: Choice) -> Configuration:
        return next(c for c in self.configurations if any(r is choice.run for r in c.runs))


@dataclass(frozen=True)
class Choice:
    """A row of the report's table and a point of its Pareto figure."""

    name: str
    run: StageRun
    source: StageRun


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Which points no other beats: both coordinates at most as large, and one smaller. Equal points all stay."""

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b <= y and (a < x or b < y) for a, b in points)

    return [i for i, (x, y) in enumerate(points) if not beaten(x, y)]
