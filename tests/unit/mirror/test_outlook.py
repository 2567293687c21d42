"""What is predicted of mirrors, against what then happens to them, in virtual time: guests of
several kinds, and a copier that goes over the disk again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from unit.mirror.guestparts import (
    GRANULARITY,
    STEP_S,
    Guest,
    Scene,
    World,
    by_turns,
    sequential,
    steady,
    until,
    zipf,
)

from nbdmirror.mirror.outlook import NEVER_S, RATE_S_MAX, Prediction

SCENES = [Scene(8.0), Scene(40.0)]
ERROR = 0.2
SLACK = 0.02
"""Of the time that the copy took: what a range may be wrong by."""

Found = list[tuple[float, Prediction]]

GUESTS: dict[str, Guest | Sequence[Guest]] = {
    "none": steady(0.0),
    "uniform 0.2": steady(0.2),
    "uniform 0.5": steady(0.5),
    "uniform 0.7": steady(0.7),
    "Zipf 0.9": zipf(0.5, 0.9),
    "Zipf 1.1": zipf(1.0, 1.1),
    "Zipf 1.2": zipf(0.5, 1.2),
    "sequential, just ahead": sequential(0.3, 0.01),
    "sequential, in the middle": sequential(0.1, 0.5),
    "sequential, at the end": sequential(0.3, 0.9),
    "a log": sequential(0.5, 0.3, 0.05),
    "hot 1 %": steady(0.5, 0.01, 0.3),
    "hot 1 %, as fast as the copier": steady(1.0, 0.01, 0.3),
    "hot 5 %": steady(0.8, 0.05, 0.3),
    "hot 5 %, at the start": steady(0.5, 0.05),
    "hot 5 %, at the end": steady(0.5, 0.05, 0.9),
    "90 % in 5 %": [steady(0.45, 0.05), steady(0.05, 0.95, 0.05)],
    "99 % in 1 %": [steady(0.99, 0.01), steady(0.01, 0.99, 0.01)],
    "bursts": by_turns(steady(1.0), 1 / 20, 1 / 20),
    "short bursts": by_turns(steady(1.0), 1 / 80, 1 / 40),
    "hot, and uniform": [steady(0.4), steady(0.4, 0.01, 0.3)],
    "sequential, and uniform": [steady(0.2), sequential(0.3, 0.1)],
}


def errors(found: Found, end_s: float) -> dict[float, float]:
    """By when it was predicted: how much too late the end was predicted, as part of the time."""
    known = ((at_s, one.end_s) for at_s, one in found)
    return {at_s: (at_s + left_s - end_s) / end_s for at_s, left_s in known if left_s is not None}


def is_in_range(at_s: float, found: Prediction, end_s: float) -> bool:
    least, most = found.end_s_min, found.end_s_max
    slack_s = SLACK * end_s
    return (least is None or at_s + least <= end_s + slack_s) and (
        most is None or end_s - slack_s <= at_s + most
    )


@pytest.mark.parametrize("guest", GUESTS.values(), ids=GUESTS)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.full_s:g} s")
def test_in_the_later_half_of_the_first_pass_the_end_is_known(
    scene: Scene, guest: Guest | Sequence[Guest]
) -> None:
    """Nearly always. And what is told before that is a range that is right, or nothing."""
    world = World(guest, scene)
    end_s = world.run(6.0)
    assert end_s is not None
    late = world.late()
    wrong = errors(late, end_s)
    assert len(wrong) >= 0.9 * len(late), "unknown"
    right = [at_s for at_s, error in wrong.items() if abs(error) <= ERROR]
    assert len(right) >= 0.9 * len(wrong) and max(map(abs, wrong.values())) <= 0.3, wrong
    inside = [at_s for at_s, found in world.said if is_in_range(at_s, found, end_s)]
    assert len(inside) >= 0.8 * len(world.said)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("granules", [1 << 12, 1 << 15])
def test_the_end_of_a_uniform_guest_is_known_to_a_tenth(share: float, granules: int) -> None:
    world = World(steady(share), Scene(40.0, granules))
    end_s = world.run(6.0)
    assert end_s is not None
    wrong = errors(world.late(), end_s)
    assert wrong and all(abs(error) <= 0.1 for error in wrong.values()), wrong


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.full_s:g} s")
def test_a_large_hot_region_is_known_when_most_was_copied(scene: Scene) -> None:
    world = World(steady(0.5, 0.25, 0.1), scene)
    end_s = world.run(6.0)
    assert end_s is not None and world.first_s is not None
    wrong = errors([one for one in world.said if one[0] >= 0.75 * world.first_s], end_s)
    assert wrong and all(abs(error) <= ERROR for error in wrong.values()), wrong


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.full_s:g} s")
def test_a_guest_just_behind_the_copier_is_known_when_it_is_left_behind(scene: Scene) -> None:
    """Until then it may be a hot place."""
    world = World(sequential(0.5, 0.02), scene)
    end_s = world.run(6.0)
    assert end_s is not None
    wrong = errors(world.late(), end_s)
    assert all(abs(error) <= ERROR for error in wrong.values()), wrong
    assert all(is_in_range(at_s, found, end_s) for at_s, found in world.said)
    late = [found for at_s, found in world.said if at_s >= 0.6 * end_s]
    assert sum(found.end_s is not None for found in late) >= 0.9 * len(late)


@pytest.mark.parametrize(("share", "start"), [(0.5, 0.5), (0.7, 0.4), (0.8, 0.6), (0.5, 0.8)])
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.full_s:g} s")
def test_a_sequential_guest_ahead_of_the_copier_is_in_the_range(
    scene: Scene, share: float, start: float
) -> None:
    """All is dirty there, so nothing of it is seen but how much is written."""
    world = World(sequential(share, start), scene)
    end_s = world.run(6.0)
    assert end_s is not None
    assert all(is_in_range(at_s, found, end_s) for at_s, found in world.said)
    assert all(found.end_s_min is not None for _, found in world.late())


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.full_s:g} s")
def test_guests_that_read_write_nothing_ahead_of_the_copier(scene: Scene) -> None:
    world = World(steady(0.0), scene)
    world.run(1.0)
    assert all(found.end_s is not None and found.end_s_max is not None for _, found in world.said)


def in_pieces(every_s: float) -> Callable[[float], float]:
    """As much as ever, in pieces: this is what a small speed limit makes of a copy."""
    steps = round(every_s / STEP_S)
    return lambda at_s: float(steps) if round(at_s / STEP_S) % steps == 0 else 0.0


@pytest.mark.parametrize("every_s", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_a_copy_in_pieces_at_long_intervals_is_a_steady_one(every_s: float) -> None:
    """One piece more or less within the time that is looked at is no other rate."""
    world = World(steady(0.0), Scene(160.0), in_pieces(every_s))
    end_s = world.run(2.0)
    assert end_s is not None and world.said[0][0] <= 8.0 + 6 * every_s
    for at_s, found in world.said:
        assert found.end_s_min is not None and found.end_s_max is not None
        left_s = end_s - at_s
        assert 0.7 * left_s - every_s <= found.end_s_min <= left_s + every_s, at_s
        assert 0.9 * left_s - every_s <= found.end_s_max <= 1.5 * left_s + every_s, at_s


def test_a_copy_that_is_fast_at_times_has_a_range() -> None:
    """Some pieces at once, and then none for seconds."""
    world = World(steady(0.0), Scene(160.0), lambda at_s: 20.0 if at_s % 8.0 < 0.4 else 0.0)
    end_s = world.run(2.0)
    assert end_s is not None and len(world.said) > 20
    for at_s, found in world.said:
        least, most = found.end_s_min or 0.0, found.end_s_max or math.inf
        assert 0.0 <= least <= end_s - at_s + 8.0 and most >= end_s - at_s - 8.0, at_s


def test_a_copy_that_stops_is_predicted_later_and_later_and_then_not_at_all() -> None:
    world = World(steady(0.0), Scene(160.0), lambda at_s: 1.0 if at_s < 80.0 else 0.0)
    assert world.run(2.0) is None
    while_it_stands = [(at_s, found.end_s) for at_s, found in world.said if at_s >= 80.0]
    ends = [end_s for _, end_s in while_it_stands if end_s is not None]
    assert len(ends) > 1 and ends == sorted(ends) and ends[-1] > 2 * ends[0]
    assert while_it_stands[-1][0] < 80.0 + RATE_S_MAX


# Mirrors that end, and mirrors that do not.

ENDS: dict[str, Guest | Sequence[Guest]] = {
    "uniform 0.6": steady(0.6),
    "uniform 0.95": steady(0.95),
    "Zipf 1.1": zipf(1.0, 1.1),
    "hot 1 %": steady(0.9, 0.01),
    "hot 25 %": steady(0.9, 0.25, 0.1),
    "sequential 0.9": sequential(0.9, 0.1),
    "sequential 0.95": sequential(0.95, 0.3),
    "sequential, and uniform": [steady(0.6), sequential(0.3, 0.1)],
    "10 s of 40": by_turns(steady(2.0), 0.25, 0.75),
    "20 s of 40": by_turns(steady(1.5), 0.5, 0.5),
    "3 s of 6": by_turns(zipf(2.0, 1.1), 3 / 40, 3 / 40),
    "25 s of 50, hot": by_turns(steady(3.0, 0.25), 25 / 40, 25 / 40),
    "sequential, by turns": by_turns(sequential(1.5, 0.1), 25 / 40, 25 / 40),
}

ENDLESS: dict[str, Guest | Sequence[Guest]] = {
    "uniform 2": steady(2.0),
    "uniform 10": steady(10.0),
    "hot 25 %": steady(2.0, 0.25),
    "hot 5 %": steady(3.0, 0.05),
    "hot 1 %": steady(3.0, 0.01),
    "Zipf 1.1": zipf(2.0, 1.1),
    "sequential 1.5": sequential(1.5, 0.2),
    "sequential 3": sequential(3.0, 0.2),
    "a log": sequential(3.0, 0.3, 0.05),
    "two streams": [sequential(0.6, 0.2), sequential(0.6, 0.7)],
    "sequential, and uniform": [steady(0.6), sequential(0.6, 0.1)],
    "bursts": by_turns(steady(3.0), 1 / 20, 1 / 20),
}


def halved(at_s: float) -> float:
    return 0.5 if at_s >= 15.0 else 1.0


@pytest.mark.slow
@pytest.mark.parametrize("guest", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("rate", [lambda _: 1.0, halved], ids=["", "halved"])
def test_of_a_mirror_that_ends_it_is_never_said_that_it_does_not(
    guest: Guest | Sequence[Guest], rate: Callable[[float], float]
) -> None:
    world = World(guest, Scene(40.0), rate)
    if world.run(10.0) is not None:
        assert not [at_s for at_s, found in world.said if found.never]


@pytest.mark.slow
def test_of_a_long_copy_it_is_not_said_that_it_does_not_end() -> None:
    """It takes longer than NEVER_S to come closer to the end by a part that is seen."""
    world = World(sequential(0.5, 0.02), Scene(1600.0))
    assert world.run(3.0) is not None
    assert not [at_s for at_s, found in world.said if found.never]


@pytest.mark.slow
@pytest.mark.parametrize("guest", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.full_s:g} s")
def test_of_a_mirror_that_does_not_end_that_is_said(
    scene: Scene, guest: Guest | Sequence[Guest]
) -> None:
    world = World(guest, scene)
    assert world.run(4 * (scene.full_s + NEVER_S) / scene.full_s) is None
    later = [found for at_s, found in world.said if at_s >= world.now_s / 2]
    assert sum(found.never for found in later) >= len(later) / 2, "chance may bring it closer"
    assert all(found.end_s is found.end_s_max is None for found in later if found.never)


@pytest.mark.slow
def test_how_far_behind_a_mirror_stays() -> None:
    world = World(steady(2.0), Scene(40.0))
    assert world.run(6.0) is None
    left_s = world.dirty.dirty_bytes / GRANULARITY / world.scene.rate
    assert world.said[-1][1].behind_s == pytest.approx(left_s, rel=0.3)


def test_what_is_said_follows_a_guest_that_stops() -> None:
    """It was right to say that the mirror does not end, and is not said again."""
    world = World(until(steady(2.0), 4.0), Scene(40.0))
    end_s = world.run(8.0)
    assert end_s is not None and end_s > 160.0
    assert [found for at_s, found in world.said if at_s < 160.0 and found.never]
    after = [(at_s, found) for at_s, found in world.said if at_s > 165.0]
    assert after and not [at_s for at_s, found in after if found.never]


def test_nothing_is_told_of_the_first_moments() -> None:
    world = World(steady(0.5), Scene(40.0))
    world.run(2.0 / 40.0)
    assert not world.said


def test_of_a_copy_that_has_sent_nothing_for_long_no_speed_is_known() -> None:
    """It copies zeroes."""
    world = World(steady(0.0))
    while world.outlook.rate is None:
        world.step()
    at_s, sent = world.now_s, world.sent
    while world.now_s < at_s + 2 * RATE_S_MAX:
        world.now_s += STEP_S
        world.outlook.look(world.now_s, 0, sent, 0)
    assert world.outlook.rate is None
    world.outlook.look(world.now_s + STEP_S, 0, sent + GRANULARITY, 0)
    assert world.outlook.rate is None


def test_after_the_limit_was_changed_the_speed_before_is_forgotten() -> None:
    world = World(steady(0.0))
    while not world.said:
        world.step()
        if (found := world.outlook.predict(world.now_s)) is not None:
            world.said.append((world.now_s, found))
    world.outlook.forget_rate()
    assert (world.outlook.rate, world.outlook.predict(world.now_s)) == (None, None)
