"""Adapters of every kind on a chip: what is read, how many bytes it takes, and when it is computed."""

from __future__ import annotations

import pytest

from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.shape import with_grid
from edgepress.hardware.levers import levers
from edgepress.hardware.needs import Request
from edgepress.hardware.operators import CORES, forward, weights_read
from edgepress.hardware.soc import load_soc
from edgepress.stages.options import Lora
from edgepress.stages.recovery.shapes import with_adapters

pytestmark = pytest.mark.unit

PACKED = with_grid(shape_from_config(PRESETS["stories15m"]), 4, 32, False, 0)


@pytest.mark.parametrize("method", ["qlora", "qlora+dora", "qlora+ia3"])
def test_every_tensor_of_an_adapter_is_read_with_its_bytes(method: str) -> None:
    shape = with_adapters(PACKED, Lora(method=method, rank=4, targets="all"))
    prefix = f"base_model.model.{shape.block_prefix}."
    stored = {
        f"{shape.block_prefix}.{t.name.removeprefix(prefix)}".removesuffix(".weight"): t.nbytes
        for t in shape.adapter_tensors()
    }
    read = weights_read(shape)
    bare = weights_read(PACKED)
    assert {name: size for name, size in read.items() if name not in bare} == stored
    assert len({operator.label for operator in forward(shape, tokens=3, context=8)}) == len(forward(shape, tokens=3))


def test_factors_act_in_place_before_a_feed_forward_layer_and_after_the_others() -> None:
    operators = forward(with_adapters(PACKED, Lora(method="qlora+ia3")), tokens=3, context=8)
    names = [operator.name for operator in operators if operator.block == 0]
    assert names.index("q_proj.ia3_l") == names.index("q_proj") + 1
    assert names.index("down_proj.ia3_l") == names.index("down_proj") - 1
    found = {operator.name: operator for operator in operators if operator.block == 0}
    before, after = found["down_proj.ia3_l"], found["q_proj.ia3_l"]
    assert before.reads == before.writes == found["down_proj"].reads
    assert after.reads == after.writes == found["q_proj"].writes
    assert (after.engine, after.element_operations) == (CORES, 3 * found["q_proj"].columns)
    assert not any(name.endswith(("lora_A", "lora_B")) for name in names)


def test_magnitudes_act_on_the_sum_of_layer_and_adapter() -> None:
    operators = forward(with_adapters(PACKED, Lora(method="qlora+dora", rank=4)), tokens=1, context=8)
    names = [operator.name for operator in operators if operator.block == 0]
    at = names.index("q_proj")
    assert names[at : at + 4] == ["q_proj", "q_proj.lora_A", "q_proj.lora_B", "q_proj.lora_magnitude_vector"]


def test_an_adapter_left_out_takes_its_magnitudes_along() -> None:
    shape = with_adapters(PACKED, Lora(method="qlora+dora", rank=4))
    request = Request()
    (rank,) = (lever for lever in levers(shape, load_soc("siracusa"), request) if lever.name == "adapter rank")
    smaller, _ = rank.apply((shape, request), 2)
    assert smaller.parameters_total < shape.parameters_total
    assert rank.apply((shape, request), 0)[0].adapter_tensors() == []
