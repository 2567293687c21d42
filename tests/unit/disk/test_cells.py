"""A disk's map counts what there is, cell by cell, whatever a cell consists of, and its work does
not grow with the disk."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.seeds import SEED, print_seed

from nbdmirror.disk import bitmap as bitmaps
from nbdmirror.disk.bitmap import REGION_SHIFT, DirtyBitmap
from nbdmirror.disk.cells import CELLS_MAX, Cells, DiskMap, Zeroes
from nbdmirror.disk.claim import Claim
from nbdmirror.disk.tracker import Tracker

GRANULE = 512
REGION = GRANULE << REGION_SHIFT

sizes = st.one_of(
    st.integers(1, 200 * GRANULE),  # cells of granules
    st.integers(1, 40).map(lambda regions: regions * REGION - 100),  # of regions
    st.integers(60, 200).map(lambda regions: regions * REGION + 5),  # of 64 regions
)
places = st.lists(st.tuples(st.floats(0, 0.999), st.floats(0, 0.3)), max_size=8)


def ranges(size: int, shares: list[tuple[float, float]]) -> list[tuple[int, int]]:
    found = [(int(size * at), max(1, int(size * length))) for at, length in shares]
    return [(offset, min(length, size - offset)) for offset, length in found]


def common(one: tuple[int, int], start: int, end: int) -> int:
    return max(0, min(one[0] + one[1], end) - max(one[0], start))


def of_cells(cells: Cells, parts: list[tuple[int, int]]) -> list[int]:
    """The bytes of the parts, which do not overlap, by enumeration."""
    edges = [0, *cells.ends]
    return [
        sum(common(part, start, end) for part in parts) for start, end in itertools.pairwise(edges)
    ]


def runs(bitmap: DirtyBitmap) -> list[tuple[int, int]]:
    found, offset = [], 0
    while run := bitmap.next_run(offset, bitmap.size):
        found.append(run)
        offset = sum(run)
    return found


@given(size=sizes, count=st.integers(1, 40), shares=places)
def test_dirty_bytes_of_cells(size: int, count: int, shares: list[tuple[float, float]]) -> None:
    bitmap = DirtyBitmap(size, GRANULE)
    for part in ranges(size, shares):
        bitmap.mark(*part)
    cells = Cells(size, GRANULE, count)
    assert len(cells.ends) == min(count, -(-size // GRANULE))
    assert (sum(cells.lengths), min(cells.lengths) > 0) == (size, True)
    assert bitmap.dirty_bytes == sum(cells.sum_of([bitmap]))
    assert cells.sum_of([bitmap]) == of_cells(cells, runs(bitmap))
    bitmap.clear(*ranges(size, [(0.2, 0.5)])[0])
    assert bitmap.dirty_bytes == sum(cells.sum_of([bitmap])), "after a change"
    assert cells.sum_of([bitmap]) == of_cells(cells, runs(bitmap))


@given(size=sizes, count=st.integers(1, 40), shares=places)
def test_claims_in_cells(size: int, count: int, shares: list[tuple[float, float]]) -> None:
    bitmap = DirtyBitmap(size, GRANULE)
    for part in ranges(size, shares):
        bitmap.mark(*part)
    claims = runs(bitmap)  # as claims, they do not overlap
    cells = Cells(size, GRANULE, count)
    assert cells.bytes_of([Claim(*run) for run in claims]) == of_cells(cells, claims)


@given(size=sizes, count=st.integers(1, 40))
def test_cells_are_about_equal(size: int, count: int) -> None:
    lengths = Cells(size, GRANULE, count).lengths
    assert max(lengths[:-1], default=0) <= 2 * min(lengths[:-1], default=0)


def test_a_disk_without_bytes_has_no_cells() -> None:
    found = Tracker(0, GRANULE).map(CELLS_MAX)
    assert found == DiskMap([], [], [], [], [])


@pytest.mark.parametrize("granularity", [GRANULE * 8, 64 << 10])
def test_the_work_is_bounded(granularity: int) -> None:
    """16 TiB that are dirty everywhere, and changed everywhere since they were counted: few regions
    are counted again, few numbers are added, and no bit is counted alone."""
    size = 16 << 40
    bitmap = DirtyBitmap(size, granularity)
    for region in range(0, size, granularity << REGION_SHIFT):
        bitmap.mark(region, 1)
    touched = bitmap._touched.count()
    assert touched == size // (granularity << REGION_SHIFT)
    cells = Cells(size, granularity, CELLS_MAX)
    assert cells._unit_shift >= REGION_SHIFT
    assert cells._units <= CELLS_MAX << bitmaps._SUM_SHIFT
    cells.sum_of([bitmap])
    assert 0 < touched - bitmap._touched.count() <= bitmaps._RECOUNTED_MAX
    assert bitmap.dirty_bytes == sum(cells.sum_of([bitmap])), "all are counted in the end"


# What is zero


def test_zeroes_are_forgotten_where_anything_else_happens() -> None:
    print_seed()
    chance = random.Random(SEED)
    size = 256 * GRANULE - 100
    tracker, zero = Tracker(size, GRANULE), set[int]()

    def granules(claim: Claim) -> set[int]:
        return set(range(claim.offset // GRANULE, -(-claim.end // GRANULE)))

    for _ in range(300):
        offset = chance.randrange(size)
        length = min(chance.randrange(1, 20 * GRANULE), size - offset)
        if chance.random() < 0.3:
            claim = tracker.begin_write(offset, length)
            tracker.end_write(claim, failed=chance.random() < 0.2)
            zero -= set(range(offset // GRANULE, -(-(offset + length) // GRANULE)))
            continue
        tracker.dirty.mark(offset, length)
        copied = tracker.claim(0, chance.randrange(1, 30) * GRANULE)
        assert copied is not None
        copied.is_zero = chance.random() < 0.5
        zero -= granules(copied)
        if chance.random() < 0.3 and copied.length > GRANULE:
            tracker.shrink(copied, GRANULE)
        is_failed = chance.random() < 0.2
        tracker.settle(copied, failed=is_failed)
        if copied.is_zero and not is_failed:
            zero |= granules(copied)
        found = tracker.map(CELLS_MAX)
        assert {cell for cell, count in enumerate(found.zero) if count} == zero
        assert sum(found.zero) == sum(found.lengths[cell] for cell in zero)


def test_zeroes_of_a_large_disk_are_never_too_many() -> None:
    """Its granules of zeroes are coarser than the copier's, and a part of one does not count."""
    size, granularity = 1 << 45, 64 << 10
    coarse = size >> 23
    assert coarse > granularity
    zeroes, cells = Zeroes(size, granularity), Cells(size, granularity, 16)
    zeroes.add(granularity, 3 * coarse)
    assert sum(zeroes.in_cells(cells)) == 2 * coarse
    zeroes.add(0, size)
    assert sum(zeroes.in_cells(cells)) == size
    zeroes.remove(5 * coarse + granularity, granularity)
    assert sum(zeroes.in_cells(cells)) == size - coarse


def test_a_map_while_there_is_something_of_each_kind() -> None:
    tracker = Tracker(8 * GRANULE, GRANULE)
    tracker.dirty.mark_all()
    zeroed, copied = tracker.claim(0, 2 * GRANULE), tracker.claim(0, GRANULE)
    assert zeroed and copied
    zeroed.is_zero = True
    tracker.settle(zeroed, failed=False)
    covered = tracker.begin_flush()
    found = tracker.map(4)
    assert found.lengths == [1024] * 4
    assert found.dirty == [0, 512, 1024, 1024]
    assert found.in_flight == [0, 512, 0, 0]
    # A flush in progress has not flushed. What is sent beside it is unflushed for two reasons.
    assert found.unflushed == [1024, 1024, 0, 0]
    assert found.zero == [1024, 0, 0, 0]
    tracker.settle(copied, failed=False)
    tracker.end_flush(covered, failed=False)
    assert tracker.map(4).unflushed == [0, 512, 0, 0]
