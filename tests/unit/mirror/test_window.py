"""The window of a journal's points, where an earlier process has cut some of them. What it is in
one process is in tests/model/pointwindows.py."""

from __future__ import annotations

import pytest

from nbdmirror.mirror.window import Journal, Window


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Points(Journal):
    """A journal with room for everything."""

    newest = 0
    base = 0

    def __init__(self, newest: int) -> None:
        self.newest = newest

    def in_the_way(self, bytes_max: int) -> int:
        return 0


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_points_of_an_earlier_process_leave_the_window_by_their_age(clock: Clock) -> None:
    window = Window(60.0, clock)
    window.learn({3: 90.0, 4: 50.0, 5: 10.0}, clock())
    points = Points(5)
    assert window.next(points, 0) == 3, "the newest one that is older than the window"
    points.base = 3
    assert window.next(points, 0) == 0
    clock.now_s += 11.0
    assert window.next(points, 0) == 4
    assert window.reaches_s(4) == 61.0


def test_points_after_them_follow(clock: Clock) -> None:
    window = Window(60.0, clock)
    window.learn({3: 90.0}, clock())
    window.cut(4)
    assert window.next(Points(4), 0) == 3
    clock.now_s += 60.0
    assert window.next(Points(4), 0) == 4


@pytest.mark.parametrize(
    ("ages_s", "reaches_s"),
    [
        ({3: 10.0, 4: 20.0, 5: 5.0}, {3: 10.0, 4: 10.0, 5: 5.0}),
        ({3: 0.0, 4: 0.0, 5: 0.0}, {3: 0.0, 4: 0.0, 5: 0.0}),
    ],
    ids=["set back between two points", "set back before the restart"],
)
def test_a_wall_clock_that_was_set_back(
    clock: Clock, ages_s: dict[int, float], reaches_s: dict[int, float]
) -> None:
    """Points stay in their order, and none was cut in the future."""
    window = Window(60.0, clock)
    window.learn(ages_s, clock())
    assert {number: window.reaches_s(number) for number in ages_s} == reaches_s
