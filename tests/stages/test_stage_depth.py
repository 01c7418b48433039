"""Depth pruning against plain loops over whole models that transformers builds and runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import depth
from edgepress.stages.options import Depth

pytestmark = pytest.mark.unit

FAMILIES = ["llama", "qwen2", "gemma3"]
RUNTIME = Runtime(chunk_tokens=48)  # two chunks, so that more than one is exercised
PER_BLOCK = ("layer_types", "no_rope_layers")


def whole(checkpoint: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def without(model: Any, gone: list[int]) -> Any:
    return rebuilt(model, [i for i in range(model.config.num_hidden_layers) if i not in gone])


def rebuilt(model: Any, kept: list[int]) -> Any:
    """A new model, built by transformers from a configuration cut by hand, with these blocks' weights."""
    from transformers import AutoModelForCausalLM

    values = model.config.to_dict()
    for key in PER_BLOCK:
        if values.get(key):
            values[key] = [values[key][i] for i in kept]
    values["num_hidden_layers"] = len(kept)
    small = AutoModelForCausalLM.from_config(type(model.config).from_dict(values), dtype=torch.float32).eval()
    small.load_state_dict({k: v for k, v in model.state_dict().items() if ".layers." not in k}, strict=False)
    for new, old in enumerate(kept):
        small.model.layers[new].load_state_dict(model.model.layers[old].state_dict())
    return small


@torch.no_grad()
def perplexity_of(model: Any, ids: torch.Tensor) -> float:
    losses = []
    for row in ids:
        logits = model(input_ids=row[None]).logits[0].double()
        losses += [-float(F.log_softmax(logits[t], dim=-1)[row[t + 1]]) for t in range(len(row) - 1)]
    return math.exp(sum(losses) / len(losses))


def scores_of(checkpoint: Checkpoint, ids: TokenBatches, **options: Any) -> dict[int, float]:
    chosen = depth.choose(checkpoint, ids, Depth(remove=2, protect_first=1, protect_last=1, **options), RUNTIME)
    return {int(i): score for i, score in chosen["ranking"][0].items()}


