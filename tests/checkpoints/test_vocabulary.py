"""Trimmed tokenizers of the three kinds against the originals they come from."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.vocabulary import Trimmed, count_ids, load_tokenizer, renumber_config, trim

pytestmark = pytest.mark.unit

PROSE = [pydoc_data.topics.topics[name] for name in ("for", "try", "with", "while", "if", "lambda")]
CORPUS = ["the while statement is used for repeated execution", "try this with the lambda, or that else: naïve"]
STRANGE = "Zürich 北京 \x01 😀 hello\tworld   q__x\n"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def byte_level() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        PROSE, trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    core.add_special_tokens([AddedToken("<|turn|>", special=True), AddedToken("<|never|>", special=True)])
    core.add_tokens([AddedToken("lambda,", normalized=False), AddedToken("zebra-crossing", normalized=False)])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>{% endif %}"
    )
    return tokenizer


def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece's BPE: spaces marked, unknown characters as bytes."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"]))
    trained = json.loads(core.to_str())["model"]
    names = [*("<unk>", "<s>", "</s>"), *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [piece for piece in trained["vocab"] if piece not in names]
    merges = [tuple(pair) for pair in trained["merges"]]
    vocabulary = {piece: id for id, piece in enumerate(names)}
    core.model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Replace(" ", "▁")
    core.train_from_iterator(
        PROSE, trainers.UnigramTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    )
    trained = json.loads(core.to_str())["model"]["vocab"]
    bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces = [*trained[:3], *bytes_, *trained[3:]]
    core.model = models.Unigram([tuple(entry) for entry in pieces], unk_id=0, byte_fallback=True)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {"byte-level": byte_level, "byte fallback": byte_fallback, "unigram": unigram}


class Case:
    """A tokenizer, what is left of it, and both as transformers reads them from disk."""

    def __init__(self, folder: Path, kind: str, limit: int = 0, corpus: list[str] = CORPUS) -> None:
        source = folder / "source"
        KINDS[kind]().save_pretrained(source)
        (source / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [2, 7]}))
        self.source, self.before = source, load_tokenizer(source)
        self.rows = len(self.before)
        used = count_ids(self.before(text)["input_ids"] for text in corpus)
        self.used = used
        self.trimmed: Trimmed = trim(source, self.before, used, self.rows, limit)
        self.trimmed.write(folder / "trimmed")
        self.after = load_tokenizer(folder / "trimmed")


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), request.param)


def test_the_corpus_falls_into_the_same_pieces(case: Case) -> None:
    assert len(case.trimmed.kept) < case.rows
    assert case.trimmed.whole
    for text in CORPUS:
        old, new = case.before(text)["input_ids"], case.after(text)["input_ids"]
        assert [case.trimmed.kept[id] for id in new] == old
        assert case.before.convert_ids_to_tokens(old) == case.after.convert_ids_to_tokens(new)
        assert case.after.decode(new) == case.before.decode(old)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_written_and_read_back_as_before(case: Case, text: str) -> None:
    for sample in (text, STRANGE + text):
        said = [t.decode(t(sample)["input_ids"], skip_special_tokens=True) for t in (case.before, case.after)]
        assert said[0] == said[1]
        assert max(case.after(sample)["input_ids"], default=0) < len(case.trimmed.kept)


def test_unseen_text_is_lossless(case: Case) -> None:
    assert case.after.decode(case.after(STRANGE)["input_ids"], skip_special_tokens=True) == STRANGE


def test_new_ids_are_the_order_of_the_old_and_every_special_token_stays(case: Case) -> None:
    kept = case.trimmed.kept
    assert list(kept) == sorted(set(kept))
    assert len(case.after) == len(kept)
    for token in case.before.all_special_tokens:
        assert kept[case.after.convert_tokens_to_ids(token)] == case.before.convert_tokens_to_ids(token)
    assert {2, 7} <= set(kept)  # named by config.json


def test_added_tokens_and_the_chat_template_live_on(tmp_path: Path) -> None:
    case = Case(tmp_path, "byte-level")
    names = set(case.after.get_vocab())
    assert {"<|turn|>", "<|never|>", "lambda,"} <= names
    assert "zebra-crossing" not in names  # no special token, and not in the corpus
    # The template's own text, "user: ", keeps its pieces though the corpus has none of them.
    talk = [{"role": "user", "content": CORPUS[0]}]
    old, new = (
        t.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for t in (case.before, case.after)
    )
    assert old == new
    assert [case.trimmed.kept[id] for id in case.after(new)["input_ids"]] == case.before(old)["input_ids"]


def test_a_limit_keeps_the_most_used_and_counts_again_to_itself(tmp_path: Path) -> None:
    everything = Case(tmp_path / "a", "byte-level")
    limit = len(everything.trimmed.kept) - 12
    case = Case(tmp_path / "b", "byte-level", limit)
    assert not case.trimmed.whole
    assert set(case.trimmed.kept) < set(everything.trimmed.kept)
    assert limit - 3 <= len(case.trimmed.kept) <= limit
    again = trim(case.source, case.before, case.used, case.rows, len(case.trimmed.kept))
    assert again.kept == case.trimmed.kept
    with pytest.raises(PlanError, match="--vocabulary-size 9: special tokens, single bytes"):
        trim(case.source, case.before, case.used, case.rows, 9)


def test_tokens_beyond_the_embedding_go(tmp_path: Path) -> None:
    case = Case(tmp_path, "byte-level")
    rows = case.before.convert_tokens_to_ids("<|never|>")  # the embedding ends before it
    trimmed = trim(case.source, case.before, {i: n for i, n in case.used.items() if i < rows}, rows)
    assert max(trimmed.kept) < rows
    assert "<|never|>" not in {entry["content"] for entry in trimmed.definition["added_tokens"]}


def test_a_unigram_s_unknown_characters_weigh_the_same(tmp_path: Path) -> None:
    case = Case(tmp_path, "unigram")
    scores = [dict(d["model"]["vocab"]) for d in
              (json.loads(case.before.backend_tokenizer.to_str()), case.trimmed.definition)]  # fmt: skip
    assert min(scores[0].values()) == min(scores[1].values())
    assert scores[1].items() <= scores[0].items()


def test_merges_keep_their_order_and_lead_somewhere(tmp_path: Path) -> None:
    case = Case(tmp_path, "byte-level")
    before = [tuple(m) for m in json.loads(case.before.backend_tokenizer.to_str())["model"]["merges"]]
    after = [tuple(m) for m in case.trimmed.definition["model"]["merges"]]
    assert after == [m for m in before if m in set(after)]
    vocabulary = set(case.trimmed.definition["model"]["vocab"])
    assert all({a, b, a + b} <= vocabulary for a, b in after)
    assert set(before) - set(after)


def test_configurations_are_renumbered() -> None:
    new = {3: 0, 5: 1, 9: 2}
    config: dict[str, Any] = {
        "bos_token_id": 5,
        "eos_token_id": [9, 3],
        "pad_token_id": None,
        "unk_token_id": -1,
        "suppress_tokens": [3, 4],
        "bad_words_ids": [[3, 9], [3, 4]],
        "hidden_size": 5,
    }
    assert renumber_config(config, new) == config | {
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "suppress_tokens": [0],
        "bad_words_ids": [[0, 2]],
    }


def test_what_cannot_be_trimmed_is_said(tmp_path: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>")))
    with pytest.raises(PlanError, match="of the type WordLevel cannot be trimmed; BPE and Unigram can"):
        trim(tmp_path, words, {0: 1}, 2)
    suffix = Tokenizer(models.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(PlanError, match="inside or end of words"):
        trim(tmp_path, PreTrainedTokenizerFast(tokenizer_object=suffix), {0: 1}, 2)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)
