"""Mutants of what is known of the parts of granules (nbdmirror/disk/fine.py, and point 7 at the top
of nbdmirror/disk/ledger.py); the machine of finemachine.py must catch each."""

from __future__ import annotations

from model.fineparts import StepFine
from model.world import World

import nbdmirror.disk.fine as fine
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim, Range
from nbdmirror.disk.hot import HotGranules
from nbdmirror.disk.ledger import Ledger
from nbdmirror.disk.tracker import Tracker


class NotesAfterTheBit(World):
    """The bit is cleared between the two, and the note is left under a clean bit."""

    class fine_class(StepFine):
        def mark(self, offset: int, length: int) -> None:
            DirtyBitmap.mark(self, offset, length)
            self.between.run("before the bit")
            if self._notes is not None and len(self._notes) < self._room:
                self._notes.append((offset, length))
            else:
                self._whole.mark(offset, length)


class TakesDetailsBeforeTheBit(World):
    """A mark that comes between the two is wiped out."""

    class fine_class(StepFine):
        def take(self, offset: int, length: int) -> tuple[Range, ...] | None:
            meanwhile = self.between.calls.pop("before details are taken", None)
            parts = super().take(offset, length)
            if meanwhile is not None:
                meanwhile()
            DirtyBitmap.clear(self, offset, length)
            return parts


class ReplacesTheNotes(World):
    """Who has the old list in hand leaves a note that nobody reads."""

    class fine_class(StepFine):
        def _sort_notes(self) -> None:
            super()._sort_notes()
            if self._notes is not None:
                self._begin_notes()


class DropsTheOldestNote(World):
    """Too many notes mean whole granules, not fewer notes."""

    class fine_class(StepFine):
        def mark(self, offset: int, length: int) -> None:
            if self._notes and len(self._notes) >= self._room:
                del self._notes[0]
            super().mark(offset, length)


class DropsDetailsThatAreTooMany(World):
    """So do too many details."""

    class fine_class(StepFine):
        def _add(self, granule: int, units: int) -> None:
            if len(self._details) < fine.DETAILS_MAX:
                super()._add(granule, units)


class DetailsBeforeWholes(World):
    """A granule that is dirty as a whole stays so, also if it is then written to in part."""

    class fine_class(StepFine):
        def _take_units(self, granule: int) -> int:
            if granule in self._details:
                self._whole.clear(granule << self._shift, self.granularity)
            return super()._take_units(granule)

        def _add(self, granule: int, units: int) -> None:
            self._details[granule] = self._details.get(granule, 0) | units


class RefinesWhatIsThere(World):
    """What was dirty before details counted is dirty as a whole."""

    class fine_class(StepFine):
        def look(self, guests: Ledger) -> None:
            before, self._whole = self._whole, DirtyBitmap(self.size, self.granularity)
            super().look(guests)
            self._whole = before


class RefinesTooEarly(World):
    """So is what is written by requests that saw no notes, and are still to set their bits."""

    class fine_class(StepFine):
        def look(self, guests: Ledger) -> None:
            self._leaving = frozenset()
            super().look(guests)


class StaysFineWhenRushed(World):
    """Where no notes are left bits mean whole granules."""

    class fine_class(StepFine):
        def _coarsen(self) -> None:
            super()._coarsen()
            self._is_coarse = False


class RoundsInward(World):
    """Part of a unit makes all of it dirty."""

    class fine_class(StepFine):
        def _detail(self, offset: int, length: int) -> None:
            unit = 1 << self._unit_shift
            end = (offset + length) // unit * unit if length > unit else offset + length
            super()._detail(offset, max(1, end - offset))


class ForgetsThePartsOfPartlyCovered(World):
    """A synchronous write leaves dirty what it does not cover."""

    class fine_class(StepFine):
        def clear(self, offset: int, length: int) -> None:
            super().clear(offset, length)
            granule = offset >> self._shift
            if granule in self._details:
                self._details[granule] = 1


class FailsToTheBit(World):
    """Of a copy that failed not the bits alone are dirty again, but what was to be copied."""

    class tracker_class(Tracker):
        def settle(self, claim: Claim, *, failed: bool) -> int:
            if failed:
                DirtyBitmap.mark(self.dirty, claim.offset, claim.length)
                claim.parts = ()
            return super().settle(claim, failed=failed)


class GivesBackToTheBit(World):
    """So of what a copy gives back."""

    class tracker_class(Tracker):
        def shrink(self, claim: Claim, length: int) -> None:
            DirtyBitmap.mark(self.dirty, claim.offset + length, claim.length - length)
            claim.parts = claim.parts_in(claim.offset, claim.offset + length)
            super().shrink(claim, length)


class OwnsItsPartsAlone(World):
    """A copy owns whole granules: it may send the gap between two parts as well."""

    checks_overlap = False

    class tracker_class(Tracker):
        def _is_free_for(self, claim: Claim) -> bool:
            copies, start, end = self._copies, claim.offset, claim.end
            self._copies = [c for c in copies if c.overlaps(claim) and c.parts_in(start, end)]
            self._copies = [c for c in self._copies if self._is_at(c, claim)]
            try:
                return super()._is_free_for(claim)
            finally:
                self._copies = copies

        def begin_write(self, offset: int, length: int) -> Claim:
            self.asked = offset, offset + length
            return super().begin_write(offset, length)

        def _is_at(self, copy: Claim, claim: Claim) -> bool:
            return bool(copy.parts_in(*self.asked))


class UnflushedInParts(World):
    """What was sent since the last flush is known by whole granules, a filled gap included."""

    first_walk = 425

    class tracker_class(Tracker):
        def claim(
            self, offset: int, length_max: int, left_out: HotGranules | None = None
        ) -> Claim | None:
            before = self.unflushed.copy()
            claim = super().claim(offset, length_max, left_out)
            if claim is not None and claim.parts is not None:
                self.unflushed.clear_all()
                self.unflushed.merge(before)
            return claim


FINE_MUTANTS = (
    NotesAfterTheBit,
    TakesDetailsBeforeTheBit,
    ReplacesTheNotes,
    DropsTheOldestNote,
    DropsDetailsThatAreTooMany,
    DetailsBeforeWholes,
    RefinesWhatIsThere,
    RefinesTooEarly,
    StaysFineWhenRushed,
    RoundsInward,
    ForgetsThePartsOfPartlyCovered,
    FailsToTheBit,
    GivesBackToTheBit,
    OwnsItsPartsAlone,
    UnflushedInParts,
)
