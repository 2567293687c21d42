"""Mutants of the source side of points; the machine of cutmachine.py must catch each. The numbers
are those of the points at the top of nbdmirror/disk/frozen.py."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from model.cutparts import FiberDisk
from model.cutworld import GRANULE, CutWorld
from model.fibers import pause

from nbdmirror.devices.base import BlockDevice, Buffer, Extent
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import Changes, Freeze
from nbdmirror.disk.claim import Claim, Range
from nbdmirror.disk.frozen import Frozen
from nbdmirror.disk.saved import Saved, SavedFull, SavedGranules
from nbdmirror.mirror.cut import Cut
from nbdmirror.mirror.frozen_view import Chunk, FrozenView
from nbdmirror.mirror.point_lag import PointLag
from nbdmirror.mirror.point_source import PointSource


class CutsWithoutTheGate(CutWorld):
    """1: a write in progress changes the content after the cut."""

    class cut_class(Cut):
        def _look(self) -> None:
            if self._timer is not None:
                for ledger in self._ledgers:
                    assert ledger.gate is not None
                    ledger.gate.was_idle = True
                self._take()
                self._on_taken(self._open())


class LooksBeforeTheAnnouncement(CutWorld):
    """2: a request that looked before the cut changes the content after it."""

    class disk_class(FiberDisk):
        def pwrite(self, buf: Buffer, offset: int, fua: bool) -> None:
            seen = self.frozen
            token = self.ledger.enter()
            try:
                if seen is not None:
                    seen.before_change(self.source, offset, len(buf))
                self.source.pwrite(buf, offset, fua)
            finally:
                self.ledger.leave(token, offset, len(buf))


class SavesAfterTheWrite(CutWorld):
    """3: too late."""

    class disk_class(FiberDisk):
        def pwrite(self, buf: Buffer, offset: int, fua: bool) -> None:
            token = self.ledger.enter()
            try:
                frozen = self.frozen
                self.source.pwrite(buf, offset, fua)
                if frozen is not None:
                    frozen.before_change(self.source, offset, len(buf))
            finally:
                self.ledger.leave(token, offset, len(buf))


class ForgetsZeroes(CutWorld):
    """3: a range that is zeroed is overwritten as well."""

    class disk_class(FiberDisk):
        def zero(self, offset: int, length: int, **options: bool) -> None:
            token = self.ledger.enter()
            try:
                self.source.zero(offset, length)
            finally:
                self.ledger.leave(token, offset, length)


class ForgetsTrims(CutWorld):
    """3: so is one that is trimmed."""

    class disk_class(FiberDisk):
        def trim(self, offset: int, length: int, *, fua: bool) -> None:
            token = self.ledger.enter()
            try:
                self.source.trim(offset, length)
            finally:
                self.ledger.leave(token, offset, length)


class SavesTheFirstGranule(CutWorld):
    """3: each granule of the range."""

    class frozen_class(Frozen):
        def _save(self, source: BlockDevice, offset: int, length: int) -> None:
            super()._save(source, offset, 1)


class DoesNotWaitForTheRead(CutWorld):
    """4: what the sender is reading."""

    class frozen_class(Frozen):
        def _begin_save(self, offset: int, end: int) -> tuple[int, Claim | None]:
            with self._lock:
                if not self._is_over and (free := self._free(offset, end, GRANULE)):
                    return offset, self._own(*free)
            return offset, None


class WaitsForTheFarSide(CutWorld):
    """4: the guest waits until the chunk was acknowledged."""

    class view_class(FrozenView):
        def _read(self, claim: Claim) -> None:
            frozen: Any = self._frozen
            read, frozen.read = frozen.read, lambda claim: True
            self._late = [*getattr(self, "_late", []), (read, claim)]
            super()._read(claim)

        def settled(self, chunk: Any) -> None:
            super().settled(chunk)
            for read, claim in self._late:
                read(claim)
            self._late = []


class WakesNobody(CutWorld):
    """4: who waits for a read is told that it has ended."""

    class frozen_class(Frozen):
        def _release(self, claim: Claim, *, is_done: bool) -> None:
            notify, self._changed.notify_all = self._changed.notify_all, lambda: None  # type: ignore[method-assign]
            super()._release(claim, is_done=is_done)
            self._changed.notify_all = notify  # type: ignore[method-assign]


class TwoSaveAtOnce(CutWorld):
    """4: a second guest saves what the first one, which was faster, has overwritten."""

    first_walk = 297

    class frozen_class(Frozen):
        def _own(self, offset: int, length: int) -> Claim:
            claim = super()._own(offset, length)
            self._guests = [*getattr(self, "_guests", []), claim]
            return claim

        def claim(self, length_max: int) -> Claim | None:
            claim = super().claim(length_max)
            self._guests = [c for c in getattr(self, "_guests", []) if c is not claim]
            return claim

        def _free(self, offset: int, end: int, length_max: int) -> Range | None:
            owned = self._owned
            self._owned = [c for c in owned if c not in getattr(self, "_guests", [])]
            try:
                return super()._free(offset, end, length_max)
            finally:
                self._owned = owned


class DoneWhenOwned(CutWorld):
    """5: a granule counts as read when the read begins."""

    class frozen_class(Frozen):
        def _own(self, offset: int, length: int) -> Claim:
            self._done.mark(offset, length)
            return super()._own(offset, length)


class ForgetsWhatFailed(CutWorld):
    """5: what could not be saved counts as done, and the point goes on."""

    class frozen_class(Frozen):
        def break_off(self, error: BaseException) -> None:
            pass

        def _release(self, claim: Claim, *, is_done: bool) -> None:
            super()._release(claim, is_done=True)


class DropsWhatHasNoRoom(CutWorld):
    """6: a point without it is none."""

    class saved_class(SavedGranules):
        def put(self, saved: Saved) -> None:
            with suppress(SavedFull):
                super().put(saved)


class UsesTheSpillTwice(CutWorld):
    """What was spilled is written over before it was read."""

    class saved_class(SavedGranules):
        def _put_in_file(self, saved: Saved) -> None:
            if not self._writing and not self._is_reading:
                self._next = self._end = 0
            super()._put_in_file(saved)


class ReadsWhatIsBeingWritten(CutWorld):
    """A record counts as soon as it has a place."""

    first_walk = 265

    class saved_class(SavedGranules):
        def _readable_bytes(self) -> int:
            return self._end - self._next


class ReadsTheSourceAgain(CutWorld):
    """6: what was lost on its way is read once more, from what guests have written since."""

    def lose(self) -> None:
        for chunk, runs in self.sent:
            chunk.runs = [
                (at, span, None if content is None else memoryview(self.source)[at : at + span])
                for at, span, content in chunk.runs
            ]
            runs[:] = [(at, span, bytes(self.source[at : at + span])) for at, span, _ in runs]


class ForgetsABrokenPoint(CutWorld):
    """6: its granules belong to the next one."""

    class changes_class(Changes):
        def broken(self) -> None:
            self.committed()


class SavesFrozenNowhere(CutWorld):
    """After a crash the point in progress may be missing on the far side."""

    class changes_class(Changes):
        def may_differ(self) -> DirtyBitmap:
            return self.dirty.copy()


class ForgetsFirst(CutWorld):
    """A killed process must find the granules of a broken point in one of the two."""

    class changes_class(Changes):
        def broken(self) -> None:
            assert self.frozen is not None
            covered = self.frozen.covered.copy()
            self.committed()
            pause("a kill")
            assert covered.is_empty or not self.may_differ().is_empty, "killed here"
            self.dirty.merge(covered)


class AttachesLate(CutWorld):
    """A guest that was held ends before the new bitmap is marked."""

    class changes_class(Changes):
        def cut(self, freeze: Freeze) -> Frozen:
            frozen = super().cut(freeze)
            self.disk.ledger.detach(self.dirty)
            return frozen

        def look(self) -> None:
            if self.dirty not in self.disk.ledger.bitmaps:
                self.disk.ledger.attach(self.dirty)
            super().look()


class AsksWithoutOwning(CutWorld):
    """3 of ledger.py: a hole that is filled between the question and the answer was a hole at the
    cut; data that is trimmed meanwhile was not."""

    class view_class(FrozenView):
        def _have_extents(self, claim: Claim, extents: list[Extent] | None) -> None:
            super()._have_extents(claim, [Extent(claim.length, zero=True, hole=True)])


class BelievesTheSourceOfSaved(CutWorld):
    """Saved content comes from the store and not from the source."""

    class view_class(FrozenView):
        def _give_saved(self, found: list[Saved]) -> None:
            for saved in found:
                self._reads += 1
                self._frozen._owned.append(claim := Claim(saved.offset, saved.length))
                self._read(claim)


class KeepsUsedMemory(CutWorld):
    """A chunk's memory is used again before it was acknowledged."""

    class view_class(FrozenView):
        def _give(self, chunk: Chunk) -> None:
            super()._give(chunk)
            if chunk.buffer is not None:
                self._buffers.keep(chunk.buffer)


