"""Checkpoints of two blocks made of random weights, in every form that a stage can leave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint, eight_bit, unpacked
from edgepress.checkpoints.config import peft_config
from edgepress.checkpoints.forms import CODEBOOKS
from edgepress.checkpoints.manifest import Manifest, describe_files
from edgepress.checkpoints.packing import dequantise_rows, encode, pack_linear
from edgepress.checkpoints.shape import parse_sparsity
from edgepress.checkpoints.writer import CheckpointWriter

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass
class Wanted:
    """A checkpoint of two blocks to be made of random weights."""

    seed: int = 0
    dtype: str = "BF16"
    pattern: str | None = None
    bits: int | None = None
    codebook: str | None = None
    group: int = 32
    symmetric: bool = False
    desc_act: bool = False
    rank: int = 0
    adapter_bits: int = 16
    edge_bits: int | None = None
    bias: bool = False
    zeros: float = 0.0  # share of further zeros among the weights that are left
    rows: int = 32
    unit: int = 32  # of the widths

    def make(self, folder: Path) -> Checkpoint:
        self.g = torch.Generator().manual_seed(self.seed)
        writer = CheckpointWriter(folder)
        names = {"self_attn.q_proj": (self.rows, self.unit), "mlp.down_proj": (2 * self.rows, 2 * self.unit)}
        for index in range(2):
            tensors: dict[str, Tensor] = {"input_layernorm.weight": self.random(self.unit)}
            adapter = {}
            for name, shape in names.items():
                tensors |= {f"{name}.{key}": tensor for key, tensor in self.layer(*shape).items()}
                if self.bias:
                    tensors[f"{name}.bias"] = self.random(shape[0])
                if self.rank:
                    adapter |= self.side(f"{name}.lora_A", (self.rank, shape[1]), within=1)
                    adapter |= self.side(f"{name}.lora_B", (shape[0], self.rank), within=0)
            writer.write_block(index, tensors)
            if adapter:
                writer.write_adapter_part(index, adapter)
        outer = {"model.norm.weight": self.random(self.unit), "model.embed_tokens.weight": self.random(50, self.unit)}
        outer["lm_head.weight"] = self.random(50, self.unit)
        if self.edge_bits:
            writer.write_edge(self.edge(outer))
        writer.write_outer(outer)
        if self.rank:
            writer.join_adapter(peft_config(self.rank, 2.0 * self.rank, names))
        # Two layers a block make no model of a known family.
        config: dict[str, Any] = {"model_type": "random", "num_hidden_layers": 2, "hidden_size": self.unit}
        if self.bits:
            quantised = {"bits": self.bits, "group_size": self.group, "sym": self.symmetric, "desc_act": self.desc_act}
            config["quantization_config"] = {"quant_method": "gptq", **quantised}
        if self.codebook:
            config["quantization_config"] = CODEBOOKS[self.codebook].config(self.dtype)
        writer.finish(config | {"name": "größer"}, None)
        writer.work.remove()
        return self.seal(folder)

    def seal(self, folder: Path) -> Checkpoint:
        bare = Checkpoint(folder, None)
        pattern = parse_sparsity(self.pattern) if self.pattern else None
        Manifest(
            stage="test", stage_version=1, options={}, fingerprint="f", parent=None, seed=0, dtype="", device="",
            calibration=None, sparsity={"pattern": self.pattern} if self.pattern else None, seconds=0,
            peak_memory_bytes=0, versions={}, files=describe_files(folder), **bare.facts(pattern),
        ).write(folder)  # fmt: skip
        return Checkpoint.open(folder)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g).to(DTYPES[self.dtype])

    def side(self, name: str, shape: tuple[int, int], within: int) -> dict[str, Tensor]:
        """A or B of an adapter, at 8 bits with the codes and scales that it is made of."""
        matrix = self.random(*shape)
        if self.adapter_bits == 16:
            return {f"{name}.weight": matrix}
        codes, scales = eight_bit(matrix, within)
        weight = unpacked(codes, scales, matrix.dtype)
        return {f"{name}.weight": weight, f"{name}.codes": codes, f"{name}.scales": scales}

    def removed(self, rows: int, columns: int) -> Tensor:
        """A random mask of the pattern, True where a weight goes."""
        if self.pattern is None:
            return torch.zeros(rows, columns, dtype=torch.bool)
        nm = parse_sparsity(self.pattern).on(columns)
        scores = torch.rand(rows, columns // nm.of, nm.of, generator=self.g)
        return (scores.argsort(-1).argsort(-1) < nm.removed).view(rows, columns)

    def more_zeros(self, rows: int, columns: int) -> Tensor:
        return torch.rand(rows, columns, generator=self.g) < self.zeros

    def layer(self, rows: int, columns: int) -> dict[str, Tensor]:
        """A linear layer's tensors by their names within it."""
        if self.codebook:
            return encode(self.dense(rows, columns), CODEBOOKS[self.codebook], DTYPES[self.dtype])
        return self.codes(rows, columns) if self.bits else {"weight": self.dense(rows, columns)}

    def dense(self, rows: int, columns: int) -> Tensor:
        weight = self.random(rows, columns)
        weight[self.more_zeros(rows, columns)] = 0.0
        weight[0, 0] = -0.0 if self.pattern is None else weight[0, 0]
        return weight.masked_fill(self.removed(rows, columns), 0.0)

    def codes(self, rows: int, columns: int) -> dict[str, Tensor]:
        assert self.bits
        group = columns if self.group == -1 else self.group
        groups, top = columns // group, 2**self.bits
        zeros = torch.randint(1, top, (rows, groups), generator=self.g)
        if self.symmetric:
            zeros.fill_(top // 2)
        order = torch.arange(columns) // group
        if self.desc_act:
            order = order[torch.randperm(columns, generator=self.g)]
        codes = torch.randint(top, (rows, columns), generator=self.g)
        codes = torch.where(self.removed(rows, columns) | self.more_zeros(rows, columns), zeros[:, order], codes)
        scales = torch.rand(rows, groups, generator=self.g) + 0.1
        return pack_linear(codes, scales, zeros, self.group, self.bits) | {"g_idx": order.to(torch.int32)}

    def edge(self, outer: dict[str, Tensor]) -> dict[str, Tensor]:
        """Random codes, and the outer tensors made what they stand for."""
        assert self.edge_bits
        found = {}
        for name in ("model.embed_tokens", "lm_head"):
            codes = torch.randint(256, (50, self.unit * self.edge_bits // 8), generator=self.g).to(torch.uint8)
            scales, minimum = torch.rand(50, 1, generator=self.g).half(), torch.randn(50, 1, generator=self.g).half()
            found |= {f"{name}.codes": codes, f"{name}.scales": scales, f"{name}.minimum": minimum}
            rows = dequantise_rows(codes, scales, minimum, self.edge_bits)
            outer[f"{name}.weight"] = rows.to(DTYPES[self.dtype])
        return found
