"""MLflow and TensorBoard get every number of a configuration, once; read back through their own libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.pipeline.recipe import build
from edgepress.pipeline.results import open_tracker, parameters
from edgepress.pipeline.workers import Outcome
from tests.pipeline.report_help import manifest

pytestmark = pytest.mark.unit

RECIPE = build(None, {"wanda.pattern": "2:4"}, skip="lora,gptq,eora")


def outcome(number: int, perplexity: float) -> Outcome:
    measured = {"perplexity": perplexity, "bits_per_byte": 1.5, "tokens": 512, "protocol": "p", "text": "t"}
    record = manifest("depth", fingerprint=f"fp{number}", file_bytes=1000 - number, peak_memory_bytes=0)
    return Outcome(str(number), False, 1.0, f"{number}-x", measured, record)


OUTCOMES = [outcome(0, 10.0), outcome(1, 12.0), outcome(2, 14.0)]


def test_mlflow_has_parameters_and_a_step_for_each_stage_run(tmp_path: Path) -> None:
    for _ in range(2):  # the same sweep again logs nothing twice
        tracker = open_tracker(f"mlflow:{tmp_path / 'runs'}", "my sweep")
        tracker.log("depth 2 + width 2:4", RECIPE, OUTCOMES)
        tracker.close()
    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient(tracking_uri=(tmp_path / "runs").as_uri())
    experiment = client.get_experiment_by_name("my sweep")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.run_name for run in runs] == ["depth 2 + width 2:4"]
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params["wanda.pattern"] == "2:4" and runs[0].data.params["stages"] == "depth wanda"
    history = client.get_metric_history(runs[0].info.run_id, "perplexity")
    assert [(m.step, m.value) for m in history] == [(0, 10.0), (1, 12.0), (2, 14.0)]
    assert runs[0].data.metrics["file_bytes"] == 998 and "peak_memory_bytes" not in runs[0].data.metrics


def test_tensorboard_has_a_step_for_each_stage_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        tracker = open_tracker(f"tensorboard:{tmp_path}", "my sweep")
        tracker.log("depth 2 + width 2:4", RECIPE, OUTCOMES)
        tracker.close()
    (folder,) = (tmp_path / "my_sweep").iterdir()
    assert len(list(folder.iterdir())) == 1
    events: Any = EventAccumulator(str(folder))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("perplexity")] == [(0, 10.0), (1, 12.0), (2, 14.0)]
    assert "recipe/text_summary" in events.Tags()["tensors"]


def test_parameters_name_every_option_by_its_stage() -> None:
    found = parameters(RECIPE)
    assert found["depth.remove"] == 2 and found["seed"] == 0 and "lora.rank" not in found


@pytest.mark.parametrize("spec", ["mlflow", "mlflow:", "wandb:x", "tensorboard:/proc/nowhere"])
def test_a_wrong_place_is_one_message(spec: str) -> None:
    with pytest.raises(PlanError, match="--track"):
        open_tracker(spec, "x")
