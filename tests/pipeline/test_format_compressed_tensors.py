"""`export --to compressed-tensors`: the package and transformers read back exactly what the checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.runtime import Runtime
from edgepress.pipeline.formats import FORMATS, Wanted, module_of
from edgepress.pipeline.formats import compressed_tensors as writer
from tests.conftest import TinyModel
from tests.pipeline.test_export import compressed

pytestmark = pytest.mark.pipeline

pytest.importorskip("compressed_tensors", reason="not installed: pip install 'edgepress[compressed-tensors]'")
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    return tiny_model(**SMALL)


@pytest.mark.parametrize(
    ("pattern", "bits", "how"),
    [
        (None, 4, {}),
        ("2:4", 4, {"group": 64, "symmetric": True}),
        (None, 8, {"group": -1, "symmetric": True}),
        (None, 8, {}),
        ("1:8", 3, {}),
        (None, 2, {"group": -1}),
    ],
    ids=["4 bits", "4 symmetric, 2:4", "8 by row", "8 bits", "3 bits, 1:8", "2 by row"],
)
def test_the_package_decompresses_to_the_same_weights_and_logits(
    pattern: str | None, bits: int, how: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM

    source = Checkpoint.open(compressed(tmp_path / "stage", model, pattern, bits, **how))
    written = module_of(FORMATS["compressed-tensors"]).write(source, Wanted(tmp_path / "out"), Runtime())
    assert written.nbytes == sum(path.stat().st_size for path in written.path.iterdir())
    stated = json.loads((written.path / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(stated).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(stated["format"])
    block = load_file(written.path / "block-00001.safetensors")
    for x in source.shape.blocks[1].linears:
        prefix = f"model.layers.1.{x.name}."
        parts = {name.removeprefix(prefix): t for name, t in block.items() if name.startswith(prefix)}
        found = compressor.decompress(parts | {"weight_scale": parts["weight_scale"].float()}, scheme)["weight"]
        assert found.equal(source.base_weight(1, x))
        assert parts["weight_packed"].numel() == -(-x.in_features * bits // 32) * x.out_features

    loaded: Any = AutoModelForCausalLM.from_pretrained(written.path, dtype=torch.float32)
    ours: Any = source.model(dtype=torch.float32)
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        if not how.get("symmetric"):  # the package multiplies in the scales' precision, float16
            for n, block_ in enumerate(source.shape.blocks):
                for x in block_.linears:
                    weight = ours.get_submodule(f"model.layers.{n}.{x.name}").weight
                    weight.copy_(weight.half())
        assert torch.allclose(loaded(ids).logits, ours(ids).logits, atol=2e-5)


def test_what_lies_on_no_grid_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: tuple[tuple[str, tuple[Any, ...], dict[str, Any], str], ...] = (
        ("dense", ("2:4", None), {}, "no layer of this checkpoint is quantised; take --to hf"),
        ("adapter", (None, 4, 4), {}, "has an adapter, .* or give the stage before the adapter"),
        ("levels", (None, None), {"codebook": "nf4"}, "its layers have nf4"),
        ("ordered", (None, 4), {"order": True}, "groups out of storage order"),
    )
    out = tmp_path / "out"
    for name, given, how, words in cases:
        source = Checkpoint.open(compressed(tmp_path / name, model, *given, **how))
        with pytest.raises(PlanError, match=words):
            writer.write(source, Wanted(out), Runtime())
    good = Checkpoint.open(compressed(tmp_path / "good", model, None, 4))
    for folder in (good.folder, tmp_path):
        with pytest.raises(PlanError, match="holds other things"):
            writer.write(good, Wanted(folder), Runtime())
    monkeypatch.setattr(writer, "logits_of", lambda model, ids: torch.zeros(1, ids.shape[1], 512).normal_())
    with pytest.raises(NumericsError, match=r"compressed-tensors .* gives logits that differ"):
        writer.write(good, Wanted(out), Runtime())
    monkeypatch.setattr(writer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install 'edgepress\[compressed-tensors\]'"):
        writer.write(good, Wanted(out), Runtime())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "dense", "good", "levels", "ordered"]
