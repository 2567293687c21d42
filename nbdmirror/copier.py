"""Copier: turns dirty granules into requests on the target. One per mirror, on the loop's thread.

The life of a claim (the ledger's `Claim`: its bits are already clear):

    extents of the source  ->  zero: write-zeroes on the target
                           ->  data: read, look for zeroes, write; piece after piece, one buffer
    -> settle: done, or dirty again

Many claims run at once, each with one slot; a slot is a buffer of `request_bytes`. So requests and
bytes are both bounded. What the source says of its extents is asked after the bits are cleared, and
a "zero" is believed only for the claim that asked; "data" is believed for later claims as well,
since treating zeroes as data is never wrong.

The copier has no opinion about errors: it makes the claim dirty again and tells its observer, which
may pause it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from nbdmirror.buffer import Buffers, PageBuffer
from nbdmirror.depth import OPENING_BYTES, Crowd, Depth
from nbdmirror.device import AsyncSource, AsyncTarget, Done, Extent, round_out
from nbdmirror.ledger import Claim, Tracker
from nbdmirror.pace import Pace

REQUEST_BYTES_MAX = 1 << 20
"""Largest read and write but one (depth.OPENING_BYTES), QEMU's MAX_IO_BYTES: larger ones gain
nothing on a local socket."""

BUFFER_BYTES_DEFAULT = 64 << 20
"""Of buf-size. QEMU's is 16 MiB, which over a link of 20 ms is 800 MB/s. A target that is near gets
no more than depth.QUICK_BYTES, so the rest is not even allocated for it."""

WINDOW_BYTES_MAX = 32 << 30
"""Longest claim where nothing is known of the source: a hole of this length is one claim. Long
enough that the bitmap can give back whole pages."""

ZERO_UNIT_BYTES = 64 << 10
"""Zeroes in data are looked for in units of this size: the usual cluster, so that a target can
leave it out."""


_ZEROES = bytes(ZERO_UNIT_BYTES)

_Run = tuple[int, int, memoryview | None]
"""Offset, length, and what is written there; None is zeroes."""


class Observer(Protocol):
    """Who is told; called on the loop's thread."""

    def copy_failed(self, operation: str, error: BaseException) -> None:
        """A "read" of the source or a "write" on the target failed; its range is dirty again."""

    def copy_settled(self) -> None:
        """Nothing is in flight any more: all is clean, or the copier is not running."""


@dataclass(slots=True, eq=False)
class _Copy:
    """One claim on its way. `position` is where the next piece starts; `pending` counts the
    requests of this piece on the target."""

    claim: Claim
    request_bytes: int
    """The most of its data that is one request."""
    weight: int
    """Bytes for which it counts among those in flight: the most that it may have."""
    buffer: PageBuffer | None = None
    """Taken when there is data."""
    position: int = 0
    pending: int = 0
    operation: str = "read"
    error: BaseException | None = None
    extents: list[Extent] = field(default_factory=list)


