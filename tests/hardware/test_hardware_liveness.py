"""Lifetimes and addresses against a simulated allocator and against brute force."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.hardware.activations import AddressPlan, Lifetime, address_plan, alive_bytes, assign_addresses, lifetimes
from edgepress.hardware.operators import Operator, forward
from tests.models import FAMILIES, tiny_config

pytestmark = pytest.mark.unit


def simulate(operators: list[Operator]) -> list[int]:
    """Allocate when first used, free after the last reader, count: no interval arithmetic."""
    uses: dict[str, int] = {}
    for x in operators:
        for b in (*x.reads, *x.writes):
            uses[b.name] = uses.get(b.name, 0) + 1
    held: dict[str, int] = {}
    peaks = []
    for x in operators:
        for b in (*x.reads, *x.writes):
            held[b.name] = b.nbytes
        peaks.append(sum(held.values()))
        for b in (*x.reads, *x.writes):
            uses[b.name] -= 1
            if not uses[b.name]:
                del held[b.name]
    return peaks


def check_no_overlap(plan: AddressPlan) -> None:
    """Every byte at every step has one owner at most."""
    for a, b in combinations(plan.buffers, 2):
        steps = set(range(a.first, a.last + 1)) & set(range(b.first, b.last + 1))
        apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
        assert not steps or apart, (a, b)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("tokens", "context"), [(1, 40), (40, 40), (5, 17)])
def test_alive_bytes_are_those_of_a_simulated_allocator(family: str, tokens: int, context: int) -> None:
    operators = forward(shape_from_config(tiny_config(family)), tokens=tokens, context=context)
    assert alive_bytes(operators) == simulate(operators)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(("tokens", "context", "bits"), [(1, 64, 8), (64, 64, 8), (16, 200, 16)])
def test_peak_by_hand(preset: str, tokens: int, context: int, bits: int) -> None:
    """A LLaMA's fullest moments, written down from its block: at v, at the scores, at the MLP, at the head."""
    config = PRESETS[preset]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    moments = [
        tokens * (2 * hidden + q + 2 * kv),  # residual, normed, q, k, v
        tokens * (hidden + q + heads * context),  # residual, q (then mixed), scores
        tokens * (2 * hidden + 2 * config["intermediate_size"]),  # residual, normed, gate, up
        hidden + config["vocab_size"],  # one token's normed row and its logits
    ]
    operators = forward(shape_from_config(config), tokens=tokens, context=context, activation_bits=bits)
    assert max(alive_bytes(operators)) == max(moments) * bits // 8


@pytest.mark.parametrize("tokens", [1, 30])
def test_addresses_of_a_model_do_not_overlap_and_waste_little(tokens: int) -> None:
    for family in FAMILIES:
        operators = forward(shape_from_config(tiny_config(family)), tokens=tokens, context=30)
        plan = address_plan(operators)
        check_no_overlap(plan)
        assert {(b.name, b.nbytes) for b in plan.buffers} == {(x.name, x.nbytes) for x in lifetimes(operators)}
        assert plan.peak_bytes == max(alive_bytes(operators)) <= plan.arena_bytes <= 1.1 * plan.peak_bytes


def test_random_lifetimes_never_overlap() -> None:
    dice = random.Random(5)
    for _ in range(200):
        lives = []
        for i in range(dice.randint(1, 14)):
            first = dice.randint(0, 12)
            lives.append(Lifetime(str(i), dice.randint(1, 40), first, first + dice.randint(0, 8)))
        for alignment in (1, 4, 16):
            plan = assign_addresses(lives, alignment)
            check_no_overlap(plan)
            assert all(b.offset % alignment == 0 for b in plan.buffers)
            alive = [sum(x.nbytes for x in lives if x.first <= t <= x.last) for t in range(30)]
            assert plan.peak_bytes == max(alive) <= plan.arena_bytes


def test_the_tightest_gap_is_taken() -> None:
    """Two gaps of 20 and of 10 bytes lie below a wall: a buffer of 8 goes into the second."""
    lives = [
        Lifetime("wall", 100, 0, 9), Lifetime("long gone", 60, 0, 0), Lifetime("a", 50, 0, 9),
        Lifetime("gone", 45, 0, 0), Lifetime("b", 44, 0, 9), Lifetime("late", 8, 5, 9),
    ]  # fmt: skip
    plan = {b.name: b for b in assign_addresses(lives, 1).buffers}
    assert plan["gone"].offset == 210 and plan["long gone"].offset == 100
    assert plan["late"].offset == 210  # the gap of 45 bytes that `gone` left, not the 60 of `long gone`


def test_input_of_a_model_without_embedding_is_alive_from_the_start() -> None:
    shape = shape_from_config(PRESETS["stories260k"])
    bare = type(shape)(shape.family, shape.config, shape.blocks, ())
    residual = next(x for x in lifetimes(forward(bare)) if x.name == "residual")
    assert (residual.first, residual.last) == (0, len(forward(bare)) - 1)


def test_plan_as_a_dictionary() -> None:
    found = address_plan(forward(shape_from_config(PRESETS["stories260k"]))).to_dict()
    assert set(found) == {"buffers", "arena_bytes", "peak_bytes"}
    assert set(found["buffers"][0]) == {"name", "nbytes", "first", "last", "offset"}
