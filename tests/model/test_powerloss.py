"""Every moment is a moment at which the process may be killed, or the power may fail: the machine
of machine.py, with a state directory, and with both ends looked at after each step.

The mutants break what journal.py and checkpoint.py say; the same machine must catch each of them.
"""

from __future__ import annotations

import pytest
from model.killed import KilledWorld
from model.killedmachine import KilledMachine
from model.killedmutants import KILLED_MUTANTS
from model.powerloss import PowerWorld
from model.powermachine import PowerMachine
from model.search import hold, search
from support.in_parts import in_parts

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim
from nbdmirror.disk.tracker import Tracker
from nbdmirror.state.journal import Journal, Regions
from nbdmirror.state.recovery import RecoveredState

EXAMPLES = 300
MUTANT_EXAMPLES_MAX = 100


@pytest.mark.timeout(240)
@pytest.mark.rule(47)
@pytest.mark.guarantee("At no moment")
@in_parts(EXAMPLES)
@pytest.mark.parametrize("machine", [PowerMachine, KilledMachine])
def test_nothing_is_lost_when_the_process_or_the_power_ends(
    machine: type[PowerMachine], examples: int
) -> None:
    hold(machine, examples)


@pytest.mark.rule(47)
class WritesNothingDown(PowerWorld):
    """A write is marked after it is done: a crash between the two forgets it."""

    class journal_class(Journal):
        def begin(self, offset: int, length: int) -> int:
            slot = super().begin(offset, length)
            self._cells[2 * slot + 1] = 0
            return slot


@pytest.mark.rule(47)
class LeavesTheDiskUnflushed(PowerWorld):
    """A power cut takes back what the target has: the region must stay until the disk is
    flushed."""

    flushes_source = False


class DoesNotWaitForWrites(PowerWorld):
    """Bitmaps are saved while a write from before the cut is not marked yet."""

    class journal_class(Journal):
        def has_drained(self, before: dict[int, int]) -> bool:
            return True


class RetiresWhatIsTouched(PowerWorld):
    """A region that was written to since the cut leaves the log."""

    class regions_class(Regions):
        def retire(self) -> None:
            self.touched = bytearray(len(self.touched))
            self._before = bytearray(len(self._before))
            super().retire()


@pytest.mark.rule(47)
class TouchesWithoutSync(PowerWorld):
    """The region is on its way to the disk when the write is issued."""

    class regions_class(Regions):
        def _write(self, regions: bytearray, *, sync: bool) -> None:
            super()._write(regions, sync=False)


class ForgetsTheRegions(PowerWorld):
    """Recovery that believes the bitmaps alone."""

    def recover(self, found: RecoveredState) -> DirtyBitmap:
        found.ranges = []
        return super().recover(found)


class SavesDirtyAlone(PowerWorld):
    """What is in flight, or not flushed on the target, is not in the bitmap of what is dirty."""

    class tracker_class(Tracker):
        def may_differ(self) -> DirtyBitmap:
            return self.dirty.copy()


class ReadsBitmapsBackwards(PowerWorld):
    """A range that moves from `dirty` to `unflushed` between the two is missed."""

    class tracker_class(Tracker):
        moves: Claim | None = None

        def may_differ(self) -> DirtyBitmap:
            found = DirtyBitmap(self.size, self.granularity)
            for bitmap in (self.unflushed, *self._flushing):
                found.merge(bitmap)
            self.claim(0, 1)
            found.merge(self.dirty)
            return found


MUTANTS = (
    WritesNothingDown,
    LeavesTheDiskUnflushed,
    DoesNotWaitForWrites,
    RetiresWhatIsTouched,
    TouchesWithoutSync,
    ForgetsTheRegions,
    SavesDirtyAlone,
    ReadsBitmapsBackwards,
)


@pytest.mark.guarantee("At no moment")
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutant", [*MUTANTS, *KILLED_MUTANTS], ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_caught(mutant: type[PowerWorld]) -> None:
    kind = KilledMachine if issubclass(mutant, KilledWorld) else PowerMachine
    with pytest.raises(AssertionError, match="lost"):
        search(kind, mutant, MUTANT_EXAMPLES_MAX)
