"""What every method of `--quant` keeps to: its mask, its bytes, a kill; and the page that shows how to add one."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress import checkpoints
from edgepress.checkpoints import config
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import DTYPE_BYTES, Grid
from edgepress.checkpoints.headers import read_header
from edgepress.checkpoints.image import pack_checkpoint, unpack_checkpoint
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.runtime import Runtime, Silent
from edgepress.checkpoints.shape import ModelShape, Pattern, with_pattern
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter, prove_pattern
from edgepress.hardware.check import check
from edgepress.hardware.soc import load_soc
from edgepress.stages import gptq, quantisers
from edgepress.stages.options import Gptq
from edgepress.stages.quantisers import METHODS, NOTHING

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)
NO_MASKS = ("q2_k", "q4_k", "q5_k")  # a real minimum, and no place in GGUF for a mask
MASKING = [name for name in METHODS if name not in NO_MASKS]
DATA_FREE = [name for name in METHODS if quantisers.method(name).NEEDS == NOTHING]


def smollm() -> ModelShape:
    return shape_from_config(PRESETS["smollm2-135m"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_verbs(method: str) -> None:
    module = quantisers.method(method)
    assert module.NEEDS in (quantisers.NOTHING, quantisers.HESSIANS)
    assert isinstance(module.TUNES, bool)
    declared = inspect.signature(quantisers.Method.quantise)
    assert list(inspect.signature(module.quantise).parameters) == list(declared.parameters)[1:]
    for masked in (False, True) if method not in NO_MASKS else (False,):
        assert quantisers.form(Gptq(quant=method), masked).bits == int(next(c for c in method if c.isdigit()))


@pytest.mark.parametrize("method", MASKING)
def test_the_stage_holds_the_mask_and_the_planned_bytes(
    method: str,
    masked: Checkpoint,
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    options = Gptq(quant=method, group=32)
    facts = gptq.run(masked, writer, tokens(5), options, RUNTIME)
    made, planned = seal(writer, masked, pattern="2:4"), gptq.plan(masked.shape, options)
    assert len(facts["blocks"]) == 3
    assert made.shape.grid == planned.grid
    assert made.facts()["file_bytes"] == planned.file_bytes
    assert made.facts()["packed_bytes"] == packed_sizes(planned).total
    files = [read_header(path).values() for path in made.folder.glob("*.safetensors")]
    bits = sum(t.elements * 8 * DTYPE_BYTES[t.dtype] for tensors in files for t in tensors)
    assert planned.model_mib == made.shape.model_mib == bits / (8 * 1024**2)  # thesis 001, equation 2.55
    assert prove_pattern(made, Pattern(2, 4), masked)["holds"]
    states = relative_error(made, masked)
    assert 0 < states < 1, "the model still computes about the same"

    image = tmp_path / "model.image"
    pack_checkpoint(made, image)
    assert image.stat().st_size == packed_sizes(planned).total
    back = unpack_checkpoint(image, tmp_path / "back")
    for path in sorted(made.folder.glob("*.safetensors")):
        assert (back.folder / path.name).read_bytes() == path.read_bytes()


def relative_error(made: Checkpoint, source: Checkpoint) -> float:
    """Of the logits for some tokens, the mean of each token's taken out."""
    ids = torch.arange(3, 51).view(2, 24)
    with torch.no_grad():
        found, expected = (c.model(dtype=torch.float32)(input_ids=ids).logits for c in (made, source))
    expected, found = (x - x.mean(-1, keepdim=True) for x in (expected, found))
    return float((found - expected).norm() / expected.norm())


