"""All devices that the contract of BlockDevice is tried with.

Another device joins by a line in DEVICES: a context manager that is called with the size, the
content and `read_only`, and gives the open device.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.servers import NbdkitTarget

from nbdmirror.devices.aligned import AlignedDevice
from nbdmirror.devices.base import BlockDevice, BlockSize, MemoryDevice
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import ConfigError, DeviceError
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.exclusive_set import wait_for_handshakes

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
    """A NbdDevice on a real server of a file, wrapped as `serve` does it."""

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
                device = NbdDevice.open(target.uri())
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

every_device = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "remote" in name else []) for name in DEVICES],
)


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
