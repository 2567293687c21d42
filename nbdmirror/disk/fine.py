"""FineBitmap: a dirty bitmap that also knows which parts of its granules are dirty.

The bits are those of DirtyBitmap, with the same meaning. In addition a dirty granule may have
*details*: the units of it that a write has touched. So a guest's write of 4 KiB is sent as 4 KiB,
although the granule has 64 KiB. Details exist only for dirty granules, and their number is bounded:
beyond the bound whole granules are dirty, as without details.

Threads. `mark` is for guests' threads and takes no lock: one atomic call leaves a note, or marks
whole granules if there are too many notes; then the bit is set. Every other call that uses details
(`take`, `clear`, `mark_again`, `look`, `parts`) runs under the lock of the bitmap's owner
(Tracker). This is right because of one order on each side:

    a mark      leaves the details first, and sets the bit afterwards;
    a take      clears the bit first, and takes the details afterwards,
                and removes only those that it has seen.

So a detail is never lost under a bit that is set later. If the details are taken between the two
steps of a mark, the taker reads the source afterwards, and so sees the write. The bit that is then
set has no details, and such a granule is dirty as a whole.

At first everything is *coarse*: guests leave no notes, and granules are taken as a whole. So a disk
that is dirty from end to end costs a guest no more than a plain bitmap. After `refine` this changes
in two steps. Guests leave notes at once. Parts are taken after each write that began earlier has
set its bit; what is dirty at that moment is dirty as a whole. A guest that writes very often makes
everything coarse again for a while: small requests would cost the guest more than they save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nbdmirror.disk.bitmap import REGION_SHIFT, DirtyBitmap
from nbdmirror.disk.claim import Range
from nbdmirror.disk.ledger import Ledger

UNIT_MIN = 512
"""The smallest unit: a sector, of which every guest's write consists."""

NOTES_MAX = 512
"""Notes between two calls of `look`: 10,000 a second. If a guest writes more often, whole granules
are copied: a small request for each write would cost more processor time than the bytes are worth,
and leave less of it to the guest."""

COARSE_LOOKS = 20
"""After so many calls of `look`, a second, notes are tried again."""

DETAILS_MAX = 1 << 15
"""Granules with details: 8 MiB of memory at most."""

TAKEN_MAX = 64
"""A longer run of dirty granules is taken as a whole."""


