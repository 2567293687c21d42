"""Frozen: what a guest's request saves before it changes anything, and what it waits for. All
orders of the steps are in tests/model/test_cut.py."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from unit.disk.ledgerthreads import running, wait

from nbdmirror.devices.base import Extent, MemoryDevice
from nbdmirror.disk.changes import Changes
from nbdmirror.disk.claim import Claim
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.frozen import HOLE_BYTES_MIN, SAVE_BYTES, Frozen
from nbdmirror.disk.saved import ENTRY_BYTES, Saved, SavedGranules
from nbdmirror.errors import DeviceError

GRANULE = 4096
SIZE = 16 << 20


class Source(MemoryDevice):
    """Counts what is read; `before_read` may raise."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.read_bytes = 0
        self.before_read: Callable[[], None] = lambda: None
        self.has_extents = True

    def pread(self, buf: memoryview, offset: int) -> None:
        self.before_read()
        self.read_bytes += len(buf)
        super().pread(buf, offset)

    def extents(self, offset: int, length: int) -> list[Extent]:
        if not self.has_extents:
            raise DeviceError("not supported")
        return super().extents(offset, length)


@dataclass(slots=True)
class Point:
    """A disk with a point in progress."""

    source: Source
    disk: Disk
    frozen: Frozen
    broken: threading.Event = field(default_factory=threading.Event)

    def write(self, offset: int, length: int = GRANULE) -> None:
        self.disk.pwrite(b"n" * length, offset, False)


def a_point(
    dirty: int,
    *,
    memory_bytes: int = 1 << 20,
    breaks_guest_writes: bool = False,
    data: bytes = b"o",
) -> Point:
    """The first `dirty` bytes of the disk belong to the point, and hold `data`."""
    source = Source()
    source.pwrite(data * dirty, 0)
    disk = Disk("disk", source)
    changes = Changes(disk, GRANULE)
    changes.begin()
    changes.dirty.mark(0, dirty)
    changes.prepare()
    broken = threading.Event()
    disk.ledger.close_gate(lambda: None, holds_flushes=False)
    frozen = changes.cut(
        lambda covered, done: Frozen(
            covered,
            done,
            SavedGranules(memory_bytes),
            breaks_guest_writes=breaks_guest_writes,
            on_broken=broken.set,
            on_saved=lambda: None,
            latency=disk.ledger.latency,
        )
    )
    disk.ledger.open_gate()
    return Point(source, disk, frozen, broken)


def saved(frozen: Frozen) -> list[Saved]:
    found = []
    while entries := frozen.saved.take(1):
        found += entries
    return found


def test_a_granule_is_saved_whole_and_once() -> None:
    point = a_point(3 * GRANULE)
    point.write(GRANULE + 100, 8)
    point.write(GRANULE + 200, GRANULE)
    entries = saved(point.frozen)
    assert [(entry.offset, entry.length) for entry in entries] == [
        (GRANULE, GRANULE),
        (2 * GRANULE, GRANULE),
    ]
    assert all(bytes(entry.content or b"") == b"o" * GRANULE for entry in entries)
    assert point.source.read_bytes == 2 * GRANULE
    assert point.frozen.left_bytes == GRANULE


def test_what_is_no_part_of_the_point_is_not_read() -> None:
    point = a_point(GRANULE)
    point.write(GRANULE, 4 * GRANULE)
    assert not saved(point.frozen)
    assert not point.source.read_bytes


@pytest.mark.parametrize("kind", ["zero", "trim"])
def test_zeroing_and_trimming_save_as_well(kind: str) -> None:
    point = a_point(2 * GRANULE)
    if kind == "zero":
        point.disk.zero(0, 2 * GRANULE, may_trim=True, fua=False, fast=False)
    else:
        point.disk.trim(0, 2 * GRANULE, fua=False)
    (entry,) = saved(point.frozen)
    assert bytes(entry.content or b"") == b"o" * 2 * GRANULE


def test_zeroes_take_no_memory() -> None:
    point = a_point(GRANULE, memory_bytes=ENTRY_BYTES, data=b"\0")
    point.write(0)
    (entry,) = saved(point.frozen)
    assert entry.content is None


