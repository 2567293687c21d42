"""A journal whose connection was lost is refused when it comes back: torn; an older copy; another
one. Then nothing was changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
from unit.points.pointparts import (
    JOURNAL_BYTES,
    FarSide,
    check_goes_on,
    reconnect,
    reconnected,
    with_points,
)

from nbdmirror.points.format import BLOCK_BYTES, RING_START, SLOTS, Header, JournalError
from nbdmirror.points.superblocks import JournalTaken


def refused(far: FarSide, text: str, kind: type[JournalError] = JournalError) -> None:
    """Nothing was changed."""
    before = bytes(far.journal.data)
    with pytest.raises(kind, match=text):
        far.run(reconnected(far))
    assert far.journal.data == before


PARTS: dict[str, Callable[[Header], int]] = {
    "header": lambda header: header.place,
    "index": lambda header: header.index_place,
    "footer": lambda header: header.footer_place,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_torn_one_is_refused_wherever_it_is_torn(part: str, number: int) -> None:
    """A server has lost its cache, though it has flushed. Whoever recovers gets nothing that is
    later, also if all that is later is whole."""
    far = with_points(5)
    at = RING_START + PARTS[part](far.writer.headers[number - 1])
    far.journal.data[at : at + 512] = bytes(512)
    refused(far, f"has lost points: it ends with point {number - 1}, and point 5 was committed")


def test_an_older_copy_is_refused() -> None:
    far = with_points(2)
    copies = [bytes(far.journal.data)]
    far.point((0, BLOCK_BYTES))
    copies.append(bytes(far.journal.data))  # has all points, and not what the image is
    far.apply(3)
    for one in copies:
        far.journal.data[:] = one
        refused(far, "journal: is an older copy of what was written to it")


def test_a_damaged_superblock_makes_no_older_copy() -> None:
    for slot in SLOTS:
        for is_noted in (True, False):
            far = with_points(3)
            if not is_noted:
                far.apply(2)
            far.journal.data[slot + 100] ^= 1
            reconnect(far)
            assert far.writer.damage
            check_goes_on(far)


def test_an_older_copy_from_before_this_process_is_refused() -> None:
    far = with_points(2)
    old = bytes(far.journal.data)
    far.connect()
    far.journal.data[:] = old
    refused(far, "is an older copy")


def test_another_disks_is_refused() -> None:
    far = with_points(3)
    far.journal.data[:] = with_points(3).journal.data
    refused(far, "is the journal of another disk")


def test_an_empty_one_and_one_that_is_none_are_refused() -> None:
    far = with_points(3)
    far.journal.data[:] = bytes(JOURNAL_BYTES)
    refused(far, "is not a journal: it is empty")
    far.journal.data[:] = random.Random(1).randbytes(JOURNAL_BYTES)
    refused(far, "is not a journal: it holds something else")


@pytest.mark.parametrize("points", [0, 1, 3])
def test_one_that_another_server_has_written_to_is_refused(points: int) -> None:
    """A copy of the source's host: it has the same disk, and its changes are others."""
    far = with_points(3)
    other = copy.deepcopy(far)
    other.connect()
    for _ in range(points):
        other.point((4 * BLOCK_BYTES, BLOCK_BYTES))
    far.journal.data[:] = other.journal.data
    refused(far, "another process writes to this journal", JournalTaken)
    far.connect()  # a new process cannot know


def test_one_that_was_recovered_is_refused() -> None:
    far = with_points(3)
    other = copy.deepcopy(far)
    other.recover("2")
    far.journal.data[:] = other.journal.data
    refused(far, "point 2 was recovered from this journal", JournalTaken)


@pytest.mark.parametrize("is_applied", [False, True])
def test_other_points_of_the_same_numbers_are_refused(is_applied: bool) -> None:
    """By a copy of this process's memory: a virtual machine that was resumed twice."""
    far = with_points(2)
    other = copy.deepcopy(far)
    far.point((0, BLOCK_BYTES))
    other.point((8 * BLOCK_BYTES, BLOCK_BYTES))
    if is_applied:
        for one in (far, other):
            one.apply(3)
    far.journal.data[:] = other.journal.data
    refused(far, "has another point 3 than was committed")
