"""Which tokens a compressed KV cache holds, against the rule applied token by token, and its bytes."""

from __future__ import annotations

import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.kv_format import GROUP, KVFormat, value_group

pytestmark = pytest.mark.unit


def held_groups(form: KVFormat, tokens: int) -> set[int]:
    """Finished groups with a token that the next one, number `tokens`, sees."""
    held = set()
    for place in range(form.sinks, tokens):
        group = (place - form.sinks) // GROUP
        finished = form.sinks + (group + 1) * GROUP <= tokens
        if finished and (not form.window or tokens - place < form.window):
            held.add(group)
    return held


@pytest.mark.parametrize("form", [KVFormat(4), KVFormat(8, 5, 4), KVFormat(4, 40, 0), KVFormat(8, 100, 7)], ids=str)
def test_groups_by_the_rule(form: KVFormat) -> None:
    for tokens in range(1, 260):
        assert set(range(*form.groups(tokens))) == held_groups(form, tokens), tokens


def test_bytes_of_a_group_by_hand() -> None:
    # 3 heads of 64 channels, 32 tokens: 12,288 values at 4 bits; a grid of two float16 for each of 64 channels and
    # for each of 32 x 2 halves of a token
    assert KVFormat(4).group_bytes(3, 64) == 12_288 // 2 + 3 * (64 + 64) * 4
    assert KVFormat(8).group_bytes(3, 64) == 12_288 + 3 * (64 + 64) * 4
    assert KVFormat(16, 64).group_bytes(3, 64) == 12_288 * 2
    assert [value_group(width) for width in (128, 64, 48, 80, 16, 6)] == [32, 32, 24, 20, 16, 6]


@pytest.mark.parametrize("form", [KVFormat(4), KVFormat(8, 5, 4), KVFormat(4, 40, 0), KVFormat(8, 100, 7)], ids=str)
def test_capacity_is_the_most_ever_held(form: KVFormat) -> None:
    room = form.sinks + GROUP
    for context in (1, 20, 36, 37, 68, 69, 100, 139, 140, 141, 259, 1000):
        most = max(len(held_groups(form, before)) for before in range(context))
        expected = min(context, room) * form.token_bytes(2, 16) + most * form.group_bytes(2, 16)
        assert form.capacity_bytes(context, 2, 16) == expected, context


def test_eviction_bounds_the_bytes() -> None:
    form = KVFormat(4, 64, 4)
    assert (
        form.capacity_bytes(10_000, 3, 64) == form.capacity_bytes(300, 3, 64) < KVFormat(4).capacity_bytes(300, 3, 64)
    )


def test_a_layer_with_a_window_of_its_own_holds_no_more() -> None:
    assert KVFormat(8, 100, 4).for_layer(None) == KVFormat(8, 100, 4)
    assert KVFormat(8, 100, 4).for_layer(512) == KVFormat(8, 104, 0)
    assert KVFormat(8, 100, 4).for_layer(64) == KVFormat(8, 64, 0)
    assert KVFormat(4).for_layer(64) == KVFormat(4, 64, 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ((3, 0, 4), ["--kv-bits 3", "16, 8, 4"]),
        ((4, 4, 4), ["--kv-window 4", "--kv-sinks 4", "at least 5"]),
        ((4, -1, 4), ["--kv-window -1"]),
        ((2, 3, -1), ["--kv-bits 2", "--kv-sinks -1"]),  # all at once
    ],
)
def test_wrong_settings(wrong: tuple[int, int, int], words: list[str]) -> None:
    with pytest.raises(PlanError) as error:
        KVFormat(*wrong)
    assert all(word in str(error.value) for word in words)
