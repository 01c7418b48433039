"""`compress export --to deeploy`: the graph computes what was measured, on ONNX's own evaluator and token by token."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.packing import unpack
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.sources import open_source
from edgepress.hardware.deeploy.graph import Graph
from edgepress.hardware.deeploy.memory import compiled, interpreter
from edgepress.hardware.deeploy.model import continued, step, texts
from edgepress.hardware.rv32.native import find_compiler
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.deeploy import Written, perplexity, plan_export, read_model, write
from tests.conftest import TinyModel
from tests.kernels import c_hardswish, c_requant, c_rms_norm, c_softmax
from tests.pipeline.test_export import compressed

pytestmark = pytest.mark.pipeline

CONTEXT, PROMPT, NEW = 32, "for every value", 8
TWO: dict[str, Any] = {"num_hidden_layers": 2}
# Without attention windows shorter than the context, which the graph has not.
FULL: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "intermediate_size": 100},
    "mistral": {"sliding_window": 64},
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's perplexity tells nothing."""
    monkeypatch.setattr("edgepress.pipeline.deeploy.CHOSEN_ON", 256)
    monkeypatch.setattr("edgepress.pipeline.deeploy.MEASURED_ON", 256)


@pytest.fixture
def onnx() -> Any:
    return pytest.importorskip("onnx", reason='the graph needs onnx: pip install "edgepress[deeploy]"')


def exported(checkpoint: Path, out: Path, context: int = CONTEXT, text: str = "embedded", new: int = NEW) -> Written:
    planned = plan_export(Checkpoint.open(checkpoint), load_soc("siracusa"), PROMPT, new, context, text)
    return write(planned, out, Runtime())


