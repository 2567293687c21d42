"""AlignedDevice beyond the contract: exact interleavings, odd ends, what reaches its device."""

from __future__ import annotations

import ctypes
import errno
import mmap
import random
import threading
from collections.abc import Callable

import pytest

from nbdmirror.devices.aligned import BOUNCE_BYTES, AlignedDevice
from nbdmirror.devices.base import BlockSize, Buffer, Extent, MemoryDevice
from nbdmirror.errors import DeviceError

UNIT = 512
WAIT_S = 10.0
"""For what must happen at once; only a failing test waits that long."""


class Inner(MemoryDevice):
    """A device of whole units that notes the requests it gets, and can be stopped in one."""

    def __init__(self, size: int, unit: int = UNIT) -> None:
        super().__init__(size)
        self.block_size = BlockSize(minimum=unit)
        self.calls: list[tuple[str, int, int]] = []
        self.after_pread: Callable[[], None] = lambda: None
        self.before_pwrite: Callable[[], None] = lambda: None
        self.has_fast_zero = True

    def pread(self, buf: memoryview, offset: int) -> None:
        self._note("pread", offset, len(buf))
        super().pread(buf, offset)
        self.after_pread()

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        self._note("pwrite", offset, len(buf))
        self.before_pwrite()
        super().pwrite(buf, offset, fua)

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        self._note("zero", offset, length)
        if fast and not self.has_fast_zero:
            raise DeviceError("no fast zero", errno.ENOTSUP)
        super().zero(offset, length, may_trim=may_trim)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self._note("trim", offset, length)
        super().zero(offset, length, may_trim=True)

    def _note(self, verb: str, offset: int, length: int) -> None:
        unit = self.block_size.minimum
        assert offset % unit == length % unit == 0, f"{verb} of {length} at {offset}"
        assert length <= self.block_size.maximum
        self.calls.append((verb, offset, length))


class WatchedCondition(threading.Condition):
    """Tells when somebody is about to wait."""

    def __init__(self, on_wait: Callable[[], None]) -> None:
        super().__init__()
        self._on_wait = on_wait

    def wait(self, timeout: float | None = None) -> bool:
        self._on_wait()
        return super().wait(timeout)


def read(device: AlignedDevice, offset: int, length: int) -> bytes:
    buf = bytearray(length)
    device.pread(memoryview(buf), offset)
    return bytes(buf)


def with_tail(size: int, unit: int = UNIT) -> tuple[Inner, AlignedDevice]:
    inner, tail = Inner(size, unit), MemoryDevice(size)
    tail.data, tail.allocated = inner.data, inner.allocated
    return inner, AlignedDevice(inner, tail=tail)


# The guard of read, change, write.


