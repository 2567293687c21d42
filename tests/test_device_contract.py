"""The contract of BlockDevice: one suite for all devices.

Another device joins by a line in DEVICES: a context manager that is called with the size, the
content and `read_only`, and gives the open device. Everything here goes through the protocol only.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import NbdkitTarget

from nbdmirror.aligned import AlignedDevice
from nbdmirror.device import BlockDevice, BlockSize, Buffer, Extent, MemoryDevice
from nbdmirror.errors import IO_ERRORS, ConfigError, DeviceError, errno_of
from nbdmirror.file import FileDevice
from nbdmirror.pool import wait_for_handshakes
from nbdmirror.remote import RemoteDevice

SIZES = (0, 1, 511, 512, 4096, 1 << 20, 1025 << 10, (1 << 20) + 1)
ON_DISK = Path("/var/tmp")
"""By custom never a tmpfs, so likely to have holes, ZERO_RANGE and O_DIRECT."""

Factory = Callable[[int, bytes, bool], AbstractContextManager[BlockDevice]]


class StrictDevice(MemoryDevice):
    """Takes nothing but whole units, as an NBD server with a minimum block size may."""

    def __init__(self, size: int, unit: int) -> None:
        super().__init__(size)
        self.block_size = BlockSize(minimum=unit)

    def _check(self, offset: int, length: int, *, change: bool = False) -> None:
        super()._check(offset, length, change=change)
        if (offset | length) % self.block_size.minimum and offset + length != self.size:
            raise DeviceError("not a multiple of the minimum block size", errno.EINVAL)


@contextmanager
def memory(size: int, initial: bytes, read_only: bool) -> Iterator[BlockDevice]:
    device = MemoryDevice(size)
    device.pwrite(initial, 0)
    device.read_only = read_only
    yield device


def strict(unit: int) -> Factory:
    """An AlignedDevice on a device of units; with a tail where the size is odd."""

    @contextmanager
    def open_device(size: int, initial: bytes, read_only: bool) -> Iterator[BlockDevice]:
        inner = StrictDevice(size, unit)
        tail = MemoryDevice(size)
        tail.data, tail.allocated = inner.data, inner.allocated
        tail.pwrite(initial, 0)
        inner.read_only = tail.read_only = read_only
        yield AlignedDevice(inner, tail=tail if size % unit else None)

    return open_device


@contextmanager
def image(folder: Path, initial: bytes) -> Iterator[str]:
    """A file with the content; zeroes at its end are a hole."""
    if not os.access(folder, os.W_OK):
        pytest.skip(f"no {folder} to write to")
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(initial.rstrip(b"\0"))
        file.truncate(len(initial))
        file.flush()
        yield file.name


def on_file(folder: Path, *, direct: bool = False) -> Factory:
    @contextmanager
    def open_device(size: int, initial: bytes, read_only: bool) -> Iterator[BlockDevice]:
        with image(folder, initial) as path:
            try:
                device = FileDevice.open(path, read_only=read_only, direct=direct)
            except ConfigError as error:
                if direct:
                    pytest.skip(str(error))
                raise
            try:
                yield device
            finally:
                device.close()
            assert os.path.getsize(path) == size, "no request makes a disk longer or shorter"

    return open_device


def on_loop_device(*, direct: bool) -> Factory:
    @contextmanager
    def open_device(size: int, initial: bytes, read_only: bool) -> Iterator[BlockDevice]:
        with image(ON_DISK, initial) as path:
            command = ["losetup", "--find", "--show", *(["--read-only"] if read_only else []), path]
            try:
                done = subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no loop devices here: {error}")
            name = done.stdout.strip()
            try:
                device = FileDevice.open(name, read_only=read_only, direct=direct)
                try:
                    yield device
                finally:
                    device.close()
            finally:
                subprocess.run(["losetup", "--detach", name], check=True)

    return open_device


def on_nbdkit(*options: str, filters: tuple[str, ...] = ()) -> Factory:
    """A RemoteDevice on a real server of a file, wrapped as `serve` does it."""

    @contextmanager
    def open_device(size: int, initial: bytes, read_only: bool) -> Iterator[BlockDevice]:
        with tempfile.TemporaryDirectory(prefix="nbdmirror-") as folder:
            path = Path(folder) / "disk.img"
            path.write_bytes(initial)
            flags = ("-r",) if read_only else ()
            target = NbdkitTarget(
                Path(folder), "file", f"file={path}", *options, filters=filters, options=flags
            )
            with target:
                device = RemoteDevice.open(target.uri())
                is_strict = device.block_size.minimum > 1
                outer = AlignedDevice(device) if is_strict else device
                try:
                    yield outer
                finally:
                    outer.close()
                    # nbdkit 1.32 may crash when it ends in the middle of a handshake.
                    wait_for_handshakes()
            assert path.stat().st_size == size, "no request makes a disk longer or shorter"

    return open_device


@dataclass(frozen=True)
class Entry:
    open: Factory
    size_unit: int = 1
    """Sizes that are no multiple of it cannot be had."""
    examples_max: int = 60


DEVICES: dict[str, Entry] = {
    "memory": Entry(memory),
    "file": Entry(on_file(ON_DISK)),
    "tmpfs": Entry(on_file(Path("/dev/shm"))),
    "file-direct": Entry(on_file(ON_DISK, direct=True)),
    "aligned-512": Entry(strict(512)),
    "aligned-4096": Entry(strict(4096)),
    "remote": Entry(on_nbdkit(), examples_max=25),
    "remote-plain": Entry(
        on_nbdkit("fuamode=emulate", filters=("nozero", "noextents", "nocache", "fua")),
        examples_max=25,
    ),
    "remote-4096": Entry(
        on_nbdkit(
            "blocksize-minimum=4096", "blocksize-error-policy=error", filters=("blocksize-policy",)
        ),
        size_unit=4096,
        examples_max=25,
    ),
    "block": Entry(on_loop_device(direct=False), size_unit=512, examples_max=15),
    "block-direct": Entry(on_loop_device(direct=True), size_unit=512, examples_max=15),
}

every_device = pytest.mark.parametrize("name", DEVICES)


def content(size: int, seed: int) -> bytes:
    """Noise with zeroes in the second half."""
    return random.Random(seed).randbytes(size - size // 2) + bytes(size // 2)


@contextmanager
def opened(
    name: str, size: int, *, seed: int = 1, read_only: bool = False
) -> Iterator[BlockDevice]:
    entry = DEVICES[name]
    if size % entry.size_unit:
        pytest.skip(f"{name} has sizes in multiples of {entry.size_unit} only")
    with entry.open(size, content(size, seed), read_only) as device:
        yield device


def read(device: BlockDevice, offset: int, length: int) -> bytes:
    buf = bytearray(b"\xee" * length)
    device.pread(memoryview(buf), offset)
    return bytes(buf)


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
        expected = self.data[offset : offset + len(got)]
        if got == expected:
            return
        for index, (is_byte, was_byte) in enumerate(zip(got, expected, strict=True)):
            if is_byte != was_byte:
                assert self.trimmed[offset + index] and not is_byte, f"byte {offset + index}"


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
        deadline=None,
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
