"""Ledger: the guest requests of a disk. It and Tracker (tracker.py) are all that guest threads and
the copier share. Here is the argument why the data path is right.

THE INVARIANT, for every granule at every moment, while a mirror runs:

    target equals source, or the granule is dirty, or it is claimed by a copy in flight,
    or a guest write that covers it is under way.

How it is kept:

 1. A guest write marks *after* the source has done it, failed or not (`leave`). Whoever clears
    the bit later reads later, and so sees the write. If it were marked before only, a copy could
    clear the bit, read the old data, and the write would land afterwards.
 2. Whether to mark is looked at on the way out, not on the way in. A write that began before the
    mirror did is then either marked, or was over before the mirror marked everything.
 3. The copier clears the bits first and looks at the source afterwards (`Tracker.claim`). A write
    that lands while the copy runs marks again.
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

from nbdmirror.disk.bitmap import DirtyBitmap


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
