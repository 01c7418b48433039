"""The search against trying everything, and the proxy it ranks by."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware import fit
from edgepress.hardware.check import check
from edgepress.hardware.fit import QUANTISATIONS, Quantisation, Settings, reshaped, search
from edgepress.hardware.soc import Soc, load_soc

pytestmark = pytest.mark.unit

SIRACUSA = load_soc("siracusa")


def cost(shape: ModelShape) -> Any:
    def loss(s: Settings) -> tuple[float, bool]:
        how = s.quantisation
        total = fit.quantisation_cost(how.bits, how.group, shape.hidden_size) + fit.EMBEDDINGS[how.embedding_bits]
        total += fit.depth_cost(s.removed, len(shape.blocks)) + fit.PATTERNS.get(s.pattern, 0)
        return total + fit.vocabulary_cost(s.vocabulary, shape.vocabulary), False

    return loss


def with_room(soc: Soc, mib: float) -> Soc:
    """The chip with another weight memory."""
    memories = tuple(
        replace(m, capacity=replace(m.capacity, value=mib)) if m.role == "weights" else m for m in soc.memories
    )
    return replace(soc, memories=memories)


@pytest.mark.parametrize("mib", [1, 2.5, 4, 9, 40, 100])
def test_nothing_better_is_missed(mib: float) -> None:
    """Every setting tried one by one: the best that fits is the first that the search names."""
    shape = shape_from_config(PRESETS["stories15m"] | {"num_hidden_layers": 9})
    soc, sizes, loss = with_room(SIRACUSA, mib), [512, 2048, 8192, 16384], cost(shape)
    found = search(shape, soc, loss, removable=3, vocabularies=sizes, best=6)
    fitting = {}
    for how, removed, size in itertools.product((Quantisation(), *QUANTISATIONS), range(4), [*sizes, 32000]):
        grid = reshaped(shape, Settings(size, quantisation=how)).grid  # the group that the model's widths allow
        settings = Settings(size, removed, "none", replace(how, group=grid.group) if grid else how)
        if check(reshaped(shape, settings), soc).fits:
            fitting[settings] = loss(settings)[0]
    if not fitting:
        assert not found.fitting
        assert found.closest
        return
    assert found.fitting[0].loss == pytest.approx(min(fitting.values()))
    assert not found.closest
    for candidate in found.fitting:
        assert candidate.verdict.fits
        assert check(reshaped(shape, candidate.settings), soc).fits
    losses = [c.loss for c in found.fitting]
    assert losses == sorted(losses)
    assert found.verdicts < len(QUANTISATIONS) * 20


def test_stories15m_fits_only_with_its_vocabulary_cut() -> None:
    shape = shape_from_config(PRESETS["stories15m"])
    found = search(shape, SIRACUSA, cost(shape), removable=0, vocabularies=[1024, 2048, 4096, 8192, 16384])
    assert found.fitting
    assert all(c.settings.vocabulary < shape.vocabulary for c in found.fitting)
    uncut = search(shape, SIRACUSA, cost(shape), removable=4, vocabularies=[])
    assert not uncut.fitting
    assert all(not c.verdict.fits and c.over_bytes > 0 for c in uncut.closest)


def test_stories260k_fits_at_8_and_at_4_bits_and_as_it_is() -> None:
    shape = shape_from_config(PRESETS["stories260k"])
    found = search(shape, SIRACUSA, cost(shape), removable=0, vocabularies=[], best=50)
    assert {c.settings.quantisation.bits for c in found.fitting} == {0, 8, 4, 3}
    assert found.fitting[0].loss == 0


@pytest.mark.parametrize("preset", ["smollm2-135m", "llama-3.2-1b"])
def test_what_fits_with_nothing_shows_the_closest(preset: str) -> None:
    shape = shape_from_config(PRESETS[preset])
    found = search(shape, SIRACUSA, cost(shape), removable=len(shape.blocks) - 6, vocabularies=[512, 4096], context=256)
    assert not found.fitting
    lacking = [c.over_bytes for c in found.closest]
    assert lacking == sorted(lacking)
    assert len({c.settings.quantisation.bits for c in found.closest[:2]}) == 2
    assert found.closest[-1].settings.removed == 0


def test_patterns_are_tried_only_where_they_save_room() -> None:
    shape = shape_from_config(PRESETS["stories15m"])
    slots = load_soc("siracusa-neureka")  # every weight takes its slot of 8 bit, zero or not
    found = search(shape, slots, cost(shape), removable=0, vocabularies=[256], patterns=["2:4"])
    assert not found.patterns_help
    assert all(c.settings.pattern == "none" for c in (*found.fitting, *found.closest))


def test_a_pattern_that_saves_room_joins_the_ways_to_quantise_where_it_does() -> None:
    shape = shape_from_config(PRESETS["stories15m"])
    patterns = ["2:4", "1:16"]
    found = search(shape, SIRACUSA, cost(shape), removable=0, vocabularies=[2048], patterns=patterns, best=100)
    assert found.patterns_help
    seen = {(c.settings.pattern, c.settings.quantisation.bits) for c in found.fitting}
    assert {("none", 4), ("2:4", 4)} <= seen
    assert ("1:16", 4) not in seen  # a 4-bit position for each zero of 4 bits saves nothing


def test_a_pattern_that_no_layer_width_divides_is_not_tried() -> None:
    shape = shape_from_config(PRESETS["stories260k"])  # its feed-forward is 172 wide
    found = search(shape, SIRACUSA, cost(shape), removable=0, vocabularies=[], patterns=["1:8"], best=100)
    assert not found.patterns_help


def test_the_proxy_gives_back_what_was_measured_and_never_falls() -> None:
    assert fit.depth_cost(2, 16) == pytest.approx(math.log(55.24 / 26.61), abs=1e-3)
    assert fit.depth_cost(4, 16) == pytest.approx(math.log(230.77 / 26.61), abs=1e-3)
    assert fit.depth_cost(2, 30) == pytest.approx(math.log(17.31 / 13.82), abs=1e-3)
    assert fit.depth_cost(0, 6) == 0
    depth = [fit.depth_cost(n, 24) for n in range(24)]
    assert depth == sorted(depth)
    words = [fit.vocabulary_cost(2**n, 2**17) for n in range(6, 18)]
    assert words == sorted(words, reverse=True)
    assert words[-1] == 0 < words[-2]
    longer = [fit.length_cost(1 + n / 10) for n in range(-1, 20)]
    assert longer == sorted(longer)
    assert longer[1] == 0
    by_bits = [fit.quantisation_cost(bits, 64, 576) for bits in (0, 8, 4, 3)]
    assert by_bits == sorted(by_bits)
    assert by_bits[0] == 0 < by_bits[1]
    assert fit.quantisation_cost(4, 128, 576) == pytest.approx(math.log(22.89 / 21.34), abs=1e-3)
    assert fit.quantisation_cost(4, 128, 576) < fit.quantisation_cost(4, -1, 576)
    assert fit.quantisation_cost(4, 64, 576) == fit.quantisation_cost(4, -1, 64)
    assert fit.EMBEDDINGS[0] == 0 < fit.EMBEDDINGS[8] < fit.EMBEDDINGS[4]
    assert fit.PATTERNS["2:4"] == pytest.approx(math.log(161.10 / 26.61), abs=1e-3)


def test_shapes_that_cannot_be() -> None:
    shape = shape_from_config(PRESETS["stories15m"])
    with pytest.raises(PlanError, match="cannot be cut from one of 32000"):
        reshaped(shape, Settings(40000))
    odd = shape_from_config(PRESETS["stories15m"] | {"hidden_size": 36, "intermediate_size": 44, "head_dim": 6})
    found = search(odd, SIRACUSA, cost(odd), removable=0, vocabularies=[])
    assert {c.settings.quantisation.quant for c in (*found.fitting, *found.closest)} == {"none"}


def test_the_search_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, edgepress.pipeline.fit; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
