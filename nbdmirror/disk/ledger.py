"""Ledger: the guest requests of a disk. Guest threads and the copier share only the ledger and the
tracker (tracker.py). This docstring has the argument why the data path is right.

THE INVARIANT, for every granule at every moment, while a mirror runs:

    target equals source, or the granule is dirty, or it is claimed by a copy in flight,
    or a guest write that covers it is in progress.

How it is kept:

1. A guest write marks *after* the source has done it, failed or not (`leave`). A copy that clears
   the bit later reads later, and so sees the write. With a mark only before the write, a copy could
   clear the bit and read the old data, and the write would land afterwards.
2. At its end, not at its beginning, a write decides whether to mark. So a write that began before
   the mirror is either marked, or ended before the mirror marked everything. A mirror that takes
   over the marks of another bitmap instead gets those of the writes in progress as well: `leave`
   looks again.
3. The copier clears the bits first and reads the source afterwards (`Tracker.claim`). A write that
   lands while the copy runs marks again.
4. No two copies of one granule are in flight at once (`claim` skips claimed granules): out of order
   they would leave old data under a clean bit.
5. A failed copy marks again before its claim ends (`settle`).
6. A synchronous write (copy-mode write-blocking) owns its granules against copies and against other
   synchronous writes, from before the source is written until the target has been written. It
   clears the granules that it covers whole *before* it writes, for the reason of 3: a background
   write in progress at the same time marks afterwards, and is not lost.
7. Details of a granule (fine.py) reduce what is sent, never what is owned: claims and `unflushed`
   have whole granules. Each mark leaves details *before* the bit, and a claim takes them *after* it
   has cleared the bit: so the invariant holds for each unit of a granule.

Locks. Guest reads, and guest writes in background mode, take no lock: `mark` is one C call under
the GIL, and the gate has two steps in a fixed order on each side (Dekker's algorithm). A guest
announces itself, then checks the gate; the event loop closes the gate, then checks for guests. The
GIL makes these steps sequentially consistent, so one of the two always sees the other.
`Tracker._lock` guards the claims and the synchronous writes; it is a leaf: no call of another
module and no I/O happens under it. There is no other lock in the data path."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.latency import Held, Latency


class Marked(Protocol):
    """What is marked when guests change the disk: a dirty bitmap, mostly."""

    def mark(self, offset: int, length: int) -> None:
        """A guest's change of the range, in bytes, has ended. From any thread; does not block, but
        for a throttle (throttle.py)."""


class Ledger:
    """One disk's guest requests in progress, the gate that holds them, and the bitmaps they mark.

    The attributes are for Disk's `pread` and `pwrite`, which do the work of `enter`, `leave` and
    the like without a call, since every request would pay for the call: see
    docs/measurements/2026-11-24.md.
    """

    def __init__(self) -> None:
        self.latency = Latency()
        self.tokens = itertools.count()
        self.writing: set[int] = set()
        """Changing requests and flushes."""
        self.flushing: set[int] = set()
        """Which of them are flushes."""
        self.reading: set[int] = set()
        self.bitmaps: tuple[Marked, ...] = ()
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
        """A changing request of this range, in bytes, has ended, well or not: the range may differ
        from the target now. `settled`: the bitmap of the mirror whose target a synchronous write
        has already written.

        A bitmap that was attached meanwhile is marked too. It may have been filled from another
        one that this request had yet to mark: a mirror's from the named bitmap that it copies.
        What was marked is not marked again: it may have been copied since."""
        marked: tuple[Marked, ...] = ()
        while marked is not self.bitmaps:
            before, marked = marked, self.bitmaps
            for bitmap in marked:
                if bitmap is not settled and bitmap not in before:
                    bitmap.mark(offset, length)
        self.writing.discard(token)
        if self.gate is not None:
            self.tell_gate()

    def changed(self, length: int, settled: DirtyBitmap | None = None) -> None:
        """All `length` bytes of the disk may have changed by themselves. From any thread; never
        waits at the gate. `settled`: a bitmap that is marked everywhere already."""
        token = next(self.tokens)
        self.writing.add(token)
        self.leave(token, 0, length, settled)

    def enter_flush(self) -> int:
        """A flush begins; waits while the gate is closed, unless the gate lets flushes through."""
        token = next(self.tokens)
        self.flushing.add(token)  # before it is announced, so that it never counts as a change
        self.writing.add(token)
        if (gate := self.gate) is not None and gate.holds_flushes:
            self.wait_at_gate(token)
        return token

    def leave_flush(self, token: int) -> None:
        """A flush has ended, well or not."""
        self.writing.discard(token)
        self.flushing.discard(token)
        if self.gate is not None:
            self.tell_gate()

    def enter_read(self) -> int:
        """A request that changes nothing begins. Never waits, not even at the gate."""
        token = next(self.tokens)
        self.reading.add(token)
        return token

    def leave_read(self, token: int) -> None:
        """A request that changes nothing has ended."""
        self.reading.discard(token)

    def wait_at_gate(self, token: int) -> None:
        """Wait at a closed gate, after announcing the request. Each request that waits when the
        gate opens is admitted, even if the next gate closes at once: no request is held twice. The
        request withdraws its announcement before it joins the waiting ones. In the other order it
        could be admitted between the two steps, and then withdraw that."""
        began_ns, cause = self.latency.clock_ns(), Held.PIVOT
        while (gate := self.gate) is not None:
            cause = Held.PIVOT if gate.holds_flushes else Held.CUT
            self.writing.discard(token)
            gate.waiting.add(token)
            self.tell_gate()
            gate.opened.wait()
            if token in gate.admitted:
                break
            self.writing.add(token)  # the gate was just being opened
        self.latency.waited(cause, self.latency.clock_ns() - began_ns)

    def tell_gate(self) -> None:
        """A request has ended, or waits at the gate."""
        if (gate := self.gate) is not None and not self._is_busy(gate):
            gate.on_idle()

    def _is_busy(self, gate: _Gate) -> bool:
        """Whether a request that the gate holds is in progress. One call of C, as each look at what
        guests change."""
        return bool(self.writing) if gate.holds_flushes else not self.writing <= self.flushing

    # The event loop's thread.

    def attach(self, bitmap: Marked, *, is_first: bool = False) -> None:
        """From now on every changing request that *ends* marks `bitmap` (point 2 above).
        `is_first`: before the others."""
        self.bitmaps = (bitmap, *self.bitmaps) if is_first else (*self.bitmaps, bitmap)

    def detach(self, bitmap: Marked) -> None:
        """From now on no request marks `bitmap`."""
        self.bitmaps = tuple(b for b in self.bitmaps if b is not bitmap)

    def close_gate(self, on_idle: Callable[[], None], *, holds_flushes: bool = True) -> None:
        """Hold new changing requests. `on_idle` is called when none is in progress any more, from
        any thread and perhaps more than once; it must not block. Then check `is_idle`.

        `holds_flushes`: hold flushes too, as before a swap. A cut needs the content at one moment,
        and a flush does not change the content; a flush may take long."""
        assert self.gate is None, "the gate is closed already"
        self.gate = _Gate(on_idle, holds_flushes)
        self.tell_gate()

    def open_gate(self) -> None:
        """Admit all held requests. A gate must be opened within a bound after it was closed."""
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.admitted = frozenset(gate.waiting)
            self.writing |= gate.admitted
            gate.opened.set()

    def new_requests(self) -> int:
        """The number of requests that have begun since the last call."""
        before, self._token_asked_for = self._token_asked_for, next(self.tokens)  # no other way
        return self._token_asked_for - before - 1

    @property
    def begun(self) -> int:
        """How many requests have begun so far, and a few more: `new_requests` counts itself. From
        any thread."""
        return int(repr(self.tokens)[len("count(") : -1])  # no other way leaves it as it is

    @property
    def is_idle(self) -> bool:
        """No request that the gate holds is in progress; no changing request and no flush if the
        gate is open. Once true behind a closed gate, it stays true: a guest that announces itself
        later sees the gate before it does any I/O."""
        if (gate := self.gate) is None:
            return not self.writing
        gate.was_idle = gate.was_idle or not self._is_busy(gate)
        return gate.was_idle

    def reads(self) -> frozenset[int]:
        """The reads in progress, for `reads_left`."""
        return frozenset(self.reading)

    def reads_left(self, reads: frozenset[int]) -> frozenset[int]:
        """The reads of `reads` that are still in progress. Tokens are never reused."""
        return reads & frozenset(self.reading) if reads else reads

    def writes(self) -> frozenset[int]:
        """The changing requests and flushes in progress, for `writes_left`."""
        return frozenset(self.writing)

    def writes_left(self, writes: frozenset[int]) -> frozenset[int]:
        """The requests of `writes` that are still in progress."""
        return writes & frozenset(self.writing) if writes else writes


@dataclass(slots=True)
class _Gate:
    on_idle: Callable[[], None]
    holds_flushes: bool
    was_idle: bool = False
    waiting: set[int] = field(default_factory=set)
    admitted: frozenset[int] = frozenset()
    """The waiting requests that the opening of the gate has announced again."""
    opened: threading.Event = field(default_factory=threading.Event)
