"""A map of a disk: how much of each of a bounded number of cells is dirty, in flight, not flushed,
or known to be zeroes.

The time that a map takes is bounded, whatever the disk's size and the bitmaps' granularity. A cell
consists of whole units of what the bitmaps count anyway: granules of a small bitmap, regions
(bitmap.py) of a larger one, whose counts are known, or sums of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nbdmirror.disk.bitmap import CELL_SHIFTS, DirtyBitmap
from nbdmirror.disk.claim import Claim

CELLS_MAX = 256
ZERO_GRANULES_MAX = 1 << 23
"""1 MiB of bits."""


@dataclass(frozen=True, slots=True)
class DiskMap:
    """One number for each cell, all in bytes. The kinds may overlap: what a guest changes during
    its copy is dirty and in flight, and what is in flight is not flushed either."""

    lengths: list[int]
    dirty: list[int]
    in_flight: list[int]
    unflushed: list[int]
    zero: list[int]


class Cells:
    """The cells of a disk of `size` bytes: `count`, or less if the disk has fewer granules. They
    are equal, but for a unit."""

    def __init__(self, size: int, granularity: int, count: int) -> None:
        granules = -(-size // granularity)
        shift = next(shift for shift in CELL_SHIFTS if not shift or granules >> shift >= count)
        units = -(-granules >> shift)
        unit_bytes = granularity << shift
        self._unit_shift = shift
        self._count = min(count, units)
        self._units = units
        self._unit_bytes = unit_bytes
        self.ends = [
            min(size, (number * units // self._count) * unit_bytes)
            for number in range(1, self._count + 1)
        ]

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in zip([0, *self.ends], self.ends, strict=False)]

    def sum_of(self, bitmaps: Iterable[DirtyBitmap]) -> list[int]:
        """Bytes that are dirty in the bitmaps, which have the granularity of the cells."""
        found = [0] * self._count
        for bitmap in bitmaps:
            counts = bitmap.bytes_in_cells(self.ends, self._unit_shift)
            found = [one + other for one, other in zip(found, counts, strict=True)]
        return [min(one, length) for one, length in zip(found, self.lengths, strict=True)]

    def bytes_of(self, claims: Iterable[Claim]) -> list[int]:
        """Bytes in claims. Their number is bounded, and so is that of the cells that they cover."""
        found = [0] * self._count
        for claim in claims:
            start = claim.offset
            cell = self._cell_at(start)
            while start < claim.end and cell < self._count:
                end = min(claim.end, self.ends[cell])
                found[cell] += end - start
                start, cell = end, cell + 1
        return found

    def _cell_at(self, offset: int) -> int:
        """The cell whose unit has `offset`: the inverse of the ends' rule."""
        unit = offset // self._unit_bytes
        return ((unit + 1) * self._count - 1) // self._units


def map_of(
    cells: Cells,
    *,
    dirty: DirtyBitmap,
    in_flight: list[int],
    unflushed: Iterable[DirtyBitmap] = (),
    zeroes: Zeroes,
) -> DiskMap:
    """`in_flight`: a number for each cell."""
    return DiskMap(
        lengths=cells.lengths,
        dirty=cells.sum_of((dirty,)),
        in_flight=in_flight,
        unflushed=cells.sum_of(unflushed),
        zero=zeroes.in_cells(cells),
    )


class Zeroes:
    """Where the target was zeroed and nothing else was written there since, as far as that fits
    into a bounded number of granules. Used under Tracker's lock, or while the tracker has nothing
    in flight."""

    def __init__(self, size: int, granularity: int) -> None:
        while size // granularity > ZERO_GRANULES_MAX:
            granularity *= 2
        self._size = size
        self._granularity = granularity
        self._bits: DirtyBitmap | None = None
        """None: nothing was zeroed."""

    def add(self, offset: int, length: int) -> None:
        """The range was zeroed; whole granules of it count."""
        granularity, end = self._granularity, offset + length
        start = -(-offset // granularity) * granularity
        if end < self._size:
            end -= end % granularity
        if start < end:
            self._bits = self._bits or DirtyBitmap(self._size, granularity)
            self._bits.mark(start, end - start)

    def remove(self, offset: int, length: int) -> None:
        """The range may be anything."""
        if self._bits is not None and self._bits.is_dirty(offset, length):
            start = offset - offset % self._granularity
            end = -(-(offset + length) // self._granularity) * self._granularity
            self._bits.clear(start, end - start)

    def in_cells(self, cells: Cells) -> list[int]:
        if self._bits is None:
            return [0] * len(cells.ends)
        found = self._bits.bytes_in_cells(cells.ends, 0)
        # A granule may be longer than a cell's last part.
        return [min(one, length) for one, length in zip(found, cells.lengths, strict=True)]
