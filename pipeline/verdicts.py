"""The chip's verdict in a run: by plan before it starts, measured after each stage."""

from __future__ import annotations

from typing import Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.check import check
from edgepress.hardware.soc import Soc
from edgepress.hardware.verdict import Verdict
from edgepress.pipeline.progress import Reporter

CONTEXT = 256  # as `compress check`


def judge(shape: ModelShape, soc: Soc, name: str, file_bytes: int | None = None, timing: bool = False) -> Verdict | str:
    """The verdict, or why there is none: a model that no chip's file can judge is compressed all the same."""
    try:
        context = min(CONTEXT, shape.positions)
        return check(shape, soc, context=context, name=name, file_bytes=file_bytes, timing=timing)
    except PlanError as error:
        return f"no verdict: {str(error).removeprefix('no verdict: ')}"
    except Exception as error:  # whatever it is: hours of compression must not be lost to a forecast
        return _failed(error)


def _failed(error: Exception) -> str:
    return (
        f"no verdict: the memory-map check failed on this model with {type(error).__name__}: {error}. This is a bug of "
        "the check, please report it; nothing else depends on it"
    )


def say_planned(reporter: Reporter, planned: ModelShape, soc: Soc, name: str) -> None:
    """One line before the run starts."""
    verdict = judge(planned, soc, name)
    reporter.say(f"by plan the result {verdict.line}" if isinstance(verdict, Verdict) else verdict)


def say_measured(reporter: Reporter, planned: ModelShape, found: ModelShape, soc: Soc, name: str) -> None:
    """One line after a stage, and a warning where the files need other bytes on the chip than the plan said."""
    verdict, forecast = judge(found, soc, name), judge(planned, soc, name)
    if isinstance(verdict, str) or isinstance(forecast, str):
        reporter.note(verdict if isinstance(verdict, str) else str(forecast))
        return
    reporter.say(f"  {verdict.line}")
    for use, said in zip(verdict.memories, forecast.memories, strict=True):
        if use.peak_bytes != said.peak_bytes:
            reporter.note(
                f"{use.name} must hold {size_text(use.peak_bytes)} ({use.peak_bytes} bytes), the plan said "
                f"{said.peak_bytes}; the forecast is wrong for this model, please report it"
            )


def to_dict(verdict: Verdict | str) -> dict[str, Any]:
    """For report.json."""
    if not isinstance(verdict, str):
        try:
            return verdict.to_dict()
        except Exception as error:  # as in `judge`
            verdict = _failed(error)
    return {"fits": None, "summary": verdict}
