"""DirtyBitmap: a set of granules. No locks, no I/O, no clock.

A granule is `granularity` bytes (a power of two) of the disk, the last one possibly short. All
arguments and results are in bytes; granule numbers are known here alone, and in what is built of
these bits: fine.py and hot.py.

Threads: `mark` and each clear are one C call on the bit array, which is atomic under the GIL. So
guest threads can mark without a lock while the copier clears: each bit is set or cleared, never
torn, and neighbours in the same byte are not disturbed.

A disk of 16 TiB has 32 MiB of bits, so no call walks all of them to find or count the dirty ones.
The bits of one page are a region. The number of set bits of each region is known (`_counts`),
unless the region was touched since. A change of a bit is followed by a mark that the region was
touched; a count first removes that mark and then counts. So a region either has its known count, or
is touched, or is about to be marked as touched. `dirty_granules`, `is_empty` and everything that
uses them are for one thread at a time; all other calls are for any thread.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator, Sequence

from bitarray import bitarray
from bitarray.util import count_and, zeros

from nbdmirror.errors import CommandError, ConfigError

GRANULARITY_MIN = 512
GRANULARITY_MAX = 64 << 20
"""The limits of QEMU's blockdev-mirror."""

GRANULARITY_DEFAULT = 64 << 10
"""QEMU's default if the target does not report a cluster size
(bdrv_get_default_bitmap_granularity)."""

BITS_BYTES_MAX = 512 << 20
"""Largest bitmap: 2**32 granules, 256 TiB in units of 64 KiB. QEMU's bound for a bitmap in qcow2
(BME_MAX_PHYS_SIZE). A mirror has several bitmaps."""

_PAGE_BITS = mmap.PAGESIZE * 8
REGION_SHIFT = _PAGE_BITS.bit_length() - 1
_SUM_SHIFT = 6
"""The counts of so many regions, as a power of two, have one sum."""
CELL_SHIFTS = (REGION_SHIFT + _SUM_SHIFT, REGION_SHIFT, 0)
"""What `bytes_in_cells` can count with: granules that have one number, as a power of two."""
_RECOUNTED_MAX = 64
"""Regions that `bytes_in_cells` counts again: 0.1 ms."""


def check_granularity(granularity: int, parameter: str = "granularity") -> None:
    """Raise ConfigError unless it is a power of two within QEMU's limits."""
    if not GRANULARITY_MIN <= granularity <= GRANULARITY_MAX:
        raise ConfigError(f"Parameter '{parameter}' expects a value in range [512B, 64MB]")
    if granularity & (granularity - 1):
        raise ConfigError(f"Parameter '{parameter}' expects a power of 2")


