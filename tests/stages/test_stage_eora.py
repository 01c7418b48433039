"""EoRA against the optimum found by brute force, and against GPTQModel's own computation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import depth, eora, gptq
from edgepress.stages.options import Depth, Eora, Gptq
from edgepress.stages.reference import reference_weights

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)


def inputs(seed: int, columns: int, tokens: int) -> Tensor:
    """Correlated features of very different size, (tokens, in)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    spread = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(tokens, columns, generator=generator) @ mixing * spread


def objective(error: Tensor, X: Tensor, B: Tensor, A: Tensor) -> float:
    """norm((dW - B A) X)^2 with X as (tokens, in)."""
    return float((X.double() @ (error.double() - B.double() @ A.double()).T).square().sum())


def optimum(error: Tensor, X: Tensor, rank: int) -> float:
    """Eckart and Young: what no rank-r answer to dW X can get below."""
    singular = np.linalg.svd(X.double().numpy() @ error.double().numpy().T, compute_uv=False)
    return float((singular[rank:] ** 2).sum())


def whitened(error: Tensor, X: Tensor, rank: int) -> float:
    """The same by another way: whiten, truncate an SVD, take the whitening back."""
    _, s, Vt = np.linalg.svd(X.double().numpy(), full_matrices=False)
    U, S, Wt = np.linalg.svd(error.double().numpy() @ Vt.T * s, full_matrices=False)
    answer = (U[:, :rank] * S[:rank]) @ Wt[:rank] / s @ Vt
    delta = error.double().numpy() - answer
    return float(((X.double().numpy() @ delta.T) ** 2).sum())


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_it_reaches_the_optimum(shape: tuple[int, int], rank: int) -> None:
    error = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    X = inputs(2, shape[1], 400)
    B, A = eora.compensate(error, X.T @ X, rank)
    assert B.shape == (shape[0], rank)
    assert A.shape == (rank, shape[1])
    best = optimum(error, X, rank)
    assert best == pytest.approx(whitened(error, X, rank), rel=1e-9)
    assert objective(error, X, B, A) == pytest.approx(best, rel=1e-4)
    # and it is not what a plain SVD of the error gives
    U, S, V = torch.linalg.svd(error, full_matrices=False)
    assert objective(error, X, U[:, :rank] * S[:rank], V[:rank]) > 1.02 * best


def test_no_small_change_of_the_answer_is_better() -> None:
    error, X = torch.randn(20, 24, generator=torch.Generator().manual_seed(3)), inputs(4, 24, 300)
    B, A = eora.compensate(error, X.T @ X, 5)
    best = objective(error, X, B, A)
    generator = torch.Generator().manual_seed(5)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(50):
            dB, dA = torch.randn(B.shape, generator=generator), torch.randn(A.shape, generator=generator)
            assert objective(error, X, B + size * dB, A + size * dA) > best


@pytest.mark.parametrize("rank", [2, 8])
def test_it_is_as_good_as_gptqmodels(rank: int) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    with quiet_import():
        from gptqmodel.eora.eora import eora_compute_lora
    error, X = 0.01 * torch.randn(64, 48, generator=torch.Generator().manual_seed(6)), inputs(7, 48, 500)
    gram = X.T @ X
    A, B = eora_compute_lora(error, "layer", gram.clone(), rank, torch.float32, torch.device("cpu"))
    ours = objective(error, X, *eora.compensate(error, gram, rank))
    theirs = objective(error, X, B, A)
    assert ours == pytest.approx(theirs, rel=0.01)
    assert ours <= theirs * 1.0001


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_fewer_tokens_than_features(tokens: int) -> None:
    error, X = torch.randn(24, 32, generator=torch.Generator().manual_seed(8)), inputs(9, 32, tokens)
    B, A = eora.compensate(error, X.T @ X, 8)
    assert bool(torch.isfinite(B).all())
    assert bool(torch.isfinite(A).all())
    nothing = objective(error, X, B * 0, A * 0)
    assert objective(error, X, B, A) == pytest.approx(optimum(error, X, 8), rel=1e-3, abs=1e-6 * nothing)
    # directions that no input has are not blown up: no weight pattern ends further from what is wanted
    assert float((error - B @ A).norm()) <= float(error.norm()) * 1.0001


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_shrinkage_reaches_the_optimum_on_the_shrunk_covariance(share: float) -> None:
    error, X = torch.randn(24, 32, generator=torch.Generator().manual_seed(10)), inputs(11, 32, 300)
    gram = (X.T @ X).double().numpy()
    believed = (1 - share) * gram + share * np.diag(np.diag(gram))
    root = np.linalg.cholesky(believed)
    singular = np.linalg.svd(error.double().numpy() @ root, compute_uv=False)
    fit = eora.fitted(error, X.T @ X, Eora(rank=6, bits=16, shrinkage=share), torch.float32)
    delta = error.double().numpy() - fit.delta.double().numpy()
    assert float(((delta @ root) ** 2).sum()) == pytest.approx(float((singular[6:] ** 2).sum()), rel=1e-4)
    # what is told is the error on the calibration's own inputs
    assert fit.after == pytest.approx(float((delta @ gram * delta).sum()), rel=1e-4)
    assert fit.before == pytest.approx(objective(error, X, torch.zeros(24, 1), torch.zeros(1, 32)), rel=1e-4)


