"""`export --to onnx`: ONNX Runtime loads the file, and what it computes is the checkpoint's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.forms import Grid, RealGrid
from edgepress.checkpoints.packing import unpack, unpack_linear
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import LinearShape
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.text import load_text
from edgepress.pipeline.formats import FORMATS, Wanted, Written, module_of
from edgepress.pipeline.formats import onnx as writer
from tests.conftest import TinyModel
from tests.pipeline.test_export import compressed

pytestmark = pytest.mark.pipeline

runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'edgepress[onnx]'")
# name -> precision, (pattern, bits, rank of the adapter), the type that the format itself chooses. Codes stand for
# numbers that the checkpoint's own precision rounds; in float32 it does not.
FORMS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "pruned": ("bfloat16", ("2:4", None), "dense"),
    "gptq4": ("float32", ("1:8", 4, 4), "codes"),  # and an adapter of rank 4
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Callable[[str], Checkpoint]:
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def of(form: str) -> Checkpoint:
        if form not in made:
            dtype, how, _ = FORMS[form]
            model = tiny_model(num_hidden_layers=1, tie_word_embeddings=True, dtype=dtype)
            made[form] = Checkpoint.open(compressed(folder / form, model, *how))
        return made[form]

    return of


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    """What torch.onnx made of each form, which takes seconds."""
    return {}


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Any, programs: dict[str, Any]
) -> Callable[[str], Written]:
    folder, made, trace = tmp_path_factory.mktemp("files"), {}, writer._exported

    def of(form: str) -> Written:
        def exported(model: Any, source: Checkpoint) -> Any:
            return programs.setdefault(form, trace(model, source))

        if form not in made:
            out = folder / f"{form}.onnx"
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(writer, "_exported", exported)
                made[form] = module_of(FORMATS["onnx"]).write(checkpoints(form), Wanted(out), Runtime())
            assert [path.name for path in folder.iterdir() if form in path.name] == [out.name]  # one file
        return made[form]

    return of


def step(session: Any, ids: Tensor, mask: Tensor, past: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
    """Logits and the cache after it, for tokens (b, n) behind a past; mask (b, past + n)."""
    names = [i.name for i in session.get_inputs()][3:]
    past = past or [np.zeros((len(ids), 2, 0, 16), np.float32) for _ in names]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    fed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    logits, *kept = session.run(None, fed | dict(zip(names, past, strict=True)))
    return torch.from_numpy(logits), kept


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_the_models_whole_and_in_steps_and_padded_on_the_left(
    form: str, files: Any, checkpoints: Any
) -> None:
    checkpoint, written = checkpoints(form), files(form)
    assert written.facts["type"] == FORMS[form][2] and written.nbytes == written.path.stat().st_size
    session = runtime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    model: Any = checkpoint.model(dtype=torch.float32)
    ids = torch.randint(3, 512, (2, 19), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = model(ids).logits
    whole, _ = step(session, ids, torch.ones_like(ids))
    assert torch.allclose(whole, wanted, atol=5e-5)
    parts, past = [], None
    for n in range(19):
        logits, past = step(session, ids[:, n : n + 1], torch.ones(2, n + 1, dtype=torch.long), past)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=5e-5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    shifted, _ = step(session, padded, torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1))
    assert torch.allclose(shifted[:, 3:], whole, atol=5e-5)


def test_the_files_codes_are_the_checkpoints_and_its_perplexity_too(files: Any, checkpoints: Any) -> None:
    onnx = pytest.importorskip("onnx")
    checkpoint, written = checkpoints("gptq4"), files("gptq4")
    graph = onnx.load(written.path).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(layers) == 7
    stored = checkpoint.stored_block(0)
    wanted = {}
    for x in checkpoint.shape.blocks[0].linears:
        codes, _, _ = unpack_linear({k: stored[f"{x.name}.{k}"] for k in x.grid.kinds}, 4)
        wanted[codes.flatten().numpy().tobytes()] = x.name
    found = set()
    for node in layers:
        words = torch.from_numpy(tensors[node.input[1]].copy())  # (out, blocks, bytes): two codes in a byte
        rows = words.flatten(1).view(torch.int32).T.contiguous()
        codes = unpack(rows, 4, rows.shape[0] * 8).T
        found.add(wanted[codes.flatten().numpy().tobytes()])
    assert found == {x.name for x in checkpoint.shape.blocks[0].linears}

    text, protocol = load_text("embedded", "evaluate"), Protocol("windows", 64, 1024)
    session = runtime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    windows = text.token_ids(checkpoint.tokenizer())[:1024].view(-1, 64)
    logits, _ = step(session, windows, torch.ones_like(windows))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    ours = measure(checkpoint, text, protocol, Runtime()).perplexity
    assert math.exp(float(loss)) == pytest.approx(ours, rel=1e-4)


@pytest.mark.parametrize(
    "form",
    [Grid(2, 32), Grid(3, 32), Grid(4, -1), Grid(4, 48), Grid(8, 64), Grid(8, 32, True), RealGrid(3, 32)],
    ids=str,
)
def test_the_operator_computes_with_the_blocks_of_every_grid(form: Any) -> None:
    onnx = pytest.importorskip("onnx")
    helper, g = onnx.helper, torch.Generator().manual_seed(1)
    rows, columns = 32, 192
    codes = torch.randint(2**form.bits, (rows, columns), generator=g)
    scales = torch.rand(rows, form.groups(columns), generator=g).half().float()
    zeros = torch.randint(1, 2**form.bits, scales.shape, generator=g)
    zeros = zeros.fill_(2 ** (form.bits - 1)) if form.symmetric else zeros
    stored = form.write(codes, scales, zeros + 0.25 if isinstance(form, RealGrid) else zeros)
    packed, steps, points, bits, block = writer._blocks(LinearShape("x", rows, columns, "F32", grid=form), stored)
    assert (points is None) == form.symmetric and packed.numel() * 8 <= rows * (columns + block) * bits
    points = points.float() if points is not None and points.is_floating_point() else points
    tensors = {"codes": packed, "scales": steps.float()} | ({} if points is None else {"zeros": points})
    how = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    node = helper.make_node("MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", **how)
    x, y = (helper.make_tensor_value_info(n, 1, [3, size]) for n, size in (("x", columns), ("y", rows)))
    held = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "one", [x], [y], held), opset_imports=domains, ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = torch.randn(3, columns, generator=g)
    found = torch.from_numpy(session.run(None, {"x": given.numpy()})[0])
    assert torch.allclose(found, given @ form.read(stored, rows, columns).T, rtol=1e-4, atol=1e-2)


def test_what_does_not_go_is_refused_before_anything_is_written(
    checkpoints: Any, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.onnx"

    def refused(source: Checkpoint, kind: str, words: str, error: type[Exception] = PlanError) -> None:
        with pytest.raises(error, match=words):
            writer.write(source, Wanted(out, kind), Runtime())
        assert not list(tmp_path.glob("*.onnx*"))

    refused(checkpoints("pruned"), "codes", "no layer of this checkpoint is quantised; take --type dense")
    model = tiny_model(num_hidden_layers=1, tie_word_embeddings=True, dtype="bfloat16")
    for name, how, words in (
        ("nf4", {"codebook": "nf4"}, "levels of nf4"),
        ("ordered", {"bits": 4, "order": True}, "groups out of storage order"),
    ):
        given = {"pattern": None, "bits": None, **how}
        refused(Checkpoint.open(compressed(tmp_path / name, model, **given)), "codes", words)
    monkeypatch.setattr(writer, "_exported", lambda model, source: (_ for _ in ()).throw(AssertionError("too late")))
    refused(checkpoints("pruned"), "codes", "no layer")
    monkeypatch.setattr(writer.importlib.util, "find_spec", lambda name: None)
    refused(checkpoints("pruned"), "", r"pip install 'edgepress\[onnx\]'")


def test_a_file_that_computes_something_else_takes_no_name(
    files: Any, programs: Any, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files("pruned")
    monkeypatch.setattr(writer, "_exported", lambda model, source: programs["pruned"])
    with pytest.raises(NumericsError, match=r"onnxruntime .* gives logits that differ .*; nothing is written"):
        writer.write(checkpoints("gptq4"), Wanted(tmp_path / "model.onnx"), Runtime())
    assert not list(tmp_path.iterdir())


def test_weights_above_the_limit_of_one_file_lie_beside_it(
    files: Any, programs: Any, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files("pruned")
    monkeypatch.setattr(writer, "_exported", lambda model, source: programs["pruned"])
    monkeypatch.setattr(writer, "_ONE_FILE", 1000)
    written = writer.write(checkpoints("pruned"), Wanted(tmp_path / "model.onnx"), Runtime())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert written.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    session = runtime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    ids = torch.randint(3, 512, (1, 9))
    with torch.no_grad():
        wanted = checkpoints("pruned").model(dtype=torch.float32)(ids).logits
    assert torch.allclose(step(session, ids, torch.ones_like(ids))[0], wanted, atol=2e-5)
