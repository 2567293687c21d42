"""Slow is not dead, and not silent: whatever a storage does in a second, all that it is asked for
is answered within moments, so that progress shows and a pause comes about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from unit.mirror.copierparts import KIB, MIB, Clock, Devices, a_copier, data

from nbdmirror.devices.base import Extent, MemoryDevice
from nbdmirror.mirror.in_flight import ANSWER_S
from nbdmirror.mirror.in_flight import ZERO_BYTES_MAX as LARGEST

GIB = 1 << 30
PATIENCE_S = 12 * ANSWER_S
"""For one answer: the first requests to a storage are asked for before anybody knows it."""


class SlowDevices(Devices):
    """`slow` kinds of requests are done one after the other, so many bytes a second."""

    def __init__(
        self,
        source: MemoryDevice,
        clock: Clock,
        *,
        bytes_per_s: float,
        slow: tuple[str, ...],
        latency_s: float = 0.0,
    ) -> None:
        """`latency_s`: what each takes beside, at the same time as the others."""
        super().__init__(source, keeps=slow)
        self.clock = clock
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.longest_s = 0.0
        self._asked: list[tuple[float, int]] = []

    def _do(self, kind: str, offset: int, length: int, *rest: Callable[..., None]) -> None:
        if kind in self.keeps:
            self._asked.append((self.clock(), length))
        super()._do(kind, offset, length, *rest)

    def answer(self) -> None:
        """The next one."""
        since_s, length = self._asked.pop(0)
        self.clock.advance(length / self.bytes_per_s)
        self.clock.advance(max(0.0, since_s + self.latency_s - self.clock()))
        self.longest_s = max(self.longest_s, self.clock() - since_s)
        self.kept.pop(0)()


def a_hole(size: int) -> MemoryDevice:
    class Hole(MemoryDevice):
        def extents(self, offset: int, length: int) -> list[Extent]:
            return [Extent(length, zero=True, hole=True)]

    device = Hole(0)
    device.size = size
    return device


@pytest.mark.parametrize("mib_per_s", [0.5, 25, 400, 100_000])
def test_zeroes_are_asked_for_in_pieces_that_are_answered_soon(mib_per_s: float) -> None:
    """Each is progress, and none is asked for twice."""
    clock = Clock()
    size = min(1_000_000, int(mib_per_s * 40)) * MIB
    devices = SlowDevices(a_hole(size), clock, bytes_per_s=mib_per_s * MIB, slow=("zero",))
    devices.target = bytearray()
    copier, tracker, _ = a_copier(devices, clock=clock)
    copier.start()
    while devices.kept:
        before, length = copier.copied_bytes, copier.copied_bytes + tracker.remaining_bytes
        devices.answer()
        assert copier.copied_bytes > before
        assert copier.copied_bytes + tracker.remaining_bytes == length == size
    assert tracker.in_sync
    assert sum(length for _, length in devices.of("zero")) == size
    assert devices.longest_s < PATIENCE_S
    assert len(devices.of("zero")) < 2_000
    if mib_per_s > 1_000:
        assert max(length for _, length in devices.of("zero")) == LARGEST


def test_a_target_that_becomes_slow_is_asked_for_less() -> None:
    """A claim of many pieces ends where it was, so that guests' synchronous writes get in."""
    clock = Clock()
    devices = SlowDevices(a_hole(1000 * GIB), clock, bytes_per_s=10_000 * GIB, slow=("zero",))
    devices.target = bytearray()
    copier, tracker, _ = a_copier(devices, clock=clock)
    copier.start()
    while tracker.in_flight_bytes < 20 * GIB:
        devices.answer()
    devices.bytes_per_s = 100 * MIB
    for _ in range(40):
        devices.answer()
    devices.longest_s = 0
    for _ in range(10):
        devices.answer()
    assert devices.longest_s < PATIENCE_S
    assert tracker.in_flight_bytes < 400 * MIB


@pytest.mark.parametrize("granularity", [64 * KIB, 64 * MIB])
def test_a_stop_in_the_middle_of_a_hole(granularity: int) -> None:
    """What is in flight ends, nothing else begins, and what was not copied is dirty again."""
    clock = Clock()
    size = 1000 * GIB
    devices = SlowDevices(a_hole(size), clock, bytes_per_s=10_000 * GIB, slow=("zero",))
    devices.target = bytearray()
    copier, tracker, watcher = a_copier(devices, clock=clock, granularity=granularity)
    copier.start()
    while tracker.in_flight_bytes < 40 * GIB:
        devices.answer()
    copier.stop()
    begun = len(devices.of("zero"))
    while devices.kept:
        devices.answer()
    assert len(devices.of("zero")) == begun
    assert watcher.settled == 1
    zeroed = sum(length for _, length in devices.of("zero"))
    assert copier.copied_bytes == zeroed
    assert tracker.dirty.dirty_bytes == size - zeroed // granularity * granularity
    copier.start()
    while devices.kept:
        devices.answer()
    assert tracker.in_sync


