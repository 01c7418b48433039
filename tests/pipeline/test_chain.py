"""A tiny LLaMA through all five stages: what lies on disk, what is reused, what the report says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, NumericsError, PlanError, RecipeError, TextError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.writer import prove_pattern, verify
from edgepress.pipeline.calibration import Calibration
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build
from edgepress.stages.options import Wanda

pytestmark = pytest.mark.pipeline

Run = Callable[..., Any]


def stage_folders(out: Path) -> list[Path]:
    return sorted(p for p in out.iterdir() if p.name[0].isdigit())


def test_five_folders_a_link_and_a_report_of_the_documented_form(chain: Path) -> None:
    folders = stage_folders(chain)
    assert [p.name.rsplit("-", 1)[0] for p in folders] == ["1-depth-2", "2-wanda-1of8", "3-lora-r8".replace("r8", "r4"),
                                                           "4-gptq4", "5-eora-r4-8bit"]  # fmt: skip
    assert (chain / "result").resolve() == folders[-1].resolve()
    report = json.loads((chain / "report.json").read_text())
    assert set(report) >= {"model", "stages", "hardware"}
    for stage, folder in zip(report["stages"], folders, strict=True):
        assert set(stage) >= {
            "stage", "path", "fingerprint", "seconds", "peak_memory_bytes", "file_bytes",
            "parameters_total", "parameters_nonzero", "sparsity", "perplexity",
        }  # fmt: skip
        assert set(stage["perplexity"]) == {"before", "after", "protocol", "text"}
        assert stage["path"] == str(folder)
        assert stage["file_bytes"] == sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
        assert not (folder / ".work").exists()
    assert [s["sparsity"]["pattern"] for s in report["stages"]] == [None, "1:8", "1:8", "1:8", "1:8"]
    assert all(s["sparsity"]["holds"] for s in report["stages"][1:])
    assert [s["perplexity"]["before"] for s in report["stages"][1:]] == [
        s["perplexity"]["after"] for s in report["stages"][:-1]
    ]


def test_the_files_have_exactly_the_bytes_and_parameters_that_plan_predicts(chain: Path, tiny_llama: Path) -> None:
    flags = {"model": str(tiny_llama), "gptq.group": 32, "eora.rank": 4, "depth.protect_first": 1}
    planned = plan(build(None, flags), Checkpoint.open(tiny_llama).shape)
    report = json.loads((chain / "report.json").read_text())["stages"]
    assert [p.shape.file_bytes for p in planned] == [s["file_bytes"] for s in report]
    assert [p.shape.parameters_total for p in planned] == [s["parameters_total"] for s in report]


def test_every_stage_verifies_and_the_mask_of_wanda_lives_to_the_end(chain: Path) -> None:
    folders = stage_folders(chain)
    for folder in folders:
        assert any("sha256" in line for line in verify(Checkpoint.open(folder)))
    pruned, last = Checkpoint.open(folders[1]), Checkpoint.open(folders[4])
    pattern = pruned.shape.pattern
    assert pattern is not None
    facts = prove_pattern(last, pattern, pruned)
    assert facts["holds"]
    assert (
        facts["kept_zeros"]
        == facts["expected_zeros"]
        == sum(x.weights // 8 for block in last.shape.blocks for x in block.linears)
    )


def test_second_run_computes_nothing_and_changes_nothing(
    chain: Path, tiny_llama: Path, run_recipe: Run, tmp_path: Path
) -> None:
    out = shutil.copytree(chain, tmp_path / "out", symlinks=True)
    before = {p: p.stat().st_mtime_ns for p in out.glob("[1-5]-*/**/*") if p.is_file()}
    result = run_recipe(out, tiny_llama)
    assert result.computed == 0
    assert all(stage.reused for stage in result.stages)
    assert {p: p.stat().st_mtime_ns for p in out.glob("[1-5]-*/**/*") if p.is_file()} == before


def test_changing_only_quant_recomputes_only_the_last_two_stages(
    chain: Path, tiny_llama: Path, run_recipe: Run, tmp_path: Path
) -> None:
    out = shutil.copytree(chain, tmp_path / "out", symlinks=True)
    result = run_recipe(out, tiny_llama, gptq__quant="gptq8")
    assert [stage.reused for stage in result.stages] == [True, True, True, False, False]
    # both variants live side by side
    assert len(stage_folders(out)) == 7


def test_same_inputs_give_the_same_bytes_in_another_folder(
    chain: Path, tiny_llama: Path, run_recipe: Run, tmp_path: Path, weight_hashes: Callable[[Path], dict[str, str]]
) -> None:
    run_recipe(tmp_path / "out", tiny_llama)
    assert weight_hashes(tmp_path / "out") == weight_hashes(chain)


def test_another_seed_gives_other_fingerprints(chain: Path, tiny_llama: Path, run_recipe: Run, tmp_path: Path) -> None:
    result = run_recipe(tmp_path / "out", tiny_llama, skip="lora,gptq,eora", seed=1)
    first = json.loads((chain / "report.json").read_text())["stages"][0]["fingerprint"]
    assert result.stages[0].checkpoint.fingerprint != first


def test_skip_and_stage_order_come_from_the_recipe(tiny_llama: Path, run_recipe: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "early.yaml"
    recipe.write_text("stages:\n  - depth: {remove: 1}\n  - lora\n  - wanda: {pattern: '2:4'}\n  - gptq\n  - eora\n")
    result = run_recipe(tmp_path / "out", tiny_llama, recipe=str(recipe), skip="eora")
    report = result.report["stages"]
    assert [s["stage"] for s in report] == ["depth", "lora", "wanda", "gptq"]
    assert [s["sparsity"]["pattern"] for s in report] == [None, None, "2:4", "2:4"]


def test_quant_none_leaves_eora_out_and_says_so() -> None:
    recipe = build(None, {"gptq.quant": "none"})
    assert [stage for stage, _ in recipe.stages] == ["depth", "wanda", "lora"]
    assert any("eora is left out" in note for note in recipe.notes)
    # asked for by name, it is a contradiction that planning refuses
    asked = build(None, {"gptq.quant": "none", "eora.rank": 8})
    with pytest.raises(RecipeError, match="nothing is quantised"):
        plan(asked, shape_from_config(PRESETS["smollm2-135m"]))


@pytest.mark.parametrize("flags", [{}, {"lora.method": "qlora"}])
def test_a_refused_quantiser_does_not_make_later_stages_complain(flags: dict[str, Any]) -> None:
    wrong = build(None, {"gptq.quant": "hqq4", "gptq.symmetric": True, "depth.remove": 30} | flags)
    with pytest.raises(RecipeError) as caught:
        plan(wrong, shape_from_config(PRESETS["smollm2-135m"]))
    assert len(caught.value.faults) == 2  # depth's own, and the quantiser's
    assert "hqq4 seeks zero points" in caught.value.faults[-1]


def test_wanda_none_measures_exactly_what_depth_gave(
    chain: Path, tiny_llama: Path, run_recipe: Run, tmp_path: Path
) -> None:
    result = run_recipe(tmp_path / "out", tiny_llama, skip="lora,gptq,eora", wanda__pattern="none")
    first = json.loads((chain / "report.json").read_text())["stages"][0]
    assert result.report["stages"][-1]["perplexity"]["after"] == first["perplexity"]["after"]


def test_packed_embedding_lies_beside_and_is_what_the_model_computes_with(
    tiny_llama: Path, run_recipe: Run, tmp_path: Path
) -> None:
    result = run_recipe(tmp_path / "out", tiny_llama, skip="depth,lora,eora", gptq__quant_embeddings=8)
    checkpoint = result.stages[-1].checkpoint
    assert checkpoint.shape.embedding_bits == 8
    table = checkpoint.outer()["model.embed_tokens.weight"].float()
    original = Checkpoint.open(tiny_llama).outer()["model.embed_tokens.weight"].float()
    step = (original.amax(1) - original.amin(1)) / 255
    # half a step of rounding, and the 16-bit storage of scale, minimum and result
    assert ((table - original).abs().amax(1) <= 0.5 * step + 2**-8 * original.abs().amax(1)).all()
    assert result.report["stages"][-1]["file_bytes"] == checkpoint.shape.file_bytes


def test_text_the_model_writes_itself_is_sampled_once(tiny_llama: Path, run_recipe: Run, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    options = {"skip": "depth,lora,gptq,eora", "data": "self", "text": "embedded"}
    run_recipe(tmp_path / "out", tiny_llama, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    folder = tmp_path / "out" / "calibration"
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(kept) == 1  # 80 rows of 128 tokens
    assert run_recipe(tmp_path / "out", tiny_llama, **options).computed == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == kept


def test_more_windows_begin_with_the_text_of_fewer(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = build(None, {"model": str(tiny_llama), "data": "self", "text": "embedded"})
    source = Checkpoint.open(tiny_llama)
    calibration = Calibration(recipe, source, tmp_path, Runtime())
    sizes = [(3, 20), (82, 100), (2, 200)]
    few, many, long = (calibration.windows("wanda", Wanda(samples=n, length=m)).ids for n, m in sizes)
    assert few.shape == (3, 20) and many.shape == (82, 100) and long.shape == (2, 200)
    assert torch.equal(few, many[:3, :20]) and torch.equal(many[:2], long[:, :100])
    assert len(many.unique(dim=0)) == 82  # no row of the second batch is one of the first
    # what the model writes is what its own logits make likely: far likelier than tokens drawn at random
    model = source.model(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        odds = model(input_ids=many).logits.log_softmax(-1)
        seen = odds[:, :-1].gather(-1, many[:, 1:, None]).mean()
        entropy = -(odds.exp() * odds)[:, :-1].sum(-1).mean()
    assert seen.item() == pytest.approx(-entropy.item(), rel=0.05)


def test_a_model_writes_no_further_than_its_positions(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=48)
    recipe = build(None, {"model": str(model), "data": "self", "text": "embedded"})
    calibration = Calibration(recipe, Checkpoint.open(model), tmp_path, Runtime())
    assert calibration.windows("wanda", Wanda(samples=3, length=40)).ids.shape == (3, 40)
    (written,) = (load_file(path)["ids"] for path in (tmp_path / "calibration").iterdir())
    assert written.shape[1] == 48


def test_a_damaged_checkpoint_is_named_and_neither_reused_nor_removed(
    chain: Path, tiny_llama: Path, run_recipe: Run, tmp_path: Path
) -> None:
    out = shutil.copytree(chain, tmp_path / "out", symlinks=True)
    folder = stage_folders(out)[1]
    shard = folder / "block-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=folder.name) as caught:
        run_recipe(out, tiny_llama)
    assert "block-00001.safetensors" in str(caught.value)
    assert shard.read_bytes() == bytes(data)


def test_a_foreign_checkpoint_in_a_stage_s_place_is_named(
    chain: Path, tiny_llama: Path, run_recipe: Run, tmp_path: Path
) -> None:
    out = shutil.copytree(chain, tmp_path / "out", symlinks=True)
    first, second = stage_folders(out)[:2]
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run_recipe(out, tiny_llama)
    assert (second / "manifest.json").is_file()


def test_a_stage_that_fills_the_mask_stops_the_run(
    tiny_llama: Path, run_recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepress.stages.quantisers import gptq

    solve = gptq.solve
    monkeypatch.setattr(gptq, "solve", lambda w, h, mask, *rest: solve(w, h, None, *rest))
    with pytest.raises(NumericsError, match="did not keep its"):
        run_recipe(tmp_path / "out", tiny_llama, skip="depth,lora,eora")
    (unfinished,) = (tmp_path / "out").glob("2-gptq4-*")
    assert not (unfinished / "manifest.json").exists()


def test_weights_that_are_not_finite_are_named_before_any_stage_runs(
    tiny_llama: Path, run_recipe: Run, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][2, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
        run_recipe(tmp_path / "out", model)
    assert not stage_folders(tmp_path / "out")


def test_calibration_text_too_short(tiny_llama: Path, run_recipe: Run, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one line\n" * 40)
    with pytest.raises(TextError, match="windows of"):
        run_recipe(tmp_path / "out", tiny_llama, data=str(short), text="embedded")
    assert not stage_folders(tmp_path / "out")


def test_text_that_would_calibrate_and_be_measured(tiny_llama: Path, run_recipe: Run, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"the line with the number {i}" for i in range(3000)))
    copy = shutil.copy(text, tmp_path / "b.jsonl")
    Path(copy).write_text("".join(json.dumps({"text": d}) + "\n" for d in [text.read_text()]))
    run_recipe(tmp_path / "out", tiny_llama, skip="depth,lora,gptq,eora", data=str(text))  # held-out fifth
    with pytest.raises(PlanError, match="choose another with -o"):
        run_recipe(tmp_path, tiny_llama)


def test_forecast_beyond_memory_or_disk_is_refused(
    tiny_llama: Path, run_recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgepress.pipeline.run

    monkeypatch.setattr(edgepress.pipeline.run, "available_bytes", lambda: 1000)
    with pytest.raises(PlanError, match="memory by the forecast"):
        run_recipe(tmp_path / "out", tiny_llama)
    monkeypatch.undo()
    monkeypatch.setattr(edgepress.pipeline.run.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="are free"):
        run_recipe(tmp_path / "out", tiny_llama)
    assert not stage_folders(tmp_path / "out")
