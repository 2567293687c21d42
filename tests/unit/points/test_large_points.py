"""A point after an outage may have millions of entries. It is applied on the event loop, which
guests wait for: a few entries at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from unit.points.pointparts import FarSide

from nbdmirror.points import reader
from nbdmirror.points.applier import check
from nbdmirror.points.format import BLOCK_BYTES, RING_START
from nbdmirror.points.reader import Journal, Part
from nbdmirror.points.requests import Program, Read

BLOCKS = 600
DISK_BYTES = BLOCKS * BLOCK_BYTES
FEW = 7


def far_side(points: int) -> FarSide:
    """Each point changes every other block, with zeroes in places, the next one the others."""
    far = FarSide(DISK_BYTES, RING_START + 8 * DISK_BYTES)
    far.seed()
    for number in range(points):
        ranges = [(at * BLOCK_BYTES, BLOCK_BYTES) for at in range(number % 2, BLOCKS, 2)]
        for offset, length in ranges[number::5]:
            far.disk[offset : offset + length] = bytes(length)
        for offset, length in ranges[number + 1 :: 5]:
            far.fill(offset, length)
        far.begin(DISK_BYTES)
        for offset, length in ranges:
            far.send(offset, length)
        far.commit()
    return far


@pytest.mark.parametrize("at_once", [1, FEW, BLOCKS, 10 * BLOCKS])
@pytest.mark.parametrize("points", [1, 2, 3])
def test_a_point_is_looked_at_in_parts(
    points: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever parts, the image is the point."""
    monkeypatch.setattr(reader, "ENTRIES_AT_ONCE", at_once)
    far = far_side(points)
    far.connect()
    far.apply(points)
    assert bytes(far.image.data) == far.contents[points]


def test_no_step_has_more_than_a_few_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index is read in pieces too, each of which is a turn of the loop."""
    monkeypatch.setattr(reader, "ENTRIES_AT_ONCE", FEW)
    monkeypatch.setattr(reader, "READ_BYTES_MAX", 2 * BLOCK_BYTES)
    far = far_side(2)
    journal: Journal = far.read()
    steps: list[int] = []

    def visit(parts: list[Part]) -> Program[None]:
        steps.append(len({part.entry for part in parts}))
        yield []

    program = reader.newest_parts(journal, journal.headers, visit)
    asked: list[Sequence[object]] = []

    def noting() -> Program[None]:
        try:
            while True:
                requests = next(program)
                asked.append(requests)
                yield requests
        except StopIteration:
            return

    far.run(noting())
    assert max(steps) <= FEW and sum(steps) == BLOCKS
    reads = [request for requests in asked for request in requests if isinstance(request, Read)]
    assert max(len(read.buf) for read in reads) <= 2 * BLOCK_BYTES
    assert sum(len(read.buf) for read in reads) == sum(h.index_bytes for h in journal.headers)


def test_damage_in_any_part_is_found_before_anything_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader, "ENTRIES_AT_ONCE", FEW)
    far = far_side(2)
    journal = far.read()
    for header in journal.headers:
        place, _ = next(iter(journal.superblock.spans(header.place + BLOCK_BYTES, 1)))
        kept = bytes(far.journal.data[place : place + 1])
        far.journal.data[place] ^= 0xFF
        with pytest.raises(reader.DamagedData, match=f"point {header.point.sequence} is damaged"):
            far.run(check(journal, journal.headers))
        far.journal.data[place : place + 1] = kept
    far.run(check(journal, journal.headers))
