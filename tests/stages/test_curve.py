"""The loss chart: its size, and that every loss lies where its number says."""

from __future__ import annotations

import pytest

from edgepress.stages.training import Curve

pytestmark = pytest.mark.unit


def signs(lines: list[str], sign: str) -> dict[int, int]:
    """Column -> row of each mark in the plotting area."""
    return {
        column: row
        for row, line in enumerate(lines)
        if "┤" in line
        for column, letter in enumerate(line[line.index("┤") + 1 :])
        if letter == sign
    }


def test_a_straight_line_falls_from_the_upper_left_to_the_lower_right() -> None:
    lines = Curve([10.0 - i for i in range(10)], {}, 10).lines(width=80, height=10)
    assert signs(lines, "·") == {round(i * 71 / 9): i for i in range(10)}
    assert lines[0].startswith("  10.0 ┤·")
    assert lines[9].startswith("   1.0 ┤")
    assert lines[-2].split() == ["step", "1", "step", "10"]
    assert "held-out" not in lines[-1]


@pytest.mark.parametrize("steps", [1, 2, 18, 72, 73, 1000])
def test_it_never_exceeds_its_width_and_height(steps: int) -> None:
    curve = Curve([100 / (i + 1) for i in range(steps)], {steps: 2.0}, steps)
    lines = curve.lines(width=80, height=10)
    assert max(map(len, lines)) <= 80
    assert len(lines) == 13
    assert len(signs(lines, "·")) + len(signs(lines, "o")) >= min(steps, 72)


def test_a_column_shows_the_mean_of_its_steps_and_held_out_losses_lie_on_top() -> None:
    losses = [1.0, 3.0] * 500
    curve = Curve(losses, {1: 0.0, 1000: 4.0}, 1)
    drawn = signs(curve.lines(width=78, height=9), "·")
    assert set(drawn.values()) <= {4, 3, 5}  # about 2 of 0 to 4
    assert signs(curve.lines(width=78, height=9), "o") == {0: 8, 69: 0}


def test_losses_that_are_all_the_same_and_none_at_all() -> None:
    assert len(signs(Curve([2.0, 2.0], {}, 2).lines(), "·")) == 2
    assert Curve([], {}, 0).lines() == []


def test_the_picture_is_the_same_for_the_same_losses_and_another_for_others() -> None:
    curve = Curve([3.0, 2.0], {2: 2.5}, 2)
    assert curve.png() == curve.png()
    assert curve.png() != Curve([3.0, 2.1], {2: 2.5}, 2).png()
    assert b"Software" not in curve.png()
