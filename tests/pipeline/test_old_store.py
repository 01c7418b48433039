"""What the version before the house was rebuilt, commit a558005, wrote is found and used again.

store-a558005.tar.xz holds a LLaMA of three blocks (`model`), a text, and the output folder (`out`) that
`compress --model model --data text.txt -o out` of that commit made of them with the options below.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Silent
from edgepress.pipeline.plan import plan
from edgepress.pipeline.progress import Reporter
from edgepress.pipeline.recipe import build
from edgepress.pipeline.run import Conditions, run
from edgepress.pipeline.store import Store

pytestmark = pytest.mark.pipeline

OPTIONS: dict[str, Any] = {
    **{"model": "model", "data": "text.txt", "dtype": "float32", "device": "cpu", "window": 64, "tokens": 256},
    **{"depth.remove": 1, "depth.samples": 2, "depth.length": 32, "depth.protect_first": 1, "depth.protect_last": 1},
    **{"wanda.samples": 2, "wanda.length": 32, "lora.rank": 4, "lora.samples": 8, "lora.length": 32},
    **{"lora.batch": 4, "lora.steps": 2, "gptq.samples": 2, "gptq.length": 32, "gptq.group": 32},
    **{"eora.rank": 2, "eora.samples": 2, "eora.length": 32},
    # These were defaults then.
    **{"lora.dropout": 0.1, "lora.targets": "q_proj,k_proj,v_proj,o_proj", "gptq.shrinkage": 0.0, "eora.bits": 16},
    **{"eora.shrinkage": 0.0, "lora.epochs": 2},
}
# What is asked for besides, and the stage folders that a558005 has for it: their names end in a fingerprint's head,
# and each fingerprint is of the one before with the stage's key, VERSION, options and calibration. Stages that leave an
# adapter beside the weights are computed anew: they put it where transformers finds it, and not into `adapter/`.
FOLDERS: list[tuple[dict[str, Any], str]] = [
    ({}, "1-depth-1-52cbcdc1 2-wanda-1of8-222227fd 3-lora-r4-7ecafce1 4-gptq4-0ccef3b5 5-eora-r2-9b127e0a"),
    (
        {"wanda.method": "sparsegpt", "wanda.pattern": "2:4", "lora.method": "ia3", "lora.targets": "all"}
        | {"gptq.quant": "nf4"},
        "1-depth-1-52cbcdc1 2-sparsegpt-2of4-d7723090 3-ia3-35afd6b9 4-nf4-fdb87c80 5-eora-r2-e5fe9d13",
    ),
    (
        {"wanda.method": "magnitude", "lora.method": "dora", "gptq.quant": "hqq4", "gptq.group": 64, "eora.bits": 8},
        "1-depth-1-52cbcdc1 2-magnitude-1of8-98b1d74d 3-dora-r4-e7972372 4-hqq4-d9911303 5-eora-r2-8bit-14871a3d",
    ),
    (
        {"pad.multiple": 96, "wanda.method": "gate-l1", "wanda.pattern": "0.5", "gptq.quant": "nf4"}
        | {"lora.method": "qlora+rslora", "eora.rank": 0},
        "1-pad-96-e9fbf99c 2-depth-1-9b5401dd 3-gate-l1-0.5-407f015f 4-nf4-cd73fcbd 5-qlora-rslora-r4-89b85b5d",
    ),
    (
        {"vocabulary.corpus": "text.txt", "gptq.quant": "w4a8", "gptq.quant_embeddings": 8},
        "1-vocabulary-258-48114551 2-depth-1-8b9ac06a 3-wanda-1of8-de8d2134 4-lora-r4-f53edf1f 5-w4a8-77d0bea4 "
        "6-eora-r2-2d8c24ad",
    ),
    (
        {"depth.metric": "influence", "lora.method": "lora+loftq", "lora.loftq_steps": 1}
        | {"gptq.quant": "awq4", "eora.rank": 0},
        "1-depth-1-3d776ef6 2-wanda-1of8-7c089136 3-awq4-f9a43a12 4-loftq-r4-a399dc87",
    ),
    (
        {"homotopic": 2, "wanda.pattern": "2:4", "lora.steps": 4},
        "1-depth-1-52cbcdc1 2-wanda-1in2-2of4-58f23b3a 3-lora-r4-5b8962d9 4-wanda-2of4-f95395ff 5-lora-r4-b778e68b "
        "6-gptq4-1b4da087 7-eora-r2-b5c71436",
    ),
    (
        {"lora.data": "text.txt", "lora.distill": 0.5, "gptq.effort": "high", "seed": 3},
        "1-depth-1-4a445ba3 2-wanda-1of8-31ce7e17 3-lora-r4-87b6ea7a 4-gptq4-619ab51f 5-eora-r2-81dd253c",
    ),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.unpack_archive(Path(__file__).with_name("store-a558005.tar.xz"), tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("asked", "folders"), FOLDERS, ids=lambda value: str(value)[:60])
def test_every_stage_has_the_fingerprint_that_it_had(asked: dict[str, Any], folders: str) -> None:
    at = Conditions.prepare(build(None, OPTIONS | asked), Path("out"), Silent())
    plans = plan(at.recipe, at.source.shape)
    keys = zip(plans, at.fingerprints(plans), strict=True)
    found = [at.store.stage_folder(i, step.options.label, key).name for i, (step, key) in enumerate(keys, 1)]
    assert found == folders.split()


def test_the_store_is_sound_and_used_again(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with Store(Path("out")).opened() as store, Reporter(Console(), quiet=True) as reporter:
        assert run(build(None, OPTIONS | {"eora.rank": 0}), store.folder, reporter).computed == 0
    assert [path for path in before if path.read_bytes() != before[path]] == []
    assert {path for path in before if path.parent.name == "measurements"} == set(folder.glob("out/measurements/*"))


def test_an_adapter_in_its_folder_of_that_day_is_read(folder: Path) -> None:
    (old,) = folder.glob("out/5-*")
    assert (old / "adapter" / "adapter_model.safetensors").is_file()
    checkpoint = Checkpoint.open(old, hashes=True)
    part, block = checkpoint.adapter_part(0), checkpoint.block(0)
    largest = 0.0
    adapted = [linear for linear in checkpoint.shape.blocks[0].linears if linear.grid]
    assert {linear.adapter_rank for linear in adapted} == {2}
    for linear in adapted:
        effective = block[f"{linear.name}.weight"]
        base = checkpoint.base_weight(0, linear).to(effective.dtype).float()
        wanted = part[f"{linear.name}.lora_B.weight"].float() @ part[f"{linear.name}.lora_A.weight"].float()
        assert torch.equal(effective, (base + wanted).to(effective.dtype))
        largest = max(largest, float(wanted.abs().max()))
    assert largest > 1e-4


def test_manifests_have_the_keys_that_they_had(folder: Path, chain: Path) -> None:
    def keys(stage: Path) -> dict[str, list[str]]:
        manifest = json.loads((stage / "manifest.json").read_text())
        del manifest["files"]
        return {key: sorted(value) if isinstance(value, dict) else [] for key, value in manifest.items()}

    for old in sorted(folder.glob("out/[1-5]-*")):
        (new,) = chain.glob(f"{old.name[0]}-*")
        found, had = keys(new), keys(old)
        assert set(had["options"]) <= set(found.pop("options"))  # there are more of them by now
        del had["options"]
        assert found == had