def test_shrinkage_by_default_leaves_less_error_on_other_inputs_when_calibration_is_short() -> None:
    better = 0
    for seed in range(10):
        error, X = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed)), inputs(20 + seed, 64, 4096)
        few, others = X[:96], X[96:]
        plain, shrunk = (
            eora.fitted(error, few.T @ few, options, torch.float32)
            for options in (Eora(rank=8, bits=16, shrinkage=0), Eora(rank=8, bits=16))
        )
        assert plain.after <= shrunk.after  # on the calibration's own
        better += objective(error, others, shrunk.B, shrunk.A) < objective(error, others, plain.B, plain.A)
    assert better >= 9


def test_inputs_or_errors_that_are_zero() -> None:
    for error, gram in [(torch.zeros(8, 6), torch.eye(6)), (torch.ones(8, 6), torch.zeros(6, 6))]:
        B, A = eora.compensate(error, gram, 3)
        assert bool(torch.isfinite(B).all())
        assert bool(torch.isfinite(A).all())
        assert float((B @ A).abs().max()) < 1e-6


@given(
    seed=st.integers(0, 10**6),
    out=st.integers(2, 24),
    columns=st.integers(2, 24),
    tokens=st.integers(1, 64),
    share=st.floats(0.05, 1),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
    error_rank=st.integers(1, 24),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_never_worse_than_nothing(
    seed: int, out: int, columns: int, tokens: int, share: float, size: float, error_rank: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(out, error_rank, generator=generator) @ torch.randn(error_rank, columns, generator=generator)
    X = inputs(seed, columns, tokens) * size
    rank = max(1, int(share * min(out, columns)))
    B, A = eora.compensate(error, X.T @ X, rank)
    nothing = objective(error, X, B * 0, A * 0)
    assert objective(error, X, B, A) <= optimum(error, X, rank) * 1.001 + 1e-6 * nothing


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(
    masked: Checkpoint,
    tokens: Callable[..., TokenBatches],
    seal: Callable[..., Checkpoint],
    tmp_path_factory: pytest.TempPathFactory,
) -> Checkpoint:
    target = CheckpointWriter(tmp_path_factory.mktemp("quantised"))
    gptq.run(masked, target, tokens(8), Gptq(group=32, quant="gptq3"), RUNTIME)
    return seal(target, masked, pattern="2:4")


def test_the_stage_compensates_each_block_behind_the_compensated_ones(
    masked: Checkpoint,
    quantised: Checkpoint,
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
) -> None:
    ids, options = tokens(8), Eora(rank=4, shrinkage=0)
    facts = eora.run(quantised, writer, ids, options, RUNTIME)
    result = seal(writer, quantised, pattern="2:4")
    planned = eora.plan(quantised.shape, options)
    assert result.shape.parameters_total == planned.parameters_total
    assert result.facts()["file_bytes"] == planned.file_bytes

    model = quantised.model()
    for index, block in enumerate(result.shape.blocks):
        seen: dict[str, Tensor] = {}
        handles = [
            m.register_forward_pre_hook(lambda _, x, name=name, seen=seen: seen.update({name: x[0].flatten(0, 1)}))
            for name, m in model.model.layers[index].named_modules()
            if isinstance(m, torch.nn.Linear)
        ]
        with torch.no_grad():
            model(input_ids=ids.ids)
        for handle in handles:
            handle.remove()
        dense, present, after = masked.block(index), quantised.block(index), result.block(index)
        for linear in block.linears:
            key = f"{linear.name}.weight"
            assert linear.adapter_rank == 4
            assert torch.equal(result.base_weight(index, linear), present[key])  # codes untouched, mask too
            X, error = seen[linear.name], dense[key] - present[key]
            energy = float((X.double() @ dense[key].double().T).square().sum())
            before = objective(error, X, torch.zeros(1, 1).expand(error.shape[0], 1), torch.zeros(1, error.shape[1]))
            left = float((X.double() @ (dense[key] - after[key]).double().T).square().sum())
            said = facts["blocks"][index][linear.name]
            assert said["error_before"] == pytest.approx(before / energy, rel=1e-3)
            assert said["error_after"] == pytest.approx(left / energy, rel=1e-2)
            assert left < 0.9 * before
            assert left == pytest.approx(optimum(error, X, 4), rel=1e-2)
            model.model.layers[index].get_submodule(linear.name).weight.data = after[key].clone()


def test_the_adapter_loads_in_peft_and_gives_the_same_weights(
    quantised: Checkpoint,
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
) -> None:
    with quiet_import():
        from peft import PeftModel
    eora.run(quantised, writer, tokens(8), Eora(rank=4), RUNTIME)
    result, ids = seal(writer, quantised, pattern="2:4"), tokens(2, seed=9).ids
    with quiet_import():
        model = PeftModel.from_pretrained(quantised.model(), str(writer.folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, result.model()(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    config = json.loads((writer.folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    with pytest.raises(PlanError, match="already carries an adapter"):
        eora.plan(result.shape, Eora(rank=4))


def test_against_dense_follows_the_recorded_blocks(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    seal: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    source = build("llama")
    first, second = CheckpointWriter(tmp_path / "depth"), CheckpointWriter(tmp_path / "gptq")
    options = Depth(remove=2, metric="magnitude", protect_first=1, protect_last=1)
    kept = depth.run(source, first, tokens(), options, RUNTIME)["kept_blocks"]
    shallow = seal(first, source, blocks=kept)
    gptq.run(shallow, second, tokens(), Gptq(group=32), RUNTIME)
    small = seal(second, shallow, blocks=kept)
    dense, numbers = reference_weights(small, "dense")
    assert (dense.folder, numbers) == (source.folder, kept)
    parent, numbers = reference_weights(small, "parent")
    assert (parent.folder, numbers) == (shallow.folder, [0, 1, 2, 3])
    unrecorded = seal(CheckpointWriter(tmp_path / "gptq"), shallow)
    with pytest.raises(CheckpointError, match="not recorded which blocks"):
        reference_weights(unrecorded, "dense")


def test_the_default_rank_is_what_the_smallest_layer_has_where_that_is_less(
    quantised: Checkpoint,
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
) -> None:
    least = min(min(x.out_features, x.in_features) for block in quantised.shape.blocks for x in block.linears)
    assert least < Eora.rank
    facts = eora.run(quantised, writer, tokens(8), Eora(), RUNTIME)
    assert facts["rank"] == least
    config = json.loads((writer.folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == least
    result = seal(writer, quantised, pattern="2:4")
    assert result.shape.parameters_total == eora.plan(quantised.shape, Eora(rank=least)).parameters_total
    assert result.facts()["file_bytes"] == eora.plan(quantised.shape, Eora()).file_bytes
    assert eora.remarks(quantised.shape, Eora()) == [
        f"eora: rank {least}, which the smallest quantised layer has, and not 64"
    ]
    assert eora.remarks(quantised.shape, Eora(rank=least)) == []
    wide = gptq.plan(shape_from_config(PRESETS["smollm2-135m"]), Gptq())
    assert {x.adapter_rank for block in eora.plan(wide, Eora()).blocks for x in block.linears} == {64}
    assert eora.remarks(wide, Eora()) == []


def test_plan_refuses_what_cannot_be() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    with pytest.raises(PlanError, match="nothing is quantised before it; use --skip eora"):
        eora.plan(shape, Eora())
    packed = gptq.plan(shape, Gptq())
    with pytest.raises(PlanError, match="--eora 193: the smallest quantised layer has rank 192"):
        eora.plan(packed, Eora(rank=193))
    planned = eora.plan(packed, Eora(rank=8))
    adapters = sum(8 * (x.out_features + x.in_features) for block in shape.blocks for x in block.linears)
    assert planned.parameters_total == shape.parameters_total + adapters