@pytest.mark.parametrize("change", ["write", "part", "odd write", "zero", "trim"])
def test_a_change_waits_for_the_odd_write_on_its_unit(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The odd write has read its unit and is held there; another change of that unit comes. If it
    went through now, the odd write would put the old bytes back over it."""
    inner = Inner(4 * UNIT)

    def write_part(buf: Buffer, offset: int) -> int:
        inner.pwrite(buf, offset)
        return len(buf)

    monkeypatch.setattr(inner, "write_part", write_part, raising=False)
    device = AlignedDevice(inner, bounce=change == "part")
    inner.data[:] = b"o" * inner.size
    second_came = threading.Event()
    device._ranges._changed = WatchedCondition(second_came.set)
    seconds = {
        "write": lambda: device.pwrite(b"B" * UNIT, 0),
        "part": lambda: device.write_part(b"B" * UNIT, 0),
        "odd write": lambda: device.pwrite(b"B" * 400, 100),
        "zero": lambda: device.zero(0, UNIT),
        "trim": lambda: device.trim(0, UNIT),
    }
    second = threading.Thread(target=seconds[change], daemon=True)

    def hold() -> None:
        inner.after_pread = lambda: None
        inner.before_pwrite = lambda: None
        second.start()
        assert second_came.wait(WAIT_S)
        assert len(inner.calls) == 1, "it waits; nothing of it has reached the device"

    inner.after_pread = hold
    device.pwrite(b"A" * 100, 0)
    second.join(WAIT_S)
    assert not second.is_alive()
    whole = b"B" * UNIT
    expected = {"write": whole, "part": whole, "odd write": b"A" * 100 + b"B" * 400 + b"o" * 12}
    assert inner.data[:UNIT] == expected.get(change, bytes(UNIT))


def test_an_odd_write_waits_for_the_whole_write_on_its_unit() -> None:
    """The whole write is held on its way; an odd one that read now would read the old bytes."""
    inner = Inner(4 * UNIT)
    device = AlignedDevice(inner)
    second_came = threading.Event()
    device._ranges._changed = WatchedCondition(second_came.set)
    second = threading.Thread(target=lambda: device.pwrite(b"B", 5), daemon=True)

    def hold() -> None:
        inner.before_pwrite = lambda: None
        second.start()
        assert second_came.wait(WAIT_S)
        assert inner.calls == [("pwrite", 0, 2 * UNIT)]

    inner.before_pwrite = hold
    device.pwrite(b"A" * 2 * UNIT, 0)
    second.join(WAIT_S)
    assert not second.is_alive()
    assert inner.data[: 2 * UNIT] == b"AAAAAB" + b"A" * (2 * UNIT - 6)


def test_requests_on_other_units_do_not_wait() -> None:
    inner = Inner(4 * UNIT)
    device = AlignedDevice(inner)

    def meanwhile() -> None:
        inner.after_pread = lambda: None
        device.pwrite(b"B" * UNIT, UNIT)
        device.pwrite(b"C", 2 * UNIT + 7)
        assert read(device, 0, 1) == b"\0", "reads never wait, not even on the unit itself"

    inner.after_pread = meanwhile
    device.pwrite(b"A", 3)
    assert inner.data[3:4] + inner.data[UNIT : UNIT + 1] + inner.data[2 * UNIT + 7 :][:1] == b"ABC"


def test_a_failed_odd_write_leaves_nobody_waiting() -> None:
    inner = Inner(4 * UNIT)
    device = AlignedDevice(inner)

    def fail() -> None:
        inner.before_pwrite = lambda: None
        raise DeviceError("broken", errno.EIO)

    for buf, offset in ((b"A", 3), (b"A" * UNIT, 0)):
        inner.before_pwrite = fail
        with pytest.raises(DeviceError):
            device.pwrite(buf, offset)
        device.pwrite(b"B", 3)
        device.pwrite(b"B" * UNIT, 0)


def test_whole_and_odd_writers_of_one_unit_end_and_lose_nothing() -> None:
    """One thread writes the whole unit, one its first bytes over and over: the rest of the unit is
    always what the first one wrote last."""
    device = AlignedDevice(Inner(2 * UNIT))
    stop = threading.Event()
    lost: list[int] = []

    def odd() -> None:
        while not stop.is_set():
            device.pwrite(b"odd", 0)
            device.pwrite(b"o" * UNIT, UNIT // 2)

    def whole() -> None:
        try:
            for turn in range(3000):
                data = bytes([turn % 256]) * (UNIT // 2 - 3)
                device.pwrite(b"???" + data + bytes(UNIT // 2), 0)
                if read(device, 3, len(data)) != data:
                    lost.append(turn)
        finally:
            stop.set()

    team = [threading.Thread(target=work, daemon=True) for work in (odd, odd, whole)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join(50)
    assert not any(thread.is_alive() for thread in team)
    assert not lost


# What reaches the device below.


def test_whole_requests_go_straight_through() -> None:
    inner = Inner(8 * UNIT)
    device = AlignedDevice(inner)
    device.pwrite(bytes(2 * UNIT), UNIT)
    device.zero(UNIT, UNIT)
    device.trim(0, UNIT)
    read(device, 0, 8 * UNIT)
    assert inner.calls == [
        ("pwrite", UNIT, 2 * UNIT),
        ("zero", UNIT, UNIT),
        ("trim", 0, UNIT),
        ("pread", 0, 8 * UNIT),
    ]


def test_trim_shrinks_inward() -> None:
    inner = Inner(8 * UNIT)
    device = AlignedDevice(inner)
    device.trim(1, 3 * UNIT)
    device.trim(1, UNIT)
    device.trim(5, 7)
    assert inner.calls == [("trim", UNIT, 2 * UNIT)]


def test_zero_writes_only_the_edges() -> None:
    inner = Inner(8 * UNIT)
    device = AlignedDevice(inner)
    inner.data[:] = b"o" * inner.size
    device.zero(UNIT - 1, 2 * UNIT + 2)
    assert inner.calls[0] == ("zero", UNIT, 2 * UNIT)
    assert [call for call in inner.calls if call[0] == "pwrite"] == [
        ("pwrite", 0, UNIT),
        ("pwrite", 3 * UNIT, UNIT),
    ]
    assert inner.data == b"o" * (UNIT - 1) + bytes(2 * UNIT + 2) + b"o" * (5 * UNIT - 1)


@pytest.mark.parametrize(
    ("offset", "length"), [(1, 3 * UNIT), (0, UNIT), (3, 5), (1, 2 * UNIT - 2)]
)
def test_a_refused_fast_zero_changes_nothing(offset: int, length: int) -> None:
    inner = Inner(8 * UNIT)
    inner.has_fast_zero = False
    device = AlignedDevice(inner)
    inner.data[:] = b"o" * inner.size
    with pytest.raises(DeviceError) as caught:
        device.zero(offset, length, fast=True)
    assert caught.value.errno == errno.ENOTSUP
    assert inner.data == b"o" * inner.size


def test_extents_are_cut_to_what_was_asked() -> None:
    inner = Inner(4 * 4096, 4096)
    inner.pwrite(bytes(4096), 4096)
    device = AlignedDevice(inner)
    assert device.extents(4095, 4098) == [
        Extent(1, zero=True, hole=True),
        Extent(4096, zero=False, hole=False),
        Extent(1, zero=True, hole=True),
    ]


class PickyInner(Inner):
    """Wants page-aligned memory, as O_DIRECT does."""

    def _check_memory(self, buf: Buffer) -> None:
        assert isinstance(buf, memoryview)
        assert ctypes.addressof(ctypes.c_char.from_buffer(buf)) % mmap.PAGESIZE == 0
        assert len(buf) <= BOUNCE_BYTES

    def pread(self, buf: memoryview, offset: int) -> None:
        self._check_memory(buf)
        super().pread(buf, offset)

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        self._check_memory(buf)
        super().pwrite(buf, offset, fua)


def test_parts_are_whole_units_in_aligned_memory_or_nothing() -> None:
    inner = Inner(2 * BOUNCE_BYTES + UNIT)
    tail = MemoryDevice(inner.size)
    tail.data, tail.allocated = inner.data, inner.allocated
    inner.data[:] = random.Random(1).randbytes(inner.size)
    taken: list[Buffer] = []

    def read_part(bufs: tuple[memoryview], offset: int) -> int:
        taken.append(bufs[0])
        inner.pread(bufs[0], offset)
        return len(bufs[0])

    def write_part(buf: Buffer, offset: int) -> int:
        taken.append(buf)
        inner.pwrite(buf, offset)
        return len(buf)

    inner.read_part, inner.write_part = read_part, write_part
    device = AlignedDevice(inner, bounce=True, tail=tail)
    for offset, length, is_taken in [
        (0, UNIT, True),
        (UNIT, BOUNCE_BYTES, True),
        (UNIT, BOUNCE_BYTES + UNIT, False),
        (1, UNIT, False),
        (0, UNIT - 1, False),
        (2 * BOUNCE_BYTES - UNIT, UNIT, True),
        (2 * BOUNCE_BYTES, UNIT, False),  # the tail's: one page of the page cache, one way
        (2 * BOUNCE_BYTES - UNIT, 2 * UNIT, False),
    ]:
        buf, before = bytearray(length), len(taken)
        assert device.read_part((memoryview(buf),), offset) == (length if is_taken else 0)
        assert bytes(buf) == (inner.data[offset : offset + length] if is_taken else bytes(length))
        data = random.Random(offset + length).randbytes(length)
        expected = bytearray(inner.data)
        if is_taken:
            expected[offset : offset + length] = data
        assert device.write_part(data, offset) == (length if is_taken else 0)
        assert inner.data == expected
        assert len(taken) == before + 2 * is_taken
        assert not device._ranges._together, "nobody waits for it"
    for part in taken:
        assert ctypes.addressof(ctypes.c_char.from_buffer(part)) % mmap.PAGESIZE == 0


def test_with_bounce_all_memory_is_aligned_and_bounded() -> None:
    size = 3 * BOUNCE_BYTES
    device = AlignedDevice(PickyInner(size), bounce=True)
    data = bytes(range(256)) * (size // 256)
    device.pwrite(data, 0)
    assert read(device, 0, size) == data
    device.pwrite(data[: 2 * BOUNCE_BYTES], 1)
    assert read(device, 1, 2 * BOUNCE_BYTES) == data[: 2 * BOUNCE_BYTES]
    assert read(device, 0, 1) == data[:1]
    assert read(device, 2 * BOUNCE_BYTES + 1, 5) == data[1:6]


# Odd sizes.


@pytest.mark.parametrize("size", [1, 511, 513, 4095, 4097, 8192 + 511, 12288 + 513])
def test_the_odd_end_goes_through_the_tail(size: int) -> None:
    """All from the last page boundary on: `Inner` itself refuses parts of units."""
    inner, device = with_tail(size)
    body = size - size % mmap.PAGESIZE
    data = bytes(index % 251 for index in range(size))
    device.pwrite(data, 0)
    assert read(device, 0, size) == data
    device.zero(size - 1, 1)
    device.trim(0, size)
    device.zero(0, size, fast=True)
    device.pwrite(data, 0, True)
    assert inner.data == data
    assert all(offset + length <= body for _, offset, length in inner.calls)
    assert sum(extent.length for extent in device.extents(0, size)) == size


def test_a_fast_zero_over_the_odd_end_is_done_whole_or_not_at_all() -> None:
    inner, device = with_tail(8192 + 5)
    inner.data[:] = b"o" * device.size
    inner.has_fast_zero = False
    with pytest.raises(DeviceError):
        device.zero(4096, 4096 + 5, fast=True)
    assert inner.data == b"o" * device.size
    inner.has_fast_zero = True
    device.zero(4096, 4096 + 5, fast=True)
    assert inner.data == b"o" * 4096 + bytes(4096 + 5)
