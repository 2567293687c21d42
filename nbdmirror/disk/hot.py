"""HotGranules: what guests change again soon after it was copied, so that a copy can leave it for
last.

Guests mark nothing for this. What the copier took some time ago was clean then: what is dirty there
now is hot, and what is clean is not. So a look at the dirty bits of such a range is all that is
needed (`look`).

Memory: a page of bits for each region (bitmap.py) with hot granules, and PAGES_MAX of them at most,
however large the disk is and however small its granules. Beyond that nothing more gets hot, and is
copied as before. Hot granules change the order of copies alone: no bit is cleared because of them,
and nothing is skipped.

`look` and `next_run` are for the thread that claims, `is_hot` is for any thread.
"""

from __future__ import annotations

from bitarray import bitarray
from bitarray.util import zeros

from nbdmirror.disk.bitmap import REGION_SHIFT, DirtyBitmap

PAGES_MAX = 256
"""1 MiB of bits: exact for 512 GiB in granules of 64 KiB."""

REGIONS_MAX = 256
"""Regions that one `look` takes, 0.4 ms. A range of more was a hole, or nothing was dirty in it."""


class HotGranules:
    """The hot granules of a disk. Offsets and lengths are bytes."""

    def __init__(self, dirty: DirtyBitmap) -> None:
        self._dirty = dirty
        self._pages: dict[int, bitarray] = {}
        """By region."""
        self._granules = 0

    @property
    def size(self) -> int:
        """Bytes that are hot."""
        return self._granules << self._dirty._shift

    def bytes_in(self, offset: int, length: int) -> int:
        """Bytes of a range of whole granules that are hot."""
        first, end = self._dirty._covered(offset, length)
        count = 0
        for region, page in self._pages.items():
            base = region << REGION_SHIFT
            if first < base + len(page) and base < end:
                count += page.count(1, max(first - base, 0), min(end - base, len(page)))
        return count << self._dirty._shift

    def copy(self) -> HotGranules:
        """As it is now."""
        other = HotGranules(self._dirty)
        other._pages = {region: page.copy() for region, page in self._pages.items()}
        other._granules = self._granules
        return other

    def look(self, offset: int, length: int) -> None:
        """All of this range was clean some time ago, or was hot and was left out."""
        first, end = self._dirty._covered(offset, length)
        start, stop = first >> REGION_SHIFT, -(-end >> REGION_SHIFT)
        if first >= end or stop - start > REGIONS_MAX:
            return
        touched, used = self._dirty._touched, self._dirty._is_used
        for region in range(start, stop):
            if not (touched[region] or used[region] or region in self._pages):
                continue  # nothing is dirty there, or has just become so
            base = region << REGION_SHIFT
            bits = self._dirty._page(region)
            self._look_at(region, bits, max(first - base, 0), min(end - base, len(bits)))

    def _look_at(self, region: int, bits: bitarray, first: int, end: int) -> None:
        found = bits[first:end]
        page = self._pages.get(region)
        if page is None:
            if not found.any() or len(self._pages) >= PAGES_MAX:
                return
            page = self._pages[region] = zeros(len(bits), "little")
        self._granules += found.count() - page.count(1, first, end)
        page[first:end] = found
        if not page.any():
            del self._pages[region]

    def next_run(self, offset: int, length_max: int) -> tuple[int, int] | None:
        """As DirtyBitmap.next_run, without what is hot. One operation on bits for each region, and
        none for each hot granule."""
        dirty = self._dirty
        first = self._find(-(-offset >> dirty._shift))
        if first < 0:
            return None
        stop = min(dirty._count, first + max(1, length_max >> dirty._shift))
        clean = dirty._bits.find(0, first, stop)
        end = self._before_hot(first, stop if clean < 0 else clean)
        start = first << dirty._shift
        return start, min(end << dirty._shift, dirty.size) - start

    def _find(self, first: int) -> int:
        """The first granule at or after `first` that is dirty and not hot; -1 if there is none."""
        dirty = self._dirty
        for region in dirty._regions(first >> REGION_SHIFT):
            base = region << REGION_SHIFT
            start, stop = max(first, base), min(dirty._count, base + (1 << REGION_SHIFT))
            page = self._pages.get(region)
            if page is None:
                found = dirty._bits.find(1, start, stop)
            else:
                found = (dirty._page(region) & ~page).find(1, start - base, stop - base)
                found += base if found >= 0 else 0
            if found >= 0:
                return found
        return -1

    def _before_hot(self, first: int, end: int) -> int:
        """The first hot granule of these, or `end`."""
        for region in range(first >> REGION_SHIFT, -(-end >> REGION_SHIFT)):
            base = region << REGION_SHIFT
            if (page := self._pages.get(region)) is not None:
                found = page.find(1, max(first - base, 0), min(end - base, len(page)))
                if found >= 0:
                    return base + found
        return end

    def is_hot(self, offset: int, length: int) -> bool:
        """Whether any granule that the range touches is hot."""
        if not length or not self._pages:
            return False
        shift = self._dirty._shift
        first, end = offset >> shift, ((offset + length - 1) >> shift) + 1
        return self._before_hot(first, end) < end
