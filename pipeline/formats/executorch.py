"""The format executorch: a program for ExecuTorch, its matrices for XNNPACK, with a KV cache of fixed length inside.

The method `forward(tokens (1, n) int64, input_pos (n,) int64)` gives logits (1, n, vocabulary) and keeps keys and
values at these positions, as ExecuTorch's runner for text calls it. transformers' own forward is exported.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.manifest import drafted, folders_above, require_output
from edgepress.checkpoints.runtime import Runtime
from edgepress.pipeline.export import ends_of
from edgepress.pipeline.formats import Wanted, Written
from edgepress.pipeline.formats.proof import logits_of, require_same, some_tokens

HINT = "--to executorch needs one more package: pip install 'edgepress[executorch]'"


def write(source: Checkpoint, wanted: Wanted, runtime: Runtime) -> Written:
    """Write the .pte file, and compare the logits of ExecuTorch's own runtime."""
    if importlib.util.find_spec("executorch") is None:
        raise PlanError(HINT)
    require_output(wanted.out)
    if not 2 <= wanted.context <= source.shape.positions:
        raise PlanError(f"--context {wanted.context}: a whole number from 2 to the model's {source.shape.positions}")
    model: Any = source.model(dtype=torch.float32)
    ids = some_tokens(source.shape)[:, : wanted.context]
    logits = logits_of(model, ids)
    runtime.progress.note("ExecuTorch exports and lowers the model")
    program = _lowered(model, source, wanted.context)
    with folders_above(wanted.out), drafted(wanted.out) as draft:
        with draft.open("wb") as file:
            program.write_to_file(file)
        difference = require_same(source.name, "executorch", logits, lambda: _read(draft, ids))
    return Written(wanted.out, wanted.out.stat().st_size, tuple(_notes(source, wanted.context, difference)), {
        "type": "dense", "context": wanted.context, "runtime": f"executorch {version('executorch')}",
        "largest_logit_difference": difference,
    })  # fmt: skip


def _notes(source: Checkpoint, context: int, difference: float) -> Iterator[str]:
    shape = source.shape
    cache = 8 * len(shape.blocks) * shape.kv_heads * shape.head_dim * context
    yield f"a KV cache of {context} tokens (--context), {cache:,} bytes as it runs"
    reader = f"ExecuTorch {version('executorch')}"
    yield f"{reader}: its logits are the model's within {difference:.1g}, with the cache too"


# --- the program ------------------------------------------------------------------------------------------------------


class _WithCache(nn.Module):
    """The model from tokens (1, n) and their positions (n,) to logits; keys and values are buffers."""

    def __init__(self, model: Any, source: Checkpoint, context: int) -> None:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        class Layer(StaticLayer):  # type: ignore[no-untyped-call]
            """Writes to the positions that it is told, instead of counting them itself."""

            at: Tensor

            def update(
                self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
            ) -> tuple[Tensor, Tensor]:
                assert self.keys is not None and self.values is not None
                self.keys[:, :, self.at] = key_states
                self.values[:, :, self.at] = value_states
                return self.keys, self.values

        super().__init__()
        shape, self.model = source.shape, model
        cache: Any = StaticCache(config=model.config, max_cache_len=context)
        # Layers with a window keep all positions as well: what lies before it is masked.
        cache.layers = [Layer(context) for _ in shape.blocks]
        cache.early_initialization(1, shape.kv_heads, shape.head_dim, torch.float32, torch.device("cpu"))
        for index, layer in enumerate(cache.layers):
            self.register_buffer(f"keys_{index}", layer.keys, persistent=False)
            self.register_buffer(f"values_{index}", layer.values, persistent=False)
        self.cache = cache

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        for index, layer in enumerate(self.cache.layers):
            layer.keys, layer.values = getattr(self, f"keys_{index}"), getattr(self, f"values_{index}")
            layer.at, layer.cumulative_length = input_pos, input_pos[0]
        positions = input_pos.unsqueeze(0)
        found = self.model(input_ids=tokens, position_ids=positions, past_key_values=self.cache, use_cache=True)
        logits: Tensor = found.logits
        return logits


def _lowered(model: Any, source: Checkpoint, context: int) -> Any:
    xnnpack: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    exir: Any = importlib.import_module("executorch.exir")
    some = min(5, context - 1)
    example = torch.zeros(1, some, dtype=torch.long), torch.arange(some)
    length = torch.export.Dim("length", max=context)
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(
                _WithCache(model, source, context).eval(), example,
                dynamic_shapes={"tokens": {1: length}, "input_pos": {0: length}}, strict=False,
            )  # fmt: skip
            edge = exir.to_edge_transform_and_lower(
                exported, partitioner=[xnnpack.XnnpackPartitioner()], constant_methods=_facts(source, context),
                compile_config=exir.EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            )  # fmt: skip
            return edge.to_executorch(exir.ExecutorchBackendConfig(extract_delegate_segments=True))
        except Exception as error:
            lines = str(error).strip().splitlines()
            why = lines[0] if lines else type(error).__name__
            raise PlanError(f"ExecuTorch cannot take this {source.shape.family} model with its cache: {why}") from None


def _facts(source: Checkpoint, context: int) -> dict[str, Any]:
    """What ExecuTorch's runner for text asks a program."""
    tokenizer = source.tokenizer()
    return {
        "get_max_seq_len": context, "get_max_context_len": context, "get_vocab_size": source.shape.vocabulary,
        "get_bos_id": -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "get_eos_ids": ends_of(source, tokenizer), "use_kv_cache": True, "enable_dynamic_shape": True,
    }  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _read(path: Path, ids: Tensor) -> dict[str, Tensor]:
    """The runtime's logits: of the whole sequence, and token by token."""
    runtime: Any = importlib.import_module("executorch.runtime")
    forward = runtime.Runtime.get().load_program(path).load_method("forward")
    count = ids.shape[1]
    whole = forward.execute((ids, torch.arange(count)))[0].clone()
    steps = [forward.execute((ids[:, n : n + 1].contiguous(), torch.tensor([n])))[0].clone() for n in range(count)]
    return {"the whole sequence": whole, "token by token": torch.cat(steps, 1)}