def check_bits(size: int, granularity: int) -> None:
    """Raise CommandError if a bitmap of a disk of `size` bytes would be too large."""
    least = -(-size // (BITS_BYTES_MAX * 8))
    if granularity < least:
        raise CommandError(
            f"Parameter 'granularity' expects at least {1 << (least - 1).bit_length()} for a disk "
            f"of {size} bytes"
        )


class DirtyBitmap:
    """The dirty granules of a disk of `size` bytes, all clean at first. `granularity` is a power of
    two, at least 512.

    Memory: one bit for each granule, in anonymous pages, which exist only after a write: at most
    32 MiB for 16 TiB at 64 KiB, almost nothing while clean. Or `pages` of the caller, for example a
    mapped file: `bytes_of(size, granularity)` bytes, all zero.
    """

    __slots__ = (
        "_bits",
        "_count",
        "_counts",
        "_dirty_granules",
        "_is_private",
        "_is_used",
        "_pages",
        "_shift",
        "_sums",
        "_touched",
        "granularity",
        "size",
    )

    def __init__(
        self,
        size: int,
        granularity: int,
        pages: mmap.mmap | None = None,
        *,
        is_private: bool | None = None,
    ) -> None:
        """`is_private`: the caller's pages are anonymous, and no other process has them."""
        self.size = size
        self.granularity = granularity
        self._shift = granularity.bit_length() - 1
        self._count = -(-size // granularity)
        self._is_private = pages is None if is_private is None else is_private
        # Private: reads of shared pages take memory as well, and MADV_DONTNEED clears nothing.
        self._pages = pages or mmap.mmap(
            -1, bytes_of(size, granularity), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        # Bits past `_count` in the last byte stay zero: every call is bounded by `_count`.
        self._bits = bitarray(buffer=self._pages, endian="little")
        regions = -(-self._count >> REGION_SHIFT)
        self._touched, self._is_used = zeros(regions, "little"), zeros(regions, "little")
        self._counts = array("L", bytes(regions * array("L").itemsize))
        self._sums = array("L", bytes(((regions >> _SUM_SHIFT) + 1) * array("L").itemsize))
        self._dirty_granules = 0
        """The sum of `_counts`, and of `_sums`."""

    def mark(self, offset: int, length: int) -> None:
        """Make every granule that the range touches dirty."""
        if not length:
            return
        first = offset >> self._shift
        last = (offset + length - 1) >> self._shift
        if first == last:
            self._bits[first] = 1
            self._touched[first >> REGION_SHIFT] = 1
        else:
            self._bits[first : last + 1] = 1
            self._touch(first, last + 1)

    def mark_all(self) -> None:
        """Make every granule dirty."""
        self._bits[: self._count] = 1
        self._touch(0, self._count)

    def clear(self, offset: int, length: int) -> None:
        """Make every granule that lies wholly in the range clean. The disk's short last granule
        counts as whole if the range reaches the disk's end."""
        first, last = self._covered(offset, length)
        start = first
        if last - first >= _PAGE_BITS and self._is_private:
            first, last = self._clear_pages(first, last)
        if first < last:
            self._bits[first:last] = 0
        self._touch(start, last)

    def _touch(self, first: int, end: int) -> None:
        """After a change of bits from `first` to before `end`."""
        if first < end:
            self._touched[first >> REGION_SHIFT : ((end - 1) >> REGION_SHIFT) + 1] = 1

    def _covered(self, offset: int, length: int) -> tuple[int, int]:
        """The granules that lie wholly in the range: the first one, and the end after the last."""
        end = offset + length
        return -(-offset >> self._shift), self._count if end >= self.size else end >> self._shift

    def _clear_pages(self, first: int, last: int) -> tuple[int, int]:
        """Clear whole pages by returning them to the kernel: a long hole takes no memory after it
        was copied. A concurrent mark comes before or after, as with any clear. Clears the head too,
        and returns the tail, which is left to clear."""
        start = -(-first // _PAGE_BITS) * _PAGE_BITS
        stop = last // _PAGE_BITS * _PAGE_BITS
        if start < stop:
            self._bits[first:start] = 0
            self._pages.madvise(mmap.MADV_DONTNEED, start // 8, (stop - start) // 8)
            first = stop
        return first, last

    def clear_all(self) -> None:
        """Make every granule clean."""
        self.clear(0, self.size)

    def clear_used(self) -> None:
        """Make every granule clean. Only regions that may have dirty granules are touched, and no
        page is returned to the kernel: for a bitmap that is used again soon, by nobody now."""
        self.subtract(self)

    def close(self) -> None:
        """Stop using the bitmap. (A mark that comes too late does no harm.)"""

    def copy(self) -> DirtyBitmap:
        """A copy in private memory."""
        other = DirtyBitmap(self.size, self.granularity)
        other.merge(self)
        return other

    def merge(self, other: DirtyBitmap) -> None:
        """Make dirty what is dirty in `other`, which may have another granularity."""
        if (other.size, other.granularity) == (self.size, self.granularity):
            for region in other._regions():
                page = self._page(region)
                page |= other._page(region)  # one call, as every change of bits
                self._touched[region] = 1
            return
        offset = 0
        while run := other.next_run(offset, other.size):
            offset = run[0] + run[1]
            DirtyBitmap.mark(self, *run)

    def to_bytes(self) -> bytes:
        """One bit for each granule, the first ones in the first byte's low bits; `bytes_of`
        bytes."""
        return bytes(self._pages)

    def merge_bytes(self, content: bytes) -> None:
        """Make dirty what is dirty in `content`, from `to_bytes` of a bitmap of the same size and
        granularity. Raises ValueError if `content` does not fit."""
        if len(content) != bytes_of(self.size, self.granularity):
            raise ValueError(f"{len(content)} bytes of bits, where {len(self._pages)} are needed")
        other = bitarray(buffer=content, endian="little")
        if other.find(1, self._count) >= 0:
            raise ValueError("bits behind the disk's end are set")
        self._bits |= other
        self._touch(0, self._count)

    def subtract(self, other: DirtyBitmap) -> None:
        """Make clean what is dirty in `other`, which has the same granularity."""
        for region in other._regions():
            page = self._page(region)
            page &= ~other._page(region)
            self._touched[region] = 1

    def common_bytes(self, other: DirtyBitmap) -> int:
        """Bytes in granules that are dirty in both bitmaps, which have the same granularity."""
        count = sum(count_and(self._page(r), other._page(r)) for r in other._regions())
        return self._bytes_of(count, other._is_last_dirty)

    def bytes_in(self, offset: int, length: int) -> int:
        """Bytes in dirty granules of the range, which has whole granules."""
        if not length:
            return 0
        last = (offset + length - 1) >> self._shift
        count = self._bits.count(1, offset >> self._shift, last + 1)
        return self._bytes_of(count, last == self._count - 1)

    def bytes_in_cells(self, ends: Sequence[int], unit_shift: int) -> list[int]:
        """Bytes in dirty granules of each of some adjacent cells, which `ends` has the ends of. The
        first one begins at 0. A cell has whole units of 2**`unit_shift` granules, one of
        CELL_SHIFTS.

        For the thread of `dirty_granules`. With larger units than granules the time is bounded:
        many regions that were touched since the last count have some of them the counts of then."""
        counts = self._sums if unit_shift > REGION_SHIFT else self._counts
        if unit_shift:
            self._count_touched(_RECOUNTED_MAX)
        found, start = [], 0
        for end in ends:
            stop = -(-end >> self._shift)
            if unit_shift:
                count = sum(counts[start >> unit_shift : -(-stop >> unit_shift)])
            else:
                count = self._bits.count(1, start, stop)
            found.append(self._bytes_of(count, stop == self._count))
            start = stop
        return found

    def next_run(self, offset: int, length_max: int) -> tuple[int, int] | None:
        """The first dirty run of whole granules at or after `offset`: its offset and length in
        bytes, cut at the disk's end and at `length_max` (at least one granule). None if nothing is
        dirty."""
        first = self._find(-(-offset >> self._shift))
        if first < 0:
            return None
        stop = min(self._count, first + max(1, length_max >> self._shift))
        last = self._bits.find(0, first, stop)
        start = first << self._shift
        end = min((stop if last < 0 else last) << self._shift, self.size)
        return start, end - start

    def is_dirty(self, offset: int, length: int) -> bool:
        """Whether any granule that the range touches is dirty."""
        if not length:
            return False
        first = offset >> self._shift
        last = (offset + length - 1) >> self._shift
        return self._bits.find(1, first, last + 1) >= 0

    def next_clean(self, offset: int, length: int) -> int | None:
        """The begin of the first clean granule that the range touches; None if all are dirty."""
        if not length:
            return None
        last = (offset + length - 1) >> self._shift
        found = self._bits.find(0, offset >> self._shift, last + 1)
        return found << self._shift if found >= 0 else None

    def _find(self, first: int) -> int:
        """The first dirty granule at or after `first`; -1 if none is dirty."""
        for region in self._regions(first >> REGION_SHIFT):
            start = max(first, region << REGION_SHIFT)
            found = self._bits.find(1, start, min(self._count, (region + 1) << REGION_SHIFT))
            if found >= 0:
                return found
        return -1

    def _regions(self, region: int = 0) -> Iterator[int]:
        """The regions from `region` on that may have dirty granules."""
        used, touched = self._is_used, self._touched
        count = len(used)
        while region < count:
            one, other = used.find(1, region), touched.find(1, region)
            region = min(one, other) if min(one, other) >= 0 else max(one, other)
            if region < 0:
                return
            yield region
            region += 1

    def _page(self, region: int) -> bitarray:
        """The bits of the region, not a copy."""
        start = region * mmap.PAGESIZE
        part = memoryview(self._pages)[start : start + mmap.PAGESIZE]
        return bitarray(buffer=part, endian="little")

    @property
    def is_empty(self) -> bool:
        """No granule is dirty."""
        return self.dirty_granules == 0

    @property
    def dirty_granules(self) -> int:
        """The number of dirty granules; counts only regions that were touched."""
        self._count_touched(len(self._counts))
        return self._dirty_granules

    def _count_touched(self, regions_max: int) -> None:
        touched = self._touched
        region = touched.find(1)
        while region >= 0 and regions_max:
            regions_max -= 1
            self._is_used[region] = 1  # while it is not touched, and not counted yet
            touched[region] = 0
            stop = min(self._count, (region + 1) << REGION_SHIFT)
            count = self._bits.count(1, region << REGION_SHIFT, stop)
            change = count - self._counts[region]
            self._dirty_granules += change
            self._counts[region] = count
            self._sums[region >> _SUM_SHIFT] += change
            self._is_used[region] = count > 0
            region = touched.find(1, region + 1)

    @property
    def dirty_bytes(self) -> int:
        """Bytes in dirty granules; the short last granule counts with its real length."""
        return self._bytes_of(self.dirty_granules, True)

    def _bytes_of(self, granules: int, has_last: bool) -> int:
        """Bytes of so many dirty granules. `has_last`: the disk's last granule is one of them if it
        is dirty."""
        dirty = granules << self._shift
        if dirty and has_last and self._is_last_dirty:
            dirty -= -self.size & (self.granularity - 1)
        return dirty

    @property
    def _is_last_dirty(self) -> bool:
        return bool(self._count and self._bits[self._count - 1])


def bytes_of(size: int, granularity: int) -> int:
    """The bytes that the bits of such a bitmap take; at least one."""
    granules = -(-size // granularity)
    return max(1, -(-granules // 8))
