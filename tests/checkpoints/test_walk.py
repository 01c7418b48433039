"""Block by block against the whole model in transformers, and work that goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint, Skeleton
from edgepress.checkpoints.errors import CheckpointError, NumericsError
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.walk import BlockVisit, Walk
from tests.models import FAMILIES, WINDOW, build_model

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]


WINDOWED = [family for family, traits in FAMILIES.items() if "sliding_window" in traits]


def batches() -> list[Tensor]:
    """Sequences longer than the window, in batches of three shapes."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 512, shape, generator=generator) for shape in [(2, 24), (1, 24), (2, 13)]]


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits_of(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(ids).logits for ids in batches()]


def walked_logits(walk: Walk, edit: Callable[[BlockVisit], None] | None = None) -> list[Tensor]:
    for visit in walk:
        if edit:
            edit(visit)
        visit.done()
    with walk.skeleton.head() as head:
        return [head(states) for states in walk.states.chunks]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.shape == reference.shape
        assert reference.std() > 0.1
        assert (mine - reference).abs().max() < 1e-5


# ------------------------------------------------------------------ the same numbers as the whole model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_whole_models(tiny_model: TinyModel, family: str) -> None:
    source = Checkpoint.open(tiny_model(family))
    reference = logits_of(whole(source.folder))
    assert_close(walked_logits(Walk(source, batches(), Runtime(), last_outputs=True)), reference)
    model = source.model()
    assert not any(p.requires_grad for p in model.parameters())
    assert_close(logits_of(model), reference)


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_matter_here(family: str) -> None:
    """Else the test above could not tell a lost mask: only tokens past the window change with its width."""
    narrow, wide = build_model(family), build_model(family, sliding_window=128)
    ids = batches()[0]
    with torch.no_grad():
        difference = (narrow(ids).logits - wide(ids).logits).abs().amax(dim=(0, 2))
    assert difference[: WINDOW - 1].max() < 1e-5
    assert difference[WINDOW + 1 :].min() > 1e-3


