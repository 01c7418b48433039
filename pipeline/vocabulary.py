"""The vocabulary stage's corpus: read, counted before any weight is, and the tokenizer that all later stages use."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import PlanError, TextError
from edgepress.checkpoints.vocabulary import Trimmed, count_ids, load_tokenizer, trim
from edgepress.stages.options import Lora, Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.tokens import TokenBatches
    from edgepress.eval.text import Text
    from edgepress.pipeline.recipe import Recipe


@dataclass(frozen=True)
class CorpusVocabulary:
    corpus: TokenBatches  # one row, by the source's tokenizer
    trimmed: Trimmed

    @cached_property
    def kept(self) -> Tensor:
        """The source's ids of the tokens that stay (n,)."""
        import torch

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
    from edgepress.eval.text import NAMED, load_text

    shared = corpus in NAMED or corpus == recipe.evaluation_text
    if shared and recipe.text == corpus != recipe.calibration_text and corpus not in NAMED:
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
    from edgepress.checkpoints.config import read_config
    from edgepress.checkpoints.tokens import TokenBatches
    from edgepress.eval.text import Text

    tokenizer = load_tokenizer(folder)
    ids = Text(name, documents).token_ids(tokenizer)
    rows = int(read_config(folder).get("vocab_size") or 0)
    trimmed = trim(folder, tokenizer, count_ids([ids.tolist()]), rows, limit)
    return CorpusVocabulary(TokenBatches(name, ids.unsqueeze(0), documents), trimmed)


def _require_order(recipe: Recipe) -> None:
    """Raise PlanError where a stage cannot work with what the vocabulary stage leaves it."""
    names = [name for name, _ in recipe.stages]
    at = names.index("vocabulary")
    distilling = any(isinstance(o, Lora) and o.distill for _, o in recipe.stages[at:])
    if distilling and at:
        raise PlanError(
            f"--distill asks the uncompressed model, which knows the trimmed vocabulary only if the vocabulary stage "
            f"is the first; here {names[0]} comes before it"
        )
