"""A journal and an image in memory, and a source that sends points to them."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable
from typing import TypeVar

from nbdmirror.devices.base import BlockDevice, Done, ExtentsDone, MemoryDevice
from nbdmirror.errors import IO_ERRORS
from nbdmirror.points import ownership
from nbdmirror.points.applier import apply
from nbdmirror.points.format import BLOCK_BYTES, RING_BYTES_MIN, RING_START, Point
from nbdmirror.points.reader import Journal, read
from nbdmirror.points.recovery import Recovered, recover
from nbdmirror.points.requests import Program, Side, run
from nbdmirror.points.writer import JournalWriter

JOURNAL_BYTES = RING_START + RING_BYTES_MIN
SECOND_NS = 10**9
Result = TypeVar("Result")


class PromptExport:
    """An AsyncExport on a blocking device: each request ends at once. `failing`: names of requests
    that fail."""

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self.description = device.description
        self.size = device.size
        self.log: list[str] = []
        self.failing: set[str] = set()

    def _do(self, name: str, call: Callable[[], None], done: Done) -> None:
        self.log.append(name)
        try:
            if name in self.failing:
                raise OSError(5, f"{name} failed")
            call()
        except IO_ERRORS as error:
            done(error)
        else:
            done(None)

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        self._do("read", lambda: self.device.pread(buf, offset), done)

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        done(self.device.extents(offset, length), None)

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        self._do("write", lambda: self.device.pwrite(buf, offset), done)

    def start_durable_write(self, buf: memoryview, offset: int, done: Done) -> None:
        self._do("durable write", lambda: self.device.pwrite(buf, offset, True), done)

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        self._do("zero", lambda: self.device.zero(offset, length, may_trim=may_trim), done)

    def start_trim(self, offset: int, length: int, done: Done) -> None:
        self._do("trim", lambda: self.device.trim(offset, length), done)

    def start_flush(self, done: Done) -> None:
        self._do("flush", self.device.flush, done)


class FarSide:
    """An image, its journal, and the source that writes to them. `contents` has what the disk was
    at each point, by sequence."""

    def __init__(self, disk_bytes: int = 64 << 10, journal_bytes: int = JOURNAL_BYTES) -> None:
        self.image = MemoryDevice(disk_bytes, description="image")
        self.journal = MemoryDevice(journal_bytes, description="journal")
        self.disk = bytearray(disk_bytes)
        self.contents: dict[int, bytes] = {}
        self.stamps = itertools.count(1)
        program = ownership.create("journal", journal_bytes, disk_bytes=disk_bytes, now_ns=0)
        self.disk_id = self.run(program).disk_id
        self.connect()

    @property
    def sides(self) -> dict[Side, BlockDevice]:
        return {Side.IMAGE: self.image, Side.JOURNAL: self.journal}

    def run(self, program: Program[Result]) -> Result:
        return run(program, self.sides)

    def connect(self) -> None:
        """A new process takes the journal over."""
        self.exports = {side: PromptExport(device) for side, device in self.sides.items()}
        program = ownership.take_over(self.exports, disk_id=self.disk_id)
        self.writer: JournalWriter = self.run(program)

    def seed(self) -> None:
        """Copy the disk in place; the next point is the first one."""
        self.run(self.writer.seed(since_ns=0))
        self.image.pwrite(self.disk, 0)

    def fill(self, offset: int, length: int) -> None:
        """A guest's write of bytes that occur nowhere else."""
        stamp = b"%d" % next(self.stamps)
        self.disk[offset : offset + length] = hashlib.shake_128(stamp).digest(length)

    def begin(self, length: int, **options: object) -> Point:
        sequence = self.writer.newest.sequence + 1
        time_ns = sequence * SECOND_NS
        return self.writer.begin(time_ns, bytes_max=length, **options)  # type: ignore[arg-type]

    def send(self, offset: int, length: int) -> None:
        """Send a range of the disk as it is."""
        errors: list[BaseException | None] = []
        data = memoryview(bytes(self.disk[offset : offset + length]))
        self.writer.put([(offset, length, data if any(data) else None)], errors.append)
        (error,) = errors
        if error is not None:
            raise error

    def commit(self) -> None:
        errors: list[BaseException | None] = []
        self.writer.commit(errors.append)
        (error,) = errors
        if error is not None:
            raise error
        self.contents[self.writer.newest.sequence] = bytes(self.disk)

    def point(self, *ranges: tuple[int, int], name: str = "") -> Point:
        """A guest's writes of new bytes, and the point that has them."""
        for offset, length in ranges:
            self.fill(offset, length)
        point = self.begin(sum(length for _, length in ranges), name=name)
        for offset, length in ranges:
            self.send(offset, length)
        self.commit()
        return point

    def apply(self, sequence: int) -> None:
        self.run(apply(self.writer, sequence))

    def read(self) -> Journal:
        return self.run(read("journal", self.journal.size))

    def recover(self, wanted: str | None = None) -> Recovered:
        program = recover(
            "journal", self.journal.size, self.image.size, wanted=wanted, now_ns=SECOND_NS
        )
        return self.run(program)


def with_points(count: int = 3) -> FarSide:
    """A far side with points 1 to `count`, of which each has changed two ranges."""
    far = FarSide()
    far.fill(0, len(far.disk))
    far.seed()
    for number in range(count):
        at = number * 2 * BLOCK_BYTES
        far.point((at, 3 * BLOCK_BYTES), (32 << 10, BLOCK_BYTES), name=f"n{number + 1}")
    return far


def reconnected(far: FarSide) -> Program[JournalWriter]:
    return ownership.take_over(far.exports, disk_id=far.disk_id, before=far.writer)


def reconnect(far: FarSide) -> None:
    far.writer = far.run(reconnected(far))


def check_goes_on(far: FarSide) -> None:
    """Each point that is on offer is what the disk was, and so is the next one."""
    far.point((0, BLOCK_BYTES))
    for point in far.read().points:
        other = copy.deepcopy(far)
        other.recover(str(point.sequence))
        assert bytes(other.image.data) == far.contents[point.sequence]
