"""What can be read need not last: a footer in a cache, one whose durable write has failed. The far
side's storage is that of the models: it loses what was not flushed."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest
from model.pointexports import SECTOR, Disk, DiskDevice
from unit.points.pointparts import SECOND_NS, FarSide, check_goes_on, reconnect, with_points

from nbdmirror.devices.base import Done, MemoryDevice
from nbdmirror.errors import DeviceError, DeviceLost
from nbdmirror.points.applier import apply
from nbdmirror.points.format import BLOCK_BYTES, RING_START, State
from nbdmirror.points.requests import Side, start
from nbdmirror.points.served import ServedPoint

AT = 8 * BLOCK_BYTES


class LossyDevice(DiskDevice):
    """`fails`: which durable writes fail, by their offset. Such a one is in the cache, and nothing
    of the cache is written any more if `forgets`."""

    def __init__(self, device: MemoryDevice) -> None:
        disk = Disk(0)
        disk.data = device.data
        super().__init__(disk)
        self.data = disk.data
        self.description = device.description
        self.fails: Callable[[int], bool] = lambda offset: False
        self.forgets = False

    def pwrite(self, buf: bytes | bytearray | memoryview, offset: int, fua: bool = False) -> None:
        is_failing = fua and self.fails(offset)
        super().pwrite(buf, offset, fua and not is_failing)
        if is_failing and self.forgets:
            self.disk.forget(oldest)
        if is_failing:
            raise DeviceError(f"{self.description}: the durable write failed", errno.EIO)


def oldest(contents: list[bytes]) -> bytes:
    return contents[0]


class LossyFar(FarSide):
    """With points 1 and 2."""

    image: LossyDevice
    journal: LossyDevice

    def __init__(self) -> None:
        super().__init__()
        self.image, self.journal = LossyDevice(self.image), LossyDevice(self.journal)
        self.connect()
        self.fill(0, len(self.disk))
        self.seed()
        self.point((0, AT))
        self.point((AT, AT))

    def fail_footer(self, *, forgets: bool) -> None:
        """Of point 3."""
        self.fill(0, AT)
        self.begin(AT)
        self.send(0, AT)
        self.journal.fails, self.journal.forgets = lambda offset: offset >= RING_START, forgets
        with pytest.raises(DeviceError):
            self.commit()
        self.journal.fails = lambda offset: False
        assert self.read().points[-1].sequence == 3, "it can be read"
        self.contents[3] = bytes(self.disk)

    def cut_power(self) -> None:
        for device in (self.image, self.journal):
            device.disk.cut_power(oldest)

    def offered(self) -> list[int]:
        return [point.sequence for point in self.read().points]


@pytest.fixture
def far() -> LossyFar:
    return LossyFar()


@pytest.mark.parametrize("forgets", [False, True], ids=["in the cache", "forgotten"])
@pytest.mark.parametrize("requests", range(1, 20))
def test_power_that_fails_during_a_recovery_costs_no_point(
    far: LossyFar, requests: int, forgets: bool
) -> None:
    far.fail_footer(forgets=forgets)
    for device in (far.image, far.journal):
        device.dies_at = device.requests + requests
    try:
        far.recover()
    except DeviceLost:
        pass
    far.image.dies_at = far.journal.dies_at = -1
    far.cut_power()
    assert far.offered() in ([1, 2], [1, 2, 3], [3])
    recovered = far.recover().point.sequence
    assert bytes(far.image.data) == far.contents[recovered]


@pytest.mark.parametrize("forgets", [False, True], ids=["in the cache", "forgotten"])
def test_what_guests_flush_to_a_served_point_lasts(far: LossyFar, forgets: bool) -> None:
    far.fail_footer(forgets=forgets)
    point = ServedPoint(far.image, far.journal, wanted=None)
    point.start(now_ns=SECOND_NS)
    point.pwrite(b"guest" * BLOCK_BYTES, 0)
    point.flush()
    far.cut_power()
    assert far.offered() == [3]
    again = ServedPoint(far.image, far.journal, wanted=None)
    again.start(now_ns=SECOND_NS)
    buf = bytearray(len(far.disk))
    again.pread(memoryview(buf), 0)
    far.disk[: 5 * BLOCK_BYTES] = b"guest" * BLOCK_BYTES
    assert buf == far.disk


@pytest.mark.parametrize("is_reconnected", [False, True])
@pytest.mark.parametrize("forgets", [False, True], ids=["in the cache", "forgotten"])
def test_points_build_on_a_footer_that_lasts(
    far: LossyFar, forgets: bool, is_reconnected: bool
) -> None:
    far.fail_footer(forgets=forgets)
    if is_reconnected:
        reconnect(far)
    else:
        far.connect()
    far.point((AT, BLOCK_BYTES))
    far.cut_power()
    assert far.offered() == [1, 2, 3, 4] and not far.read().damage
    far.recover()
    assert bytes(far.image.data) == far.contents[4]


@pytest.mark.parametrize("requests", range(1, 12))
def test_a_footer_that_is_lost_was_not_announced(far: LossyFar, requests: int) -> None:
    """The far side loses its power while the journal is taken over."""
    far.fail_footer(forgets=True)
    far.journal.dies_at = far.journal.requests + requests
    try:
        far.connect()
    except DeviceLost:
        pass
    far.journal.dies_at = -1
    far.cut_power()
    journal = far.read()
    assert not journal.is_cut_short, journal.damage
    assert far.offered() in ([1, 2], [1, 2, 3])


@pytest.mark.parametrize("is_served", [False, True])
@pytest.mark.parametrize("number", range(1, 8))
def test_a_recovery_that_is_said_to_be_done_is(far: LossyFar, number: int, is_served: bool) -> None:
    """A durable write of the one before has failed, perhaps that of its last superblock."""
    count = itertools.count(1)
    far.journal.fails, far.journal.forgets = lambda offset: next(count) == number, True
    with pytest.raises(DeviceError):
        far.recover()
    if is_served and far.read().superblock.state is State.PROMOTED:
        ServedPoint(far.image, far.journal, wanted=None).start(now_ns=SECOND_NS)
    else:
        far.recover()
    far.cut_power()
    assert far.read().superblock.state is State.PROMOTED
    assert bytes(far.image.data) == far.contents[2]


def test_what_guests_write_behind_a_map_that_lasts_is_not_overwritten(far: LossyFar) -> None:
    """The map was written, and that failed: no guest was answered, and the next server reads it."""
    one = ServedPoint(far.image, far.journal, wanted=None)
    one.start(now_ns=SECOND_NS)
    far.journal.fails, far.journal.forgets = lambda offset: True, True
    with pytest.raises(DeviceError):
        one.pwrite(b"x" * SECTOR, 0)
    far.journal.fails = lambda offset: False
    two = ServedPoint(far.image, far.journal, wanted=None)
    two.start(now_ns=SECOND_NS)
    two.pwrite(b"g" * SECTOR, 0)
    two.flush()
    far.cut_power()
    three = ServedPoint(far.image, far.journal, wanted=None)
    three.start(now_ns=SECOND_NS)
    buf = bytearray(SECTOR)
    three.pread(memoryview(buf), 0)
    assert buf == b"g" * SECTOR


class HeldSuperblocks:
    """Durable writes of superblocks wait until `end`."""

    def __init__(self, far: LossyFar) -> None:
        self.far = far
        self.export = far.exports[Side.JOURNAL]
        self.write = self.export.start_durable_write
        self.held: list[Callable[[], None]] = []
        self.export.start_durable_write = self._start  # type: ignore[method-assign]

    def _start(self, buf: memoryview, offset: int, done: Done) -> None:
        if offset < RING_START:
            self.held.append(lambda: self.write(buf, offset, done))
        else:
            self.write(buf, offset, done)

    def end(self) -> None:
        """Writing back fails, and the one request that is in flight is told."""
        self.export.start_durable_write = self.write  # type: ignore[method-assign]
        journal, (one,) = self.far.journal, self.held
        journal.fails, journal.forgets = lambda offset: True, True
        one()
        journal.fails = lambda offset: False


@pytest.mark.parametrize("is_committing", [False, True])
def test_a_failure_that_the_superblock_is_told_breaks_the_next_point(
    far: LossyFar, is_committing: bool
) -> None:
    held = HeldSuperblocks(far)
    far.point((0, AT))
    far.fill(AT, AT)
    far.begin(AT)
    far.send(AT, AT)
    errors: list[BaseException | None] = []
    if is_committing:
        far.writer.commit(errors.append)
        assert not errors, "it waits for the superblock"
    held.end()
    if not is_committing:
        far.writer.commit(errors.append)
    assert isinstance(errors[0], DeviceError)
    check_goes_on_reconnected(far)


def check_goes_on_reconnected(far: LossyFar) -> None:
    reconnect(far)
    assert far.writer.newest.sequence == 3
    far.point((AT, AT))
    far.cut_power()
    assert far.offered() == [1, 2, 3, 4]
    far.recover()
    assert bytes(far.image.data) == far.contents[4]


def test_a_failure_that_applying_is_told_breaks_the_point(far: LossyFar) -> None:
    held = HeldSuperblocks(far)
    ended: list[BaseException | None] = []
    start(apply(far.writer, 2), far.exports, lambda _, error: ended.append(error))
    far.fill(AT, AT)
    far.begin(AT)
    far.send(AT, AT)
    held.end()
    with pytest.raises(DeviceError):
        far.commit()
    assert isinstance(ended[0], DeviceError)
    far.point((AT, AT))
    far.cut_power()
    far.recover()
    assert bytes(far.image.data) == far.contents[3]


@pytest.mark.parametrize("is_again", [False, True], ids=["first", "after an outage"])
def test_a_first_point_whose_source_has_ended_before_the_state_is_on_offer(is_again: bool) -> None:
    """The footer is there, and the superblocks still say that there is no point."""
    far = with_points() if is_again else FarSide()
    far.fill(0, len(far.disk))
    far.seed()
    number = far.writer.newest.sequence + 1
    far.fill(0, BLOCK_BYTES)
    far.begin(BLOCK_BYTES)
    far.send(0, BLOCK_BYTES)
    far.contents[number] = bytes(far.disk)
    pwrite = far.journal.pwrite

    def ends(buf: bytes, offset: int, fua: bool = False) -> None:
        if offset < RING_START:
            raise DeviceLost("the source was killed", errno.ENOTCONN)
        pwrite(buf, offset, fua)

    far.journal.pwrite = ends  # type: ignore[assignment, method-assign]
    with pytest.raises(DeviceLost):
        far.commit()
    far.journal.pwrite = pwrite  # type: ignore[method-assign]
    assert far.read().superblock.state is (State.TORN if is_again else State.SEEDING)
    far.connect()
    journal = far.read()
    assert journal.superblock.state is State.OK
    assert journal.superblock.since_ns == number * SECOND_NS
    assert [point.sequence for point in journal.points] == [number]
    check_goes_on(far)


def test_a_first_point_in_doubt_is_none_once_the_image_is_copied_in_place() -> None:
    """Its footer can be read, and the writer does not know that."""
    far = with_points()
    far.seed()
    far.fill(0, BLOCK_BYTES)
    far.begin(BLOCK_BYTES)
    far.send(0, BLOCK_BYTES)
    write = far.exports[Side.JOURNAL].start_durable_write

    def fails(buf: memoryview, offset: int, done: Done) -> None:
        write(buf, offset, lambda _: done(DeviceError("footer", errno.EIO)))

    far.exports[Side.JOURNAL].start_durable_write = fails  # type: ignore[method-assign]
    with pytest.raises(DeviceError):
        far.commit()
    far.exports[Side.JOURNAL].start_durable_write = write  # type: ignore[method-assign]
    far.seed()
    far.connect()
    assert far.read().superblock.state is State.TORN and not far.read().points
    far.point((0, BLOCK_BYTES))
    check_goes_on(far)
