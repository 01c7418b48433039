"""What each kind of compression makes of a model's shape. No torch: the stages plan with it, and `fit` searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Form, Grid
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.checkpoints.sparsity import Sparsity

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
    config = cut_config(dict(shape.config), list(kept), len(shape.blocks))
    return replace(shape, blocks=tuple(shape.blocks[i] for i in kept), config=config)


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
    after = each_linear(shape, lambda x: _coded(x, fitted, dtype))
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
        return _coded(x, whole, dtype)

    return each_linear(shape, narrowed)


def _fitted(shape: ModelShape, form: Form) -> Form | None:
    """The form fitted to the layers that it can hold; None where there are none."""
    linears = [x for block in shape.blocks for x in block.linears]
    widths = {x.in_features for x in linears if form.holds(x.out_features, x.in_features)}
    return form.fitted(widths) if widths else None


def _coded(x: LinearShape, form: Form, dtype: str) -> LinearShape:
    """The layer stored so, if the form can hold it.

    Codes stand for weights of one precision in the whole model; a bias keeps its own.
    """
    if not form.holds(x.out_features, x.in_features):
        return x
    bias = x.bias_dtype or x.dtype
    return replace(x, grid=form, dtype=dtype, bias_dtype=bias if x.bias and bias != dtype else "")


def each_linear(shape: ModelShape, change: Callable[[LinearShape], LinearShape]) -> ModelShape:
    """Every linear layer changed; blocks that were one object stay one."""
    own = {id(block): block for block in shape.blocks}
    made = {key: replace(block, linears=tuple(map(change, block.linears))) for key, block in own.items()}
    return replace(shape, blocks=tuple(made[id(block)] for block in shape.blocks))
