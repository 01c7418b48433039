"""How perplexity is measured: two protocols, whose numbers cannot be compared (eval/perplexity.py). No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from edgepress.checkpoints.errors import PlanError, near


@dataclass(frozen=True)
class Protocol:
    kind: str = "windows"
    window: int = 512
    tokens: int = 16384  # of the text's beginning; 0 is all of it

    def __post_init__(self) -> None:
        faults = []
        if self.kind not in (known := ("windows", "rows")):
            faults.append(f"--protocol {self.kind}{near(self.kind, known)}: there are windows and rows")
        if self.window < 2:
            faults.append(f"--window {self.window}: at least 2 tokens are needed to predict one")
        if self.tokens < 0 or 0 < self.tokens < self.window:
            faults.append(f"--tokens {self.tokens}: at least one window of {self.window}, or 0 for the whole text")
        if faults:
            raise PlanError("\n".join(faults))

    def __str__(self) -> str:
        extent = f"first {self.tokens} tokens" if self.tokens else "whole text"
        unit = f"windows of {self.window}" if self.kind == "windows" else f"rows cut to {self.window}"
        return f"{unit}, {extent}"
