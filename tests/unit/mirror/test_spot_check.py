"""A target that came back is compared with what it was, in some places."""

from __future__ import annotations

import random
import threading

import pytest

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.tracker import Tracker
from nbdmirror.errors import DeviceError
from nbdmirror.mirror.spot_check import SAMPLES, SpotCheck

GRANULE = 4096
SIZE = 400 * GRANULE + 100


class Pair:
    def __init__(self, content: bytes) -> None:
        self.source = MemoryDevice(len(content))
        self.source.data[:] = content
        self.target = bytearray(content)
        self.disk = Disk("d", self.source)
        self.tracker = Tracker(len(content), GRANULE)
        self.disk.ledger.attach(self.tracker.dirty)
        self.reads = 0
        self.check = SpotCheck()
        self.reason = ""

    def read_target(self, buf: memoryview, offset: int) -> None:
        self.reads += 1
        buf[:] = self.target[offset : offset + len(buf)]

    def difference(self, seed: int = 1) -> int | None:
        suspects = self.tracker.may_differ()
        found = self.check.find_mismatch(
            self.disk,
            self.read_target,
            self.tracker,
            suspects,
            random.Random(seed),
            tuple(self.tracker.flushed_last),
        )
        self.reason = str(found)
        return None if found is None else found.offset


@pytest.fixture
def pair() -> Pair:
    return Pair(random.Random(3).randbytes(SIZE))


def test_the_same_disk(pair: Pair) -> None:
    assert pair.difference() is None
    assert pair.reads == SAMPLES


def test_the_first_and_the_last_granule_are_looked_at(pair: Pair) -> None:
    pair.target[7] ^= 1
    assert pair.difference() == 0
    pair.target[7] ^= 1
    pair.target[-1] ^= 1
    assert pair.difference() == 400 * GRANULE


def test_another_disk_is_found_whatever_the_places(pair: Pair) -> None:
    pair.target[GRANULE : 400 * GRANULE] = random.Random(4).randbytes(399 * GRANULE)
    assert all(pair.difference(seed) is not None for seed in range(20))


def test_what_may_differ_is_not_compared(pair: Pair) -> None:
    pair.target[:GRANULE] = bytes(GRANULE)
    pair.tracker.dirty.mark(0, 1)
    assert pair.difference() is None
    claim = pair.tracker.claim(0, GRANULE)
    assert claim is not None
    assert pair.difference() is None
    pair.tracker.settle(claim, failed=False)
    assert pair.difference() is None, "it is not flushed"
    pair.tracker.end_flush(pair.tracker.begin_flush(), failed=False)
    assert pair.difference() == 0


def test_zeroes_are_compared_too_and_do_not_crowd_data_out() -> None:
    content = bytearray(SIZE)
    content[300 * GRANULE : 301 * GRANULE] = b"x" * GRANULE
    pair = Pair(bytes(content))
    pair.target[:] = b"y" * SIZE
    assert pair.difference() == 0
    pair.target[:] = bytes(SIZE)
    found = [pair.difference(seed) for seed in range(20)]
    assert found.count(300 * GRANULE) > 5, "one granule of data in 400"


def test_a_disk_of_no_bytes_and_one_of_a_granule() -> None:
    assert Pair(b"").difference() is None
    pair = Pair(b"abc")
    assert pair.difference() is None
    pair.target[:] = b"abd"
    assert pair.difference() == 0


def test_a_guest_that_writes_meanwhile_is_no_difference(pair: Pair) -> None:
    """Its write has reached the disk, and is not marked yet."""
    token = pair.disk.ledger.enter()
    pair.source.data[:GRANULE] = bytes(GRANULE)
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(pair.difference()))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive(), "it waits for the write"
    pair.disk.ledger.leave(token, 0, GRANULE)
    thread.join(10)
    assert found == [None]


def test_an_error_is_no_answer(pair: Pair) -> None:
    def fail(buf: memoryview, offset: int) -> None:
        raise DeviceError("as ordered")

    with pytest.raises(DeviceError):
        pair.check.find_mismatch(
            pair.disk, fail, pair.tracker, pair.tracker.may_differ(), random.Random(1)
        )


CHANGED = 7 * GRANULE
"""A place that only few of the tries look at."""


def seeds(pair: Pair, *, finding: bool) -> list[int]:
    """Which of many new targets are found to differ, or are not."""
    found = []
    for seed in range(400):
        pair.check = SpotCheck()
        if (pair.difference(seed) is not None) is finding:
            found.append(seed)
    pair.check = SpotCheck()
    return found


def test_what_differed_once_is_refused_until_it_is_equal(pair: Pair) -> None:
    """However often it is tried, at other places each time."""
    pair.target[CHANGED] ^= 1
    found, passed = seeds(pair, finding=True)[0], seeds(pair, finding=False)
    assert len(passed) > 300, "few places differ"
    assert pair.difference(found) == CHANGED
    for seed in passed:
        assert pair.difference(seed) == CHANGED
    pair.target[CHANGED] ^= 1
    assert all(pair.difference(seed) is None for seed in passed)
    pair.target[CHANGED] ^= 1
    assert pair.difference(passed[0]) is None, "it was the right one, and is a new loss"


def test_what_differed_and_was_changed_by_guests_since_is_refused(pair: Pair) -> None:
    """Nothing shows that the right target is back."""
    pair.target[CHANGED] ^= 1
    found, passed = seeds(pair, finding=True)[0], seeds(pair, finding=False)
    assert pair.difference(found) == CHANGED
    assert "differs" in pair.reason
    pair.tracker.dirty.mark(CHANGED, 1)
    for seed in passed:
        assert pair.difference(seed) == CHANGED
        assert "guests have changed the disk there since" in pair.reason


def test_one_of_several_places_shows_that_the_right_target_is_back(pair: Pair) -> None:
    for granule in range(1, 300):
        pair.target[granule * GRANULE] ^= 1
    first = pair.difference()
    assert all(pair.difference(seed) == first for seed in range(30))
    assert first is not None
    pair.tracker.dirty.mark(first, 1)
    assert pair.difference() not in (None, first), "the others are remembered as well"
    for granule in range(1, 300):
        pair.target[granule * GRANULE] ^= 1
    assert pair.difference() is None


def test_an_older_copy_differs_where_was_copied_last(pair: Pair) -> None:
    """A copy from seconds ago: one granule of many, and no chance is needed to find it."""
    pair.target[CHANGED] ^= 1
    assert len(seeds(pair, finding=False)) > 300
    pair.tracker.dirty.mark(CHANGED, 1)
    claim = pair.tracker.claim(CHANGED, GRANULE)
    assert claim is not None
    pair.tracker.settle(claim, failed=False)
    covered = pair.tracker.begin_flush()
    assert seeds(pair, finding=True) == [], "it is not flushed"
    pair.tracker.end_flush(covered, failed=False)
    assert seeds(pair, finding=False) == []
