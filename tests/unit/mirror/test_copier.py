"""Copier: how many requests, how large. What order does to data is in test_mirror_invariant.py."""

from __future__ import annotations

import errno

import pytest
from unit.mirror.copierparts import KIB, MIB, Clock, Devices, a_copier, buffers_made, data, frames

from nbdmirror.devices.base import Extent, MemoryDevice
from nbdmirror.disk.ledger import Ledger
from nbdmirror.mirror.buffers import ZERO_UNIT_BYTES
from nbdmirror.mirror.copier import REQUEST_BYTES_MAX
from nbdmirror.mirror.in_flight import PROBE_BYTES, QUICK_BYTES
from nbdmirror.mirror.rate_limit import ROUND_S_MIN, Haste

QUICK_MAX = QUICK_BYTES // REQUEST_BYTES_MAX


@pytest.mark.parametrize(
    ("buffer_bytes", "slots"),
    [(16 * MIB, QUICK_MAX), (3 * MIB, 3), (1 * MIB, 1), (64 * KIB, 1), (1 * KIB, 1)],
)
def test_requests_and_bytes_are_bounded(buffer_bytes: int, slots: int) -> None:
    devices = Devices(data(24 * MIB), keeps=("read", "write"))
    copier, tracker, _ = a_copier(devices, buffer_bytes=buffer_bytes)
    copier.start()
    bound = max(buffer_bytes, 64 * KIB)
    while devices.kept:
        assert copier.in_flight == len(devices.kept) <= slots
        assert tracker.in_flight_bytes <= bound
        assert max(length for _, length in devices.of("read", "write")) <= min(
            REQUEST_BYTES_MAX, bound
        )
        if copier.answers and not tracker.dirty.is_empty:
            assert copier.in_flight == slots, "a slot stands empty"
        devices.kept.pop(0)()
    assert tracker.in_sync
    assert devices.target == devices.device.data


