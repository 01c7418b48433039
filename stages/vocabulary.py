"""Stage vocabulary: keep the tokens that a corpus uses, in tokenizer, embedding and head.

What stays is renumbered, not changed: the logits of the kept tokens are the original's, bit for bit in the same
precision. The corpus falls into the same pieces as before; other text falls into smaller ones, down to bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.headers import EDGE
from edgepress.checkpoints.manifest import write_json
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import ModelShape, vocabulary_tensors, with_vocabulary
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.vocabulary import Trimmed, count_ids, load_tokenizer, renumber_config, trim
from edgepress.stages.options import Vocabulary as Options
from edgepress.stages.requirements import BASE_BYTES, Cost, linked_bytes, outer_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.writer import CheckpointWriter

VERSION = 1
GENERATION = "generation_config.json"


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The shape with `size` tokens, which the pipeline has counted on the corpus. Raises PlanError."""
    if not options.size:
        raise PlanError("vocabulary: the tokens that the corpus uses have not been counted")
    return with_vocabulary(shape, options.size)


def cost(before: ModelShape, options: Options) -> Cost:
    """What the stage takes on a model of this shape: the whole outer part as it was and what is kept of it."""
    adapters = (before.adapter_tensors(), before.packed_adapter_tensors())
    return Cost(BASE_BYTES + 2 * outer_bytes(before), linked_bytes(before, range(len(before.blocks)), adapters))


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    """calibration: all of the corpus as one row of ids by the source's tokenizer, and its documents."""
    tokenizer = source.tokenizer()
    used = count_ids(calibration.ids.tolist())
    rows = source.shape.vocabulary
    trimmed = trim(source.folder, tokenizer, used, rows, options.size)
    if len(trimmed.kept) != options.size:
        raise CheckpointError(f"{len(trimmed.kept)} tokens are left where {options.size} were planned")

    target.write_outer(keep_rows(source.outer(), vocabulary_tensors(source.shape), trimmed))
    if (source.folder / EDGE).is_file():  # packed one grid a row, so its rows can be taken as they are
        from safetensors.torch import load_file

        packed = load_file(source.folder / EDGE)
        target.write_edge(keep_rows(packed, list(packed), trimmed))
    count = len(source.shape.blocks)
    runtime.progress.start("writing blocks", count)
    for index in range(count):
        target.copy_block(index, source, index)
        runtime.progress.step(block=f"{index + 1}/{count}")
    target.copy_adapter(source)

    trimmed.write(target.folder)
    if (generation := source.folder / GENERATION).is_file():
        write_json(target.folder / GENERATION, renumber_config(json.loads(generation.read_text()), trimmed.new_ids))
    # Not `source`: the other tokenizer files it may have number tokens as before.
    target.finish(renumber_config(source.config, trimmed.new_ids) | {"vocab_size": len(trimmed.kept)}, None)
    unused = len(trimmed.kept) - len(used.keys() & set(trimmed.kept))
    return {
        "tokens_before": rows,
        "tokens_kept": len(trimmed.kept),
        "kept_but_not_in_corpus": unused,
        **prove_pieces(target, trimmed, source, calibration),
    }


def keep_rows(tensors: dict[str, Tensor], names: list[str], trimmed: Trimmed) -> dict[str, Tensor]:
    """The tensors, those in `names` (tokens, …) with the kept rows only."""
    kept = list(trimmed.kept)
    return {name: tensor[kept] if name in names else tensor for name, tensor in tensors.items()}


def prove_pieces(
    target: CheckpointWriter, trimmed: Trimmed, source: Checkpoint, corpus: TokenBatches
) -> dict[str, Any]:
    """Tokenise the corpus again with the files just written, and compare. Raises CheckpointError for a difference.

    Where a limit made tokens go that the corpus uses, there is nothing to be equal to: it only gets longer.
    """
    before, after = source.tokenizer(), load_tokenizer(target.folder)
    new = trimmed.new_ids
    counted = {"corpus_tokens_before": 0, "corpus_tokens_after": 0}
    for number, document in enumerate(corpus.documents, 1):
        old_ids, ids = before(document)["input_ids"], after(document)["input_ids"]
        counted["corpus_tokens_before"] += len(old_ids)
        counted["corpus_tokens_after"] += len(ids)
        if trimmed.whole and [new.get(i) for i in old_ids] != ids:
            raise CheckpointError(
                f"{target.folder}: the trimmed tokenizer splits document {number} of the corpus otherwise than the "
                "original; the folder is left unfinished and is not used"
            )
    return counted | {"same_pieces": trimmed.whole}
