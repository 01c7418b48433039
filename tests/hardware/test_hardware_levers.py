"""What would have to give: every lever's worth planned anew, and the smallest change checked from both sides."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import ModelShape, Pattern, with_vocabulary
from edgepress.hardware.check import check
from edgepress.hardware.levers import Levers, find_levers, levers
from edgepress.hardware.needs import Request, needs
from edgepress.hardware.soc import load_soc, shipped_socs

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]

REQUEST = Request()


def _found(shape: ModelShape, chip: str = "siracusa", request: Request = REQUEST) -> Levers:
    return find_levers(shape, load_soc(chip), request)


def test_stories15m_fits_with_its_vocabulary_cut_to_the_token(make: Make) -> None:
    shape, soc = make("stories15m", embedding_bits=8, grid=Grid(4, 32)), load_soc("siracusa")
    found = find_levers(shape, soc, REQUEST)
    (step,) = found.smallest
    tokens = int(step.removeprefix("--vocabulary-size "))
    assert check(with_vocabulary(shape, tokens), soc).fits
    assert not check(with_vocabulary(shape, tokens + 1), soc).fits
    assert found.ranked[0].lever == "vocabulary" and found.ranked[0].enough == step and not found.missing_then


@pytest.mark.parametrize("chip", shipped_socs())
def test_worth_is_what_planning_anew_saves(make: Make, chip: str) -> None:
    shape, soc = make("smollm2-135m", adapter_rank=8), load_soc(chip)
    before = sum(needs(shape, soc, REQUEST).by_role().values())
    known = {lever.name: lever for lever in levers(shape, soc, REQUEST)}
    found = find_levers(shape, soc, REQUEST)
    assert {worth.lever for worth in found.ranked} == set(known)
    for worth in found.ranked:
        lever = known[worth.lever]
        changed, request = lever.apply((shape, REQUEST), lever.steps[-1])
        assert worth.saved_bytes == before - sum(needs(changed, soc, request).by_role().values())
    saved = [worth.saved_bytes for worth in found.ranked]
    assert saved == sorted(saved, reverse=True)


def test_each_step_needs_no_more_than_the_one_before(make: Make) -> None:
    """What the bisection rests on."""
    soc = load_soc("siracusa")
    for lever in levers(make("stories260k", adapter_rank=8), soc, REQUEST):
        places = sorted({round(i * (len(lever.steps) - 1) / 12) for i in range(13)})
        planned = [lever.apply((make("stories260k", adapter_rank=8), REQUEST), lever.steps[i]) for i in places]
        by_role = [needs(shape, soc, request).by_role() for shape, request in planned]
        for one, other in pairwise(by_role):
            assert all(other[role] <= one[role] for role in one), lever.name


@pytest.mark.parametrize("chip", ["siracusa", "siracusa:sram_role=weights", "gap9", "esp32-s3", "ensemble-e8"])
def test_the_change_fits_and_no_part_of_it_can_be_left_out(make: Make, chip: str) -> None:
    shape, soc = make("smollm2-135m", grid=Grid(8, 64)), load_soc(chip)
    found = find_levers(shape, soc, REQUEST)
    known = levers(shape, soc, REQUEST)
    for words in filter(None, (found.smallest, found.spread)):
        chosen = [next((x, s) for x in known for s in x.steps if x.how(s) == word) for word in words]
        for left_out in (None, *chosen):
            state = (shape, REQUEST)
            for lever, step in chosen:
                if left_out is None or lever is not left_out[0]:
                    state = lever.apply(state, step)
            assert needs(state[0], soc, state[1]).short(soc) == {} if left_out is None else True
            assert left_out is None or needs(state[0], soc, state[1]).short(soc), (words, left_out)


def test_a_model_beyond_help_says_what_is_missing(make: Make) -> None:
    found = _found(make("llama-3.2-1b", embedding_bits=4, grid=Grid(4, 128)))
    assert found.smallest == found.spread == ()
    assert found.missing_then["weights"] == found.needs_then["weights"] - 4_194_304 > 0


def test_a_lever_that_gives_nothing_on_a_chip_is_worth_nothing(make: Make) -> None:
    shape = make("smollm2-135m", grid=Grid(8, -1))
    worth = {x.lever: x.saved_bytes for x in _found(shape, "siracusa-neureka").ranked}
    assert worth["weight bits"] == 0 and "N:M pattern" not in worth  # slots of 8 bit, zeros in full
    worth = {x.lever: x.saved_bytes for x in _found(shape, "siracusa").ranked}
    assert worth["weight bits"] > 0 and worth["N:M pattern"] > 0


def test_only_what_can_still_give_is_a_lever(make: Make) -> None:
    soc = load_soc("siracusa")
    names = {x.name for x in levers(make("smollm2-135m", grid=Grid(3, 64), pattern=Pattern(2, 4)), soc, REQUEST)}
    assert not names & {"weight bits", "N:M pattern", "adapter rank"}
    bare = {x.name for x in levers(make("microllama"), soc, REQUEST)}
    assert not bare & {"vocabulary", "embedding bits"}
    least = Request(context=16, kv_bits=4, prefill_chunk=1)
    small = {x.name for x in levers(make("stories260k"), soc, least)}
    assert not small & {"context", "KV precision", "prefill chunk"}
