"""`export --to executorch`: ExecuTorch's own runtime loads the file, and what it computes is the checkpoint's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.runtime import Runtime
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.text import load_text
from edgepress.pipeline.formats import FORMATS, Wanted, Written, module_of
from edgepress.pipeline.formats import executorch as writer
from tests.conftest import TinyModel
from tests.pipeline.test_export import compressed

pytestmark = pytest.mark.pipeline

pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install 'edgepress[executorch]'")
CONTEXT = 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Checkpoint:
    """4-bit codes, 1 of 8 removed, an adapter of rank 4; the tokens before the last 8 are out of sight."""
    model = tiny_model("mistral", num_hidden_layers=1, dtype="bfloat16")
    return Checkpoint.open(compressed(tmp_path_factory.mktemp("pte") / "stage", model, "1:8", 4, 4))


@pytest.fixture(scope="module")
def written(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Written:
    out = tmp_path_factory.mktemp("file") / "model.pte"
    made = module_of(FORMATS["executorch"]).write(source, Wanted(out, context=CONTEXT), Runtime())
    assert list(out.parent.iterdir()) == [out] and made.nbytes == out.stat().st_size
    return made


@pytest.fixture(scope="module")
def program(written: Written) -> Any:
    from executorch.runtime import Runtime as Reader

    return Reader.get().load_program(written.path)


def test_logits_are_the_models_in_parts_of_any_length(source: Checkpoint, program: Any) -> None:
    forward, model = program.load_method("forward"), source.model(dtype=torch.float32)
    caller: Any = model
    for text in range(2):  # the second writes over the keys of the first
        ids = torch.randint(3, 512, (1, CONTEXT), generator=torch.Generator().manual_seed(text))
        parts = [
            forward.execute((ids[:, start:end].contiguous(), torch.arange(start, end)))[0].clone()
            for start, end in ((0, 30), (30, 31), (31, 40), *((n, n + 1) for n in range(40, CONTEXT)))
        ]
        with torch.no_grad():
            assert torch.allclose(torch.cat(parts, 1), caller(ids).logits, atol=5e-5)


def test_perplexity_is_ours_and_the_runner_finds_what_it_asks_for(source: Checkpoint, program: Any) -> None:
    assert {"forward", "get_max_seq_len", "get_vocab_size", "get_bos_id", "get_eos_ids"} <= program.method_names
    assert program.load_method("get_max_seq_len").execute(()) == [CONTEXT]
    text, forward = load_text("embedded", "evaluate"), program.load_method("forward")
    windows = text.token_ids(source.tokenizer())[: 8 * CONTEXT].view(-1, CONTEXT)
    logits = torch.cat([forward.execute((ids[None].contiguous(), torch.arange(CONTEXT)))[0].clone() for ids in windows])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    ours = measure(source, text, Protocol("windows", CONTEXT, 8 * CONTEXT), Runtime()).perplexity
    assert math.exp(float(loss)) == pytest.approx(ours, rel=1e-4)


def test_what_cannot_be_is_refused_before_anything_is_written(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.pte"
    for context in (1, 257):
        with pytest.raises(PlanError, match=f"--context {context}: a whole number from 2 to the model's 256"):
            writer.write(source, Wanted(out, context=context), Runtime())
    monkeypatch.setattr(writer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install 'edgepress\[executorch\]'"):
        writer.write(source, Wanted(out), Runtime())
    assert not list(tmp_path.iterdir())
