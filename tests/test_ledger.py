"""Ledger and Tracker with real threads. The interleavings are in test_mirror_invariant.py.

No sleeps: whoever waits is woken, and WAIT_S is for a test that fails.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from model import AnnouncedGuests

from nbdmirror.bitmap import DirtyBitmap
from nbdmirror.ledger import Claim, Ledger, Tracker

WAIT_S = 20.0
GRANULE = 512
SIZE = 16 * GRANULE + 100


@contextmanager
def running(*calls: Callable[[], None]) -> Iterator[None]:
    """Each call in a thread of its own, joined at the end; what they raise is raised here."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(WAIT_S)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"


def wait(event: threading.Event) -> None:
    assert event.wait(WAIT_S), "nobody came"


def count_waiting(tracker: Tracker, count: int) -> None:
    """Return when so many synchronous writes wait. They cannot tell themselves: they sleep."""
    for _ in range(1_000_000):
        with tracker._lock:
            if len(tracker._waiting) == count:
                return
    raise AssertionError("nobody waits")


# The ledger.


def test_a_request_marks_every_bitmap_when_it_ends() -> None:
    ledger, first, second = Ledger(), DirtyBitmap(SIZE, GRANULE), DirtyBitmap(SIZE, 4096)
    token = ledger.enter()
    ledger.attach(first)
    ledger.attach(second)
    assert first.is_empty
    ledger.leave(token, 600, 10)
    assert first.next_run(0, SIZE) == (512, 512)
    assert second.next_run(0, SIZE) == (0, 4096)


def test_a_settled_bitmap_and_a_detached_one_are_not_marked() -> None:
    ledger = Ledger()
    bitmaps = [DirtyBitmap(SIZE, GRANULE) for _ in range(3)]
    for bitmap in bitmaps:
        ledger.attach(bitmap)
    ledger.detach(bitmaps[2])
    ledger.leave(ledger.enter(), 0, 1, bitmaps[0])
    assert [bitmap.is_empty for bitmap in bitmaps] == [True, False, True]


def test_reads_and_writes_under_way_are_told_by_token() -> None:
    ledger = Ledger()
    read, write = ledger.enter_read(), ledger.enter()
    reads, writes = ledger.reads(), ledger.writes()
    later = ledger.enter_read(), ledger.enter()
    ledger.leave_read(read)
    ledger.leave(write, 0, 0)
    assert not ledger.reads_left(reads)
    assert not ledger.writes_left(writes)
    assert ledger.reads() == {later[0]}
    assert ledger.writes() == {later[1]}


def test_the_gate_lets_reads_through() -> None:
    ledger = Ledger()
    ledger.close_gate(lambda: None)
    ledger.leave_read(ledger.enter_read())
    assert ledger.is_idle


def test_the_gate_waits_for_those_inside_and_holds_the_others() -> None:
    ledger = Ledger()
    idle, is_in, may_leave, entered = (threading.Event() for _ in range(4))

    def inside() -> None:
        token = ledger.enter()
        is_in.set()
        wait(may_leave)
        ledger.leave(token, 0, 0)

    def outside() -> None:
        token = ledger.enter()
        entered.set()
        ledger.leave(token, 0, 0)

    with running(inside):
        wait(is_in)
        ledger.close_gate(idle.set)
        assert not ledger.is_idle
        assert not idle.is_set()
        may_leave.set()
        wait(idle)
    assert ledger.is_idle
    with running(outside):
        assert not entered.is_set()
        ledger.open_gate()
        wait(entered)


def test_a_gate_on_an_idle_disk_tells_at_once() -> None:
    ledger, told = Ledger(), []
    ledger.close_gate(lambda: told.append(True))
    assert told
    ledger.open_gate()
    ledger.open_gate()
    ledger.close_gate(lambda: None)
    with pytest.raises(AssertionError, match="closed already"):
        ledger.close_gate(lambda: None)


def test_nobody_is_lost_at_the_gate() -> None:
    """4 guests, 10,000 requests, a gate that closes and opens as fast as it can. Behind the closed
    gate, once idle, nobody is inside; and each guest gets through all of its requests."""
    ledger = Ledger()
    requests, guests = 2500, 4
    inside: set[int] = set()
    over = threading.Event()
    closings = 0

    def guest(number: int) -> None:
        for _ in range(requests):
            token = ledger.enter()
            inside.add(number)
            inside.discard(number)
            ledger.leave(token, 0, 0)

    def owner() -> None:
        nonlocal closings
        while not over.is_set():
            idle = threading.Event()
            ledger.close_gate(idle.set)
            wait(idle)
            seen = [frozenset(inside) for _ in range(20)]
            ledger.open_gate()
            assert not any(seen), "somebody is past a closed gate"
            closings += 1

    with running(owner):
        try:
            with running(*[lambda number=number: guest(number) for number in range(guests)]):
                pass
        finally:
            over.set()
    assert closings
    assert ledger.is_idle


def test_idle_stays_true_while_a_guest_comes_to_the_closed_gate() -> None:
    """`is_idle`: "once true behind a closed gate, it stays true". Disk.swap asserts it, and a guest
    that has announced itself, and not yet seen the gate, must not make that fail: the gate would
    then never be opened."""
    ledger = Ledger()
    answers: list[bool] = []
    announced = AnnouncedGuests()
    announced.on_add = lambda: answers.append(ledger.is_idle)
    ledger.writing = announced
    arrived = threading.Event()
    ledger.close_gate(lambda: arrived.set() if answers else None)
    assert ledger.is_idle

    with running(lambda: ledger.leave(ledger.enter(), 0, 0)):
        wait(arrived)
        ledger.open_gate()
    assert answers == [True]


# Synchronous writes.


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


def test_a_write_at_the_odd_end() -> None:
    tracker = Tracker(SIZE, GRANULE)
    tracker.dirty.mark_all()
    claim = tracker.begin_write(16 * GRANULE, 100)
    assert (claim.offset, claim.end) == (16 * GRANULE, SIZE)
    assert not tracker.dirty.is_dirty(16 * GRANULE, 100)
    assert tracker.in_flight_bytes == 100
    tracker.end_write(claim, failed=False)


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


def test_who_was_let_go_is_not_held_by_the_next_gate() -> None:
    """An attempt to end timed out, and the next one begins at once, as Quiesce does."""
    ledger = Ledger()
    at_gate, through = threading.Event(), threading.Event()

    def write() -> None:
        token = ledger.enter()
        through.set()
        ledger.leave(token, 0, 0)

    ledger.close_gate(lambda: None)
    assert ledger.gate is not None
    ledger.gate.on_idle = at_gate.set
    threading.Thread(target=write, daemon=True).start()
    assert at_gate.wait(10)
    ledger.open_gate()
    ledger.close_gate(lambda: None)
    assert through.wait(10), "held by a second gate as well: for two attempts, or for ever"
    ledger.open_gate()
