"""Which weights of a model are zero by design: N:M patterns, fractions, parts of them, and where they lie. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgepress.checkpoints.errors import PlanError


@dataclass(frozen=True)
class Pattern:
    """`removed` of every `of` consecutive weights of a row are zero."""

    removed: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `N:M`, the number removed before the group's size. Raises PlanError for anything else."""
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if not match:
            raise PlanError(f"'{text}' is not an N:M pattern; write e.g. 1:8 (removes 1 of every 8), 0.5 or none")
        removed, of = int(match[1]), int(match[2])
        if not 0 < removed < of:
            raise PlanError(f"{text} removes {removed} of every {of}; N must be at least 1 and below M, e.g. 1:8")
        return cls(removed, of)

    def __str__(self) -> str:
        return f"{self.removed}:{self.of}"

    def on(self, width: int, rows: int = 1) -> Pattern:
        """The pattern of a row of this width: itself."""
        return self

    def covers(self, name: str) -> bool:
        """Whether the layer of this name has the pattern: all do."""
        return True


@dataclass(frozen=True)
class Unstructured:
    """A fraction of every row is zero, wherever in the row."""

    fraction: float

    def __str__(self) -> str:
        return str(self.fraction)  # all digits: the manifest's text is read back

    def on(self, width: int, rows: int = 1) -> Pattern:
        """The same as an N:M pattern whose group is the whole row."""
        return Pattern(int(self.fraction * width), width)

    def covers(self, name: str) -> bool:
        """Whether the layer of this name has the pattern: all do."""
        return True


@dataclass(frozen=True)
class Capped(Pattern):
    """A pattern of wide groups of which no run of `within.of` weights may lose more than `within.removed`."""

    within: Pattern


@dataclass(frozen=True)
class Part:
    """`part` of `parts` equal shares of the zeros of N:M, at most N in every M: the zeros can grow into N:M.

    The shares count in every row, so a group may hold all its zeros early and another none.
    """

    part: int
    parts: int
    whole: Pattern

    def __str__(self) -> str:
        return f"{self.part}/{self.parts} of {self.whole}"

    def on(self, width: int, rows: int = 1) -> Pattern:
        """A pattern whose group is the whole row, with the cap on every M."""
        return Capped(width * self.whole.removed * self.part // (self.whole.of * self.parts), width, self.whole)

    def covers(self, name: str) -> bool:
        """Whether the layer of this name has the pattern: all do."""
        return True


Amount = Pattern | Unstructured | Part  # what --wanda can ask of a row


@dataclass(frozen=True)
class Within:
    """A pattern on the layers of one name alone; a fraction then counts over the whole layer, not row by row."""

    amount: Amount
    layer: str  # the last part of the layers' names, e.g. gate_proj

    def __str__(self) -> str:
        return f"{self.amount} in {self.layer}"

    def on(self, width: int, rows: int = 1) -> Pattern:
        """N:M and its parts themselves; of a fraction, a pattern whose group is the whole layer of `rows` rows."""
        if not isinstance(self.amount, Unstructured):
            return self.amount.on(width)
        return Pattern(round(self.amount.fraction * width * rows), width * rows)

    def covers(self, name: str) -> bool:
        """Whether the layer of this name has the pattern."""
        return name.rpartition(".")[2] == self.layer


Sparsity = Pattern | Unstructured | Part | Within


def parse_sparsity(text: str) -> Sparsity:
    """Read what str() of a pattern gives: an amount, or an amount `in` a layer. Raises PlanError."""
    amount, within, layer = text.partition(" in ")
    return Within(parse_amount(amount), layer) if within else parse_amount(text)


def parse_amount(text: str) -> Amount:
    """Read `N:M`, a fraction such as 0.5, or a part of N:M such as `1/4 of 2:4`. Raises PlanError for anything else."""
    if match := re.fullmatch(r"(\d+)/(\d+) of (.+)", text.strip()):
        if not 0 < int(match[1]) < int(match[2]):
            raise PlanError(f"'{text}': the part must be between 0 and 1, e.g. 1/4 of 2:4")
        return Part(int(match[1]), int(match[2]), Pattern.parse(match[3]))
    if ":" in text:
        return Pattern.parse(text)
    try:
        fraction = float(text)
    except ValueError:
        return Pattern.parse(text)
    if not 0 < fraction < 1:
        raise PlanError(f"a fraction of {text} cannot be removed; it must be between 0 and 1, e.g. 0.5")
    return Unstructured(fraction)
