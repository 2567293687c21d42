"""What guests change again and again is copied last: what that saves, in virtual time, and that
every copy still comes to its end."""

from __future__ import annotations

import pytest
from unit.mirror.copierparts import KIB, Clock, Devices, a_copier, data
from unit.mirror.guestparts import (
    GRANULARITY,
    Guest,
    Scene,
    World,
    by_turns,
    steady,
    until,
    zipf,
)

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.mirror.hot_last import AGE_S_MIN, REST_S_MAX, HotLast
from nbdmirror.mirror.rate_limit import Haste

SCENE = Scene(full_s=40.0, granules=4096)
QUIET = 3.0
"""When a guest gets quiet, as parts of what a copy takes."""

SECOND = 1 / SCENE.full_s

Guests = Guest | list[Guest]


def until_quiet(guest: Guest) -> Guest:
    return until(guest, QUIET)


def spot(share: float, granules: int) -> Guest:
    """In few places."""
    return steady(share, granules / SCENE.granules, 1 / 3)


def compare(guests: Guests) -> tuple[World, World]:
    """Without and with, until the end, and no later than a while after it got quiet."""
    worlds = World(guests, SCENE, leaves_hot=False), World(guests, SCENE)
    for world in worlds:
        assert world.run(QUIET + 2) is not None, "the copy does not end"
    return worlds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guests", "most"),
    [
        (zipf(1.0, 1.0), 0.99),
        (until_quiet(zipf(1.5, 1.0)), 0.97),
        ([spot(0.4, 205), steady(0.4)], 0.995),
        ([until_quiet(spot(3.0, 41)), steady(0.4)], 0.95),
        (until_quiet(spot(4.0, 82)), 0.9),
    ],
)
def test_less_is_sent_where_a_few_places_are_changed_often(guests: Guests, most: float) -> None:
    plain, hot = compare(guests)
    assert hot.sent <= most * plain.sent
    assert hot.now_s <= plain.now_s + REST_S_MAX + 1.0


@pytest.mark.parametrize(
    "guest", [steady(0.0), steady(0.2), steady(0.5), steady(0.8), zipf(0.3, 1.0), spot(0.9, 40)]
)
def test_nothing_is_lost_where_all_places_are_the_same(guest: Guest) -> None:
    plain, hot = compare(guest)
    assert hot.sent <= 1.01 * plain.sent and hot.now_s <= 1.01 * plain.now_s + REST_S_MAX


@pytest.mark.parametrize("share", [0.9, 0.97, 1.05])
@pytest.mark.parametrize("granules", [10, 40, 400])
def test_a_copy_that_comes_closer_slowly_does_not_rest(share: float, granules: int) -> None:
    plain, hot = compare(until_quiet(spot(share, granules)))
    assert hot.now_s <= plain.now_s + 2 * REST_S_MAX


@pytest.mark.parametrize(
    "guests",
    [
        [by_turns(spot(3.0, 40), SECOND, SECOND), steady(0.4)],
        by_turns(spot(3.0, 400), 10 * SECOND, 5 * SECOND),
        [by_turns(guest, 3 * SECOND, 5 * SECOND) for guest in (spot(2.0, 40), zipf(2.0, 1.0))],
    ],
)
def test_a_guest_that_pauses_is_caught_up_with(guests: Guests) -> None:
    compare(guests)


@pytest.mark.slow
def test_nothing_is_left_out_for_ever() -> None:
    """A guest that changes everything faster than it is copied, and a few places all the time."""
    world = World([spot(1.0, 20), steady(3.0)], SCENE)
    assert world.run(10) is None
    assert world.hot.found.size
    assert min(world.copied_s) >= world.now_s - 4 * SCENE.full_s


# By hand.


def test_what_is_hot_is_known_from_what_was_passed() -> None:
    dirty = DirtyBitmap(16 * GRANULARITY, GRANULARITY)
    hot = HotLast(dirty)
    hot.look(0.0, 0, None)
    hot.look(0.1, 8 * GRANULARITY, None)
    dirty.mark(3 * GRANULARITY, GRANULARITY)
    dirty.mark(12 * GRANULARITY, GRANULARITY)
    hot.look(AGE_S_MIN, 8 * GRANULARITY, None)
    assert hot.found.size == 0
    hot.look(0.2 + AGE_S_MIN, 8 * GRANULARITY, None)
    assert hot.found.size == GRANULARITY and hot.found.is_hot(3 * GRANULARITY, 1)
    hot.look(1.0, 2 * GRANULARITY, None)  # past the end, and on from the start
    hot.look(2.0, 2 * GRANULARITY, None)
    assert hot.found.is_hot(12 * GRANULARITY, 1)


