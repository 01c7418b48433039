"""Table A.1 of the thesis that edgepress follows (A. Galavotti, appendix A.1.1): Llama-3.2-1B, pruned only, 45 rows.

Each row: blocks removed, the pattern (N of every M weights removed), parameters left in millions (those that are not
zero), size of the checkpoint in GiB (zeros stored, bfloat16). The figures are carried over by hand; the thesis calls
the unit GB.
"""

from __future__ import annotations

import pytest

from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build

pytestmark = pytest.mark.unit

_FULL = {0: 2.30, 2: 2.08, 4: 1.85, 6: 1.62, 8: 1.40}  # the size depends on depth alone
_HALF = ("1:2", "2:4", "4:8", "8:16")
_MILLIONS = {
    0: {"": 1235.8, "3:4": 506.0, "1:8": 1114.2, "6:8": 506.0, "1:16": 1175.0, "12:16": 506.0},
    2: {"": 1114.2, "3:4": 475.6, "1:8": 1007.7, "6:8": 475.6, "1:16": 1061.0, "12:16": 475.6},
    4: {"": 992.5, "3:4": 445.2, "1:8": 901.3, "6:8": 445.2, "1:16": 946.9, "12:16": 445.2},
    6: {"": 870.9, "3:4": 414.8, "1:8": 794.9, "6:8": 414.8, "1:16": 832.9},
    8: {"": 749.2, "3:4": 384.3, "1:8": 688.4},
}
_HALVED = {0: 749.3, 2: 688.4, 4: 627.6, 6: 566.8, 8: 506.0}
_HALVES = {0: _HALF, 2: _HALF, 4: _HALF, 6: _HALF[:3], 8: _HALF[:3]}

ROWS: list[tuple[int, str, float, float]] = [(0, "", 1235.8, 2.30)]  # baseline and Instruct are two rows
for _depth, _size in _FULL.items():
    ROWS += [(_depth, pattern, millions, _size) for pattern, millions in _MILLIONS[_depth].items()]
    ROWS += [(_depth, pattern, _HALVED[_depth], _size) for pattern in _HALVES[_depth]]


def test_the_table_is_whole() -> None:
    assert len(ROWS) == 45 and len(set(ROWS)) == 44


@pytest.mark.parametrize(("depth", "pattern", "millions", "gib"), ROWS)
def test_plan_gives_every_row(depth: int, pattern: str, millions: float, gib: float) -> None:
    flags = {"model": "llama-3.2-1b", "depth.remove": depth, "wanda.pattern": pattern or "none"}
    shape = shape_from_config(PRESETS["llama-3.2-1b"])
    for stage in plan(build(None, flags, "lora,gptq,eora"), shape):
        shape = stage.shape
    assert round(shape.parameters_nonzero / 1e6, 1) == millions
    assert round(shape.file_bytes / 2**30, 2) == gib
