"""A world whose mirror's remainder and last changes are in memory that outlives a killed process.

After each step the process is killed: the real code finds the parts that may differ, and a mirror
that continues with them must have every byte that differs as dirty. Other threads go on between the
steps of a guest that begins, and of the event loop that puts a remainder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

from model.fineparts import Between, StepFine
from model.powerloss import RECENT_BYTES, RECENT_MAX, PowerWorld, SimSlots

import nbdmirror.disk.remainder
import nbdmirror.state.recent
from nbdmirror.disk.claim import Range
from nbdmirror.disk.remainder import SentParts
from nbdmirror.disk.tracker import Tracker
from nbdmirror.state.journal import Journal, ranges_left
from nbdmirror.state.recent import REMAINDER_BYTES, ShmRemainder, parts_left

LATE_MAX = 7
"""For the guests of the machine, of whom there are three."""


class StepNumbers(Iterator[int]):
    """In place of the journal's numbers."""

    def __init__(self, between: Between) -> None:
        self._count = itertools.count(1)
        self._between = between

    def __next__(self) -> int:
        self._between.run("before the number")
        return next(self._count)


class StepRemainder(ShmRemainder):
    """Other threads go on between the steps of whoever puts one."""

    def __init__(self, memory: memoryview, journal: Journal, between: Between) -> None:
        super().__init__(memory, self.look, lambda: None)
        self.between = between
        self.journal = journal

    def look(self) -> tuple[int, list[Range]]:
        found = self.journal.position()
        self.between.run("after the position")
        return found

    def put(self, position: int, parts: Sequence[Range]) -> None:
        self.between.run("before it is put")
        super().put(position, parts)


class KilledWorld(PowerWorld):
    """Mutants override what they break."""

    remainder_class: type[StepRemainder] = StepRemainder
    sent_class: type[SentParts] = SentParts

    def __init__(self, content: bytes, **options: Any) -> None:
        super().__init__(content, **options)
        self.between = Between()
        self.memory = bytearray(REMAINDER_BYTES)
        journal: Any = self.store.journal
        journal._numbers = StepNumbers(self.between)
        tracker: Any = self.tracker
        tracker._remainder = self.remainder_class(
            memoryview(self.memory), self.store.journal, self.between
        )
        tracker._sent = self.sent_class()
        for module, name, value in (
            (nbdmirror.disk.remainder, "PARTS_MAX", 12),
            (nbdmirror.state.recent, "RECENT_MAX", RECENT_MAX),
            (nbdmirror.state.recent, "RECENT_BYTES", RECENT_BYTES),
            (nbdmirror.state.recent, "LATE_MAX", LATE_MAX),
        ):
            self._patches.enter_context(patch.object(module, name, value))

    def check_power_cut(self, log: SimSlots) -> None:
        pass  # test_powerloss.py

    def check_kill(self) -> None:
        super().check_kill()
        contents = (self.source, self.target, self.devices.durable)
        if contents[0] == contents[1] == contents[2]:
            return
        in_progress = ranges_left(bytes(self.store.journal._cells.cast("B")))
        parts = self.parts_left(bytes(self.memory), in_progress)
        if parts is None:
            return
        again = Tracker(self.size, self.granularity, unit=self.unit)
        again.begin_with(parts)
        dirty = again.dirty
        assert isinstance(dirty, StepFine)
        for offset in range(0, self.size, self.unit):
            part = slice(offset, min(offset + self.unit, self.size))
            if len({bytes(content[part]) for content in contents}) > 1:
                number = offset // self.unit
                assert dirty.may_be_dirty(number), f"lost in a killed process: part {number}"

    def parts_left(self, remainder: bytes, in_progress: list[Range]) -> list[Range] | None:
        return parts_left(remainder, bytes(self.recent), in_progress, self.size)

    def lose_writes(self, offset: int) -> None:
        """The source has lost what the target has, and the job is told."""
        lost = slice(offset, min(offset + self.unit, self.size))
        self.source[lost] = self.durable_source[lost] = b"\x11" * (lost.stop - lost.start)
        self.tracker.mark_all()
