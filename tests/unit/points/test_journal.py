"""Writing points to a journal and reading them back: what is there, what is refused, what fits."""

from __future__ import annotations

import errno

import pytest
from unit.points.pointparts import JOURNAL_BYTES, SECOND_NS, FarSide, with_points

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.errors import DeviceError
from nbdmirror.names import POINT_BYTES_MAX
from nbdmirror.points import ownership
from nbdmirror.points.format import (
    BLOCK_BYTES,
    RING_BYTES_MIN,
    RING_START,
    JournalError,
    State,
    batch_bytes_max,
    data_bytes_max,
)
from nbdmirror.points.requests import Side, run, start
from nbdmirror.points.superblocks import JournalTaken
from nbdmirror.points.writer import JournalFull


def test_each_point_can_be_recovered() -> None:
    for sequence in (1, 2, 3):
        far = with_points(3)
        assert [point.sequence for point in far.read().points] == [1, 2, 3]
        assert far.recover(str(sequence)).point.sequence == sequence
        assert bytes(far.image.data) == far.contents[sequence]


def test_a_point_has_what_it_was_given() -> None:
    far = with_points(0)
    far.fill(0, BLOCK_BYTES)
    far.begin(BLOCK_BYTES, name="vor dem Umbau ü", group=77)
    far.send(0, BLOCK_BYTES)
    far.commit()
    (point,) = far.read().points
    assert (point.sequence, point.time_ns, point.group) == (1, SECOND_NS, 77)
    assert point.name == "vor dem Umbau ü"


def test_a_point_may_be_empty() -> None:
    far = with_points(1)
    far.point()
    far.recover()
    assert bytes(far.image.data) == far.contents[2] == far.contents[1]


def test_zeroes_take_no_space_and_count() -> None:
    far = with_points(1)
    far.disk[8192:40960] = bytes(32768)
    far.begin(32768)
    before = far.writer.room().used_bytes
    far.send(8192, 32768)
    far.commit()
    assert far.writer.room().used_bytes - before == 3 * BLOCK_BYTES  # header, index, footer
    far.recover()
    assert bytes(far.image.data) == far.contents[2]


@pytest.mark.parametrize("odd", [1, 511, 512, 4095])
def test_the_odd_end_of_a_disk(odd: int) -> None:
    far = FarSide(disk_bytes=3 * BLOCK_BYTES + odd)
    far.fill(0, len(far.disk))
    far.seed()
    far.point((2 * BLOCK_BYTES, BLOCK_BYTES + odd))
    far.point((3 * BLOCK_BYTES, odd))
    far.recover()
    assert bytes(far.image.data) == far.contents[2] == far.disk


def test_a_range_that_is_sent_twice_counts_as_it_was_sent_last() -> None:
    far = with_points(1)
    far.fill(0, 8192)
    far.begin(16384)
    far.send(0, 8192)
    far.fill(4096, 4096)
    far.send(4096, 4096)
    far.commit()
    far.recover()
    assert bytes(far.image.data) == far.contents[2]


def test_large_writes_are_read_in_parts() -> None:
    far = FarSide(disk_bytes=5 << 20, journal_bytes=16 << 20)
    far.fill(0, len(far.disk))
    far.seed()
    far.point((4096, (3 << 20) + 4096))
    far.recover()
    assert bytes(far.image.data) == far.contents[1]


def test_the_ring_goes_round() -> None:
    """Batches of odd sizes, far more than the ring holds: each place of it is an end once."""
    far = with_points(1)
    for number in range(120):
        count = 1 + number * 7 % 5
        far.point((number % 4 * 8192, count * BLOCK_BYTES), (49152, BLOCK_BYTES))
        if number % 3 == 2:
            far.apply(far.writer.newest.sequence - 1)
        journal = far.read()
        assert not journal.damage
        assert journal.points[-1].sequence == far.writer.newest.sequence
    assert far.writer._head > 3 * far.writer.room().ring_bytes
    far.recover()
    assert bytes(far.image.data) == far.contents[121]


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    far = FarSide(disk_bytes=4 << 20)
    far.seed()
    far.point((0, BLOCK_BYTES))
    before = bytes(far.journal.data)
    free = far.writer.room().free_bytes
    with pytest.raises(JournalFull, match=r"does not fit: \d+ of 1048576 bytes are free") as caught:
        far.begin(free)
    assert caught.value.missing_bytes == 4 * BLOCK_BYTES  # header, footer, index
    assert bytes(far.journal.data) == before
    far.fill(0, 512 << 10)
    far.begin(free - caught.value.missing_bytes)
    far.send(0, 512 << 10)
    far.commit()


