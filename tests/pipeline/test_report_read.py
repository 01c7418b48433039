"""Reading output folders for the report: runs, sweeps, moved and broken ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgepress.checkpoints.errors import CheckpointError, EdgepressError, PlanError
from edgepress.checkpoints.manifest import sealed, sha256_file, write_json
from edgepress.pipeline.page.read import clean, read_study
from tests.pipeline import report_help as made

pytestmark = pytest.mark.unit


def test_a_run_has_every_stage_with_its_manifest_wherever_the_store_is_now(tmp_path: Path) -> None:
    made.write_run(tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    study = read_study(tmp_path / "moved")
    assert (study.kind, study.model, study.machine) == ("run", "tiny", "2 cores")
    assert [run.stage for run in study.runs] == ["source", *made.STAGES]
    assert [run.perplexity for run in study.runs] == list(made.PERPLEXITY)
    assert [study.size(run) for run in study.runs] == list(made.PACKED)
    assert all(run.manifest and run.folder for run in study.runs[1:])


@pytest.mark.parametrize("kept", ["results.csv", "results.parquet"])
def test_a_sweep_reads_the_same_from_either_table(tmp_path: Path, kept: str) -> None:
    out = made.write_sweep(tmp_path / "out", made.sweep_rows())
    for name in ("results.csv", "results.parquet"):
        if name != kept:
            (out / name).unlink()
    study = read_study(out)
    assert {c.name: [run.fingerprint for run in c.runs] for c in study.configurations} == {
        "none": ["s"],
        "pruned": ["s", "w"],
        "both": ["s", "w", "g"],
        "worse": ["s", "x"],
    }
    assert study.runs[1].bits_per_byte == pytest.approx(2.2)
    assert study.runs[1].pattern == "1:8" and study.runs[0].pattern == ""
    assert study.all_packed and study.size_name == "packed bytes"


def test_without_packed_bytes_of_one_the_files_are_compared(tmp_path: Path) -> None:
    rows = made.sweep_rows()
    for row in rows[:2]:
        row["packed_bytes"] = None
    study = read_study(made.write_sweep(tmp_path / "out", rows))
    assert study.size_name == "file bytes"
    assert [study.size(run) for run in study.runs] == [run.file_bytes for run in study.runs]


def test_failed_and_unfinished_configurations_are_told(tmp_path: Path) -> None:
    recipe = {"soc": "siracusa", "seed": 0}
    state = {
        "about": "what for",
        "stage_runs": {"shared": 2},
        "configurations": [
            {"name": "both", "recipe": recipe, "failure": ""},
            {"name": "bad", "recipe": recipe, "failure": "gptq: no room"},
            {"name": "late", "recipe": recipe, "failure": ""},
        ],
    }
    study = read_study(made.write_sweep(tmp_path / "out", made.sweep_rows(), state))
    assert study.failures == {"bad": "gptq: no room"}
    assert "not finished: late" in study.notes
    assert study.counts == {"shared": 2} and study.about == "what for"


def test_the_newer_of_run_and_sweep_is_shown_and_the_other_named(tmp_path: Path) -> None:
    import os

    out = made.write_run(made.write_sweep(tmp_path / "out", made.sweep_rows()))
    os.utime(out / "report.json", (2e9, 2e9))
    assert read_study(out).kind == "run"
    os.utime(out / "results.parquet", (2.1e9, 2.1e9))
    study = read_study(out)
    assert study.kind == "sweep"
    assert any("older single run" in note for note in study.notes)


def test_a_damaged_manifest_is_a_note_not_the_end(tmp_path: Path) -> None:
    out = made.write_run(tmp_path / "out")
    path = next(out.glob("4-gptq-*")) / "manifest.json"
    path.write_text("{")
    study = read_study(out)
    assert study.of_stage("gptq")[0].manifest is None
    assert any("manifest.json is damaged" in note for note in study.notes)


@pytest.mark.parametrize("edited", ["sweep.json", "results.parquet"])
def test_a_sweep_that_was_edited_is_refused(tmp_path: Path, edited: str) -> None:
    """`sweep.json` carries its own hash and those of the tables."""
    out = made.write_sweep(tmp_path / "out", made.sweep_rows(), {})
    tables = {name: sha256_file(out / name) for name in ("results.parquet", "results.csv")}
    write_json(out / "sweep.json", sealed({"notes": [], "tables": tables}))
    read_study(out)
    if edited == "sweep.json":
        write_json(out / edited, json.loads((out / edited).read_text()) | {"notes": ["it was good"]})
    else:
        made.write_sweep(out, [row | {"value": 1.0} for row in made.sweep_rows()])
    with pytest.raises(CheckpointError, match=rf"{edited} cannot be read \(it was edited or damaged"):
        read_study(out)


def test_a_stage_that_a_report_names_is_read_in_the_store_alone(tmp_path: Path) -> None:
    elsewhere = made.write_run(tmp_path / "elsewhere")
    out = made.write_run(tmp_path / "out")
    report = json.loads((out / "report.json").read_text())
    for stage in report["stages"]:
        stage["path"] = str(elsewhere / Path(stage["path"]).name)
    shutil.rmtree(next(out.glob("4-gptq-*")))
    write_json(out / "report.json", sealed(report))
    study = read_study(out)
    assert study.of_stage("gptq")[0].folder is None
    assert study.of_stage("wanda")[0].folder == next(out.glob("2-wanda-*"))


def test_mistakes_get_one_message_that_says_what_to_do(tmp_path: Path) -> None:
    def message(out: Path) -> str:
        with pytest.raises(EdgepressError) as caught:
            read_study(out)
        assert isinstance(caught.value, PlanError | CheckpointError)
        return str(caught.value)

    assert "there is no folder" in message(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    assert "not an output folder of compress (it holds cat.png)" in message(tmp_path / "photos")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".edgepress").touch()
    assert "no stage is finished" in message(tmp_path / "begun")
    made.stage_folder(tmp_path / "begun", 1, "depth")
    assert "finished so far: 1-depth-00000001" in message(tmp_path / "begun")
    broken = made.write_run(tmp_path / "broken")
    (broken / "report.json").write_text("[]")
    assert "report.json cannot be read" in message(broken)
    write_json(broken / "report.json", sealed({"model": "x"}))
    assert "the key 'baseline' is missing" in message(broken)
    table = made.write_sweep(tmp_path / "table", [{"sweep": "x", "metric": "perplexity"}])
    assert "lacks the columns configurations, result_of" in message(table)
    (table / "results.parquet").write_bytes(b"PAR1 and no more")
    assert "results.parquet cannot be read" in message(table)
    unfinished = [row | {"result_of": "[]"} for row in made.sweep_rows()]
    assert "no configuration of the sweep is finished" in message(made.write_sweep(tmp_path / "none", unfinished))


def test_names_become_one_printable_line() -> None:
    assert clean("a\nb\x00c\ud800d\x9f") == "a b c d"
    assert len(clean("x" * 5000)) == 400
    clean("naïve 模型 🦙").encode()
