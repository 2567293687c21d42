"""Remainder: what of one moment a mirror's target did not have on its storage, in parts of
granules. Kept where it outlives the process, so that after a kill the parts alone are sent again.

THE INVARIANT, at every moment, if there is a remainder:

    where the target's storage may differ from the source, a part of the remainder covers it,
    or the range of a guest's change whose number is at least the remainder's position.

The disk's journal numbers the changes before they begin, and keeps the last ones. A remainder is
put when a flush of the target has ended well, and no other flush was in progress beside it. Then
each change with a lower number than the position

  - is in progress, and its range is in the remainder;
  - or has marked, so it is dirty, and its parts are in the remainder: the position is taken first,
    and the dirty parts are read afterwards;
  - or was claimed since the flush began, or was in flight at that moment: SentParts has noted the
    claim's parts, and they are in the remainder;
  - or was copied before the flush began, so the target's storage has it.

Until the next one is put only guests' changes add to what may differ. Whatever else does (mark_all)
withdraws the remainder first. A flush that fails takes nothing back: what it covered is in the
remainder, or came later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim, Range
from nbdmirror.disk.fine import FineBitmap

PARTS_MAX = 2048
"""With more parts no remainder is put at a flush: to collect them takes a microsecond for each,
with the GIL held. The one before stays, as long as the journal has all changes since."""


class Remainder(Protocol):
    """For any thread, one at a time. None of the calls waits."""

    def position(self) -> tuple[int, list[Range]]:
        """A number, and ranges: each change with a lower number is in progress, and in one of the
        ranges, or has ended, and is marked."""

    def put(self, position: int, parts: Sequence[Range]) -> None:
        """Replace the remainder in one step; too many parts leave none."""

    def withdraw(self) -> None:
        """From now on there is none."""

    def close(self) -> None:
        """The mirror has ended."""


class SentParts:
    """The parts that were sent to the target since its last flush began. Used under Tracker's
    lock."""

    def __init__(self) -> None:
        self._parts: list[Range] | None = None
        """None: not known, or too many."""
        self._before: list[Range] | None = None
        """What `flush` covers."""
        self._flush: DirtyBitmap | None = None

    def add(self, parts: Iterable[Range]) -> None:
        """These parts are about to be sent."""
        if self._parts is not None:
            self._parts += parts
            if len(self._parts) > PARTS_MAX:
                self._parts = None

    def add_claim(self, claim: Claim) -> None:
        """The parts of this claim are about to be sent."""
        if self._parts is not None:  # else nobody asks: each claim of each mirror comes by here
            self.add(claim.parts_in(claim.offset, claim.end))

    def flush_begins(self, flush: DirtyBitmap, in_flight: Iterable[Claim]) -> None:
        """A flush begins, and no other is in progress."""
        self._flush, self._before, self._parts = flush, self._parts, []
        for claim in in_flight:
            self.add_claim(claim)

    def flush_failed(self) -> None:
        """A flush has failed, or has ended beside another one, which the target may have told of
        an error of this one: all that was sent counts as not flushed."""
        if self._flush is not None:
            before, self._before, self._flush = self._before, None, None
            parts, self._parts = self._parts, before
            if parts is None:
                self._parts = None
            else:
                self.add(parts)

    def flush_ended(self, flush: DirtyBitmap, dirty: FineBitmap) -> list[Range] | None:
        """A flush has ended well, and no other is in progress. Returns all parts that the target's
        storage may lack; None if they are not known, or too many."""
        if flush is not self._flush:
            return None
        self._flush = self._before = None
        if self._parts is None:
            return None
        parts = dirty.parts(PARTS_MAX - len(self._parts))
        return None if parts is None else self._parts + parts