class Copier:
    """Copies what `tracker` says from `source` to `target` while `running`.

    `pump` starts what can be started; it is called when something may have changed (guest writes
    are not announced: who wants them copied pumps now and then).
    """

    def __init__(
        self,
        *,
        source: AsyncSource,
        target: AsyncTarget,
        tracker: Tracker,
        observer: Observer,
        clock: Callable[[], float],
        call_later: Callable[[float, Callable[[], None]], object],
        buffer_bytes: int = BUFFER_BYTES_DEFAULT,
        request_bytes_max: int = OPENING_BYTES,  # what both sides take; a power of two
        unmap: bool = True,
        crowd: Crowd | None = None,
    ) -> None:
        """`crowd`: of all copiers of this loop."""
        self.source = source
        self.target = target
        self.tracker = tracker
        self.observer = observer
        self.unmap = unmap
        self.is_running = False
        self.copied_bytes = 0
        """Bytes settled well since the start: QEMU's `offset`, which never goes back."""
        self.written_bytes = 0
        """Bytes of data sent to the target, zeroes not counted."""
        self.answers = 0
        """Requests that the target has answered."""
        self._clock = clock
        self._call_later = call_later
        # At least one granule, as in QEMU; a larger one than a request goes in several pieces.
        buffer_bytes = round_out(0, buffer_bytes, tracker.granularity)[1]
        self._request_bytes = min(buffer_bytes, request_bytes_max, REQUEST_BYTES_MAX)
        self._crowd = crowd or Crowd(clock, lambda: 0)
        self._slots = max(1, buffer_bytes // self._request_bytes)
        self._depth = Depth(
            self._request_bytes,
            self._crowd,
            opening_bytes=min(self._slots * self._request_bytes, request_bytes_max),
            granularity=tracker.granularity,
        )
        self.pace = Pace(clock, call_later, self.pump)
        self._buffers = Buffers()
        self._copies: set[_Copy] = set()
        self._in_flight_bytes = 0
        self._flushes = 0
        self._cursor = 0
        self._data_until = 0
        self._window = self._request_bytes
        self._is_pumping = False

    @property
    def in_flight(self) -> int:
        """Claims in flight."""
        return len(self._copies)

    @property
    def is_writing(self) -> bool:
        """An answer of the target's is waited for."""
        return self._flushes > 0 or any(copy.operation == "write" for copy in self._copies)

    @property
    def is_idle(self) -> bool:
        """No request of ours is in flight, flushes included."""
        return not self._copies and not self._flushes

    @property
    def remaining_bytes(self) -> int:
        """Dirty, or in flight; QEMU's len is this and `offset`."""
        return self.tracker.remaining_bytes

    def start(self) -> None:
        self.is_running = True
        self.pump()

    def stop(self) -> None:
        """Claim no more. What is in flight ends by itself; then `copy_settled` is called."""
        self.is_running = False
        self._depth.start_over()

    def close(self) -> None:
        """Stop for good; nothing is in flight. The buffers go soon, not when the garbage collector
        finds the job."""
        self.stop()
        self._free_buffers()

    def _free_buffers(self) -> None:
        """One a turn of the loop: each holds the GIL, and so guests up, for a tenth of a
        millisecond."""
        if self._buffers.length:
            self._buffers.drop()
            self._call_later(0, self._free_buffers)

    def pump(self) -> None:
        """Start claims until the slots are full, nothing is dirty, or the speed limit says wait."""
        if self._is_pumping:
            return  # a claim that was settled at once: the loop below goes on
        was_busy = bool(self._copies)
        self._is_pumping = True
        try:
            while self.is_running and self._has_room() and self.pace.may_start():
                claim = self._claim()
                if claim is None:
                    break
                self._begin(claim)
                was_busy = True
        finally:
            self._is_pumping = False
        if was_busy and not self._copies:
            self.observer.copy_settled()

    def _has_room(self) -> bool:
        is_a_slot_free = len(self._copies) < self._slots and self._free_bytes >= self._request_bytes
        return is_a_slot_free and self._depth.has_room(self._in_flight_bytes)

    @property
    def _free_bytes(self) -> int:
        return self._slots * self._request_bytes - self._in_flight_bytes

    @property
    def _next_bytes(self) -> int:
        """Of the next request at most."""
        length = self._depth.request_bytes
        return length if length <= self._free_bytes else self._request_bytes

    def _claim(self) -> Claim | None:
        """The next dirty run in bulk order: once around, then from the start (rule 35 of QEMU's: a
        cursor that went back on each write would never reach the end under load)."""
        granularity = self.tracker.granularity
        is_hole = self._cursor >= self._data_until and self._window > self._request_bytes
        length_max = self._window if is_hole else self._next_bytes
        length_max = min(length_max, self.pace.claim_bytes_max or length_max)
        length_max = max(granularity, length_max)
        claim = self.tracker.claim(self._cursor, length_max) if self._cursor else None
        if claim is None:
            self._cursor = self._data_until = 0
            if self.pace.may_begin_round():
                claim = self.tracker.claim(0, length_max)
            if claim is not None:
                self._depth.begin_round(is_kept_in_sync=self.pace.lag_s > 0)
        if claim is not None:
            self._cursor = claim.end
        return claim

    def _begin(self, claim: Claim) -> None:
        next_bytes = self._next_bytes
        is_window = claim.length > max(next_bytes, self.tracker.granularity)
        length = min(claim.length, self._request_bytes if is_window else next_bytes)
        # With a speed limit few claims begin before they are accounted for, small as they are.
        weight = self._request_bytes if self.pace.speed_bytes_per_s else length
        copy = _Copy(claim, length, weight, position=claim.offset)
        self._crowd.count += not self._copies
        self._copies.add(copy)
        self._in_flight_bytes += weight
        self._depth.round_bytes += claim.length
        if claim.end <= self._data_until:
            copy.extents = [Extent(claim.length, zero=False, hole=False)]
            self.pace.account(claim.length)
            self._next_piece(copy)
            return

        def then(extents: list[Extent] | None, error: BaseException | None) -> None:
            # Rule 31: an error means "treat as data", it is no failure of the copy.
            self._have_extents(copy, extents or [Extent(claim.length, zero=False, hole=False)])

        self.source.start_extents(claim.offset, claim.length, then)

    def _have_extents(self, copy: _Copy, extents: list[Extent]) -> None:
        """Keep of the claim what is of one kind: a run of zero granules, or a piece of data."""
        claim, granularity = copy.claim, self.tracker.granularity
        zero = _leading(extents, zero=True)
        if zero < claim.length:
            zero -= zero % granularity
        if zero:
            self._window = min(WINDOW_BYTES_MAX, self._window * 8)
            copy.extents = [Extent(zero, zero=True, hole=extents[0].hole)]
            if zero < claim.length:
                self._give_back(copy, zero)
            self.pace.account(0 if self.unmap else zero)
        else:
            data = _leading(extents, zero=False)
            self._data_until = max(claim.offset + data, claim.offset + granularity)
            self._window = max(self._request_bytes, granularity)
            length_max = max(self._window, min(copy.request_bytes, data - data % granularity))
            if claim.length > length_max:
                self._give_back(copy, length_max)
            copy.extents = [Extent(claim.length, zero=False, hole=False)]
            self.pace.account(claim.length)
        self._next_piece(copy)

    def _give_back(self, copy: _Copy, length: int) -> None:
        self._depth.round_bytes -= copy.claim.length - length
        self.tracker.shrink(copy.claim, length)
        self._cursor = min(self._cursor, copy.claim.end)

    def _next_piece(self, copy: _Copy) -> None:
        """Zero or copy what comes next of the claim; at its end, or after an error, settle it."""
        claim = copy.claim
        if copy.error is not None or copy.position >= claim.end:
            self._settle(copy)
        elif copy.extents[0].zero:
            copy.position = claim.end
            self._write(copy, [(claim.offset, claim.length, None)])
        else:
            offset = copy.position
            length = min(copy.request_bytes, claim.end - offset)
            copy.position += length
            copy.operation = "read"
            buffer = copy.buffer = copy.buffer or self._buffers.take(length)

            def then(error: BaseException | None) -> None:
                if error is not None:
                    copy.error = error
                    self._next_piece(copy)
                else:
                    self._write(copy, self._find_zeroes(buffer, offset, length))

            self.source.start_read(buffer.view[:length], offset, then)

    def _find_zeroes(self, buffer: PageBuffer, offset: int, length: int) -> list[_Run]:
        """Cut a piece into runs at multiples of ZERO_UNIT_BYTES of the disk. Data costs nothing
        here: `has` ends at the first byte that differs."""
        runs: list[tuple[int, int, bool]] = []
        start = 0
        while start < length:
            span = min(ZERO_UNIT_BYTES - (offset + start) % ZERO_UNIT_BYTES, length - start)
            zeroes = _ZEROES if span == ZERO_UNIT_BYTES else bytes(span)
            is_zero = buffer.has(zeroes, start)
            if runs and runs[-1][2] == is_zero:
                runs[-1] = (runs[-1][0], runs[-1][1] + span, is_zero)
            else:
                runs.append((offset + start, span, is_zero))
            start += span
        view = buffer.view
        return [
            (at, span, None if is_zero else view[at - offset : at - offset + span])
            for at, span, is_zero in runs
        ]

    def _write(self, copy: _Copy, runs: list[_Run]) -> None:
        copy.operation = "write"
        copy.pending = len(runs)
        start_s = self._clock()

        def then(is_zero: bool, error: BaseException | None) -> None:
            self.answers += 1
            self._depth.answered(self._clock() - start_s, is_zero=is_zero)
            copy.error = copy.error or error
            copy.pending -= 1
            if not copy.pending:
                self._next_piece(copy)

        for offset, length, content in runs:
            if content is None:
                self.target.start_zero(offset, length, self.unmap, partial(then, True))
            else:
                self.written_bytes += length
                self._depth.began(length)
                self.target.start_write(content, offset, partial(then, False))

    def _settle(self, copy: _Copy) -> None:
        self.copied_bytes += self.tracker.settle(copy.claim, failed=copy.error is not None)
        self._copies.discard(copy)
        self._in_flight_bytes -= copy.weight
        self._crowd.count -= not self._copies
        has_room = self._depth.has_room(self._in_flight_bytes + self._buffers.length)
        if has_room and copy.buffer and len(copy.buffer.view) <= self._request_bytes:
            self._buffers.keep(copy.buffer)
        if copy.error is not None:
            self.observer.copy_failed(copy.operation, copy.error)
        if not self._is_pumping:
            self.pump()
            if not self._copies:
                self.observer.copy_settled()

    def flush(self, done: Done) -> None:
        """Make durable what the target holds: also what was written to it before this mirror, which
        may have little to copy because of that. A disk of no bytes may be on a target that has no
        flush."""
        if not self.tracker.size:
            done(None)
            return
        covered = self.tracker.begin_flush()
        self._flushes += 1

        def then(error: BaseException | None) -> None:
            self._flushes -= 1
            self.answers += 1
            self.tracker.end_flush(covered, failed=error is not None)
            done(error)
            if self.is_idle:
                self.observer.copy_settled()  # who waited for it may have given up waiting

        self.target.start_flush(then)


def _leading(extents: list[Extent], *, zero: bool) -> int:
    """The length of the extents at the front that are (not) zero."""
    length = 0
    for extent in extents:
        if extent.zero != zero:
            break
        length += extent.length
    return length
