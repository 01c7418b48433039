"""When an answer counts as right: exact, substring, or 80 % of the words (thesis, section 3.6.2). No torch.

Before anything is compared, both sides are normalised: Unicode NFKC (full-width digits, ligatures and composed
accents become one form), case folded, punctuation removed (every Unicode character of category P and ASCII's symbols,
without leaving a space: "Spider-Man" is "spiderman"), runs of white space made one space. Articles and accents stay:
the thesis removes neither.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Sequence
from typing import Literal

VERSION = 1
Tier = Literal["exact", "substring", "words", "miss"]
TIERS: tuple[Tier, ...] = ("exact", "substring", "words")


def normalise(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = (c for c in folded if not (unicodedata.category(c).startswith("P") or c in string.punctuation))
    return " ".join("".join(kept).split())


def match(answer: str, expected: Sequence[str]) -> Tier:
    """The first tier that any of the expected answers reaches.

    Substring is meant letter by letter, as in the thesis: "ant" is found in "antelope" (see inside_a_word). Words
    asks for at least two words in the expected answer and 80 % of its distinct words among the answer's (equation
    3.13). An expected answer of which normalisation leaves nothing matches nothing.
    """
    said = normalise(answer)
    wanted = [w for w in map(normalise, expected) if w]
    if said in wanted:
        return "exact"
    if any(w in said for w in wanted):
        return "substring"
    words = set(said.split())
    for w in wanted:
        target = set(w.split())
        if len(w.split()) > 1 and 5 * len(target & words) >= 4 * len(target):
            return "words"
    return "miss"


def inside_a_word(answer: str, expected: Sequence[str]) -> bool:
    """Whether every place where an expected answer is found begins or ends within a longer word."""
    said = f" {normalise(answer)} "
    wanted = [w for w in map(normalise, expected) if w]
    return any(w in said for w in wanted) and not any(f" {w} " in said for w in wanted)
