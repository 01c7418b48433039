"""Trainable parameters and bytes of every method, from shapes alone: published counts, peft's own, autograd's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import shape_from_config
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.shape import ModelShape
from edgepress.stages import lora
from edgepress.stages.options import Lora
from edgepress.stages.recovery import METHODS, parse
from edgepress.stages.recovery.shapes import target_names, trainable_parameters, with_adapters

pytestmark = pytest.mark.unit


def llama(hidden: int, inner: int, blocks: int, kv_heads: int, vocabulary: int) -> ModelShape:
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 128, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return shape_from_config(config)


SEVEN = llama(4096, 11008, 32, 32, 32000)
SEVENTY = llama(8192, 28672, 80, 8, 32000)
THREE_8B = llama(4096, 14336, 32, 8, 128256)


@pytest.mark.parametrize(
    ("shape", "method", "rank", "count"),
    [
        (SEVEN, "lora", 8, 19_988_480), (SEVEN, "lora", 16, 39_976_960), (SEVEN, "lora", 64, 159_907_840),
        (SEVEN, "lora", 256, 639_631_360), (SEVENTY, "lora", 64, 828_375_040),
        (SEVEN, "dora", 8, 21_348_352), (SEVEN, "dora", 16, 41_336_832), (SEVEN, "dora", 64, 161_267_712),
        (SEVEN, "dora", 256, 640_991_232),
        (SEVEN, "ia3", 8, 1_581_056), (SEVENTY, "ia3", 8, 8_355_840), (THREE_8B, "ia3", 8, 1_703_936),
    ],
)  # fmt: skip
def test_published_counts(shape: ModelShape, method: str, rank: int, count: int) -> None:
    assert trainable_parameters(shape, Lora(method=method, rank=rank, targets="all")) == count
    assert trainable_parameters(shape, Lora(method=f"qlora+{method}", rank=rank, targets="all")) == count


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "dora+rslora", "qlora"])
@pytest.mark.parametrize(("family", "targets"), [("llama", "all"), ("qwen2", "v_proj,down_proj"), ("gemma3", "all")])
def test_peft_trains_as_many(method: str, family: str, targets: str, build: Callable[..., Checkpoint]) -> None:
    source, options = build(family, blocks=2), Lora(method=method, rank=3, targets=targets)
    config = options.recovery.adapter.config(target_names(source.shape, options), options, options.recovery.arguments)
    with quiet_import():
        from peft import get_peft_model

        model = get_peft_model(source.model(), config)
    assert trainable_parameters(source.shape, options) == model.get_nb_trainable_parameters()[0]


def test_what_lies_beside_the_weights_is_counted_in_file_and_image() -> None:
    bare = SEVEN.file_bytes
    beside = with_adapters(SEVEN, Lora(method="dora", rank=8, targets="all"))
    low_rank, magnitudes = 19_988_480 * 2, (21_348_352 - 19_988_480) * 4
    tensors = beside.adapter_tensors()
    assert sum(t.nbytes for t in tensors) == low_rank + magnitudes
    assert 0 < beside.file_bytes - bare - low_rank - magnitudes < 200 * len(tensors)  # the file's header
    assert packed_sizes(beside).total - packed_sizes(SEVEN).total >= low_rank + magnitudes
    assert beside.parameters_total - SEVEN.parameters_total == 21_348_352


def test_counting_needs_no_torch() -> None:
    code = (
        "from edgepress.checkpoints.families import PRESETS, shape_from_config\n"
        "from edgepress.stages.options import Lora\n"
        "from edgepress.stages.recovery.shapes import trainable_parameters\n"
        "shape = shape_from_config(PRESETS['smollm2-135m'])\n"
        "print([trainable_parameters(shape, Lora(method=m)) > 0 for m in ('dora', 'ia3', 'rslora+loftq')])\n"
        "import sys; assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[True, True, True]\n", done.stderr


def test_forecasts_know_the_method() -> None:
    def memory(**options: Any) -> int:
        return lora.cost(SEVEN, Lora(targets="all", **options)).peak_memory_bytes

    plain = Lora(targets="all")
    ranks = plain.micro_batch * plain.length * 7 * 32 * 4  # what an adapter keeps of a step for one more rank
    assert memory(rank=64) - memory(rank=8) == 16 * (159_907_840 - 19_988_480) + 56 * ranks
    weights = sum(x.weights for block in SEVEN.blocks for x in block.linears)
    assert memory(method="dora") - memory() == 6 * weights + 16 * (21_348_352 - 19_988_480)
    assert memory() - memory(method="ia3") == 16 * (19_988_480 - 1_581_056) + 8 * ranks
    inputs = plain.micro_batch * plain.length * 32 * (6 * 4096 + 11_008)
    assert memory(dropout=0.1) - memory() == 4 * inputs

    def work(method: str) -> float:
        return lora.cost(SEVEN, Lora(targets="all", method=method)).operations

    assert work("lora") == work("rslora") == work("ia3") == work("qlora") < work("dora")
    assert work("loftq") > work("lora")


@pytest.mark.parametrize(
    ("method", "targets", "dropout"),
    [("lora", "all", 0.0), ("lora", "all", 0.1), ("lora", "q_proj,v_proj", 0.0), ("ia3", "all", 0.0)],
)
def test_a_block_keeps_for_its_gradient_what_the_forecast_says(method: str, targets: str, dropout: float) -> None:
    """Against what autograd saves of a Llama with peft's adapters, each storage once."""
    options = Lora(method=method, targets=targets, dropout=dropout, micro_batch=1, batch=1, length=64)
    short = replace(options, length=options.length // 2)
    saved, forecast = [], []
    for blocks in (1, 3):
        shape = llama(128, 320, blocks, 1, 64)
        with quiet_import():
            from peft import get_peft_model
            from transformers import LlamaConfig, LlamaForCausalLM
        chosen = options.recovery.adapter.config(target_names(shape, options), options, options.recovery.arguments)
        own = {key: value for key, value in shape.config.items() if key != "model_type"}
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**own)).to(torch.bfloat16), chosen).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Any, found: Any = found, weights: Any = weights) -> Any:
            if (storage := tensor.untyped_storage()).data_ptr() not in weights:
                found[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(input_ids=torch.randint(64, (1, options.length)), use_cache=False).logits
        saved.append(sum(storage.nbytes() for storage in found.values()))
        forecast.append(2 * (lora.cost(shape, options).peak_memory_bytes - lora.cost(shape, short).peak_memory_bytes))
        del output
    assert (forecast[1] - forecast[0]) / 2 == pytest.approx((saved[1] - saved[0]) / 2, rel=0.12)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name", "label"),
    [
        ("lora", "lora", "lora-r8"), ("rslora+dora", "dora+rslora", "dora-rslora-r8"), ("ia3", "ia3", "ia3"),
        ("lora+qlora", "qlora", "qlora-r8"), ("dora + qlora", "qlora+dora", "qlora-dora-r8"),
        ("qlora+loftq", "loftq", "loftq-r8"), ("loftq+rslora", "rslora+loftq", "rslora-loftq-r8"),
        ("ia3+qlora", "qlora+ia3", "qlora-ia3"),
    ],
)  # fmt: skip
def test_what_is_the_same_is_written_the_same(written: str, name: str, label: str) -> None:
    options = Lora(method=written)
    assert (options.method, options.label) == (name, label)
    assert parse(name) == options.recovery
    assert options.recovery.quantised == ("qlora" in name or "loftq" in name)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("luck", f"'luck' is none of {', '.join(METHODS)}"),
        ("", "'' is none of"),
        ("dora+ia3", "dora and ia3 are adapters, of which a layer takes one"),
        ("dora+dora", "names a method twice"),
        ("ia3+rslora+loftq", "rslora and loftq set up A and B of a low-rank adapter, and ia3 has none; it goes with"),
    ],
)
def test_what_makes_no_sense_is_refused(written: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Lora(method=written)
    assert message in str(caught.value)


def test_all_layers_are_adapted_where_none_are_named() -> None:
    assert {Lora(method=method).targets for method in METHODS} == {"all"}
    assert Lora(method="ia3", targets="k_proj,v_proj,down_proj").targets == "k_proj,v_proj,down_proj"


def test_options_without_effect_are_said(build: Callable[..., Checkpoint]) -> None:
    shape = build("llama", blocks=2).shape
    assert "--lora-rank, --lora-alpha and --lora-dropout change nothing" in " ".join(
        lora.remarks(shape, Lora(method="ia3"))
    )
    assert not list(lora.remarks(shape, Lora(method="dora+rslora")))
