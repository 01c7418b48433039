"""The way to add a method that stages/README.md shows: one file, one line, and it runs."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import lora, recovery
from edgepress.stages.options import Lora
from edgepress.stages.recovery.shapes import trainable_parameters
from tests.stages.lora_help import options, text

pytestmark = pytest.mark.unit

README = Path(lora.__file__).with_name("README.md").read_text()


def test_the_readmes_method_runs(
    masked: Checkpoint, writer: CheckpointWriter, seal: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = README[README.index("## A way to recover") :]
    code, line = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)[:2]
    name, path = re.fullmatch(r'\s*"(\w+)": "([\w.]+)",\s*', line).groups()
    module = types.ModuleType(path)
    exec(compile(code, path, "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setitem(recovery.ADAPTERS, name, path)
    monkeypatch.setattr(recovery, "METHODS", (*recovery.METHODS, name))

    chosen = options(method=name, learning_rate=2e-2)
    facts = lora.run(masked, writer, text(), chosen, Runtime())
    assert facts["trainable_parameters"] == trainable_parameters(masked.shape, Lora(rank=chosen.rank))
    merged = seal(writer, masked, pattern="2:4")
    for block in range(len(masked.shape.blocks)):
        old, new = (c.block(block)["self_attn.q_proj.weight"] for c in (masked, merged))
        torch.testing.assert_close(new.norm(dim=1), old.norm(dim=1), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(new, old, atol=1e-3)
        assert torch.equal(new == 0, old == 0)


def test_the_table_lists_every_method() -> None:
    section = README[README.index("## A way to recover") :]
    listed = dict(re.findall(r"^\| `(\w+)`[^|]*\| `(\w+)\.py` \|", section, flags=re.MULTILINE))
    assert listed == {name: name for name in recovery.METHODS}
