"""Every stage's checkpoint of a real chain, packed and restored; the plan's and the manifests' numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.image import pack_checkpoint, unpack_checkpoint
from edgepress.checkpoints.manifest import Manifest
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.writer import verify
from edgepress.pipeline.cli import app
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build
from edgepress.pipeline.report import print_plan, print_summary

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def restored(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[Path, Path]]:
    """Stage folder -> its image and the folder made of that."""
    place = tmp_path_factory.mktemp("images")
    made = {}
    for folder in sorted(chain.glob("[1-5]-*")):
        image, back = place / f"{folder.name}.bin", place / folder.name
        pack_checkpoint(Checkpoint.open(folder), image)
        unpack_checkpoint(image, back)
        made[folder] = image, back
    return made


def test_the_files_have_exactly_the_bytes_that_plan_and_manifest_say(
    chain: Path, tiny_llama: Path, restored: dict[Path, tuple[Path, Path]]
) -> None:
    flags = {"model": str(tiny_llama), "gptq.group": 32, "eora.rank": 4, "depth.protect_first": 1}
    planned = plan(build(None, flags), Checkpoint.open(tiny_llama).shape)
    report = json.loads((chain / "report.json").read_text())
    assert len(restored) == len(planned) == len(report["stages"]) == 5
    for (folder, (image, _)), step, stage in zip(restored.items(), planned, report["stages"], strict=True):
        size = image.stat().st_size
        assert size == packed_sizes(step.shape).total == step.to_dict()["packed_bytes"]
        assert size == Manifest.read(folder).packed_bytes == stage["packed_bytes"]
    assert report["source"]["packed_bytes"] == packed_sizes(Checkpoint.open(tiny_llama).shape).total
    sizes = [stage["packed_bytes"] for stage in report["stages"]]
    assert sizes[1] < sizes[0]  # one of eight weights left out, three bits for each eight
    assert sizes[1] == sizes[2]
    assert sizes[3] < 0.5 * sizes[2]


def test_what_comes_back_is_what_went_in(restored: dict[Path, tuple[Path, Path]]) -> None:
    for folder, (_, back) in restored.items():
        assert_same_files(folder, back)
        assert any("packed_bytes" in line for line in verify(Checkpoint.open(back)))
        assert Manifest.read(back).sparsity == _without_refilled(Manifest.read(folder).sparsity)


def _without_refilled(sparsity: dict[str, Any] | None) -> dict[str, Any] | None:
    return sparsity and sparsity | {"refilled_zeros": 0}


def assert_same_files(one: Path, other: Path) -> None:
    """The same safetensors files to the bit, and for an adapter the same description."""
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*.safetensors"))
    assert names == sorted(str(p.relative_to(other)) for p in other.rglob("*.safetensors"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    if (one / "adapter_config.json").is_file():
        mine, theirs = (json.loads((p / "adapter_config.json").read_text()) for p in (one, other))
        assert mine == theirs


def test_transformers_loads_the_restored_folders_as_the_originals(
    restored: dict[Path, tuple[Path, Path]],
) -> None:
    from transformers import AutoModelForCausalLM

    from edgepress.checkpoints.quiet import quiet_import

    ids = torch.arange(2, 34).view(1, -1)
    for folder, (_, back) in list(restored.items())[1:]:
        logits = []
        for place in (folder, back):
            with quiet_import():
                model = AutoModelForCausalLM.from_pretrained(place)
            with torch.no_grad():
                logits.append(model.eval()(ids).logits)
        assert torch.equal(*logits)


def test_packed_embeddings_and_tokenizer_by_the_command(
    tiny_llama: Path, run_recipe: Callable[..., Any], compress: Callable[..., Any], tmp_path: Path
) -> None:
    result = run_recipe(
        tmp_path / "out", tiny_llama, skip="depth,lora,eora", wanda__pattern="2:4", gptq__quant_embeddings=4,
        gptq__quant="gptq4-channel",
    )  # fmt: skip
    folder = result.stages[-1].checkpoint.folder
    packed = Manifest.read(folder).packed_bytes
    told = CliRunner().invoke(app, ["pack", str(folder), "-o", str(tmp_path / "model.bin"), "--json"])
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    assert facts["bytes"] == facts["packed_bytes"] == packed == (tmp_path / "model.bin").stat().st_size
    assert sum(facts["parts"].values()) == packed
    shown = CliRunner().invoke(app, ["pack", str(folder), "-o", str(tmp_path / "all.bin"), "--tokenizer"])
    assert f"{(tmp_path / 'all.bin').stat().st_size:,} bytes" in shown.stdout
    made = CliRunner().invoke(app, ["unpack", str(tmp_path / "all.bin"), "-o", str(tmp_path / "back")])
    assert made.exit_code == 0, made.output
    assert_same_files(folder, tmp_path / "back")
    edge = load_file(tmp_path / "back" / "edge" / "embedding.safetensors")
    assert edge["model.embed_tokens.codes"].shape == (512, 32)
    assert Checkpoint.open(tmp_path / "back").tokenizer()("for").input_ids
    cut = tmp_path / "cut.bin"
    cut.write_bytes((tmp_path / "all.bin").read_bytes()[:5000])
    failed = compress("unpack", cut, "-o", tmp_path / "other")
    assert failed.returncode == 2
    assert failed.stderr.count("error:") == 1
    assert "has 5000 bytes where its beginning announces" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_manifest_with_another_packed_size_does_not_verify(chain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(next(chain.glob("4-*")), tmp_path / "copy")
    manifest = Manifest.read(folder)
    truth, manifest.packed_bytes = manifest.packed_bytes, 12345
    manifest.write(folder)
    with pytest.raises(CheckpointError, match=f"manifest says packed_bytes 12345, the files hold {truth}"):
        verify(Checkpoint.open(folder))


def test_both_tables_show_the_packed_size_within_80_columns(
    tiny_llama: Path, run_recipe: Callable[..., Any], chain: Path, tmp_path: Path
) -> None:
    from io import StringIO

    from rich.console import Console

    from edgepress.checkpoints.families import PRESETS, shape_from_config
    from edgepress.hardware.check import check
    from edgepress.hardware.soc import load_soc

    out = shutil.copytree(chain, tmp_path / "out", symlinks=True)
    result = run_recipe(out, tiny_llama)
    for stage in result.report["stages"]:  # an 8B model's numbers, and a perplexity that went astray
        stage |= {"file_bytes": 16_060_522_240, "packed_bytes": 5_027_000_000, "seconds": 12_345.0}
        stage |= {"parameters_total": 8_030_261_248, "parameters_nonzero": 7_100_000_000}
        stage["peak_memory_bytes"] = 12_345 * 2**20
    screen = Console(file=StringIO(), width=80)
    print_summary(screen, result, Path("out"))
    shape = shape_from_config(PRESETS["llama-3.1-8b"])
    steps = plan(build(None, {"model": "llama-3.1-8b"}), shape)
    verdict = check(steps[-1].shape, load_soc("siracusa"))
    print_plan(screen, "llama-3.1-8b", shape, steps, (), verdict)
    assert isinstance(screen.file, StringIO)
    lines = screen.file.getvalue().splitlines()
    assert sum("file MiB" in line and "packed" in line for line in lines) == 2
    assert sum("15316.5" in line and "4794.1" in line for line in lines) == 5
    planned = [line for line in lines if "5 eora" in line][-1]
    assert f"{packed_sizes(steps[-1].shape).total / 2**20:.1f}" in planned
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
