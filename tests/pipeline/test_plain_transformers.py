"""A folder with an adapter, wherever it lies, is read by plain transformers with the adapter: in a fresh process."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.writer import verify
from tests.pipeline.test_export import compressed

pytestmark = pytest.mark.pipeline

IDS = list(range(3, 40, 2))
# Nothing of this project: what a user types who knows transformers alone.
PLAIN = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found[folder] = model(torch.tensor([IDS])).logits.float().contiguous()
save_file(found, sys.argv[1])
""".replace("IDS", str(IDS))
CASES: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "rank": 4},
    "gptq, 8-bit adapter": {"bits": 4, "rank": 4, "adapter_bits": 8, "edge_bits": 8},
    "nf4": {"bits": None, "rank": 4, "codebook": "nf4"},
    "dense": {"bits": None, "rank": 4, "pattern": "1:8"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapted")
    like = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    return {
        name: compressed(place / f"made {i}", tiny_model(**like), how.get("pattern"), **_without_pattern(how))
        for i, (name, how) in enumerate(CASES.items())
        if "codebook" not in how or importlib.util.find_spec("bitsandbytes")
    }


def _without_pattern(how: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in how.items() if key != "pattern"}


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = Checkpoint.open(folder).model(dtype=torch.float32)(torch.tensor([IDS])).logits
    return found


def test_plain_transformers_reads_the_adapter_with_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    moved = {}
    for name, folder in folders.items():
        moved[name] = shutil.copytree(folder, tmp_path / f"elsewhere {folder.name[-1]}")
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "logits"), *map(str, moved.values())]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    theirs = load_file(tmp_path / "logits")
    for name, folder in moved.items():
        ours, plain = logits(folder), theirs[str(folder)]
        for path in (folder / "adapter_model.safetensors", folder / "adapter_config.json", folder / "manifest.json"):
            path.unlink()
        lost = (logits(folder) - ours).abs().max()
        assert (plain - ours).abs().max() < 0.02 * lost, name  # and not what it would be without the adapter


def test_a_folder_of_an_earlier_day_is_read_as_before(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["gptq"], tmp_path / "old")
    (folder / "adapter").mkdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(manifest["files"])
    (folder / "manifest.json").unlink()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).rename(folder / "adapter" / name)
    assert torch.equal(logits(folder), logits(folders["gptq"]))
    assert verify(Checkpoint.open(folders["gptq"]))


def test_an_adapter_that_only_transformers_would_apply_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["dense"], tmp_path / "foreign")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 9}}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json asks for what is not read here: alpha_pattern"):
        logits(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.lora_A\.weight, an adapter of something else"):
        Checkpoint.open(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has adapter_config\.json and no adapter_model\.safetensors"):
        Checkpoint.open(folder)
