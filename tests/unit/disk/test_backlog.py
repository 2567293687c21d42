"""Backlog by way of its tracker, step by step. All orders are tried in tests/model (lagmachine.py);
here is what the target of that model does not do."""

from __future__ import annotations

from nbdmirror.disk.claim import Claim
from nbdmirror.disk.tracker import Tracker

GRANULE = 65536
SIZE = 8 * GRANULE


def begun(*dirty: int) -> Tracker:
    """The backlog is these granules."""
    tracker = Tracker(SIZE, GRANULE)
    for granule in dirty:
        tracker.dirty.mark(granule * GRANULE, GRANULE)
    assert tracker.renew_backlog(), "nothing was, before the first one"
    return tracker


def claim(tracker: Tracker) -> Claim:
    found = tracker.claim(0, GRANULE)
    assert found is not None
    return found


def copy_all(tracker: Tracker) -> None:
    while not tracker.dirty.is_empty:
        tracker.settle(claim(tracker), failed=False)


def flush(tracker: Tracker, *, failed: bool = False) -> None:
    tracker.end_flush(tracker.begin_flush(), failed=failed)


def test_nothing_to_do_is_durable_at_once() -> None:
    tracker = begun()
    assert not tracker.needs_flush
    assert tracker.renew_backlog() and tracker.renew_backlog()


def test_it_is_durable_after_copies_and_a_flush() -> None:
    tracker = begun(1, 3)
    flush(tracker)
    first = claim(tracker)
    flush(tracker)
    second = claim(tracker)
    tracker.settle(first, failed=False)
    assert not tracker.needs_flush
    tracker.settle(second, failed=False)
    assert tracker.needs_flush and not tracker.renew_backlog()
    covered = tracker.begin_flush()
    assert not tracker.needs_flush and not tracker.renew_backlog()
    tracker.end_flush(covered, failed=False)
    assert tracker.renew_backlog()


def test_what_guests_write_meanwhile_is_no_part_of_it() -> None:
    tracker = begun(1)
    tracker.settle(claim(tracker), failed=False)
    tracker.dirty.mark(GRANULE, 1)
    tracker.dirty.mark(4 * GRANULE, 1)
    again = claim(tracker)
    assert tracker.needs_flush
    flush(tracker)
    assert tracker.renew_backlog(), "that of before is there"
    tracker.settle(again, failed=False)
    copy_all(tracker)
    flush(tracker)
    assert tracker.renew_backlog()


def test_a_flush_that_fails_after_a_later_one_counts() -> None:
    """A server that has told of a failed write-back does not tell the next flush: so what ends well
    is worth nothing while one that began before is under way."""
    tracker = begun(1)
    copy_all(tracker)
    early = tracker.begin_flush()
    late = tracker.begin_flush()
    tracker.end_flush(late, failed=False)
    assert not tracker.renew_backlog()
    tracker.end_flush(early, failed=True)
    assert not tracker.renew_backlog() and tracker.dirty.dirty_bytes == GRANULE
    flush(tracker)
    assert not tracker.renew_backlog(), "it is to be copied again first"
    copy_all(tracker)
    flush(tracker)
    assert tracker.renew_backlog()


def test_a_flush_of_nothing_that_fails_is_done_again() -> None:
    tracker = begun(1)
    copy_all(tracker)
    flush(tracker, failed=True)
    copy_all(tracker)
    covered = tracker.begin_flush()
    flush(tracker, failed=True)
    tracker.end_flush(covered, failed=False)
    assert tracker.needs_flush, "nothing is dirty, and yet it is not over"
    flush(tracker)
    assert tracker.renew_backlog()


def test_a_synchronous_write_over_some_of_it_has_to_end_well() -> None:
    tracker = begun(1)
    write = tracker.begin_write(GRANULE, GRANULE)
    assert tracker.dirty.is_empty and not tracker.needs_flush
    tracker.end_write(write, failed=True)
    assert not tracker.needs_flush
    tracker.end_write(tracker.begin_write(GRANULE, GRANULE), failed=False)
    assert tracker.needs_flush


def test_a_guests_flush_that_fails_takes_what_others_have_flushed_meanwhile() -> None:
    """The target told the guest's, and so nobody else."""
    tracker = begun(1)
    copy_all(tracker)
    guests = tracker.begin_guests_flush()
    flush(tracker)
    assert tracker.renew_backlog(), "as far as anybody knows"
    tracker.dirty.mark(3 * GRANULE, 1)
    copy_all(tracker)
    tracker.end_guests_flush(guests, failed=True)
    assert tracker.dirty.dirty_bytes == 2 * GRANULE
    flush(tracker)
    assert not tracker.renew_backlog()
    copy_all(tracker)
    flush(tracker)
    assert tracker.renew_backlog()
    tracker.end_guests_flush(tracker.begin_guests_flush(), failed=False)
    assert tracker.dirty.is_empty


def test_all_may_be_lost() -> None:
    tracker = begun(1)
    copy_all(tracker)
    tracker.mark_all()
    flush(tracker)
    assert not tracker.renew_backlog()
    copy_all(tracker)
    flush(tracker)
    assert tracker.renew_backlog()


def test_what_is_not_flushed() -> None:
    tracker = begun(1, 2)
    assert tracker.unflushed_bytes == 0
    copy_all(tracker)
    assert tracker.unflushed_bytes == 2 * GRANULE
    covered = tracker.begin_flush()
    assert tracker.unflushed_bytes == 2 * GRANULE
    tracker.end_flush(covered, failed=False)
    assert tracker.unflushed_bytes == 0
