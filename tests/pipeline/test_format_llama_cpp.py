"""`export --to gguf`: llama.cpp loads the file, and its log-probabilities are the checkpoint's.

It runs in a Python that has xllamacpp: this one, or that of the variable LLAMA_CPP_PYTHON.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.formats import Programs, log_probabilities, read
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.eval.text import load_text
from edgepress.pipeline.formats.proof import exact_model, logits_of
from tests.models import as_drawn, save_tiny
from tests.pipeline.test_export import compressed
from tests.pipeline.test_format_gguf import export, tensors_of

pytestmark = pytest.mark.pipeline

PYTHON = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
TOKENS = 60
LOSSLESS = 0.02  # nats, at every token of the vocabulary
FULL: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": None},
    "qwen2": {"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": None},
    "qwen3": {"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": None},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _llama_cpp() -> None:
    if subprocess.run([PYTHON, "-c", "import xllamacpp"], capture_output=True).returncode:
        pytest.skip("llama.cpp is not installed: pip install xllamacpp, or name a Python that has it, LLAMA_CPP_PYTHON")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model of two blocks whose weights are as large as a trained one's."""

    def make(family: str, **how: Any) -> Path:
        sizes = {"num_hidden_layers": 2, "tie_word_embeddings": True, "initializer_range": 0.2, **FULL[family], **how}
        return save_tiny(tmp_path_factory.mktemp(family) / "model", family, weights=as_drawn, **sizes)

    return make


def both(source: Checkpoint, folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Log-probabilities (positions asked for, vocabulary): ours, ours with inputs in 8 bits, llama.cpp's."""
    written = export(source, folder / "model.gguf")
    ids = load_text("embedded", "evaluate").token_ids(source.tokenizer(), TOKENS)
    model = exact_model(source)
    ours = log_probabilities(logits_of(model, ids[None])[0].numpy())
    with_rounded_inputs(model, source)
    rounded = log_probabilities(logits_of(model, ids[None])[0].numpy())
    programs = Programs(sys.executable, PYTHON, "", "")
    adapter = written.facts["adapter"]
    theirs = read("gguf", written.path, adapter, ids.tolist(), ours.shape[1], folder, programs)
    asked = ~np.isnan(theirs).all(1)
    assert asked.sum() >= TOKENS // 12 and not np.isnan(theirs[asked]).any()  # not where it would end the text
    return ours[asked], rounded[asked], theirs[asked]


def with_rounded_inputs(model: Any, source: Checkpoint) -> None:
    """Let layers with codes multiply them as ggml does: inputs in blocks of 32, 8 bits each, a float16 scale a block.

    An adapter's part is computed with the inputs as they are.
    """

    def forward(base: Tensor, more: Tensor, x: Tensor) -> Tensor:
        blocks = x.view(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        codes = torch.where(step > 0, blocks / step, 0).round()
        return linear((codes * step.half().float()).view(x.shape), base) + linear(x, more)

    for index, block in enumerate(source.shape.blocks):
        for x in (x for x in block.linears if x.grid is not None):
            layer = model.get_submodule(f"model.layers.{index}.{x.name}")
            base = source.base_weight(index, x).float()
            layer.forward = partial(forward, base, layer.weight.detach() - base)


@pytest.mark.parametrize("family", FULL)
def test_dense_weights_give_the_same_numbers(family: str, drawn: Callable[..., Path], tmp_path: Path) -> None:
    ours, _, theirs = both(Checkpoint.open(drawn(family)), tmp_path)
    assert np.abs(ours - theirs).max() < 1e-3 < ours.std()


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"bits": 4, "symmetric": True}, "Q4_0"),
        ({"bits": 4}, "Q5_0"),
        ({"bits": 8, "symmetric": True}, "Q8_0"),
        ({"bits": 4, "rank": 4}, "Q5_0"),
    ],
    ids=["Q4_0", "Q5_0", "Q8_0", "Q5_0 with an adapter"],
)
def test_codes_give_the_numbers_of_inputs_in_8_bits(
    how: dict[str, Any], kind: str, drawn: Callable[..., Path], tmp_path: Path
) -> None:
    """llama.cpp rounds what it multiplies codes with to 8 bits, in blocks of 32; the rest is exact."""
    source = Checkpoint.open(compressed(tmp_path / "stage", drawn("llama"), None, **how))
    ours, rounded, theirs = both(source, tmp_path)
    assert tensors_of(tmp_path / "model.gguf")["blk.0.attn_q.weight"][1] == kind
    off = np.abs(rounded - theirs)  # an input that lies on the border of two codes may take the other one
    assert np.quantile(off, 0.9) < LOSSLESS < np.abs(ours - theirs).max() and off.max() < 5 * LOSSLESS
