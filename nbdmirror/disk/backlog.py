"""Backlog: what of one moment a mirror's target does not have on its storage yet.

At that moment all that guests had been answered, and that was not on the target's storage, was
dirty, or claimed, or not flushed: a guest's write marks before it is answered, and a range is among
the unflushed before it leaves the dirty ones (tracker.py). So the target's storage has all of that
moment as soon as

  - what was dirty then has been claimed since, and those claims have ended well, as have those that
    were under way: a claim looks at the source after it has cleared the bits;
  - after that a flush has begun, and it and each flush that was under way beside it has ended well:
    a server that has reported a failed write-back once does not report it to the next flush.

What fails is dirty again and part of the backlog again, so that the moment waits for it. What
guests write meanwhile is no part: also under a steady load a backlog becomes nothing.

Under Tracker's lock.
"""

from __future__ import annotations

from collections.abc import Iterable

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim, Range


class Backlog:
    """Nothing, until `begin`. All that is dirty in it is dirty in the mirror's bitmap too."""

    def __init__(self, size: int, granularity: int) -> None:
        self._dirty = DirtyBitmap(size, granularity)
        """What was dirty, and is not claimed yet."""
        self._claims: set[Claim] = set()
        """Those that own some of it."""
        self._flushes: list[DirtyBitmap] | None = []
        """What flushes under way cover that are waited for; None: a flush has yet to begin."""

    def begin(
        self,
        dirty: DirtyBitmap,
        claims: Iterable[Claim],
        unflushed: DirtyBitmap,
        flushing: Iterable[DirtyBitmap],
    ) -> None:
        """The moment is now, whatever it was before. For 16 TiB that are dirty all over this takes
        60 ms; such a backlog is minutes of copying."""
        self._dirty.merge(dirty)
        self._claims = set(claims)
        is_sent = unflushed.is_empty and self.is_copied
        self._flushes = list(flushing) if is_sent else None

    @property
    def is_copied(self) -> bool:
        """The target has all of it, perhaps not on its storage."""
        return not self._claims and self._dirty.is_empty

    @property
    def needs_flush(self) -> bool:
        """A flush that begins now, and no other, brings all of it to the target's storage."""
        return self._flushes is None and self.is_copied

    @property
    def is_durable(self) -> bool:
        """The target's storage has all of it."""
        return self._flushes == [] and self.is_copied

    def took(self, claim: Claim, offset: int, length: int) -> None:
        """Of a claim that begins the granules that lie wholly in the range are clean now."""
        if self._dirty.is_dirty(claim.offset, claim.length):
            self._dirty.clear(offset, length)
            self._claims.add(claim)

    def gave_back(self, claim: Claim, parts: Iterable[Range]) -> None:
        """Parts of a claim are dirty again."""
        if claim in self._claims:
            for offset, length in parts:
                self._dirty.mark(offset, length)

    def left(self, claim: Claim) -> None:
        """A claim has ended; if not well, it gave back before."""
        self._claims.discard(claim)

    def flush_begins(self, flushing: Iterable[DirtyBitmap]) -> None:
        """`flushing`: this one, and those under way beside it."""
        if self.needs_flush:
            self._flushes = list(flushing)

    def flush_ended(self, covered: DirtyBitmap) -> None:
        """Well."""
        if self._flushes:
            self._flushes = [bitmap for bitmap in self._flushes if bitmap is not covered]

    def may_be_lost(self, bitmap: DirtyBitmap) -> None:
        """The target may not have it any more: it is dirty again."""
        self._dirty.merge(bitmap)
        self._flushes = None

    def all_may_be_lost(self) -> None:
        """The same of the whole disk."""
        self._dirty.mark_all()
        self._flushes = None
