"""Recovery: which point a user means, what is refused, and ends at every moment."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from unit.points.pointparts import SECOND_NS, FarSide, with_points

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.points.format import BLOCK_BYTES, JournalError, State
from nbdmirror.points.recovery import choose


class Killed(Exception):
    """The machine that recovers is killed."""


class Dying(MemoryDevice):
    """Dies at the change number `left`, of which it does a half. `countdown` is shared."""

    countdown: list[int]

    def _die(self, half: Callable[[], None]) -> None:
        self.countdown[0] -= 1
        if not self.countdown[0]:
            half()
            raise Killed

    def pwrite(self, buf: bytes | bytearray | memoryview, offset: int, fua: bool = False) -> None:
        half = memoryview(buf)[: len(buf) // 2]
        self._die(lambda: super(Dying, self).pwrite(half, offset))
        super().pwrite(buf, offset, fua)

    def zero(self, offset: int, length: int, **options: bool) -> None:
        self._die(lambda: None)
        super().zero(offset, length, **options)

    def flush(self) -> None:
        self._die(lambda: None)


def dying(far: FarSide, at: int) -> FarSide:
    """A copy of the far side that dies at its change number `at`."""
    found = copy.copy(far)
    countdown = [at]
    for name in ("image", "journal"):
        old = getattr(far, name)
        device = Dying(old.size, description=old.description)
        device.data[:] = old.data
        device.countdown = countdown
        setattr(found, name, device)
    return found


@pytest.mark.parametrize("applied", [0, 1])
@pytest.mark.parametrize("sequence", [1, 2, 3])
def test_a_recovery_may_be_killed_at_each_change(sequence: int, applied: int) -> None:
    original = with_points(3)
    original.disk[32 << 10 : 40 << 10] = bytes(8 << 10)
    original.begin(8 << 10)
    original.send(32 << 10, 8 << 10)
    original.commit()
    if applied:
        original.apply(applied)
    deaths = 0
    for at in range(1, 1000):
        far = dying(original, at)
        try:
            far.recover(str(sequence))
        except Killed:
            deaths += 1
        else:
            break
        far.recover(str(sequence))
        assert bytes(far.image.data) == original.contents[sequence]
    assert deaths >= 3


def test_a_killed_recovery_may_go_on_to_a_later_point_and_not_to_an_earlier_one() -> None:
    original = with_points(3)
    far = dying(original, 9)
    with pytest.raises(Killed):
        far.recover("2")
    assert far.read().superblock.applying == 2
    assert [point.sequence for point in far.read().points] == [2, 3]
    with pytest.raises(JournalError, match="journal: has no point '1': it has 2 to 3"):
        far.recover("1")
    far.recover("3")
    assert bytes(far.image.data) == original.contents[3]


def test_a_recovery_that_is_done_is_done() -> None:
    far = with_points(3)
    far.recover("2")
    image, journal = bytes(far.image.data), bytes(far.journal.data)
    found = far.recover("2")
    assert found.was_done and found.point.sequence == 2
    assert far.recover().was_done
    for other in ("1", "3", "n3"):
        with pytest.raises(JournalError, match=r"point 2 was recovered at .*: there is no other"):
            far.recover(other)
    assert (image, journal) == (bytes(far.image.data), bytes(far.journal.data))
    assert far.read().superblock.state is State.PROMOTED
    assert [point.sequence for point in far.read().points] == [2]


@pytest.mark.parametrize(
    ("text", "sequence"),
    [
        (None, 5),
        ("1", 1),
        ("4", 4),
        ("nightly", 4),
        ("first", 1),
        ("1970-01-01T00:00:03Z", 3),
        ("1970-01-01 00:00:03.999+00:00", 3),
        ("1970-01-01T01:00:04+01:00", 4),
        ("2126-01-01", 5),
    ],
)
def test_points_by_number_name_and_time(text: str | None, sequence: int) -> None:
    far = with_points(0)
    for name in ("first", "nightly", "", "nightly", ""):
        far.point((0, BLOCK_BYTES), name=name)
    assert choose(far.read(), text).sequence == sequence


def test_a_time_without_a_zone_is_local() -> None:
    far = with_points(2)
    moment = datetime.fromtimestamp(1.5, tz=UTC).astimezone()
    assert choose(far.read(), moment.replace(tzinfo=None).isoformat()).sequence == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "has no point '0': it has 1 to 3"),
        ("4", "has no point '4': it has 1 to 3"),
        ("²", "has no point '²': it has 1 to 3"),
        ("nightly", "has no point 'nightly': it has 1 to 3"),
        ("1970-01-01T00:00:00Z", "has no point '1970-01-01T00:00:00Z': it has 1970-01-01 "),
        ("-1", "has no point '-1': it has 1 to 3"),
    ],
)
def test_points_that_do_not_exist(text: str, message: str) -> None:
    far = with_points(3)
    image, journal = bytes(far.image.data), bytes(far.journal.data)
    with pytest.raises(JournalError) as caught:
        far.recover(text)
    assert message in str(caught.value)
    assert (image, journal) == (bytes(far.image.data), bytes(far.journal.data))


def test_there_is_no_point_before_the_first_copy_has_ended() -> None:
    far = FarSide()
    with pytest.raises(JournalError, match="has no point yet: the mirror has not begun"):
        far.recover()
    far.seed()
    with pytest.raises(JournalError, match="no point yet: the image is being copied for the first"):
        far.recover()
    far.point()
    far.run(far.writer.seed(since_ns=7 * SECOND_NS))
    with pytest.raises(JournalError, match="no point: the image is being copied in place since 19"):
        far.recover()


def test_an_image_that_is_not_the_journals_is_not_touched() -> None:
    far = with_points(3)
    far.apply(2)
    journal = bytes(far.journal.data)
    far.image.data[3] ^= 1  # point 2 has changed the blocks from 8192 on
    far.image.data[9000] ^= 1
    image = bytes(far.image.data)
    with pytest.raises(
        JournalError, match=r"image does not hold point 2, .* differs at 8192: it is"
    ):
        far.recover()
    assert (image, journal) == (bytes(far.image.data), bytes(far.journal.data))


@pytest.mark.parametrize("size", [0, BLOCK_BYTES, (64 << 10) - 1])
def test_an_image_that_is_too_small_is_refused(size: int) -> None:
    far = with_points(1)
    far.image = MemoryDevice(size)
    with pytest.raises(JournalError, match="journal of another disk than the image: it has"):
        far.recover()


def test_an_image_that_is_a_journal_is_refused() -> None:
    far = with_points(1)
    far.image = MemoryDevice(far.journal.size)
    far.image.data[:] = far.journal.data
    with pytest.raises(JournalError, match="what is given as its image is a journal too"):
        far.recover()
    assert far.image.data == far.journal.data


def test_a_larger_image_keeps_what_lies_past_the_disk() -> None:
    far = with_points(2)
    image = MemoryDevice(far.image.size + 5000)
    image.data[:] = bytes(far.image.data) + b"\xaa" * 5000
    far.image = image
    far.recover()
    assert bytes(image.data) == far.contents[2] + b"\xaa" * 5000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a journal: it is empty"),
        (b"\x7fELF", "is not a journal: it holds something else"),
        (b"NBMJ", "superblock A is damaged: its checksum is wrong; superblock B is no superblock"),
    ],
)
def test_what_is_no_journal_is_refused(content: bytes, message: str) -> None:
    far = with_points(1)
    far.journal = MemoryDevice(far.journal.size, description="journal")
    far.journal.data[: len(content)] = content
    before = bytes(far.journal.data)
    with pytest.raises(JournalError, match=f"journal: {message}"):
        far.recover()
    assert bytes(far.journal.data) == before


@pytest.mark.parametrize("size", [0, 4095, 70000])
def test_an_export_that_is_too_small_for_a_journal_is_refused(size: int) -> None:
    far = with_points(1)
    whole = bytes(far.journal.data)
    far.journal = MemoryDevice(size, description="journal")
    far.journal.data[:] = whole[:size]
    with pytest.raises(JournalError, match="journal: "):
        far.recover()


def test_a_journal_of_a_newer_version_is_refused() -> None:
    far = with_points(1)
    for slot in (0, 64 << 10):
        block = bytearray(far.journal.data[slot : slot + 4096])
        block[4] = 2
        block[-4:] = zlib.crc32(block[:-4]).to_bytes(4, "little")
        far.journal.data[slot : slot + 4096] = block
    with pytest.raises(JournalError, match="superblock A has version 2 of the format, and this"):
        far.read()
