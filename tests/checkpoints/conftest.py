"""What the tests of `checkpoints` share: copies of tiny models that may be changed, and finished checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.headers import shape_from_folder
from edgepress.checkpoints.manifest import Manifest, describe_files
from edgepress.checkpoints.packed_sizes import packed_sizes

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that equal work gives equal bits; and the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_model(tiny_model: TinyModel, tmp_path: Path) -> TinyModel:
    """own_model(family="llama", **overrides): as tiny_model, but a copy of the test's own."""

    def copy(family: str = "llama", **overrides: Any) -> Path:
        return Path(shutil.copytree(tiny_model(family, **overrides), tmp_path / family))

    return copy


@pytest.fixture
def finish() -> Callable[..., Checkpoint]:
    """finish(folder, **manifest fields): give the folder a manifest that is true unless told otherwise, and open it."""

    def write(folder: Path, **fields: Any) -> Checkpoint:
        shape = shape_from_folder(folder)
        told: dict[str, Any] = {
            "stage": "depth",
            "stage_version": 1,
            "options": {"blocks": 2},
            "fingerprint": "f" * 64,
            "parent": None,
            "seed": 7,
            "dtype": "float32",
            "device": "cpu",
            "calibration": None,
            "parameters_total": shape.parameters_total,
            "parameters_nonzero": shape.parameters_total,
            "sparsity": None,
            "file_bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
            "packed_bytes": packed_sizes(shape).total,
            "seconds": 1.5,
            "peak_memory_bytes": 1,
            "versions": {},
            "files": describe_files(folder),
        }
        Manifest(**(told | fields)).write(folder)
        return Checkpoint.open(folder)

    return write
