"""A model's shape: its layers and tensors without weights, its sparsity, and what each compression makes of it.

Nothing here imports torch. A `ModelShape` lists every tensor a checkpoint folder stores, and from that
list alone `file_bytes` gives the exact size of its safetensors files, headers included.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgepress.checkpoints.config import head_dim, kv_heads, setting
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import DTYPE_BYTES, Form, Grid, TensorShape

OWN_KEY = "edgepress"  # of the configuration: what transformers has no word for
DENSE_DTYPE = "dense_dtype"  # under it: the precision that quantised layers had, where the files do not tell
SAME_BLOCKS = "same_blocks"  # under it: of every block the number of the first with its weights, where some run again
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
    def firsts(self) -> tuple[int, ...]:
        """Of every block the number of the first that has its weights: its own, but where a block runs again.

        The weights of one that runs again lie in the checkpoint's files a second time, since transformers looks for
        them there under their own names; everywhere else they are the first one's.
        """
        stated = (self.config.get(OWN_KEY) or {}).get(SAME_BLOCKS) or ()
        return tuple(stated) if len(stated) == len(self.blocks) else tuple(range(len(self.blocks)))

    @property
    def own_blocks(self) -> tuple[BlockShape, ...]:
        """The blocks that are no other's repetition."""
        return tuple(block for i, (block, first) in enumerate(zip(self.blocks, self.firsts, strict=True)) if i == first)

    @property
    def parameters_total(self) -> int:
        """Weights, norms, embeddings and adapters; a tied head and a block that runs again count once, scales and zero
        points do not."""
        return sum(t.elements for t in self.outer) + sum(
            sum(x.weights + x.bias * x.out_features + x.adapter_parameters for x in block.linears)
            + sum(t.elements for t in block.others)
            for block in self.own_blocks
        )

    @property
    def parameters_nonzero(self) -> int:
        return self.parameters_total - sum(x.weights - x.nonzero for block in self.own_blocks for x in block.linears)

    @property
    def pattern(self) -> Sparsity | None:
        found = {x.pattern for block in self.blocks for x in block.linears if x.pattern}
        return found.pop() if len(found) == 1 else None

    @property
    def grid(self) -> Form | None:
        """How the first quantised layer is stored; single others may have forms of their own."""
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


# --- sparsity ---------------------------------------------------------------------------------------------------------
# Which weights of a model are zero by design: N:M patterns, fractions, parts of them, and where they lie. No torch.


@dataclass(frozen=True)
class Pattern:
    """`removed` of every `of` consecutive weights of a row are zero."""

    removed: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `N:M`, the number removed before the group's size. Raises PlanError for anything else."""
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if not match:
            raise PlanError(f"'{text}' is not an N:M pattern; write e.g. 1:8 (removes 1 of every 8), 0.5 or none")
        removed, of = int(match[1]), int(match[2])
        if not 0 < removed < of:
            raise PlanError(f"{text} removes {removed} of every {of}; N must be at least 1 and below M, e.g. 1:8")
        return cls(removed, of)

    def __str__(self) -> str:
        return f"{self.removed}:{self.of}"

    def on(self, width: int, rows: int = 1) -> Pattern:
        """The pattern of a row of this width: itself."""
        return self

    def covers(self, name: str) -> bool:
        """Whether the layer of this name has the pattern: all do."""
        return True


@dataclass(frozen=True)
class Unstructured:
    """A fraction of every row is zero, wherever in the row."""

    fraction: float

    def __str__(self) -> str:
        return str(self.fraction)  # all digits: the manifest's text is read back

    def on(self, width: int, rows: int = 1) -> Pattern:
        """The same as an N:M pattern whose group is the whole row."""
        return Pattern(int(self.fraction * width), width)

    def covers(self, name: str) -> bool:
        """Whether the layer of this name has the pattern: all do."""
        return True


@dataclass(frozen=True)
class Capped(Pattern):
    """A pattern of wide groups of which no run of `within.of` weights may lose more than `within.removed`."""

    within: Pattern


