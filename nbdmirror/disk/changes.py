"""Changes: what guests have changed since the last cut, and since the cut before, until its point
is committed.

    guests mark `dirty`  --cut-->  the frozen set  --committed-->  forgotten
                 ^----------------------'--broken

`may_differ` is, at every moment, everything in which the disk may differ from the last committed
point, without guests' writes in progress. The bits of both are in memory of `new_bitmap`, which
may outlive the process: so they alone say what a later process has to send (docs/state.md).

For the event loop's thread; guests mark through the ledger, and save through the frozen set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.fine import FineBitmap
from nbdmirror.disk.frozen import Frozen

Freeze = Callable[[FineBitmap, DirtyBitmap], Frozen]
"""Makes the frozen set of the granules of a point, given with an empty bitmap for those done."""


class MayDiffer(Protocol):
    """What a mirror knows of the differences: a Tracker, or Changes."""

    def may_differ(self) -> DirtyBitmap:
        """A copy of everything in which the disk may differ from the far side's storage, without
        guests' writes in progress."""

    @property
    def is_at_rest(self) -> bool:
        """Nothing may differ, and only a guest's write changes that."""


class Changes:
    """The changes of `disk`, tracked from `begin` to `end`. `unit`: the smallest part of a granule
    that is sent alone, in bytes; 0: whole granules."""

    def __init__(
        self,
        disk: Disk,
        granularity: int,
        new_bitmap: Callable[[int, int], DirtyBitmap] = DirtyBitmap,
        unit: int = 0,
    ) -> None:
        self.disk = disk
        self.size = disk.size
        self.granularity = granularity
        self._unit = unit or granularity
        self._new_bitmap = new_bitmap
        self.dirty = self._fresh()
        """What guests have changed since the last cut."""
        self.frozen: Frozen | None = None
        """The point that is neither committed nor broken."""
        self._next: FineBitmap | None = None
        self._done: DirtyBitmap | None = None

    def begin(self) -> None:
        """Track changes from now on, with details."""
        self.disk.ledger.attach(self.dirty)
        self.dirty.refine()

    def hand_back(self, bitmap: DirtyBitmap) -> None:
        """Stop tracking until `begin`. What may differ is marked in `bitmap`, which guests mark
        too. No point is in progress."""
        assert self.frozen is None
        bitmap.merge(self.dirty)
        self.disk.ledger.detach(self.dirty)
        self.dirty.clear_all()

    def look(self) -> None:
        """Sort the notes of guests' writes. Call this twenty times a second."""
        self.dirty.look(self.disk.ledger)

    def prepare(self) -> None:
        """Allocate what a cut needs, before guests are held."""
        self._next = self._next or self._fresh()
        self._done = self._done or DirtyBitmap(self.size, self.granularity)

    def cut(self, freeze: Freeze) -> Frozen:
        """Begin a point with everything that is dirty. Behind a gate with no changing request in
        progress, after `prepare`; with no point in progress. Does not depend on the disk's size."""
        ledger = self.disk.ledger
        assert ledger.gate is not None and ledger.is_idle, "cut behind a closed gate only"
        assert self.frozen is None, "one point after the other"
        assert self._next is not None and self._done is not None, "prepare first"
        covered, self.dirty, self._next = self.dirty, self._next, None
        self.frozen, self._done = freeze(covered, self._done), None
        self.dirty.succeed(covered)
        ledger.attach(self.dirty)
        ledger.detach(covered)
        self.disk.frozen = self.frozen
        return self.frozen

    def committed(self) -> None:
        """The point is on the far side's storage."""
        covered = self._thaw().covered
        covered.clear_used()
        self._next = covered

    def broken(self) -> None:
        """The point cannot be committed: its granules are dirty again, for the next cut. (What was
        sent of them is not sent again as it was: guests may have overwritten it.)"""
        assert self.frozen is not None
        self.dirty.merge(self.frozen.covered)  # before they leave the frozen set
        self.committed()

    @property
    def noted_bytes(self) -> int:
        """Bytes that guests have written, each as often as it was written."""
        frozen = self.frozen.covered if self.frozen is not None else None
        found = (self.dirty, self._next, frozen)
        return sum(bitmap.noted_bytes for bitmap in found if bitmap is not None)

    def may_differ(self) -> DirtyBitmap:
        """A copy of everything in which the disk may differ from the last committed point."""
        found = self.dirty.copy()
        if self.frozen is not None:
            found.merge(self.frozen.covered)
        return found

    @property
    def is_at_rest(self) -> bool:
        """Everything is committed, and nothing was changed since."""
        return self.frozen is None and self.dirty.is_at_rest

    def end(self) -> None:
        """Stop tracking. A point in progress is given up."""
        if self.frozen is not None:
            self.broken()
        self.disk.ledger.detach(self.dirty)
        for bitmap in (self.dirty, self._next):
            if bitmap is not None:
                bitmap.close()

    def _thaw(self) -> Frozen:
        frozen, self.frozen = self.frozen, None
        assert frozen is not None
        self.disk.frozen = None
        frozen.end()
        return frozen

    def _fresh(self) -> FineBitmap:
        return FineBitmap(self._new_bitmap(self.size, self.granularity), self._unit)