class CountsFromTheCommit(CutWorld):
    """The lag from the wrong end: the point has what was answered before its cut."""

    class lag_class(PointLag):
        def committed(self) -> None:
            self._covered_s = self._clock()


class CountsABrokenPoint(CutWorld):
    """The lag of a point that nobody has."""

    class lag_class(PointLag):
        def broken(self) -> None:
            self._covered_s = self._cut_s


class ForgetsThePointInProgress(CutWorld):
    """Nothing is dirty since the cut, and nothing is committed."""

    class lag_class(PointLag):
        def look(self) -> None:
            now_s = self._clock()
            if self._changes.dirty.is_empty:
                self._covered_s = self._cut_s = now_s


class LooksAtTheClockAfterwards(CutWorld):
    """The moment of the cut is later than the first write after it."""

    class points_class(PointSource):
        def committed(self) -> bool:
            self.lag.cut(self._loop.clock())
            return super().committed()


class DropsDetailsAtTheCut(CutWorld):
    """What a guest noted, and nobody sorted, belongs to the point."""

    class changes_class(Changes):
        def cut(self, freeze: Freeze) -> Frozen:
            if self.dirty._notes:
                del self.dirty._notes[-1]
            return super().cut(freeze)


CUT_MUTANTS = (
    CutsWithoutTheGate,
    LooksBeforeTheAnnouncement,
    SavesAfterTheWrite,
    ForgetsZeroes,
    ForgetsTrims,
    SavesTheFirstGranule,
    DoesNotWaitForTheRead,
    WaitsForTheFarSide,
    WakesNobody,
    TwoSaveAtOnce,
    DoneWhenOwned,
    ForgetsWhatFailed,
    DropsWhatHasNoRoom,
    UsesTheSpillTwice,
    ReadsWhatIsBeingWritten,
    ReadsTheSourceAgain,
    ForgetsABrokenPoint,
    SavesFrozenNowhere,
    ForgetsFirst,
    AttachesLate,
    AsksWithoutOwning,
    BelievesTheSourceOfSaved,
    KeepsUsedMemory,
    CountsFromTheCommit,
    CountsABrokenPoint,
    ForgetsThePointInProgress,
    LooksAtTheClockAfterwards,
    DropsDetailsAtTheCut,
)
