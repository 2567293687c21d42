"""Disk: what a guest's request tells the ledger, and when. `pread` and `pwrite` do by themselves
what the ledger's methods do, so each step is looked at from inside of the device."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest

from nbdmirror.devices.base import Buffer, Extent, MemoryDevice
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.disk import Disk, SynchronousWrites
from nbdmirror.disk.latency import Latency
from nbdmirror.disk.tracker import Tracker
from nbdmirror.errors import DeviceError

SIZE, GRANULARITY, WAIT_S = 1 << 20, 4096, 10.0


class Probe(MemoryDevice):
    """Calls `during` in the middle of each operation; it may raise."""

    during: Callable[[], None] = staticmethod(lambda: None)

    def pread(self, buf: memoryview, offset: int) -> None:
        self.during()
        super().pread(buf, offset)

    def pwrite(self, buf: object, offset: int, fua: bool = False) -> None:
        self.during()
        super().pwrite(buf, offset, fua)  # type: ignore[arg-type]

    def zero(self, offset: int, length: int, **options: bool) -> None:
        self.during()
        super().zero(offset, length, **options)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self.during()  # and nothing else: a trim is a hint

    def flush(self) -> None:
        self.during()
        super().flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        self.during()
        return super().extents(offset, length)

    def cache(self, offset: int, length: int) -> None:
        self.during()
        super().cache(offset, length)


CHANGES: dict[str, Callable[[Disk], None]] = {
    "write": lambda disk: disk.pwrite(b"x" * 100, 5000, False),
    "write-fua": lambda disk: disk.pwrite(b"x" * 100, 5000, True),
    "zero": lambda disk: disk.zero(5000, 100, may_trim=True, fua=False, fast=False),
    "trim": lambda disk: disk.trim(5000, 100, fua=False),
    "flush": lambda disk: disk.flush(),
}
READS: dict[str, Callable[[Disk], object]] = {
    "read": lambda disk: disk.pread(memoryview(bytearray(100)), 5000),
    "extents": lambda disk: disk.extents(5000, 100),
    "cache": lambda disk: disk.cache(5000, 100),
}
changes = pytest.mark.parametrize("kind", CHANGES)
reads = pytest.mark.parametrize("kind", READS)


@pytest.fixture
def probe() -> Probe:
    return Probe(SIZE)


@pytest.fixture
def disk(probe: Probe) -> Disk:
    return Disk("disk0", probe)


def fail() -> None:
    raise OSError(errno.EIO, "an error of the disk")


@changes
def test_a_change_is_announced_while_it_runs(disk: Disk, probe: Probe, kind: str) -> None:
    seen: list[int] = []
    probe.during = lambda: seen.append(len(disk.ledger.writes()))
    CHANGES[kind](disk)
    assert seen == [1]
    assert not disk.ledger.writes()


@pytest.mark.rule(2)
@changes
def test_a_change_that_fails_has_left_all_the_same(disk: Disk, probe: Probe, kind: str) -> None:
    dirty = DirtyBitmap(SIZE, GRANULARITY)
    disk.ledger.attach(dirty)
    probe.during = fail
    with pytest.raises(OSError, match="an error of the disk"):
        CHANGES[kind](disk)
    assert not disk.ledger.writes()
    assert dirty.dirty_bytes == (0 if kind == "flush" else GRANULARITY)


@pytest.mark.rule(33)
@changes
def test_a_mirror_that_begins_in_mid_change_is_told(disk: Disk, probe: Probe, kind: str) -> None:
    dirty = DirtyBitmap(SIZE, GRANULARITY)
    probe.during = lambda: disk.ledger.attach(dirty)
    CHANGES[kind](disk)
    assert dirty.next_run(0, SIZE) == (None if kind == "flush" else (GRANULARITY, GRANULARITY))


@pytest.mark.rule(1, 47)
@changes
def test_nothing_is_marked_before_the_disk_has_it(disk: Disk, probe: Probe, kind: str) -> None:
    dirty = DirtyBitmap(SIZE, GRANULARITY)
    disk.ledger.attach(dirty)
    seen: list[int] = []
    probe.during = lambda: seen.append(dirty.dirty_bytes)
    CHANGES[kind](disk)
    assert seen == [0]


@changes
@pytest.mark.parametrize("marked", [False, True])
def test_the_gate_is_told_of_the_last_change(
    disk: Disk, probe: Probe, kind: str, marked: bool
) -> None:
    if marked:
        disk.ledger.attach(DirtyBitmap(SIZE, GRANULARITY))
    told: list[bool] = []
    probe.during = lambda: disk.ledger.close_gate(lambda: told.append(disk.ledger.is_idle))
    CHANGES[kind](disk)
    assert told == [True]
    disk.ledger.open_gate()


@changes
def test_a_cut_waits_for_changes_and_not_for_flushes(disk: Disk, probe: Probe, kind: str) -> None:
    """A flush in progress does not change the content, and may take long."""
    told: list[bool] = []

    def cut() -> None:
        disk.ledger.close_gate(lambda: told.append(disk.ledger.is_idle), holds_flushes=False)
        assert disk.ledger.is_idle is (kind == "flush")

    probe.during = cut
    CHANGES[kind](disk)
    assert told == ([True, True] if kind == "flush" else [True])
    disk.ledger.open_gate()


def test_a_cut_lets_flushes_through(disk: Disk) -> None:
    disk.ledger.close_gate(lambda: None, holds_flushes=False)
    disk.flush()
    assert disk.ledger.is_idle
    disk.ledger.open_gate()
    assert not disk.ledger.writes()


def test_a_flush_that_was_held_is_no_change_for_the_next_cut(disk: Disk, probe: Probe) -> None:
    """It was admitted by the gate of an ending, and is in progress at the cut."""
    at_gate, in_flush, may_end = (threading.Event() for _ in range(3))

    def during() -> None:
        in_flush.set()
        assert may_end.wait(WAIT_S)

    probe.during = during
    disk.ledger.close_gate(lambda: None)
    assert disk.ledger.gate is not None
    disk.ledger.gate.on_idle = at_gate.set
    flush = threading.Thread(target=disk.flush)
    flush.start()
    try:
        assert at_gate.wait(WAIT_S)
        disk.ledger.open_gate()
        assert in_flush.wait(WAIT_S)
        disk.ledger.close_gate(lambda: None, holds_flushes=False)
        assert disk.ledger.is_idle
        disk.ledger.open_gate()
    finally:
        may_end.set()
        flush.join(WAIT_S)


@changes
def test_a_change_waits_at_the_closed_gate(disk: Disk, probe: Probe, kind: str) -> None:
    began, ended = threading.Event(), threading.Event()
    probe.during = began.set
    disk.ledger.close_gate(lambda: None)

    def guest() -> None:
        CHANGES[kind](disk)
        ended.set()

    thread = threading.Thread(target=guest, daemon=True)
    waiting = threading.Event()
    wait_at_gate = disk.ledger.wait_at_gate

    def arrived(token: int) -> None:
        waiting.set()
        wait_at_gate(token)

    disk.ledger.wait_at_gate = arrived  # type: ignore[method-assign]
    thread.start()
    assert waiting.wait(WAIT_S)
    assert disk.ledger.is_idle
    assert not began.is_set()
    disk.ledger.open_gate()
    assert ended.wait(WAIT_S)
    assert began.is_set()


@changes
def test_a_change_behind_the_gate_is_the_new_source_s(disk: Disk, probe: Probe, kind: str) -> None:
    target = Probe(SIZE)
    at_source, at_target, ended = threading.Event(), threading.Event(), threading.Event()
    probe.during, target.during = at_source.set, at_target.set
    disk.ledger.close_gate(lambda: None)

    def change() -> None:
        CHANGES[kind](disk)
        ended.set()

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    assert disk.ledger.is_idle
    assert disk.swap(target) is probe
    disk.ledger.open_gate()
    assert ended.wait(WAIT_S)
    assert at_target.is_set()
    assert not at_source.is_set()


@reads
def test_a_read_is_announced_and_never_waits(disk: Disk, probe: Probe, kind: str) -> None:
    seen: list[tuple[int, int]] = []
    ledger = disk.ledger
    probe.during = lambda: seen.append((len(ledger.reads()), len(ledger.writes())))
    ledger.close_gate(lambda: None)
    READS[kind](disk)
    assert seen == [(1, 0)]
    assert not ledger.reads()
    probe.during = fail
    with pytest.raises(OSError, match="an error of the disk"):
        READS[kind](disk)
    assert not ledger.reads()
    ledger.open_gate()


@pytest.mark.parametrize("part", [0, 1, 99, 100])
def test_what_a_part_left_out_is_done_by_the_device(probe: Probe, part: int) -> None:
    content = bytes(range(1, 101))

    def write_part(buf: Buffer, offset: int) -> int:
        probe.data[offset : offset + part] = memoryview(buf)[:part]
        return part

    def read_part(bufs: tuple[memoryview], offset: int) -> int:
        bufs[0][:part] = probe.data[offset : offset + part]
        return part

    probe.write_part, probe.read_part = write_part, read_part
    disk = Disk("disk0", probe)
    disk.pwrite(content, 5000, False)
    assert probe.data[5000:5100] == content
    got = bytearray(100)
    disk.pread(memoryview(got), 5000)
    assert got == content


def test_in_write_blocking_mode_nothing_is_zeroed_on_one_side_alone(
    disk: Disk, probe: Probe
) -> None:
    """A fast zero would be, so it is refused, as it may be at any time; a plain one is on both."""
    target, tracker = MemoryDevice(SIZE), Tracker(SIZE, GRANULARITY)
    for device in (probe, target):
        device.data[:] = b"x" * SIZE
    disk.ledger.attach(tracker.dirty)
    disk.synchronous = SynchronousWrites(
        tracker=tracker,
        target=target,
        whole_granules=False,
        on_error=lambda error: None,
        latency=Latency(),
    )
    with pytest.raises(DeviceError) as refusal:
        disk.zero(0, GRANULARITY, may_trim=True, fua=False, fast=True)
    assert refusal.value.errno == errno.ENOTSUP
    assert probe.data == target.data == b"x" * SIZE
    disk.zero(0, GRANULARITY, may_trim=True, fua=False, fast=False)
    assert probe.data == target.data == bytes(GRANULARITY) + b"x" * (SIZE - GRANULARITY)
