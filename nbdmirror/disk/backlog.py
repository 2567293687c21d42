"""Backlog: the part of one moment's data that a mirror's target does not have on its storage yet.

At that moment all answered writes that were not on the target's storage were dirty, or claimed, or
not flushed: a guest's write marks before it is answered, and a range is unflushed before it leaves
the dirty ones (tracker.py). So the target's storage has all data of that moment as soon as

  - what was dirty then has been claimed since, and those claims have ended well, and so have the
    claims that were in progress: a claim reads the source after it has cleared the bits;
  - after that a flush has begun, and it, and each flush in progress beside it, has ended well: a
    server reports a failed write-back to one flush only.

A range that fails is dirty again and part of the backlog again, so the moment waits for it. Guests'
later writes are not part of it: so a backlog becomes empty under a steady load too.

Used under Tracker's lock.
"""

from __future__ import annotations

from collections.abc import Iterable

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim, Range


class Backlog:
    """Empty until `begin`. Every granule that is dirty here is dirty in the mirror's bitmap too.
    Offsets and lengths are bytes."""

    def __init__(self, size: int, granularity: int) -> None:
        self._dirty = DirtyBitmap(size, granularity)
        """Granules that were dirty, and are not claimed yet."""
        self._claims: set[Claim] = set()
        """Claims that own a part of the backlog."""
        self._flushes: list[DirtyBitmap] | None = []
        """The flushes in progress that the backlog waits for; None: a flush has yet to begin."""

    def begin(
        self,
        dirty: DirtyBitmap,
        claims: Iterable[Claim],
        unflushed: DirtyBitmap,
        flushing: Iterable[DirtyBitmap],
    ) -> None:
        """Begin a new backlog, of this moment. For 16 TiB that are dirty everywhere this takes
        60 ms; such a backlog is minutes of copying."""
        self._dirty.merge(dirty)
        self._claims = set(claims)
        is_sent = unflushed.is_empty and self.is_copied
        self._flushes = list(flushing) if is_sent else None

    @property
    def is_copied(self) -> bool:
        """The target has all of it, perhaps not on its storage yet."""
        return not self._claims and self._dirty.is_empty

    @property
    def needs_flush(self) -> bool:
        """A flush must begin now, to bring all of it to the target's storage."""
        return self._flushes is None and self.is_copied

    @property
    def is_durable(self) -> bool:
        """The target's storage has all of it."""
        return self._flushes == [] and self.is_copied

    def took(self, claim: Claim, offset: int, length: int) -> None:
        """A claim has begun: the granules that lie wholly in the range are clean now."""
        if self._dirty.is_dirty(claim.offset, claim.length):
            self._dirty.clear(offset, length)
            self._claims.add(claim)

    def gave_back(self, claim: Claim, parts: Iterable[Range]) -> None:
        """Parts of a claim are dirty again."""
        if claim in self._claims:
            for offset, length in parts:
                self._dirty.mark(offset, length)

    def left(self, claim: Claim) -> None:
        """A claim has ended; after a failure it has called `gave_back` before."""
        self._claims.discard(claim)

    def flush_begins(self, flushing: Iterable[DirtyBitmap]) -> None:
        """A flush begins. `flushing`: this flush, and those in progress beside it."""
        if self.needs_flush:
            self._flushes = list(flushing)

    def flush_ended(self, covered: DirtyBitmap) -> None:
        """A flush has ended well."""
        if self._flushes:
            self._flushes = [bitmap for bitmap in self._flushes if bitmap is not covered]

    def may_be_lost(self, bitmap: DirtyBitmap) -> None:
        """The target may have lost these granules: they are dirty again."""
        self._dirty.merge(bitmap)
        self._flushes = None

    def all_may_be_lost(self) -> None:
        """The target may have lost everything."""
        self._dirty.mark_all()
        self._flushes = None
