"""The loss curve of a training: lines for a terminal or a log, and `loss.json` and `loss.png` beside the weights.

Both files are written before the manifest, which lists and hashes them like any other file of the checkpoint.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepress.checkpoints.manifest import write_bytes, write_json

_LABEL = 8  # columns of the numbers on the left, the axis included
_TRAINING, _HELD_OUT = "·", "o"


@dataclass(frozen=True)
class Curve:
    """Losses in nats a token (with distillation: of the mixed objective)."""

    training: list[float]  # of step 1, 2, …
    held_out: dict[int, float]  # by step
    kept_step: int

    def write(self, folder: Path) -> None:
        """`loss.json` and `loss.png`; the same losses give the same bytes."""
        write_json(folder / "loss.json", self.to_dict())
        write_bytes(folder / "loss.png", self.png())

    def to_dict(self) -> dict[str, Any]:
        return {"kept_step": self.kept_step, "training": self.training, "held_out": self.held_out}

    def lines(self, width: int = 80, height: int = 10) -> list[str]:
        """A chart of at most `width` columns. Where steps outnumber columns, a column shows their mean."""
        columns = width - _LABEL
        steps = len(self.training)
        if not steps:
            return []

        def column(step: int) -> int:
            return round((step - 1) / max(steps - 1, 1) * (columns - 1))

        bins: dict[int, list[float]] = {}
        for step, loss in enumerate(self.training, 1):
            bins.setdefault(column(step), []).append(loss)
        means = {place: sum(losses) / len(losses) for place, losses in bins.items()}
        values = [*means.values(), *self.held_out.values()]
        low, high = min(values), max(values)
        grid = [[" "] * columns for _ in range(height)]

        def mark(place: int, loss: float, sign: str) -> None:
            share = (high - loss) / (high - low) if high > low else 0.5
            grid[round(share * (height - 1))][place] = sign

        for place, loss in means.items():
            mark(place, loss, _TRAINING)
        for step, loss in self.held_out.items():
            mark(column(step), loss, _HELD_OUT)
        digits = max(0, 3 - len(str(int(high))))
        drawn = []
        for row, signs in enumerate(grid):
            loss = high - (high - low) * row / (height - 1)
            named = (0, (height - 1) // 2, height - 1) if high > low else (round(0.5 * (height - 1)),)
            label = f"{loss:.{digits}f}" if row in named else ""
            drawn.append(f"{label:>{_LABEL - 2}} ┤" + "".join(signs).rstrip())
        drawn.append(" " * (_LABEL - 1) + "└" + "─" * columns)
        last = f"step {steps}"
        drawn.append(f"{'':<{_LABEL}}{'step 1':<{columns - len(last)}}{last}")
        legend = f"{_TRAINING} training loss" + (f"   {_HELD_OUT} held-out loss" if self.held_out else "")
        return [*drawn, " " * _LABEL + legend]

    def png(self) -> bytes:
        """Both losses over the steps, and the step whose adapter was merged."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        steps = range(1, len(self.training) + 1)
        few = len(self.training) < 60
        axes.plot(steps, self.training, color="#3b6ea5", linewidth=1.2, marker="." if few else "", label="training")
        if self.held_out:
            checks = sorted(self.held_out)
            losses = [self.held_out[step] for step in checks]
            axes.plot(checks, losses, color="#c0562b", linewidth=1.8, marker="o", label="held out")
            axes.axvline(self.kept_step, color="#777777", linestyle=":", label=f"merged: step {self.kept_step}")
        axes.set(xlabel="optimiser step", ylabel="loss, nats per token", title="LoRA training")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})  # its version has no place in a hashed file
        return file.getvalue()
