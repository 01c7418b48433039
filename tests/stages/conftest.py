"""Tiny random models of several families, saved as Hugging Face folders, and token windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.manifest import Manifest, describe_files
from edgepress.checkpoints.nm import group_zeros
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter

VOCABULARY = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def _config(family: str, blocks: int, changes: dict[str, Any]) -> Any:
    import transformers

    options = COMMON | {"num_hidden_layers": blocks}
    if family == "llama":
        return transformers.LlamaConfig(**(options | {"tie_word_embeddings": True} | changes))
    if family == "qwen2":
        # full attention in the first three blocks, a window of 6 tokens in the others
        window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
        return transformers.Qwen2Config(**(options | window | changes))
    if family == "gemma3":
        types = [FULL if i % 3 == 2 else SLIDING for i in range(blocks)]
        window = {"head_dim": 16, "sliding_window": 6, "layer_types": types}
        return transformers.Gemma3TextConfig(**(options | window | changes))
    if family == "smollm3":
        return transformers.SmolLM3Config(**(options | {"no_rope_layer_interval": 3} | changes))
    raise ValueError(family)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """build(family, blocks=6, edit=None, **configuration): the same folder for the same arguments."""
    made: dict[str, Checkpoint] = {}

    def build(
        family: str = "llama", blocks: int = 6, edit: Callable[[Any], None] | None = None, **changes: Any
    ) -> Checkpoint:
        key = f"{family} {blocks} {changes} {edit and edit.__qualname__}"
        if key not in made:
            from transformers import AutoModelForCausalLM

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(family) + blocks)
                model = AutoModelForCausalLM.from_config(_config(family, blocks, changes), dtype=torch.float32)
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if parameter.dim() == 1:  # norms and biases that do something
                            parameter.add_(0.1 * torch.randn_like(parameter))
                        elif "layers" in name:  # blocks that differ in weight
                            parameter.mul_(float(torch.rand(()) + 0.5))
                    if edit is not None:
                        edit(model)
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
