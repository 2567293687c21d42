"""The storage layers below a file or block device: partitions on disks, loop devices on files,
device-mapper's and md's devices on others. So shared storage is found under any name.

A layer is a file or a device and a range of it. If the kernel does not show the mapping of a device
(device-mapper: several devices below, or another size), the range is unknown: somewhere in the
layer. For any thread; reads /sys, and queries loop devices for their file."""

from __future__ import annotations

import fcntl
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

SECTOR_BYTES = 512
LAYERS_MAX = 64
DEVICES = Path("/sys/dev/block")

_LOOP_GET_STATUS64 = 0x4C05  # linux/loop.h
_LOOP_INFO64 = struct.Struct("5Q4I160s16s")

Thing = tuple[str, int, int]
"""Identifies a file by device and inode, or a block device by its number."""
Range = tuple[float, float]
"""Start and end in bytes; `WHOLE`: everything."""
WHOLE: Range = (0, math.inf)


@dataclass(frozen=True, slots=True)
class Layer:
    thing: Thing
    range: Range | None = WHOLE
    """None: unknown, somewhere in the layer."""
    path: str = ""
    """The path of a file, if known."""

    def overlaps(self, other: Layer) -> bool | None:
        """Whether both ranges overlap; None if not known."""
        if self.thing != other.thing:
            return False
        if self.range is None or other.range is None:
            return True if WHOLE in (self.range, other.range) else None
        (start, end), (other_start, other_end) = self.range, other.range
        return start < other_end and other_start < end


def layers_of(status: os.stat_result, path: str = "") -> list[Layer]:
    """The file or device itself, and all layers below."""
    if stat.S_ISBLK(status.st_mode):
        return layers_of_device(status.st_rdev)
    return [Layer(("file", status.st_dev, status.st_ino), path=path)]


def layers_of_device(number: int) -> list[Layer]:
    """The same for the block device with this number."""
    found = [Layer(("device", number, 0))]
    for layer in found:  # `found` grows
        if layer.thing[0] == "device" and len(found) < LAYERS_MAX:
            found += [_seen_through(layer, below) for below in _below(layer.thing[1])]
    return found


def size_of_device(number: int) -> int:
    """Bytes of the block device with this number; 0 if not known."""
    with suppress(OSError, ValueError):
        folder = DEVICES / f"{os.major(number)}:{os.minor(number)}"
        return _number(folder / "size") * SECTOR_BYTES
    return 0


def share_storage(one: list[Layer], other: list[Layer]) -> bool | None:
    """Whether two lists of layers share storage; None if both lie on one device in unknown
    ranges."""
    answers = {first.overlaps(second) for first in one for second in other}
    return True if True in answers else None if None in answers else False


def _seen_through(above: Layer, below: Layer) -> Layer:
    """The range of `below` that corresponds to the range of the device above."""
    if above.range is None or below.range is None:
        return Layer(below.thing, None, below.path)
    start, end = below.range
    part = (start + above.range[0], min(end, start + above.range[1]))
    return Layer(below.thing, part, below.path)


def _below(number: int) -> Iterator[Layer]:
    folder = DEVICES / f"{os.major(number)}:{os.minor(number)}"
    with suppress(OSError, ValueError):
        if (folder / "partition").exists():
            start = _number(folder / "start") * SECTOR_BYTES
            disk = _device(folder.resolve().parent / "dev")
            yield Layer(disk, (start, start + _number(folder / "size") * SECTOR_BYTES))
        elif (folder / "loop" / "backing_file").exists():
            yield _loop_file(folder)
        elif (folder / "slaves").is_dir():
            slaves = list((folder / "slaves").iterdir())
            for slave in slaves:
                is_all = len(slaves) == 1 and _number(slave / "size") == _number(folder / "size")
                yield Layer(_device(slave / "dev"), WHOLE if is_all else None)


def _loop_file(folder: Path) -> Layer:
    """The file of a loop device. Raises OSError. The name in /sys is from the mount namespace, and
    the time, of the device's creation, so the device itself is queried first."""
    path = (folder / "loop" / "backing_file").read_text().rstrip("\n")
    start = _number(folder / "loop" / "offset")
    length = _number(folder / "loop" / "sizelimit")
    layer = partial(Layer, range=(start, start + length if length else math.inf))
    try:
        fd = os.open(f"/dev/{folder.resolve().name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode):
            return layer(("device", status.st_rdev, 0))
        return layer(("file", status.st_dev, status.st_ino), path=path)
    try:
        answer = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64.size))
    finally:
        os.close(fd)
    device, inode, below, *_ = _LOOP_INFO64.unpack(answer)
    if below:
        return layer(("device", _decoded(below), 0))
    return layer(("file", _decoded(device), inode), path=path)


def _decoded(number: int) -> int:
    """A device number from Linux' huge_encode_dev()."""
    return os.makedev(number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)


def _device(file: Path) -> Thing:
    major, _, minor = file.read_text().strip().partition(":")
    return "device", os.makedev(int(major), int(minor)), 0


def _number(file: Path) -> int:
    return int(file.read_text())