@pytest.mark.parametrize("slow", ["read", "write"])
@pytest.mark.parametrize("granularity", [64 * KIB, 64 * MIB])
@pytest.mark.parametrize("mib_per_s", [0.25, 4, 100])
def test_data_is_asked_for_in_pieces_that_are_answered_soon(
    slow: str, granularity: int, mib_per_s: float
) -> None:
    """Of a slow source as of a slow target, however large the granules are."""
    clock = Clock()
    size = 64 * MIB
    devices = SlowDevices(data(size), clock, bytes_per_s=mib_per_s * MIB, slow=(slow,))
    copier, tracker, _ = a_copier(devices, clock=clock, granularity=granularity)
    copier.start()
    for _ in range(20):  # what was asked for before anybody knew
        if devices.kept:
            devices.answer()
    devices.longest_s, moved_at_s, offset = 0.0, clock(), 0
    while devices.kept:
        devices.answer()
        if copier.copied_bytes > offset:
            offset, moved_at_s = copier.copied_bytes, clock()
        assert clock() - moved_at_s < 2 * PATIENCE_S
    assert devices.longest_s < PATIENCE_S
    assert tracker.in_sync and devices.target == devices.device.data
    assert copier.copied_bytes == size
    assert clock() < 1.2 * size / (mib_per_s * MIB), "it is kept busy"


def test_after_a_stall_all_is_in_flight_again() -> None:
    """A target with a long way to it, which stood still once."""
    clock = Clock()
    devices = Devices(data(64 * MIB), keeps=("write",))
    copier, tracker, _ = a_copier(devices, clock=clock, buffer_bytes=16 * MIB)
    copier.start()
    deepest = 0
    for count in range(20):
        clock.advance(10.0 if count == 5 else 0.02)
        for end in list(devices.kept):
            devices.kept.remove(end)
            end()
        if count == 5:
            assert copier.in_flight < 4
            tracker.dirty.mark(0, 64 * MIB)
        if count > 5:
            deepest = max(deepest, copier.in_flight)
    assert deepest == 16


@pytest.mark.parametrize("kind", ["zero", "write"])
@pytest.mark.parametrize("is_so_from_the_start", [True, False])
def test_what_takes_its_time_whatever_is_asked_for_is_asked_for_as_much_as_ever(
    kind: str, is_so_from_the_start: bool
) -> None:
    """Each answer takes five seconds, from the start or from some moment on."""
    clock = Clock()
    size, most = (1000 * GIB, 30 * GIB) if kind == "zero" else (64 * MIB, 15 * MIB)
    source = a_hole(size) if kind == "zero" else data(size)
    devices = SlowDevices(source, clock, bytes_per_s=100_000 * GIB, slow=(kind,))
    devices.latency_s = 5.0 if is_so_from_the_start else 0.005
    if kind == "zero":
        devices.target = bytearray()
    copier, tracker, _ = a_copier(devices, clock=clock, buffer_bytes=16 * MIB)
    copier.start()
    for _ in range(20):
        devices.answer()
    devices.latency_s = 5.0
    since_s, deepest = clock(), 0
    while clock() - since_s < 200 and deepest < most:
        devices.answer()
        deepest = max(deepest, tracker.in_flight_bytes) if clock() - since_s > 10 else 0
        if kind == "write" and tracker.dirty.is_empty:
            tracker.dirty.mark(0, size)
            copier.pump()
    assert deepest >= most


def test_extents_that_take_long_are_asked_for_in_smaller_ranges() -> None:
    clock = Clock()
    size = 100 * GIB
    devices = SlowDevices(a_hole(size), clock, bytes_per_s=2 * GIB, slow=("extents",))
    devices.target = bytearray()
    copier, tracker, _ = a_copier(devices, clock=clock)
    copier.start()
    while devices.kept:
        devices.answer()
    assert tracker.in_sync
    assert devices.longest_s < 10 * ANSWER_S


@pytest.mark.rule(19)
def test_a_buffer_that_is_not_waited_for_is_not_used_again() -> None:
    """The source hangs, and the job is paused without it: its answers come when other copies are
    under way."""
    devices = Devices(data(24 * MIB), keeps=("read", "write"))
    copier, tracker, watcher = a_copier(devices)
    copier.start()
    devices.kept.pop(0)()
    devices.kept.pop(0)()
    late = list(devices.kept)
    assert len(late) > 1
    copier.stop()
    copier.disown()
    assert (copier.in_flight, tracker.in_flight_bytes, watcher.settled) == (0, 0, 1)
    dirty = tracker.dirty.dirty_bytes
    assert dirty == 24 * MIB - copier.copied_bytes
    devices.kept.clear()
    copier.start()
    claims = tracker.in_flight_bytes
    begun = len(devices.started)
    for end in late:
        end()
    assert len(devices.started) == begun, "nothing is written because of what comes late"
    assert tracker.in_flight_bytes == claims
    while devices.kept:
        devices.kept.pop(0)()
    assert tracker.in_sync and devices.target == devices.device.data


def test_who_waits_for_the_target_is_not_disowned() -> None:
    """It may change the target yet."""
    devices = Devices(data(4 * MIB), keeps=("write",))
    copier, tracker, watcher = a_copier(devices)
    copier.start()
    copier.stop()
    copier.disown()
    assert copier.in_flight == 1 and not watcher.settled
    devices.kept.pop()()
    assert copier.in_flight == 0 and tracker.dirty.dirty_bytes == 4 * MIB - copier.copied_bytes