@pytest.mark.parametrize("has_extents", [True, False])
def test_holes_of_a_long_range_are_saved_without_reading_them(has_extents: bool) -> None:
    """Without extents the holes count as data, and are found to be zero."""
    point = a_point(SIZE)
    point.source.trim(GRANULE, SIZE - 2 * GRANULE)
    point.source.has_extents = has_extents
    point.disk.trim(0, SIZE, fua=False)
    entries = saved(point.frozen)
    assert sum(entry.length for entry in entries) == SIZE
    assert sum(len(entry.content or b"") for entry in entries) <= 2 * SAVE_BYTES
    assert point.frozen.left_bytes == 0
    if has_extents:
        assert point.source.read_bytes <= 2 * SAVE_BYTES
        assert len(entries) < SIZE // HOLE_BYTES_MIN


def test_a_range_that_has_no_room_breaks_the_point_and_no_write() -> None:
    point = a_point(SIZE, memory_bytes=4 * SAVE_BYTES)
    point.disk.zero(0, SIZE, may_trim=True, fua=False, fast=False)
    assert point.broken.is_set()
    assert isinstance(point.frozen.error, DeviceError)
    assert point.frozen.error.errno == errno.ENOSPC
    assert point.source.read_bytes < 5 * SAVE_BYTES, "saves for a point that is broken"
    assert not any(point.source.data)
    assert point.frozen.claim(GRANULE) is None
    assert not point.frozen.is_read


def test_a_read_that_fails_breaks_the_point_and_no_write() -> None:
    point = a_point(2 * GRANULE)

    def fail() -> None:
        raise OSError(errno.EIO, "an error of the disk")

    point.source.before_read = fail
    point.write(0)
    assert point.broken.is_set()
    assert point.source.data[:GRANULE] == b"n" * GRANULE


def test_a_guest_s_write_can_be_broken_instead() -> None:
    point = a_point(2 * GRANULE, memory_bytes=0, breaks_guest_writes=True)
    with pytest.raises(DeviceError) as caught:
        point.write(0)
    assert caught.value.errno == errno.ENOSPC
    assert point.source.data[:GRANULE] == b"o" * GRANULE
    assert not point.broken.is_set()
    claim = point.frozen.claim(SIZE)
    assert claim is not None
    assert (claim.offset, claim.length) == (0, 2 * GRANULE), "the sender still reads it"
    assert point.frozen.read(claim)
    point.write(0)
    assert point.source.data[:GRANULE] == b"n" * GRANULE


def claimed(point: Point, length: int) -> Claim:
    claim = point.frozen.claim(length)
    assert claim is not None
    return claim


def test_a_guest_waits_for_the_local_read_alone() -> None:
    point = a_point(2 * GRANULE)
    claim = claimed(point, GRANULE)
    looked, written = threading.Event(), threading.Event()
    begin_save = point.frozen._begin_save

    def begin(offset: int, end: int) -> tuple[int, Claim | None]:
        looked.set()
        return begin_save(offset, end)

    point.frozen._begin_save = begin  # type: ignore[method-assign]

    def guest() -> None:
        point.write(0, 100)
        written.set()

    with running(guest):
        wait(looked)
        assert not written.is_set()
        assert point.frozen.read(claim)  # and nothing is sent, or settled
        wait(written)
    assert not saved(point.frozen)


def test_a_guest_that_waits_continues_when_the_point_is_given_up() -> None:
    """The read may hang, and the job ends."""
    point = a_point(GRANULE)
    claim = claimed(point, GRANULE)
    with running(lambda: point.write(0)):
        point.frozen.break_off(DeviceError("the job ends"))
    assert point.broken.is_set()
    assert not point.frozen.read(claim), "the late answer counts for nothing"
    point.frozen.break_off(DeviceError("once more"))
    assert str(point.frozen.error) == "the job ends"


def test_a_claim_gives_back_what_it_does_not_read() -> None:
    point = a_point(8 * GRANULE)
    first = claimed(point, 4 * GRANULE)
    second = claimed(point, 4 * GRANULE)
    point.frozen.shrink(first, GRANULE)
    third = claimed(point, 4 * GRANULE)
    assert [(one.offset, one.length) for one in (first, second, third)] == [
        (0, GRANULE),
        (4 * GRANULE, 4 * GRANULE),
        (GRANULE, 3 * GRANULE),
    ]
    for claim in (first, second, third):
        assert not point.frozen.is_read
        point.frozen.read(claim)
    assert point.frozen.is_read


def test_a_disk_without_a_point_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock and no call where there is no point."""
    disk = Disk("disk", MemoryDevice(SIZE))
    monkeypatch.setattr(Frozen, "before_change", None)
    disk.pwrite(b"x", 0, False)
    disk.zero(0, 1, may_trim=True, fua=False, fast=False)
    disk.trim(0, 1, fua=False)
