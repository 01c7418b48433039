"""`compress check --program rv32`: its prediction against an export, the linker and a run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.hardware.rv32.build import build, find_compiler
from edgepress.hardware.rv32.cost import instructions
from edgepress.hardware.rv32.simulator import expected_tokens, simulate, used_bytes
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.export import PROMPT, plan_export
from tests.conftest import TinyModel
from tests.installed import README, ROOT
from tests.pipeline.test_export import FULL, compressed, rv32  # noqa: F401

pytestmark = pytest.mark.pipeline

NEAR = 2 * 1024  # bytes by which code and stack may be below what was predicted


@pytest.mark.parametrize(("family", "bits", "kv_bits", "activations", "how"), [
    ("llama", 4, 32, "float", {"rank": 4, "adapter_bits": 8, "edge_bits": 8}),
    ("qwen2", 3, 8, "float", {"edge_bits": 4}),
    ("llama", 4, 32, "float", {"pattern": "2:4"}),
    ("llama", 4, 32, "int8", {"pattern": "2:4"}),
    ("gemma2", 8, 32, "float", {}),
    ("llama", None, 8, "float", {}),
    ("llama", None, 8, "float", {"pattern": "2:4"}),
    ("llama", 4, 8, "int8", {"rank": 4, "adapter_bits": 8, "edge_bits": 8}),
    ("qwen2", 3, 32, "int8", {"edge_bits": 4, "group": -1, "symmetric": True}),
    ("gemma2", 8, 32, "int8", {}),
])  # fmt: skip
def test_check_predicts_what_is_written_linked_and_counted(
    family: str, bits: int | None, kv_bits: int, activations: str, how: dict[str, Any], tiny_model: TinyModel,
    tmp_path: Path, compress: Callable[..., Any], rv32: list[str], monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:  # fmt: skip
    taken = {"clang" if "ziglang" in rv32 else "gcc": rv32}
    monkeypatch.setattr("edgepress.hardware.rv32.cost.compilers", lambda: taken)
    model = tiny_model(family, num_hidden_layers=2, **FULL.get(family, {}))
    made, chip = compressed(tmp_path / "model", model, bits=bits, **{"pattern": None} | how), tmp_path / "chip"
    asked = ("--context", 48, "--kv-bits", kv_bits, "--activations", activations)
    done = compress("check", made, "--program", "rv32", *asked, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    predicted = json.loads(done.stdout)
    planned = plan_export(Checkpoint.open(made), load_soc("siracusa"), PROMPT, 12, 48, kv_bits, activations)
    planned.write(chip)
    memories = json.loads((chip / "memory.json").read_text())["memories"]
    assert predicted["memories"] == memories

    build(chip, rv32)
    outcome = simulate(chip, limit=200_000_000)
    parts = {part: nbytes for memory in memories for part, nbytes in memory["parts"].items()}
    for part, nbytes in ((p, n) for row in used_bytes(outcome, memories) for p, n in row["parts"].items()):
        if part in ("code", "stack"):
            assert parts[part] - NEAR <= nbytes <= parts[part], part
        else:
            assert nbytes == parts[part], part
    # Fitted on programs of random weights; `python -m benchmarks.rv32_counts --write` after a change of the C sources.
    estimate = instructions(planned.checkpoint.shape, planned.run)
    assert sum(estimate.values()) == pytest.approx(outcome.instructions_a_token, rel=0.3)
    assert estimate.keys() >= outcome.operators.keys()


def cut(folder: Path, memory: str, nbytes: int) -> Path:
    """A chip like Siracusa with less of one memory."""
    chip = folder / f"{memory}.toml"
    capacity = f'capacity = {{ value = {nbytes}, unit = "B", kind = "stated", source = "a test" }}'
    chip.write_text(f'based_on = "siracusa"\n[memories.{memory}]\n{capacity}\n')
    return chip


@pytest.mark.parametrize(("memory", "nbytes"), [("MRAM", 64 * 1024), ("SRAM", 4096), ("L1", 512)])
def test_of_a_memory_that_was_cut_check_export_and_linker_say_the_same(
    memory: str, nbytes: int, tiny_model: TinyModel, tmp_path: Path, compress: Callable[..., Any]
) -> None:
    model, chip, out = tiny_model("llama"), cut(tmp_path, memory, nbytes), tmp_path / "chip"
    words = f"does not fit Siracusa: {memory} would hold"
    judged = compress("check", model, "--program", "rv32", "--soc", chip)
    assert judged.returncode == 3 and words in judged.stdout
    exported = compress("export", model, "--soc", chip, "--tokens", 4, "-o", out)
    assert exported.returncode == 3 and words in exported.stdout and not out.exists()
    assert compress("export", model, "--soc", chip, "--tokens", 4, "-o", out, "--force").returncode == 0
    with pytest.raises(PlanError, match=rf"(?s)could not build.*\b{memory}\b"):
        build(out, find_compiler())


def test_a_context_beyond_the_memory_names_the_longest_that_fits(
    tiny_model: TinyModel, tmp_path: Path, compress: Callable[..., Any]
) -> None:
    model, chip = tiny_model("llama"), cut(tmp_path, "SRAM", 128 * 1024)
    done = compress("check", model, "--program", "rv32", "--soc", chip)
    assert done.returncode == 3 and "--kv-bits 8 takes" in done.stdout
    longest = int(done.stdout.split("--context ")[1].split()[0])
    codes = [
        compress("check", model, "--program", "rv32", "--soc", chip, "--context", n).returncode
        for n in (longest, longest + 1)
    ]
    assert codes == [0, 3]


def test_a_shape_alone_is_judged_with_what_is_assumed_stated(compress: Callable[..., Any]) -> None:
    done = compress("check", "stories260k", "--program", "rv32", "--bits", 4, "--embedding-bits", 8)
    assert done.returncode == 0 and "instructions a token" in done.stdout
    assert "Assumed, as there is no tokenizer.json" in done.stdout
    assert compress("check", "smollm2-135m", "--program", "rv32", "--bits", 4).returncode == 3


@pytest.mark.parametrize(("arguments", "words"), [
    (["--program", "avr"], "--program avr: there is rv32"),
    (["--program", "rv32", "--kv-bits", "4"], "keeps keys and values in 8 or 32 bits"),
    (["--program", "rv32", "--activation-bits", "16"], "computes token by token"),
    (["--program", "rv32", "--context", "9999"], "the model has positions for 1 to 512"),
    (["--program", "rv32", "--soc", "gap9"], "has no address and access"),
])  # fmt: skip
def test_a_wrong_question_gets_one_message(arguments: list[str], words: str, compress: Callable[..., Any]) -> None:
    done = compress("check", "stories260k", *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_make_chip_makes_the_readme_s_tiny_model_and_names_what_it_lacks(tmp_path: Path) -> None:
    (command,) = re.findall(r"^compress --model stories260K\.bin .*$", README, flags=re.M)
    variables = ("STORIES260K=stories260K.bin", "TINYSTORIES=tinystories.txt", "VENV=nowhere")
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    shown = run(["make", "--dry-run", "--assume-old=setup", "chip", *variables]).stdout.replace("\\\n", " ")
    (made,) = re.findall(r"compress (--model .*)$", shown, flags=re.M)
    assert shlex.split(made)[:-1] == shlex.split(command)[1:-1]
    lacking = run(["make", "--assume-old=setup", "chip", "STORIES260K=no.bin", f"VENV={tmp_path}"])
    assert lacking.returncode == 2 and "there is no file no.bin; give make chip STORIES260K=" in lacking.stdout


def test_a_model_that_fills_the_memories_runs(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(
        "llama", hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, head_dim=32,
    )  # fmt: skip
    made = compressed(tmp_path / "model", model, None, 4, edge_bits=8, group=128)
    planned = plan_export(Checkpoint.open(made), load_soc("siracusa"), PROMPT, 2, 200)
    mram, sram, _ = planned.uses
    assert 0.9 < mram.nbytes / mram.capacity <= 1 and 0.7 < sram.nbytes / sram.capacity <= 1
    planned.write(tmp_path / "chip")
    build(tmp_path / "chip", find_compiler())
    outcome = simulate(tmp_path / "chip", limit=2_000_000_000)
    assert outcome.tokens == expected_tokens(tmp_path / "chip")
