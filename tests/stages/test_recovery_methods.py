"""Each adapter on one layer: entry by entry, against peft's own layers, and what is merged against what computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepress.checkpoints.checkpoint import adapter_scale, applied
from edgepress.checkpoints.quiet import quiet_import
from edgepress.stages.options import Lora
from edgepress.stages.recovery import loftq
from edgepress.stages.recovery import lora as low_rank

pytestmark = pytest.mark.unit

OUT, IN, RANK, ALPHA = 12, 16, 3, 12


def wrapped(method: str, name: str = "it", masked: bool = False, seed: int = 0, ready: bool = True) -> Any:
    """peft's layer around a small linear one, its adapter at random values; `ready`: made ready by our code."""
    with quiet_import():
        from peft import get_peft_model
    generator = torch.Generator().manual_seed(seed)
    options = Lora(method=method, rank=RANK, alpha=ALPHA, dropout=0.0, targets=name)
    model = nn.Sequential()
    model.add_module(name, nn.Linear(IN, OUT))
    linear = model.get_submodule(name)
    linear.weight.data = torch.randn(OUT, IN, generator=generator)
    linear.bias.data = torch.randn(OUT, generator=generator)
    if masked:
        linear.weight.data[torch.rand(OUT, IN, generator=generator) < 0.5] = 0
        linear.weight.data[2] = 0  # a whole row, as --pad-ffn leaves them
    config = options.recovery.adapter.config([name], options, options.recovery.arguments)
    config.task_type = None  # no language model
    with quiet_import():
        layer = get_peft_model(model, config).base_model.model.get_submodule(name)
    if ready:
        options.recovery.adapter.start(layer, linear.weight != 0 if masked else None)
    for parameter in (p for p in layer.parameters() if p.requires_grad):
        parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
        if parameter.shape in ((RANK, IN), (OUT, RANK)):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer, options.recovery.adapter


def parts(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return W.detach(), A.detach(), B.detach()


def x() -> Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(1))


def by_hand(layer: Any, method: str, masked: bool) -> Tensor:
    """DoRA's effective weight, entry by entry."""
    W, A, B = parts(layer)
    m = layer.lora_magnitude_vector["default"].weight.detach()
    s = ALPHA / math.sqrt(RANK) if "rslora" in method else ALPHA / RANK
    effective = torch.zeros(OUT, IN)
    for i in range(OUT):
        V = [W[i, j] + s * sum(B[i, k] * A[k, j] for k in range(RANK)) for j in range(IN)]
        if masked:
            V = [v if W[i, j] != 0 else 0.0 for j, v in enumerate(V)]
        norm = math.sqrt(sum(float(v) ** 2 for v in V))
        for j in range(IN):
            effective[i, j] = m[i] * V[j] / norm if norm else 0.0
    return effective


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["dora", "dora+rslora"])
def test_dora_computes_with_the_formula_and_merges_what_it_computes(method: str, masked: bool) -> None:
    layer, adapter = wrapped(method, masked=masked)
    W, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    expected = by_hand(layer, method, masked)
    merged = W + adapter.change(layer)["weight"].detach()
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x()).detach(), F.linear(x(), expected, bias), rtol=1e-4, atol=1e-4)
    if masked:
        assert bool((merged[W == 0] == 0).all())
        assert bool((merged[2] == 0).all())


@pytest.mark.parametrize("dropout", [False, True])
def test_dora_without_a_mask_is_pefts_own(dropout: bool) -> None:
    (ours, _), (theirs, _) = wrapped("dora"), wrapped("dora", ready=False)
    outputs, gradients = [], []
    for layer in (ours, theirs):
        if dropout:
            layer.lora_dropout["default"] = nn.Dropout(0.5)
        layer.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            y = layer(x())
        (y**2).sum().backward()
        outputs.append(y.detach())
        gradients.append([p.grad for p in layer.parameters() if p.requires_grad])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert len(gradients[0]) == 3
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3"])
def test_training_begins_at_the_model_as_it_came(method: str, masked: bool) -> None:
    with quiet_import():
        from peft import get_peft_model
    options = Lora(method=method, rank=RANK, dropout=0.0, targets="it")
    model = nn.Sequential()
    model.add_module("it", nn.Linear(IN, OUT))
    if masked:
        model.it.weight.data[:, ::2] = 0
        model.it.weight.data[2] = 0
    expected = model(x()).detach()
    config = options.recovery.adapter.config(["it"], options, options.recovery.arguments)
    config.task_type = None
    with quiet_import():
        model = get_peft_model(model, config)
    layer = model.base_model.model.it
    options.recovery.adapter.start(layer, layer.base_layer.weight != 0 if masked else None)
    torch.testing.assert_close(model(x()).detach(), expected)
    assert all(not bool(t.any()) or t.abs().max() < 1e-6 for t in options.recovery.adapter.change(layer).values())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    layer, _ = wrapped("rslora")
    _, A, B = parts(layer)
    torch.testing.assert_close(low_rank.masked_delta(layer).detach(), ALPHA / math.sqrt(RANK) * (B @ A))
    assert adapter_scale({"lora_alpha": 32, "r": 16, "use_rslora": True}) == 8
    assert adapter_scale({"lora_alpha": 32, "r": 16}) == 2


