"""Mutants of the mirror's rules: each breaks one, and the machine of machine.py must catch
each.

Numbers of rules are those of a mirror job's semantics as QEMU has it (M), and the numbered points
are those at the top of nbdmirror/disk/ledger.py (L).
"""

from __future__ import annotations

from typing import Any

import pytest
from model.parts import Guest
from model.world import World

from nbdmirror.devices.base import Extent, Run
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim
from nbdmirror.disk.hot import HotGranules
from nbdmirror.disk.ledger import Ledger, Marked
from nbdmirror.disk.tracker import Tracker
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.copy_in_flight import Copy as _Copy


@pytest.mark.rule(1)
class MarksBeforeOnly(World):
    """L1; M1 "set dirty after the source write has finished, not before". 893 of 2,000 schedules of
    a seeded model ended with a corrupt target."""

    def enter(self, guest: Guest) -> int:
        token = super().enter(guest)
        for bitmap in self.ledger.bitmaps:
            bitmap.mark(guest.offset, guest.length)
        return token

    def leave(self, guest: Guest, *, failed: bool) -> None:
        assert guest.token is not None
        self.ledger.leave(guest.token, 0, 0)


@pytest.mark.rule(2)
class MarksSuccessOnly(World):
    """L1; M2 "failed guest writes dirty the range too". 180 of 2,000 schedules."""

    def leave(self, guest: Guest, *, failed: bool) -> None:
        assert guest.token is not None
        self.ledger.leave(guest.token, guest.offset, 0 if failed else guest.length)


@pytest.mark.rule(33)
class DecidesAtEntry(World):
    """L2; M33 "writes during job start-up". A job that starts mid-write, and the write decided at
    its entry whether to mark: 100 of 2,000 schedules."""

    class ledger_class(Ledger):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[int, tuple[Marked, ...]] = {}

        def enter(self) -> int:
            token = super().enter()
            self.seen[token] = self.bitmaps
            return token

        def leave(
            self, token: int, offset: int, length: int, settled: DirtyBitmap | None = None
        ) -> None:
            for bitmap in self.seen.pop(token):
                if bitmap is not settled:
                    bitmap.mark(offset, length)
            super().leave(token, 0, 0)


@pytest.mark.rule(7)
class WritesWithoutWaiting(World):
    """L6; M7 "active writes wait for the whole range". 735 of 2,000 schedules."""

    checks_overlap = False

    class tracker_class(Tracker):
        def _is_free_for(self, claim: Claim) -> bool:
            return not any(other.overlaps(claim) for other in self._writes)


@pytest.mark.rule(5)
class ClaimsTwice(World):
    """L4; M5 "no two ops on one chunk". 5 of 2,000 schedules: what ordinary tests pass."""

    first_walk = 1552

    checks_overlap = False

    class tracker_class(Tracker):
        def claim(
            self, offset: int, length_max: int, left_out: HotGranules | None = None
        ) -> Claim | None:
            copies, self._copies = self._copies, []
            try:
                return super().claim(offset, length_max, left_out)
            finally:
                self._copies = copies + self._copies


@pytest.mark.rule(3)
class ClearsAtSettle(World):
    """L3; M3 "clear the bit, then look at the source"."""

    class tracker_class(Tracker):
        def claim(
            self, offset: int, length_max: int, left_out: HotGranules | None = None
        ) -> Claim | None:
            claim = super().claim(offset, length_max, left_out)
            if claim is not None:
                self.dirty.mark(claim.offset, claim.length)
            return claim

        def settle(self, claim: Claim, *, failed: bool) -> int:
            progress = super().settle(claim, failed=failed)
            if not failed:
                self.dirty.clear(claim.offset, claim.length)
            return progress


@pytest.mark.rule(3, 6)
class AsksExtentsFirst(World):
    """L3; M3 "before block status is asked or data read, since both may yield"."""

    class copier_class(Copier):
        def _begin(self, claim: Claim) -> None:
            self.tracker.dirty.mark(claim.offset, claim.length)
            super()._begin(claim)

        def _have_extents(self, copy: _Copy, extents: list[Extent]) -> None:
            self.tracker.dirty.clear(copy.claim.offset, copy.claim.length)
            super()._have_extents(copy, extents)


@pytest.mark.rule(20)
class ForgetsFailedCopies(World):
    """L5; M20 "'ignore' does not mean skip"."""

    class tracker_class(Tracker):
        def settle(self, claim: Claim, *, failed: bool) -> int:
            return super().settle(claim, failed=False)


@pytest.mark.rule(9)
class ClearsPartlyCovered(World):
    """L6; M9 "clearing on a partly written chunk loses the rest of it"."""

    class tracker_class(Tracker):
        def begin_write(self, offset: int, length: int) -> Claim:
            claim = super().begin_write(offset, length)
            self.dirty.clear(claim.offset, claim.length)
            return claim


@pytest.mark.rule(3)
class ClearsAfterWriting(World):
    """L6, for the reason of L3; M3: a background write that marks meanwhile is wiped out."""

    class tracker_class(Tracker):
        def begin_write(self, offset: int, length: int) -> Claim:
            before = DirtyBitmap(self.size, self.granularity)
            before.merge(self.dirty)
            claim = super().begin_write(offset, length)
            self.dirty.merge(before)
            return claim

    def end_synchronous(self, guest: Guest, *, failed: bool) -> None:
        if not failed:
            self.tracker.dirty.clear(guest.offset, guest.length)
        super().end_synchronous(guest, failed=failed)