def test_what_fits_by_its_bytes_fits_however_it_is_cut() -> None:
    far = FarSide(disk_bytes=4 << 20)
    far.fill(0, 900 << 10)
    far.seed()
    free = far.writer.room().free_bytes
    length = (free - 16 * BLOCK_BYTES) // (2 * BLOCK_BYTES) * 2 * BLOCK_BYTES
    far.begin(length)
    for offset in range(0, length, 2 * BLOCK_BYTES):
        far.send(offset + BLOCK_BYTES, BLOCK_BYTES)
        far.send(offset, BLOCK_BYTES)
    far.commit()
    far.recover()
    assert far.image.data[:length] == far.disk[:length]


def test_more_than_was_announced_hits_no_other_point() -> None:
    far = FarSide(disk_bytes=4 << 20)
    far.fill(0, 4 << 20)
    far.seed()
    far.point((0, 300 << 10))
    before = bytes(far.journal.data)
    far.begin(BLOCK_BYTES)
    far.send(0, 512 << 10)
    with pytest.raises(DeviceError, match="does not fit") as caught:
        far.send(1 << 20, 512 << 10)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(DeviceError, match="does not fit"):
        far.commit()
    used = far.writer.room().used_bytes
    assert bytes(far.journal.data[:used]) == before[:used]
    far.point((0, BLOCK_BYTES))
    assert [point.sequence for point in far.read().points] == [1, 2]


