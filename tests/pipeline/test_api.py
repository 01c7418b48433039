"""`edgepress.compress`, `check` and `evaluate`: one call each, against the command line and transformers itself."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import edgepress
from edgepress.eval.tasks import Settings
from edgepress.eval.text import load_text
from edgepress.pipeline.keywords import CompressOptions, EvaluateOptions, keyword_of
from edgepress.pipeline.progress import Reporter
from edgepress.pipeline.recipe import PLAIN_KEYS
from edgepress.stages.options import STAGES

pytestmark = pytest.mark.pipeline

MEASURED: dict[str, Any] = {"data": "embedded", "window": 64, "tokens": 1024}
SMALL: dict[str, Any] = MEASURED | {
    "depth": 1, "metric": "magnitude", "protect_first": 1, "protect_last": 1, "wanda": "2:4", "wanda_samples": 4,
    "wanda_length": 64, "quant": "int8", "skip": ["lora", "eora"], "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def result(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> edgepress.Result:
    """A run that starts from a model in memory."""
    return edgepress.compress(model, tokenizer=tokenizer, out=tmp_path_factory.mktemp("api") / "out", **SMALL)


def test_keywords_are_the_flags_and_their_types() -> None:
    wanted: dict[str, Any] = {key: kind for key, kind in PLAIN_KEYS.items() if key != "model"}
    for options in STAGES.values():
        kinds = get_type_hints(options)
        wanted |= {keyword_of(f.metadata["flag"], f.name): kinds[f.name] for f in fields(options)}
    kinds = get_type_hints(Settings)
    measuring: dict[str, Any] = {keyword_of(f.metadata["flag"], f.name): kinds[f.name] for f in fields(Settings)}
    for keywords, expected in ((CompressOptions, wanted), (EvaluateOptions, measuring)):
        stated = get_type_hints(keywords)
        assert stated.keys() == expected.keys()
        for name, kind in stated.items():  # files may be given as paths, and a list as one
            assert kind == expected[name] or kind in (str | Path, get_type_hints(EvaluateOptions)["sources"]), name


def test_a_model_in_memory_goes_through_the_stages(result: edgepress.Result, model: Any, tokenizer: Any) -> None:
    assert [stage.name for stage in result.stages] == ["depth", "wanda", "gptq"]
    assert result.folder == result.stages[-1].folder and result.folder.parent == result.out
    assert (result.out / "result").resolve() == result.folder.resolve()
    ids = torch.arange(40).unsqueeze(0) + 5
    source = AutoModelForCausalLM.from_pretrained(result.source.folder)
    with torch.no_grad():
        assert torch.equal(source(ids).logits, model(ids).logits)  # it was saved as it is
    last = result.model()
    plain = AutoModelForCausalLM.from_pretrained(result.stages[1].folder)
    assert len(last.model.layers) == len(plain.model.layers) == len(model.model.layers) - 1
    assert result.stages[1].pattern == "2:4"
    weight = plain.model.layers[0].mlp.up_proj.weight
    assert ((weight.view(-1, 4) == 0).sum(dim=1) >= 2).all()
    assert result.tokenizer()("once")["input_ids"] == tokenizer("once")["input_ids"]
    assert result.fits and result.report["stages"][-1]["stage"] == "gptq"


def test_the_perplexity_is_that_of_transformers(result: edgepress.Result, tokenizer: Any) -> None:
    ids = load_text("embedded", "evaluate").token_ids(tokenizer, 1024).view(-1, 64)
    net = result.stages[1].model().float()
    with torch.no_grad():
        logits = net(ids).logits[:, :-1].float()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert result.stages[1].perplexity == pytest.approx(math.exp(float(nats)), rel=1e-2)  # forward passes in bfloat16?


def test_a_frame_and_the_table_have_every_stage(result: edgepress.Result) -> None:
    frame = result.to_frame()
    assert frame["name"].tolist() == ["source", "depth", "wanda", "gptq"]
    assert frame["perplexity"].tolist()[-1] == result.perplexity
    assert frame["packed_bytes"].is_monotonic_decreasing
    for line in ("0 source", "1 depth", "2 wanda", "3 gptq", "Result:"):
        assert line in str(result)


def test_the_same_call_again_computes_nothing(result: edgepress.Result, model: Any, tokenizer: Any) -> None:
    again = edgepress.compress(model, tokenizer=tokenizer, out=result.out, **SMALL)
    assert [stage.reused for stage in again.stages] == [True] * 3
    assert [stage.reused for stage in result.stages] == [False] * 3
    assert again.source.folder == result.source.folder


def test_it_is_what_the_command_gives(result: edgepress.Result, compress: Callable[..., Any], tmp_path: Path) -> None:
    flags = [
        word
        for name, value in SMALL.items()
        if name not in ("skip", "progress")
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    done = compress("--model", result.source.folder, *flags, "--skip", "lora,eora", "--json", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0].isdigit())
    assert names == [stage.folder.name for stage in result.stages]  # they end with the fingerprints


def test_check_and_evaluate_take_what_compress_takes(
    result: edgepress.Result, model: Any, tokenizer: Any, tiny_llama: Path
) -> None:
    measured = edgepress.evaluate(result, text="embedded", window=64, tokens=1024, progress=False)
    score = measured.score("perplexity")
    assert score.value == pytest.approx(result.perplexity) and score.low < score.value < score.high
    assert "perplexity" in str(measured)
    in_memory = edgepress.evaluate(model, tokenizer=tokenizer, text="embedded", window=64, tokens=1024, progress=False)
    assert in_memory.score().value == pytest.approx(result.source.perplexity)
    with pytest.raises(edgepress.EdgepressError, match="'wikitext2' was not measured"):
        measured.score("wikitext2")

    verdict = edgepress.check(result, soc="siracusa")
    assert verdict.fits and str(verdict) == verdict.summary
    assert edgepress.check(model).weights == edgepress.check(tiny_llama).weights
    assert not edgepress.check("smollm2-135m", bits=4, embedding_bits=4).fits
    other = edgepress.check("stories260k", bits=8, set={"sram_role": "weights"})
    assert other.to_dict()["memories"] != edgepress.check("stories260k", bits=8).to_dict()["memories"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda folder: edgepress.compress(folder, wandaa="2:4"), r"no keyword 'wandaa' \(near: wanda"),
        (lambda folder: edgepress.compress(folder, wanda=3), "wanda: 3 is not text"),
        (lambda folder: edgepress.compress(folder, depth="2", lora_lr=True), "depth: '2' is not a whole number"),
        (lambda folder: edgepress.compress(folder, quant="awq"), "near: awq4"),
        (lambda folder: edgepress.compress(folder, skip=["wandaa"]), "there is no such stage"),
        (lambda folder: edgepress.compress(folder, data="embedded", depth=9), "--depth 9"),
        (lambda folder: edgepress.compress(folder / "nothing"), "no such folder"),
        (
            lambda folder: edgepress.compress(folder, out=folder / "config.json", data="embedded", skip="depth"),
            "is a file",
        ),
        (lambda folder: edgepress.compress(folder, tokenizer=object()), "goes with a model in memory"),
        (lambda folder: edgepress.compress(3), "int is no model"),
        (lambda folder: edgepress.check(folder, soc="siracus"), "near: siracusa"),
        (lambda folder: edgepress.check("nothing"), "there is no model 'nothing'"),
        (lambda folder: edgepress.evaluate(folder, tokenz=8), r"no keyword 'tokenz' \(near: tokens"),
        (lambda folder: edgepress.evaluate(folder, task="perplexit"), "perplexit"),
        (lambda folder: edgepress.evaluate(folder, window=1), "--window 1"),
    ],
)
def test_what_is_wrong_is_an_error_that_a_program_can_catch(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Path], Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(edgepress.EdgepressError, match=said):
        call(tiny_llama)
    assert not any(tmp_path.rglob("*.safetensors"))


def test_a_model_in_memory_needs_its_tokenizer(tmp_path: Path) -> None:
    from tests.models import build_model

    with pytest.raises(edgepress.EdgepressError, match="give tokenizer="):
        edgepress.compress(build_model(), out=tmp_path / "out", **SMALL)
    assert not list((tmp_path / "out").glob("*model*"))


def test_the_caller_s_warnings_and_bars_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    from transformers.utils import logging

    filters, level = list(warnings.filters), logging.get_verbosity()
    logging.enable_progress_bar()
    edgepress.check("stories260k")
    assert warnings.filters == filters and "TQDM_DISABLE" not in os.environ
    assert logging.is_progress_bar_enabled() and logging.get_verbosity() == level


def test_importing_the_package_imports_nothing_large() -> None:
    code = "import sys, edgepress; edgepress.compress; edgepress.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = (
        "import sys, edgepress; dir(edgepress); sys.exit('rich' in sys.modules or 'edgepress.pipeline' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="compres"):
        _ = edgepress.compres  # type: ignore[attr-defined]
    assert {"compress", "check", "evaluate"} < set(dir(edgepress))


def test_a_notebook_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's console says that it is a terminal; a bar there would be drawn anew with each step."""
    for jupyter, bars in ((True, False), (False, True)):
        console = Console(file=StringIO(), force_terminal=True)
        monkeypatch.setattr(console, "is_jupyter", jupyter)
        with Reporter(console) as reporter:
            assert (reporter._bars is not None) == bars
