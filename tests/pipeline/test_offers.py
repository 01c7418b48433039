"""What `check` and `fit` offer is what the stages' plans accept, and comes to the bytes that were counted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.check import check
from edgepress.hardware.levers import find_levers
from edgepress.hardware.needs import Request, needs
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.fit import command_of, fit
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build
from edgepress.stages.options import STAGES
from tests.models import tiny_config

pytestmark = pytest.mark.pipeline
Command = Callable[..., Any]

CHIPS = ("siracusa", "siracusa-neureka", "siracusa:sram_role=weights", "gap9", "rp2350", "stm32n6")
ODD = tiny_config("llama", hidden_size=40, intermediate_size=90, head_dim=10)  # no side is a multiple of 32
MODELS = {name: PRESETS[name] for name in ("stories260k", "stories15m", "smollm2-135m", "microllama")}
MODELS |= {"llama-3.2-1b": PRESETS["llama-3.2-1b"], "odd": ODD, "gemma3": tiny_config("gemma3_text")}
STAGE_FLAGS = {f.metadata["flag"]: (f"{s}.{f.name}", f.default) for s, o in STAGES.items() for f in fields(o)}
CHECK_FLAGS = {"--context": "context", "--kv-bits": "kv_bits", "--prefill-chunk": "prefill_chunk"}
NOTHING = {"depth.remove": 0, "wanda.pattern": "none", "gptq.quant": "none", "eora.rank": 0}


def planned(shape: ModelShape, words: str) -> tuple[ModelShape, dict[str, int]]:
    """The shape by the stages' own plans from words of options, and those options that are `check`'s."""
    flags, asked, parts = dict(NOTHING), {}, shlex.split(words)
    for flag, value in zip(parts[::2], parts[1::2], strict=True):
        if flag in CHECK_FLAGS:
            asked[CHECK_FLAGS[flag]] = int(value)
        else:
            key, default = STAGE_FLAGS[flag]
            flags[key] = type(default)(value)
    steps = plan(build(None, {k: v for k, v in flags.items() if v is not None}, skip="lora"), shape)
    return (steps[-1].shape if steps else shape), asked


def offered(words: str) -> str:
    """Without what is no option: adapters are their stage's to leave out."""
    return "" if words.startswith("adapters") else words


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("request_", [Request(), Request(64, kv_bits=16, prefill_chunk=64)], ids=["usual", "chunks"])
def test_every_lever_of_a_dense_model_is_planned(chip: str, model: str, request_: Request) -> None:
    soc, shape = load_soc(chip), shape_from_config(MODELS[model])
    found = find_levers(shape, soc, request_)
    for worth in found.ranked:
        for words in {offered(worth.furthest), offered(worth.enough or "")}:
            beside = "--quant gptq4 " if words.startswith("--quant-embeddings") else ""
            after, asked = planned(shape, beside + words)
            replace(request_, **asked).require(after, soc)
            if words == worth.enough:
                assert not needs(after, soc, replace(request_, **asked)).short(soc), words
    for words in filter(None, (found.smallest, found.spread)):
        after, asked = planned(shape, " ".join(words))
        then = needs(after, soc, replace(request_, **asked))
        assert not then.short(soc), words
        if words == found.smallest:
            assert then.by_role() == found.needs_then


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_s_levers_are_for_the_one_before(chip: str, bits: int) -> None:
    soc, dense = load_soc(chip), shape_from_config(PRESETS["smollm2-135m"])
    blocks = tuple(replace(b, linears=tuple(replace(x, grid=Grid(bits, 64)) for x in b.linears)) for b in dense.blocks)
    found = find_levers(replace(dense, blocks=blocks), soc, Request())
    assert found.options_for == "the model from before it was quantised"
    for worth in found.ranked:
        beside = "--quant gptq4 " if worth.lever == "embedding bits" else ""
        planned(dense, beside + worth.furthest)
    assert find_levers(dense, soc, Request()).options_for == ""


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", ["stories260k", "stories15m", "odd"])
def test_every_command_of_fit_is_planned(chip: str, model: str) -> None:
    soc, shape = load_soc(chip), shape_from_config(MODELS[model])
    protect = (1, 1) if len(shape.blocks) < 8 else (4, 2)
    found, _ = fit(
        model, shape, soc, corpus="", sweep=None, protect=protect, best=5, context=64, kv_bits=8, activation_bits=8
    )
    assert found.fitting or found.closest
    for candidate in (*found.fitting, *found.closest):
        words = command_of("", shape, candidate.settings, "", protect).removeprefix("compress ")
        after, _ = planned(shape, words)
        verdict = check(after, soc, context=64)
        assert verdict.needs.by_role() == candidate.verdict.needs.by_role(), words
        assert verdict.fits == candidate.verdict.fits


def test_fit_of_a_quantised_checkpoint_cuts_its_vocabulary_alone(compress: Command, chain: Path) -> None:
    folder = next(chain.glob("4-*"))
    done = compress("fit", folder, "--json", "--context", 64)
    said = json.loads(done.stdout)
    assert done.returncode == 0 and any("only its vocabulary" in note for note in said["notes"])
    for entry in said["fitting"]:
        words = entry["command"].split()[1:]
        assert compress("plan", *words, "--skip", "lora").returncode == 0, words


@pytest.mark.parametrize("chip", ["siracusa", "siracusa-neureka", "gap9"])
def test_offers_as_they_are_printed(compress: Command, chip: str) -> None:
    done = compress("check", "smollm2-135m", "--soc", chip, "--json")
    levers = json.loads(done.stdout)["levers"]
    assert done.returncode == 3
    options = [word for words in levers["smallest"] for word in words.split()]
    stage = [w for pair in zip(options[::2], options[1::2], strict=True) if pair[0] not in CHECK_FLAGS for w in pair]
    asked = [w for pair in zip(options[::2], options[1::2], strict=True) if pair[0] in CHECK_FLAGS for w in pair]
    done = compress("plan", "--model", "smollm2-135m", *levers["options"].split(), "--json")
    assert done.returncode == 0, done.stderr
    assert all(word in levers["options"] for word in stage)
    assert json.loads(done.stdout)["hardware"]["fits"] or asked
    assert compress("check", "smollm2-135m", "--soc", chip, *asked).returncode == 3


def test_an_embedding_judged_as_packed_is_packed_by_the_options(compress: Command) -> None:
    done = compress("check", "smollm2-135m", "--embedding-bits", 4, "--json")
    options = json.loads(done.stdout)["levers"]["options"]
    planned_fit = compress("plan", "--model", "smollm2-135m", *options.split(), "--json")
    assert json.loads(planned_fit.stdout)["hardware"]["fits"], options


def test_three_bits_as_the_stage_leaves_them(compress: Command) -> None:
    """There is no gptq3-channel: three bits come in groups, on chips with a scale for each row too."""
    done = compress("check", "stories260k", "--soc", "siracusa-neureka", "--bits", 3, "--json")
    assert done.returncode == 0
    after, _ = planned(shape_from_config(PRESETS["stories260k"]), "--quant gptq3")
    assert json.loads(done.stdout)["footprint"]["packed_bytes"] == packed_sizes(after).total
