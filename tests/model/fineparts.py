"""FineBitmap of a world of one thread: other threads go on between any two of its steps."""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.fine import FineBitmap

BOUNDS = {"NOTES_MAX": 8, "DETAILS_MAX": 2, "TAKEN_MAX": 2, "COARSE_LOOKS": 1}
"""Instead of FineBitmap's: also what is too much happens."""


class Between:
    """What other threads do between two steps of somebody who marks or takes; once."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[], None]] = {}

    def run(self, where: str) -> None:
        if call := self.calls.pop(where, None):
            call()


class StepNotes(list[tuple[int, int]]):
    """In place of FineBitmap's notes: a guest is about to leave one, or has left one."""

    def __init__(self, between: Between) -> None:
        self._between = between

    def append(self, note: tuple[int, int]) -> None:
        self._between.run("before the note")
        super().append(note)
        self._between.run("before the bit")


class StepWhole(DirtyBitmap):
    """In place of FineBitmap's whole granules."""

    def __init__(self, size: int, granularity: int, between: Between) -> None:
        super().__init__(size, granularity)
        self._between = between

    def mark(self, offset: int, length: int) -> None:
        super().mark(offset, length)
        self._between.run("before the bit")

    def clear(self, offset: int, length: int) -> None:
        self._between.run("before whole ones go")
        super().clear(offset, length)


class StepFine(FineBitmap):
    """Of which each step can be followed by one of another thread."""

    def __init__(self, bits: DirtyBitmap, unit: int) -> None:
        super().__init__(bits, unit)
        self.between = Between()
        self._whole = StepWhole(bits.size, bits.granularity, self.between)

    def mark(self, offset: int, length: int) -> None:
        if self._notes is not None or not length:
            super().mark(offset, length)
            return
        self.noted_bytes += length  # as there, where no notes are left
        self.between.run("before the bit")
        DirtyBitmap.mark(self, offset, length)

    def _begin_notes(self) -> None:
        self._notes = StepNotes(self.between)

    def _sort_notes(self) -> None:
        self.between.run("before details are taken")
        super()._sort_notes()

    def may_be_dirty(self, unit: int) -> bool:
        """The bit of its granule is set, and no detail says that this unit is clean."""
        offset, length = unit << self._unit_shift, 1 << self._unit_shift
        if not self.is_dirty(offset, 1):
            return False
        start = offset & -self.granularity
        if self._is_coarse or self._whole.is_dirty(start, 1):
            return True
        notes = [n for n in self._notes or () if n[0] < start + self.granularity and start < sum(n)]
        details = self._details.get(offset >> self._shift)
        if details is None and not notes:
            return True
        is_noted = any(n[0] < offset + length and offset < sum(n) for n in notes)
        return is_noted or bool((details or 0) >> ((offset - start) >> self._unit_shift) & 1)
