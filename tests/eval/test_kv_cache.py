"""The compressed KV cache against attention computed key by key, and prompts at once against token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.kv_format import GROUP, KVFormat
from edgepress.checkpoints.runtime import Runtime
from edgepress.eval.answers import greedy, padded_left
from edgepress.eval.generation import Decoding, continue_prompt
from edgepress.eval.kv_cache import (
    CompressedLayer,
    KVCache,
    decode_keys,
    decode_values,
    encode_keys,
    encode_values,
    on_model,
)
from edgepress.eval.perplexity import Protocol, measure, measure_passages
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings
from edgepress.eval.text import Text
from tests.models import FAMILIES

pytestmark = pytest.mark.unit

# Two ways to one number differ by rounding, and in float32 that would tip a code over now and then.
EXACT = Runtime(dtype=torch.float64)
FORMS = [KVFormat(8), KVFormat(4, sinks=0), KVFormat(4, 40, 4), KVFormat(16, 9, 3)]


@pytest.fixture(scope="module")
def subject(tiny_model: Callable[..., Path]) -> Subject:
    return Subject(Checkpoint.open(tiny_model()), EXACT)


def some_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def logits_of(subject: Subject, prompts: list[list[int]], form: KVFormat, at_once: int) -> tuple[Tensor, KVCache]:
    """Logits (b, L, vocabulary): the first `at_once` tokens as a prompt, then one after another."""
    ids, mask = padded_left(prompts)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    model: Any = subject.model
    found = []
    with on_model(model, subject.checkpoint.shape, form, ids.shape[1] - mask.sum(1)) as cache:
        for begin, end in [(0, at_once), *((t, t + 1) for t in range(at_once, ids.shape[1]))]:
            part = slice(begin, end)
            output = model(
                input_ids=ids[:, part], attention_mask=mask[:, :end], position_ids=places[:, part],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            found.append(output.logits)
    assert cache is not None
    return torch.cat(found, dim=1), cache


# --- one layer, key by key --------------------------------------------------------------------------------------------


def brute_force(q: Tensor, k: Tensor, v: Tensor, form: KVFormat) -> Tensor:
    """Attention (L, d) of one head, each query over its own list of keys."""
    coded: dict[int, tuple[Tensor, Tensor]] = {}
    for start in range(form.sinks, len(k) - GROUP + 1, GROUP):
        part = [x[start : start + GROUP].view(1, 1, 1, GROUP, -1) for x in (k, v)]
        coded[(start - form.sinks) // GROUP] = (
            decode_keys(encode_keys(part[0], form.bits), form.bits, k.dtype)[0, 0, 0],
            decode_values(encode_values(part[1], form.bits), form.bits, v.dtype, v.shape[-1])[0, 0, 0],
        )
    rows = []
    for t in range(len(q)):
        keys, values = [], []
        for j in range(t + 1):
            sink = j < form.sinks
            if form.window and t - j >= form.window and not sink:
                continue
            group, place = divmod(j - form.sinks, GROUP)
            if sink or group == (t - form.sinks) // GROUP:
                keys.append(k[j])
                values.append(v[j])
            else:
                keys.append(coded[group][0][place])
                values.append(coded[group][1][place])
        weights = torch.softmax(torch.stack(keys) @ q[t] / q.shape[-1] ** 0.5, dim=0)
        rows.append(weights @ torch.stack(values))
    return torch.stack(rows)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("at_once", [1, 50, 110])
def test_attention_is_that_over_each_tokens_own_keys(form: KVFormat, at_once: int) -> None:
    length, padding = 110, torch.tensor([0, 13])
    q, k, v = torch.randn(3, 2, 2, length, 16, generator=torch.Generator().manual_seed(3)).unbind()
    k[:, :, :, 5] += 4  # a channel far from zero, as keys have them
    layer = CompressedLayer(form, padding)
    states = torch.zeros(2, at_once, 1)
    causal = torch.ones(at_once, at_once, dtype=torch.bool).tril()
    base = causal & (torch.arange(at_once) >= padding[:, None, None, None])
    base |= torch.eye(at_once, dtype=torch.bool)
    mask = layer.mask(base, states)
    float_base = torch.zeros(base.shape).masked_fill(~base, torch.finfo(torch.float32).min)
    assert torch.equal(layer.mask(float_base, states) == 0, mask)
    outputs = [
        F.scaled_dot_product_attention(q[:, :, :at_once], *layer.update(k[:, :, :at_once], v[:, :, :at_once]), mask)
    ]
    for t in range(at_once, length):
        held, offset = layer.get_mask_sizes(1)
        keys, values = layer.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
        assert keys.shape[2] == held and held + offset == t + 1
        visible = (offset + torch.arange(held) >= padding[:, None])[:, None, None]
        visible |= torch.tensor(t) < padding[:, None, None, None]
        outputs.append(F.scaled_dot_product_attention(q[:, :, t : t + 1], keys, values, visible))
    found = torch.cat(outputs, dim=2)
    for row, pad in enumerate(padding.tolist()):
        for head in range(2):
            expected = brute_force(q[row, head, pad:], k[row, head, pad:], v[row, head, pad:], form)
            torch.testing.assert_close(found[row, head, pad:], expected, rtol=1e-4, atol=1e-5)


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_prompt_at_once_is_its_tokens_one_by_one(family: str, tiny_model: Callable[..., Path]) -> None:
    subject = Subject(Checkpoint.open(tiny_model(family)), EXACT)
    prompt = some_ids(75)
    for form, one_by_one in ((KVFormat(4, sinks=2), 62), (KVFormat(8, 20, 4), 67)):
        whole, _ = logits_of(subject, [prompt], form, 75)
        stepped, _ = logits_of(subject, [prompt], form, one_by_one)
        torch.testing.assert_close(whole, stepped, rtol=1e-4, atol=1e-4)
        plain: Any = subject.model
        with torch.no_grad():
            intact = plain(input_ids=torch.tensor([prompt])).logits
        assert float((whole - intact).abs().max()) > 0.01  # so that the comparison above says something


def test_evicted_tokens_are_as_if_masked(subject: Subject) -> None:
    prompt, form = some_ids(80), KVFormat(16, 12, 3)
    place = torch.arange(80)
    distance = place[:, None] - place
    kept = (distance >= 0) & ((distance < 12) | (place < 3))
    model: Any = subject.model
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt]), attention_mask=kept[None, None]).logits
    for at_once in (1, 70):
        found, _ = logits_of(subject, [prompt], form, at_once)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_padding_on_the_left_changes_nothing(subject: Subject, form: KVFormat) -> None:
    prompts = [some_ids(70, 1), some_ids(41, 2), some_ids(3, 3)]
    together, _ = logits_of(subject, prompts, form, 60)
    for row, prompt in enumerate(prompts):
        alone, _ = logits_of(subject, [prompt], form, len(prompt))
        torch.testing.assert_close(together[row, -len(prompt) :], alone[0], rtol=1e-4, atol=1e-4)
    answers = greedy(subject, prompts, 6, form)
    assert answers == [greedy(subject, [prompt], 6, form)[0] for prompt in prompts]


@torch.no_grad()
def test_sequences_that_leave_the_batch_change_nothing(subject: Subject) -> None:
    prompts, form = [some_ids(70, 1), some_ids(69, 2), some_ids(37, 3)], KVFormat(4, 40, 2)
    ids, mask = padded_left(prompts)
    model: Any = subject.model
    kept = torch.tensor([2])
    alone, single = logits_of(subject, [prompts[2]], form, 35)
    with on_model(model, subject.checkpoint.shape, form, ids.shape[1] - mask.sum(1)) as cache:
        assert cache is not None
        for begin, end in ((0, 68), (68, 69), (69, 70)):
            if begin == 68:
                cache.batch_select_indices(kept)
                ids, mask = ids[kept], mask[kept]
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, begin:end]
            found = model(
                input_ids=ids[:, begin:end], attention_mask=mask[:, :end], position_ids=places,
                past_key_values=cache, use_cache=True,
            ).logits  # fmt: skip
    torch.testing.assert_close(found[0, -1], alone[0, -1], rtol=1e-4, atol=1e-4)
    assert cache.nbytes == single.nbytes


@pytest.mark.parametrize("form", [KVFormat(8), KVFormat(4, 40, 4), KVFormat(4, sinks=0)], ids=str)
def test_bytes_are_those_of_the_format(subject: Subject, form: KVFormat) -> None:
    shape = subject.checkpoint.shape
    for tokens in (70, 101):
        _, cache = logits_of(subject, [some_ids(tokens)], form, tokens - 6)
        full_bits = 64  # this model is float64
        sizes = shape.kv_heads, shape.head_dim, full_bits
        first, finished = form.groups(tokens)
        # Room for sinks and the open group is taken from the first token on.
        one = (form.sinks + GROUP) * form.token_bytes(*sizes) + (finished - first) * form.group_bytes(*sizes)
        assert cache.nbytes == len(shape.blocks) * one
        assert one <= form.capacity_bytes(tokens + 1, shape.kv_heads, shape.head_dim, full_bits)
    assert one < tokens * form.token_bytes(shape.kv_heads, shape.head_dim, full_bits)


# --- what uses it -----------------------------------------------------------------------------------------------------

TEXT = Text("words", ("one two three four five six seven eight nine ten " * 40,))


def test_perplexity_is_that_of_tokens_one_by_one(subject: Subject) -> None:
    for form in (KVFormat(4), KVFormat(8, 16, 2)):
        found = measure(subject.checkpoint, TEXT, Protocol("windows", 70, 210), EXACT, kv=form)
        ids = TEXT.token_ids(subject.tokenizer, 210).view(3, 70)
        logits, _ = logits_of(subject, ids.tolist(), form, 30)
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp()
        assert found.perplexity == pytest.approx(float(expected), rel=1e-4)
        assert str(form) in found.protocol


def test_rows_of_unequal_length_are_measured_as_if_alone(subject: Subject) -> None:
    lines = ["one two three four " * 12, "five six " * 9, "seven " * 30]
    form, protocol = KVFormat(4), Protocol("rows", 64, 0)
    together = measure_passages(subject.checkpoint, Text("t", ("\n".join(lines),)), protocol, EXACT, kv=form)
    for line, found in zip(lines, together, strict=True):
        (alone,) = measure_passages(subject.checkpoint, Text("t", (line,)), protocol, EXACT, kv=form)
        assert found.nll == pytest.approx(alone.nll, rel=1e-4)


def test_sixteen_bits_are_no_setting(subject: Subject) -> None:
    protocol = Protocol("windows", 48, 96)
    plain = measure(subject.checkpoint, TEXT, protocol, Runtime())
    assert measure(subject.checkpoint, TEXT, protocol, Runtime(), kv=KVFormat(16, 0, 9)) == plain
    with on_model(subject.model, subject.checkpoint.shape, KVFormat(16), torch.zeros(1)) as cache:
        assert cache is None
    decoding = Decoding(10), Decoding(10, kv=KVFormat(16))
    said = [continue_prompt(subject.checkpoint, "for", how, torch.device("cpu")).text for how in decoding]
    assert said[0] == said[1] and str(decoding[0]) == str(decoding[1])


def test_generation_says_and_uses_the_cache(subject: Subject) -> None:
    prompt = "The for statement is used to iterate over the elements of a sequence " * 6
    said = {}
    for form in (KVFormat(), KVFormat(4, 6, 1)):
        how = Decoding(20, kv=form)
        said[form] = continue_prompt(subject.checkpoint, prompt, how, torch.device("cpu")).text
        assert ("KV cache 4 bit, window 6, 1 sinks" in str(how)) != form.plain
    assert len(set(said.values())) == 2


def test_no_hook_stays_behind(subject: Subject) -> None:
    prompt = some_ids(20)
    before = greedy(subject, [prompt], 5)
    greedy(subject, [prompt], 5, KVFormat(4, 6, 1))
    assert greedy(subject, [prompt], 5) == before
    assert not any(module._forward_pre_hooks for module in subject.model.modules())


def test_settings_refuse_what_cannot_be() -> None:
    with pytest.raises(PlanError, match="--kv-bits 5"):
        Settings(kv_bits=5)
    with pytest.raises(PlanError, match="at least 5"):
        Settings(kv_window=4)


def test_layers_of_another_kind_are_refused() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("mamba2", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="mamba2"):
        KVCache(KVFormat(4), config, torch.zeros(1))