@pytest.mark.parametrize("name", ["it", "down_proj"])
def test_ia3_scales_outputs_or_the_inputs_of_a_feed_forward_layer(name: str) -> None:
    layer, adapter = wrapped("ia3", name)
    W, bias, factor = (t.detach() for t in (layer.base_layer.weight, layer.base_layer.bias, layer.ia3_l["default"]))
    if name == "it":
        expected = torch.stack([factor[i, 0] * (W[i] @ x()[0, 0] + bias[i]) for i in range(OUT)])
    else:
        expected = torch.stack([W[i] @ (factor[0] * x()[0, 0]) + bias[i] for i in range(OUT)])
    torch.testing.assert_close(layer(x())[0, 0].detach(), expected)
    change = {kind: tensor.detach() for kind, tensor in adapter.change(layer).items()}
    assert set(change) == ({"weight", "bias"} if name == "it" else {"weight"})
    merged = F.linear(x(), W + change["weight"], bias + change.get("bias", 0))
    torch.testing.assert_close(merged[0, 0], expected)


@pytest.mark.parametrize("name", ["it", "down_proj"])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "dora+rslora", "ia3"])
def test_what_a_reader_makes_of_the_stored_adapter_is_what_peft_merges(method: str, name: str) -> None:
    layer, adapter = wrapped(method, name)
    base = {"weight": layer.base_layer.weight.detach().clone(), "bias": layer.base_layer.bias.detach().clone()}
    config = Lora(method=method, rank=RANK, alpha=ALPHA)
    words = config.recovery.adapter.config([name], config, config.recovery.arguments).to_dict()
    stored = {kind: tensor.detach() for kind, tensor in adapter.tensors(layer).items()}
    ours = base | applied(base, stored, adapter_scale(words))
    layer.merge()
    torch.testing.assert_close(ours["weight"], layer.base_layer.weight.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["bias"], layer.base_layer.bias.detach())


# --- LoftQ's start --------------------------------------------------------------------------------------------------


def unused(weight: Tensor) -> Any:
    raise AssertionError("nothing is to be quantised anew")


class Rounded:
    """Rounded to eighths."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = (weight * 8).round() / 8

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


@pytest.mark.parametrize("method", ["loftq", "rslora+loftq"])
def test_loftq_s_turns_are_algorithm_1(method: str) -> None:
    """Restated with numpy's singular values, a turn after the other."""
    import numpy as np

    generator = torch.Generator().manual_seed(6)
    W = torch.randn(OUT, IN, generator=generator)
    Q = (W * 4).round() / 4  # the quantiser's codes, coarser than those of later turns
    errors, found, low = [], Q.double().numpy(), np.zeros((OUT, IN))
    for turn in range(4):
        if turn:
            found = np.round((W.double().numpy() - low) * 8) / 8
        U, S, V = np.linalg.svd(W.double().numpy() - found, full_matrices=False)
        low = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
        errors.append(float(np.square(W.double().numpy() - found - low).sum()))
    assert errors == sorted(errors, reverse=True)  # else the stage stops earlier, see below
    for turns in (1, 2, 4):
        layer, _ = wrapped(method)
        start = loftq.begin(layer, W, Q, Rounded, turns)
        assert start.errors == pytest.approx(errors[:turns], rel=1e-4)
        kept = start.stored["weight"] if turns > 1 else Q
        begun = kept + low_rank.masked_delta(layer).detach()
        assert float((W - begun).square().sum()) == pytest.approx(errors[turns - 1], rel=1e-4)


def test_loftq_stops_at_the_turn_that_is_no_better() -> None:
    layer, _ = wrapped("loftq")
    W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(7))
    one, _ = wrapped("loftq")
    first = loftq.begin(one, W, (W * 64).round() / 64, unused, 1)
    start = loftq.begin(layer, W, (W * 64).round() / 64, Rounded, 3)  # eighths are worse
    assert start.stored == {} and start.errors == first.errors * 3
    assert torch.equal(layer.lora_B["default"].weight, one.lora_B["default"].weight)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_loftq_finds_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    error = torch.randn(*shape, generator=torch.Generator().manual_seed(4))
    B, A = loftq.best_of_rank(error, rank)
    assert (B.shape, A.shape) == ((shape[0], rank), (rank, shape[1]))
    U, S, V = torch.linalg.svd(error.double(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ V[:rank]
    torch.testing.assert_close((B @ A).double(), best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["loftq", "rslora+loftq", "dora+loftq"])
def test_loftq_begins_nearest_to_the_weights_before_quantisation(method: str) -> None:
    layer, adapter = wrapped(method)
    Q = layer.base_layer.weight.detach()
    dense = Q + 0.1 * torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))
    loftq.begin(layer, dense, Q, unused, 1)
    adapter.start(layer, None)
    begun = Q + adapter.change(layer)["weight"].detach()
    S = torch.linalg.svdvals((dense - Q).double())
    assert float((dense - begun).norm()) == pytest.approx(float(S[RANK:].norm()), rel=1e-3)


def test_loftq_leaves_a_layer_alone_that_lost_nothing() -> None:
    layer, _ = wrapped("loftq")
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    W = layer.base_layer.weight.detach().clone()
    assert loftq.begin(layer, W, W, unused, 5).errors == [0] * 5
    assert all(torch.equal(parameter, before[name]) for name, parameter in layer.named_parameters())
