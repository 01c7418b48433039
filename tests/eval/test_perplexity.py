"""Perplexity against a plain loop over transformers' own forward, and what text gets measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError, TextError
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import require_known
from edgepress.eval.perplexity import Protocol, measure, measurement_key
from edgepress.eval.results import exp_of
from edgepress.eval.text import Text, load_text

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def nll(model: Any, ids: torch.Tensor) -> float:
    logits = model(input_ids=ids.unsqueeze(0)).logits[0, :-1].double()
    return float(F.cross_entropy(logits, ids[1:], reduction="sum"))


def test_windows_equal_a_plain_loop(folder: Path, plain: tuple[Any, Any]) -> None:
    model, tokenizer = plain
    text = load_text("embedded", "evaluate")
    result = measure(Checkpoint.open(folder), text, Protocol("windows", 48, 1000), Runtime())
    ids = torch.tensor([i for d in text.documents[:3] for i in tokenizer(d)["input_ids"]])[:1000]
    windows = ids[: 1000 // 48 * 48].view(-1, 48)
    expected = math.exp(sum(nll(model, w) for w in windows) / (len(windows) * 47))
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.tokens, result.scored_tokens) == (windows.numel(), len(windows) * 47)


def test_rows_equal_a_plain_loop_over_rows_of_unequal_length(folder: Path, plain: tuple[Any, Any]) -> None:
    model, tokenizer = plain
    text = Text("rows", ("first row\n\nthe second row, a good deal longer than the first\n \n", "x\nlast one"))
    result = measure(Checkpoint.open(folder), text, Protocol("rows", 10, 0), Runtime())
    rows = [torch.tensor(tokenizer(r)["input_ids"][:10]) for r in text.rows()]
    rows = [r for r in rows if len(r) > 1]
    scored = sum(len(r) - 1 for r in rows)
    assert result.perplexity == pytest.approx(math.exp(sum(nll(model, r) for r in rows) / scored), rel=1e-5)
    assert result.scored_tokens == scored


def test_bits_per_byte_is_the_loss_per_byte_of_text(folder: Path, plain: tuple[Any, Any]) -> None:
    text = Text("ascii", ("plain words that every tokenizer takes apart and puts together again " * 20,))
    result = measure(Checkpoint.open(folder), text, Protocol("windows", 32, 0), Runtime())
    ids = plain[1](text.documents[0])["input_ids"][: result.tokens]
    # each window's first token is read but not predicted
    predicted = [i for position, i in enumerate(ids) if position % 32]
    nats = math.log(result.perplexity) * result.scored_tokens
    assert len(predicted) == result.scored_tokens
    size = sum(len(plain[1].decode([i])) for i in predicted)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-9)


def test_keys_differ_by_protocol_text_checkpoint_and_precision() -> None:
    a, b = Text("t", ("one",)), Text("t", ("two",))
    keys = {
        measurement_key("f", a, Protocol(), torch.float32),
        measurement_key("g", a, Protocol(), torch.float32),
        measurement_key("f", b, Protocol(), torch.float32),
        measurement_key("f", a, Protocol("rows"), torch.float32),
        measurement_key("f", a, Protocol(), torch.bfloat16),
    }
    assert len(keys) == 5


def test_halves_of_the_embedded_text_share_no_paragraph() -> None:
    train, test = load_text("embedded", "calibrate"), load_text("embedded", "evaluate")

    def paragraphs(text: Text) -> set[str]:
        split = [p.split() for d in text.documents for p in d.split("\n\n")]
        return {" ".join(words) for words in split if len(" ".join(words)) >= 40}

    assert not paragraphs(train) & paragraphs(test)
    sizes = [sum(map(len, t.documents)) for t in (train, test)]
    assert max(sizes) < 1.05 * min(sizes)
    assert min(sizes) > 150_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\n".join(f"line {i}" for i in range(50))),
        ("a.jsonl", "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(50))),
        ("a.json", json.dumps([{"instruction": f"line {i}", "input": "", "output": "yes"} for i in range(50)])),
        ("b.txt", "<|endoftext|>".join(f"line {i}" for i in range(50))),
    ],
)
def test_a_file_s_last_fifth_is_held_back(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    train, test = (load_text(str(tmp_path / name), use) for use in ("calibrate", "evaluate"))  # type: ignore[arg-type]
    assert "line 5" in " ".join(train.documents) and "line 49" not in " ".join(train.documents)
    assert "line 49" in " ".join(test.documents) and "line 5\n" not in " ".join(test.documents)


def test_parquet_reads_like_jsonl(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert load_text(str(tmp_path / "a.parquet"), "whole").documents == ("one", "two")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n{oops\n', "line 2"),
        ("a.json", '[{"text": "x"}, {"body": "y"}]', "row 2"),
        ("a.json", '{"text": "x"}', "list of rows"),
        ("a.parquet", "not parquet", "a.parquet"),
    ],
)
def test_a_malformed_file_is_named_with_its_place(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=words):
        load_text(str(tmp_path / name), "whole")


def test_too_short_and_impossible_requests(folder: Path) -> None:
    with pytest.raises(TextError, match="are asked for"):
        measure(Checkpoint.open(folder), Text("short", ("a b c",)), Protocol("windows", 8, 100), Runtime())
    with pytest.raises(TextError, match="less than one window"):
        measure(Checkpoint.open(folder), Text("short", ("a",)), Protocol("windows", 80, 0), Runtime())
    for arguments in (("words", 8, 0), ("windows", 1, 0), ("windows", 64, 32)):
        with pytest.raises(PlanError):
            Protocol(*arguments)


class Starting:
    """A tokenizer of one token a character that begins every text with token 1."""

    bos_token_id = 1

    def __init__(self) -> None:
        self.deprecation_warnings: dict[str, bool] = {}

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(ord(letter) for letter in text)]}


def test_each_window_begins_with_the_start_token_where_the_tokenizer_begins_texts_with_it() -> None:
    from edgepress.eval.perplexity import _windows

    text = Text("t", ("abcdefg", "hij"))
    (batch,) = _windows(text, Starting(), Protocol(window=4, tokens=8))  # type: ignore[arg-type]
    assert batch.ids.tolist() == [[1, *map(ord, "abc")], [1, *map(ord, "def")]]
    (batch,) = _windows(text, Starting(), Protocol(window=4, tokens=0))  # type: ignore[arg-type]
    assert [row[1:] for row in batch.ids.tolist()][2] == [ord("g"), 1, ord("h")]  # the second document's own start


def test_the_key_of_windows_without_a_start_token_is_as_before() -> None:
    text, protocol = Text("t", ("abc",)), Protocol()
    plain = measurement_key("f", text, protocol, torch.float32)
    assert plain == measurement_key("f", text, protocol, torch.float32, False)
    assert plain != measurement_key("f", text, protocol, torch.float32, True)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 800.0])
def test_a_loss_without_a_finite_perplexity_is_an_error(loss: float) -> None:
    with pytest.raises(NumericsError, match="nats a token"):
        exp_of(loss)


def test_a_window_whose_logits_are_not_finite_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepress.eval import perplexity

    def broken(checkpoint: object, batches: list[Any], *_: object) -> list[list[tuple[float, int]]]:
        return [[(float("nan") if place == 2 else 1.0, 31) for place in batch.places] for batch in batches]

    monkeypatch.setattr(perplexity, "negative_log_likelihoods", broken)
    with pytest.raises(NumericsError, match=r"the loss of window 3 of 'embedded.*--dtype float32"):
        measure(Checkpoint.open(folder), load_text("embedded", "evaluate"), Protocol("windows", 32, 128), Runtime())


def test_tokens_that_the_embedding_lacks() -> None:
    with pytest.raises(TextError, match=r"the tokenizer gives token 512, the embedding has 512 rows"):
        require_known(torch.tensor([[3, 514, 512]]), 512, "here")
    require_known(torch.tensor([[511, 0]]), 512, "here")
