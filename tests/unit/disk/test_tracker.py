"""Tracker with real threads: synchronous writes, and the target's cache. The interleavings are in
test_mirror_invariant.py.

No sleeps: whoever waits is woken, and WAIT_S is for a test that fails.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from unit.disk.ledgerthreads import GRANULE, SIZE, count_waiting, running, wait

from nbdmirror.disk.claim import Claim
from nbdmirror.disk.tracker import Tracker

# Synchronous writes.


@pytest.mark.rule(7)
def test_a_write_waits_for_the_copy_on_its_granules() -> None:
    tracker = Tracker(SIZE, GRANULE)
    tracker.dirty.mark(0, 2 * GRANULE)
    copy = tracker.claim(0, SIZE)
    assert copy is not None
    owned = threading.Event()

    def write() -> None:
        claim = tracker.begin_write(GRANULE + 100, GRANULE)
        owned.set()
        tracker.end_write(claim, failed=False)

    with running(write):
        count_waiting(tracker, 1)
        assert not owned.is_set()
        tracker.settle(copy, failed=False)
        wait(owned)
    assert tracker.in_sync


@pytest.mark.rule(6)
def test_copies_keep_off_a_range_that_a_write_waits_for() -> None:
    tracker = Tracker(SIZE, GRANULE)
    tracker.dirty.mark(0, GRANULE)
    copy = tracker.claim(0, SIZE)
    assert copy is not None
    tracker.dirty.mark(0, 4 * GRANULE)
    claims: list[Claim] = []

    with running(lambda: claims.append(tracker.begin_write(0, 2 * GRANULE))):
        count_waiting(tracker, 1)
        other = tracker.claim(0, SIZE)
        assert other is not None
        assert (other.offset, other.length) == (2 * GRANULE, 2 * GRANULE)
        tracker.settle(copy, failed=False)
    assert not tracker.in_sync
    tracker.settle(other, failed=False)
    tracker.end_write(claims[0], failed=False)
    assert tracker.in_sync


@pytest.mark.rule(8)
def test_writes_are_served_in_the_order_in_which_they_came() -> None:
    """Each overlaps its neighbours; the last one is free but for those before it."""
    tracker = Tracker(SIZE, GRANULE)
    first = tracker.begin_write(0, GRANULE)
    order: list[int] = []

    def write(number: int) -> None:
        claim = tracker.begin_write(number * GRANULE, 2 * GRANULE)
        order.append(number)
        tracker.end_write(claim, failed=False)

    with running(lambda: write(0)):
        count_waiting(tracker, 1)
        with running(lambda: write(1)):
            count_waiting(tracker, 2)
            with running(lambda: write(2)):
                count_waiting(tracker, 3)
                assert not order
                tracker.end_write(first, failed=False)
    assert order == [0, 1, 2]


@pytest.mark.rule(9)
def test_whole_granules_are_clean_and_touched_ones_are_owned() -> None:
    tracker = Tracker(SIZE, GRANULE)
    tracker.dirty.mark_all()
    claim = tracker.begin_write(100, 2 * GRANULE)
    assert (claim.offset, claim.length) == (0, 3 * GRANULE)
    assert tracker.dirty.next_run(0, GRANULE) == (0, GRANULE)
    assert not tracker.dirty.is_dirty(GRANULE, GRANULE)
    assert tracker.dirty.is_dirty(2 * GRANULE, GRANULE)
    tracker.end_write(claim, failed=True)
    assert tracker.dirty.dirty_bytes == SIZE


@pytest.mark.rule(9)
def test_a_write_at_the_odd_end() -> None:
    tracker = Tracker(SIZE, GRANULE)
    tracker.dirty.mark_all()
    claim = tracker.begin_write(16 * GRANULE, 100)
    assert (claim.offset, claim.end) == (16 * GRANULE, SIZE)
    assert not tracker.dirty.is_dirty(16 * GRANULE, 100)
    assert tracker.in_flight_bytes == 100
    tracker.end_write(claim, failed=False)


@pytest.mark.rule(8)
def test_overlapping_writers_neither_meet_nor_deadlock() -> None:
    """QEMU's iotest 151, testIntersectingActiveIO: writers that wait for each other. A copier goes
    on beside them."""
    tracker = Tracker(SIZE, GRANULE)
    owners = [0] * 17
    over = threading.Event()

    def own(claim: Claim, step: int) -> None:
        for granule in range(claim.offset // GRANULE, -(-claim.end // GRANULE)):
            owners[granule] += step
            assert owners[granule] in (0, 1), "two own one granule"

    def writer(seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(300):
            offset = choice.randrange(SIZE)
            claim = tracker.begin_write(offset, choice.randint(1, SIZE - offset))
            own(claim, 1)
            own(claim, -1)
            tracker.end_write(claim, failed=choice.random() < 0.3)

    def copier() -> None:
        choice = random.Random(4)
        while not over.is_set():
            claim = tracker.claim(choice.randrange(SIZE), 4 * GRANULE)
            if claim is not None:
                own(claim, 1)
                own(claim, -1)
                tracker.settle(claim, failed=False)

    with running(copier):
        try:
            with running(*[lambda seed=seed: writer(seed) for seed in range(4)]):
                pass
        finally:
            over.set()
    assert tracker.in_flight_bytes == 0
    while claim := tracker.claim(0, SIZE):
        tracker.settle(claim, failed=False)
    assert tracker.in_sync


@pytest.mark.rule(4)
def test_in_sync_does_not_miss_what_turns_from_dirty_to_in_flight() -> None:
    """A synchronous write begins between the two looks of `in_sync`: at no moment was all clean."""
    tracker = Tracker(SIZE, GRANULE)
    tracker.dirty.mark(0, GRANULE)

    class Meanwhile(threading.Condition):
        call: Callable[[], object] | None = None

        def __exit__(self, *_: object) -> None:
            super().__exit__(None, None, None)
            call, self.call = self.call, None
            if call is not None:
                call()

    condition = Meanwhile(threading.Lock())
    stand_in: Any = tracker
    stand_in._lock = stand_in._changed = condition
    condition.call = lambda: tracker.begin_write(0, GRANULE)
    assert not tracker.in_sync
    assert not tracker.in_sync


# The cache of the target (rule 39): what it acknowledged, and may lose until it is flushed.


@pytest.mark.rule(39)
@pytest.mark.guarantee("A target that was lost and came back")
def test_what_was_not_flushed_is_dirty_when_the_target_came_back() -> None:
    tracker = Tracker(SIZE, GRANULE)
    tracker.dirty.mark(0, 2 * GRANULE)
    for _ in range(2):
        claim = tracker.claim(0, GRANULE)
        assert claim is not None
        tracker.settle(claim, failed=False)
    tracker.end_write(tracker.begin_write(4 * GRANULE, GRANULE), failed=False)
    tracker.target_came_back()
    assert tracker.dirty.dirty_bytes == 3 * GRANULE


@pytest.mark.rule(39)
@pytest.mark.parametrize("failed", [False, True])
def test_a_flush_covers_what_was_acknowledged_before_it_began(failed: bool) -> None:
    tracker = Tracker(SIZE, GRANULE)
    tracker.end_write(tracker.begin_write(0, GRANULE), failed=False)
    covered = tracker.begin_flush()
    tracker.end_write(tracker.begin_write(GRANULE, GRANULE), failed=False)
    tracker.end_flush(covered, failed=failed)
    tracker.target_came_back()
    assert tracker.dirty.is_dirty(GRANULE, GRANULE)
    assert tracker.dirty.is_dirty(0, GRANULE) == failed


@pytest.mark.rule(40)
@pytest.mark.guarantee("A target that was lost and came back")
def test_a_copy_across_a_lost_connection_is_not_believed() -> None:
    """A piece of a claim was acknowledged before the target crashed, the rest after it came back:
    the claim ends well, and the target may have lost the first piece."""
    tracker = Tracker(SIZE, GRANULE)
    tracker.dirty.mark(0, GRANULE)
    copy = tracker.claim(0, GRANULE)
    assert copy is not None
    write = tracker.begin_write(GRANULE, GRANULE)
    tracker.target_came_back()
    tracker.settle(copy, failed=False)
    tracker.end_write(write, failed=False)
    assert tracker.dirty.dirty_bytes == 2 * GRANULE


def test_a_flush_across_a_lost_connection_covers_nothing() -> None:
    tracker = Tracker(SIZE, GRANULE)
    tracker.end_write(tracker.begin_write(0, GRANULE), failed=False)
    covered = tracker.begin_flush()
    tracker.target_came_back()
    tracker.end_flush(covered, failed=False)
    assert tracker.dirty.is_dirty(0, GRANULE)
