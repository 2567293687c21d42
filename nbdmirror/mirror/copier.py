"""Copier: turns dirty granules into requests on the target. One per mirror, on the loop's thread.

The life of a claim (the ledger's `Claim`: its bits are already clear):

    extents of the source  ->  zero: write-zeroes on the target, piece after piece
                           ->  data: read, look for zeroes, write; piece after piece, one buffer
    -> settle: done, or dirty again

A piece is as large as the storage can answer soon (in_flight.ANSWER_S): each piece is progress, and
no piece begins after `stop`. Many claims run at once, each with one slot; a slot is a buffer of
`request_bytes`. So requests and bytes are both bounded. The source's extents are queried after the
bits are cleared. The answer "zero" counts only for the claim that asked. The answer "data" counts
for later claims as well, since treating zeroes as data is never wrong.

The copier does not decide about errors: it marks the claim dirty again and calls its observer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nbdmirror.devices.base import AsyncSource, AsyncTarget, Done, Extent, Run, leading_bytes
from nbdmirror.disk.claim import Claim, joined
from nbdmirror.disk.tracker import Tracker
from nbdmirror.errors import DeviceError
from nbdmirror.mirror.buffers import Buffers
from nbdmirror.mirror.copy_in_flight import Copy, Observer
from nbdmirror.mirror.hot_last import HotLast
from nbdmirror.mirror.in_flight import OPENING_BYTES, CopierLoad, Holes, InFlightWindow
from nbdmirror.mirror.options import BUFFER_BYTES_DEFAULT
from nbdmirror.mirror.rate_limit import Haste, RateLimit
from nbdmirror.mirror.waits import Cause, Waits

REQUEST_BYTES_MAX = 1 << 20
"""Largest read and write (QEMU's MAX_IO_BYTES), except the one of in_flight.OPENING_BYTES. Larger
requests are not faster on a local socket."""


class Copier:
    """Copies from `source` to `target` what `tracker` has as dirty, while `is_running`.

    `pump` starts new claims. Guest writes call nothing, so `pump` must be called regularly."""

    on_settled: Callable[[], None] | None = None
    """Called when a claim has ended while others are in flight; else the observer is."""

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
        load: CopierLoad | None = None,
        waits: Waits | None = None,
    ) -> None:
        """`load`: shared by all copiers of this loop."""
        self.source = source
        self.target = target
        self.tracker, self.observer = tracker, observer
        self.unmap = unmap
        self.is_running = self._is_pumping = False
        self.copied_bytes = 0
        """Bytes copied since the start: QEMU's `offset`, which never decreases."""
        self.written_bytes = 0
        """Bytes of data sent to the target, zeroes not counted."""
        self.spared_bytes = 0
        """Bytes of claims that were clean, and not sent."""
        self.answers = 0
        """Requests that the target has answered."""
        self._clock = clock
        self._call_later = call_later
        # At least one granule, as in QEMU; a larger one than a request goes in several pieces.
        buffer_bytes = -(-buffer_bytes // tracker.granularity) * tracker.granularity
        self._request_bytes = min(buffer_bytes, request_bytes_max, REQUEST_BYTES_MAX)
        self._load = load or CopierLoad(clock, lambda: 0)
        self._waits = waits or Waits(clock)
        self._slots = max(1, buffer_bytes // self._request_bytes)
        self._window = InFlightWindow(
            self._request_bytes,
            self._load,
            opening_bytes=min(self._slots * self._request_bytes, request_bytes_max),
            granularity=tracker.granularity,
        )
        self._rate_limit = RateLimit(clock, call_later, self.pump, tracker.dirty)
        self._holes = Holes(self._request_bytes)
        self.hot = HotLast(tracker.dirty)
        self._buffers = Buffers()
        self._copies: set[Copy] = set()
        self._in_flight_bytes = self._piece_bytes = self._data_until = self.cursor = 0

    @property
    def in_flight(self) -> int:
        """Claims in flight."""
        return len(self._copies)

    @property
    def is_idle(self) -> bool:
        """No request is in flight, flushes included."""
        return not self._copies and not self._waits.flushes

    def start(self) -> None:
        self.is_running = True
        self.pump()

    def set_speed(self, speed_bytes_per_s: int) -> None:
        self._rate_limit.set_speed(speed_bytes_per_s)
        self.pump()

    def set_haste(self, haste: Haste) -> None:
        self._rate_limit.haste = haste

    def stop(self) -> None:
        """Begin no more claims and pieces. When the requests in flight have ended, `copy_settled`
        is called."""
        self.is_running = False
        self._waits.hold(None)
        self._window.start_over()
        self._holes.zeroed.start_over()

    def disown(self) -> None:
        """After `stop`: do not wait for the source any longer. The ranges of its reads are dirty
        again. A late answer is dropped: its buffer is not reused, and nothing is written."""
        for copy in [copy for copy in self._copies if copy.operation == "read"]:
            copy.buffer = None
            self._piece_bytes -= copy.piece_bytes
            self._settle(copy, failed=True)

    def close(self) -> None:
        """Stop for ever; nothing is in flight. The buffers are freed soon."""
        self.stop()
        self._buffers.free(self._call_later)

    def pump(self) -> None:
        """Start claims until the slots are full, nothing is dirty, or the speed limit says wait."""
        if self._is_pumping:
            return  # a claim was settled at once: the loop below continues
        was_busy, self._is_pumping = bool(self._copies), True
        try:
            while self.is_running and self._may_claim():
                claim = self._claim()
                if claim is None:
                    break
                self._begin(claim)
                was_busy = True
        finally:
            self._is_pumping = False
        if was_busy and not self._copies:
            self.observer.copy_settled()

    def _may_claim(self) -> bool:
        """Whether a claim may begin now. If not, `waits` gets the reason."""
        held = None
        has_room = self._window.has_room(self._in_flight_bytes)
        if has_room and len(self._copies) < self._slots and self._free_bytes >= self._request_bytes:
            if self._rate_limit.may_start():
                self._waits.hold(None)
                return True
            held = Cause.SPEED_LIMIT if self._rate_limit.is_limiting else None
        elif self._window.leaves_room:
            held = Cause.YIELDING
        self._waits.hold(held if held and not self.tracker.dirty.is_empty else None)
        return False

    @property
    def _free_bytes(self) -> int:
        return self._slots * self._request_bytes - self._in_flight_bytes

    @property
    def _next_bytes(self) -> int:
        """Largest length of the next request."""
        length = self._window.request_bytes
        return length if length <= self._free_bytes else self._request_bytes

    def _claim(self) -> Claim | None:
        """The next dirty run in bulk order: once around, then from the start (rule 35 of QEMU's: a
        cursor that went back on each write would never reach the end under load)."""
        granularity = self.tracker.granularity
        is_hole = self.cursor >= self._data_until and self._holes.is_inside
        length_max = self._holes.claim_bytes if is_hole else self._next_bytes
        length_max = min(length_max, self._rate_limit.claim_bytes_max or length_max)
        length_max = max(granularity, length_max)
        hot, claim = self.hot, None
        if self.cursor:
            claim = self.tracker.claim(self.cursor, length_max, hot.held)
        if claim is None:
            if self.cursor:
                hot.end_round(self._clock())
            self.cursor = self._data_until = 0
            if self._rate_limit.may_begin_round(hot.rest_until_s):
                hot.begin_round(is_hurried=self._rate_limit.haste is not Haste.LAG)
                claim = self.tracker.claim(0, length_max, hot.held)
                if claim is None and hot.held is not None:
                    hot.release()
                    claim = self.tracker.claim(0, length_max)
            if claim is not None:
                self._window.begin_round(is_kept_in_sync=self._rate_limit.haste is Haste.LAG)
        if claim is not None:
            self._rate_limit.claimed(-(-claim.length // granularity), claim.bytes_to_copy)
            self.cursor = claim.end
        return claim

    def _begin(self, claim: Claim) -> None:
        next_bytes = self._next_bytes
        is_hole_likely = claim.length > max(next_bytes, self.tracker.granularity)
        length = min(claim.length, self._request_bytes if is_hole_likely else next_bytes)
        start = claim.offset
        if claim.parts is not None:
            start = claim.parts[0][0]
            length = min(length, sum(claim.parts[-1]) - start)
            self.spared_bytes += claim.length - claim.bytes_to_copy
        # With a speed limit, small claims too count in full until the limit has counted them.
        weight = self._request_bytes if self._rate_limit.speed_bytes_per_s else length
        if self._window.is_late:  # a large granule, whose pieces come one after the other
            weight = max(weight, min(claim.length, self.tracker.granularity))
        copy = Copy(claim, length, weight, position=start)
        self._load.count += not self._copies
        self._waits.copy_begins()
        self._copies.add(copy)
        self._in_flight_bytes += weight
        self._window.round_bytes += claim.length
        if claim.end <= self._data_until or claim.parts is not None:
            copy.extents = [Extent(claim.length, zero=False, hole=False)]
            self._rate_limit.account(length)
            self._next_piece(copy)
            return
        start_s = self._clock()

        def then(extents: list[Extent] | None, error: BaseException | None) -> None:
            # Rule 31: an error means "treat as data"; the copy does not fail.
            extents = extents or [Extent(claim.length, zero=False, hole=False)]
            took_s = self._clock() - start_s
            self._holes.found(claim.length, took_s, is_hole=extents[0].zero)
            if copy in self._copies:  # else disowned
                self._have_extents(copy, extents)

        self.source.start_extents(claim.offset, claim.length, then)

    def _have_extents(self, copy: Copy, extents: list[Extent]) -> None:
        """Reduce the claim to one kind: a run of zero granules, or a piece of data."""
        claim, granularity = copy.claim, self.tracker.granularity
        zero = leading_bytes(extents, zero=True)
        if zero < claim.length:
            zero -= zero % granularity
        if zero:
            copy.is_all_zero(zero, is_hole=extents[0].hole)
            if zero < claim.length:
                self._give_back(copy, zero)
            self._rate_limit.account(0 if self.unmap else zero)
        else:
            data = leading_bytes(extents, zero=False)
            self._data_until = max(claim.offset + data, claim.offset + granularity)
            length_max = min(copy.request_bytes, data - data % granularity)
            length_max = max(self._request_bytes, granularity, length_max)
            if claim.length > length_max:
                self._give_back(copy, length_max)
            copy.extents = [Extent(claim.length, zero=False, hole=False)]
            self._rate_limit.account(claim.length)
        self._next_piece(copy)

    def _give_back(self, copy: Copy, length: int) -> None:
        self._window.round_bytes -= copy.claim.length - length
        self.tracker.shrink(copy.claim, length)
        self.cursor = min(self.cursor, copy.claim.end)

    def _next_piece(self, copy: Copy) -> None:
        """Zero or copy the claim's next piece; settle the claim at its end, or after an error."""
        claim = copy.claim
        copy.position = claim.next_part(copy.position)
        if copy.error is None and copy.position < claim.end:
            self._note_progress(copy)
        is_left = copy.position < claim.end
        if copy.error is not None or not is_left or not self.is_running:
            self._settle(copy, failed=copy.error is not None or is_left)
        elif copy.extents[0].zero:
            length = min(self._holes.zeroed.length, claim.end - copy.position)
            end = copy.position + length
            self._write(copy, [(copy.position, length, None)], end, self._clock())
        else:
            self._read(copy)

    def _note_progress(self, copy: Copy) -> None:
        """A part of the claim is copied. The rest is left to another claim if the copier was
        stopped, or if zeroing has become slow: a guest may wait for these granules."""
        copied = copy.position - copy.claim.offset
        whole = copied - copied % self.tracker.granularity
        is_slow = copy.extents[0].zero and not self._holes.zeroed.is_longest
        if whole and (is_slow or not self.is_running):
            self._give_back(copy, whole)
        else:
            self.copied_bytes += self.tracker.progress(copy.claim, copied)

    def _read(self, copy: Copy) -> None:
        """Read one piece, from its first to its last part; only the parts are written."""
        start_s = self._clock()
        length = min(copy.request_bytes, self._window.piece_bytes_max)
        if copy.buffer is not None:
            length = min(length, len(copy.buffer.view))
        end = min(copy.claim.end, copy.position + length)
        parts = joined(copy.claim.parts_in(copy.position, end), self._window.gap_bytes)
        offset, length = parts[0][0], sum(parts[-1]) - parts[0][0]
        try:
            buffer = copy.buffer = copy.buffer or self._buffers.take(end - copy.position)
        except DeviceError as error:
            self._piece_ended(copy, error)
            return
        copy.operation, copy.piece_bytes = "read", length
        self._piece_bytes += length

        def then(error: BaseException | None) -> None:
            if copy not in self._copies:
                return  # disowned
            if error is not None:
                self._piece_ended(copy, error)
            else:
                runs = [run for at, span in parts for run in buffer.runs(at, span, at - offset)]
                self._write(copy, runs, end, start_s)

        self.source.start_read(buffer.view[:length], offset, then)

    def _write(self, copy: Copy, runs: list[Run], end: int, start_s: float) -> None:
        """`runs`: the next piece, which ends at `end` and began at `start_s`."""
        copy.operation, copy.pending = "write", len(runs)
        write_s, piece_bytes = self._clock(), self._piece_bytes
        self._waits.write_begins(write_s)

        def then(length: int, is_zero: bool, error: BaseException | None) -> None:
            now_s = self._clock()
            self.answers += 1
            self._window.answered(write_s, now_s, length, is_zero=is_zero)
            copy.error = copy.error or error
            copy.pending -= 1
            if copy.pending:
                return
            self._waits.write_ends(now_s)
            if copy.extents[0].zero:
                self._holes.zeroed.answered(length, now_s - write_s)
            else:
                self._window.copied(now_s - start_s, copy.piece_bytes, piece_bytes)
            copy.position = end
            self._piece_ended(copy, copy.error)

        for offset, length, content in runs:
            if content is None:
                self.target.start_zero(offset, length, self.unmap, partial(then, length, True))
            else:
                self.written_bytes += length
                self._window.began(length)
                self.target.start_write(content, offset, partial(then, length, False))

    def _piece_ended(self, copy: Copy, error: BaseException | None) -> None:
        self._piece_bytes -= copy.piece_bytes
        copy.error, copy.piece_bytes = error, 0
        self._next_piece(copy)

    def _settle(self, copy: Copy, *, failed: bool) -> None:
        """End the claim. `failed`, with or without an error: its range is dirty again."""
        self.copied_bytes += self.tracker.settle(copy.claim, failed=failed)
        self._copies.discard(copy)
        self._waits.copy_ends()
        self._in_flight_bytes -= copy.weight
        self._load.count -= not self._copies
        has_room = self._window.has_room(self._in_flight_bytes + self._buffers.length)
        is_free = copy.error is None  # else a given-up connection may still use the buffer
        if is_free and has_room and copy.buffer and len(copy.buffer.view) <= self._request_bytes:
            self._buffers.keep(copy.buffer)
        if copy.error is not None:
            self.observer.copy_failed(copy.operation, copy.error)
        if not self._is_pumping:
            self.pump()
            if not self._copies:
                self.observer.copy_settled()
            elif self.on_settled is not None:
                self.on_settled()

    def flush(self, done: Done) -> None:
        """Flush the target: also data from before this mirror, which the mirror may rely on.
        Skipped for a disk of no bytes, whose target may not support flush."""
        if not self.tracker.size:
            done(None)
            return
        covered = self.tracker.begin_flush()
        self._waits.flush_begins()

        def then(error: BaseException | None) -> None:
            self._waits.flush_ends()
            self.answers += 1
            self.tracker.end_flush(covered, failed=error is not None)
            done(error)
            if self.is_idle:
                self.observer.copy_settled()  # its caller may have given up waiting

        self.target.start_flush(then)
