"""Measure perplexity and bits per byte of a checkpoint of any stage.

Two protocols, whose numbers cannot be compared: `windows` scores the concatenated text in windows of a fixed
length, as the field does; `rows` scores each line alone, cut to the same length, as the thesis does
(section 3.6.1).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.disturb import Disturbance
from edgepress.checkpoints.errors import NumericsError, TextError
from edgepress.checkpoints.kv_format import PLAIN, KVFormat
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import beyond_positions, require_known
from edgepress.checkpoints.walk import BlockVisit, Walk
from edgepress.eval.protocol import Protocol as Protocol  # also by its name here
from edgepress.eval.results import Result, Score, exp_of, mean
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings
from edgepress.eval.text import FIRST_PART, NAMED, Text, load_text, starts_with_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_IGNORED = -100  # cross_entropy's mark for positions that do not count


@dataclass(frozen=True)
class Perplexity:
    perplexity: float
    tokens: int  # read
    scored_tokens: int  # predicted: the first of each window has no context
    bits_per_byte: float
    protocol: str
    text: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Passage:
    """One window or row, and what it cost to predict it."""

    id: str  # its place, and a hash of its tokens: the same for two models only where they read the same tokens
    nll: float  # nats, summed over the predicted tokens
    read: int
    scored: int
    size: int  # bytes of what was predicted; the first token of each passage is context only
    bos: bool = False  # it begins with the tokenizer's start token


def measure(
    checkpoint: Checkpoint,
    text: Text,
    protocol: Protocol,
    runtime: Runtime,
    disturbance: Disturbance | None = None,
    kv: KVFormat = PLAIN,
) -> Perplexity:
    """exp of the mean negative log-likelihood of each token given those before it in its window or row.

    Logits in the runtime's precision, losses in float32. disturbance: noise or masks on every block, as
    eval/robustness.py asks for. kv: each token sees those before it as they come out of such a cache. Raises
    TextError where the text is too short.
    """
    passages = measure_passages(checkpoint, text, protocol, runtime, disturbance, kv)
    return summarise(passages, text, protocol, runtime, kv)


def summarise(
    passages: Sequence[Passage], text: Text, protocol: Protocol, runtime: Runtime, kv: KVFormat = PLAIN
) -> Perplexity:
    nll, scored = math.fsum(p.nll for p in passages), sum(p.scored for p in passages)
    return Perplexity(
        perplexity=exp_of(nll / scored),
        tokens=sum(p.read for p in passages),
        scored_tokens=scored,
        bits_per_byte=nll / math.log(2) / sum(p.size for p in passages),
        protocol=described(protocol, passages) + ("" if kv.plain else f", {kv}"),
        text=text.name,
        dtype=str(runtime.dtype).removeprefix("torch."),
    )


def described(protocol: Protocol, passages: Sequence[Passage]) -> str:
    """The protocol, and whether a start token stood before each window."""
    return in_words(protocol, passages[0].bos)


def in_words(protocol: Protocol, bos: bool) -> str:
    unit = protocol.kind.removesuffix("s")
    return f"{protocol}, " + (f"BOS at the start of each {unit}" if bos else "no BOS")


def measure_passages(
    checkpoint: Checkpoint,
    text: Text,
    protocol: Protocol,
    runtime: Runtime,
    disturbance: Disturbance | None = None,
    kv: KVFormat = PLAIN,
) -> list[Passage]:
    """Each window or row by itself, in the text's order."""
    tokenizer = checkpoint.tokenizer()
    if protocol.kind == "windows" and (beyond := beyond_positions(checkpoint.shape, protocol.window, "--window")):
        runtime.progress.note(f"{checkpoint.name}: {beyond}")
    bos = starts_with_bos(tokenizer)
    batches = _windows(text, tokenizer, protocol) if protocol.kind == "windows" else _rows(text, tokenizer, protocol)
    for batch in batches:
        require_known(batch.ids, checkpoint.shape.vocabulary, checkpoint.name)
    losses = negative_log_likelihoods(checkpoint, batches, runtime, disturbance, kv)
    passages = {}
    for batch, batch_losses in zip(batches, losses, strict=True):
        for place, padded, (nll, scored) in zip(batch.places, batch.targets, batch_losses, strict=True):
            row = padded[padded != _IGNORED]
            size = len(str(tokenizer.decode(row)).encode()) - len(str(tokenizer.decode(row[:1])).encode())
            name = f"{place}-{hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12]}"
            if not math.isfinite(nll):
                dtype = str(runtime.dtype).removeprefix("torch.")
                raise NumericsError(
                    f"{checkpoint.folder}: the loss of {protocol.kind[:-1]} {place + 1} of '{text.name}' is {nll}: its "
                    f"logits are not finite in {dtype}. Measure with --dtype float32; if that fails too, the weights "
                    "are damaged"
                )
            passages[place] = Passage(name, nll, row.numel(), scored, size, bos)
    return [passages[place] for place in sorted(passages)]


