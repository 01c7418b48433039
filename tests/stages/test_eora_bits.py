"""EoRA's adapter at 8 bits: its codes, that rounding never makes it harmful, and what is said of its worth."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint, differing, eight_bit, unpacked
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter, verify
from edgepress.hardware.operators import weights_read
from edgepress.hardware.placement import weight_bytes
from edgepress.stages import eora, gptq
from edgepress.stages.options import Eora, Gptq
from tests.stages.lora_help import Watcher

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)


def problem(seed: int, out: int, columns: int, tokens: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """An error dW and inputs X (tokens, in) of very different size."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(columns, generator=generator))
    X = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) * spread
    return torch.randn(out, columns, generator=generator) * size, X


def objective(error: Tensor, X: Tensor) -> float:
    return float((X.double() @ error.double().T).square().sum())


# --- one matrix -----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-30, 1e-4, 1.0, 1e6]), within=st.sampled_from([0, 1]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_codes_are_at_most_half_a_step_off(seed: int, size: float, within: int) -> None:
    matrix = torch.randn(7, 12, generator=torch.Generator().manual_seed(seed)) * size
    codes, scales = eight_bit(matrix, within)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32
    assert scales.shape == ((7, 1) if within else (1, 12))
    assert torch.equal(codes.abs().amax(within), torch.full((12 if not within else 7,), 127, dtype=torch.int8))
    assert bool(((unpacked(codes, scales, torch.float32) - matrix).abs() <= 0.5001 * scales).all())


def test_a_rank_that_is_zero_stays_zero() -> None:
    codes, scales = eight_bit(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), 1)
    assert codes.tolist() == [[0, 0], [64, -127]]
    assert unpacked(codes, scales, torch.float32)[0].tolist() == [0, 0]


# --- one layer ------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    out=st.integers(2, 24),
    columns=st.integers(2, 24),
    tokens=st.integers(1, 64),
    share=st.floats(0.05, 1),
    size=st.sampled_from([1e-12, 1e-6, 1e-2, 1.0, 1e3]),
    bits=st.sampled_from([8, 16]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_never_worse_than_no_adapter_with_rounding_included(
    seed: int, out: int, columns: int, tokens: int, share: float, size: float, bits: int
) -> None:
    error, X = problem(seed, out, columns, tokens, size)
    options = Eora(rank=max(1, int(share * min(out, columns))), bits=bits)
    fit = eora.fitted(error, X.T @ X, options, torch.bfloat16)
    assert fit.B.dtype == fit.A.dtype == torch.bfloat16
    before, after = objective(error, X), objective(error - fit.delta, X)
    assert after <= before * (1 + 1e-5)
    assert fit.after <= fit.before
    assert fit.before == pytest.approx(before, rel=1e-3)
    for side, matrix in (("lora_A", fit.A), ("lora_B", fit.B)):
        if bits == 8:
            assert torch.equal(
                unpacked(fit.packed[f"{side}.codes"], fit.packed[f"{side}.scales"], matrix.dtype), matrix
            )


def test_eight_bits_lose_little_and_refitting_b_wins_some_of_it_back() -> None:
    kept, plain = [], []
    for seed in range(8):
        error, X = problem(seed, 48, 40, 400)
        C = X.T @ X
        full = eora.fitted(error, C, Eora(rank=12, bits=16, shrinkage=0), torch.float32)
        packed = eora.fitted(error, C, Eora(rank=12, bits=8, shrinkage=0), torch.float32)
        B, A = eora.compensate(error, C, 12)
        B, A, _ = eora.stored(B, A, 8, torch.float32)
        kept.append((packed.before - packed.after) / (full.before - full.after))
        plain.append((packed.before - objective(error - B @ A, X)) / (full.before - full.after))
        assert packed.after <= objective(error - B @ A, X) * 1.0001
    assert min(kept) > 0.95
    assert sum(kept) > sum(plain)


def test_an_error_that_is_zero_gets_an_adapter_of_zeros() -> None:
    for bits in (8, 16):
        fit = eora.fitted(torch.zeros(8, 6), torch.eye(6), Eora(rank=3, bits=bits), torch.bfloat16)
        assert not fit.delta.any()
        assert fit.after == fit.before == 0


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    seal: Callable[..., Checkpoint],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Checkpoint, Checkpoint, dict[str, Any], Watcher]:
    """A quantised checkpoint, the same with an 8-bit adapter, the stage's facts and what it said."""
    source = build("llama", blocks=3)
    folder = tmp_path_factory.mktemp("bits")
    first, second, watcher = CheckpointWriter(folder / "gptq"), CheckpointWriter(folder / "eora"), Watcher()
    gptq.run(source, first, tokens(8), Gptq(group=32, quant="gptq3"), RUNTIME)
    quantised = seal(first, source)
    runtime = Runtime(chunk_tokens=48, progress=watcher)
    facts = eora.run(quantised, second, tokens(8), Eora(rank=4, bits=8), runtime)
    return quantised, seal(second, quantised), facts, watcher


Chain = tuple[Checkpoint, Checkpoint, dict[str, Any], Watcher]


