"""A checkpoint's claims, each of them false in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, NumericsError
from edgepress.checkpoints.shape import Pattern
from edgepress.checkpoints.writer import CheckpointWriter, prove_pattern, verify

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]
Finish = Callable[..., Checkpoint]

WEIGHTS = 6 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)


@pytest.fixture
def pruned(tiny_model: TinyModel, tmp_path: Path) -> Callable[..., Path]:
    """pruned(first): the model with weights first, first + 4, … of each row set to zero."""

    def make(first: int) -> Path:
        source = Checkpoint.open(tiny_model())
        writer = CheckpointWriter(tmp_path / f"pruned-{first}")
        for index in range(6):
            tensors = {name: tensor.clone() for name, tensor in source.block(index).items()}
            for linear in source.shape.blocks[index].linears:
                tensors[f"{linear.name}.weight"][:, first::4] = 0
            writer.write_block(index, tensors)
        writer.copy_outer(source)
        writer.finish(source.config, source)
        return writer.folder

    return make


def true_claims(folder: Path) -> dict[str, object]:
    return Checkpoint(folder, None).facts(Pattern(1, 4)) | {"sparsity": {"pattern": "1:4"}}


def test_true_claims(pruned: Callable[..., Path], finish: Finish) -> None:
    folder = pruned(1)
    found = verify(finish(folder, **true_claims(folder)))
    assert any(f"1:4: {WEIGHTS // 4} of {WEIGHTS // 4} zeros" in line for line in found)
    assert any("6 blocks" in line for line in found)


def test_pattern_that_is_not_there(pruned: Callable[..., Path], finish: Finish) -> None:
    folder = pruned(1)
    checkpoint = finish(folder, **(true_claims(folder) | {"sparsity": {"pattern": "2:4"}}))
    with pytest.raises(CheckpointError, match=f"claims 2:4 but holds {WEIGHTS // 4} of {WEIGHTS // 2} zeros"):
        verify(checkpoint)


@pytest.mark.parametrize("key", ["parameters_total", "parameters_nonzero", "file_bytes", "packed_bytes"])
def test_false_numbers(pruned: Callable[..., Path], finish: Finish, key: str) -> None:
    folder = pruned(1)
    claims = true_claims(folder)
    truth = claims[key]
    with pytest.raises(CheckpointError, match=f"manifest says {key} 12345, the files hold {truth}"):
        verify(finish(folder, **(claims | {key: 12345})))


def test_damage_after_the_manifest(pruned: Callable[..., Path], finish: Finish) -> None:
    folder = pruned(1)
    checkpoint = finish(folder, **true_claims(folder))
    path = folder / "block-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"block-00003\.safetensors does not have the sha256"):
        verify(checkpoint)


def test_nan_under_a_true_hash(pruned: Callable[..., Path], finish: Finish) -> None:
    folder = pruned(1)
    tensors = Checkpoint.open(folder).block(2)
    tensors["mlp.gate_proj.weight"] = torch.full((128, 64), float("nan"))
    CheckpointWriter(folder).write_block(2, tensors)
    checkpoint = finish(folder, parameters_nonzero=0)
    with pytest.raises(NumericsError, match=r"model\.layers\.2\.mlp\.gate_proj\.weight holds 8192 values"):
        verify(checkpoint)


def test_no_manifest_no_claims(tiny_model: TinyModel) -> None:
    with pytest.raises(CheckpointError, match="has no manifest, so there is nothing to verify"):
        verify(Checkpoint.open(tiny_model()))


def test_the_same_pattern_elsewhere_is_not_the_same_mask(pruned: Callable[..., Path]) -> None:
    one, other = Checkpoint.open(pruned(1)), Checkpoint.open(pruned(2))
    assert prove_pattern(one, Pattern(1, 4))["holds"]
    assert prove_pattern(one, Pattern(1, 4), masks_from=one)["holds"]
    facts = prove_pattern(one, Pattern(1, 4), masks_from=other)
    assert facts == {
        "pattern": "1:4",
        "expected_zeros": WEIGHTS // 4,
        "kept_zeros": WEIGHTS // 4,
        "refilled_zeros": WEIGHTS // 4,
        "holds": False,
    }
