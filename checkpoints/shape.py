"""What a model is made of, without its weights: enough to plan, to count bytes, to judge a chip.

Nothing here imports torch. A `ModelShape` lists every tensor a checkpoint folder stores, and from that
list alone `file_bytes` gives the exact size of its safetensors files, headers included.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgepress.checkpoints.defaults import head_dim, kv_heads, setting
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import DTYPE_BYTES, Form, TensorShape
from edgepress.checkpoints.sparsity import Sparsity

OWN_KEY = "edgepress"  # of the configuration: what transformers has no word for
DENSE_DTYPE = "dense_dtype"  # under it: the precision that quantised layers had, where the files do not tell
_FILE_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_BYTES)}
# What an adapter can learn besides A and B, by the name that PEFT gives its tensor.
ADAPTER_VECTORS = {"magnitude": "lora_magnitude_vector", "rows": "ia3_l", "columns": "ia3_l"}


@dataclass(frozen=True)
class LinearShape:
    """One linear layer of a block; `name` is relative to the block, e.g. self_attn.q_proj."""

    name: str
    out_features: int
    in_features: int
    dtype: str
    bias: bool = False
    pattern: Sparsity | None = None
    grid: Form | None = None  # how its codes are stored; None where the weights are dense
    adapter_rank: int = 0
    adapter_dtype: str = "BF16"
    adapter_packed: bool = False  # 8-bit codes of the adapter lie beside it
    adapter_vector: str = ""  # magnitude: DoRA's, a number a row; rows or columns: IA3's factors of what is so named
    bias_dtype: str = ""  # of the bias, where it is not the weights'

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def nonzero(self) -> int:
        """Weights left by the N:M pattern (a quantiser may round some of them to zero as well)."""
        if self.pattern is None:
            return self.weights
        pattern = self.pattern.on(self.in_features, self.out_features)
        return self.weights // pattern.of * (pattern.of - pattern.removed)

    @property
    def adapted(self) -> bool:
        """Whether an adapter lies beside the weights."""
        return bool(self.adapter_rank or self.adapter_vector)

    @property
    def adapter_parameters(self) -> int:
        return sum(t.elements for t in self.adapter())

    def stored(self) -> Iterator[TensorShape]:
        """The tensors in the checkpoint's shard, names relative to the block."""
        if self.grid is None:
            yield TensorShape(f"{self.name}.weight", (self.out_features, self.in_features), self.dtype)
        else:
            yield from self.grid.tensors(self.name, self.out_features, self.in_features)
        if self.bias:
            yield TensorShape(f"{self.name}.bias", (self.out_features,), self.bias_dtype or self.dtype)

    def adapter(self) -> Iterator[TensorShape]:
        if self.adapter_rank:
            yield TensorShape(f"{self.name}.lora_A.weight", (self.adapter_rank, self.in_features), self.adapter_dtype)
            yield TensorShape(f"{self.name}.lora_B.weight", (self.out_features, self.adapter_rank), self.adapter_dtype)
        if self.adapter_vector:  # in 32 bits: a few numbers, each of which acts on a whole row or column
            rows, columns = self.out_features, self.in_features
            shape = {"magnitude": (rows,), "rows": (rows, 1), "columns": (1, columns)}[self.adapter_vector]
            yield TensorShape(f"{self.name}.{ADAPTER_VECTORS[self.adapter_vector]}", shape, "F32")

    def packed_adapter(self) -> Iterator[TensorShape]:
        """The 8-bit codes of A and B with a scale for each rank, if the adapter was rounded to them."""
        if self.adapter_packed:
            for side, shape, scales in (
                ("lora_A", (self.adapter_rank, self.in_features), (self.adapter_rank, 1)),
                ("lora_B", (self.out_features, self.adapter_rank), (1, self.adapter_rank)),
            ):
                yield TensorShape(f"{self.name}.{side}.codes", shape, "I8")
                yield TensorShape(f"{self.name}.{side}.scales", scales, "F32")

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter a chip would hold: the packed codes where there are any."""
        return sum(t.nbytes for t in (self.packed_adapter() if self.adapter_packed else self.adapter()))


@dataclass(frozen=True)
class BlockShape:
    linears: tuple[LinearShape, ...]
    others: tuple[TensorShape, ...]  # norms and the like

    def stored(self) -> Iterator[TensorShape]:
        for linear in self.linears:
            yield from linear.stored()
        yield from self.others

    def adapter(self) -> Iterator[TensorShape]:
        for linear in self.linears:
            yield from linear.adapter()

    def packed_adapter(self) -> Iterator[TensorShape]:
        for linear in self.linears:
            yield from linear.packed_adapter()


@dataclass(frozen=True)
class ModelShape:
    """A causal language model as a sequence of blocks between an embedding and a head.

    `outer` holds everything outside the blocks by its full name: embedding, last norm, head unless tied.
    """

    family: str
    config: Mapping[str, Any] = field(repr=False, hash=False)
    blocks: tuple[BlockShape, ...]
    outer: tuple[TensorShape, ...]
    block_prefix: str = "model.layers"
    embedding_bits: int | None = None  # packed copy of embedding and head beside the shards, for the edge

    # --- counts -------------------------------------------------------------------------------------------

    @property
    def parameters_total(self) -> int:
        """Weights, norms, embeddings and adapters; a tied head counts once, scales and zero points do not."""
        return sum(t.elements for t in self.outer) + sum(
            sum(x.weights + x.bias * x.out_features + x.adapter_parameters for x in block.linears)
            + sum(t.elements for t in block.others)
            for block in self.blocks
        )

    @property
    def parameters_nonzero(self) -> int:
        return self.parameters_total - sum(x.weights - x.nonzero for block in self.blocks for x in block.linears)

    @property
    def pattern(self) -> Sparsity | None:
        found = {x.pattern for block in self.blocks for x in block.linears if x.pattern}
        return found.pop() if len(found) == 1 else None

    @property
    def grid(self) -> Form | None:
        """How the quantised layers are stored; all have one form."""
        return next((x.grid for block in self.blocks for x in block.linears if x.grid), None)

    @property
    def dense_dtype(self) -> str:
        """The precision that most weights of the blocks have, or had before quantisation."""
        weights: Counter[str] = Counter()
        for block in self.blocks:
            for x in block.linears:
                weights[x.dtype] += x.weights
        return weights.most_common(1)[0][0]

    @property
    def activation_bits(self) -> int:
        """Of the inputs of quantised layers as they are measured: 16 leaves them as they are."""
        return int((self.config.get(OWN_KEY) or {}).get("activation_bits", 16))

    # --- bytes --------------------------------------------------------------------------------------------

    def block_tensors(self, index: int) -> list[TensorShape]:
        return [replace(t, name=f"{self.block_prefix}.{index}.{t.name}") for t in self.blocks[index].stored()]

    def adapter_tensors(self) -> list[TensorShape]:
        """Names as PEFT stores them."""
        return self._adapters(BlockShape.adapter)

    def packed_adapter_tensors(self) -> list[TensorShape]:
        """The 8-bit codes that `--eora-bits 8` writes beside the adapter, named alike."""
        return self._adapters(BlockShape.packed_adapter)

    def _adapters(self, tensors: Callable[[BlockShape], Iterator[TensorShape]]) -> list[TensorShape]:
        return [
            replace(t, name=f"base_model.model.{self.block_prefix}.{index}.{t.name}")
            for index, block in enumerate(self.blocks)
            for t in tensors(block)
        ]

    def shard_bytes(self) -> list[int]:
        """Bytes of each block's shard, in order, headers included."""
        return [safetensors_bytes(self.block_tensors(index)) for index in range(len(self.blocks))]

    @property
    def file_bytes(self) -> int:
        """Bytes of all safetensors files of the checkpoint folder, exactly as they will lie on disk."""
        beside = (self.adapter_tensors(), self.packed_adapter_tensors(), self.edge_tensors())
        return (
            sum(self.shard_bytes())
            + safetensors_bytes(list(self.outer))
            + sum(safetensors_bytes(tensors) for tensors in beside if tensors)
        )

    @property
    def model_mib(self) -> float:
        """Model size as thesis 001 defines it, equation 2.55: elements x bits / (8 * 1024^2), over all stored tensors.

        Its MB are MiB. The adapter counts, and so do zeros of an N:M pattern, which are stored; file headers, buffers
        that no file holds (rotary tables) and the second, packed copies of embedding, head and adapter do not.
        """
        blocks = [t for index in range(len(self.blocks)) for t in self.block_tensors(index)]
        return sum(t.nbytes for t in (*blocks, *self.outer, *self.adapter_tensors())) / 2**20

    def edge_tensors(self) -> list[TensorShape]:
        """The packed copies of embedding and head that `--quant-embeddings` writes beside the shards."""
        if self.embedding_bits is None:
            return []
        packed = []
        for t in self.outer:
            if len(t.shape) == 2:
                rows, columns = t.shape
                base = t.name.removesuffix(".weight")
                packed.append(TensorShape(f"{base}.codes", (rows, columns * self.embedding_bits // 8), "U8"))
                packed.append(TensorShape(f"{base}.scales", (rows, 1), "F16"))
                packed.append(TensorShape(f"{base}.minimum", (rows, 1), "F16"))
        return packed

    # --- the numbers that attention needs --------------------------------------------------------------------

    def number(self, key: str) -> int:
        """A whole number of the configuration, or its family's default; raises PlanError where there is neither."""
        value = setting(self.config, key)
        if not isinstance(value, int):
            raise PlanError(f"the configuration of this {self.family} model states no whole number '{key}'")
        return value

    @property
    def hidden_size(self) -> int:
        return self.number("hidden_size")

    @property
    def vocabulary(self) -> int:
        return self.number("vocab_size")

    @property
    def heads(self) -> int:
        return self.number("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        return kv_heads(self.config)

    @property
    def head_dim(self) -> int:
        return head_dim(self.config)

    @property
    def positions(self) -> int:
        return self.number("max_position_embeddings")


def safetensors_bytes(tensors: list[TensorShape]) -> int:
    """Size of the safetensors file that `safetensors.torch.save_file` writes for these tensors.

    Eight bytes of header length, a JSON header padded to a multiple of eight, the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in sorted(tensors, key=lambda t: (_FILE_ORDER[t.dtype], t.name)):
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset
