"""The three-tier match against a table written by hand, and the traps in normalisation."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgepress.eval.metrics import inside_a_word, match, normalise

pytestmark = pytest.mark.unit

# answer, expected answers, tier
TABLE = [
    # exact, after normalisation
    ("Onion", ["Onion"], "exact"),
    (" onion.", ["Onion"], "exact"),
    ("ONION!!!", ["onion"], "exact"),
    ("New  York\n", ["New York"], "exact"),
    ("new\tyork", ["New York"], "exact"),
    ("Spider-Man", ["Spiderman"], "exact"),
    ("“Hamlet”", ["Hamlet"], "exact"),
    ("O’Brien", ["O'Brien"], "exact"),
    ("¿Qué?", ["qué"], "exact"),
    ("U.S.A.", ["USA"], "exact"),
    ("1,200", ["1200"], "exact"),
    ("$100", ["100"], "exact"),
    ("１９４２", ["1942"], "exact"),  # full-width digits
    ("ﬁnland", ["Finland"], "exact"),  # a ligature
    ("Horſe", ["horse"], "exact"),  # long s
    ("STRASSE", ["Straße"], "exact"),
    ("Café", ["Cafe\u0301"], "exact"),  # composed and combining accent
    ("東京。", ["東京"], "exact"),
    ("second", ["first", "second"], "exact"),
    ("C++", ["c"], "exact"),  # ASCII symbols are punctuation
    ("🐎", ["🐎"], "exact"),  # other symbols are not
    # substring
    ("The answer is Paris.", ["Paris"], "substring"),
    ("It was in 1942, I think", ["1942"], "substring"),
    ("The Beatles", ["Beatles"], "substring"),  # articles stay, so this is not exact
    ("a horse", ["horse"], "substring"),
    ("Sir Wilhelm Conrad Röntgen of Germany", ["Wilhelm Conrad Röntgen"], "substring"),
    ("antelope", ["ant"], "substring"),  # letter by letter, as in the thesis
    ("the year 19421", ["1942"], "substring"),
    ("New York City", ["York"], "substring"),
    ("Question: Paris\nQuestion: who?", ["paris"], "substring"),
    ("東京都です", ["東京"], "substring"),
    ("mid-July 1969", ["July 1969"], "substring"),  # midjuly 1969
    # words: 80 % of at least two
    ("Conrad Wilhelm Röntgen", ["Wilhelm Conrad Röntgen"], "words"),
    ("the states united of america", ["United States of America"], "words"),
    ("one two three four and more", ["one two three four five"], "words"),  # 4 of 5
    ("Beatles, the", ["The Beatles"], "words"),
    ("July 20, in 1969", ["20 July 1969"], "words"),
    ("king of spain, kind of", ["of Spain king"], "words"),
    ("war and war and peace", ["peace war peace war and"], "words"),  # distinct words are counted
    ("new old york", ["York New"], "words"),
    # miss
    ("", ["Paris"], "miss"),
    ("   ", ["Paris"], "miss"),
    ("...", ["Paris"], "miss"),
    ("London", ["Paris"], "miss"),
    ("one two three", ["one two three four"], "miss"),  # 3 of 4 is 75 %
    ("Par", ["Paris"], "miss"),
    ("Wilhelm Roentgen", ["Wilhelm Röntgen"], "miss"),  # accents stay
    ("Rontgen", ["Röntgen"], "miss"),
    ("194 2", ["1942"], "miss"),
    ("York", ["New York"], "miss"),  # 1 of 2
    ("Paris", ["?!"], "miss"),  # an expected answer of punctuation alone matches nothing
    ("", ["?!"], "miss"),
    ("Pariss is not a word of it", ["is Paris"], "miss"),
    ("anything", [], "miss"),
    ("twenty", ["20"], "miss"),
]


@pytest.mark.parametrize(("answer", "expected", "tier"), TABLE)
def test_the_tier_of_an_answer(answer: str, expected: list[str], tier: str) -> None:
    assert match(answer, expected) == tier


def test_the_table_has_at_least_forty_cases_and_every_tier() -> None:
    assert len(TABLE) >= 40
    assert {tier for *_, tier in TABLE} == {"exact", "substring", "words", "miss"}


def test_normalising_twice_changes_nothing() -> None:
    for answer, expected, _ in TABLE:
        for text in (answer, *expected):
            assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("answer", "expected", "inside"),
    [
        ("antelope", ["ant"], True),
        ("an ant", ["ant"], False),
        ("antelope and ant", ["ant"], False),
        ("antelope", ["ant", "antelope"], False),
        ("lion", ["ant"], False),
    ],
)
def test_hits_inside_a_longer_word_are_told_apart(answer: str, expected: list[str], inside: bool) -> None:
    assert inside_a_word(answer, expected) is inside


def test_matching_needs_no_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, edgepress.eval.metrics; assert 'torch' not in sys.modules"], check=True
    )