def test_space_is_used_again_when_the_image_holds_its_points() -> None:
    far = with_points(3)
    used = far.writer.room().used_bytes
    far.apply(2)
    assert [point.sequence for point in far.read().points] == [2, 3]
    assert bytes(far.image.data) == far.contents[2]
    assert 0 < far.writer.room().used_bytes < used
    assert not any(far.journal.data[RING_START : RING_START + used // 2])  # trimmed
    far.apply(3)
    assert far.writer.room().used_bytes == 0
    assert [point.name for point in far.read().points] == ["n3"]
    far.recover()
    assert bytes(far.image.data) == far.contents[3]


def test_how_full_it_is() -> None:
    far = with_points(0)
    for _ in range(8):
        far.point((0, 5 * BLOCK_BYTES))
    room = far.writer.room()
    assert room.used_bytes == 8 * 8 * BLOCK_BYTES
    assert room.free_bytes == RING_BYTES_MIN - room.used_bytes


@pytest.mark.parametrize("blocks", [3, 4, 5, 6, 127, 128, 129, 130, 131, 132, 133, 1000, 1 << 20])
def test_the_largest_batch_fits_and_no_larger_one(blocks: int) -> None:
    ring_bytes = blocks * BLOCK_BYTES
    most = data_bytes_max(ring_bytes)
    assert not most % BLOCK_BYTES
    assert batch_bytes_max(most) <= ring_bytes < batch_bytes_max(most + BLOCK_BYTES)


# Order, errors, owners.


def test_the_footer_comes_last() -> None:
    far = with_points(1)
    log = far.exports[Side.JOURNAL].log
    log.clear()
    far.point((0, BLOCK_BYTES))
    footer = ["flush", "read", "read", "durable write"]
    superblock = ["read", "read", "durable write"]
    assert log == ["write", "write", "write", *footer, *superblock]


def test_what_a_killed_source_left_in_a_cache_is_flushed_before_it_counts() -> None:
    """Its last footer may be on the far side, and not on the storage: a power cut takes it back."""
    far = with_points(1)
    program = ownership.take_over(far.exports, disk_id=far.disk_id)
    log = far.exports[Side.JOURNAL].log
    log.clear()
    start(program, far.exports, lambda writer, error: None)
    assert log.index("flush") < log.index("read") < log.index("durable write")


@pytest.mark.parametrize("failing", ["write", "flush", "read"])
def test_a_point_that_fails_is_none_and_the_next_one_is(failing: str) -> None:
    far = with_points(1)
    far.exports[Side.JOURNAL].failing = {failing}
    with pytest.raises(OSError, match=f"{failing} failed"):
        far.point((0, BLOCK_BYTES))
    if failing == "write":  # of the data
        with pytest.raises(OSError, match="write failed"):
            far.commit()
    far.exports[Side.JOURNAL].failing.clear()
    assert [point.sequence for point in far.read().points] == [1]
    far.point((0, BLOCK_BYTES))
    assert [point.sequence for point in far.read().points] == [1, 2]


def test_nothing_is_added_while_the_outcome_of_a_footer_is_not_known() -> None:
    far = with_points(1)
    far.fill(0, BLOCK_BYTES)
    far.begin(BLOCK_BYTES)
    far.send(0, BLOCK_BYTES)
    far.exports[Side.JOURNAL].failing = {"durable write"}
    with pytest.raises(OSError, match="durable write failed"):
        far.commit()
    far.exports[Side.JOURNAL].failing.clear()
    with pytest.raises(JournalError, match="journal: the outcome of point 2 is not known"):
        far.begin(BLOCK_BYTES)
    far.connect()
    assert far.writer.newest.sequence == 1
    far.point((0, BLOCK_BYTES))


def test_a_point_that_was_given_up_leaves_no_trace() -> None:
    far = with_points(2)
    far.fill(0, 8192)
    far.begin(8192)
    far.send(0, 8192)
    ended: list[BaseException | None] = []
    far.writer.give_up(ended.append)
    assert ended == [None]
    far.connect()
    assert far.writer.newest.sequence == 2
    far.point((4096, 4096), (0, 4096))
    far.recover()
    assert bytes(far.image.data) == far.contents[3]


def test_the_later_of_two_servers_writes() -> None:
    far = with_points(1)
    first = far.writer
    far.connect()
    second, far.writer = far.writer, first
    with pytest.raises(JournalTaken, match="journal: another process writes to this journal"):
        far.point((0, BLOCK_BYTES))
    with pytest.raises(JournalTaken):
        far.begin(BLOCK_BYTES)
    far.writer = second
    far.point((0, BLOCK_BYTES))
    assert far.read().points[-1].sequence == 2


def test_a_source_that_comes_back_after_a_recovery_is_refused() -> None:
    far = with_points(2)
    old = far.writer
    far.recover()
    with pytest.raises(JournalTaken, match=r"point 2 was recovered from this journal at .* in use"):
        far.connect()
    far.writer = old
    image = bytes(far.image.data)
    with pytest.raises(JournalTaken, match=r"point 2 was recovered from this journal at .* in use"):
        far.point((0, BLOCK_BYTES))
    with pytest.raises(JournalTaken):
        far.apply(2)
    assert bytes(far.image.data) == image


def test_a_journal_of_another_disk_is_not_taken_over() -> None:
    far = with_points(1)
    far.disk_id = bytes(16)
    before = bytes(far.journal.data)
    with pytest.raises(JournalError, match="journal: is the journal of another disk"):
        far.connect()
    assert bytes(far.journal.data) == before


def test_a_long_name_is_refused() -> None:
    far = with_points(0)
    with pytest.raises(ValueError, match="at most 255 bytes"):
        far.begin(0, name="ü" * (POINT_BYTES_MAX // 2 + 1))
    far.begin(0, name="ü" * (POINT_BYTES_MAX // 2))
    far.commit()


@pytest.mark.parametrize(
    ("size", "content", "at", "message"),
    [
        (JOURNAL_BYTES - 1, b"", 0, "is too small: it has"),
        (JOURNAL_BYTES, b"\xeb\x63\x90", 0, "is not empty"),
        (JOURNAL_BYTES, b"\1CD001", 32 << 10, "is not empty"),  # of ISO 9660, zeroes before it
        (JOURNAL_BYTES, b"\1", RING_START - 1, "is not empty"),
        (0, b"", 0, "is too small"),
    ],
)
def test_where_no_journal_is_created(size: int, content: bytes, at: int, message: str) -> None:
    device = MemoryDevice(size)
    device.data[at : at + len(content)] = content
    before = bytes(device.data)
    program = ownership.create("nbd://b/j", size, disk_bytes=1 << 20, now_ns=0)
    with pytest.raises(JournalError, match=f"nbd://b/j: {message}"):
        run(program, {Side.JOURNAL: device})
    assert bytes(device.data) == before


def test_a_journal_is_known_as_one_before_it_is_called_rubbish() -> None:
    """Whoever reads this may be about to overwrite the only copy."""
    far = with_points(2)
    program = ownership.create("j", far.journal.size, disk_bytes=1 << 20, now_ns=0)
    text = "is the journal of a disk of 64 KiB, with points up to 2; if nobody needs them"
    with pytest.raises(JournalError, match=text):
        far.run(program)
    far.recover()
    program = ownership.create("j", far.journal.size, disk_bytes=1 << 20, now_ns=0)
    with pytest.raises(JournalError, match="a disk of 64 KiB, whose image is in use since 19"):
        far.run(program)


def test_an_image_that_is_copied_in_place_has_no_point() -> None:
    far = with_points(2)
    far.run(far.writer.seed(since_ns=5))
    assert far.read().superblock.state is State.TORN
    assert far.read().points == []
    far.fill(0, len(far.disk))
    far.image.pwrite(far.disk, 0)
    point = far.point((0, BLOCK_BYTES))
    assert point.sequence == 3
    assert [one.sequence for one in far.read().points] == [3]
    far.recover()
    assert bytes(far.image.data) == far.contents[3]
