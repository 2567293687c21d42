"""What is said of a mirror's speed is right with holes, with what is sent again, and at rest."""

from __future__ import annotations

from typing import Any

import pytest
from support.images import KiB, MiB

from nbdmirror.rates import LAG_S_MAX, WINDOW_S, Meter, Rates, Sample

GiB = 1 << 30


def rates(*samples: Sample) -> Rates:
    meter = Meter()
    for sample in samples[:-1]:
        meter.add(sample)
    found = meter.rates(samples[-1])
    assert found
    return found


def at(time_s: float, **fields: Any) -> Sample:
    return Sample(
        time_s, **{**dict.fromkeys(("offset", "data", "left", "in_flight", "again"), 0), **fields}
    )


def test_nothing_is_said_before_something_was_seen() -> None:
    meter = Meter()
    assert meter.rates(at(0)) is None
    meter.add(at(0))
    assert meter.rates(at(0.01)) is None
    meter.start_over()
    assert meter.rates(at(9)) is None


def test_a_copy_of_data() -> None:
    found = rates(at(0, left=100 * MiB), at(2, offset=20 * MiB, data=20 * MiB, left=80 * MiB))
    assert (found.copy_bytes_per_s, found.zero_bytes_per_s) == (10 * MiB, 0)
    assert (found.dirty_bytes_per_s, found.left_s, found.falls_behind) == (0, 8.0, False)


def test_holes_are_no_data_and_say_nothing_of_the_time_left() -> None:
    """A terabyte of hole was copied at once; the data behind it take their time."""
    hole = rates(at(0, left=2 * GiB), at(1, offset=GiB, left=GiB))
    assert (hole.copy_bytes_per_s, hole.zero_bytes_per_s, hole.left_s) == (0, GiB, None)
    both = rates(at(0, left=2 * GiB), at(1, offset=GiB + MiB, data=MiB, left=GiB - MiB))
    assert (both.copy_bytes_per_s, both.left_s) == (MiB, 1023.0)


def test_what_was_in_flight_is_not_taken_for_zeroes() -> None:
    before = at(0, data=8 * MiB, in_flight=8 * MiB, left=8 * MiB)
    assert rates(before, at(1, offset=8 * MiB, data=8 * MiB)).zero_bytes_per_s == 0


def test_after_ready_parts_of_granules_count() -> None:
    """A guest writes 4 KiB at each of 100 places, and the same places again: 100 granules."""
    then = at(0, traffic=(0, 0))
    now = at(2, offset=100 * 64 * KiB, data=100 * 64 * KiB, traffic=(400 * KiB, 800 * KiB))
    found = rates(then, now)
    assert (found.copy_bytes_per_s, found.dirty_bytes_per_s) == (200 * KiB, 400 * KiB)
    began = rates(at(0), now)
    assert (began.copy_bytes_per_s, began.dirty_bytes_per_s) == (3200 * KiB, 3200 * KiB), (
        "READY came between the two"
    )


def test_a_mirror_that_falls_behind_has_more_to_copy_than_it_copies() -> None:
    """However often the guest writes, and however little of a granule."""
    then = at(0, left=0, traffic=(0, 0))
    now = at(
        WINDOW_S, offset=100 * MiB, data=100 * MiB, left=200 * MiB, traffic=(100 * MiB, 20 * MiB)
    )
    found = rates(then, now)
    assert found.falls_behind
    assert found.dirty_bytes_per_s == 300 * MiB // int(WINDOW_S)
    assert found.copy_bytes_per_s == 100 * MiB // int(WINDOW_S)


def test_what_is_sent_again_is_no_write_of_the_guests() -> None:
    found = rates(at(0), at(1, left=64 * MiB, again=64 * MiB))
    assert found.dirty_bytes_per_s == 0
    found = rates(at(0), at(1, left=65 * MiB, again=64 * MiB))
    assert found.dirty_bytes_per_s == MiB


def test_a_mirror_that_follows_its_guest_is_not_behind() -> None:
    """As fast as the guest, with the same little left all the time."""
    mirror = [
        at(second, offset=4 * MiB * second, data=4 * MiB * second, left=768 * KiB)
        for second in range(9)
    ]
    found = rates(*mirror)
    assert found.copy_bytes_per_s == found.dirty_bytes_per_s == 4 * MiB
    assert not found.falls_behind


def test_a_guest_that_is_faster_than_the_copy() -> None:
    def mirror(seconds: int, left: int) -> list[Sample]:
        return [
            at(second, offset=3 * MiB * second, data=3 * MiB * second, left=left + 9 * MiB * second)
            for second in range(seconds)
        ]

    found = rates(*mirror(9, GiB))
    assert (found.copy_bytes_per_s, found.dirty_bytes_per_s) == (3 * MiB, 12 * MiB)
    assert (found.falls_behind, found.left_s) == (True, None)
    assert not rates(*mirror(int(WINDOW_S), GiB)).falls_behind, (
        "not before that was seen long enough"
    )
    near = rates(
        *(
            at(s, offset=3 * MiB * s, data=3 * MiB * s, left=int(MiB * LAG_S_MAX) + s)
            for s in range(9)
        )
    )
    assert not near.falls_behind


@pytest.mark.parametrize(("dirtied", "left_s"), [(0, 64.0), (80, 320.0), (95, None), (100, None)])
def test_an_end_is_not_predicted_from_a_small_difference(
    dirtied: int, left_s: float | None
) -> None:
    """10 MiB/s are copied; guests change so many per cent of that."""
    copied, left = 10 * MiB, 640 * MiB
    before = at(0, left=left + copied - copied * dirtied // 100)
    assert rates(before, at(1, offset=copied, data=copied, left=left)).left_s == left_s


def test_rates_are_those_of_the_last_seconds() -> None:
    fast = [at(second, offset=100 * MiB * second, data=100 * MiB * second) for second in range(20)]
    end = fast[-1].offset
    slow = [
        at(20 + second, offset=end + MiB * second, data=end + MiB * second) for second in range(8)
    ]
    assert rates(*fast, *slow).copy_bytes_per_s == MiB
