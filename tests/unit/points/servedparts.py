"""A guest that writes to a point that is served, ends at any moment, and an oracle of what the disk
may be."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from model.pointexports import SECTOR, Disk, DiskDevice
from unit.points.pointparts import SECOND_NS, FarSide

from nbdmirror.errors import DeviceLost
from nbdmirror.points.format import RING_BYTES_MIN, RING_START
from nbdmirror.points.recovery import recover
from nbdmirror.points.requests import Side, run
from nbdmirror.points.served import ServedPoint

DISK_BYTES = 640 << 10
"""Ten regions."""

PIECE = 4096


class FlakyDevice(DiskDevice):
    """May also fail at the flush `fails_at`, which loses what was not flushed; or at the durable
    write `forgets_at`, which can be read and is not on the storage (`Disk.forget`)."""

    def __init__(self, disk: Disk, random: Random, **trouble: int) -> None:
        super().__init__(disk, dies_at=trouble.get("dies_at", -1))
        self.random = random
        self.fails_at = trouble.get("fails_at", -1)
        self.forgets_at = trouble.get("forgets_at", -1)
        self.flushes = self.durable_writes = 0

    def pwrite(self, buf: bytes | bytearray | memoryview, offset: int, fua: bool = False) -> None:
        self.durable_writes += fua
        is_forgotten = fua and self.durable_writes == self.forgets_at
        super().pwrite(buf, offset, fua and not is_forgotten)
        if is_forgotten:
            self.disk.forget(self.random.choice)
            raise OSError(errno.EIO, "the durable write failed")

    def flush(self) -> None:
        self.flushes += 1
        if self.flushes == self.fails_at:
            self.disk.cut_power(self.random.choice)
            raise OSError(errno.EIO, "the flush failed")
        super().flush()

    def sync(self) -> None:
        self.flush()


def far_side(random: Random) -> FarSide:
    """Some points of ranges and zeroes, of which some are applied."""
    far = FarSide(DISK_BYTES, RING_START + 4 * RING_BYTES_MIN)
    far.fill(0, DISK_BYTES)
    far.seed()
    for number in range(random.randrange(2, 6)):
        taken: set[int] = set()
        for _ in range(random.randrange(1, 6)):
            first = random.randrange(DISK_BYTES // PIECE)
            taken |= set(range(first, min(first + random.randrange(1, 24), DISK_BYTES // PIECE)))
        far.begin(len(taken) * PIECE)
        for block in sorted(taken):
            at = block * PIECE
            if random.random() < 0.2:
                far.disk[at : at + PIECE] = bytes(PIECE)
            else:
                far.fill(at, PIECE)
            far.send(at, PIECE)
        far.commit()
        if not number and random.random() < 0.5:
            far.apply(1)
    return far


@dataclass
class Guest:
    """`versions`: of each sector that was written since the last flush what it may be after a power
    cut; the last one is what was answered."""

    content: bytearray
    versions: dict[int, list[bytes]] = field(default_factory=dict)
    doubtful: set[int] = field(default_factory=set)
    """Sectors of a request that was not answered."""

    def writes(self, data: bytes, offset: int, fua: bool, call: Callable[[], None]) -> None:
        first, count = offset // SECTOR, len(data) // SECTOR
        sectors = range(first, first + count)
        for sector in sectors:
            now = bytes(self.content[sector * SECTOR : (sector + 1) * SECTOR])
            found = self.versions.setdefault(sector, [now])
            found.append(data[(sector - first) * SECTOR : (sector - first + 1) * SECTOR])
        self.doubtful = set(sectors)
        call()
        self.doubtful.clear()
        self.content[offset : offset + len(data)] = data
        for sector in sectors if fua else ():
            self.versions.pop(sector)

    def flushes(self, call: Callable[[], None]) -> None:
        call()
        self.versions.clear()

    def check(self, seen: bytes, *, power_cut: bool) -> None:
        """The disk is what it may be, and from now on it is that. After a power cut that is
        durable."""
        for sector in range(len(seen) // SECTOR):
            at = sector * SECTOR
            found, kept = seen[at : at + SECTOR], self.content[at : at + SECTOR]
            if found == kept and sector not in self.doubtful:
                continue
            allowed = {bytes(kept)}
            if power_cut or sector in self.doubtful:
                allowed |= set(self.versions.get(sector, ()))
            assert found in allowed, f"sector {sector} is something else, power cut: {power_cut}"
            if sector in self.doubtful:
                self.versions[sector].append(found)
        self.content[:] = seen
        self.doubtful.clear()
        if power_cut:
            self.versions.clear()


class Machine:
    """The host of the image and its journal: servers follow one another on it."""

    def __init__(self, random: Random) -> None:
        self.random = random
        far = far_side(random)
        self.wanted = random.randrange(far.read().points[0].sequence, len(far.contents) + 1)
        self.guest = Guest(bytearray(far.contents[self.wanted]))
        self.image, self.journal = Disk(0), Disk(0)
        self.image.data, self.journal.data = far.image.data, far.journal.data

    def devices(self, **trouble: int) -> dict[Side, FlakyDevice]:
        side = self.random.choice((Side.IMAGE, Side.JOURNAL))
        if "forgets_at" in trouble:  # what guests write durably is theirs
            side = Side.JOURNAL
        return {
            one: FlakyDevice(disk, self.random, **(trouble if one is side else {}))
            for one, disk in ((Side.IMAGE, self.image), (Side.JOURNAL, self.journal))
        }

    def serve(self, **trouble: int) -> None:
        """Serve the point to a guest for a while, or until the end."""
        devices = self.devices(**trouble)
        try:
            image, journal = devices[Side.IMAGE], devices[Side.JOURNAL]
            point = ServedPoint(image, journal, wanted=str(self.wanted))
            point.start(now_ns=SECOND_NS)
            for _ in range(self.random.randrange(40)):
                self._step(point, loses="fails_at" in trouble)
        except (OSError, DeviceLost):  # killed, or not started
            pass

    def _step(self, point: ServedPoint, *, loses: bool) -> None:
        random, guest = self.random, self.guest
        kind = random.choices(
            ("write", "fua", "zero", "flush", "read", "bring"), (6, 1, 1, 2, 3, 2)
        )[0]
        count = random.randrange(1, 40)
        offset = random.randrange(DISK_BYTES // SECTOR - count) * SECTOR
        data = random.randbytes(count * SECTOR)
        try:
            if kind == "read":
                buf = bytearray(len(data))
                point.pread(memoryview(buf), offset)
                assert buf == guest.content[offset : offset + len(buf)]
            elif kind == "flush":
                guest.flushes(point.flush)
            elif kind == "bring":
                if not point.is_complete:
                    point.bring_some()
            elif kind == "zero":
                zeroes = bytes(len(data))
                guest.writes(zeroes, offset, False, lambda: point.zero(offset, len(data)))
            else:
                fua = kind == "fua"
                guest.writes(data, offset, fua, lambda: point.pwrite(data, offset, fua))
        except DeviceLost:
            raise
        except OSError:  # a flush has failed, and lost what it may lose; or a write to the journal
            guest.check(self._read(point), power_cut=loses)

    def _read(self, point: ServedPoint) -> bytes:
        buf = bytearray(DISK_BYTES)
        point.pread(memoryview(buf), 0)
        return bytes(buf)

    def look(self, *, power_cut: bool) -> None:
        """What the next server shows, after the machine was killed or lost its power."""
        if power_cut:
            self.image = self.image.lose(self.random.choice)
            self.journal = self.journal.lose(self.random.choice)
        devices = self.devices()
        point = ServedPoint(devices[Side.IMAGE], devices[Side.JOURNAL], wanted=str(self.wanted))
        point.start(now_ns=SECOND_NS)
        self.guest.check(self._read(point), power_cut=power_cut)

    def recover(self) -> None:
        """The user has enough of serving, and makes the image the point."""
        journal, image = len(self.journal.data), len(self.image.data)
        program = recover("journal", journal, image, wanted=str(self.wanted), now_ns=SECOND_NS)
        run(program, self.devices())
        self.guest.check(bytes(self.image.data), power_cut=False)
