"""The concurrency file of the data path: what guest threads and the copier share, and why it is
right.

THE INVARIANT, for every granule at every moment, while a mirror runs:

    target equals source, or the granule is dirty, or it is claimed by a copy in flight,
    or a guest write that covers it is under way.

How it is kept:

 1. A guest write marks *after* the source has done it, failed or not (`leave`). Whoever clears
    the bit later reads later, and so sees the write. If it were marked before only, a copy could
    clear the bit, read the old data, and the write would land afterwards.
 2. Whether to mark is looked at on the way out, not on the way in. A write that began before the
    mirror did is then either marked, or was over before the mirror marked everything.
 3. The copier clears the bits first and looks at the source afterwards (`claim`). A write that
    lands while the copy runs marks again.
 4. No two copies of one granule are in flight at once (`claim` skips claimed granules): out of
    order they would leave old data under a clean bit.
 5. A failed copy marks again before the claim goes (`settle`).
 6. A synchronous write (copy-mode write-blocking) owns its granules against copies and against
    other synchronous writes, from before the source is written until the target has been. It
    clears what it covers whole *before* it writes, for the reason of 3: a background write that is
    under way at the same time marks afterwards, and is not wiped out.
 7. Details of a granule (fine.py) narrow what is sent, never who owns it: claims and `unflushed`
    are of whole granules. All that marks leaves details *before* the bit, and a claim takes them
    *after* it has cleared the bit: so the invariant holds for each unit of a granule.

Locks. Guest reads, and guest writes in background mode, take none: `mark` is one C call under the
GIL, and the gate is two steps in a fixed order on each side (Dekker's): a guest announces itself,
then looks at the gate; whoever closes the gate closes it, then looks for guests. The GIL makes
these steps sequentially consistent, so one of the two always sees the other. `Tracker._lock` guards
the claims and the synchronous writes; it is a leaf: nothing is called and no I/O is done under it.
There is no other lock in the data path.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from nbdmirror.devices.base import round_out
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim
from nbdmirror.disk.fine import FineBitmap


class Ledger:
    """One disk's guest requests under way, the gate that holds them, and the bitmaps they mark.

    The attributes are for Disk's `pread` and `pwrite`, which do what `enter`, `leave` and their
    like do without calling them: every request pays for that, see docs/measurements/2026-11-24.md.
    """

    def __init__(self) -> None:
        self.tokens = itertools.count()
        self.writing: set[int] = set()
        self.reading: set[int] = set()
        self.bitmaps: tuple[DirtyBitmap, ...] = ()
        self.gate: _Gate | None = None
        self._token_asked_for = -1

    # Guest threads.

    def enter(self) -> int:
        """A changing request begins; waits while the gate is closed. Returns its token."""
        token = next(self.tokens)
        self.writing.add(token)
        if self.gate is not None:
            self.wait_at_gate(token)
        return token

    def leave(
        self, token: int, offset: int, length: int, settled: DirtyBitmap | None = None
    ) -> None:
        """A changing request ended, well or not: the range may differ from the target now.
        `settled` is the bitmap of a mirror that a synchronous write has dealt with itself."""
        for bitmap in self.bitmaps:
            if bitmap is not settled:
                bitmap.mark(offset, length)
        self.writing.discard(token)
        if self.gate is not None:
            self.tell_gate()

    def enter_read(self) -> int:
        """A request that changes nothing begins. It never waits, not even at the gate."""
        token = next(self.tokens)
        self.reading.add(token)
        return token

    def leave_read(self, token: int) -> None:
        self.reading.discard(token)

    def wait_at_gate(self, token: int) -> None:
        """Of a changing request that has announced itself and then seen the gate. Whoever waits
        when it opens goes in, even if the next gate closes at once: no request is held twice. It
        withdraws its announcement before it is among the waiting: the other way round it could be
        let in between the two steps, and then withdraw that."""
        while (gate := self.gate) is not None:
            self.writing.discard(token)
            gate.waiting.add(token)
            self.tell_gate()
            gate.opened.wait()
            if token in gate.admitted:
                return
            self.writing.add(token)  # it came while the gate was being opened

    def tell_gate(self) -> None:
        """A request left, or stands at the gate."""
        if (gate := self.gate) is not None and not self.writing:
            gate.on_idle()

    # The owner of the disk's jobs (one thread).

    def attach(self, bitmap: DirtyBitmap) -> None:
        """From now on every changing request that *ends* marks `bitmap` (point 2 above)."""
        self.bitmaps = (*self.bitmaps, bitmap)

    def detach(self, bitmap: DirtyBitmap) -> None:
        self.bitmaps = tuple(b for b in self.bitmaps if b is not bitmap)

    def close_gate(self, on_idle: Callable[[], None]) -> None:
        """Hold new changing requests back. `on_idle` is called, from any thread and perhaps more
        than once, when none is under way any more; it must not block. Ask `is_idle` then."""
        assert self.gate is None, "the gate is closed already"
        self.gate = _Gate(on_idle)
        self.tell_gate()

    def open_gate(self) -> None:
        """Let everybody go on. Whoever closes the gate opens it, within a bound."""
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.admitted = frozenset(gate.waiting)
            self.writing |= gate.admitted
            gate.opened.set()

    def new_requests(self) -> int:
        """How many requests have begun since this was last asked."""
        before, self._token_asked_for = self._token_asked_for, next(self.tokens)  # no other way
        return self._token_asked_for - before - 1

    @property
    def is_idle(self) -> bool:
        """No changing request is under way. Once true behind a closed gate, it stays true: a guest
        that announces itself later sees the gate before it does any I/O."""
        if (gate := self.gate) is None:
            return not self.writing
        gate.was_idle = gate.was_idle or not self.writing
        return gate.was_idle

    def reads(self) -> frozenset[int]:
        """The reads under way, for whoever waits until these have gone (`reads_left`)."""
        return frozenset(self.reading)

    def reads_left(self, reads: frozenset[int]) -> frozenset[int]:
        """Those of `reads` that are still under way. Tokens are never used again."""
        return reads & frozenset(self.reading) if reads else reads

    def writes(self) -> frozenset[int]:
        """The changing requests under way, for `writes_left`."""
        return frozenset(self.writing)

    def writes_left(self, writes: frozenset[int]) -> frozenset[int]:
        """Those of `writes` that are still under way."""
        return writes & frozenset(self.writing) if writes else writes


@dataclass(slots=True)
class _Gate:
    on_idle: Callable[[], None]
    was_idle: bool = False
    waiting: set[int] = field(default_factory=set)
    admitted: frozenset[int] = frozenset()
    """Those of the waiting whom its opening has announced again."""
    opened: threading.Event = field(default_factory=threading.Event)


class Tracker:
    """One mirror's dirty granules, its copies in flight and its synchronous writes.

    `claim`, `shrink` and `settle` are the copier's; `begin_write` and `end_write` are guests'.

    `dirty`, `unflushed` and what a flush is under way for are, together, all that may differ from
    the target's storage: a range goes into `unflushed` before it leaves `dirty`, and out of there
    by a flush that began after it was written. So what outlives a crash of the target, of this
    process (if `new_bitmap` makes bitmaps that do) or of both is told by those bitmaps alone.
    """

    def __init__(
        self,
        size: int,
        granularity: int,
        new_bitmap: Callable[[int, int], DirtyBitmap] = DirtyBitmap,
        unit: int = 0,
    ) -> None:
        """`unit`: the smallest part of a granule that is copied alone, if not all of it."""
        self.size = size
        self.granularity = granularity
        self._new_bitmap = new_bitmap
        self.dirty = FineBitmap(new_bitmap(size, granularity), unit or granularity)
        self.unflushed = new_bitmap(size, granularity)
        """What was sent to the target, or is about to be, since the last flush that succeeded: a
        target that crashes may lose it (rule 39)."""
        self._repeated: DirtyBitmap | None = None
        """What is dirty for no other reason than that a flush has failed."""
        self.written_bytes = 0
        """Bytes that synchronous writes brought to the target."""
        self.again_bytes = 0
        """What became dirty since it may have been lost, not since a guest wrote it."""
        self._flushing: list[DirtyBitmap] = []
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
    def remaining_bytes(self) -> int:
        """Dirty, or in flight; of what is copied again for a failed flush's sake nothing."""
        with self._lock:
            left = self.dirty.dirty_bytes + sum(c.length for c in self._writes)
            if self._repeated is None:
                return left + sum(c.length - c.progress for c in self._copies)
            left -= self._repeated.common_bytes(self.dirty)
            return left + sum(max(0, self._news(c) - c.progress) for c in self._copies)

    @property
    def in_sync(self) -> bool:
        """Nothing dirty and nothing in flight, under the lock that a synchronous write takes to
        turn one into the other: between two looks it would be missed by both."""
        with self._lock:
            return not (self._copies or self._writes) and self.dirty.is_empty

    def claim(self, offset: int, length_max: int) -> Claim | None:
        """Take the first dirty run at or after `offset` that nobody owns, at most `length_max`
        bytes (at least one granule): its bits are clear and the copy owns it until `settle`."""
        with self._lock:
            while run := self.dirty.next_run(offset, length_max):
                claim = Claim(*run)
                others = (self._copies, self._writes, self._waiting)
                taken = [c for owners in others for c in owners if c.overlaps(claim)]
                if taken:
                    start = min(c.offset for c in taken)
                    if start <= claim.offset:
                        offset = max(c.end for c in taken if c.offset <= claim.offset)
                        continue
                    claim.length = start - claim.offset
                self.unflushed.mark(claim.offset, claim.length)
                claim.parts = self.dirty.take(claim.offset, claim.length)
                self._copies.append(claim)
                return claim
        return None

    def shrink(self, claim: Claim, length: int) -> None:
        """Keep only the first `length` bytes (whole granules) of a copy; the rest is dirty
        again."""
        with self._lock:
            self.dirty.mark_again(*claim.shrink(length))
            self._tell_waiting()

    def settle(self, claim: Claim, *, failed: bool) -> int:
        """A copy ended; if it failed, its range is dirty first. Returns the progress in bytes."""
        progress = 0
        with self._lock:
            if failed:
                self.dirty.mark_again(*claim.parts_in(claim.offset, claim.end))
            else:
                progress = max(0, self._news(claim) - claim.progress)
                if self._repeated is not None:
                    self._repeated.clear(claim.offset, claim.length)
            self._copies.remove(claim)
            self._tell_waiting()
        return progress

    def progress(self, claim: Claim, copied: int) -> int:
        """So many bytes from its start have reached the target, of a copy that goes on. Returns the
        bytes that count as progress now."""
        with self._lock:
            if self._repeated is not None:
                return 0  # `settle` counts
            news, claim.progress = copied - claim.progress, copied
        return news

    def begin_write(self, offset: int, length: int) -> Claim:
        """A guest thread's synchronous write begins: waits until no copy and no such write overlaps
        its granules, then owns them all at once, so that nobody holds a part while waiting for the
        rest (no deadlock). First come, first served among writes, and copies keep off a range that
        a write waits for (no starvation). Granules covered whole are clean from here on (point
        6)."""
        start, span = round_out(offset, length, self.granularity)
        claim = Claim(start, min(span, self.size - start), progress=length)
        with self._lock:
            self._waiting.append(claim)
            self._changed.wait_for(lambda: self._is_free_for(claim))
            self._waiting.remove(claim)
            self._writes.append(claim)
            self.unflushed.mark(offset, length)
            self.dirty.clear(offset, length)
        return claim

    def end_write(self, claim: Claim, *, failed: bool) -> None:
        """The synchronous write has reached the target or, if `failed`, its granules are dirty
        again."""
        with self._lock:
            if failed:
                self.dirty.mark_again((claim.offset, claim.length))
            else:
                self.written_bytes += claim.progress
            self._writes.remove(claim)
            self._tell_waiting()

    def look(self, guests: Ledger) -> None:
        """Sort what `guests` have written. Called twenty times a second."""
        with self._lock:
            self.dirty.look(guests)

    def refine(self) -> None:
        """Copy parts of granules, soon."""
        with self._lock:
            self.dirty.refine()

    def mark_all(self) -> None:
        """From any thread: it may differ anywhere."""
        with self._lock:
            self.again_bytes += self.size - self.dirty.bytes_in(0, self.size)
            self.dirty.mark_all()

    def begin_flush(self) -> DirtyBitmap:
        """A flush is about to be sent: what it covers, for `end_flush`; not what is in flight."""
        with self._lock:
            covered = self.unflushed
            self._flushing.append(covered)
            self.unflushed = self._with_claims(self._new_bitmap(self.size, self.granularity))
        return covered

    def end_flush(self, covered: DirtyBitmap, *, failed: bool) -> None:
        """After one that failed what it was to cover is dirty: the target may have lost it, and a
        second flush would not tell. (Linux tells of a failed write-back once.) In QEMU's numbers
        that is no work of the job's, and so not in ours."""
        with self._lock:
            if failed:
                if self._repeated is None:
                    self._repeated = DirtyBitmap(self.size, self.granularity)
                self._repeated.merge(covered)
                self._repeated.subtract(self.dirty)
                self.dirty.merge(covered)
            self._flushing = [bitmap for bitmap in self._flushing if bitmap is not covered]
        covered.close()

    def target_came_back(self) -> None:
        """After a lost connection: what was not flushed may be lost, so it is dirty (rule 39); so
        is what is in flight, however it ends."""
        with self._lock:
            before = self.dirty.dirty_bytes
            for bitmap in (self.unflushed, *self._flushing):
                self.dirty.merge(bitmap)
            self.again_bytes += self.dirty.dirty_bytes - before
            self.unflushed.clear_all()
            self._with_claims(self.unflushed)

    def may_differ(self) -> DirtyBitmap:
        """What source and the target's storage may differ in, and more; a copy. Without guests'
        writes under way. On the thread that claims and flushes."""
        # In the order in which a range goes through them: it is never missed in between.
        found = self.dirty.copy()
        with self._lock:
            for bitmap in (self.unflushed, *self._flushing):
                found.merge(bitmap)
        return found

    def close(self) -> None:
        """The mirror has ended, and no guest marks its bitmap any more."""
        for bitmap in (self.dirty, self.unflushed, *self._flushing):
            bitmap.close()

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
