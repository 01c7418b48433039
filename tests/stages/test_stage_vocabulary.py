"""The vocabulary stage on tiny models: the same logits for the tokens that stay, from the files it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.vocabulary import count_ids, trim
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import edge, vocabulary
from edgepress.stages.options import Vocabulary

pytestmark = pytest.mark.unit

CORPUS = ("the while statement is used for repeated execution", "with the else clause, if present")
RUNTIME = Runtime(torch.device("cpu"), torch.float32)


def corpus_of(source: Checkpoint, documents: tuple[str, ...] = CORPUS) -> TokenBatches:
    ids = [id for text in documents for id in source.tokenizer()(text)["input_ids"]]
    return TokenBatches("corpus", torch.tensor([ids]), documents)


def trimmed_model(folder: Path, target: Path, limit: int = 0) -> tuple[Checkpoint, Checkpoint, dict[str, Any]]:
    source = Checkpoint.open(folder)
    corpus = corpus_of(source)
    left = trim(folder, source.tokenizer(), count_ids(corpus.ids.tolist()), source.shape.vocabulary, limit)
    options = Vocabulary("corpus", len(left.kept))
    facts = vocabulary.run(source, CheckpointWriter(target, source.shape.block_prefix), corpus, options, RUNTIME)
    result = Checkpoint(target, None)
    planned = vocabulary.plan(source.shape, options)
    assert planned.file_bytes == result.shape.file_bytes == result.facts()["file_bytes"]
    assert planned.parameters_total == result.shape.parameters_total
    return source, result, facts | {"kept": left.kept}


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": False, "hidden_size": 512, "num_hidden_layers": 1}),  # as wide as words
        ("gemma3_text", {}),
        ("phi3", {}),
    ],
    ids=["tied", "untied", "wide", "gemma3", "phi3"],
)
def test_logits_of_kept_tokens_are_the_original_s(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, more: dict[str, Any]
) -> None:
    folder = tiny_model(family, **more)
    source, result, facts = trimmed_model(folder, tmp_path / "out")
    kept = torch.tensor(facts["kept"])
    ids = torch.tensor([result.tokenizer()(CORPUS[0])["input_ids"]])
    assert torch.equal(kept[ids], torch.tensor([source.tokenizer()(CORPUS[0])["input_ids"]]))
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(folder)(kept[ids]).logits
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert after.shape[-1] == len(kept) < before.shape[-1]
    # Kernels may sum in another order for another number of columns; the rows themselves are equal.
    torch.testing.assert_close(after, before[..., kept], rtol=1e-6, atol=1e-5)
    for name, tensor in result.outer().items():
        original = source.outer()[name]
        assert torch.equal(tensor, original[kept] if tensor.shape != original.shape else original)
    assert ("lm_head.weight" in result.outer()) == (not source.config.get("tie_word_embeddings", True))
    assert facts["same_pieces"]


def test_configuration_tokenizer_and_blocks_are_those_of_the_smaller_model(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    source, result, facts = trimmed_model(folder, tmp_path / "out")
    kept = facts["kept"]
    assert result.config["vocab_size"] == len(kept) == facts["tokens_kept"]
    generation = json.loads((result.folder / "generation_config.json").read_text())
    for config in (result.config, generation):
        for name, token in (("bos_token_id", "<s>"), ("eos_token_id", "</s>"), ("pad_token_id", "<pad>")):
            assert config[name] == result.tokenizer().convert_tokens_to_ids(token)
    for index in range(len(source.shape.blocks)):
        before, after = source.block(index), result.block(index)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (result.folder / "vocab.json").exists()


def test_a_limit_makes_the_corpus_longer_and_says_so(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    *_, whole = trimmed_model(tiny_model("llama"), tmp_path / "whole")
    *_, facts = trimmed_model(tiny_model("llama"), tmp_path / "out", limit=len(whole["kept"]) - 10)
    assert whole["corpus_tokens_after"] == whole["corpus_tokens_before"]
    assert not facts["same_pieces"]
    assert facts["corpus_tokens_after"] > facts["corpus_tokens_before"]


def test_packed_embeddings_are_cut_by_rows(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    dense = Checkpoint.open(folder)
    packing = CheckpointWriter(tmp_path / "packed")
    for index in range(len(dense.shape.blocks)):
        packing.copy_block(index, dense, index)
    rounded, packed = edge.quantise_outer(dense.outer(), 4)
    packing.write_outer(rounded)
    packing.write_edge(packed)
    packing.finish(dense.config, dense)
    _, result, facts = trimmed_model(tmp_path / "packed", tmp_path / "out")
    assert result.shape.embedding_bits == 4
    # Packing the rows that are left gives the same codes: a row knows nothing of the others.
    again = edge.quantise_outer({n: t[list(facts["kept"])] for n, t in dense.outer().items() if t.dim() == 2}, 4)[1]
    stored = load_file(result.folder / "edge" / "embedding.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)


def test_a_tokenizer_that_splits_otherwise_is_never_passed_on(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_merges(*arguments: Any) -> Any:
        left = trim(*arguments)
        return replace(left, definition=left.definition | {"model": left.definition["model"] | {"merges": []}})

    monkeypatch.setattr(vocabulary, "trim", without_merges)
    with pytest.raises(CheckpointError, match="splits document 1 of the corpus otherwise"):
        trimmed_model(tiny_model("llama"), tmp_path / "out")


def test_sizes_that_cannot_be_are_refused(tiny_model: Callable[..., Path]) -> None:
    shape = Checkpoint.open(tiny_model("llama")).shape
    with pytest.raises(PlanError, match="513 tokens cannot be cut from one of 512"):
        vocabulary.plan(shape, Vocabulary("x", 513))
    with pytest.raises(PlanError, match="have not been counted"):
        vocabulary.plan(shape, Vocabulary("x"))
    with pytest.raises(PlanError, match="--vocabulary-size -1"):
        Vocabulary("x", -1)
    assert Vocabulary().skipped
    assert not Vocabulary("x").skipped
    assert not Vocabulary(size=3).skipped
