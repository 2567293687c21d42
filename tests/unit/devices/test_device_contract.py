"""The contract of BlockDevice: one suite for all devices (devicekinds.py). Everything here goes
through the protocol only."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.devices.devicekinds import DEVICES, SIZES, content, every_device, opened, read

from nbdmirror.devices.base import BlockDevice, Buffer, Extent
from nbdmirror.errors import IO_ERRORS, errno_of

PART = 512
"""Bytes that are compared at a time: byte by byte takes long."""


class Model:
    """What the disk must hold. A trimmed byte reads as before or as zero, until it is written."""

    def __init__(self, initial: bytes) -> None:
        self.data = bytearray(initial)
        self.trimmed = bytearray(len(initial))

    def set(self, offset: int, data: Buffer) -> None:
        self.data[offset : offset + len(data)] = data
        self.trimmed[offset : offset + len(data)] = bytes(len(data))

    def trim(self, offset: int, length: int) -> None:
        self.trimmed[offset : offset + length] = b"\1" * length

    def check(self, got: bytes, offset: int) -> None:
        assert offset + len(got) <= len(self.data)
        for start in range(0, len(got), PART):
            self._check_part(got[start : start + PART], offset + start)

    def _check_part(self, got: bytes, offset: int) -> None:
        part = slice(offset, offset + len(got))
        expected, trimmed = self.data[part], self.trimmed[part]
        if got == expected or (all(trimmed) and not any(got)):
            return
        for index, (is_byte, was_byte) in enumerate(zip(got, expected, strict=True)):
            if is_byte != was_byte:
                assert trimmed[index] and not is_byte, f"byte {offset + index}"


@dataclass(frozen=True)
class Step:
    verb: str
    offset: int
    length: int
    seed: int
    may_trim: bool
    fua: bool
    fast: bool


VERBS = ("pread", "pwrite", "zero", "trim", "flush", "extents", "cache")


@st.composite
def steps(draw: st.DrawFn, size: int) -> Step:
    """Any request within `size`, often with ends that lie at or beside a boundary."""
    corners = [c for c in (0, 1, 511, 512, 4095, 4096, 4097, size // 2, size - 1) if 0 <= c < size]
    offset = draw(st.sampled_from(corners) | st.integers(0, size - 1))
    room = size - offset
    lengths = [n for n in (1, 511, 512, 513, 4096, 8192, room) if 0 < n <= room]
    length = draw(st.sampled_from(lengths) | st.integers(1, room))
    flags = (draw(st.booleans()), draw(st.booleans()), draw(st.booleans()))
    return Step(draw(st.sampled_from(VERBS)), offset, length, draw(st.integers(0, 255)), *flags)


def take(device: BlockDevice, model: Model, step: Step) -> None:
    """Do one step to the device and to the model, and check what can be seen of it."""
    offset, length = step.offset, step.length
    if step.verb == "pwrite":
        data = random.Random(step.seed).randbytes(length)
        device.pwrite(memoryview(data), offset, step.fua)
        model.set(offset, data)
    elif step.verb == "zero":
        flags = {"may_trim": step.may_trim, "fua": step.fua, "fast": step.fast}
        try:
            device.zero(offset, length, **flags)
        except IO_ERRORS as error:
            # All or nothing: the model stays as it was, and the read below compares.
            if not step.fast or errno_of(error) != errno.ENOTSUP:
                raise
        else:
            model.set(offset, bytes(length))
    elif step.verb == "trim":
        device.trim(offset, length, fua=step.fua)
        model.trim(offset, length)
    elif step.verb == "flush":
        device.flush()
    elif step.verb == "extents":
        check_extents(device, offset, length)
    elif step.verb == "cache":
        device.cache(offset, length)
    model.check(read(device, offset, length), offset)


def check_extents(device: BlockDevice, offset: int, length: int) -> None:
    """They cover the range when asked until its end, and what is said to be zero is."""
    end = offset + length
    while offset < end:
        found = device.extents(offset, end - offset)
        assert found and all(extent.length > 0 for extent in found)
        assert sum(extent.length for extent in found) <= end - offset
        for extent in found:
            if extent.zero:
                assert not any(read(device, offset, extent.length))
            offset += extent.length


@every_device
def test_any_requests_do_what_the_model_does(name: str) -> None:
    entry = DEVICES[name]
    sizes = [size for size in SIZES if size and size % entry.size_unit == 0]

    @settings(
        max_examples=entry.examples_max,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(data=st.data(), size=st.sampled_from(sizes), seed=st.integers(0, 3))
    def run(data: st.DataObject, size: int, seed: int) -> None:
        program = data.draw(st.lists(steps(size), max_size=12))
        with opened(name, size, seed=seed) as device:
            assert device.size == size
            model = Model(content(size, seed))
            for step in program:
                take(device, model, step)
            model.check(read(device, 0, size), 0)
            check_extents(device, 0, size)

    run()


@every_device
@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_read_to_its_last_byte(name: str, size: int) -> None:
    with opened(name, size) as device:
        assert device.size == size
        assert read(device, 0, size) == content(size, 1)
        if size:
            assert read(device, size - 1, 1) == content(size, 1)[-1:]


@every_device
@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_the_last_byte_is_written_zeroed_and_trimmed(name: str, size: int) -> None:
    with opened(name, size) as device:
        device.pwrite(b"z", size - 1, True)
        assert read(device, size - 1, 1) == b"z"
        device.trim(size - 1, 1)
        device.zero(size - 1, 1, fua=True)
        expected = content(size, 1)[:-1] + b"\0"
        assert read(device, 0, size) == expected


@every_device
def test_requests_of_no_bytes_do_nothing(name: str) -> None:
    with opened(name, 4096) as device:
        device.pread(memoryview(bytearray()), 512)
        device.pwrite(b"", 512, True)
        device.zero(512, 0, fua=True)
        device.trim(512, 0, fua=True)
        assert read(device, 0, 4096) == content(4096, 1)


@every_device
def test_block_sizes_are_what_nbd_allows(name: str) -> None:
    with opened(name, 4096) as device:
        sizes = device.block_size
        assert sizes.minimum == 1, "guests are promised any offset and length"
        assert 512 <= sizes.preferred <= sizes.maximum
        assert not sizes.preferred & (sizes.preferred - 1)


CHANGES: dict[str, Callable[[BlockDevice], None]] = {
    "pwrite": lambda device: device.pwrite(bytes(4096), 0),
    "pwrite, odd": lambda device: device.pwrite(b"x", 3),
    "pwrite, fua": lambda device: device.pwrite(bytes(512), 0, True),
    "pwrite, last": lambda device: device.pwrite(b"x", device.size - 1),
    "zero": lambda device: device.zero(0, 4096),
    "zero, odd": lambda device: device.zero(3, 600, may_trim=True),
    "trim": lambda device: device.trim(0, 4096),
    "trim, odd": lambda device: device.trim(3, 1),
}


@every_device
@pytest.mark.parametrize("change", CHANGES)
def test_a_read_only_device_refuses_changes(name: str, change: str) -> None:
    size = 8192 if DEVICES[name].size_unit > 1 else 8193
    with opened(name, size, read_only=True) as device:
        assert device.read_only
        with pytest.raises(IO_ERRORS) as caught:
            CHANGES[change](device)
        assert errno_of(caught.value) == errno.EROFS
        device.flush()
        assert read(device, 0, size) == content(size, 1)


@every_device
def test_writers_of_neighbouring_bytes_do_not_disturb_each_other(name: str) -> None:
    """Pieces of 700 bytes, so that most units hold bytes of two threads."""
    threads, piece, pieces, rounds = 4, 700, 60, 4
    size = -(-threads * piece * pieces // 512) * 512
    failures: list[BaseException] = []

    def work(device: BlockDevice, mine: int, start: threading.Barrier) -> None:
        noise = random.Random(mine)
        try:
            start.wait(timeout=10)
            for _ in range(rounds):
                for index in range(mine, threads * pieces, threads):
                    data = noise.randbytes(piece) if noise.random() < 0.7 else bytes(piece)
                    if any(data):
                        device.pwrite(data, index * piece)
                    else:
                        device.zero(index * piece, piece, may_trim=noise.random() < 0.5)
                    written[index] = data
                    assert read(device, index * piece, piece) == data, f"piece {index}"
        except BaseException as error:  # noqa: BLE001 - raised again below, by the test
            failures.append(error)

    written: list[bytes] = [b""] * (threads * pieces)
    with opened(name, size) as device:
        barrier = threading.Barrier(threads)
        team = [
            threading.Thread(target=work, args=(device, mine, barrier), daemon=True)
            for mine in range(threads)
        ]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join(timeout=50)
        if failures:
            raise failures[0]
        assert read(device, 0, threads * piece * pieces) == b"".join(written)


@every_device
def test_close_is_idempotent(name: str) -> None:
    with opened(name, 4096) as device:
        device.close()
        device.close()


def test_a_hole_extent_is_told_where_the_content_has_a_hole() -> None:
    """Not of the contract, which allows "data" everywhere: of those that can tell."""
    for name in ("memory", "file", "tmpfs"):
        with opened(name, 1 << 20) as device:
            device.zero(256 << 10, 256 << 10, may_trim=True)
            found = device.extents(256 << 10, 128 << 10)
            assert found == [Extent(128 << 10, zero=True, hole=True)], name
