"""Metrics of generated text against formulas written out here, and examples worked by hand."""

from __future__ import annotations

import importlib.metadata
import math
import random
import re
import string
import sys
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.eval import metrics
from edgepress.eval.generation import bleu_interval
from edgepress.eval.metrics import NotMeasuredError, bleu, bleu_terms, cosine, f1, rouge_l, sbert_cosines

pytestmark = pytest.mark.unit

REFERENCES = [
    "the cat is on the mat",
    "There is a dog under the old wooden table .",
    "Rain falls mainly in the plain , they say",
]
ANSWERS = [
    "the the the cat on mat",
    "There is a cat under the old table .",
    "They say rain falls mainly in the plain",
]


def grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def plain_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Equation 2.48 word for word, for text whose tokens are separated by spaces."""
    logs = []
    for n in range(1, 5):
        hit = total = 0
        for answer, reference in zip(answers, references, strict=True):
            ours, theirs = grams(answer.split(), n), grams(reference.split(), n)
            hit += sum(min(count, theirs[gram]) for gram, count in ours.items())
            total += sum(ours.values())
        logs.append(math.log(hit / total))
    length, wanted = (sum(len(t.split()) for t in texts) for texts in (answers, references))
    return 100 * min(1.0, math.exp(1 - wanted / length)) * math.exp(sum(logs) / 4)


def test_bleu_is_the_formula_with_clipping_and_brevity_penalty() -> None:
    assert bleu(bleu_terms(ANSWERS, REFERENCES)) == pytest.approx(plain_bleu(ANSWERS, REFERENCES), rel=1e-9)
    # unigrams of the first pair by hand: the (2 of 3), cat, on, mat -> 5 of 6; lengths 6 and 6
    assert bleu_terms(ANSWERS[:1], REFERENCES[:1])[0].tolist() == [5, 1, 0, 0, 6, 5, 4, 3, 6, 6]
    assert bleu(bleu_terms(REFERENCES, REFERENCES)) == pytest.approx(100)
    assert bleu(bleu_terms(["x y z"] * 3, REFERENCES)) < 5


def test_bleu_from_terms_is_sacrebleus_own_on_odd_text() -> None:
    from sacrebleu.metrics import BLEU

    draw = random.Random(3)
    words = ["a", "the", "Cat", "cat.", "3.14", "U.S.", "naïve", "don't", "“quote”", "", "\n"]
    pairs = [(" ".join(draw.choices(words, k=9)), " ".join(draw.choices(words, k=12))) for _ in range(40)]
    pairs += [("", "an empty answer"), ("a", "a")]
    answers, references = [p[0] for p in pairs], [p[1] for p in pairs]
    assert bleu(bleu_terms(answers, references)) == pytest.approx(
        BLEU().corpus_score(answers, [references]).score, abs=1e-9
    )


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """By trying every subsequence."""
    best = 0
    for mask in range(2 ** len(a)):
        part = iter(b)
        chosen = [word for i, word in enumerate(a) if mask >> i & 1]
        if len(chosen) > best and all(word in part for word in chosen):
            best = len(chosen)
    return best


def test_rouge_l_is_the_formula_on_subsequences_found_by_brute_force() -> None:
    for answer, reference, score in zip(ANSWERS, REFERENCES, rouge_l(ANSWERS, REFERENCES), strict=True):
        ours, theirs = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, reference))
        common = longest_common(ours, theirs)
        precision, recall = common / len(ours), common / len(theirs)
        assert score == pytest.approx(2 * precision * recall / (precision + recall))
    # by hand: police killed the gunman | the gunman police killed -> LCS 2 of 4 and 4
    assert rouge_l(["the gunman police killed"], ["police killed the gunman"]) == [0.5]
    assert rouge_l(["", "same words"], ["something", "Same, words!"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("a b c", "a b d", 2 / 3),  # P 2/3, R 2/3
        ("a a a b", "a b b", 2 * 2 / 7),  # shared a, b
        ("Paris", "paris.", 1.0),
        ("the capital is Paris", "Paris", 2 * (1 / 4) * 1 / (1 / 4 + 1)),
        ("", "", 1.0),
        ("", "word", 0.0),
        ("...", "word", 0.0),
        ("Straße", "STRASSE", 1.0),
        ("日本 東京", "東京", 2 / 3),
        ("snake_case", "case snake", 1.0),
    ],
)
def test_token_f1_by_hand(answer: str, reference: str, expected: float) -> None:
    assert f1(answer, reference) == pytest.approx(expected)
    assert f1(reference, answer) == pytest.approx(expected)


def test_cosine() -> None:
    assert cosine([3, 4], [4, 3]) == pytest.approx(24 / 25)
    assert cosine([1, 0], [-2, 0]) == pytest.approx(-1)
    assert cosine([0, 0], [1, 0]) == 0.0


def test_unequal_lists_are_refused() -> None:
    for metric in (bleu_terms, rouge_l, sbert_cosines):
        with pytest.raises(PlanError, match="2 answers cannot be compared with 1 references"):
            metric(["a", "b"], ["a"])


# --- BLEU's interval ------------------------------------------------------------------------------------------------


def sentences(count: int, seed: int) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    references = [" ".join(draw.choices(string.ascii_lowercase[:9], k=12)) for _ in range(count)]
    answers = [" ".join(w if draw.random() < 0.7 else "z" for w in r.split()) for r in references]
    return answers, references


def test_bleus_interval_is_that_of_resampled_corpora() -> None:
    answers, references = sentences(60, 1)
    low, high = bleu_interval(bleu_terms(answers, references))
    draw = random.Random(2)
    values = []
    for _ in range(600):
        rows = draw.choices(range(60), k=60)
        values.append(plain_bleu([answers[i] for i in rows], [references[i] for i in rows]))
    expected = np.quantile(values, [0.025, 0.975])
    width = expected[1] - expected[0]
    assert abs(low - expected[0]) < 0.15 * width and abs(high - expected[1]) < 0.15 * width
    assert bleu_interval(bleu_terms(answers, references)) == (low, high)  # the same seed, the same interval


# --- SBERT ----------------------------------------------------------------------------------------------------------


def test_without_extra_or_model_the_reason_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason(model: str = "") -> str:
        with pytest.raises(NotMeasuredError) as caught:
            sbert_cosines(["a"], ["b"], model)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert reason("none") == "--sbert none"
    absent = "cannot be loaded"
    (tmp_path / "empty").mkdir()
    assert absent in reason(str(tmp_path / "empty")) and "--sbert" in reason(str(tmp_path / "empty"))
    monkeypatch.setattr(metrics, "_packaged_sbert", lambda: None)
    assert metrics.PACKAGED_SBERT in reason()
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    assert "edgepress[sbert]" in reason()


def test_the_packaged_model_is_found_by_its_list_of_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def files(name: str) -> list[Any]:
        assert name == metrics.PACKAGED_SBERT
        paths = [importlib.metadata.PackagePath(p) for p in ("pack/__init__.py", "pack/model/modules.json")]
        for path in paths:
            path.dist = types.SimpleNamespace(locate_file=lambda p: tmp_path / p)
        return paths

    monkeypatch.setattr(importlib.metadata, "files", files)
    assert metrics._packaged_sbert() == str(tmp_path / "pack" / "model")


def test_embeddings_of_a_folder_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    """A tiny BERT with random weights: mean of the last hidden states, computed here from transformers alone."""
    pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    base = tmp_path / "bert"
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=0.5,
        )
        BertModel(config).save_pretrained(base)
    part = Transformer(str(base))
    SentenceTransformer(modules=[part, Pooling(16, "mean")], device="cpu").save(str(tmp_path / "sbert"))

    model, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)

    def embedding(text: str) -> Any:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)

    pairs = [("the cat sat", "a dog ran"), ("on the mat", "on the mat"), ("", "the")]
    values, name = sbert_cosines([a for a, _ in pairs], [b for _, b in pairs], str(tmp_path / "sbert"))
    expected = [float(torch.cosine_similarity(embedding(a), embedding(b), dim=0)) for a, b in pairs]
    assert name == "sbert"
    assert values == pytest.approx(expected, abs=1e-5)
    assert values[1] == pytest.approx(1, abs=1e-6) and abs(values[0]) < 0.999
    assert "sentence_transformers" in sys.modules
