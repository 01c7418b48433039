"""Models with random weights in the shape of known ones, written block by block so that any size fits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.sources import open_source
from edgepress.checkpoints.writer import CheckpointWriter


def write_random(folder: Path, preset: str, blocks: int | None = None) -> Path:
    """A folder of a preset's shape with `blocks` blocks, bfloat16, and the packaged model's tokenizer.

    The tokenizer's ids are below any preset's vocabulary, which is all that timing and memory need.
    """
    if (folder / "config.json").is_file():
        return folder
    config: dict[str, Any] = PRESETS[preset] | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
    if blocks is not None:
        config["num_hidden_layers"] = blocks
    shape = shape_from_config(config)
    generator = torch.Generator().manual_seed(0)
    draft = folder.with_name(folder.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    writer = CheckpointWriter(draft)
    scale = config["hidden_size"] ** -0.5

    def random(size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        # one small draw repeated: the values do not matter, and 8 billion normal draws would take minutes
        tile = torch.randn(1024, size[1], generator=generator).mul_(scale).to(torch.bfloat16)
        return tile.repeat(-(-size[0] // 1024), 1)[: size[0]].contiguous()

    for index, block in enumerate(shape.blocks):
        writer.write_block(index, {t.name: random(t.shape) for t in block.stored()})
    writer.write_outer({t.name: random(t.shape) for t in shape.outer})
    writer.finish(config, open_source(None))
    draft.rename(folder)
    return folder