def measurement_key(
    checkpoint_fingerprint: str, text: Text, protocol: Protocol, dtype: torch.dtype, bos: bool = False
) -> str:
    """Names one measurement: the same key, the same number. bos: the windows begin with a start token."""
    facts: list[Any] = [checkpoint_fingerprint, text.sha256, asdict(protocol), str(dtype)]
    if bos and protocol.kind == "windows":  # without it the key is that of earlier versions
        facts.append("bos")
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class _Batch:
    ids: Tensor  # (b, L), padded on the right, where a causal model cannot see it
    targets: Tensor  # (b, L), the same with padding marked
    places: Sequence[int]  # of each sequence in the text


def negative_log_likelihoods(
    checkpoint: Checkpoint,
    batches: list[_Batch],
    runtime: Runtime,
    disturbance: Disturbance | None = None,
    kv: KVFormat = PLAIN,
) -> list[list[tuple[float, int]]]:
    """Of each sequence of each batch: nats summed over its predicted tokens, and how many they are."""
    walk = Walk(checkpoint, [b.ids for b in batches], runtime, last_outputs=True, task="perplexity")
    for block in walk:
        with _changed(block, walk, disturbance, kv):
            block.done()
    losses = []
    with walk.skeleton.head() as head, torch.no_grad():
        for states, batch in zip(walk.states.chunks, batches, strict=True):
            of_batch = []
            # One sequence at a time: the logits of 512 tokens over 49,152 words are 100 MB in float32.
            for row, targets in zip(states, batch.targets, strict=True):
                wanted = targets[1:].to(runtime.device)
                logits = head(row.unsqueeze(0))[0, :-1].float()
                nll = float(F.cross_entropy(logits, wanted, ignore_index=_IGNORED, reduction="sum"))
                of_batch.append((nll, int((wanted != _IGNORED).sum())))
            losses.append(of_batch)
    return losses


@contextmanager
def _changed(block: BlockVisit, walk: Walk, disturbance: Disturbance | None, kv: KVFormat) -> Iterator[None]:
    """The block under a disturbance, its keys and values kept as `kv` says."""
    with ExitStack() as stack:
        if disturbance:
            shape = walk.source.shape.blocks[block.index]
            stack.enter_context(disturbance.on_block(block.module, shape, block.index))
        if not kv.plain:
            from edgepress.eval.kv_cache import (
                on_block,  # with transformers' caches, which a plain measurement does not need
            )

            stack.enter_context(on_block(block.module, block.index, walk.skeleton.model.config, kv))
        yield


def token_windows(text: Text, tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> Tensor:
    """The windows (windows, tokens) that the protocol `windows` reads of a text, each with its start token."""
    return torch.cat([batch.ids for batch in _windows(text, tokenizer, protocol)])


def _windows(text: Text, tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> list[_Batch]:
    ids = text.token_ids(tokenizer, protocol.tokens or None)
    bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
    own = protocol.window - (bos is not None)  # tokens of the text in each window
    if bos is not None and int(ids[0]) == bos:
        ids = ids[1:]  # the first window's own
    count = ids.numel() // own
    if count == 0:
        raise TextError(f"the text '{text.name}' has {ids.numel()} tokens, less than one window of {protocol.window}")
    if protocol.tokens:
        count = min(count, protocol.tokens // protocol.window)
    windows = ids[: count * own].view(count, own)
    if bos is not None:
        windows = torch.cat([torch.full((count, 1), bos), windows], dim=1)
    together = max(1, 4096 // protocol.window)
    return [
        _Batch(chunk, chunk, range(k * together, k * together + len(chunk)))
        for k, chunk in enumerate(torch.split(windows, together))
    ]


def _rows(text: Text, tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> list[_Batch]:
    rows, read = [], 0
    for line in text.rows():
        row = tokenizer(line, truncation=True, max_length=protocol.window)["input_ids"]
        if protocol.tokens and read + len(row) > protocol.tokens:
            break
        if len(row) > 1:
            rows.append(torch.tensor(row))
            read += len(row)
    if not rows:
        raise TextError(f"the text '{text.name}' has no row of at least two tokens")
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    batches, current = [], [order[0]]
    for place in order[1:]:
        if (len(current) + 1) * len(rows[place]) > 4096:
            batches.append(_padded(rows, current))
            current = []
        current.append(place)
    batches.append(_padded(rows, current))
    return batches


def _padded(rows: list[Tensor], places: list[int]) -> _Batch:
    pad, chosen = torch.nn.utils.rnn.pad_sequence, [rows[place] for place in places]
    return _Batch(
        pad(chosen, batch_first=True, padding_value=0), pad(chosen, batch_first=True, padding_value=_IGNORED), places
    )


# --- perplexity as tasks ----------------------------------------------------------------------------------------------
# Perplexity as tasks: of any text by one protocol, of WikiText-2 by both; with bits per byte beside each.


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
def spec_of(name: str, settings: Settings) -> str:
    """The text that a task measures, as a user names it."""
    files = settings.files_of(name)
    return str(files[0]) if files else "wikitext2" if name == "wikitext2" else settings.text


def text_of(name: str, settings: Settings) -> Text:
    spec = spec_of(name, settings)
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
