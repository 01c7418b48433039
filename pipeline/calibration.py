"""Draw every stage's token windows, and read the vocabulary stage's corpus."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from edgepress.checkpoints.config import read_config
from edgepress.checkpoints.errors import PlanError, TextError
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.manifest import SEAL, write_bytes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import (
    IGNORED,
    TokenBatches,
    beyond_positions,
    by_length,
    require_known,
    sample_rows,
    sample_windows,
)
from edgepress.checkpoints.vocabulary import Trimmed, count_ids, load_tokenizer, trim
from edgepress.eval.text import NAMED, Measured, Text, held_out_of, load_text, starts_with_bos, without_measured
from edgepress.pipeline.recipe import SELF, Recipe, shares_of, texts_of
from edgepress.stages.options import Depth, Eora, Gptq, Options, Pad, Training, Vocabulary, Wanda, flag_of

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.checkpoint import Checkpoint


# Of text that the model writes itself: rows at once, as many as training reads of a mixture of two, since a step of 80
# rows takes half as long again as one of 40; and tokens of a row at least.
_ROWS, _SHORTEST = 80, 128
Windowed = Depth | Wanda | Training | Gptq | Eora  # options of the stages that calibrate or train on windows


class Calibration:
    """The texts of a recipe, tokenised once each."""

    def __init__(self, recipe: Recipe, source: Checkpoint, store: Path, runtime: Runtime) -> None:
        self._recipe, self._source, self._store, self._runtime = recipe, source, store, runtime
        self._tokenizer = source.tokenizer()
        self.bos = starts_with_bos(self._tokenizer)
        self._vocabulary = corpus_vocabulary(recipe, source.folder)
        self._texts: dict[str, Text] = {}
        self._ids: dict[tuple[str, bool], tuple[str, Tensor]] = {}
        self._lengths: set[tuple[str, int]] = set()  # of windows, held against the model's positions already
        self._short: set[str] = set()  # training texts whose lack of windows was told already
        self.evaluation = _evaluation_text(recipe)
        self._measured = Measured.of(self.evaluation)
        self._left_out: dict[str, int] = {}
        for spec in training_specs(recipe):
            if spec != SELF:
                self._text(spec)

    def windows(self, stage: str, options: Options, turn: int = 0) -> TokenBatches:
        """The stage's windows (samples, length), others each turn. Raises TextError where the text is too short."""
        vocabulary = self._vocabulary
        if isinstance(options, Vocabulary):
            assert vocabulary is not None
            return vocabulary.corpus
        if isinstance(options, Pad):
            return TokenBatches("none", torch.empty(0, 0, dtype=torch.int64))
        if (stage, options.length) not in self._lengths:
            self._lengths.add((stage, options.length))
            if beyond := beyond_positions(self._source.shape, options.length, flag_of(options, "length")):
                self._runtime.progress.note(beyond)
        spec = self._spec(options)
        runtime = replace(self._runtime, turn=turn)
        generator = runtime.generator(f"{stage} calibration")
        shares = shares_of(spec, options.samples).items()
        drawn = [self._drawn(stage, text, samples, options, runtime, generator) for text, samples in shares]
        batches = drawn[0] if len(drawn) == 1 else mixed(drawn)
        if isinstance(options, Training):
            from edgepress.stages.training import require_a_batch

            require_a_batch(batches.name, len(batches.ids), options)
            if spec != SELF:  # training wants its windows shuffled, not in the text's order
                batches = _shuffled(batches, options, generator)
        return batches

    def _spec(self, options: Windowed) -> str:
        """The text that a stage with these options reads."""
        return (options.data if isinstance(options, Training) else "") or self._recipe.calibration_text

    def _drawn(
        self, stage: str, spec: str, samples: int, options: Windowed, runtime: Runtime, generator: torch.Generator
    ) -> TokenBatches:
        """So many windows of one text, in its order; for training perhaps fewer, which is told."""
        vocabulary = self._vocabulary
        trimmed = vocabulary is not None and follows_vocabulary(self._recipe, stage)
        if spec == SELF:
            if isinstance(options, Training) and options.loss == "answers":
                raise TextError("--lora-loss answers: text that the model writes itself has no answers; use all")
            kept = vocabulary.kept if vocabulary and trimmed else None
            return self._sampled(samples, options.length, kept, runtime)
        tokenizer = vocabulary.tokenizer if vocabulary and trimmed else self._tokenizer
        known = vocabulary.kept.numel() if vocabulary and trimmed else self._source.shape.vocabulary
        if isinstance(options, Training) and (options.loss == "answers" or options.packing != "windows"):
            batches = self._training_rows(self._text(spec), tokenizer, samples, options, generator)
            require_known(batches.ids, known, f"for the text '{batches.name}'")
            return replace(batches, left_out=self._left_out[spec])
        if (spec, trimmed) not in self._ids:
            text = self._text(spec)
            ids = text.token_ids(tokenizer)
            require_known(ids, known, f"for the text '{text.name}'")
            self._ids[spec, trimmed] = (text.name, ids)
        name, ids = self._ids[spec, trimmed]
        if isinstance(options, Training):
            samples = self._training_samples(name, ids.numel() // options.length, samples, options)
        try:
            batches = sample_windows(name, ids, samples, options.length, generator)
            return replace(batches, left_out=self._left_out[spec])
        except TextError as error:
            raise TextError(f"{stage}: {error}") from None

    def _text(self, spec: str) -> Text:
        """The part of a text that may calibrate, read once, without what is measured on.

        Raises PlanError where hardly anything is left.
        """
        if spec not in self._texts:
            text, left_out, of = without_measured(load_text(spec, "calibrate"), self._measured)
            if 2 * left_out > of:
                raise PlanError(
                    f"'{spec}' would both calibrate and be measured on: {left_out} of its {of} documents or passages "
                    f"are also in the text to measure on, '{self.evaluation.name}'; leave --text out to hold a part "
                    "back, or name another text"
                )
            if left_out:
                self._runtime.progress.note(
                    f"'{text.name}' shares {left_out} of its {of} documents or passages with the text to measure on, "
                    f"'{self.evaluation.name}'; they are left out of calibration and training"
                )
            self._texts[spec], self._left_out[spec] = text, left_out
        return self._texts[spec]

    def _training_rows(
        self, text: Text, tokenizer: Any, samples: int, options: Training, generator: torch.Generator
    ) -> TokenBatches:
        """Windows or rows with what is to be learnt of them. Raises TextError."""
        answers = options.loss == "answers"
        if answers and not any(text.answers):
            raise TextError(
                f"--lora-loss answers: the text '{text.name}' has no questions or instructions with answers; give such "
                "rows with --lora-data, or use --lora-loss all"
            )
        rows = list(text.learnt(tokenizer)) if answers else [(ids, 0) for ids in text.row_ids(tokenizer)]
        if options.packing == "windows":
            ids = torch.tensor([token for found, _ in rows for token in found])
            learnt = torch.tensor([place >= start for found, start in rows for place in range(len(found))])
            labels = torch.where(learnt, ids, IGNORED)
            batches = sample_windows(text.name, ids, samples, options.length, generator, labels)
        else:
            batches = sample_rows(text.name, rows, samples, options.length, generator)
        self._training_samples(text.name, len(batches.ids), samples, options)
        return batches

    def _training_samples(self, name: str, there: int, wanted: int, options: Training) -> int:
        """Windows to train on: those asked for, or all that the text has, which is told."""
        if there < wanted and name not in self._short:
            self._short.add(name)
            self._runtime.progress.note(
                f"{options.stage}: the training text '{name}' has {there} windows of {options.length} tokens, not the "
                f"{wanted} asked for; all of them are used"
            )
        return min(there, wanted)

    def _sampled(self, samples: int, length: int, kept: Tensor | None, runtime: Runtime) -> TokenBatches:
        """Text that the uncompressed model writes itself, kept in the store so that a rerun need not.

        It is written in batches of _ROWS rows, of as many tokens as the stage of the recipe with the longest windows of
        it reads, rounded up to a power of two, or as many as the model has positions for: stages that ask for more or
        fewer windows, or for shorter ones, read the beginning of the same text.
        kept: the tokens (n,) it may choose from; ids are then their places, those of the trimmed vocabulary.
        """
        stages = (o for _, o in self._recipe.stages if isinstance(o, Windowed) and SELF in texts_of(self._spec(o)))
        size = max(_SHORTEST, 1 << (max([length, *(o.length for o in stages)]) - 1).bit_length())
        size = max(length, min(size, self._source.shape.positions))  # a table of positions has no row beyond
        again = f"-{runtime.turn}" if runtime.turn else ""
        words = f"-{hashlib.sha256(kept.numpy().tobytes()).hexdigest()[:12]}" if kept is not None else ""
        written, name = self._store / "calibration", f"self-{self._source.fingerprint[:12]}-{runtime.seed}{again}"
        batches = range(-(-samples // _ROWS))
        paths = [written / f"{name}-{_ROWS}x{size}-{batch}{words}.safetensors" for batch in batches]
        found = [_sampled_before(path, runtime.progress.note) if path.is_file() else None for path in paths]
        missing = [batch for batch, ids in enumerate(found) if ids is None]
        if missing:
            from safetensors.torch import save

            written.mkdir(parents=True, exist_ok=True)
            for batch, ids in zip(missing, sample_text(self._source, missing, size, runtime, kept), strict=True):
                write_bytes(paths[batch], save({"ids": ids}, metadata={SEAL: _digest(paths[batch].stem, ids)}))
                found[batch] = ids
        ids = torch.cat([ids for ids in found if ids is not None]) if found else torch.empty(0, size, dtype=torch.int64)
        return TokenBatches("self", ids[:samples, :length].contiguous())


def mixed(drawn: Sequence[TokenBatches]) -> TokenBatches:
    """Windows of several texts, one text after the other; all are learnt of a text that states nothing else."""
    labels = None
    if any(batches.labels is not None for batches in drawn):
        labels = torch.cat([batches.ids if batches.labels is None else batches.labels for batches in drawn])
    compared = [batches.left_out for batches in drawn if batches.left_out is not None]
    left_out = sum(compared) if compared else None
    ids = torch.cat([batches.ids for batches in drawn])
    return TokenBatches(" + ".join(batches.name for batches in drawn), ids, left_out=left_out, labels=labels)


def _shuffled(batches: TokenBatches, options: Training, generator: torch.Generator) -> TokenBatches:
    """In an order drawn at random, within which --lora-packing grouped puts rows of like length into one batch."""
    order = torch.randperm(len(batches.ids), generator=generator)
    if options.packing == "grouped":
        lengths = [batches.lengths()[row] for row in order.tolist()]
        cut = len(order) - options.held_out
        order = torch.cat([order[:cut][by_length(lengths[:cut], options.batch, generator)], order[cut:]])
    labels = None if batches.labels is None else batches.labels[order].contiguous()
    return replace(batches, ids=batches.ids[order].contiguous(), labels=labels)


def _sampled_before(path: Path, note: Callable[[str], None]) -> Tensor | None:
    """The ids of a file that `_sampled` wrote; None where they are not as they were written, which is told."""
    try:
        with safe_open(path, framework="pt") as file:
            ids: Tensor = file.get_tensor("ids")
            stated = (file.metadata() or {}).get(SEAL)
    except (OSError, SafetensorError):
        ids, stated = torch.empty(0), None
    if stated == _digest(path.stem, ids):
        return ids
    note(f"{path} is damaged or was edited; the text is sampled again")
    return None


def _digest(name: str, ids: Tensor) -> str:
    """Sha256 over the ids and the name that says whose they are: one file put in another's place is found."""
    return hashlib.sha256(f"{name} {list(ids.shape)}".encode() + ids.contiguous().numpy().tobytes()).hexdigest()


def training_specs(recipe: Recipe) -> list[str]:
    """The texts that calibrate and train, each once; those of a mixture by themselves."""
    data = [o.data for _, o in recipe.stages if isinstance(o, Training) and o.data]
    return list(dict.fromkeys(text for spec in [recipe.calibration_text, *data] for text in texts_of(spec)))


def _evaluation_text(recipe: Recipe) -> Text:
    spec = recipe.evaluation_text
    if spec == SELF:
        raise PlanError("--data self leaves no text to measure on; name one with --text, e.g. --text wikitext2")
    # A text of its own is measured from its beginning; the calibration text only in the part held back.
    own = bool(recipe.text) and Path(spec).is_file() and not held_out_of(spec, training_specs(recipe))
    return load_text(spec, "whole" if own else "evaluate")


def sample_text(
    source: Checkpoint, batches: Sequence[int], length: int, runtime: Runtime, kept: Tensor | None = None
) -> Iterator[Tensor]:
    """Token ids (_ROWS, length) of each numbered batch, which the model writes at temperature 1.

    Rows begin with its start token or a random one; a batch does not depend on which others are written. kept (n,):
    choose among these tokens alone, and give their places in it. The logits of kept tokens do not depend on those that
    go, so this is what the trimmed model would write.
    """
    model: Any = source.model(runtime.device, runtime.dtype)
    start = model.config.bos_token_id
    choice = torch.arange(source.shape.vocabulary) if kept is None else kept
    runtime.progress.start("writing text", len(batches) * (length - 1))
    for batch in batches:
        generator = runtime.generator(f"self calibration {batch}")
        if start is not None:
            ids = torch.full((_ROWS, 1), int((choice == int(start)).nonzero()))
        else:
            ids = torch.randint(choice.numel(), (_ROWS, 1), generator=generator)
        (cache, plain), last = _cache(model.config, length), ids
        # A mask that hides nothing: under one, the queries that share a key are one product, four times as fast here.
        masked = plain and runtime.device.type == "cpu"
        for seen in range(1, length):
            mask = torch.zeros(1, 1, 1, seen, dtype=runtime.dtype) if masked else None
            with torch.no_grad():
                new = choice[last].to(runtime.device)
                output = model(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1] if kept is None else output.logits[:, -1][:, choice]
            last = _drawn_from(logits.float().cpu(), generator)
            ids = torch.cat([ids, last], dim=1)
            runtime.progress.step()
        yield ids


def _cache(config: Any, length: int) -> tuple[Any, bool]:
    """An empty cache of keys and values, and whether all of its layers see every token.

    Such layers get room for `length` tokens at once: transformers' own grow by a copy of all at every token, and those
    of its StaticCache are attended to as far as there is room.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):  # type: ignore[no-untyped-call]
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            seen = self.get_seq_length()
            if not seen:
                self.lazy_initialization(key_states, value_states)
                self.room = [x.new_empty(*x.shape[:2], length, x.shape[3]) for x in (key_states, value_states)]
            end = seen + key_states.shape[2]
            for room, new in zip(self.room, (key_states, value_states), strict=True):
                room[:, :, seen:end] = new
            self.keys, self.values = (room[:, :, :end] for room in self.room)
            return self.keys, self.values

    cache = DynamicCache(config=config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    if plain:
        cache.layers = [Roomy() for _ in cache.layers]  # type: ignore[no-untyped-call]
    return cache, plain


def _drawn_from(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A place (rows, 1) of each row of logits (rows, n), drawn with the odds of their softmax.

    By the inverse of the distribution function: one random number a row, where torch.multinomial draws n.
    """
    reached = logits.double().softmax(dim=-1).cumsum(dim=-1)
    wanted = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) * reached[:, -1:]
    return torch.searchsorted(reached, wanted, right=True).clamp_(max=logits.shape[1] - 1)


# --- the vocabulary stage's corpus ------------------------------------------------------------------------------------
# The vocabulary stage's corpus: read, counted before any weight is, and the tokenizer that all later stages use.


@dataclass(frozen=True)
class CorpusVocabulary:
    corpus: TokenBatches  # one row, by the source's tokenizer
    trimmed: Trimmed

    @cached_property
    def kept(self) -> Tensor:
        """The source's ids of the tokens that stay (n,)."""
        return torch.tensor(self.trimmed.kept)

    @cached_property
    def tokenizer(self) -> Any:
        """As transformers will read it from the stage's folder."""
        with tempfile.TemporaryDirectory(prefix="edgepress-tokenizer-") as folder:
            self.trimmed.write(Path(folder))
            return load_tokenizer(Path(folder))


def counted(recipe: Recipe, options: Vocabulary) -> Vocabulary:
    """The stage's options with the number of tokens that will stay. Raises PlanError or TextError.

    Without a corpus the size stands as asked: enough to plan with, not to run.
    """
    _require_order(recipe)
    if not options.corpus:
        return options
    from edgepress.pipeline.shapes import tokenizer_folder

    vocabulary = corpus_vocabulary(recipe, tokenizer_folder(recipe.model))
    assert vocabulary is not None
    return replace(options, size=len(vocabulary.trimmed.kept))


def corpus_vocabulary(recipe: Recipe, folder: Path) -> CorpusVocabulary | None:
    """What the recipe's corpus leaves of the tokenizer in `folder`; None if the recipe keeps the vocabulary."""
    options = next((o for _, o in recipe.stages if isinstance(o, Vocabulary)), None)
    if options is None:
        return None
    if fault := corpus_fault(recipe):
        raise PlanError(fault)
    text = corpus_text(recipe, options.corpus)
    return _cut(folder, text.name, text.documents, options.size)


def corpus_fault(recipe: Recipe) -> str:
    """Why the vocabulary stage cannot run, though it can be planned; empty if it can."""
    for _, options in recipe.stages:
        if isinstance(options, Vocabulary) and not options.corpus:
            return (
                f"--vocabulary-size {options.size} does not say which tokens stay; name a text with --trim-vocabulary"
            )
    return ""


def corpus_text(recipe: Recipe, corpus: str) -> Text:
    """The corpus, without the part of it that the recipe keeps to measure on. Raises TextError or PlanError."""
    shared = corpus in NAMED or corpus == recipe.evaluation_text
    apart = recipe.text == corpus and corpus not in texts_of(recipe.calibration_text)
    if shared and apart and corpus not in NAMED:
        raise PlanError(
            f"'{corpus}' would both choose the vocabulary and be measured on as a whole; name another text with "
            "--text, or leave --text out to hold a part back"
        )
    text = load_text(corpus, "calibrate" if shared else "whole")
    if text.chats:
        raise TextError(f"the corpus '{corpus}' holds conversations, which --trim-vocabulary does not read; give text")
    if not any(document.strip() for document in text.documents):
        raise TextError(f"the corpus '{corpus}' is empty; --trim-vocabulary needs the text the model is meant for")
    return text


def follows_vocabulary(recipe: Recipe, stage: str) -> bool:
    """Whether a stage of the recipe works on the trimmed vocabulary."""
    names = [name for name, _ in recipe.stages]
    return "vocabulary" in names and names.index(stage) > names.index("vocabulary")


# Planning and running ask for the same one, and a large corpus takes its time.
@lru_cache(maxsize=2)
def _cut(folder: Path, name: str, documents: tuple[str, ...], limit: int) -> CorpusVocabulary:
    tokenizer = load_tokenizer(folder)
    ids = Text(name, documents).token_ids(tokenizer)
    rows = int(read_config(folder).get("vocab_size") or 0)
    trimmed = trim(folder, tokenizer, count_ids([ids.tolist()]), rows, limit)
    return CorpusVocabulary(TokenBatches(name, ids.unsqueeze(0), documents), trimmed)


def _require_order(recipe: Recipe) -> None:
    """Raise PlanError where a stage cannot work with what the vocabulary stage leaves it."""
    names = [name for name, _ in recipe.stages]
    at = names.index("vocabulary")
    distilling = next((o for _, o in recipe.stages[at:] if isinstance(o, Training) and o.distill), None)
    if distilling and at:
        raise PlanError(
            f"{flag_of(distilling, 'distill')} asks the uncompressed model, which knows the trimmed vocabulary only if "
            f"the vocabulary stage is the first; here {names[0]} comes before it"
        )
