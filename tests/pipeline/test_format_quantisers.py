"""Every quantiser in every format of `export`: its reader gets the checkpoint's numbers, or what works is named.

executorch is left out: it has effective weights, whatever the codes were.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.llama2c import halves_to_pairs, read_model
from edgepress.checkpoints.runtime import Runtime
from edgepress.pipeline.formats import FORMATS, Wanted, Written, module_of
from edgepress.pipeline.formats.hf import exact_block
from edgepress.stages.quantisers import METHODS
from tests.pipeline import test_format_llama2c as of_llama2c
from tests.pipeline.test_format_gguf import TABLE, ours, tensors_of

pytestmark = pytest.mark.pipeline

# ggml's type of a layer of 256 inputs; F32 where none holds its codes without loss. gptq3 has rows of odd levels.
GGUF = {
    "gptq4": "Q5_0", "gptq3": "Q4_0", "gptq8": "F32", "gptq4-channel": "Q5_0", "gptq8-channel": "F32",
    "q2_k": "Q2_K", "q3_k": "Q3_K", "q4_k": "Q4_K", "q5_k": "Q5_K", "q6_k": "Q6_K",
    "gptq2-s": "Q4_K", "gptq3-s": "Q4_K", "gptq4-s": "Q4_K", "gptq5-s": "Q5_K", "int8": "Q8_0", "int4": "Q4_0",
    "hqq4": "F32", "hqq2": "F32", "awq4": "Q5_0", "w4a8": "Q4_0", "nf4": "F32", "nf4-thesis": "F32",
}  # fmt: skip
ROUNDED = "inputs of its layers are rounded to 8 bits"
SUPERS = [name for name in METHODS if name.endswith(("_k", "-s"))]
REFUSED = {
    "onnx": dict.fromkeys(SUPERS, "whose scales are codes.*take --type dense")
    | dict.fromkeys(("nf4", "nf4-thesis"), "levels of nf4.*take --type dense")
    | {"w4a8": f"{ROUNDED}.*take --type dense"},
    "compressed-tensors": dict.fromkeys(
        (*SUPERS, "nf4", "nf4-thesis", "hqq4", "hqq2"), "one integer grid; take --to hf"
    )
    | {"w4a8": f"{ROUNDED}.*take --to hf"},
    "llama2c": {"w4a8": "inputs rounded to 8 bits; take --to gguf or --to hf"},
}
NEEDS = {"onnx": "onnxruntime", "compressed-tensors": "compressed_tensors"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, run_recipe: Callable[..., Any]) -> Any:
    """The checkpoint that stage 4 leaves, made once for each quantiser; one block with rows of 256."""
    wide = {
        "num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    place, made = tmp_path_factory.mktemp("quantisers"), {}
    model = of_llama2c.with_pieces(place / "model", tiny_model(**wide))

    def of(method: str) -> Checkpoint:
        if method not in made:
            how = {"skip": "depth,wanda,lora,eora", "gptq__quant": method, "gptq__samples": 2, "gptq__length": 64}
            made[method] = run_recipe(place / "out", model, **how).stages[-1].checkpoint
        return made[method]

    return of


def write(source: Checkpoint, form: str, out: Path, kind: str = "") -> Written:
    return module_of(FORMATS[form]).write(source, Wanted(out, kind), Runtime())


@pytest.mark.parametrize("method", METHODS)
def test_hf_gguf_and_llama2c_hold_its_numbers(method: str, stage: Any, tmp_path: Path) -> None:
    source = stage(method)
    exact = {name: tensor.float() for name, tensor in exact_block(source, 0).items()}
    plain = load_file(write(source, "hf", tmp_path / "hf", "float32").path / "model.safetensors")
    for name, tensor in exact.items():
        assert plain[f"model.layers.0.{name}"].equal(tensor), name

    write(source, "gguf", tmp_path / "model.gguf")
    found = tensors_of(tmp_path / "model.gguf")
    for name, theirs in TABLE.items():
        tensor, kind = found[f"blk.0.{theirs}.weight"]
        assert kind == GGUF[method] and tensor.equal(ours(source, 0, name)), name

    if words := REFUSED["llama2c"].get(method):
        for kind in FORMATS["llama2c"].types:
            with pytest.raises(PlanError, match=words):
                write(source, "llama2c", tmp_path / "run", kind)
        return
    _, tensors = read_model(write(source, "llama2c", tmp_path / "run", "float32").path / "model.bin")
    for name, tensor in exact.items():
        assert tensors[f"model.layers.0.{name}"].equal(tensor), name
    rounded = of_llama2c.read_int8(write(source, "llama2c", tmp_path / "runq", "int8").path / "model.bin")[2]
    for x in source.shape.blocks[0].linears:
        weight = exact[f"{x.name}.weight"]
        if x.name.endswith(("q_proj", "k_proj")):
            weight = halves_to_pairs(weight, source.shape.heads if "q_proj" in x.name else source.shape.kv_heads)
        off = (rounded[x.name][0] - weight).abs().max()
        assert off == 0 if method in ("gptq4", "gptq3", "int4", "awq4") else off <= weight.abs().max() / 254 * 1.001


@pytest.mark.parametrize("form", NEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_codes_go_in_or_are_refused_with_what_works(method: str, form: str, stage: Any, tmp_path: Path) -> None:
    """Writing compares the reader's logits with the checkpoint's itself, and raises where they are others."""
    if importlib.util.find_spec(NEEDS[form]) is None:
        pytest.skip(f"not installed: pip install 'edgepress[{form}]'")
    kind, out = "codes" if form == "onnx" else "", tmp_path / FORMATS[form].default
    if words := REFUSED[form].get(method):
        with pytest.raises(PlanError, match=words):
            write(stage(method), form, out, kind)
        assert not list(tmp_path.iterdir())
        return
    written = write(stage(method), form, out, kind)
    assert written.facts["largest_logit_difference"] < (1e-3 if form == "onnx" else 0.1)  # float16 where it decodes


@pytest.mark.parametrize("method", ["w4a8", "gptq3-s"])
def test_dense_onnx_holds_what_its_codes_cannot(method: str, stage: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="not installed: pip install 'edgepress[onnx]'")
    written = write(stage(method), "onnx", tmp_path / "model.onnx")
    assert written.facts["type"] == "dense" and torch.isfinite(torch.tensor(written.facts["largest_logit_difference"]))
