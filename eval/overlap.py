"""Training text without what is measured on: documents that share words with the measuring text are found and left out.

Texts are compared as lower-case words, so that file formats, line ends, wrapping and punctuation do not matter. A
piece of 50 words counts as shared where half of its 13-word windows or more stand in the measuring text: windows of
13 words as in GPT-3's decontamination (Brown et al. 2020, arXiv 2005.14165, appendix C), pieces of 50 as in Lee et
al. 2022 (arXiv 2107.06499). A document, or what was asked in it, of less than 13 words is shared where it is there as
a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgepress.eval.text import Text

WINDOW, PIECE = 13, 50
_COMMON = 10  # a window in more measured documents than this is a phrase of the form, not of a document
_SHORTEST = 4  # words; less, such as a heading, may recur
_WORD = re.compile(r"\w+")
_ANSWER = re.compile(r"\n(?:Answer|Response):")
_Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Measured:
    """What the measuring text holds: hashes of its windows of words, sorted, and of its short documents."""

    windows: _Hashes
    documents: frozenset[int]

    @classmethod
    def of(cls, text: Text) -> Measured:
        documents, parts = set(), []
        for document in text.documents:
            words = _words(document)
            documents |= set(_wholes(document, words, text.exchanges))
            parts.append(np.unique(_windows(words)))
        found, counts = np.unique(np.concatenate([*parts, np.empty(0, np.uint64)]), return_counts=True)
        return cls(found[counts <= _COMMON], frozenset(documents))

    def shares(self, document: str, exchange: bool) -> bool:
        words = _words(document)
        if any(whole in self.documents for whole in _wholes(document, words, exchange)):
            return True
        hashes = _windows(words)
        if not hashes.size or not self.windows.size:
            return False
        places = np.searchsorted(self.windows, hashes).clip(max=self.windows.size - 1)
        known = np.concatenate([[0], np.cumsum(self.windows[places] == hashes)])
        starts = np.arange(0, max(1, hashes.size - PIECE + WINDOW), PIECE // 2)
        ends = np.minimum(starts + PIECE - WINDOW + 1, hashes.size)
        return bool(np.any(2 * (known[ends] - known[starts]) >= ends - starts))


def without_measured(text: Text, measured: Measured) -> tuple[Text, int, int]:
    """The text without what it shares; how many documents were left out, and of how many; of a few long ones, passages.

    A text that shares nothing comes back as it is.
    """
    if len(text.documents) >= 5:
        kept = [document for document in text.documents if not measured.shares(document, text.exchanges)]
        left_out, of = len(text.documents) - len(kept), len(text.documents)
    else:
        kept, left_out, of = [], 0, 0
        for document in text.documents:
            passages = list(_passages(document))
            own = [passage for passage in passages if not measured.shares(passage, text.exchanges)]
            left_out, of = left_out + len(passages) - len(own), of + len(passages)
            kept += ["".join(own)] if own else []
    return (replace(text, documents=tuple(kept)) if left_out else text), left_out, of


def _passages(document: str) -> Iterator[str]:
    """Whole lines together that hold a piece's words."""
    lines: list[str] = []
    words = 0
    for line in document.splitlines(keepends=True):
        lines.append(line)
        words += len(line.split())
        if words >= PIECE:
            yield "".join(lines)
            lines, words = [], 0
    if lines:
        yield "".join(lines)


def _words(document: str) -> _Hashes:
    words = _WORD.findall(document.casefold())
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _windows(words: _Hashes) -> _Hashes:
    """A hash of each run of WINDOW words."""
    if len(words) < WINDOW:
        return np.empty(0, np.uint64)
    total = np.zeros(len(words) - WINDOW + 1, np.uint64)
    for place in range(WINDOW):
        total = total * np.uint64(0x9E3779B97F4A7C15) + words[place : place + total.size]
    return total


def _wholes(document: str, words: _Hashes, exchange: bool) -> Iterator[int]:
    """A hash of a short document, and of what was asked in an exchange."""
    if _SHORTEST <= len(words) < WINDOW:
        yield hash(words.tobytes())
    if exchange and (mark := _ANSWER.search(document)):
        asked = _words(document[: mark.start()])
        if len(asked) > _SHORTEST:
            yield hash(asked.tobytes())
