"""Exports for the model of points: requests wait until a test ends them, in any order, and what was
not flushed may be lost, sector by sector."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from nbdmirror.devices.base import Done, ExtentsDone, MemoryDevice
from nbdmirror.errors import DeviceError, DeviceLost
from nbdmirror.points.format import BLOCK_BYTES

SECTOR = 512


@dataclass(eq=False)
class Pending:
    """A request in flight. `sectors`: what it writes, by number; None for one that writes none."""

    name: str
    done: Done
    act: Callable[[], None]
    sectors: dict[int, bytes] = field(default_factory=dict)


class Disk:
    """The storage of an export: what reads show, and of each sector what a power cut may leave."""

    def __init__(self, size: int, fill: int = 0) -> None:
        self.data = bytearray([fill]) * size
        self.unflushed: dict[int, list[bytes]] = {}
        """Sector -> the contents since the last flush, the durable one first."""
        self.forgotten: dict[int, bytes] = {}
        """Sector -> what a power cut leaves, although no flush fails: `forget`."""

    def write(self, sectors: dict[int, bytes]) -> None:
        for number, content in sectors.items():
            at = number * SECTOR
            old = self.forgotten.pop(number, bytes(self.data[at : at + SECTOR]))
            self.unflushed.setdefault(number, [old]).append(content)
            self.data[at : at + SECTOR] = content

    def flush(self) -> None:
        self.begin_flush()()

    def begin_flush(self) -> Callable[[], None]:
        """The end of a flush that begins now, which covers what was written before."""
        covered = {number: len(contents) for number, contents in self.unflushed.items()}

        def end() -> None:
            for number, count in covered.items():
                contents = self.unflushed.pop(number, [])[count - 1 :]
                if len(contents) > 1:
                    self.unflushed[number] = contents

        return end

    def forget(self, pick: Callable[[list[bytes]], bytes]) -> None:
        """Writing back has failed, as Linux has it: one request is told. What was not flushed can
        still be read, and some of it is not on the storage; a later flush takes it for written."""
        unflushed, self.unflushed = self.unflushed, {}
        for number, contents in unflushed.items():
            self.forgotten[number] = pick(contents)

    def lose(self, pick: Callable[[list[bytes]], bytes]) -> Disk:
        """What a power cut leaves; `pick` chooses for each sector."""
        left = Disk(0)
        left.data = bytearray(self.data)
        kept = {number: pick(contents) for number, contents in self.unflushed.items()}
        for number, content in (kept | self.forgotten).items():
            left.data[number * SECTOR : (number + 1) * SECTOR] = content
        return left

    def cut_power(self, pick: Callable[[list[bytes]], bytes]) -> None:
        """This disk itself becomes what `lose` leaves."""
        self.data[:] = self.lose(pick).data
        self.unflushed.clear()
        self.forgotten.clear()

    def copy(self) -> Disk:
        left = Disk(0)
        left.data = bytearray(self.data)
        left.unflushed = {number: list(contents) for number, contents in self.unflushed.items()}
        left.forgotten = dict(self.forgotten)
        return left


class DiskDevice(MemoryDevice):
    """A `Disk` for programs that `run` carries out; it may fail at the request `dies_at`."""

    def __init__(self, disk: Disk, *, dies_at: int = -1) -> None:
        super().__init__(0)
        self.size = len(disk.data)
        self.disk = disk
        self.dies_at = dies_at
        self.requests = 0

    def _count(self) -> None:
        self.requests += 1
        if self.requests == self.dies_at:
            raise DeviceLost("the machine was killed", errno.ENOTCONN)

    def pread(self, buf: memoryview, offset: int) -> None:
        buf[:] = memoryview(self.disk.data)[offset : offset + len(buf)]

    def pwrite(self, buf: bytes | bytearray | memoryview, offset: int, fua: bool = False) -> None:
        sectors = sectors_of(buf, offset)
        self.requests += 1
        if self.requests == self.dies_at:
            self.disk.write(dict(list(sectors.items())[::2]))
            raise DeviceLost("the machine was killed", errno.ENOTCONN)
        self.disk.write(sectors)
        if fua:
            settle(self.disk, sectors)

    def zero(self, offset: int, length: int, **_: bool) -> None:
        self.pwrite(bytes(length), offset)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self.pwrite(b"\xdd" * length, offset)

    def flush(self) -> None:
        self._count()
        self.disk.flush()


def settle(disk: Disk, sectors: dict[int, bytes]) -> None:
    """A durable write has ended: its sectors are on the storage."""
    for number in sectors:
        disk.unflushed.pop(number, None)


def sectors_of(buf: bytes | bytearray | memoryview, offset: int) -> dict[int, bytes]:
    assert not offset % SECTOR and not len(buf) % SECTOR
    return {
        (offset + at) // SECTOR: bytes(buf[at : at + SECTOR]) for at in range(0, len(buf), SECTOR)
    }


class SlowExport:
    """An AsyncExport whose requests wait in `pending`."""

    def __init__(self, description: str, disk: Disk) -> None:
        self.description = description
        self.disk = disk
        self.size = len(disk.data)
        self.pending: list[Pending] = []

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        def act() -> None:
            buf[:] = memoryview(self.disk.data)[offset : offset + len(buf)]

        self.pending.append(Pending("read", done, act))

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        raise NotImplementedError

    def _start(self, name: str, buf: bytes | memoryview, offset: int, done: Done) -> None:
        sectors = sectors_of(buf, offset)

        def act() -> None:
            self.disk.write(sectors)
            if name == "durable write":
                settle(self.disk, sectors)

        self.pending.append(Pending(name, done, act, sectors))

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        self._start("write", buf, offset, done)

    def start_durable_write(self, buf: memoryview, offset: int, done: Done) -> None:
        self._start("durable write", buf, offset, done)

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        self._start("zero", bytes(length), offset, done)

    def start_trim(self, offset: int, length: int, done: Done) -> None:
        self._start("trim", b"\xdd" * length, offset, done)

    def start_flush(self, done: Done) -> None:
        self.pending.append(Pending("flush", done, self.disk.begin_flush()))

    def end(self, number: int, *, fails: bool = False) -> None:
        """End a request in flight; a failed one has done a half."""
        request = self.pending.pop(number)
        if not fails:
            request.act()
            request.done(None)
            return
        self.disk.write(dict(list(request.sectors.items())[::2]))
        request.done(DeviceError(f"{self.description}: {request.name} failed", errno.EIO))

    def end_forgotten(self, number: int, pick: Callable[[list[bytes]], bytes]) -> None:
        """End a durable write or a flush in flight: writing back has failed (`Disk.forget`)."""
        request = self.pending.pop(number)
        self.disk.write(request.sectors)
        self.disk.forget(pick)
        request.done(DeviceError(f"{self.description}: {request.name} failed", errno.EIO))

    def break_off(self, random: Random) -> None:
        """The connection is lost: each request in flight was carried out, or not, or in part."""
        for request in self.pending:
            kept = {n: c for n, c in request.sectors.items() if random.random() < 0.5}
            self.disk.write(request.sectors if random.random() < 0.3 else kept)
        pending, self.pending = self.pending, []
        for request in pending:
            request.done(DeviceLost(f"{self.description}: the connection is lost", errno.ENOTCONN))

    def abandon(self, random: Random) -> None:
        """The client is killed: as `break_off`, and nobody is told."""
        for request in self.pending:
            request.done = lambda error: None
        self.break_off(random)

    def live(self) -> Disk:
        """What can be read when what is in flight was carried out, and the client is gone."""
        disk = self.disk.copy()
        for request in self.pending:
            disk.write(request.sectors)
        return disk

    def left(self, pick: Callable[[list[bytes]], bytes]) -> Disk:
        """What a power cut leaves, with what is in flight."""
        return self.live().lose(pick)


@functools.cache
def content(stamp: int) -> bytes:
    """A block of the disk: no two sectors are equal, but for zeroes."""
    if not stamp:
        return bytes(BLOCK_BYTES)
    return b"".join(b"%8d%8d" % (stamp, sector) * 32 for sector in range(8))
