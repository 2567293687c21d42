"""InFlightWindow: how many requests are in flight, and how large they are, beside guests and to
targets near and far."""

from __future__ import annotations

from typing import Any

import pytest
from unit.mirror.copierparts import KIB, MIB, Clock, Devices, a_copier, buffers_made, data

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.mirror.buffers import ZERO_UNIT_BYTES
from nbdmirror.mirror.copier import REQUEST_BYTES_MAX
from nbdmirror.mirror.in_flight import (
    GROWTH,
    LOOK_S,
    OPENING_BYTES,
    PROBE_BYTES,
    PROBES,
    QUICK_BYTES,
    QUICK_WRITE_S,
    YIELDING_REQUEST_BYTES,
    CopierLoad,
    InFlightWindow,
)
from nbdmirror.mirror.options import BUFFER_BYTES_DEFAULT

QUICK_MAX = QUICK_BYTES // REQUEST_BYTES_MAX


@pytest.mark.parametrize(
    ("took_s", "slots"),
    [(QUICK_WRITE_S / 2, QUICK_MAX), (QUICK_WRITE_S, 16)],
)
def test_a_slow_target_gets_all_that_buf_size_allows(took_s: float, slots: int) -> None:
    clock = Clock()
    devices = Devices(data(48 * MIB), keeps=("write",))
    copier, tracker, _ = a_copier(devices, clock=clock, buffer_bytes=16 * MIB)
    copier.start()
    assert copier.in_flight == 1, "the first answer tells"
    deepest = 0
    while devices.kept:
        clock.advance(took_s)
        devices.kept.pop(0)()
        deepest = max(deepest, copier.in_flight)
    assert deepest == slots
    assert tracker.in_sync


def test_zeroing_that_takes_long_tells_nothing_of_the_link() -> None:
    clock = Clock()
    device = data(48 * MIB)
    device.pwrite(bytes(16 * MIB), 0)
    devices = Devices(device, keeps=("zero", "write"))
    copier, tracker, _ = a_copier(devices, clock=clock)
    copier.start()
    while devices.kept:
        assert copier.in_flight <= QUICK_MAX
        if devices.started[-1][0] == "zero":
            clock.advance(0.02)
        devices.kept.pop(0)()
    assert tracker.in_sync
    assert devices.of("zero") and devices.target == device.data


def test_zeroing_that_takes_long_is_not_done_in_small_pieces() -> None:
    clock = Clock()
    device = MemoryDevice(48 * MIB)
    device.pwrite(bytes(48 * MIB), 0)
    devices = Devices(device, keeps=("zero",))
    copier, tracker, _ = a_copier(devices, clock=clock)
    copier.start()
    while devices.kept:
        clock.advance(0.02)
        devices.kept.pop(0)()
    assert tracker.in_sync
    assert len(devices.of("zero")) == PROBES + 47


def test_zeroing_that_is_quick_tells_that_the_target_is_near() -> None:
    device = MemoryDevice(48 * MIB)
    device.pwrite(bytes(48 * MIB), 0)
    devices = Devices(device, keeps=("zero",))
    copier, _, _ = a_copier(devices)
    copier.start()
    devices.kept.pop(0)()
    assert copier.in_flight == QUICK_MAX


@pytest.mark.parametrize("granularity", [64 * KIB, MIB])
def test_what_is_in_flight_grows_with_each_round_trip(granularity: int) -> None:
    """Until one answer was quick: the target is near, and was busy."""
    clock = Clock()
    devices = Devices(data(48 * MIB), keeps=("write",))
    copier, _, _ = a_copier(devices, clock=clock, granularity=granularity, buffer_bytes=16 * MIB)
    copier.start()
    for expected in (1, 1 + GROWTH, (1 + GROWTH) ** 2):
        assert copier.in_flight == expected
        clock.advance(0.02)
        for _ in range(expected):
            devices.kept.pop(0)()
    clock.advance(QUICK_WRITE_S / 2)
    devices.kept.pop()()  # one that was sent last
    while copier.in_flight > QUICK_MAX:
        before = copier.in_flight
        devices.kept.pop(0)()
        assert copier.in_flight == before - 1
    devices.kept.pop(0)()
    assert copier.in_flight == QUICK_MAX


@pytest.mark.parametrize(("count", "each"), [(1, 4), (2, 2), (3, 1), (9, 1)])
def test_mirrors_to_quick_targets_share_what_is_in_flight(count: int, each: int) -> None:
    load = CopierLoad(Clock(), lambda: 0)
    all_devices = [Devices(data(8 * MIB), keeps=("write",)) for _ in range(count)]
    copiers = [a_copier(devices, load=load)[0] for devices in all_devices]
    for copier in copiers:
        copier.start()
    assert load.count == count
    for _ in range(QUICK_MAX):  # those that came first had the processor's cache for themselves
        for devices in all_devices:
            devices.kept.pop(0)()
    assert [copier.in_flight for copier in copiers] == [each] * count
    while any(devices.kept for devices in all_devices):
        for devices in all_devices:
            if devices.kept:
                devices.kept.pop(0)()
    assert load.count == 0


