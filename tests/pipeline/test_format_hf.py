"""`export --to hf`: plain transformers gives this project's logits from the merged folder, in the usual file names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.runtime import Runtime
from edgepress.pipeline.formats import FORMATS, Wanted, hf, module_of
from edgepress.pipeline.formats.proof import exact_model, logits_of, some_tokens
from tests.conftest import TinyModel
from tests.pipeline.test_export import compressed

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def stage(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    model = tiny_model(num_hidden_layers=2, tie_word_embeddings=True, dtype="bfloat16")
    return Checkpoint.open(compressed(tmp_path_factory.mktemp("hf") / "stage", model, "1:8", 4, 4))


def test_plain_transformers_gives_the_same_logits_in_every_type(stage: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = some_tokens(stage.shape)
    wanted = {"": logits_of(stage.model(), ids), "float32": logits_of(exact_model(stage), ids)}
    for kind, logits in wanted.items():
        out = tmp_path / f"as {kind}"
        written = module_of(FORMATS["hf"]).write(stage, Wanted(out, kind), Runtime())
        assert {path.name for path in out.glob("*.safetensors*")} == {"model.safetensors"}
        assert written.nbytes == (out / "model.safetensors").stat().st_size
        model = AutoModelForCausalLM.from_pretrained(out)
        assert str(model.dtype) == f"torch.{kind or 'bfloat16'}"
        tolerance = 0.0 if not kind else 1e-4 * float(logits.abs().max())
        assert (logits_of(model, ids) - logits).abs().max() <= tolerance
        assert (
            AutoTokenizer.from_pretrained(out)("for every")["input_ids"] == stage.tokenizer()("for every")["input_ids"]
        )
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert Checkpoint.open(out).shape.grid is None


def test_many_shards_have_an_index(stage: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hf, "SHARD_BYTES", 100_000)
    out = module_of(FORMATS["hf"]).write(stage, Wanted(tmp_path / "out"), Runtime()).path
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert names == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    ids = some_tokens(stage.shape)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(out), ids), logits_of(stage.model(), ids))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)


def test_what_is_there_is_not_written_over(stage: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(PlanError, match="holds other things than an exported model"):
        module_of(FORMATS["hf"]).write(stage, Wanted(tmp_path), Runtime())
    with pytest.raises(PlanError, match="holds other things"):  # a checkpoint of ours is no export
        module_of(FORMATS["hf"]).write(stage, Wanted(stage.folder), Runtime())


def test_numbers_beyond_float16_are_no_infinities(tiny_model: TinyModel, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model(num_hidden_layers=2), tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="beyond float16; take --type bfloat16"):
        module_of(FORMATS["hf"]).write(Checkpoint.open(folder), Wanted(tmp_path / "out", "float16"), Runtime())
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