def evaluated(folder: Path) -> list[np.ndarray]:
    """The graph's outputs by onnx's reference evaluator, with kernels written for the tests."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    def ints(values: Any) -> list[int]:
        assert np.all(values == np.round(values))
        return [int(v) for v in np.asarray(values).ravel()]

    def whole(attribute: Any) -> int:
        return int(np.asarray(attribute).ravel()[0])

    class RequantShift(OpRun):  # type: ignore[misc]
        op_domain = "PACTOps"

        def _run(
            self, x: Any, mul: Any, add: Any, div: Any = None, n_levels_out: Any = None, signed: Any = None
        ) -> Any:
            assert whole(n_levels_out) == 256 and whole(signed) == 1
            shift, columns = whole(div).bit_length() - 1, x.shape[-1]
            muls, adds = (ints(np.broadcast_to(y, columns)) for y in (mul, add))
            found = [c_requant(v, muls[k % columns], adds[k % columns], shift) for k, v in enumerate(ints(x))]
            return (np.array(found, dtype=np.float32).reshape(x.shape),)

    class iRMSNorm(OpRun):  # type: ignore[misc]  # noqa: N801
        op_domain = "PACTOps"

        def _run(self, x: Any, weight: Any, D: int = 0, n_levels: int = 0) -> Any:
            rows = [c_rms_norm(ints(row), ints(weight), D.bit_length() - 1) for row in x.reshape(-1, x.shape[-1])]
            return (np.array(rows, dtype=np.float32).reshape(x.shape),)

    class iSoftmax(OpRun):  # type: ignore[misc]  # noqa: N801
        op_domain = "PACTOps"

        def _run(
            self, x: Any, coeffA: Any = 0, coeffB: Any = 0, coeffC: Any = 0, log2: Any = 0, n_levels: Any = 0
        ) -> Any:  # fmt: skip
            constants = whole(log2), whole(coeffB), whole(coeffC)
            rows = [c_softmax(ints(row), *constants) for row in x.reshape(-1, x.shape[-1])]
            return (np.array(rows, dtype=np.float32).reshape(x.shape),)

    class iHardswish(OpRun):  # type: ignore[misc]  # noqa: N801
        op_domain = "PACTOps"

        def _run(self, x: Any, one_over_six: int = 0, three: int = 0, six: int = 0) -> Any:
            found = [c_hardswish(v, one_over_six, three, six) for v in ints(x)]
            return (np.array(found, dtype=np.float32).reshape(x.shape),)

    session = ReferenceEvaluator(str(folder / "network.onnx"), new_ops=[RequantShift, iRMSNorm, iSoftmax, iHardswish])
    with np.load(folder / "inputs.npz") as inputs:
        found: list[np.ndarray] = session.run(None, {name: inputs[name].astype(np.float32) for name in inputs.files})
    return found


@pytest.mark.parametrize("family", FULL)
def test_onnx_computes_the_outputs_that_are_written(
    family: str, tiny_model: TinyModel, tmp_path: Path, onnx: Any
) -> None:
    written = exported(tiny_model(family, **TWO | FULL[family]), tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "network.onnx")
    onnx.checker.check_model(model)
    known = {info.name for info in [*model.graph.value_info, *model.graph.input, *model.graph.output]}
    assert {name for node in model.graph.node for name in node.output} <= known  # Deeploy's passes need all shapes
    with np.load(tmp_path / "out" / "outputs.npz") as outputs:
        wanted = [outputs[f"output_{k}"] for k in range(len(outputs.files))]
    found = evaluated(tmp_path / "out")
    assert len(found) == len(wanted) == 1 + 2 * 2
    for ours, theirs in zip(wanted, found, strict=True):
        assert np.array_equal(ours, theirs)
    assert len(np.unique(wanted[0])) > 8
    assert written.tokens[-1] == int(wanted[0].argmax())


def test_a_step_with_a_cache_is_what_whole_texts_give(tiny_model: TinyModel) -> None:
    model, _, _ = read_model(Checkpoint.open(tiny_model("llama", **TWO)))
    ids = torch.randint(3, 512, (3, 12), generator=torch.Generator().manual_seed(1)).numpy()
    chosen: dict[str, Any] = {}
    texts(model, ids, chosen)
    logits = texts(model, ids, chosen).outputs[0].value[1, :, 0]
    past, found = np.zeros((2, 2, model.kv_heads, 11, model.head_dim)), []
    for position, token in enumerate(ids[1]):
        graph: Graph = step(model, model.codes[token] * model.steps[token], position, past, 12, chosen)
        found.append(graph.outputs[0].value.ravel())
        for place, tensor in enumerate(graph.outputs[1:] if position < 11 else []):
            past[place // 2, place % 2, :, position] = tensor.value[0, 0, :, 0]
    assert np.array_equal(np.array(found), logits)
    tokens, _ = continued(model, chosen, [int(t) for t in ids[1, :5]], 3, 12)
    assert tokens[5] == int(logits[4].argmax()) and len(tokens) == 8


def test_constants_are_fitted_to_transformers_own_numbers(tiny_model: TinyModel) -> None:
    for family in FULL:
        checkpoint = Checkpoint.open(tiny_model(family, **TWO | FULL[family]))
        model, _, _ = read_model(checkpoint)
        ids = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(2))
        real = texts(model, ids.numpy(), {}).outputs[0].real
        with torch.no_grad():
            wanted = checkpoint.model(dtype=torch.float32)(ids).logits
        assert real is not None
        assert torch.allclose(torch.from_numpy(real[:, :, 0]), wanted.double(), atol=2e-3, rtol=1e-3)


def test_symmetric_codes_of_eight_bits_go_in_unchanged(tiny_model: TinyModel, tmp_path: Path, onnx: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    made = compressed(tmp_path / "model", model, None, 8, group=-1, symmetric=True)
    written = exported(made, tmp_path / "out", new=2)
    assert written.kept == written.layers == 14 and written.weight_error == 0
    graph = onnx.load(tmp_path / "out" / "network.onnx").graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    matrices = [constants[n.input[1]] for n in graph.node if n.op_type == "MatMul" and n.input[1] in constants]
    stored = Checkpoint.open(made).stored_block(1)
    codes = unpack(stored["mlp.up_proj.qweight"], 8, 64).numpy() - 128
    assert any(np.array_equal(codes, matrix) for matrix in matrices)
    other = exported(compressed(tmp_path / "m4", model, None, 4, rank=4), tmp_path / "out4", new=2)
    assert other.kept == 0 and 0 < other.weight_error < 1e-3


def test_what_deeploy_puts_into_its_weight_memory_is_predicted(
    tiny_model: TinyModel, tmp_path: Path, onnx: Any
) -> None:
    exported(tiny_model("llama", **TWO | FULL["llama"]), tmp_path / "out", new=2)
    graph = onnx.load(tmp_path / "out" / "network.onnx").graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    weights = [shapes[n.input[1]] for n in graph.node if n.op_type == "MatMul" and n.input[1] in shapes]
    facts = json.loads((tmp_path / "out" / "deeploy.json").read_text())
    assert facts["memories"][0]["bytes"] == sum(-(-rows // 32) * 32 * columns for rows, columns in weights)
    assert len(weights) == 2 * 7 + 1
    with np.load(tmp_path / "out" / "host.npz") as host, np.load(tmp_path / "out" / "inputs.npz") as inputs:
        token = facts["tokens"][-2]
        assert np.array_equal(host["codes"][token].astype(np.int64) * host["steps"][token], inputs["input_0"].ravel())
        assert np.array_equal(host["turns"][len(facts["tokens"]) - 2], inputs["input_1"][0, 0])


@pytest.mark.real
def test_the_integer_form_of_a_real_model_costs_little() -> None:
    """stories260K, calibrated on 8 x 128 tokens and measured on 16 x 128 others: perplexity 1.05 x or better."""
    from edgepress.eval.perplexity import Protocol, measure, token_windows
    from edgepress.eval.text import load_text

    data = Path(os.environ.get("EDGEPRESS_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    stories, file = data / "stories260K" / "stories260K.bin", str(data / "tinystories" / "tinystories.txt")
    if not stories.is_file():
        pytest.skip(f"stories260K is not in {data}; EDGEPRESS_DATA may name another folder")
    checkpoint = open_source(str(stories))
    protocol, tokenizer = Protocol("windows", 128, 2048), checkpoint.tokenizer()
    test = load_text(file, "evaluate")
    model, _, _ = read_model(checkpoint)
    chosen: dict[str, Any] = {}
    texts(model, token_windows(load_text(file, "calibrate"), tokenizer, protocol)[:8].numpy(), chosen)
    found = perplexity(model, chosen, token_windows(test, tokenizer, protocol), 8)
    assert found < 1.06 * measure(checkpoint, test, protocol, Runtime()).perplexity


def test_deeploy_compiles_a_block_and_the_head(tiny_model: TinyModel, tmp_path: Path, onnx: Any) -> None:
    python = interpreter("") or pytest.skip("no Python with Deeploy on PATH: make deeploy makes one and runs this test")
    model = tiny_model("llama", num_hidden_layers=1)
    planned = plan_export(Checkpoint.open(model), load_soc("siracusa"), PROMPT, 2, CONTEXT, "embedded")
    write(planned, tmp_path / "out", Runtime())
    found = compiled(tmp_path / "out", python, planned.uses)
    print(json.dumps(found))
    assert found["jobs"] == 8  # q, k, v, o, gate, up, down and the head
    weights = found["memories"]["WeightMemory_SRAM"]
    assert weights["static"] == planned.uses[0].nbytes and weights["dynamic"] == 0
    theirs = found["memories"]["L2"]
    assert theirs["static"] + theirs["dynamic"] == pytest.approx(planned.uses[1].nbytes, rel=0.25)
    assert "PULPSoftmax_i8_u8" in (tmp_path / "out" / "deeploy" / "Network.c").read_text()


def test_what_deeploy_compiles_for_one_core_gives_the_outputs_that_were_written(
    tiny_model: TinyModel, tmp_path: Path, onnx: Any
) -> None:
    python = interpreter("") or pytest.skip("no Python with Deeploy on PATH: make deeploy makes one and runs this test")
    folder, own = tmp_path / "out", Path(__file__).parents[1] / "deeploy_host"
    exported(tiny_model("llama", num_hidden_layers=1), folder, new=2)
    subprocess.run([python, "-I", own / "generate.py", folder], check=True, capture_output=True)
    source = (folder / "host" / "Network.c").read_text()
    command = [*find_compiler(), "-O1", "-shared", "-fPIC", "-fwrapv", f"-I{own}", "-o", "network.so", "Network.c"]
    subprocess.run(command, cwd=folder / "host", check=True)
    program = ctypes.CDLL(str(folder / "host" / "network.so"))
    program.InitNetwork()

    def place(name: str) -> tuple[int, str]:
        (kind,) = re.findall(rf"(u?int\d+)_t\* DeeployNetwork_{name};", source)
        return ctypes.c_void_p.in_dll(program, f"DeeployNetwork_{name}").value or 0, kind

    with np.load(folder / "inputs.npz") as inputs, np.load(folder / "outputs.npz") as outputs:
        for name in inputs.files:
            address, kind = place(name)
            values = np.ascontiguousarray(inputs[name].astype(kind))
            ctypes.memmove(address, values.ctypes.data, values.nbytes)
        program.RunNetwork()
        assert len(outputs.files) == 3  # logits, the token's keys and values
        for name in outputs.files:
            address, kind = place(name)
            nbytes = outputs[name].size * np.dtype(kind).itemsize
            assert np.array_equal(np.frombuffer(ctypes.string_at(address, nbytes), kind), outputs[name].ravel()), name


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "overrides", "words"), [
    ("gemma2", {}, "the family 'gemma2': the graph knows the blocks of llama, mistral, qwen2"),
    ("mistral", {}, "attention over a sliding window of 8 tokens: give --context 8 or fewer"),
    ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, "need multiples of 16"),
    ("llama", {"hidden_size": 72}, "a width of 72: Deeploy's kernels need multiples of 16"),
    ("llama", {"hidden_act": "gelu"}, "the activation function 'gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of type 'dynamic'"),
])  # fmt: skip
def test_a_model_that_the_graph_cannot_express_is_refused_by_name(
    family: str, overrides: dict[str, Any], words: str, tiny_model: TinyModel, onnx: Any
) -> None:
    with pytest.raises(PlanError) as error:
        plan_export(Checkpoint.open(tiny_model(family, **overrides)), load_soc("siracusa"), "a", 2, 34, "embedded")
    assert words in str(error.value)


def test_other_mistakes_get_one_message(tiny_model: TinyModel, tmp_path: Path, onnx: Any) -> None:
    checkpoint = Checkpoint.open(tiny_model("llama"))
    for soc, tokens, context, words in (
        ("siracusa", 2, 512, "the model has positions for 2 to 256"),
        ("siracusa", 40, 32, "all must go into the context of 32"),
        ("gap9", 2, 32, "Deeploy's target Siracusa_w_neureka"),
    ):
        with pytest.raises(PlanError) as error:
            plan_export(checkpoint, load_soc(soc), PROMPT, tokens, context, "embedded")
        assert words in str(error.value)
    with pytest.raises(PlanError, match="is no Python that has Deeploy; install it: python3 -m venv"):
        interpreter(sys.executable)


def test_without_onnx_the_extra_is_named(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(PlanError, match=r'pip install "edgepress\[deeploy\]"'):
        plan_export(Checkpoint.open(tiny_model("llama")), load_soc("siracusa"), PROMPT, 2, 32, "embedded")


def test_sums_that_outgrow_a_register_are_told(
    tiny_model: TinyModel, tmp_path: Path, onnx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepress.hardware.deeploy.graph.BETWEEN", 2.0**10)
    with pytest.raises(NumericsError, match="the integer form outgrows its registers"):
        exported(tiny_model("llama", **TWO), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_what_does_not_fit_and_writes_by_force(
    tiny_model: TinyModel, tmp_path: Path, compress: Callable[..., Any], onnx: Any
) -> None:
    chip = tmp_path / "small.toml"
    chip.write_text(
        'based_on = "siracusa"\n[memories.L2]\n'
        'capacity = { value = 1080000, unit = "B", kind = "stated", source = "a test" }\n'
    )
    model = tiny_model("llama", **TWO)
    arguments = ("export", model, "--to", "deeploy", "--soc", chip, "--context", 32, "--tokens", 4, "-o")
    done = compress(*arguments, tmp_path / "out")
    assert done.returncode == 3 and not (tmp_path / "out").exists()
    assert "the graph does not fit Siracusa: L2 would hold" in done.stdout and "KV cache" in done.stdout
    done = compress(*arguments, tmp_path / "out", "--force")
    assert done.returncode == 0, done.stderr
    assert "in floating point" in done.stdout
    assert {"network.onnx", "inputs.npz", "outputs.npz"} <= {path.name for path in (tmp_path / "out").iterdir()}