@pytest.mark.rule(31)
def test_a_huge_hole_is_few_requests() -> None:
    size = 1 << 40

    class Hole(MemoryDevice):
        def extents(self, offset: int, length: int) -> list[Extent]:
            return [Extent(length, zero=True, hole=True)]

    device = Hole(0)
    device.size = size
    devices = Devices(device)
    devices.target = bytearray()
    copier, tracker, watcher = a_copier(devices)
    copier.start()
    assert tracker.in_sync
    assert watcher.settled
    assert sum(length for _, length in devices.of("zero")) == size
    assert len(devices.started) < 2 * (size // (1 << 30) + 10)
    assert not devices.of("read", "write")
    assert copier.copied_bytes == size
    assert copier.written_bytes == 0


@pytest.mark.rule(26)
@pytest.mark.parametrize("size", [0, 1, 511, 65535, 65536, 65537, MIB + 1, 3 * MIB + 513])
@pytest.mark.parametrize("is_data", [False, True])
def test_odd_sizes(size: int, is_data: bool) -> None:
    devices = Devices(data(size) if is_data else MemoryDevice(size))
    copier, tracker, watcher = a_copier(devices)
    copier.start()
    assert devices.target == devices.device.data
    assert tracker.in_sync
    assert copier.copied_bytes == size
    assert tracker.remaining_bytes == 0
    assert bool(watcher.settled) == bool(size)


def test_zeroes_in_data_are_zeroed_in_units() -> None:
    """Two units of zeroes, and zeroes at the end of the disk; half a unit is data."""
    unit = ZERO_UNIT_BYTES
    device = data(16 * unit + 100)
    device.pwrite(bytes(2 * unit), 3 * unit)
    device.pwrite(bytes(unit), 8 * unit + unit // 2)
    device.pwrite(bytes(100), 16 * unit)
    devices = Devices(device)
    copier, _, _ = a_copier(devices)
    copier.start()
    assert devices.target == device.data
    assert devices.of("zero") == [(3 * unit, 2 * unit), (16 * unit, 100)]
    assert copier.written_bytes == 14 * unit
    assert copier.copied_bytes == device.size


@pytest.mark.parametrize("unmap", [False, True])
def test_the_target_may_unmap_only_if_told(unmap: bool) -> None:
    devices = Devices(MemoryDevice(4 * MIB))
    copier, _, _ = a_copier(devices, unmap=unmap)
    copier.start()
    assert devices.may_trim == {unmap}


@pytest.mark.rule(31)
def test_an_extents_error_means_data() -> None:
    """Rule 31: no failure of the copy."""
    devices = Devices(MemoryDevice(2 * MIB))
    devices.errors["extents"] = OSError(errno.EIO, "no idea")
    copier, tracker, watcher = a_copier(devices)
    copier.start()
    assert not watcher.failed
    assert tracker.in_sync
    assert sum(length for _, length in devices.of("read")) == 2 * MIB
    assert devices.target == devices.device.data


def test_a_granule_larger_than_a_request_goes_in_pieces() -> None:
    devices = Devices(data(10 * MIB + 5), keeps=("write",))
    copier, tracker, _ = a_copier(devices, granularity=4 * MIB, buffer_bytes=1 * MIB)
    copier.start()
    while devices.kept:
        devices.kept.pop(0)()
    assert devices.target == devices.device.data
    assert tracker.in_sync
    assert {length for _, length in devices.of("read")} == {REQUEST_BYTES_MAX, 5}


def test_what_ends_at_once_does_not_recurse() -> None:
    """64 pieces of one granule, and 1024 claims, with devices that never wait (real targets always
    do: their replies come from the loop)."""
    before = frames()
    small = Devices(data(64 * MIB))
    a_copier(small, granularity=64 * KIB, request_bytes_max=64 * KIB)[0].start()
    assert small.target == small.device.data
    assert small.frames_max - before < 20
    large = Devices(data(64 * MIB))
    a_copier(large, granularity=64 * MIB)[0].start()
    assert large.target == large.device.data
    # Grows with the pieces of a granule; half of it is this test's.
    assert large.frames_max - before < 13 * 64


@pytest.mark.rule(20)
@pytest.mark.parametrize(
    ("kind", "operation", "is_data"),
    [("read", "read", True), ("write", "write", True), ("zero", "write", False)],
)
def test_a_failed_copy_is_dirty_again_and_told(kind: str, operation: str, is_data: bool) -> None:
    devices = Devices(data(4 * MIB) if is_data else MemoryDevice(4 * MIB))
    error = devices.errors[kind] = OSError(errno.ENOSPC, "full")
    copier, tracker, watcher = a_copier(devices)
    copier.start()
    assert watcher.failed == [(operation, error)]
    assert watcher.settled
    assert tracker.dirty.dirty_bytes == 4 * MIB
    assert copier.copied_bytes == 0
    del devices.errors[kind]
    copier.start()
    assert devices.target == devices.device.data
    assert tracker.in_sync


def test_small_claims_take_no_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = buffers_made(monkeypatch)
    devices = Devices(data(48 * MIB), keeps=("write",))
    copier, tracker, _ = a_copier(devices)
    tracker.dirty.clear(0, 48 * MIB)
    for offset in range(0, 48 * MIB, 2 * ZERO_UNIT_BYTES):
        tracker.dirty.mark(offset, 1)
    copier.start()
    while devices.kept:
        devices.kept.pop(0)()
    assert len(devices.of("write")) == 384
    assert len(made) == QUICK_BYTES // ZERO_UNIT_BYTES
    assert set(made) == {ZERO_UNIT_BYTES}
    tracker.dirty.mark(0, 48 * MIB)
    copier.start()
    while devices.kept:
        devices.kept.pop(0)()
    assert made[-QUICK_MAX:] == [REQUEST_BYTES_MAX] * QUICK_MAX
    assert len(made) == QUICK_BYTES // ZERO_UNIT_BYTES + QUICK_MAX
    assert devices.target == devices.device.data


def test_what_is_written_again_and_again_is_copied_once_a_round() -> None:
    clock = Clock()
    devices = Devices(data(4 * MIB))
    copier, tracker, _ = a_copier(devices, clock=clock)
    copier.start()
    assert tracker.in_sync
    copier.set_haste(Haste.LAG)
    before = len(devices.started)
    for _ in range(100):  # each 10 ms, for a second
        tracker.dirty.mark(64 * KIB, 1)
        copier.pump()
        clock.advance(0.01)
    rounds = len(devices.of("write")) - sum(
        kind == "write" for kind, *_ in devices.started[:before]
    )
    assert 0.9 <= rounds * ROUND_S_MIN <= 1.1
    tracker.dirty.mark(0, 1)
    copier.set_haste(Haste.GUESTS_WAIT)
    copier.pump()
    assert tracker.in_sync, "guests wait"


def test_a_round_that_was_put_off_comes_by_itself() -> None:
    clock = Clock()
    devices = Devices(data(MIB))
    copier, tracker, _ = a_copier(devices, clock=clock)
    copier.set_haste(Haste.LAG)
    copier.start()
    tracker.dirty.mark(0, 1)
    copier.pump()
    assert not tracker.in_sync
    for _ in range(4):
        clock.advance(0.1)
    assert tracker.in_sync


def test_a_clean_gap_costs_nothing_however_wide() -> None:
    """Of a large granule two parts are dirty, one at each end, and requests are small."""
    size, part = 64 * MIB, 4 * KIB
    devices = Devices(data(size), keeps=("write",))
    copier, tracker, watcher = a_copier(
        devices, granularity=size, unit=part, request_bytes_max=PROBE_BYTES
    )

    def copy_all() -> None:
        copier.start()
        while devices.kept:
            devices.kept.pop()()
        assert tracker.in_sync

    copy_all()
    tracker.refine()
    for _ in range(2):
        tracker.look(Ledger())
    devices.started.clear()
    devices.frames_max = 0
    parts = [(0, part), (size - part, part)]
    for offset, length in parts:
        devices.device.pwrite(b"new" * 1000, offset)
        tracker.dirty.mark(offset, length)
    copy_all()
    assert devices.of("read") == devices.of("write") == parts
    assert devices.frames_max < frames() + 60, "a call inside a call for each step"
    assert not watcher.failed
    assert devices.target == devices.device.data


@pytest.mark.rule(19)
def test_after_stop_what_is_in_flight_ends_and_nothing_begins() -> None:
    devices = Devices(data(24 * MIB), keeps=("read",))
    copier, tracker, watcher = a_copier(devices)
    copier.start()
    devices.kept.pop()()
    assert len(devices.kept) == QUICK_MAX
    copier.stop()
    for end in list(devices.kept):
        end()
    assert len(devices.kept) == QUICK_MAX
    assert watcher.settled == 1
    assert copier.in_flight == 0
    assert tracker.dirty.dirty_bytes == 24 * MIB - PROBE_BYTES - QUICK_MAX * REQUEST_BYTES_MAX


@pytest.mark.rule(35)
def test_new_writes_do_not_send_the_copier_back() -> None:
    """Rule 35: once around, then from the start."""
    devices = Devices(data(8 * MIB), keeps=("write",))
    copier, tracker, _ = a_copier(devices, buffer_bytes=REQUEST_BYTES_MAX)
    copier.start()
    while devices.kept:
        if len(devices.of("write")) < 6:
            tracker.dirty.mark(0, 1)
        devices.kept.pop(0)()
    offsets = [offset for offset, _ in devices.of("write")]
    assert offsets == [0, *range(PROBE_BYTES, 8 * MIB, REQUEST_BYTES_MAX), 0]


def test_an_untouched_target_is_flushed() -> None:
    """What it holds may be in its caches alone, from another mirror. A disk of no bytes is left
    out: its target may have no flush."""
    ended: list[BaseException | None] = []
    for content, flushes in ((data(MIB), [("flush", 0, 0)]), (data(0), [])):
        devices = Devices(content)
        copier, _, _ = a_copier(devices)
        copier.flush(ended.append)
        assert devices.started == flushes
    assert ended == [None, None]
