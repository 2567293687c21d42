"""The last point becomes the image's content from memory, if it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from unit.points.pointparts import FarSide, with_points

from nbdmirror.points import last_batch
from nbdmirror.points.applier import apply
from nbdmirror.points.format import BLOCK_BYTES, RING_START

DISK_BYTES = 1 << 20


@contextmanager
def reads_of_the_ring(far: FarSide) -> Iterator[list[int]]:
    """The offsets of reads of the journal, the superblocks' not counted."""
    pread, offsets = far.journal.pread, list[int]()

    def noted(buf: memoryview, offset: int) -> None:
        if offset >= RING_START:
            offsets.append(offset)
        pread(buf, offset)

    with patch.object(far.journal, "pread", noted):
        yield offsets


def apply_newest(far: FarSide) -> list[int]:
    """Returns what was read for that."""
    found = apply_point(far, far.writer.newest.sequence)
    assert bytes(far.image.data) == bytes(far.disk)
    return found


def apply_point(far: FarSide, sequence: int) -> list[int]:
    with reads_of_the_ring(far) as offsets:
        far.run(apply(far.writer, sequence))
    assert bytes(far.image.data) == far.contents[sequence]
    return offsets


def test_the_last_point_is_applied_without_reading_it_back() -> None:
    """Data of all lengths, zeroes, the disk's odd end, in any order."""
    far = FarSide(DISK_BYTES + 1000, 16 << 20)
    far.seed()
    far.point()
    apply_newest(far)
    far.point(
        (DISK_BYTES, 1000), (64 << 10, 300 << 10), (9 * BLOCK_BYTES, BLOCK_BYTES), (0, BLOCK_BYTES)
    )
    assert apply_newest(far) == []
    far.disk[0 : 2 * BLOCK_BYTES] = bytes(2 * BLOCK_BYTES)
    far.begin(3 * BLOCK_BYTES)
    far.fill(BLOCK_BYTES * 20, BLOCK_BYTES)
    far.send(0, 2 * BLOCK_BYTES)
    far.send(20 * BLOCK_BYTES, BLOCK_BYTES)
    far.commit()
    assert apply_newest(far) == []


def test_several_points_are_read_back() -> None:
    far = with_points(1)
    apply_newest(far)
    far.point((0, 2 * BLOCK_BYTES))
    far.point((BLOCK_BYTES, 2 * BLOCK_BYTES))
    assert apply_newest(far)
    far.point((0, BLOCK_BYTES))
    assert apply_newest(far) == [], "the next one is in memory again"


def test_an_older_point_is_read_back() -> None:
    """What is in memory is the last one."""
    far = with_points(1)
    apply_newest(far)
    far.point((0, 2 * BLOCK_BYTES))
    older = far.writer.newest.sequence
    far.point((BLOCK_BYTES, 2 * BLOCK_BYTES))
    assert apply_point(far, older)
    assert apply_newest(far) == [], "and the last one is still there"


def test_what_was_put_twice_is_read_back() -> None:
    far = with_points(1)
    apply_newest(far)
    far.begin(2 * BLOCK_BYTES)
    for _ in range(2):
        far.fill(0, BLOCK_BYTES)
        far.send(0, BLOCK_BYTES)
    far.commit()
    assert apply_newest(far)


@pytest.mark.parametrize("kept", [BLOCK_BYTES, 3 * BLOCK_BYTES])
def test_memory_is_bounded(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last point, and of the one that is being written."""
    far = with_points(1)
    apply_newest(far)
    monkeypatch.setattr(last_batch, "KEPT_BYTES", 3 * BLOCK_BYTES)
    far.point((0, kept))
    far.point((8 * BLOCK_BYTES, 3 * BLOCK_BYTES))
    assert apply_newest(far)
    far.point((0, 3 * BLOCK_BYTES))
    assert apply_newest(far) == []
    far.point((0, 4 * BLOCK_BYTES))
    assert apply_newest(far)


def test_what_was_given_up_is_forgotten() -> None:
    far = with_points(1)
    apply_newest(far)
    far.fill(0, 2 * BLOCK_BYTES)
    far.begin(2 * BLOCK_BYTES)
    far.send(0, 2 * BLOCK_BYTES)
    far.writer.give_up(lambda _: None)  # with content that the next point has otherwise
    far.point((0, 2 * BLOCK_BYTES), (5 * BLOCK_BYTES, BLOCK_BYTES))
    assert apply_newest(far) == []


def test_what_is_kept_is_nobody_elses() -> None:
    """A writer's memory is used again as soon as the data is acknowledged."""
    far = with_points(1)
    apply_newest(far)
    far.fill(0, BLOCK_BYTES)
    memory = bytearray(far.disk[:BLOCK_BYTES])
    far.begin(BLOCK_BYTES)
    far.writer.put([(0, BLOCK_BYTES, memoryview(memory))], lambda _: None)
    memory[:] = bytes(BLOCK_BYTES)
    far.commit()
    assert apply_newest(far) == []
