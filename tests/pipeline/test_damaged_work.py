"""Work that was damaged between a kill and the next run is found: computed again or refused by name, never sealed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.manifest import MANIFEST, WORK
from edgepress.checkpoints.walk import Work
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import pad, vocabulary

pytestmark = pytest.mark.pipeline

RunRecipe = Callable[..., Any]
Command = Callable[..., Any]
Hashes = Callable[[Path], dict[str, str]]


class KilledError(BaseException):
    """Nobody catches it, so what is on the disk is what a kill leaves."""


# Stage -> what is skipped to have it alone, options, and how many lines its journal has when it is killed.
STAGES: dict[str, tuple[str, dict[str, object], int]] = {
    "wanda": ("depth,lora,gptq,eora", {}, 3),
    "gptq": ("depth,wanda,lora,eora", {}, 3),
    "awq": ("depth,wanda,lora,eora", {"gptq__quant": "awq4"}, 3),
    "lora": ("depth,wanda,gptq,eora", {"lora__distill": 0.5, "lora__teacher": "streamed"}, 3),
    "teacher": ("depth,wanda,gptq,eora", {"lora__distill": 0.5, "lora__teacher": "streamed"}, -3),
    "eora": ("depth,wanda,lora", {"eora__bits": 8}, 3),
}


@pytest.fixture(scope="module", params=STAGES)
def stopped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, run_recipe: RunRecipe,
    weight_hashes: Hashes,
) -> tuple[Callable[[Path], Any], Path, Path, dict[str, str]]:  # fmt: skip
    """A way to run it again, the output folder, its unfinished folder, and the weights an undisturbed run ends with."""
    skip, options, lines = STAGES[request.param]
    home = tmp_path_factory.mktemp(request.param)

    def again(out: Path) -> Any:
        return run_recipe(out, tiny_llama, skip=skip, **options)

    again(home / "undisturbed")
    original, told = Work.append, [0]

    def append(self: Work, entry: dict[str, Any]) -> None:
        ours = (self.folder.name == "teacher") == (lines < 0)
        last = [p for p in (home / "out").glob("[0-9]-*") if not (p / MANIFEST).is_file()]
        if ours and request.param in ("eora",) and not last[0].name.startswith("2-"):
            ours = False
        told[0] += ours
        if told[0] > abs(lines):
            raise KilledError
        original(self, entry)

    patch = pytest.MonkeyPatch()
    patch.setattr(Work, "append", append)
    with pytest.raises(KilledError):
        again(home / "out")
    patch.undo()
    (unfinished,) = (p for p in (home / "out").glob("[0-9]-*") if not (p / MANIFEST).is_file())
    return again, home / "out", unfinished, weight_hashes(home / "undisturbed")


def test_a_flipped_bit_in_any_file_is_found(
    stopped: tuple[Callable[[Path], Any], Path, Path, dict[str, str]], tmp_path: Path, weight_hashes: Hashes
) -> None:
    again, out, unfinished, undisturbed = stopped
    files = [p.relative_to(out) for p in sorted(unfinished.rglob("*")) if p.is_file() and p.stat().st_size]
    kinds = {str(p.parent / p.name.rstrip("0123456789.").split("-")[0]) + p.suffix: p for p in files}  # one of a kind
    inside = [p for p in kinds.values() if WORK in p.parts]  # of the Trainer's many files, those that decide
    chosen = sorted(inside)[:6] + sorted(set(kinds.values()) - set(inside))[:2]
    assert inside
    draw, refused = random.Random(1), []
    for name in chosen:
        copy = tmp_path / "out"
        shutil.copytree(out, copy, symlinks=True)
        flip(copy / name, draw)
        try:
            again(copy)
        except CheckpointError as error:
            refused.append((name.name, str(error), (copy / unfinished.name / MANIFEST).is_file()))
        else:
            assert weight_hashes(copy) == undisturbed, name
        shutil.rmtree(copy)
    assert refused, "no flip was in what a resumed run builds on"
    assert all(str(tmp_path / "out" / unfinished.name) in said and not sealed for _, said, sealed in refused), refused


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def test_left_alone_it_ends_with_the_same_bytes(
    stopped: tuple[Callable[[Path], Any], Path, Path, dict[str, str]], tmp_path: Path, weight_hashes: Hashes
) -> None:
    again, out, _, undisturbed = stopped
    shutil.copytree(out, tmp_path / "out", symlinks=True)
    again(tmp_path / "out")
    assert weight_hashes(tmp_path / "out") == undisturbed


def test_a_weight_file_that_no_step_wrote_is_not_sealed(
    tiny_llama: Path, run_recipe: RunRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CheckpointWriter.finish

    def plant(self: CheckpointWriter, *arguments: Any) -> None:
        shutil.copy(self.folder / "block-00000.safetensors", self.folder / "block-00009.safetensors")
        original(self, *arguments)

    monkeypatch.setattr(CheckpointWriter, "finish", plant)
    with pytest.raises(CheckpointError, match=r"block-00009\.safetensors, which no step of the stage wrote"):
        run_recipe(tmp_path / "out", tiny_llama, skip="depth,lora,gptq,eora")


# --- stages without a walk resume like the others ---------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pad", "vocabulary"])
@pytest.mark.parametrize("moment", [1, 3, 8])
def test_pad_and_vocabulary_resume(
    stage: str, moment: int, make_tiny: Callable[..., Path], run_recipe: RunRecipe, tmp_path: Path, compress: Command,
    monkeypatch: pytest.MonkeyPatch, weight_hashes: Hashes,
) -> None:  # fmt: skip
    model = make_tiny(tmp_path / "model", blocks=3)
    (tmp_path / "corpus.txt").write_text("a corpus of a few words, and a few more words\n" * 20)
    more: dict[str, object] = {
        "pad": {"pad__multiple": 96},
        "vocabulary": {"vocabulary__corpus": tmp_path / "corpus.txt"},
    }[stage]
    more = {key: str(value) if isinstance(value, Path) else value for key, value in more.items()}
    skip = "depth,wanda,lora,gptq,eora"
    run_recipe(tmp_path / "undisturbed", model, skip=skip, **more)
    module = {"pad": pad, "vocabulary": vocabulary}[stage]
    count = [0]
    from edgepress.checkpoints import manifest

    original = manifest.sync_folder

    def stop(folder: Path) -> None:
        count[0] += folder.name.startswith("1-")
        if count[0] == moment:
            raise KilledError
        original(folder)

    if moment == 8:  # before anything is written
        monkeypatch.setattr(module, "run", lambda *_: (_ for _ in ()).throw(KilledError()))
    else:
        monkeypatch.setattr(manifest, "sync_folder", stop)
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        run_recipe(out, model, skip=skip, **more)
    monkeypatch.undo()
    (unfinished,) = out.glob("1-*")
    for command in ("check", "eval", "verify", "pack"):
        done = compress(command, unfinished, *(["-o", tmp_path / "x.bin"] if command == "pack" else []))
        assert done.returncode == 2 and "is a checkpoint still being written" in done.stderr, (command, done.stderr)
    run_recipe(out, model, skip=skip, **more)
    assert weight_hashes(out) == weight_hashes(tmp_path / "undisturbed")


def test_a_stage_s_folder_without_its_manifest_is_no_model(
    chain: Path, compress: Callable[..., Any], tmp_path: Path
) -> None:
    """Its weights alone would pass for an uncompressed model from outside, and be measured as one."""
    out = shutil.copytree(chain, tmp_path / "out", symlinks=True)
    last = (out / "result").resolve()
    (last / "manifest.json").unlink()
    named = {"eval": (out, out / "result", last), "check": (last,), "verify": (last,), "pack": (last,), "plan": (last,)}
    for command, places in named.items():
        for place in places:
            more = ["-o", tmp_path / "x.bin"] if command == "pack" else []
            model = ["--model", place] if command == "plan" else [place]
            done = compress(command, *model, *more)
            assert done.returncode == 2 and "is a stage's folder without manifest.json" in done.stderr, (command, place)
    moved = last.rename(tmp_path / "elsewhere")  # outside of a store it is a model like any other
    assert compress("check", moved).returncode in (0, 3)


# --- `result` ---------------------------------------------------------------------------------------------------------


def test_result_is_of_the_last_run_or_not_there(
    tiny_llama: Path, run_recipe: RunRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, skip = tmp_path / "out", "lora,gptq,eora"
    first = run_recipe(out, tiny_llama, skip=skip)
    assert os.readlink(out / "result") == first.stages[-1].checkpoint.folder.name
    report = (out / "report.json").read_text()

    def fail(self: CheckpointWriter, *arguments: Any) -> None:
        assert not (out / "result").is_symlink() and not (out / "report.json").exists()
        raise KilledError

    monkeypatch.setattr(CheckpointWriter, "finish", fail)
    with pytest.raises(KilledError):
        run_recipe(out, tiny_llama, skip=skip, wanda__pattern="2:4")
    assert not (out / "result").is_symlink()
    assert (out / "report-earlier.json").read_text() == report
    # Reused as a whole, the run before is the last one again; and while it runs, its result is what it will give.
    run_recipe(out, tiny_llama, skip=skip)
    assert os.readlink(out / "result") == first.stages[-1].checkpoint.folder.name
    monkeypatch.undo()
    # Another prefix of the same chain.
    shorter = run_recipe(out, tiny_llama, skip="wanda,lora,gptq,eora")
    assert os.readlink(out / "result") == shorter.stages[-1].checkpoint.folder.name


def test_a_run_without_stages_says_so_and_has_no_result(
    chain: Path, compress: Command, tiny_llama: Path, quick: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(chain, out, symlinks=True)
    done = compress("--model", tiny_llama, "-o", out, *quick, "--skip", "depth,wanda,lora,gptq,eora")
    assert done.returncode == 0, done.stderr
    assert "every stage is skipped" in done.stdout and "there is no result" in done.stdout
    assert not (out / "result").is_symlink() and not (out / "result").exists()
    done = compress("eval", out, "--task", "perplexity")
    assert done.returncode == 2 and "has no result yet" in done.stderr


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_result_that_is_no_link_is_left_alone(
    kind: str, tiny_llama: Path, run_recipe: RunRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".edgepress").touch()
    if kind == "folder":
        (out / "result").mkdir()
        (out / "result" / "mine").write_text("mine")
    else:
        (out / "result").write_text("mine")
    with pytest.raises(PlanError, match=r"result is not the link that compress keeps there; move it away"):
        run_recipe(out, tiny_llama, skip="depth,lora,gptq,eora")
    assert (out / "result" / "mine" if kind == "folder" else out / "result").read_text() == "mine"


def test_a_result_that_leads_elsewhere_is_not_followed(chain: Path, compress: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(chain, out, symlinks=True)
    target = (chain / "result").resolve()
    for to in (str(target), f"../{target.name}", "..", "nowhere"):
        (out / "result").unlink()
        (out / "result").symlink_to(to)
        done = compress("eval", out)
        assert done.returncode == 2 and ("is not the link to a stage's" in done.stderr or to == ".."), to


@pytest.mark.parametrize("name", ["measurements", "compress.log", "report.json", ".locks", "9-wanda-00000000"])
def test_a_link_out_of_the_store_is_not_written_through(
    name: str, tiny_llama: Path, run_recipe: RunRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".edgepress").touch()
    (tmp_path / "outside").mkdir()
    (out / name).symlink_to("../outside")
    with pytest.raises(CheckpointError, match=rf"{name} is a link out of its folder"):
        run_recipe(out, tiny_llama, skip="depth,lora,gptq,eora")
    assert list((tmp_path / "outside").iterdir()) == []


# --- what carries a hash of itself ------------------------------------------------------------------------------------


def test_a_measurement_that_was_edited_is_measured_again(
    chain: Path, tiny_llama: Path, run_recipe: RunRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(chain, out, symlinks=True)
    before = {p.name: p.read_bytes() for p in (out / "measurements").iterdir()}
    first, second, third, *_ = sorted((out / "measurements").iterdir())
    facts = json.loads(first.read_text())
    first.write_text(json.dumps(facts | {"perplexity": 1.0}))
    shutil.copy(third, second)  # sound, but of another checkpoint
    third.write_text(third.read_text()[:20])
    result = run_recipe(out, tiny_llama)
    assert result.computed == 0
    assert {p.name: p.read_bytes() for p in (out / "measurements").iterdir()} == before
    assert all(json.loads((out / "report.json").read_text())[key] for key in ("sha256", "stages"))


def test_an_edited_report_is_refused(chain: Path, compress: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(chain, out, symlinks=True)
    report = json.loads((out / "report.json").read_text())
    report["stages"][-1]["perplexity"]["after"] = 1.0
    (out / "report.json").write_text(json.dumps(report))
    done = compress("report", out)
    assert done.returncode == 2 and "report.json cannot be read (it was edited or damaged" in done.stderr


@pytest.mark.parametrize("field", ["seed", "quality", "fingerprint", "parent", "facts", "options"])
def test_an_edited_manifest_is_found_by_whoever_opens_it(
    field: str, chain: Path, compress: Command, tmp_path: Path, tiny_llama: Path, run_recipe: RunRecipe
) -> None:
    out = tmp_path / "out"
    shutil.copytree(chain, out, symlinks=True)
    folder = (out / "result").resolve()
    data = json.loads((folder / MANIFEST).read_text())
    other = {"seed": 1, "fingerprint": data["fingerprint"][::-1]}
    data[field] = other[field] if field in other else data[field] | {"perplexity": 1}
    (folder / MANIFEST).write_text(json.dumps(data))
    for command in (["check"], ["verify"], ["eval"], ["pack", "-o", tmp_path / "x.bin"]):
        done = compress(command[0], folder, *command[1:])
        assert done.returncode == 2 and "manifest.json is damaged or was edited" in done.stderr, command
    with pytest.raises(CheckpointError, match="is damaged or was edited"):
        run_recipe(out, tiny_llama)


def test_a_manifest_or_report_without_its_hash_is_refused(
    chain: Path, tiny_llama: Path, run_recipe: RunRecipe, tmp_path: Path, compress: Command
) -> None:
    out = tmp_path / "out"
    shutil.copytree(chain, out, symlinks=True)
    folder = (out / "result").resolve()
    for path in (out / "report.json", folder / MANIFEST):
        data = json.loads(path.read_text())
        del data["sha256"]
        path.write_text(json.dumps(data, indent=2) + "\n")
    done = compress("report", out)
    assert done.returncode == 2 and "report.json cannot be read (it was edited or damaged" in done.stderr
    done = compress("eval", folder)
    assert (
        done.returncode == 2 and "manifest.json is damaged or was edited: it states no sha256 of itself" in done.stderr
    )
    with pytest.raises(CheckpointError, match="states no sha256 of itself"):
        run_recipe(out, tiny_llama)


def test_a_flipped_bit_of_a_finished_stage_is_neither_measured_nor_packed(
    chain: Path, compress: Command, tmp_path: Path
) -> None:
    """Shards are hard links: what happens to one stage's happens to all that share it."""
    out = tmp_path / "out"
    shutil.copytree(chain, out, symlinks=True)
    middle = next(out.glob("2-*"))
    shard = middle / "block-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for command in (["eval", out], ["pack", middle, "-o", tmp_path / "x.bin"], ["verify", middle]):
        done = compress(*command)
        assert done.returncode == 2 and "block-00001.safetensors does not have the sha256" in done.stderr, command
    assert not (tmp_path / "x.bin").exists()


def test_a_sampled_text_that_was_damaged_is_sampled_again(
    tiny_llama: Path, run_recipe: RunRecipe, tmp_path: Path
) -> None:
    out, skip = tmp_path / "out", "depth,lora,gptq,eora"
    data = {"data": "self", "text": "embedded"}
    first = run_recipe(out, tiny_llama, skip=skip, **data)
    (text,) = (out / "calibration").iterdir()
    before = text.read_bytes()
    run_recipe(tmp_path / "other", tiny_llama, skip=skip, seed=3, **data)
    (other,) = (tmp_path / "other" / "calibration").iterdir()
    for damaged in (other.read_bytes(), before[:-8] + b"\1\0\0\0\0\0\0\0", before[:50], b""):
        text.write_bytes(damaged)
        again = run_recipe(out, tiny_llama, skip=skip, **data)
        assert again.computed == 0 and text.read_bytes() == before
        assert again.stages[0].checkpoint.fingerprint == first.stages[0].checkpoint.fingerprint