def test_what_became_dirty_while_the_copier_stood_still_is_not_hot() -> None:
    dirty = DirtyBitmap(16 * GRANULARITY, GRANULARITY)
    hot = HotLast(dirty)
    hot.look(0.0, 0, None)
    hot.look(0.1, 8 * GRANULARITY, None)
    hot.start_over(8 * GRANULARITY)
    dirty.mark_all()
    hot.look(100.0, 8 * GRANULARITY, None)
    hot.look(200.0, 9 * GRANULARITY, None)
    hot.look(300.0, 9 * GRANULARITY, None)
    assert hot.found.size == GRANULARITY, "of what was passed since then"


def test_the_copier_leaves_it_out_and_takes_it_last() -> None:
    """With its guest's changes in between; after READY all is in order."""
    clock = Clock()
    devices = Devices(data(1024 * KIB))
    copier, tracker, _ = a_copier(devices, clock=clock)
    copier.start()
    hot = 5 * 64 * KIB
    for at_s in (0.0, 0.1, 1.0):
        if at_s:
            tracker.dirty.mark(hot, 1)
        copier.hot.look(at_s, 1024 * KIB if at_s else 0, None)
    assert copier.hot.found.is_hot(hot, 1)
    for haste, first in ((Haste.STEADY, 9 * 64 * KIB), (Haste.LAG, hot)):
        clock.advance(10.0)
        copier.set_haste(haste)
        devices.started.clear()
        for offset in (hot, 9 * 64 * KIB):
            tracker.dirty.mark(offset, 1)
        copier.pump()
        clock.advance(1.0)
        copier.pump()
        sent = [offset for offset, _ in devices.of("write")]
        assert sent == [first, hot if first != hot else 9 * 64 * KIB]
        assert tracker.in_sync


def test_what_is_hot_is_taken_where_all_else_is_in_flight() -> None:
    clock = Clock()
    devices = Devices(data(1024 * KIB))
    copier, tracker, _ = a_copier(devices, clock=clock)
    copier.start()
    hot, other = 5 * 64 * KIB, 9 * 64 * KIB
    for at_s in (0.0, 0.1, 1.0):
        if at_s:
            tracker.dirty.mark(hot, 1)
        copier.hot.look(at_s, 1024 * KIB if at_s else 0, None)
    tracker.dirty.clear_all()
    devices.keeps = ("write",)
    tracker.dirty.mark(other, 1)
    copier.pump()
    devices.started.clear()
    for offset in (hot, other):  # changed while it is copied
        tracker.dirty.mark(offset, 1)
    copier.pump()
    assert devices.of("write") == [(hot, 64 * KIB)]


@pytest.mark.parametrize(
    ("round_s", "most_s"), [(0.01, 0.0), (0.1, 0.0), (0.25, REST_S_MAX), (5.0, REST_S_MAX)]
)
def test_only_long_rounds_are_followed_by_a_rest(round_s: float, most_s: float) -> None:
    """Where a round is short, each may be the last one."""
    dirty = DirtyBitmap(16 * GRANULARITY, GRANULARITY)
    hot = HotLast(dirty)
    hot.look(0.0, 0, None)
    hot.look(0.1, 8 * GRANULARITY, None)
    dirty.mark(0, 2 * GRANULARITY)
    hot.look(1.0, 8 * GRANULARITY, None)
    now_s, rested = 10.0, 0.0
    for _ in range(20):
        hot.end_round(now_s)
        rested = max(rested, hot.rest_until_s - now_s)
        hot.begin_round(is_hurried=True)
        now_s = max(now_s, hot.rest_until_s) + round_s
    assert rested == 0.0 if not most_s else 0 < rested <= most_s
    assert hot.rested_s(now_s) >= rested
    hot.is_ready = True
    before_s = hot.rest_until_s
    for _ in range(40):
        hot.end_round(now_s)
        now_s += round_s
    assert hot.rest_until_s == before_s, "a mirror that is READY does not rest"