@pytest.mark.rule(10)
class ForgetsFailedWrites(World):
    """L6; M10 "target failure ... the range, aligned outward, is set dirty again"."""

    def end_synchronous(self, guest: Guest, *, failed: bool) -> None:
        super().end_synchronous(guest, failed=False)


class LeavesTheRestClean(World):
    """L5: what a copy gives back of its claim is dirty again (`shrink`)."""

    class tracker_class(Tracker):
        def shrink(self, claim: Claim, length: int) -> None:
            claim.length = length


class WakesNobody(World):
    """A wait without a bound needs a wake-up: every wait has a bound or is woken."""

    class tracker_class(Tracker):
        def settle(self, claim: Claim, *, failed: bool) -> int:
            if failed:
                self.dirty.mark(claim.offset, claim.length)
            self._copies.remove(claim)
            return claim.length


@pytest.mark.rule(39)
class FlushCoversWhatIsInFlight(World):
    """M39: what is in flight when a flush is sent is not covered by it."""

    class tracker_class(Tracker):
        def _with_claims(self, bitmap: DirtyBitmap) -> DirtyBitmap:
            return bitmap


@pytest.mark.rule(39)
class UnflushedWhenItEnds(World):
    """M39: a copy in flight at a crash may be on the target or not."""

    class tracker_class(Tracker):
        def claim(
            self, offset: int, length_max: int, left_out: HotGranules | None = None
        ) -> Claim | None:
            before = self.unflushed.copy()
            claim = super().claim(offset, length_max, left_out)
            self.unflushed.clear_all()
            self.unflushed.merge(before)
            return claim

        def settle(self, claim: Claim, *, failed: bool) -> int:
            self.unflushed.mark(claim.offset, claim.length)
            return super().settle(claim, failed=failed)


@pytest.mark.rule(39)
class ForgetsAFailedFlush(World):
    """M13, M39: what a flush that failed was to cover may be lost."""

    class tracker_class(Tracker):
        def end_flush(self, covered: DirtyBitmap, *, failed: bool) -> None:
            super().end_flush(covered, failed=False)


@pytest.mark.rule(22)
class StoppedCountsAsCopied(World):
    """M22, L5: of a claim that a pause cuts short, what was not copied is dirty again."""

    class copier_class(Copier):
        def _settle(self, copy: _Copy, *, failed: bool) -> None:
            super()._settle(copy, failed=failed and copy.error is not None)

        def _give_back(self, copy: _Copy, length: int) -> None:
            if self.is_running:
                super()._give_back(copy, length)


class CountsThePieceAhead(World):
    """L4: a claim lets go of no more than what the target has answered."""

    class copier_class(Copier):
        def _write(self, copy: _Copy, runs: list[Run], end: int, start_s: float) -> None:
            if copy.extents[0].zero and runs[-1][0] + runs[-1][1] < copy.claim.end:
                self.tracker._copies.remove(copy.claim)
                copy.claim.offset = runs[-1][0]
                self.tracker._copies.append(copy.claim)
            super()._write(copy, runs, end, start_s)


class DisownedCountsAsCopied(World):
    """L5: what the source was not waited for is dirty again."""

    class copier_class(Copier):
        def disown(self) -> None:
            for copy in [copy for copy in self._copies if copy.operation == "read"]:
                copy.buffer = None
                self._settle(copy, failed=False)


@pytest.mark.rule(19)
class WritesWhatWasDisowned(World):
    """L4: an answer that comes late is written over what was copied since."""

    class tracker_class(Tracker):
        def settle(self, claim: Claim, *, failed: bool) -> int:
            return super().settle(claim, failed=failed) if claim in self._copies else 0

        def shrink(self, claim: Claim, length: int) -> None:
            if claim in self._copies:
                super().shrink(claim, length)

    class copier_class(Copier):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._copies = _Everything()


class _Everything(set[_Copy]):
    def __contains__(self, _: object) -> bool:
        return True


class WritesBesideWhatIsLeft(World):
    """A connection that was given up may have requests that its server carries out late: none is
    written beside it (nbdmirror/server/reconnect.py)."""

    unanswered = 0
    loses_target = True


@pytest.mark.rule(15)
class LooksAtTheGateFirst(World):
    """The gate is Dekker's: a guest that looks before it announces itself gets through."""

    def enter(self, guest: Guest) -> int:
        if self.ledger.gate is not None:
            return super().enter(guest)
        close, self.announced.on_add = self.announced.on_add, None
        if close is not None:
            close()
        token = next(self.ledger.tokens)
        self.announced.add(token)
        return token


MUTANTS = (
    MarksBeforeOnly,
    MarksSuccessOnly,
    DecidesAtEntry,
    WritesWithoutWaiting,
    ClaimsTwice,
    ClearsAtSettle,
    AsksExtentsFirst,
    ForgetsFailedCopies,
    ClearsPartlyCovered,
    ClearsAfterWriting,
    ForgetsFailedWrites,
    LeavesTheRestClean,
    WakesNobody,
    FlushCoversWhatIsInFlight,
    UnflushedWhenItEnds,
    ForgetsAFailedFlush,
    StoppedCountsAsCopied,
    CountsThePieceAhead,
    DisownedCountsAsCopied,
    WritesWhatWasDisowned,
    WritesBesideWhatIsLeft,
    LooksAtTheGateFirst,
)
