"""Mutants of what is known in parts after a kill (disk/remainder.py, state/recent.py); the machine
of killedmachine.py must catch each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model.fineparts import StepFine
from model.killed import KilledWorld, StepRemainder
from model.powerloss import RECENT_BYTES

import nbdmirror.state.recent
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim, Range
from nbdmirror.disk.remainder import SentParts
from nbdmirror.state.journal import Journal
from nbdmirror.state.recent import ENTRY, changes_since, read_remainder


class NotesNoChange(KilledWorld):
    """What came after the remainder is known by its number alone."""

    class journal_class(Journal):
        def begin(self, offset: int, length: int) -> int:
            slot = super().begin(offset, length)
            ENTRY.pack_into(self._recent, self._entries[-1], 0, 0, self._number_of[slot])
            return slot


class NumberBeforeTheSlot(KilledWorld):
    """A position that is taken between the two is above the number, and no slot shows the
    change."""

    class journal_class(Journal):
        def begin(self, offset: int, length: int) -> int:
            between = self._numbers._between  # type: ignore[attr-defined]
            meanwhile = between.calls.pop("before the number", None)
            number = next(self._numbers)
            if meanwhile is not None:
                meanwhile()
            entry = self._entries[0]
            slot = super().begin(offset, length)
            ENTRY.pack_into(self._recent, entry, offset, length, number)
            return slot


class ForgetsWhatIsInProgress(KilledWorld):
    """A change that began before the position, and marks after it."""

    class remainder_class(StepRemainder):
        def look(self) -> tuple[int, list[Range]]:
            return super().look()[0], []


class PositionAfterTheParts(KilledWorld):
    """A change that begins and marks between the two is in neither."""

    class remainder_class(StepRemainder):
        def put(self, position: int, parts: Sequence[Range]) -> None:
            self.between.run("before it is put")
            super().put(self.journal.position()[0], parts)


class ForgetsWhatWasSent(KilledWorld):
    """What was sent since the flush began is not on the target's storage."""

    class sent_class(SentParts):
        def add(self, parts: Iterable[Range]) -> None:
            pass


class ForgetsWhatIsInFlight(KilledWorld):
    """Nor is what was in flight when the flush began."""

    class sent_class(SentParts):
        def flush_begins(self, flush: DirtyBitmap, in_flight: Iterable[Claim]) -> None:
            super().flush_begins(flush, ())


class IgnoresWholeGranules(KilledWorld):
    """Details are not all that is dirty."""

    class fine_class(StepFine):
        def parts(self, most: int) -> list[Range] | None:
            whole, self._whole = self._whole, DirtyBitmap(self.size, self.granularity)
            try:
                return super().parts(most)
            finally:
                self._whole = whole


class IgnoresNotes(KilledWorld):
    """Nor are details without the notes."""

    first_walk = 206

    class fine_class(StepFine):
        def parts(self, most: int) -> list[Range] | None:
            sort, self._sort_notes = self._sort_notes, lambda: None  # type: ignore[method-assign]
            try:
                return super().parts(most)
            finally:
                self._sort_notes = sort  # type: ignore[method-assign]


class KeepsTheRemainder(KilledWorld):
    """More may differ than guests have changed."""

    class remainder_class(StepRemainder):
        def withdraw(self) -> None:
            pass


class DoesNotNoticeWhatIsMissing(KilledWorld):
    """So many changes came since that some are not in the ring any more."""

    def parts_left(self, remainder: bytes, in_progress: list[Range]) -> list[Range] | None:
        found = read_remainder(remainder)
        if found is None:
            return None
        recent = nbdmirror.state.recent
        late, recent.LATE_MAX = recent.LATE_MAX, -(1 << 60)
        try:
            changes = changes_since(bytes(self.recent[:RECENT_BYTES]), found[0])
        finally:
            recent.LATE_MAX = late
        assert changes is not None
        return [*found[1], *changes, *in_progress]


KILLED_MUTANTS = (
    NotesNoChange,
    NumberBeforeTheSlot,
    ForgetsWhatIsInProgress,
    PositionAfterTheParts,
    ForgetsWhatWasSent,
    ForgetsWhatIsInFlight,
    IgnoresWholeGranules,
    IgnoresNotes,
    KeepsTheRemainder,
    DoesNotNoticeWhatIsMissing,
)
