"""Tiny random models of several families, saved as Hugging Face folders, and token windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.manifest import Manifest, describe_files
from edgepress.checkpoints.masks import group_zeros
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from tests.models import VOCABULARY, build_model, uneven


def _config(family: str, blocks: int) -> dict[str, Any]:
    """What differs from tests/models.py: fewer positions, milder weights, windows of 6 tokens."""
    common = {"num_hidden_layers": blocks, "max_position_embeddings": 128, "initializer_range": 0.15}
    types = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(blocks)]
    own: dict[str, dict[str, Any]] = {
        "llama": {"tie_word_embeddings": True},
        # full attention in the first three blocks
        "qwen2": {"sliding_window": 6, "max_window_layers": 3, "layer_types": ..., "head_dim": ...},
        "gemma3_text": {"sliding_window": 6, "layer_types": types},
        "smollm3": {"no_rope_layer_interval": 3, "no_rope_layers": ..., "head_dim": ...},
    }
    return common | own[family]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """build(family, blocks=6, edit=None, **configuration): the same folder for the same arguments."""
    made: dict[str, Checkpoint] = {}

    def build(
        family: str = "llama", blocks: int = 6, edit: Callable[[Any], None] | None = None, **changes: Any
    ) -> Checkpoint:
        key = f"{family} {blocks} {changes} {edit and edit.__qualname__}"
        if key not in made:

            def weights(model: Any) -> None:
                uneven(model)
                if edit is not None:
                    edit(model)

            name = {"gemma3": "gemma3_text"}.get(family, family)
            model = build_model(name, len(family) + blocks, weights, **(_config(name, blocks) | changes))
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[key] = Checkpoint.open(folder)
        return made[key]

    return build


@pytest.fixture(scope="session")
def tokens() -> Callable[..., TokenBatches]:
    def tokens(samples: int = 4, length: int = 24, seed: int = 0) -> TokenBatches:
        generator = torch.Generator().manual_seed(seed)
        return TokenBatches("random", torch.randint(3, VOCABULARY, (samples, length), generator=generator))

    return tokens


@pytest.fixture(scope="session")
def seal() -> Callable[..., Checkpoint]:
    """What the pipeline does after a stage: the manifest with the parent's link, and the checkpoint opened."""

    def seal(
        target: CheckpointWriter, parent: Checkpoint, pattern: str | None = None, blocks: list[int] | None = None
    ) -> Checkpoint:
        target.work.remove()
        Manifest(
            stage="test",
            stage_version=1,
            options={},
            fingerprint=f"made from {parent.fingerprint} in {target.folder.name}",
            parent={"path": str(parent.folder), "fingerprint": parent.fingerprint},
            seed=0,
            dtype="float32",
            device="cpu",
            calibration=None,
            parameters_total=0,
            parameters_nonzero=0,
            sparsity={"pattern": pattern} if pattern else None,
            file_bytes=0,
            packed_bytes=0,
            seconds=0,
            peak_memory_bytes=0,
            versions={},
            files=describe_files(target.folder),
            origin={"blocks": blocks} if blocks is not None else {},
        ).write(target.folder)
        return Checkpoint.open(target.folder)

    return seal


@pytest.fixture(scope="session")
def masked(build: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory, seal: Any) -> Checkpoint:
    """A Llama shape with two random zeros in every four weights of a row, and the manifest that says so."""
    source = build("llama", blocks=3)
    target = CheckpointWriter(tmp_path_factory.mktemp("masked"))
    generator = torch.Generator().manual_seed(5)
    for index, block in enumerate(source.shape.blocks):
        weights = {name: tensor.clone() for name, tensor in source.block(index).items()}
        for linear in block.linears:
            weight = weights[f"{linear.name}.weight"]
            scores = torch.rand(weight.shape, generator=generator).view(weight.shape[0], -1, 4)
            drop = scores.argsort(dim=-1)[..., :2]
            weight.view(weight.shape[0], -1, 4).scatter_(-1, drop, 0.0)
            assert bool((group_zeros(weight, 4) == 2).all())
        target.write_block(index, weights)
    target.copy_outer(source)
    target.finish(source.config, source)
    return seal(target, source, pattern="2:4")


@pytest.fixture
def writer(tmp_path: Path) -> CheckpointWriter:
    return CheckpointWriter(tmp_path / "out")


@pytest.fixture(scope="session")
def finished(masked: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run of LoRA: its folder and its facts."""
    from edgepress.stages import lora
    from tests.stages.lora_help import options, text

    target = CheckpointWriter(tmp_path_factory.mktemp("finished"))
    return target.folder, lora.run(masked, target, text(), options(), Runtime())
