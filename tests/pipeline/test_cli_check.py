"""`compress check` from outside: files it writes, settings, damaged checkpoints; and the verdict in a run."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.manifest import sealed, write_json
from edgepress.hardware.soc import shipped_socs

pytestmark = pytest.mark.pipeline

Command = Callable[..., Any]


def test_check_of_a_checkpoint_measures_its_files_and_writes_what_is_asked(
    compress: Command, chain: Path, tmp_path: Path
) -> None:
    table, operators, picture = tmp_path / "t.csv", tmp_path / "o.csv", tmp_path / "map.png"
    files = ("--csv", table, "--operators", operators, "--png", picture)
    done = compress("check", chain / "result", "--context", 32, *files, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    manifest = json.loads((chain / "result" / "manifest.json").read_text())
    assert data["footprint"]["file_measured"] and data["footprint"]["file_bytes"] == manifest["file_bytes"]
    assert data["footprint"]["packed_bytes"] == manifest["packed_bytes"]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        sum(int(row["placed_bytes"]) for row in rows if row["part"] not in ("KV cache", "activations"))
        == (data["weight_bytes"])
    )
    with operators.open(newline="") as file:
        assert {row["mode"] for row in csv.DictReader(file)} == {"decode", "prefill"}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "colour=red"], "there is no setting 'colour'. Settings: sram_role"),
        (
            ["--soc", "nochip"],
            "shipped are ensemble-e8, esp32-s3, gap9, phone, rp2350, siracusa, siracusa-neureka, stm32n6",
        ),
        (["--bits", "5"], "--bits 5: there are 8, 4 and 3"),
        (["--context", "513"], "beyond the model's 512 positions"),
        (["--csv", "no/such/folder/t.csv"], "there is no such folder to write to"),
    ],
)
def test_a_mistake_gets_one_message_and_code_2(compress: Command, arguments: list[str], words: str) -> None:
    done = compress("check", "stories260k", *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_manifest_that_disagrees_with_the_files_is_an_error(compress: Command, chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree((chain / "result").resolve(), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    wrong = manifest | {"parameters_total": 1, "file_bytes": 2}
    (folder / "manifest.json").write_text(json.dumps(wrong))
    done = compress("check", folder)
    assert done.returncode == 2 and "manifest.json is damaged or was edited" in done.stderr
    write_json(folder / "manifest.json", sealed(wrong))
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    done = compress("check", folder)
    assert done.returncode == 2
    for words in ("parameters_total 1, the files hold", "file_bytes 2, the files hold", "config.json has"):
        assert words in done.stderr


def test_a_stray_shard_is_an_error(compress: Command, chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree((chain / "result").resolve(), folder)
    shutil.copy(next(folder.glob("*.safetensors")), folder / "stray.safetensors")
    done = compress("check", folder)
    assert done.returncode == 2 and "does not list stray.safetensors" in done.stderr


def test_a_run_says_the_verdict_by_plan_and_after_each_stage(
    compress: Command, quick: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    done = compress("--model", tiny_llama, *quick, "--skip", "wanda,lora,eora", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "compress.log").read_text().splitlines()
    (planned,) = [i for i, line in enumerate(lines) if "by plan the result fits Siracusa: weights" in line]
    (first,) = [i for i, line in enumerate(lines) if "1/2 depth" in line]
    after = [i for i, line in enumerate(lines) if line.endswith(lines[planned].partition("result ")[2])]
    measured = [i for i, line in enumerate(lines) if "    fits Siracusa: weights" in line]
    assert planned < first < measured[0] and len(measured) == 2
    assert after[-1] == measured[-1]  # the last stage needs what was planned
    assert not any("the forecast is wrong" in line for line in lines)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["hardware"]["fits"] is True and report["hardware"]["timing"]["decode"]["seconds"]["default"] > 0


def test_socs_lists_chips_and_settings(compress: Command) -> None:
    done = compress("socs")
    assert done.returncode == 0 and "sram_role" in done.stdout
    assert all(f"{name}: " in done.stdout for name in shipped_socs())
