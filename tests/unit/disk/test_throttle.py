"""How fast guests may make a disk dirty, and for how long one of them waits at most."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from support.images import KiB, MiB
from support.waiting import WAIT_S_MAX

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.throttle import BURST_S, Throttle
from nbdmirror.disk.throttle import WAIT_S_MAX as LONGEST_S
from nbdmirror.disk.tracker import Tracker

GRANULE = 64 * KiB
SIZE = 64 * MiB + 512
RATE = MiB


class Parts:
    """A disk with a throttle, and a clock that moves only while a guest waits."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waits_s: list[float] = []
        self.disk = Disk("d", MemoryDevice(SIZE))
        self.tracker = Tracker(SIZE, GRANULE)
        self.disk.ledger.attach(self.tracker.dirty)
        self.throttle = Throttle(self.disk.ledger, self.tracker.dirty, lambda: self.now_s)
        self.throttle.wait = self._wait

    def _wait(self, seconds: float) -> None:
        assert seconds <= LONGEST_S
        self.waits_s.append(seconds)
        self.now_s += seconds

    @property
    def rate(self) -> float:
        """What has become dirty, without the burst, by the time."""
        return self.tracker.dirty.dirty_bytes / (self.now_s - 100.0 + BURST_S)


@pytest.fixture
def parts() -> Parts:
    return Parts()


def write(disk: Disk, offset: int, length: int) -> None:
    disk.pwrite(b"x" * length, offset, False)


def zero(disk: Disk, offset: int, length: int) -> None:
    disk.zero(offset, length, may_trim=True, fua=False, fast=False)


def trim(disk: Disk, offset: int, length: int) -> None:
    disk.trim(offset, length, fua=False)


Change = Callable[[Disk, int, int], None]
each_change = pytest.mark.parametrize("change", [write, zero, trim])


@each_change
@pytest.mark.parametrize("length", [512, GRANULE, 5 * GRANULE])
def test_each_kind_of_change_counts(parts: Parts, change: Change, length: int) -> None:
    parts.throttle.limit(RATE)
    for offset in range(0, 8 * MiB, max(length, GRANULE)):
        change(parts.disk, offset, length)
    assert parts.rate == pytest.approx(RATE, rel=0.05)


@each_change
def test_what_is_dirty_already_costs_nothing(parts: Parts, change: Change) -> None:
    change(parts.disk, 0, 8 * MiB)
    parts.throttle.limit(1.0)
    for offset in range(0, 8 * MiB, GRANULE):
        change(parts.disk, offset + 512, 1024)
    assert parts.waits_s == []


def test_a_large_change_waits_for_a_bounded_time_and_so_does_the_next(parts: Parts) -> None:
    parts.throttle.limit(1.0)
    trim(parts.disk, 0, 32 * MiB)
    write(parts.disk, 32 * MiB, 512)
    assert parts.waits_s == [pytest.approx(LONGEST_S)] * 2


def test_the_short_last_granule(parts: Parts) -> None:
    parts.throttle.limit(512.0)
    write(parts.disk, SIZE - 512, 512)
    assert parts.waits_s == [pytest.approx(1.0)]


def test_nothing_is_left_of_a_throttle_that_is_released(parts: Parts) -> None:
    before = parts.disk.ledger.bitmaps
    parts.throttle.limit(1.0)
    write(parts.disk, 0, MiB)
    parts.throttle.release("the test says so")
    assert (parts.throttle.bytes_per_s, parts.disk.ledger.bitmaps) == (None, before)
    waits = len(parts.waits_s)
    write(parts.disk, MiB, 8 * MiB)
    assert len(parts.waits_s) == waits
    parts.throttle.limit(RATE)
    write(parts.disk, 16 * MiB, GRANULE)
    assert parts.waits_s[waits:] == [pytest.approx(GRANULE / RATE)], "and not what was before"


def test_a_guest_that_waits_is_let_go() -> None:
    """With threads, and before its time is over."""
    parts = Parts()
    throttle = Throttle(parts.disk.ledger, parts.tracker.dirty, lambda: 0.0)
    throttle.limit(1.0)
    entered = threading.Event()
    wait = throttle.wait

    def waits(seconds: float) -> None:
        entered.set()
        wait(1000 * seconds)

    throttle.wait = waits
    guest = threading.Thread(target=write, args=(parts.disk, 0, MiB), daemon=True)
    guest.start()
    assert entered.wait(WAIT_S_MAX)
    assert not parts.disk.ledger.is_idle
    throttle.release("the test says so")
    guest.join(WAIT_S_MAX)
    assert not guest.is_alive() and parts.disk.ledger.is_idle
    assert parts.tracker.dirty.dirty_bytes == MiB
