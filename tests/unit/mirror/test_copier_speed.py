"""Copier: how fast."""

from __future__ import annotations

import itertools
import statistics

import pytest
from unit.mirror.copierparts import KIB, MIB, Clock, Devices, a_copier, data

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.disk.tracker import Tracker
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.in_flight import QUICK_BYTES
from nbdmirror.mirror.rate_limit import ROUND_S_MAX, ROUND_S_MIN, SLICE_S, SPREAD, TICKS, Haste

# The speed limit. A claim is accounted for when the source has told its extents.


@pytest.mark.rule(32)
@pytest.mark.parametrize("speed", [1, 100_000, MIB, 20 * MIB])
def test_speed_limit(speed: int) -> None:
    """Bytes started within t never exceed speed * t and one claim; and the limit is reached."""
    clock = Clock()
    devices = Devices(data(16 * MIB))
    copier, _, _ = a_copier(devices, clock=clock, granularity=4 * KIB)
    copier.set_speed(speed)
    copier.start()
    claim = max(4 * KIB, min(MIB, int(speed * SLICE_S)))
    for _ in range(100):
        clock.advance(0.007)
        copier.pump()
        started = sum(length for _, length in devices.of("read"))
        assert started <= speed * clock.now_s + claim
        # What is not used while nobody pumps is not made up for.
        assert started >= 0.85 * min(16 * MIB, speed * clock.now_s) - claim


def test_a_limit_is_reached_with_small_claims_and_late_timers() -> None:
    """Each timer is a millisecond late, and each claim takes two."""
    clock = Clock()
    devices = Devices(data(16 * MIB))
    copier, tracker, _ = a_copier(devices, clock=clock)
    tracker.dirty.clear_all()
    for granule in range(0, 256, 2):  # no neighbours
        tracker.dirty.mark(granule * 64 * KIB, 1)
    speed = 32 * MIB
    copier.set_speed(speed)
    copier.start()
    while clock.now_s < 0.2:
        clock.advance(min(at_s for at_s, _ in clock.timers) - clock.now_s + 0.001)
        started = sum(length for _, length in devices.of("read"))
        assert started <= speed * clock.now_s + 64 * KIB
    assert started >= 0.95 * speed * clock.now_s


def test_speed_limit_wakes_itself() -> None:
    clock = Clock()
    devices = Devices(data(MIB))
    copier, tracker, _ = a_copier(devices, clock=clock)
    copier.set_speed(MIB)
    copier.start()
    for _ in range(30):
        clock.advance(SLICE_S)
        assert len(clock.timers) <= 1
    assert tracker.in_sync


@pytest.mark.rule(32)
def test_speed_limit_with_slow_extents() -> None:
    """Several claims may begin before the first is accounted for: one for each slot, as in QEMU
    (rule 32); what was too much is waited for afterwards."""
    clock = Clock()
    devices = Devices(data(32 * MIB), keeps=("extents",))
    speed = MIB
    copier, _, _ = a_copier(devices, clock=clock, granularity=4 * KIB)
    copier.set_speed(speed)
    copier.start()
    claim, slots = int(speed * SLICE_S), QUICK_BYTES // MIB
    for _ in range(200):
        for end in list(devices.kept):
            devices.kept.remove(end)
            end()
        clock.advance(0.05)
        copier.pump()
        started = sum(length for _, length in devices.of("read"))
        assert started <= speed * clock.now_s + slots * claim
    assert started >= speed * clock.now_s - slots * claim


def test_no_speed_limit_where_guests_wait() -> None:
    devices = Devices(data(4 * MIB))
    copier, tracker, _ = a_copier(devices)
    copier.set_speed(1)
    copier.set_haste(Haste.GUESTS_WAIT)
    copier.start()
    assert tracker.in_sync


@pytest.mark.rule(32)
@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_are_free_where_the_target_unmaps(unmap: bool) -> None:
    """Rule 32."""
    devices = Devices(MemoryDevice(4 * MIB))
    copier, tracker, _ = a_copier(devices, unmap=unmap)
    copier.set_speed(MIB)
    copier.start()
    assert tracker.in_sync == unmap


# Evenly, after READY.


def following() -> tuple[Copier, Tracker, Devices, Clock]:
    """In sync, and a round may begin."""
    clock = Clock()
    devices = Devices(data(16 * MIB))
    copier, tracker, _ = a_copier(devices, clock=clock, granularity=64 * KIB)
    copier.start()
    copier.set_haste(Haste.LAG)
    copier.pump()
    clock.advance(ROUND_S_MAX)
    return copier, tracker, devices, clock


@pytest.mark.parametrize("count", [1, 20, 100, 256])
def test_what_is_dirty_is_sent_evenly(count: int) -> None:
    """A burst would delay guests' requests. Each tick sends its part of what is dirty, and a round
    takes about as long as the target may lag behind."""
    copier, tracker, devices, clock = following()
    for granule in range(count):
        tracker.dirty.mark(granule * 16 * MIB // count, 1)
    began_s = clock.now_s
    while not tracker.in_sync:
        before = sum(length for _, length in devices.of("write"))
        due = -(-tracker.dirty.dirty_granules // (TICKS * SPREAD))
        copier.pump()
        sent = sum(length for _, length in devices.of("write")) - before
        assert sent <= (due + 16) * 64 * KIB, "neighbours go in one request of 1 MiB"
        clock.advance(ROUND_S_MIN / TICKS)
        assert clock.now_s - began_s < 2 * ROUND_S_MAX
    assert count < 20 or clock.now_s - began_s > ROUND_S_MIN * SPREAD / 2


@pytest.mark.parametrize(
    ("hot", "times_a_second"), [(1, (16, 21)), (16, (16, 21)), (64, (6, 14)), (256, (6.5, 9))]
)
def test_what_is_written_again_and_again_is_sent_the_less_often_the_more_it_is(
    hot: int, times_a_second: tuple[float, float]
) -> None:
    """Guests write to `hot` granules all the time. The time between two copies of one of them is
    steady: it does not swing between long and short."""
    copier, tracker, devices, clock = following()
    tick_s = ROUND_S_MIN / TICKS
    copies: list[float] = []
    while clock.now_s < 6:
        for granule in range(hot):
            tracker.dirty.mark(granule * 16 * MIB // hot, 1)
        copier.pump()
        clock.advance(tick_s)
        copies += [clock.now_s for offset, _ in devices.of("write") if offset == 0]
        devices.started.clear()
    gaps = [after - before for before, after in itertools.pairwise(copies)][-12:]
    assert max(gaps) < 1.3 * min(gaps) + 2 * tick_s
    at_least, at_most = times_a_second
    assert at_least <= 1 / statistics.mean(gaps) <= at_most


def test_what_is_dirty_is_sent_at_once_where_guests_wait() -> None:
    copier, tracker, _, _ = following()
    for granule in range(0, 256, 2):
        tracker.dirty.mark(granule * 64 * KIB, 1)
    copier.pump()
    assert not tracker.in_sync
    copier.set_haste(Haste.GUESTS_WAIT)
    copier.pump()
    assert tracker.in_sync