@pytest.mark.parametrize("family", [*FAMILIES, "smollm3"])
def test_perplexity_equals_removing_each_block_from_the_whole_model(
    family: str, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    checkpoint, ids = build(family), tokens()
    found = scores_of(checkpoint, ids)
    model = whole(checkpoint)
    expected = {i: perplexity_of(without(model, [i]), ids.ids) for i in range(1, 5)}
    assert list(found) == [1, 2, 3, 4]
    assert found == pytest.approx(expected, rel=1e-5)
    assert sorted(found, key=found.__getitem__) == sorted(expected, key=expected.__getitem__)
    assert max(expected.values()) > 1.001 * min(expected.values())  # else the ranking would prove nothing


@pytest.mark.parametrize("metric", ["taylor", "taylor-signed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_equals_a_backward_pass_through_the_whole_model(
    family: str, metric: str, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    checkpoint, ids = build(family), tokens(5)
    found = scores_of(checkpoint, ids, metric=metric)
    model = whole(checkpoint)
    logits = model(input_ids=ids.ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids.ids[:, 1:].flatten()).backward()
    expected = {
        i: sum(
            float((product.abs() if metric == "taylor" else -product).sum())
            for m in model.model.layers[i].modules()
            if isinstance(m, torch.nn.Linear)
            for product in [m.weight.detach().double() * m.weight.grad.double()]
        )
        for i in range(1, 5)
    }
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_signed_estimate_is_the_loss_without_a_small_block(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    """Equation 3.1 against what it estimates, at a thousandth of the step: weights times 0.999."""
    checkpoint, ids = build("llama"), tokens(5)
    found = scores_of(checkpoint, ids, metric="taylor-signed")
    for i in range(1, 5):
        model = whole(checkpoint).double()

        def loss(model: Any = model) -> float:
            with torch.no_grad():
                logits = model(input_ids=ids.ids).logits
            return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids.ids[:, 1:].flatten()))

        before = loss()
        for module in model.model.layers[i].modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data *= 0.999
        assert found[i] == pytest.approx((loss() - before) * 1000, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_equals_the_sum_over_linear_layers(
    family: str, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    checkpoint = build(family)
    found = scores_of(checkpoint, tokens(), metric="magnitude")
    layers = whole(checkpoint).model.layers
    expected = {
        i: sum(
            float(p.detach().double().abs().sum()) for n, p in layers[i].named_parameters() if n.endswith("proj.weight")
        )
        for i in range(1, 5)
    }
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_equals_hooks_on_the_whole_model(
    family: str, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    checkpoint, ids = build(family), tokens(5)
    found = scores_of(checkpoint, ids, metric="influence")
    model = whole(checkpoint)
    seen: dict[int, float] = {}

    def hook(index: int) -> Callable[..., None]:
        def record(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
            x, y = inputs[0].double(), (output[0] if isinstance(output, tuple) else output).double()
            cosine = (x * y).sum(-1) / (x.square().sum(-1).sqrt() * y.square().sum(-1).sqrt())
            seen[index] = 1 - float(cosine.mean())

        return record

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(hook(i))
    with torch.no_grad():
        model(input_ids=ids.ids)
    assert found == pytest.approx({i: seen[i] for i in range(1, 5)}, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rerank_equals_the_greedy_loop(
    family: str, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    checkpoint, ids = build(family, blocks=7), tokens()
    options = Depth(remove=3, protect_first=1, protect_last=1, rerank=True)
    found = depth.choose(checkpoint, ids, options, RUNTIME)
    model, gone = whole(checkpoint), []
    for ranking in found["ranking"]:
        scores = {i: perplexity_of(without(model, [*gone, i]), ids.ids) for i in range(1, 6) if i not in gone}
        assert {int(i): score for i, score in ranking.items()} == pytest.approx(scores, rel=1e-5)
        gone.append(min(scores, key=scores.__getitem__))
    assert found["removed"] == gone


def test_rerank_by_taylor_ranks_the_model_that_is_left(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    checkpoint, ids = build("llama", blocks=7), tokens()
    options = Depth(remove=2, protect_first=1, protect_last=1, rerank=True, metric="taylor")
    found = depth.choose(checkpoint, ids, options, RUNTIME)
    first = found["removed"][0]
    model = without(whole(checkpoint), [first])
    F.cross_entropy(model(input_ids=ids.ids).logits[:, :-1].flatten(0, 1), ids.ids[:, 1:].flatten()).backward()
    kept = [i for i in range(7) if i != first]
    expected = {
        str(old): sum(
            float((p.detach().double() * p.grad.double()).abs().sum())
            for name, p in model.model.layers[new].named_parameters()
            if name.endswith("proj.weight")
        )
        for new, old in enumerate(kept)
        if 1 <= old < 6
    }
    assert found["ranking"][1] == pytest.approx(expected, rel=1e-4)


def idle_blocks(model: Any) -> None:
    """Blocks 0, 2, 4 and 5 add nothing to their input, so nothing changes without any of them."""
    for i in (0, 2, 4, 5):
        model.model.layers[i].self_attn.o_proj.weight.zero_()
        model.model.layers[i].mlp.down_proj.weight.zero_()


@pytest.mark.parametrize("rerank", [False, True])
@pytest.mark.parametrize("metric", ["perplexity", "influence"])
def test_ties_fall_to_the_lower_block_and_protected_blocks_stay(
    metric: str, rerank: bool, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    checkpoint = build("llama", edit=idle_blocks)
    options = Depth(remove=4, metric=metric, protect_first=1, protect_last=1, rerank=rerank)
    found = depth.choose(checkpoint, tokens(), options, RUNTIME)
    assert found["ranking"][0]["2"] == found["ranking"][0]["4"]
    assert found["removed"].index(2) < found["removed"].index(4)
    assert sorted(found["removed"]) == [1, 2, 3, 4]  # 0 and 5 matter as little as 2, and are protected
    assert all("0" not in ranking and "5" not in ranking for ranking in found["ranking"])


def test_equal_weights_tie_by_magnitude(build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]) -> None:
    def same(model: Any) -> None:
        for layer in model.model.layers:
            layer.load_state_dict(model.model.layers[0].state_dict())

    options = Depth(remove=3, metric="magnitude", protect_first=1, protect_last=1)
    assert depth.choose(build("llama", edit=same), tokens(), options, RUNTIME)["removed"] == [1, 2, 3]


@pytest.mark.parametrize("family", [*FAMILIES, "smollm3"])
def test_output_is_the_model_pruned_by_hand(
    family: str,
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
) -> None:
    checkpoint, ids = build(family), tokens()
    # magnitude says which blocks go, so that their number is known here without asking the stage
    layers = whole(checkpoint).model.layers
    weights = [
        sum(float(p.detach().abs().sum()) for n, p in x.named_parameters() if n.endswith("proj.weight")) for x in layers
    ]
    gone = sorted(sorted(range(1, 5), key=weights.__getitem__)[:2])
    options = Depth(remove=2, metric="magnitude", protect_first=1, protect_last=1)
    facts = depth.run(checkpoint, writer, ids, options, RUNTIME)
    assert sorted(facts["removed"]) == gone
    kept = [i for i in range(6) if i not in gone]
    assert facts["kept_blocks"] == kept

    before = json.loads((checkpoint.folder / "config.json").read_text())
    after = json.loads((writer.folder / "config.json").read_text())
    assert after["num_hidden_layers"] == 4
    lists = [key for key in PER_BLOCK if before.get(key)]
    for key in lists:
        assert after[key] == [before[key][i] for i in kept]
    if family != "llama":
        assert any(len(set(before[key])) == 2 for key in lists), "the test needs blocks of two kinds"
    assert after["architectures"] == before["architectures"]

    pruned = seal(writer, checkpoint)
    assert len(pruned.shape.blocks) == 4
    expected = without(whole(checkpoint), gone)
    with torch.no_grad():
        assert torch.equal(whole(pruned)(input_ids=ids.ids).logits, expected(input_ids=ids.ids).logits)
        assert torch.equal(pruned.model()(input_ids=ids.ids).logits, expected(input_ids=ids.ids).logits)
    planned = depth.plan(checkpoint.shape, options)
    assert planned.parameters_total == pruned.shape.parameters_total
    assert planned.file_bytes == pruned.shape.file_bytes


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize(("layers", "order"), [("0-1,4-5", [0, 1, 4, 5]), ("0-3, 2, 2-5", [0, 1, 2, 3, 2, 2, 3, 4, 5])])
def test_blocks_named_by_hand_run_in_that_order(
    layers: str,
    order: list[int],
    family: str,
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
) -> None:
    checkpoint, ids, options = build(family), tokens(), Depth(layers=layers)
    assert depth.run(checkpoint, writer, ids, options, RUNTIME)["kept_blocks"] == order
    result, model = seal(writer, checkpoint), whole(checkpoint)
    expected = rebuilt(model, order)
    with torch.no_grad():
        assert torch.equal(whole(result)(input_ids=ids.ids).logits, expected(input_ids=ids.ids).logits)
    planned = depth.plan(checkpoint.shape, options)
    assert planned.parameters_total == result.shape.parameters_total
    assert planned.file_bytes == result.shape.file_bytes
    with pytest.raises(PlanError, match="--layers names block 6; this model has 0 to 5"):
        depth.plan(checkpoint.shape, Depth(layers="0-7"))


def test_a_resumed_run_does_not_rank_again(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = build("llama")
    options = Depth(remove=1, metric="influence", protect_first=1, protect_last=1)
    first = depth.run(checkpoint, writer, tokens(), options, RUNTIME)
    monkeypatch.setattr(depth, "choose", lambda *_: pytest.fail("ranked twice"))
    again = depth.run(checkpoint, CheckpointWriter(writer.folder), tokens(), options, RUNTIME)
    assert again == first


@pytest.mark.parametrize(("kept", "left"), [([0, 1, 2, 3, 4, 5], 3), ([0, 3, 4, 5], 1), ([0, 1, 2], 3), ([3, 4, 5], 0)])
def test_max_window_layers_counts_the_kept_blocks_before_it(kept: list[int], left: int) -> None:
    config = {"num_hidden_layers": 6, "max_window_layers": 3}
    assert depth.cut_config(config, kept, 6)["max_window_layers"] == left


def test_cut_leaves_lists_that_are_not_per_block() -> None:
    config = {
        "architectures": ["A", "B", "C"],
        "eos_token_id": [1, 2, 3],
        "layer_types": ["a", "b", "c"],
        "rope_scaling": {"long_factor": [1.0, 2.0, 3.0]},
        "other": [7, 8],
        "max_window_layers": None,
    }
    assert depth.cut_config(dict(config), [0, 2], 3) == config | {"layer_types": ["a", "c"], "num_hidden_layers": 2}


def test_removing_more_than_is_free_is_refused_with_the_numbers() -> None:
    shape = shape_from_config(PRESETS["stories15m"])
    with pytest.raises(PlanError) as caught:
        depth.plan(shape, Depth(remove=1))
    assert str(caught.value) == (
        "--depth 1: of 6 blocks, the first 4 and the last 2 are protected, so at most 0 can go "
        "(--protect-first and --protect-last change that)"
    )
    with pytest.raises(PlanError, match="at most 3 can go"):
        depth.plan(shape, Depth(remove=4, protect_first=2, protect_last=1))
    assert len(depth.plan(shape, Depth(remove=3, protect_first=2, protect_last=1)).blocks) == 3
    with pytest.raises(PlanError, match="at most 0 can go"):
        depth.plan(shape, Depth(remove=1, protect_first=9, protect_last=9))


def test_a_quantised_checkpoint_is_refused() -> None:
    from edgepress.stages import gptq
    from edgepress.stages.options import Gptq

    quantised = gptq.plan(shape_from_config(PRESETS["smollm2-135m"]), Gptq())
    with pytest.raises(PlanError, match="already quantised"):
        depth.plan(quantised, Depth(remove=2))


def test_a_score_that_is_not_finite_names_the_block(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(depth.METRICS, "taylor", lambda *_: {1: 0.5, 2: math.nan, 3: 0.1, 4: 0.2})
    with pytest.raises(NumericsError, match="taylor: the score of block 2 is not finite"):
        scores_of(build("llama"), tokens(), metric="taylor")