class Dies(Silent):
    """Raises once the second block is through."""

    def step(self, **numbers: float | str) -> None:
        if numbers.get("block") == "2/3":
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", MASKING)
def test_killed_between_blocks_it_ends_with_the_same_bytes(
    method: str, masked: Checkpoint, tokens: Callable[..., TokenBatches], tmp_path: Path
) -> None:
    options, batches = Gptq(quant=method, group=32), tokens(5)
    undisturbed, killed = CheckpointWriter(tmp_path / "undisturbed"), tmp_path / "killed"
    facts = gptq.run(masked, undisturbed, batches, options, RUNTIME)
    with pytest.raises(KeyboardInterrupt):
        gptq.run(masked, CheckpointWriter(killed), batches, options, Runtime(chunk_tokens=48, progress=Dies()))
    assert gptq.run(masked, CheckpointWriter(killed), batches, options, RUNTIME) == facts
    for path in (p for p in undisturbed.folder.rglob("*") if p.is_file() and ".work" not in p.parts):
        assert (killed / path.relative_to(undisturbed.folder)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("method", MASKING)
def test_only_methods_that_say_so_run_without_calibration(
    method: str,
    masked: Checkpoint,
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a block was run")

    monkeypatch.setattr("edgepress.checkpoints.checkpoint.Skeleton.run", never)
    if method in DATA_FREE:
        gptq.run(masked, writer, tokens(5), Gptq(quant=method, group=32), RUNTIME)
    else:
        with pytest.raises(AssertionError, match="a block was run"):
            gptq.run(masked, writer, tokens(5), Gptq(quant=method, group=32), RUNTIME)


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_needs_no_data_is_forecast_without_it(method: str) -> None:
    cost, most = gptq.cost(smollm(), Gptq(quant=method)), gptq.cost(smollm(), Gptq())
    free = method in DATA_FREE
    assert (cost.scratch_bytes == 0) == free
    less = most.peak_memory_bytes - cost.peak_memory_bytes
    assert less > 2 * 4 * (576**2 + 1536**2) if free else less == 0
    assert (cost.operations < most.operations / 1000) == free


@pytest.mark.parametrize("method", METHODS)
def test_high_effort_is_refused_where_there_is_nothing_to_tune(method: str) -> None:
    options = Gptq(quant=method, effort="high")
    if method.startswith("gptq") or method == "w4a8" or method.endswith("_k"):
        assert gptq.plan(smollm(), options).grid is not None
        return
    with pytest.raises(PlanError, match=rf"high tunes what GPTQ's solver leaves, and {method} .* goes with gptq4, gp"):
        gptq.plan(smollm(), options)


def test_what_a_method_fixes_itself_is_said() -> None:
    said = gptq.remarks(smollm(), Gptq(quant="int4", group=64))
    assert said == ["gptq: int4 has one scale a row; --group 64 is not used"]
    assert gptq.remarks(smollm(), Gptq(quant="int8")) == []
    noise = (
        "gptq: hqq2 rounds to 2 bits without looking at calibration text, and a small model then answers noise (of "
        "SmolLM2-135M perplexity 10^6); gptq2-s and q2_k have as few bits and stay usable"
    )
    assert gptq.remarks(smollm(), Gptq(quant="hqq2")) == [
        noise,
        "gptq: no library knows real zero points: only this project loads the folder",
    ]
    assert gptq.remarks(with_pattern(smollm(), Pattern(2, 4)), Gptq(quant="hqq2")) == [
        "gptq: hqq2 has whole zero points here, not the real ones of the published method, since a weight that 2:4 "
        "removes must be exactly 0",
        noise,
    ]
    with pytest.raises(PlanError, match=r"hqq4 has no such solution.* hqq4 seeks zero points"):
        gptq.plan(smollm(), Gptq(quant="hqq4", symmetric=True, effort="high"))
    with pytest.raises(PlanError, match=r"--quant none leaves none; give --quant int8"):
        Gptq(quant="none", activation_bits=8)
    with pytest.raises(PlanError, match=r"hqq4 seeks zero points, and --symmetric fixes them; .* int4 or int8"):
        gptq.plan(smollm(), Gptq(quant="hqq4", symmetric=True))


# --- the page --------------------------------------------------------------------------------------------------------


def page() -> str:
    return (Path(gptq.__file__).parent / "README.md").read_text()


def test_the_page_on_adding_a_method_can_be_followed(
    masked: Checkpoint,
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Its file and its line, put where it says, give a method that quantises, is planned and keeps the mask."""
    file = re.search(r"`stages/quantisers/(\w+)\.py`:\n\n```python\n(.*?)```", page(), re.DOTALL)
    line = re.search(r'\n    ("\S+": \("edgepress\.stages\.quantisers\.(\w+)", .*\),)\n', page())
    assert file and line and file[1] == line[2]
    (tmp_path / f"{file[1]}.py").write_text(file[2])
    monkeypatch.setattr(quantisers, "__path__", [*quantisers.__path__, str(tmp_path)])
    ((name, where),) = eval("{" + line[1] + "}").items()
    monkeypatch.setitem(METHODS, name, where)
    monkeypatch.setattr("edgepress.stages.options.QUANTS", (*METHODS, "none"))
    importlib.invalidate_caches()
    try:
        options = Gptq(quant=name, group=32)
        gptq.run(masked, writer, tokens(5), options, RUNTIME)
        made = seal(writer, masked, pattern="2:4")
        assert made.shape.grid == gptq.plan(masked.shape, options).grid == Grid(4, 32)
        assert gptq.cost(smollm(), options).scratch_bytes == 0
    finally:
        sys.modules.pop(where[0], None)
    assert prove_pattern(made, Pattern(2, 4), masked)["holds"]
    assert 0 < relative_error(made, masked) < 1


def test_the_page_on_adding_a_storage_form_can_be_followed(
    masked: Checkpoint,
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Its file and its two lines give a form that is quantised, stored, loaded, packed and restored as planned."""
    section = page().partition("## A storage form")[2].partition("\n## ")[0]
    file = re.search(r"`checkpoints/(\w+)\.py`:\n\n```python\n(.*?)```", section, re.DOTALL)
    listed = re.search(r"`checkpoints/config\.py`:\n\n```python\n(.*?)```", section, re.DOTALL)
    method = re.search(r"themselves:\n\n```python\n(.*?)\n\n    (\".*),\n```", section, re.DOTALL)
    assert file and listed and method
    (tmp_path / f"{file[1]}.py").write_text(file[2])
    monkeypatch.setattr(checkpoints, "__path__", [*checkpoints.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        names = vars(config) | {}
        exec(listed[1], names)
        monkeypatch.setattr(config, "FORMS", names["FORMS"])
        exec(method[1], names)
        ((name, where),) = eval("{" + method[2] + "}", names).items()
        monkeypatch.setitem(METHODS, name, where)
        monkeypatch.setattr("edgepress.stages.options.QUANTS", (*METHODS, "none"))

        options = Gptq(quant=name)
        form, planned = quantisers.form(options, masked=True), gptq.plan(masked.shape, options)
        gptq.run(masked, writer, tokens(5), options, RUNTIME)
        made = seal(writer, masked, pattern="2:4")
        assert made.shape.grid == planned.grid == form and made.shape.blocks == planned.blocks
        assert made.facts()["file_bytes"] == planned.file_bytes
        for index, block in enumerate(made.shape.blocks):
            for x in block.linears:
                before, after = masked.block(index)[f"{x.name}.weight"].float(), made.base_weight(index, x)
                scale = (before.abs().sum(1, keepdim=True) / (before != 0).sum(1, keepdim=True)).half().float()
                expected = (before / scale).round().clamp(-1, 1) * scale
                torch.testing.assert_close(after, expected, rtol=0, atol=0)
        assert prove_pattern(made, Pattern(2, 4), masked)["holds"]
        pack_checkpoint(made, tmp_path / "model.image")
        assert (tmp_path / "model.image").stat().st_size == packed_sizes(planned).total
        back = unpack_checkpoint(tmp_path / "model.image", tmp_path / "back")
        assert back.shape == made.shape
        for path in sorted(made.folder.glob("*.safetensors")):
            assert (back.folder / path.name).read_bytes() == path.read_bytes()
        verdict = check(made.shape, load_soc("siracusa"), context=16)
        assert any(note.startswith("ternary: ") and "The cores decode each one" in note for note in verdict.notes)
    finally:
        sys.modules.pop(f"edgepress.checkpoints.{file[1]}", None)
        vars(checkpoints).pop(file[1], None)


def test_the_page_lists_every_method() -> None:
    section = page().partition("## A way to quantise")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| `(\w+)\.py` \|", section, re.MULTILINE)
    listed = {name: file for names, file in rows for name in re.findall(r"`([\w-]+)`", names)}
    assert listed == {name: module.rpartition(".")[2] for name, (module, _) in METHODS.items()}


def test_two_bits_without_calibration_are_warned_of(build: Callable[..., Checkpoint]) -> None:
    shape = build("llama", blocks=3).shape
    said = {quant: " ".join(gptq.remarks(shape, Gptq(quant, group=32))) for quant in METHODS}
    assert [quant for quant in METHODS if "gptq2-s and q2_k have as few bits" in said[quant]] == ["hqq2"]
    gptq.plan(shape, Gptq("hqq2"))  # not refused: a thesis's table names it
    mixed = Gptq("hqq4", layers="down_proj=hqq2")
    assert "hqq2 rounds to 2 bits without looking" in " ".join(gptq.remarks(shape, mixed))