@pytest.mark.parametrize("changes", [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_biases_and_tied_heads(tiny_model: TinyModel, changes: dict[str, Any]) -> None:
    source = Checkpoint.open(tiny_model("llama", **changes))
    reference = logits_of(whole(source.folder))
    assert_close(walked_logits(Walk(source, batches(), Runtime(), last_outputs=True)), reference)
    assert_close(logits_of(source.model()), reference)


def test_bfloat16_model_in_float32(tiny_model: TinyModel) -> None:
    source = Checkpoint.open(tiny_model("llama", dtype="bfloat16"))
    reference = logits_of(AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval())
    assert_close(walked_logits(Walk(source, batches(), Runtime(), last_outputs=True)), reference)
    walk = Walk(source, batches(), Runtime())
    for visit in walk:
        assert {p.dtype for p in visit.module.parameters()} == {torch.float32}
        written, stored = visit.weights(), source.stored_block(visit.index)
        assert written.keys() == stored.keys()
        for name, tensor in written.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, stored[name])
        visit.done()
    assert {states.dtype for states in walk.states.chunks} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_observers_see_each_input_once(tiny_model: TinyModel, family: str) -> None:
    source = Checkpoint.open(tiny_model(family))
    model = whole(source.folder)
    arrived: dict[str, list[Tensor]] = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            arrived[name] = []
            module.register_forward_pre_hook(lambda _, x, name=name: arrived[name].append(x[0].flatten(0, 1)))
    logits_of(model)

    fused = family == "phi3"
    groups = {
        ("self_attn.qkv_proj",) if fused else ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",) if fused else ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    }
    checked = 0
    for visit in Walk(source, batches(), Runtime()):
        seen: dict[tuple[str, ...], list[Tensor]] = {}
        visit.observe(lambda names, x, seen=seen: seen.setdefault(names, []).append(x))  # type: ignore[misc]
        assert set(seen) == groups
        for names, inputs in seen.items():
            for name in names:
                expected = arrived[f"{visit.index}.{name}"]
                assert [x.shape for x in inputs] == [x.shape for x in expected]
                assert max(float((x - y).abs().max()) for x, y in zip(inputs, expected, strict=True)) < 1e-5
                checked += 1
        visit.done()
    assert checked == len(arrived)


def test_what_a_stage_changes_is_what_runs_on(tiny_model: TinyModel) -> None:
    source = Checkpoint.open(tiny_model("gemma3_text"))
    before = (source.folder / "model.safetensors").read_bytes()

    def halve(visit: BlockVisit) -> None:
        visit.linears["mlp.down_proj"].weight.data.mul_(0.5)
        assert torch.equal(visit.weights()["mlp.down_proj.weight"], visit.linears["mlp.down_proj"].weight)

    ours = walked_logits(Walk(source, batches(), Runtime(), last_outputs=True), halve)
    model = whole(source.folder)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.mul_(0.5)
    assert_close(ours, logits_of(model))
    assert (source.folder / "model.safetensors").read_bytes() == before


# ------------------------------------------------------------------ one block in memory


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_one_block_has_weights_at_a_time(tiny_model: TinyModel, family: str) -> None:
    walk = Walk(Checkpoint.open(tiny_model(family)), batches(), Runtime(), last_outputs=True)
    parameters = dict(walk.skeleton.model.named_parameters())
    assert all(p.is_meta for p in parameters.values())
    for visit in walk:
        present = [name for name, p in walk.skeleton.model.named_parameters() if not p.is_meta]
        assert len(present) == len(list(visit.module.parameters()))
        assert all(name.startswith(f"model.layers.{visit.index}.") for name in present)
        visit.done()
    assert all(p.is_meta for p in walk.skeleton.model.parameters())
    with walk.skeleton.head() as head:
        head(walk.states.chunks[0])
    assert all(p.is_meta for p in walk.skeleton.model.parameters())
    assert dict(walk.skeleton.model.named_parameters()).keys() == parameters.keys()


def test_a_block_is_freed_after_an_interrupt(tiny_model: TinyModel) -> None:
    skeleton = Skeleton(Checkpoint.open(tiny_model()))

    def fail() -> None:
        with skeleton.block(2) as block:
            assert not any(p.is_meta for p in block.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_weights_that_are_handed_in_stay_as_they_are(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    skeleton, given = Skeleton(checkpoint), checkpoint.block(1)
    with skeleton.block(0, given) as block:
        assert torch.equal(block.get_parameter("mlp.up_proj.weight"), given["mlp.up_proj.weight"])
        for parameter in block.parameters():
            parameter.data.zero_()
    for name, tensor in checkpoint.block(1).items():
        assert torch.equal(given[name], tensor)


def test_leaving_a_block_without_done_is_a_mistake(tiny_model: TinyModel) -> None:
    walk = Walk(Checkpoint.open(tiny_model()), batches(), Runtime())
    with pytest.raises(RuntimeError, match=r"without calling done\(\)"):
        for _ in walk:
            pass


def test_progress_is_told(tiny_model: TinyModel) -> None:
    class Heard:
        def __init__(self) -> None:
            self.said: list[object] = []

        def start(self, task: str, steps: int) -> None:
            self.said.append((task, steps))

        def step(self, **numbers: float | str) -> None:
            self.said.append(numbers)

        def note(self, message: str) -> None:
            self.said.append(message)

    heard = Heard()
    for visit in Walk(Checkpoint.open(tiny_model()), batches(), Runtime(progress=heard), task="wanda"):
        visit.done()
    assert heard.said == [("wanda", 6), *({"block": f"{i}/6"} for i in range(1, 7))]


# ------------------------------------------------------------------ faults of the model


def test_states_that_are_not_finite_name_the_block(tiny_model: TinyModel) -> None:
    def overflow(visit: BlockVisit) -> None:
        if visit.index == 3:
            visit.linears["mlp.down_proj"].weight.data.fill_(float("inf"))

    walk = Walk(Checkpoint.open(tiny_model()), batches(), Runtime())
    with pytest.raises(NumericsError, match="hidden states after block 3 are not finite"):
        walked_logits(walk, overflow)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Checkpoint:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(change(tensors), path, metadata={"format": "pt"})
    return Checkpoint.open(folder)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def test_blocks_kept_elsewhere_than_transformers_has_them(own_model: TinyModel) -> None:
    folder = own_model("diffllama")
    source = edit(folder, lambda all: {n.replace("model.layers", "decoder.h"): t for n, t in all.items()})
    with pytest.raises(CheckpointError, match=r"builds this diffllama model without 'decoder\.h'"):
        Skeleton(source)


def test_configuration_unknown_to_transformers(own_model: TinyModel) -> None:
    folder = own_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(CheckpointError, match=r"transformers does not know the model in .*nonesuch"):
        Skeleton(Checkpoint.open(folder))