@pytest.mark.parametrize(
    ("processors", "requests", "each"),
    [(2, 11, 1), (2, 999, 1), (2, 9, 4), (2, 1010, 4), (3, 200, 4), (1, 200, 1)],
)
def test_guests_at_work_get_a_processor(processors: int, requests: int, each: int) -> None:
    clock = Clock()
    load = CopierLoad(clock, lambda: requests, processors)
    clock.advance(LOOK_S)
    devices = Devices(data(8 * MIB), keeps=("write",))
    copier, tracker, _ = a_copier(devices, clock=clock, load=load)
    copier.start()
    clock.advance(YIELDING_REQUEST_BYTES / 2e9)
    devices.kept.pop(0)()
    assert copier.in_flight == each
    while devices.kept:
        clock.advance(QUICK_WRITE_S / 2)
        devices.kept.pop(0)()
        assert copier.in_flight <= each
    assert tracker.in_sync
    largest = max(length for _, length in devices.of("write"))
    assert largest == (YIELDING_REQUEST_BYTES if each == 1 else REQUEST_BYTES_MAX)


def test_guests_at_work_do_not_make_holes_many_requests() -> None:
    clock = Clock()
    load = CopierLoad(clock, lambda: 200, 2)
    clock.advance(LOOK_S)
    device = MemoryDevice(64 * MIB)
    device.pwrite(b"x" * MIB, 0)
    devices = Devices(device)
    copier, _, _ = a_copier(devices, clock=clock, load=load)
    copier.start()
    assert devices.target == device.data
    assert len(devices.of("write")) == 1 + 2
    assert len(devices.of("zero")) < 8


def test_a_guest_that_was_at_work_all_along_is_seen() -> None:
    """However long ago somebody looked."""
    clock = Clock()
    load = CopierLoad(clock, lambda: 20_000, 2)
    clock.advance(10)
    assert load.guests_need_room
    clock.advance(1)
    assert not load.guests_need_room, "it has become one that keeps a processor busy"


def test_the_first_requests_are_small() -> None:
    """Until one is answered quickly; a target that has not done it by then is far away."""
    clock = Clock()
    devices = Devices(data(48 * MIB), keeps=("write",))
    copier, _, _ = a_copier(devices, clock=clock)
    copier.start()
    while copier.answers < PROBES:
        clock.advance(QUICK_WRITE_S)
        devices.kept.pop(0)()
    lengths = [length for _, length in devices.of("write")]
    assert set(lengths[: PROBES + GROWTH]) == {PROBE_BYTES}
    assert lengths[-1] == REQUEST_BYTES_MAX

    near = Devices(data(8 * MIB))
    a_copier(near, clock=clock)[0].start()
    first, *rest = [length for _, length in near.of("write")]
    assert first == PROBE_BYTES
    assert set(rest[:-1]) == {REQUEST_BYTES_MAX}


def opened(content: MemoryDevice, *, took_s: float = 0.0, **options: Any) -> list[int]:
    """Lengths of the writes of a copy whose one large request may be of OPENING_BYTES."""
    clock = Clock()
    devices = Devices(content, keeps=("write",))
    copier, tracker, _ = a_copier(devices, clock=clock, request_bytes_max=OPENING_BYTES, **options)
    copier.start()
    while devices.kept:
        assert tracker.in_flight_bytes <= options.get("buffer_bytes", BUFFER_BYTES_DEFAULT)
        clock.advance(took_s)
        devices.kept.pop(0)()
    assert tracker.in_sync
    assert devices.target == content.data
    return [length for _, length in devices.of("write")]


def test_a_large_granule_opens_memory_as_well() -> None:
    lengths = opened(data(24 * MIB), granularity=8 * MIB)
    assert lengths.count(OPENING_BYTES) == 2, "all of a granule's requests are of one size"
    assert set(lengths) == {OPENING_BYTES, REQUEST_BYTES_MAX}


@pytest.mark.parametrize("buffer_bytes", [OPENING_BYTES, 16 * MIB])
def test_one_large_request_opens_a_quick_targets_memory(buffer_bytes: int) -> None:
    first, opening, *rest = opened(data(32 * MIB + PROBE_BYTES), buffer_bytes=buffer_bytes)
    assert (first, opening) == (PROBE_BYTES, OPENING_BYTES)
    assert set(rest) == {REQUEST_BYTES_MAX}


def test_a_slow_target_is_not_opened() -> None:
    assert max(opened(data(48 * MIB), took_s=QUICK_WRITE_S)) == REQUEST_BYTES_MAX


def test_the_large_request_is_within_buf_size_and_what_both_sides_take() -> None:
    assert max(opened(data(24 * MIB), buffer_bytes=3 * MIB)) == 3 * MIB
    assert max(opened(data(24 * MIB), buffer_bytes=MIB)) == MIB