@dataclass(frozen=True)
class Part:
    """`part` of `parts` equal shares of the zeros of N:M, at most N in every M: the zeros can grow into N:M.

    The shares count in every row, so a group may hold all its zeros early and another none.
    """

    part: int
    parts: int
    whole: Pattern

    def __str__(self) -> str:
        return f"{self.part}/{self.parts} of {self.whole}"

    def on(self, width: int, rows: int = 1) -> Pattern:
        """A pattern whose group is the whole row, with the cap on every M."""
        return Capped(width * self.whole.removed * self.part // (self.whole.of * self.parts), width, self.whole)

    def covers(self, name: str) -> bool:
        """Whether the layer of this name has the pattern: all do."""
        return True


Amount = Pattern | Unstructured | Part  # what --wanda can ask of a row


EVERY = "each layer"


@dataclass(frozen=True)
class Within:
    """A pattern on the layers of one name, or every layer; a fraction counts over the whole layer, not row by row."""

    amount: Amount
    layer: str  # the last part of the layers' names, e.g. gate_proj, or EVERY

    def __str__(self) -> str:
        return f"{self.amount} in {self.layer}"

    def on(self, width: int, rows: int = 1) -> Pattern:
        """N:M and its parts themselves; of a fraction, a pattern whose group is the whole layer of `rows` rows."""
        if not isinstance(self.amount, Unstructured):
            return self.amount.on(width)
        return Pattern(round(self.amount.fraction * width * rows), width * rows)

    def covers(self, name: str) -> bool:
        """Whether the layer of this name has the pattern."""
        return self.layer in (EVERY, name.rpartition(".")[2])


Sparsity = Pattern | Unstructured | Part | Within


def parse_sparsity(text: str) -> Sparsity:
    """Read what str() of a pattern gives: an amount, or an amount `in` a layer. Raises PlanError."""
    amount, within, layer = text.partition(" in ")
    return Within(parse_amount(amount), layer) if within else parse_amount(text)


def parse_amount(text: str) -> Amount:
    """Read `N:M`, a fraction such as 0.5, or a part of N:M such as `1/4 of 2:4`. Raises PlanError for anything else."""
    if match := re.fullmatch(r"(\d+)/(\d+) of (.+)", text.strip()):
        if not 0 < int(match[1]) < int(match[2]):
            raise PlanError(f"'{text}': the part must be between 0 and 1, e.g. 1/4 of 2:4")
        return Part(int(match[1]), int(match[2]), Pattern.parse(match[3]))
    if ":" in text:
        return Pattern.parse(text)
    try:
        fraction = float(text)
    except ValueError:
        return Pattern.parse(text)
    if not 0 < fraction < 1:
        raise PlanError(f"a fraction of {text} cannot be removed; it must be between 0 and 1, e.g. 0.5")
    return Unstructured(fraction)


# --- what each compression makes of a shape ---------------------------------------------------------------------------
# What each kind of compression makes of a model's shape. No torch: the stages plan with it, and `fit` searches.


# Lists of the configuration that are not one entry a block, however long they happen to be.
_NOT_PER_BLOCK = {"architectures", "eos_token_id", "bos_token_id", "pad_token_id", "bad_words_ids"}


def with_vocabulary(shape: ModelShape, size: int) -> ModelShape:
    """The first `size` rows of embedding and head. Raises PlanError where there are fewer."""
    rows = shape.vocabulary
    if not 0 < size <= rows:
        raise PlanError(f"a vocabulary of {size} tokens cannot be cut from one of {rows}")
    names = set(vocabulary_tensors(shape))
    outer = tuple(replace(t, shape=(size, *t.shape[1:])) if t.name in names else t for t in shape.outer)
    return replace(shape, outer=outer, config=dict(shape.config) | {"vocab_size": size})


def vocabulary_tensors(shape: ModelShape) -> list[str]:
    """Names of the outer tensors with one row a token: embedding, head unless tied, and the head's bias."""
    matrices = [t for t in shape.outer if len(t.shape) == 2 and t.shape[0] == shape.vocabulary]
    biases = {f"{t.name.removesuffix('.weight')}.bias" for t in matrices}
    return [t.name for t in shape.outer if t in matrices or t.name in biases]


def with_blocks(shape: ModelShape, kept: Sequence[int]) -> ModelShape:
    """The blocks with these numbers, in this order, repeats included."""
    config = with_firsts(cut_config(dict(shape.config), list(kept), len(shape.blocks)), [shape.firsts[i] for i in kept])
    return replace(shape, blocks=tuple(shape.blocks[i] for i in kept), config=config)


def with_firsts(config: dict[str, Any], weights: Sequence[int]) -> dict[str, Any]:
    """The configuration that says which blocks have the same weights; weights: a number for each block's."""
    firsts = [weights.index(number) for number in weights]
    own = {key: value for key, value in (config.get(OWN_KEY) or {}).items() if key != SAME_BLOCKS}
    if firsts != list(range(len(firsts))):
        own[SAME_BLOCKS] = firsts
    rest = {key: value for key, value in config.items() if key != OWN_KEY}
    return rest | ({OWN_KEY: own} if own else {})


def cut_config(config: dict[str, Any], kept: list[int], count: int) -> dict[str, Any]:
    """The configuration for the kept blocks: every list with one entry a block is cut to match.

    transformers refuses a `layer_types` of the wrong length, and other runtimes read past its end
    (llama.cpp#28597).
    """
    for key, value in config.items():
        if isinstance(value, list) and len(value) == count and key not in _NOT_PER_BLOCK:
            config[key] = [value[i] for i in kept]
    config["num_hidden_layers"] = len(kept)
    if isinstance(config.get("max_window_layers"), int):
        config["max_window_layers"] = sum(i < config["max_window_layers"] for i in kept)
    return config


# How often the inner width is among a layer's rows and columns.
_FFN_SIDES = {"gate_proj": (1, 0), "up_proj": (1, 0), "gate_up_proj": (2, 0), "down_proj": (0, 1)}


def with_wider_ffn(shape: ModelShape, multiple: int) -> ModelShape:
    """The feed-forward layers with their inner width rounded up. Raises PlanError where they cannot be told apart."""
    adapted = any(x.adapted for block in shape.blocks for x in block.linears)
    if shape.pattern is not None or shape.grid is not None or adapted:
        raise PlanError(
            "pad widens dense weights with no mask on them and no adapter beside them; put pad before wanda and gptq"
        )
    inner = shape.number("intermediate_size")
    more = -inner % multiple

    def wider(x: LinearShape) -> LinearShape:
        _, _, name = x.name.rpartition(".")
        rows, columns = _FFN_SIDES.get(name, (0, 0))
        sides = (rows and x.out_features != rows * inner) or (columns and x.in_features != inner)
        if sides or (".mlp." in f".{x.name}" and not rows and not columns):
            raise PlanError(f"pad: {x.name} ({x.out_features} x {x.in_features}) is no part of a feed-forward it knows")
        return replace(x, out_features=x.out_features + rows * more, in_features=x.in_features + columns * more)

    return replace(each_linear(shape, wider), config=dict(shape.config) | {"intermediate_size": inner + more})


def with_pattern(shape: ModelShape, pattern: Sparsity) -> ModelShape:
    """The pattern on every linear layer of every block that it covers."""
    return each_linear(shape, lambda x: replace(x, pattern=pattern) if pattern.covers(x.name) else x)


def with_grid(shape: ModelShape, bits: int, wanted_group: int, symmetric: bool, embedding_bits: int) -> ModelShape:
    """Codes in place of every layer that GPTQ's file format can hold. Raises PlanError where there is none."""
    return with_form(shape, Grid(bits, wanted_group, symmetric), embedding_bits)


def with_form(shape: ModelShape, form: Form, embedding_bits: int) -> ModelShape:
    """Codes of this form, its group fitted, in place of every layer that it can hold.

    Raises PlanError where there is none. The configuration stays: what it says of the quantisation is the stage's to
    write.
    """
    fitted, dtype = _fitted(shape, form), shape.dense_dtype
    if fitted is None:
        raise PlanError("gptq: no layer of this model has sides that are multiples of 32, as its file format needs")
    after = each_linear(shape, lambda x: coded(x, fitted, dtype))
    return replace(after, embedding_bits=embedding_bits or shape.embedding_bits)


def with_bits(shape: ModelShape, bits: int, group: int = 128) -> ModelShape:
    """As the stage gptq leaves a dense shape, of one that may be quantised: what has as few bits stays.

    Wider integers keep their groups. A layer that GPTQ's file format cannot hold stays as it is.
    """
    fitted, dtype = _fitted(shape, Grid(bits, group)), shape.dense_dtype

    def narrowed(x: LinearShape) -> LinearShape:
        if fitted is None or (x.grid is not None and x.grid.bits <= bits):
            return x
        whole = Grid(bits, x.grid.group, x.grid.symmetric) if x.grid and x.grid.integer else fitted
        return coded(x, whole, dtype)

    return each_linear(shape, narrowed)


def _fitted(shape: ModelShape, form: Form) -> Form | None:
    """The form fitted to the layers that it can hold; None where there are none."""
    linears = [x for block in shape.blocks for x in block.linears]
    widths = {x.in_features for x in linears if form.holds(x.out_features, x.in_features)}
    return form.fitted(widths) if widths else None


def coded(x: LinearShape, form: Form, dtype: str) -> LinearShape:
    """The layer stored so, if the form can hold it.

    Codes stand for weights of one precision in the whole model; a bias keeps its own.
    """
    if not form.holds(x.out_features, x.in_features):
        return x
    bias, own = x.bias_dtype or x.dtype, form.suited(x.out_features, x.in_features, x.pattern is not None)
    return replace(x, grid=own, dtype=dtype, bias_dtype=bias if x.bias and bias != dtype else "")


def each_linear(shape: ModelShape, change: Callable[[LinearShape], LinearShape]) -> ModelShape:
    """Every linear layer changed; blocks that were one object stay one."""
    own = {id(block): block for block in shape.blocks}
    made = {key: replace(block, linears=tuple(map(change, block.linears))) for key, block in own.items()}
    return replace(shape, blocks=tuple(made[id(block)] for block in shape.blocks))
