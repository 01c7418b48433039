"""Perplexity as tasks: of any text by one protocol, of WikiText-2 by both; with bits per byte beside each."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import cache

from edgepress.eval.perplexity import Passage, Protocol, described, measure_passages
from edgepress.eval.results import Result, Score, mean
from edgepress.eval.settings import Settings
from edgepress.eval.subject import Subject
from edgepress.eval.text import FIRST_PART, NAMED, Text, load_text


def check(name: str, settings: Settings) -> None:
    text_of(name, settings)
    protocol_of(settings, settings.protocol)


def any_text(name: str, subject: Subject, settings: Settings) -> Result:
    return _measured(name, subject, text_of(name, settings), [protocol_of(settings, settings.protocol)], settings)


def wikitext2(name: str, subject: Subject, settings: Settings) -> Result:
    """The test split from the hub, or the original file with --from wikitext2=FILE."""
    protocols = [protocol_of(settings, kind) for kind in ("windows", "rows")]
    return _measured(name, subject, text_of(name, settings), protocols, settings)


@cache  # the same text for every checkpoint
def text_of(name: str, settings: Settings) -> Text:
    files = settings.files_of(name)
    spec = str(files[0]) if files else "wikitext2" if name == "wikitext2" else settings.text
    return load_text(spec, "evaluate" if spec in NAMED else "whole")


def protocol_of(settings: Settings, kind: str) -> Protocol:
    """--limit counts windows: as many tokens of the text's beginning as they hold, in rows too."""
    tokens = settings.tokens
    if settings.limit:
        tokens = min(tokens or settings.limit * settings.window, settings.limit * settings.window)
    return Protocol(kind, settings.window, tokens)


def _measured(name: str, subject: Subject, text: Text, protocols: list[Protocol], settings: Settings) -> Result:
    began = time.perf_counter()
    scores: list[Score] = []
    for stage, seen in _trained_on(subject, text):
        subject.runtime.progress.note(
            f"{subject.label}: its {stage} stage saw '{seen}', which is measured on here; measure on another text"
        )
    for protocol in protocols:
        passages = measure_passages(subject.checkpoint, text, protocol, subject.runtime, kv=settings.kv)
        how = f"{described(protocol, passages)}; {text.name}; {subject.dtype}" + (
            "" if settings.kv.plain else f"; {settings.kv}"
        )
        scores += _scores(passages, how, protocol.kind)
    if len(protocols) > 1:  # two numbers of one name would hide that they cannot be compared
        scores = [replace(s, metric=f"{s.metric}, {s.protocol.split(' ')[0]}") for s in scores]
    return Result(name, tuple(scores), time.perf_counter() - began, {"text_sha256": text.sha256})


def _trained_on(subject: Subject, text: Text) -> list[tuple[str, str]]:
    """Stages that calibrated or trained on the text, as far as its name tells, and the part that they saw.

    A run's own measuring text shares nothing with them (`overlap` in their manifests); a text given to `eval` may.
    """
    found = []
    for checkpoint in subject.checkpoint.ancestors():
        manifest = checkpoint.manifest
        seen = str((manifest.calibration or {}).get("name", "")) if manifest else ""
        if manifest and text.name in (seen, seen.removesuffix(FIRST_PART)):
            found.append((manifest.stage, seen))
    return found[::-1]


def _scores(passages: list[Passage], protocol: str, of: str) -> list[Score]:
    ids, nll = [p.id for p in passages], [p.nll for p in passages]
    perplexity = mean(
        "perplexity",
        ids,
        nll,
        protocol,
        weights=[p.scored for p in passages],
        transform="exp",
        higher_is_better=False,
        of=of,
    )
    bits = mean(
        "bits per byte",
        ids,
        [x / math.log(2) for x in nll],
        protocol,
        weights=[p.size for p in passages],
        higher_is_better=False,
        of=of,
    )
    return [perplexity, bits]
