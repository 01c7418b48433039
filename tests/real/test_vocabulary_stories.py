"""stories260K cut to the vocabulary of TinyStories: a trained model and its real text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.sources import open_source
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.text import load_text
from edgepress.hardware.check import check
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.calibration import corpus_vocabulary
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build
from edgepress.stages import vocabulary
from edgepress.stages.options import Vocabulary

pytestmark = pytest.mark.real

DATA = Path(os.environ.get("EDGEPRESS_DATA") or Path(__file__).parents[3] / "shared" / "data")
MODEL, STORIES = DATA / "stories260K" / "stories260K.bin", DATA / "tinystories" / "tinystories.txt"


@pytest.mark.skipif(not (MODEL.is_file() and STORIES.is_file()), reason=f"no stories260K and TinyStories in {DATA}")
def test_stories260k_keeps_its_logits_and_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    source = open_source(str(MODEL))
    recipe = build(None, {"model": str(MODEL), "vocabulary.corpus": str(STORIES), "text": str(STORIES),
                          "data": str(STORIES)}, skip="depth,wanda,lora,gptq,eora")  # fmt: skip
    step = plan(recipe, source.shape)[0]
    found = corpus_vocabulary(recipe, source.folder)
    assert found is not None
    assert isinstance(step.options, Vocabulary)
    runtime = Runtime(torch.device("cpu"), torch.float32)
    facts = vocabulary.run(source, CheckpointWriter(tmp_path / "out"), found.corpus, step.options, runtime)
    result = Checkpoint(tmp_path / "out", None)
    assert facts["same_pieces"]
    assert 256 < result.shape.vocabulary == step.shape.vocabulary < 512
    assert result.facts()["file_bytes"] == step.shape.file_bytes
    text = load_text(str(STORIES), "evaluate")
    before, after = source.tokenizer(), result.tokenizer()
    for story in text.documents[:20]:
        assert after.decode(after(story)["input_ids"]) == before.decode(before(story)["input_ids"])
    kept = torch.tensor(found.trimmed.kept)
    ids = torch.tensor([after(text.documents[0])["input_ids"][:128]])
    with torch.no_grad():
        want, got = source.model()(kept[ids]).logits[..., kept], result.model()(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    # Chance that went to tokens that are gone goes to those that stay: the loss cannot rise.
    losses = [measure(c, text, Protocol(window=128, tokens=4096), runtime).bits_per_byte for c in (source, result)]
    assert losses[1] <= losses[0] + 0.01
    assert check(result.shape, load_soc("siracusa"), context=256).fits
