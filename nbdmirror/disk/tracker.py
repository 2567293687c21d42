"""Tracker: what one mirror knows of its disk: what is dirty, what is being copied, and what was
sent and is not flushed yet. ledger.py has the argument why this is right while guests write.

All calls are for any thread. They take one lock, which is a leaf.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

from nbdmirror.devices.base import round_out
from nbdmirror.disk.backlog import Backlog
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.cells import Cells, DiskMap, Zeroes, map_of
from nbdmirror.disk.claim import Claim, Range
from nbdmirror.disk.fine import FineBitmap
from nbdmirror.disk.hot import HotGranules
from nbdmirror.disk.ledger import Ledger
from nbdmirror.disk.remainder import Remainder, SentParts

FLUSHED_LAST_MAX = 8


class Tracker:
    """One mirror's dirty granules, its copies in flight and its synchronous writes.

    Offsets and lengths are bytes. `claim`, `shrink` and `settle` are for the copier; `begin_write`
    and `end_write` are for guests.

    `dirty`, `unflushed` and the bitmaps of flushes in progress are, together, everything that may
    differ from the target's storage: a range enters `unflushed` before it leaves `dirty`, and
    leaves `unflushed` by a flush that began after the range was written. So these bitmaps alone say
    what may differ after a crash of the target, of this process (if the bitmaps of `new_bitmap`
    outlive it), or of both."""

    def __init__(
        self,
        size: int,
        granularity: int,
        new_bitmap: Callable[[int, int], DirtyBitmap] = DirtyBitmap,
        unit: int = 0,
        remainder: Remainder | None = None,
    ) -> None:
        """`unit`: the smallest part of a granule that is copied alone; 0: whole granules.
        `remainder`: where it is kept which parts the target's storage lacks, if anywhere."""
        self.size = size
        self.granularity = granularity
        self._new_bitmap = new_bitmap
        self.dirty = FineBitmap(new_bitmap(size, granularity), unit or granularity)
        self.unflushed = new_bitmap(size, granularity)
        """Ranges that were sent to the target, or are about to be, since the last good flush: a
        target that crashes may lose them (rule 39)."""
        self.flushed_last: deque[int] = deque(maxlen=FLUSHED_LAST_MAX)
        """The offset, in bytes, of a granule of each of the last good flushes that covered any: an
        older copy of the target's storage differs there first."""
        self._repeated: DirtyBitmap | None = None
        """Granules that are dirty only because a flush has failed."""
        self.written_bytes = 0
        """Bytes that synchronous writes have written to the target."""
        self.again_bytes = 0
        """Bytes that became dirty because they may have been lost, not because a guest wrote
        them."""
        self._flushing: list[DirtyBitmap] = []
        self._guests_flushes: list[list[DirtyBitmap]] = []
        """For each guest's flush of the target in progress: what other flushes have covered
        meanwhile."""
        self._backlog = Backlog(size, granularity)
        self._remainder = remainder
        self._sent = SentParts()
        self.zeroes = Zeroes(size, granularity)
        """For the map alone."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # for those in `_waiting`, and only then
        self._copies: list[Claim] = []
        self._writes: list[Claim] = []
        self._waiting: list[Claim] = []

    @property
    def in_flight_bytes(self) -> int:
        """Bytes claimed by copies and synchronous writes."""
        with self._lock:
            return sum(c.length for c in self._copies) + sum(c.length for c in self._writes)

    @property
    def unflushed_bytes(self) -> int:
        """Bytes in granules that were sent to the target, or are being sent, since the last good
        flush."""
        with self._lock:
            return sum(bitmap.dirty_bytes for bitmap in (self.unflushed, *self._flushing))

    @property
    def remaining_bytes(self) -> int:
        """Bytes that are dirty or in flight, without those that are copied again only because a
        flush has failed."""
        with self._lock:
            left = self.dirty.dirty_bytes + sum(c.length for c in self._writes)
            if self._repeated is None:
                return left + sum(c.length - c.progress for c in self._copies)
            left -= self._repeated.common_bytes(self.dirty)
            return left + sum(max(0, self._news(c) - c.progress) for c in self._copies)

    @property
    def in_sync(self) -> bool:
        """Nothing is dirty and nothing is in flight. Checked under the lock that a synchronous
        write takes to change one into the other: two separate checks could both miss that write."""
        with self._lock:
            return self._is_in_sync()

    @property
    def is_at_rest(self) -> bool:
        """Nothing is dirty, in flight or unflushed, and nothing waits to be noted. Only for the
        thread that claims and flushes."""
        with self._lock:
            if self._copies or self._writes or self._flushing or not self.dirty.is_at_rest:
                return False
            return self.unflushed.is_empty and self._backlog.is_durable

    @property
    def is_level(self) -> bool:
        """In sync, and everything is flushed, with no flush in progress. Only for the thread that
        claims and flushes."""
        with self._lock:
            return self._is_in_sync() and self.unflushed.is_empty and not self._flushing

    def claim(
        self, offset: int, length_max: int, left_out: HotGranules | None = None
    ) -> Claim | None:
        """Take the first dirty run at or after `offset` that is not owned, of at most `length_max`
        bytes (at least one granule). Its bits are clear, and the copy owns it until `settle`. None
        if there is no such run. `left_out`: these granules stay dirty."""
        runs = self.dirty if left_out is None else left_out
        with self._lock:
            while run := runs.next_run(offset, length_max):
                claim = Claim(*run)
                if taken := self._in_the_way_of(claim):
                    start = min(c.offset for c in taken)
                    if start <= claim.offset:
                        offset = max(c.end for c in taken if c.offset <= claim.offset)
                        continue
                    claim.length = start - claim.offset
                self.unflushed.mark(claim.offset, claim.length)
                claim.parts = self.dirty.take(claim.offset, claim.length)
                self._sent.add_claim(claim)
                self._backlog.took(claim, claim.offset, claim.length)
                self.zeroes.remove(claim.offset, claim.length)
                self._copies.append(claim)
                return claim
        return None

    def shrink(self, claim: Claim, length: int) -> None:
        """Keep only the first `length` bytes (whole granules) of a copy; the rest is dirty
        again."""
        with self._lock:
            self._give_back(claim, claim.shrink(length))
            self._tell_waiting()

    def settle(self, claim: Claim, *, failed: bool) -> int:
        """End a copy. If it `failed`, its range becomes dirty first. Returns the progress in
        bytes."""
        progress = 0
        with self._lock:
            if failed:
                self._give_back(claim, claim.parts_in(claim.offset, claim.end))
            else:
                progress = max(0, self._news(claim) - claim.progress)
                if self._repeated is not None:
                    self._repeated.clear(claim.offset, claim.length)
                if claim.is_zero:
                    self.zeroes.add(claim.offset, claim.length)
            self._copies.remove(claim)
            self._backlog.left(claim)
            self._tell_waiting()
        return progress

    def progress(self, claim: Claim, copied: int) -> int:
        """The first `copied` bytes of a copy that continues have reached the target. Returns the
        bytes that count as new progress."""
        with self._lock:
            if self._repeated is not None:
                return 0  # `settle` counts
            news, claim.progress = copied - claim.progress, copied
        return news

    def begin_write(self, offset: int, length: int) -> Claim:
        """Begin a guest thread's synchronous write. Waits until no copy and no other such write
        overlaps its granules, then owns all of them at once: no write holds a part while it waits
        for the rest (no deadlock). Writes are served in order, and copies avoid a range that a
        write waits for (no starvation). Granules that are covered whole are clean from here on
        (point 6 of ledger.py)."""
        start, span = round_out(offset, length, self.granularity)
        claim = Claim(start, min(span, self.size - start), progress=length)
        with self._lock:
            self._waiting.append(claim)
            self._changed.wait_for(lambda: self._is_free_for(claim))
            self._waiting.remove(claim)
            self._writes.append(claim)
            self.unflushed.mark(offset, length)
            self._sent.add(((offset, length),))
            self.dirty.clear(offset, length)
            self._backlog.took(claim, offset, length)
            self.zeroes.remove(offset, length)
        return claim

    def end_write(self, claim: Claim, *, failed: bool) -> None:
        """End a synchronous write. If it `failed`, its granules are dirty again."""
        with self._lock:
            if failed:
                self._give_back(claim, ((claim.offset, claim.length),))
            else:
                self.written_bytes += claim.progress
            self._writes.remove(claim)
            self._backlog.left(claim)
            self._tell_waiting()

    def look(self, guests: Ledger) -> None:
        """Sort the notes of guests' writes. Call this twenty times a second."""
        with self._lock:
            self.dirty.look(guests)

    def refine(self) -> None:
        """Begin to copy parts of granules, soon."""
        with self._lock:
            self.dirty.refine()

    def begin_with(self, parts: Sequence[Range]) -> None:
        """Only these parts may differ from the target's storage. Before guests mark the bitmap."""
        with self._lock:
            self.dirty.begin_with(parts)
            if self._remainder is not None:
                self._remainder.put(self._remainder.position()[0], parts)

    def mark_all(self) -> None:
        """Mark everything: source and target may differ anywhere."""
        with self._lock:
            if self._remainder is not None:
                self._remainder.withdraw()
            self.again_bytes += self.size - self.dirty.bytes_in(0, self.size)
            self.dirty.mark_all()
            self._backlog.all_may_be_lost()

    def begin_flush(self) -> DirtyBitmap:
        """A flush is about to be sent. Returns what it covers, for `end_flush`: not what is in
        flight."""
        with self._lock:
            covered = self.unflushed
            if self._remainder is not None and not (self._flushing or self._guests_flushes):
                self._sent.flush_begins(covered, (*self._copies, *self._writes))
            self._flushing.append(covered)
            self._backlog.flush_begins(self._flushing)
            self.unflushed = self._with_claims(self._new_bitmap(self.size, self.granularity))
        return covered

    def end_flush(self, covered: DirtyBitmap, *, failed: bool) -> None:
        """A flush has ended. If it `failed`, everything it covered is dirty: the target may have
        lost it, and a second flush would not report that. (Linux reports a failed write-back once.)
        As in QEMU, this does not count as progress of the job."""
        position = self._remainder.position() if self._remainder is not None else (0, [])
        with self._lock:
            if failed:
                self._repeat(covered)
            else:
                self._backlog.flush_ended(covered)
                if run := covered.next_run(0, self.granularity):
                    self.flushed_last.append(run[0])
                if self._guests_flushes:
                    kept = covered.copy()  # of all of them: none changes it
                    for meanwhile in self._guests_flushes:
                        meanwhile.append(kept)
            self._flushing = [bitmap for bitmap in self._flushing if bitmap is not covered]
            self._renew_remainder(covered, position, failed=failed)
        covered.close()

    def begin_guests_flush(self) -> list[DirtyBitmap]:
        """A guest's flush of the target (write-blocking) begins. Its error may concern all
        unflushed data. End it with `end_guests_flush`."""
        meanwhile: list[DirtyBitmap] = []
        with self._lock:
            self._guests_flushes.append(meanwhile)
        return meanwhile

    def end_guests_flush(self, meanwhile: list[DirtyBitmap], *, failed: bool) -> None:
        """As `end_flush`. Data of other flushes that ended meanwhile counts as well: the target may
        have reported an error to this flush only."""
        with self._lock:
            self._guests_flushes = [one for one in self._guests_flushes if one is not meanwhile]
            if failed:
                lost = self.unflushed.copy()
                for bitmap in (*self._flushing, *meanwhile):
                    lost.merge(bitmap)
                self._repeat(lost)

    def target_came_back(self) -> None:
        """The target was reconnected. What was not flushed may be lost, so it is dirty (rule 39);
        so is what is in flight, however it ends."""
        with self._lock:
            before = self.dirty.dirty_bytes
            for bitmap in (self.unflushed, *self._flushing):
                self.dirty.merge(bitmap)
                self._backlog.may_be_lost(bitmap)
            self.again_bytes += self.dirty.dirty_bytes - before
            self.unflushed.clear_all()
            self._with_claims(self.unflushed)

    def renew_backlog(self) -> bool:
        """Whether the target's storage has all of the backlog; if so, a new backlog begins. Only
        for the thread that claims and flushes."""
        with self._lock:
            if is_durable := self._backlog.is_durable:
                claims = (*self._copies, *self._writes)
                self._backlog.begin(self.dirty, claims, self.unflushed, self._flushing)
        return is_durable

    @property
    def needs_flush(self) -> bool:
        """All of the backlog is copied, and no flush for it is in progress."""
        with self._lock:
            return self._backlog.needs_flush

    def may_differ(self) -> DirtyBitmap:
        """A copy of everything that may differ between source and the target's storage, or more;
        without guests' writes in progress. Only for the thread that claims and flushes."""
        # In the order in which a range passes through them, so that it is never missed.
        found = self.dirty.copy()
        with self._lock:
            for bitmap in (self.unflushed, *self._flushing):
                found.merge(bitmap)
        return found

    def map(self, cells_max: int) -> DiskMap:
        """How much is dirty, in flight, not flushed or zero in each of so many cells. The counting
        needs no lock: it is for the thread that claims and flushes."""
        cells = Cells(self.size, self.granularity, cells_max)
        with self._lock:
            claims = [*self._copies, *self._writes]
            sent = (self.unflushed, *self._flushing)
        in_flight, zeroes = cells.bytes_of(claims), self.zeroes
        return map_of(cells, dirty=self.dirty, in_flight=in_flight, unflushed=sent, zeroes=zeroes)

    def close(self) -> None:
        """The mirror has ended, and no guest marks its bitmap any more."""
        for bitmap in (self.dirty, self.unflushed, *self._flushing):
            bitmap.close()
        if self._remainder is not None:
            self._remainder.close()

    def _in_the_way_of(self, claim: Claim) -> list[Claim]:
        # For each claim of the copier, with many in flight: so `overlaps` stands here once more.
        start, end = claim.offset, claim.end
        owners = chain(self._copies, self._writes, self._waiting)
        return [c for c in owners if c.offset < end and start < c.offset + c.length]

    def _is_in_sync(self) -> bool:
        return not (self._copies or self._writes) and self.dirty.is_empty

    def _give_back(self, claim: Claim, parts: tuple[Range, ...]) -> None:
        self.dirty.mark_again(*parts)
        self._backlog.gave_back(claim, parts)

    def _repeat(self, covered: DirtyBitmap) -> None:
        if self._repeated is None:
            self._repeated = DirtyBitmap(self.size, self.granularity)
        self._repeated.merge(covered)
        self._repeated.subtract(self.dirty)
        self.dirty.merge(covered)
        self._backlog.may_be_lost(covered)

    def _renew_remainder(
        self, flush: DirtyBitmap, position: tuple[int, list[Range]], *, failed: bool
    ) -> None:
        if failed or self._flushing or self._guests_flushes:
            self._sent.flush_failed()
        elif self._remainder is not None:
            parts = self._sent.flush_ended(flush, self.dirty)
            if parts is not None:
                number, in_progress = position
                self._remainder.put(number, in_progress + parts)

    def _with_claims(self, bitmap: DirtyBitmap) -> DirtyBitmap:
        for claim in (*self._copies, *self._writes):
            bitmap.mark(claim.offset, claim.length)
        return bitmap

    def _tell_waiting(self) -> None:
        if self._waiting:
            self._changed.notify_all()

    def _news(self, claim: Claim) -> int:
        known = self._repeated.bytes_in(claim.offset, claim.length) if self._repeated else 0
        return claim.length - known

    def _is_free_for(self, claim: Claim) -> bool:
        earlier = self._waiting[: self._waiting.index(claim)]
        return not any(c.overlaps(claim) for c in (*self._copies, *self._writes, *earlier))