class FineBitmap(DirtyBitmap):
    """`bits` with details. From now on only this object marks and clears these bits."""

    __slots__ = (
        "_bits_owner",
        "_coarse_looks",
        "_details",
        "_full",
        "_is_coarse",
        "_leaving",
        "_notes",
        "_room",
        "_unit_shift",
        "_whole",
        "noted_bytes",
    )

    def __init__(self, bits: DirtyBitmap, unit: int) -> None:
        """`unit`: bytes, a power of two, at most the granularity. If equal to the granularity, each
        granule is dirty as a whole, without details."""
        super().__init__(bits.size, bits.granularity, bits._pages, is_private=bits._is_private)
        self.noted_bytes = 0
        """Bytes that guests have written, each as often as it was written; an estimate while
        everything is coarse."""
        self._bits_owner = bits
        self._is_coarse = True
        """Every dirty granule is dirty as a whole."""
        self._coarse_looks: int | None = None
        """Calls of `look` until guests leave notes again; None: `refine` was not called."""
        self._leaving: frozenset[int] = frozenset()
        """Writes that may leave no notes."""
        self._unit_shift = unit.bit_length() - 1
        self._full = (1 << (bits.granularity // unit)) - 1
        self._whole = DirtyBitmap(bits.size, bits.granularity)
        """Granules that are dirty as a whole, whatever their details are."""
        self._details: dict[int, int] = {}
        """By granule: a bit for each dirty unit."""
        self._notes: list[Range] | None = None
        self._room = NOTES_MAX

    def mark(self, offset: int, length: int) -> None:
        """A guest's write of the range, in bytes, has ended. From any thread."""
        if not length:
            return
        notes = self._notes
        if notes is None:
            self.noted_bytes += length
        elif len(notes) < self._room:  # several threads at once may add a few more: no harm
            notes.append((offset, length))
        else:
            self.noted_bytes += length
            self._whole.mark(offset, length)
        first = offset >> self._shift
        if first == (offset + length - 1) >> self._shift:  # as DirtyBitmap does, without a call
            self._bits[first] = 1
            self._touched[first >> REGION_SHIFT] = 1
        else:
            _mark_bits(self, offset, length)

    def close(self) -> None:
        self._bits_owner.close()

    # Under the owner's lock, or before another thread knows the bitmap.

    @property
    def is_at_rest(self) -> bool:
        """Nothing is dirty, and `look` would do nothing."""
        is_settled = self._coarse_looks is None or not self._is_coarse
        return is_settled and not self._notes and not self.dirty_granules

    def refine(self) -> None:
        """Begin to use details, soon."""
        if self._full > 1:
            self._coarse_looks = 0

    def look(self, guests: Ledger) -> None:
        """Sort the notes, to make room for more. Call this twenty times a second. `guests` knows
        each write from before it begins until it has marked."""
        if self._notes is None:
            if self._coarse_looks:
                self._coarse_looks -= 1
            elif self._coarse_looks is not None:
                self._begin_notes()
                self._leaving = guests.writes()  # in this order
            return
        is_rushed = len(self._notes) >= self._room
        self._sort_notes()
        self._room = NOTES_MAX
        if is_rushed:
            self._coarsen()
        elif self._is_coarse:
            self._leaving = guests.writes_left(self._leaving)
            if not self._leaving:
                self._whole.merge(self)
                self._is_coarse = False

    def succeed(self, other: FineBitmap) -> None:
        """Take the place of `other` in the ledger, clean, and with details from the beginning if
        `other` has them. No request that marks is in progress."""
        if other._notes is not None:
            self._is_coarse = False
            self._begin_notes()
        self._coarse_looks = other._coarse_looks

    def clear_used(self) -> None:
        self.noted_bytes += sum(length for _, length in self._notes or ())
        self._coarsen()
        self._coarse_looks = None
        super().clear_used()

    def _begin_notes(self) -> None:
        self._notes = []

    def _coarsen(self) -> None:
        """Drop all notes and details. A late note of a guest is dropped too: its bit is coarse, and
        the next notes wait for its write."""
        self._is_coarse, self._notes, self._coarse_looks = True, None, COARSE_LOOKS
        self._details.clear()
        self._whole.clear_all()

    def mark_all(self) -> None:
        if not self._is_coarse:
            self._whole.mark_all()
        super().mark_all()

    def merge(self, other: DirtyBitmap) -> None:
        if not self._is_coarse:
            self._whole.merge(other)
        super().merge(other)

    def merge_bytes(self, content: bytes) -> None:
        if not self._is_coarse:
            self._whole.merge_bytes(content)
        super().merge_bytes(content)

    def mark_again(self, *parts: Range) -> None:
        """Mark parts that were taken and not copied, or that must be copied for another reason than
        a guest's write."""
        for offset, length in parts:
            if not self._is_coarse:
                self._detail(offset, length)
            _mark_bits(self, offset, length)

    def clear(self, offset: int, length: int) -> None:
        """Make granules that lie wholly in the range clean, with their details."""
        super().clear(offset, length)
        self._sort_notes()
        first, last = self._covered(offset, length)
        self._forget(first, last)

    def take(self, offset: int, length: int) -> tuple[Range, ...] | None:
        """Make whole granules clean. Returns their dirty parts, ascending and not adjacent; None if
        the whole range was dirty."""
        super().clear(offset, length)
        self._sort_notes()
        first, last = self._covered(offset, length)
        if self._is_coarse or last - first > TAKEN_MAX:
            self._forget(first, last)
            return None
        return self._parts(offset, length, self._take_units)

    def parts_in(self, offset: int, length: int) -> tuple[Range, ...] | None:
        """As `take`, of granules that stay dirty: for a bitmap that no guest marks any more."""
        self._sort_notes()
        if self._is_coarse or length >> self._shift > TAKEN_MAX:
            return None
        return self._parts(offset, length, self._look_at_units)

    def _parts(
        self, offset: int, length: int, units_of: Callable[[int], int]
    ) -> tuple[Range, ...] | None:
        parts: list[Range] = []
        for granule in range(*self._covered(offset, length)):
            for start, end in self._parts_of(granule, units_of(granule)):
                if parts and sum(parts[-1]) == start:
                    start = parts.pop()[0]
                parts.append((start, min(end, self.size) - start))
        return None if parts == [(offset, length)] else tuple(parts)

    def parts(self, most: int) -> list[Range] | None:
        """All dirty parts, which stay dirty; None if they are more than `most`, or if everything is
        coarse."""
        if self._is_coarse or self.dirty_granules > most:
            return None
        self._sort_notes()
        found: list[Range] = []
        offset = 0
        while run := self.next_run(offset, self.size):
            offset = sum(run)
            for granule in range(run[0] >> self._shift, -(-offset >> self._shift)):
                for start, end in self._parts_of(granule, self._look_at_units(granule)):
                    found.append((start, min(end, self.size) - start))
        return found if len(found) <= most else None

    def begin_with(self, parts: Iterable[Range]) -> None:
        """Make these parts dirty, and use details from now on. For a clean bitmap, before guests
        mark it."""
        if self._full > 1:
            self._begin_notes()
            self._is_coarse, self._coarse_looks = False, 0
        self.mark_again(*parts)

    def _look_at_units(self, granule: int) -> int:
        is_whole = self._whole.is_dirty(granule << self._shift, 1)
        return self._full if is_whole else self._details.get(granule, self._full)

    def _take_units(self, granule: int) -> int:
        units = self._details.pop(granule, self._full)
        start = granule << self._shift
        if self._whole.is_dirty(start, 1):  # clear only what was seen
            self._whole.clear(start, self.granularity)
            units = self._full
        return units

    def _parts_of(self, granule: int, units: int) -> list[Range]:
        """Begin and end of each dirty part, in bytes."""
        start = granule << self._shift
        if units == self._full:
            return [(start, start + self.granularity)]
        found = []
        at = 0
        while units:
            clean = (units & -units).bit_length() - 1
            units >>= clean
            dirty = (~units & (units + 1)).bit_length() - 1
            units >>= dirty
            begin = start + ((at + clean) << self._unit_shift)
            found.append((begin, begin + (dirty << self._unit_shift)))
            at += clean + dirty
        return found

    def _forget(self, first: int, last: int) -> None:
        """Drop the details of granules that are copied or overwritten as a whole."""
        if first >= last or self._notes is None:
            return
        start = first << self._shift
        self._whole.clear(start, (last - first) << self._shift)
        if last - first < len(self._details):
            for granule in range(first, last):
                self._details.pop(granule, None)
        else:
            for granule in [g for g in self._details if first <= g < last]:
                del self._details[granule]

    def _sort_notes(self) -> None:
        notes = self._notes
        if notes is None or not (count := len(notes)):
            return
        taken = notes[:count]
        del notes[:count]  # not the list: a guest's thread may hold it
        self._room -= count
        for offset, length in taken:
            self.noted_bytes += length
            self._detail(offset, length)

    def _detail(self, offset: int, length: int) -> None:
        """Add the range, rounded out to units, to the details."""
        first, last = offset >> self._unit_shift, (offset + length - 1) >> self._unit_shift
        shift = self._shift - self._unit_shift
        granule, end = first >> shift, last >> shift
        if granule == end:
            self._add(granule, ((2 << (last - first)) - 1) << (first - (granule << shift)))
            return
        self._add(granule, self._full & (self._full << (first - (granule << shift))))
        self._add(end, (2 << (last - (end << shift))) - 1)
        if end - granule > 1:
            self._whole.mark((granule + 1) << self._shift, (end - granule - 1) << self._shift)

    def _add(self, granule: int, units: int) -> None:
        details = self._details
        if granule in details:
            details[granule] |= units
        elif self._whole.is_dirty(granule << self._shift, 1):
            return  # until it is taken as a whole
        elif len(details) < DETAILS_MAX:
            details[granule] = units
        else:
            self._whole.mark(granule << self._shift, 1)


_mark_bits = DirtyBitmap.mark