def test_zeroes_put_the_large_request_off() -> None:
    """In the first 16 MiB there is no data that is long enough, so it comes after them."""
    content = data(32 * MIB + PROBE_BYTES)
    for offset in range(PROBE_BYTES, 16 * MIB, MIB):
        content.pwrite(bytes(ZERO_UNIT_BYTES), offset)
    lengths = opened(content)
    large = [length for length in lengths if length > REQUEST_BYTES_MAX]
    assert len(large) == 1
    assert large[0] > OPENING_BYTES - MIB
    assert sum(lengths[: lengths.index(large[0])]) > 14 * MIB


def test_who_may_have_been_replaced_is_opened_again() -> None:
    devices = Devices(data(32 * MIB))
    copier, tracker, _ = a_copier(devices, request_bytes_max=OPENING_BYTES)
    copier.start()
    copier.stop()
    tracker.dirty.mark_all()
    copier.start()
    lengths = [length for _, length in devices.of("write")]
    assert lengths.count(OPENING_BYTES) == 2


def test_holes_take_no_large_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroing is a quick answer as well, so that the large request is due before any data."""
    made = buffers_made(monkeypatch)
    content = MemoryDevice(64 * MIB)
    content.pwrite(b"x" * 8 * MIB, 50 * MIB)
    lengths = opened(content)
    assert lengths.count(OPENING_BYTES) == made.count(OPENING_BYTES) == 1
    assert max(length for length in made if length != OPENING_BYTES) == REQUEST_BYTES_MAX


def a_window_beside_guests() -> InFlightWindow:
    clock = Clock()
    window = InFlightWindow(MIB, CopierLoad(clock, lambda: 200, 2))
    clock.advance(LOOK_S)
    return window


def test_a_copy_that_does_not_converge_yields_to_nobody() -> None:
    """Nor does one that is far behind. What it may have in flight is told in bytes."""
    window = a_window_beside_guests()
    window.answered(0.0, 0.0001, 4096)

    def yields_after(round_bytes: int, *, is_kept_in_sync: bool = False) -> bool:
        window.round_bytes = round_bytes
        window.begin_round(is_kept_in_sync=is_kept_in_sync)
        assert window.has_room(99_999)
        return not window.has_room(100_000)

    assert yields_after(0), "the first round"
    assert yields_after(1000 * MIB)
    assert not yields_after(601 * MIB)
    assert yields_after(360 * MIB)
    assert not yields_after(360 * MIB)
    assert yields_after(64 * MIB, is_kept_in_sync=True)
    assert yields_after(64 * MIB, is_kept_in_sync=True)
    assert not yields_after(65 * MIB, is_kept_in_sync=True)
    assert yields_after(64 * MIB), "to be completed"
    assert not yields_after(64 * MIB)


def test_rounds_are_told_by_what_they_claimed() -> None:
    """A guest that dirties as much in each round as was copied in it."""
    clock = Clock()
    load = CopierLoad(clock, lambda: 200, 2)
    clock.advance(LOOK_S)
    devices = Devices(data(8 * MIB), keeps=("write",))
    copier, tracker, _ = a_copier(devices, clock=clock, load=load)
    copier.start()
    depths, done = [], 0
    for _ in range(5):
        deepest, is_last = 0, False
        while not is_last:
            deepest = max(deepest, copier.in_flight)
            offset, length = devices.of("write")[done]
            is_last = offset + length == 8 * MIB
            if is_last:
                tracker.dirty.mark(0, 8 * MIB)
            clock.advance(YIELDING_REQUEST_BYTES / 2e9)
            devices.kept.pop(0)()
            done += 1
        depths.append(deepest)
    assert depths[:2] == [1, 1]
    assert min(depths[2:]) == QUICK_MAX


def test_what_was_given_back_does_not_count_twice() -> None:
    """Where a hole ends within a claim, the rest is claimed again."""
    device = MemoryDevice(256 * MIB)
    for offset in range(20 * MIB, 256 * MIB, 60 * MIB):
        device.pwrite(b"x" * MIB, offset)
    devices = Devices(device)
    copier, tracker, _ = a_copier(devices)
    copier.start()
    assert tracker.in_sync
    assert copier._window.round_bytes == 256 * MIB


def test_over_a_network_a_copy_that_yields_has_more_in_flight() -> None:
    window = a_window_beside_guests()
    window.answered(0.0, QUICK_WRITE_S * 0.9, 4096)
    window.begin_round(is_kept_in_sync=False)
    assert window.has_room(1_799_999)
    assert not window.has_room(1_800_000)


def test_when_guests_rest_the_copy_takes_what_there_is() -> None:
    clock = Clock()
    asked = iter([200, 0, 200])
    load = CopierLoad(clock, lambda: next(asked), 2)
    found = []
    for _ in range(7):
        found.append(load.guests_need_room)
        clock.advance(LOOK_S * 0.6)
    assert found == [False, False, True, True, False, False, True]
