"""Write a sweep's results as parquet and CSV, and send them to MLflow or TensorBoard.

The uncompressed model is stage `source` at position 0; stage runs that several configurations share stand once.

| column | what |
|---|---|
| sweep | the recipe's name |
| configurations | JSON list of the names of all configurations that go through this stage run |
| result_of | JSON list of those that end with it |
| model, seed, data | of the recipe |
| position, stage | place in the chain from 1, and the stage's name |
| fingerprint, parent | of this stage run and of the one it started from (empty for the source) |
| folder | its folder in OUT (or at the store's URL); the model's path for the source |
| options | JSON of the stage's options |
| metric, value, unit | `perplexity`, `bits_per_byte`, and whatever numbers the measurement holds besides |
| protocol, text, dtype | how the metric was measured, on what, in which precision |
| seconds, peak_memory_bytes | of the stage itself, without the measurement |
| file_bytes, packed_bytes | of its safetensors files; packed for the edge, where the stage says so |
| parameters_total, parameters_nonzero, pattern | counts, and the N:M pattern that was proven to hold |
| reused | true where this sweep found it in the store |
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.manifest import write_bytes
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.sweep import SweepResult
from edgepress.pipeline.tables import plain_cell
from edgepress.pipeline.tree import Node, Tree
from edgepress.pipeline.workers import Outcome

COLUMNS = {
    "sweep": "string", "configurations": "string", "result_of": "string", "model": "string", "seed": "int64",
    "data": "string", "position": "int64", "stage": "string", "fingerprint": "string", "parent": "string",
    "folder": "string", "options": "string", "metric": "string", "value": "float64", "unit": "string",
    "protocol": "string", "text": "string", "dtype": "string", "seconds": "float64", "peak_memory_bytes": "Int64",
    "file_bytes": "Int64", "packed_bytes": "Int64", "parameters_total": "Int64", "parameters_nonzero": "Int64",
    "pattern": "string", "reused": "bool",
}  # fmt: skip
_UNITS = {"perplexity": "perplexity", "bits_per_byte": "bits/byte"}
_NOT_METRICS = ("tokens", "scored_tokens")  # they say how much was measured


def rows(sweep: str, result: SweepResult) -> list[dict[str, Any]]:
    """The table as plain rows, the source first, then by order of the configurations."""
    return [
        row
        for key, node in result.tree.nodes.items()
        if key in result.outcomes
        for row in _node_rows(sweep, node, result)
    ]


def write_results(out: Path, sweep: str, result: SweepResult) -> None:
    """Both files, each whole or not at all. Parquet has the same columns and values as the CSV, but for the quote
    before a text that a spreadsheet would take for a formula."""
    import io

    import pandas as pd

    table = pd.DataFrame(rows(sweep, result), columns=list(COLUMNS)).astype(COLUMNS)
    write_bytes(out / "results.csv", table.map(plain_cell).to_csv(index=False).encode())
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_bytes(out / "results.parquet", buffer.getvalue())


def metrics(measured: dict[str, Any]) -> dict[str, float]:
    """The numbers of a measurement that say how good the model is."""
    return {
        key: float(value)
        for key, value in measured.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in _NOT_METRICS
    }


def _node_rows(sweep: str, node: Node, result: SweepResult) -> list[dict[str, Any]]:
    outcome = result.outcomes[node.key]
    record, measured, recipe = outcome.record, outcome.measured, node.recipe
    # The options as they are now: a record written before an option was added does not state it.
    options = asdict(node.step.options) if node.step else {}
    fixed = {
        "sweep": sweep,
        "configurations": json.dumps(_through(result.tree, node.key)),
        "result_of": json.dumps(result.tree.ends(node.key)),
        "model": recipe.model or "",
        "seed": recipe.seed,
        "data": recipe.calibration_text,
        "position": node.position,
        "stage": node.stage,
        "fingerprint": record.fingerprint,
        "parent": record.parent["fingerprint"] if record.parent else "",
        "folder": outcome.folder,
        "options": json.dumps(options, sort_keys=True),
        "protocol": measured["protocol"],
        "text": measured["text"],
        "dtype": measured["dtype"],
        "seconds": record.seconds,
        "peak_memory_bytes": record.peak_memory_bytes or None,
        "file_bytes": record.file_bytes,
        "packed_bytes": record.packed_bytes,
        "parameters_total": record.parameters_total,
        "parameters_nonzero": record.parameters_nonzero,
        "pattern": record.sparsity["pattern"] if record.sparsity else "",
        "reused": outcome.reused,
    }
    found = metrics(measured).items()
    return [fixed | {"metric": name, "value": value, "unit": _UNITS.get(name, "")} for name, value in found]


def _through(tree: Tree, key: str) -> list[str]:
    return [name for name, path in tree.paths.items() if key in path]


# --- MLflow and TensorBoard -------------------------------------------------------------------------------------------
# Runs and metrics for MLflow or TensorBoard, through their own libraries: `--track mlflow:URI|tensorboard:DIR`.
#
# One run for each configuration that is finished: its options as parameters, one step for each of its stage runs. A
# configuration that was logged before, by its fingerprint, is not logged again.


_HINT = "--track {kind} needs one more package: pip install 'edgepress[tracking]'"
_STAGE_NUMBERS = ("file_bytes", "packed_bytes", "parameters_total", "parameters_nonzero", "seconds")


class Tracker(Protocol):
    def log(self, name: str, recipe: Recipe, outcomes: list[Outcome]) -> None:
        """One finished configuration; outcomes along its path, the uncompressed model first."""

    def close(self) -> None: ...


def open_tracker(spec: str, sweep: str) -> Tracker:
    """Raises PlanError for a wrong spec, a missing library or a place that cannot be written."""
    kind, _, where = spec.partition(":")
    if kind not in ("mlflow", "tensorboard") or not where:
        raise PlanError(f"--track {spec}: give mlflow:URI or tensorboard:DIR, e.g. tensorboard:logs")
    try:
        return MlflowTracker(where, sweep) if kind == "mlflow" else TensorBoardTracker(where, sweep)
    except ImportError:
        raise PlanError(_HINT.format(kind=kind)) from None
    except PlanError:
        raise
    except Exception as error:  # each library and each store behind it has errors of its own
        raise PlanError(f"--track {spec} cannot be used: {str(error).strip() or type(error).__name__}") from None


class MlflowTracker:
    """An experiment named after the sweep, a run named after the configuration."""

    def __init__(self, uri: str, sweep: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if "://" not in uri or uri.startswith("file:"):
            # MLflow asks for consent before it writes runs as plain files; naming a folder here is that consent.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=uri if "://" in uri else Path(uri).resolve().as_uri())
        known = self._client.get_experiment_by_name(sweep)
        self._experiment = known.experiment_id if known else self._client.create_experiment(sweep)

    def log(self, name: str, recipe: Recipe, outcomes: list[Outcome]) -> None:
        key = outcomes[-1].record.fingerprint
        query = f"tags.fingerprint = '{key}' and attributes.run_name = '{name.replace(chr(39), '')}'"
        if self._client.search_runs([self._experiment], query, max_results=1):
            return
        run = self._client.create_run(self._experiment, run_name=name.replace("'", ""), tags={"fingerprint": key})
        for parameter, value in parameters(recipe).items():
            self._client.log_param(run.info.run_id, parameter, value)
        for position, outcome in enumerate(outcomes):
            for metric, value in numbers(outcome).items():
                self._client.log_metric(run.info.run_id, metric, value, step=position)
        self._client.set_terminated(run.info.run_id)

    def close(self) -> None:
        pass


class TensorBoardTracker:
    """A folder of event files for each configuration under DIR/SWEEP."""

    def __init__(self, folder: str, sweep: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter
        self._folder = Path(folder) / _as_path(sweep)
        self._folder.mkdir(parents=True, exist_ok=True)

    def log(self, name: str, recipe: Recipe, outcomes: list[Outcome]) -> None:
        folder = self._folder / f"{_as_path(name)}-{outcomes[-1].record.fingerprint[:8]}"
        if folder.is_dir() and any(folder.iterdir()):
            return
        with self._writer(str(folder)) as writer:
            writer.add_text("recipe", "\n".join(f"    {k}: {v}" for k, v in parameters(recipe).items()))
            for position, outcome in enumerate(outcomes):
                for metric, value in numbers(outcome).items():
                    writer.add_scalar(metric, value, position)

    def close(self) -> None:
        pass


def parameters(recipe: Recipe) -> dict[str, Any]:
    """Plain keys and every option of every stage, as `stage.option`, and the order of the stages."""
    plain = recipe.to_dict()
    stages = plain.pop("stages")
    options = {f"{s}.{key}": value for entry in stages for s, values in entry.items() for key, value in values.items()}
    return plain | {"stages": " ".join(next(iter(entry)) for entry in stages)} | options


def numbers(outcome: Outcome) -> dict[str, float]:
    record = outcome.record
    names = (*_STAGE_NUMBERS, "peak_memory_bytes") if record.peak_memory_bytes else _STAGE_NUMBERS
    return metrics(outcome.measured) | {name: float(getattr(record, name)) for name in names}


def _as_path(name: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", name)
