"""Packing against a loop over single bits, and against GPTQModel's own packing and kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.packing import dequantise, pack, pack_linear, unpack, unpack_linear
from edgepress.checkpoints.quiet import quiet_import

pytestmark = pytest.mark.unit

BITS = (3, 4, 8)
OUT, IN, GROUP = 64, 128, 32


def random_layer(bits: int, group: int = GROUP, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), scales and zeros (out, groups); the first two rows have the extreme zero points."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else IN // group
    codes = torch.randint(2**bits, (OUT, IN), generator=generator)
    scales = (torch.rand(OUT, groups, generator=generator) + 0.5).half().float()
    zeros = torch.randint(1, 2**bits, (OUT, groups), generator=generator)
    zeros[0], zeros[1] = 1, 2**bits - 1
    return codes, scales, zeros


def stream(words: Tensor, bits: int) -> list[list[int]]:
    """Codes of each column, read bit by bit."""
    columns = []
    for column in words.T.tolist():
        number = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(column))
        columns.append([number >> (bits * i) & (2**bits - 1) for i in range(len(column) * 32 // bits)])
    return columns


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_unpack_is_the_inverse_of_pack(bits: int, data: st.DataObject) -> None:
    rows, columns = 32 * data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    words = pack(codes, bits)
    assert words.shape == (rows * bits // 32, columns)
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, rows), codes)
    assert stream(words, bits) == codes.T.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_all_ones_fill_every_bit(bits: int) -> None:
    words = pack(torch.full((32, 2), 2**bits - 1), bits)
    assert torch.equal(words, torch.full((bits, 2), -1, dtype=torch.int32))
    assert torch.equal(unpack(words, bits, 32), torch.full((32, 2), 2**bits - 1))


def test_codes_that_do_not_fill_words_are_an_error() -> None:
    with pytest.raises(PlanError, match="33 codes of 4 bits"):
        pack(torch.zeros(33, 1), 4)
    assert Grid(4, 32).holds(64, 96)
    assert not Grid(4, 32).holds(64, 100)
    assert not Grid(4, 32).holds(100, 64)


@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("bits", BITS)
def test_linear_comes_back_as_it_went_in(bits: int, group: int) -> None:
    codes, scales, zeros = random_layer(bits, group)
    stored = pack_linear(codes, scales, zeros, group, bits)
    groups = 1 if group == -1 else IN // group
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        "qweight": ((IN * bits // 32, OUT), torch.int32),
        "qzeros": ((groups, OUT * bits // 32), torch.int32),
        "scales": ((groups, OUT), torch.float16),
        "g_idx": ((IN,), torch.int32),
    }
    for was, now in zip((codes, scales, zeros), unpack_linear(stored, bits), strict=True):
        assert torch.equal(was.float(), now.float())
    weight = dequantise(stored, bits)
    size = IN if group == -1 else group
    for row, column in [(0, 0), (0, IN - 1), (1, 33), (OUT - 1, 64), (17, 31), (17, 32)]:
        scale, zero = scales[row, column // size], zeros[row, column // size]
        assert weight[row, column] == scale * (codes[row, column] - zero)


@pytest.mark.parametrize("bits", BITS)
def test_a_code_at_its_zero_point_is_an_exact_zero(bits: int) -> None:
    codes, scales, zeros = random_layer(bits)
    codes[:, ::8] = zeros.repeat_interleave(GROUP, dim=1)[:, ::8]
    assert (dequantise(pack_linear(codes, scales, zeros, GROUP, bits), bits)[:, ::8] == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_what_readers_take_differently_is_refused(bits: int) -> None:
    codes, scales, zeros = random_layer(bits)
    zeros[3, 1] = 0
    stored = pack_linear(codes, scales, zeros, GROUP, bits)
    stored["qzeros"] = pack(((zeros - 1) % 2**bits).contiguous(), bits).T.contiguous()
    with pytest.raises(CheckpointError, match="zero point of 0"):
        dequantise(stored, bits)


@pytest.mark.parametrize("group", [-1, IN // GROUP])
def test_a_column_of_a_group_that_is_not_there(group: int) -> None:
    stored = pack_linear(*random_layer(4), GROUP, 4)
    stored["g_idx"][5] = group
    with pytest.raises(CheckpointError, match="not one of its 4"):
        dequantise(stored, 4)


# ------------------------------------------------------------------ GPTQModel


@pytest.fixture(scope="module")
def torch_linear() -> Any:
    with quiet_import():
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    return TorchLinear


def gptqmodel_packs(
    torch_linear: Any, method: str, codes: Tensor, scales: Tensor, zeros: Tensor, group: int, bits: int
) -> dict[str, Tensor]:
    """What GPTQModel would store in a file of format "gptq" for these codes."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    module = torch_linear(
        bits=bits, group_size=group, sym=False, desc_act=False, in_features=IN, out_features=OUT, bias=False
    )
    g_idx = (torch.arange(IN) // (IN if group == -1 else group)).int()
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight.data = scales[:, g_idx] * (codes - zeros[:, g_idx])
    getattr(module, method)(linear, scales, zeros.int(), g_idx)
    convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=GROUP, device="cpu"))
    return {name: getattr(module, name) for name in ("qweight", "qzeros", "scales", "g_idx")}


@pytest.mark.parametrize("method", ["pack_original", "pack_block"])
@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("bits", BITS)
def test_files_are_gptqmodels_to_the_bit(torch_linear: Any, bits: int, group: int, method: str) -> None:
    codes, scales, zeros = random_layer(bits, group, seed=bits)
    theirs = gptqmodel_packs(torch_linear, method, codes, scales, zeros, group, bits)
    ours = pack_linear(codes, scales, zeros, group, bits)
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype, name
        assert torch.equal(tensor, ours[name]), name
    g_idx = ours["g_idx"].long()
    assert torch.equal(dequantise(theirs, bits), scales[:, g_idx] * (codes - zeros[:, g_idx]))


@pytest.mark.parametrize("bits", BITS)
def test_gptqmodels_kernel_reads_our_files(torch_linear: Any, bits: int) -> None:
    """GPTQModel's own dequantisation of what we pack, after its load-time conversion, is ours."""
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    codes, scales, zeros = random_layer(bits, seed=10 + bits)
    stored = pack_linear(codes, scales, zeros, GROUP, bits)
    module = torch_linear(
        bits=bits, group_size=GROUP, sym=False, desc_act=False, in_features=IN, out_features=OUT, bias=False
    )
    module.load_state_dict({name: tensor.clone() for name, tensor in stored.items()})
    convert_gptq_v1_to_v2_format_module(module, bits=bits, pack_dtype=torch.int32)
    weight = module.train().dequantize_weight().T.float()
    # their product is rounded to the float16 of the scales
    assert (weight - dequantise(stored, bits)).abs().max() <= 2**bits * 1.5 * 2**-11