def test_the_codes_lie_beside_the_adapter_and_are_counted_everywhere(chain: Chain) -> None:
    quantised, result, _, _ = chain
    planned = eora.plan(quantised.shape, Eora(rank=4, bits=8))
    assert result.facts()["file_bytes"] == planned.file_bytes == result.shape.file_bytes
    packed = load_file(result.folder / "adapter" / "packed.safetensors")
    assert {t.name: t.shape for t in planned.packed_adapter_tensors()} == {n: tuple(t.shape) for n, t in packed.items()}
    assert not differing(result.folder)
    size = sum(t.numel() * t.element_size() for t in packed.values())
    linears = [x for block in result.shape.blocks for x in block.linears]
    assert size == sum(x.adapter_bytes for x in linears)
    assert size == sum(4 * (x.out_features + x.in_features) + 2 * 4 * 4 for x in linears)
    assert weight_bytes(result.shape).adapters == weight_bytes(planned).adapters == size
    wide = eora.plan(quantised.shape, Eora(rank=4, bits=16))
    assert weight_bytes(wide).adapters == sum(4 * (x.out_features + x.in_features) * 4 for x in linears)  # float32
    read, down = weights_read(result.shape), next(x for x in linears if x.name == "mlp.down_proj")
    assert read["model.layers.0.mlp.down_proj.lora_A"] == 4 * down.in_features  # a byte each, not 2 or 4
    assert read["model.layers.0.mlp.down_proj.lora_B"] == down.out_features * 4


def test_peft_loads_what_the_codes_stand_for(chain: Chain, tokens: Callable[..., TokenBatches]) -> None:
    with quiet_import():
        from peft import PeftModel
    quantised, result, _, _ = chain
    ids = tokens(2, seed=9).ids
    with quiet_import():
        model = PeftModel.from_pretrained(quantised.model(), str(result.folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, result.model()(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_gptqmodel_loads_it_too(chain: Chain) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    with quiet_import():
        from gptqmodel.adapter.adapter import Lora as TheirLora
    quantised, result, _, _ = chain
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    name = "self_attn.q_proj"
    theirs = TheirLora(rank=4, path=str(result.folder))
    theirs.post_init(f"model.layers.1.{name}", device=torch.device("cpu"))
    present = quantised.block(1)[f"{name}.weight"]
    expected = x @ result.block(1)[f"{name}.weight"].T
    torch.testing.assert_close(theirs.apply(x, x @ present.T), expected, rtol=1e-4, atol=1e-4)


def test_the_facts_add_up_and_one_line_says_them(chain: Chain) -> None:
    _, result, facts, watcher = chain
    layers = [layer for block in facts["blocks"] for layer in block.values()]
    assert len(layers) == 3 * 7
    assert all(layer["error_after"] <= layer["error_before"] for layer in layers)
    energy = sum(layer["output_energy"] for layer in layers)
    before, after = (sum(x[f"error_{when}"] * x["output_energy"] for x in layers) for when in ("before", "after"))
    total = facts["total"]
    assert total["error_before"] == pytest.approx(before / energy)
    assert total["error_after"] == pytest.approx(after / energy)
    assert total["bought"] == pytest.approx(1 - after / before)
    assert 0.05 < total["bought"] < 1
    assert total["adapter_bytes"] == weight_bytes(result.shape).adapters
    assert total["bought_per_kib"] == pytest.approx(total["bought"] * 1024 / total["adapter_bytes"])
    (line,) = watcher.said
    assert (
        f"{100 * total['bought']:.1f} % of it bought back by {total['adapter_bytes'] / 1024:.1f} KiB of 8-bit" in line
    )
    json.dumps(facts)


def test_an_interrupted_run_says_the_same_of_all_blocks(
    chain: Chain, tokens: Callable[..., TokenBatches], writer: CheckpointWriter
) -> None:
    class Dies(Watcher):
        def step(self, **numbers: float | str) -> None:
            if numbers.get("block") == "2/3":
                raise KeyboardInterrupt

    quantised, result, facts, _ = chain
    with pytest.raises(KeyboardInterrupt):
        eora.run(quantised, writer, tokens(8), Eora(rank=4, bits=8), Runtime(chunk_tokens=48, progress=Dies()))
    again = eora.run(quantised, CheckpointWriter(writer.folder), tokens(8), Eora(rank=4, bits=8), RUNTIME)
    assert again["total"] == facts["total"]
    for name in ("adapter_model.safetensors", "adapter/packed.safetensors"):
        assert (writer.folder / name).read_bytes() == (result.folder / name).read_bytes()


def test_verify_compares_the_codes_with_the_adapter(
    chain: Chain, seal: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches], writer: CheckpointWriter
) -> None:
    quantised, _, _, _ = chain
    eora.run(quantised, writer, tokens(8), Eora(rank=4, bits=8), RUNTIME)
    path = writer.folder / "adapter" / "packed.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("up_proj.lora_B.codes"))
    tensors[name][3, 2] ^= 64
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.lora_B\.weight is not what its packed codes stand for"):
        verify(seal(writer, quantised))
