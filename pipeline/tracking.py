"""Runs and metrics for MLflow or TensorBoard, through their own libraries: `--track mlflow:URI|tensorboard:DIR`.

One run for each configuration that is finished: its options as parameters, one step for each of its stage runs.
A configuration that was logged before, by its fingerprint, is not logged again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Protocol

from edgepress.checkpoints.errors import PlanError
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.results import metrics
from edgepress.pipeline.tasks import Outcome

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
