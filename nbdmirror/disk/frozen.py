"""Frozen: the granules of one point, as they were at its cut, while guests write.

THE INVARIANT, for every granule of the point that has not been read for it yet, at every moment:

    the disk's source has the content of the cut, and no write of the granule has begun since,
    or the store has that content,
    or the point is broken.

How it is kept:

1. The set appears behind the gate, with no changing request in progress (mirror/cut.py): so the
content of the cut is the content at one moment. 2. A changing request looks at the set once, after
it has announced itself and before it changes anything. A request that does not see the set began
before the gate closed, and has ended. 3. The request saves each granule of its range that is
*pending* before it begins. 4. A granule that the sender is reading is *owned*, and so is a granule
that another guest is saving. The request waits until that local I/O has ended. It never waits for
the far side. 5. A granule is *done* only after its content was read or saved. Then it belongs to
guests alone. 6. What cannot be saved breaks the point, and the guest continues (or, if the user
wishes, fails the guest's write). A broken point gives nothing more to its sender: what was read or
sent for it cannot be read again, since guests may have overwritten it.

A guest whose granules are all done, or do not belong to the point, takes no lock. `_lock` is a
leaf: no I/O happens under it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from nbdmirror.devices.base import BlockDevice, leading_bytes
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim, Range
from nbdmirror.disk.fine import FineBitmap
from nbdmirror.disk.latency import Held, Latency
from nbdmirror.disk.saved import Saved, SavedGranules
from nbdmirror.errors import IO_ERRORS

SAVE_BYTES = 256 << 10
"""A guest saves at most so much in one piece: its memory is not counted before it is saved."""

HOLE_BYTES_MIN, HOLE_BYTES = 4 << 20, 1 << 30
"""Before a guest zeroes or trims a range of at least HOLE_BYTES_MIN, its extents are queried, of at
most HOLE_BYTES at once: holes are saved without reading them."""


class Frozen:
    """`before_change` and `break_off` are for any thread, all other calls for the event loop's.
    Offsets and lengths are bytes."""

    def __init__(
        self,
        covered: FineBitmap,
        done: DirtyBitmap,
        saved: SavedGranules,
        *,
        breaks_guest_writes: bool = False,
        on_broken: Callable[[], None],
        on_saved: Callable[[], None],
        latency: Latency,
    ) -> None:
        """`covered`: the granules of the point, which no guest marks any more. `done`: empty.
        `breaks_guest_writes`: a write whose granules cannot be saved fails, and the point
        continues. `on_broken` is called once, and `on_saved` when the sender has found nothing and
        guests have saved more; both from any thread."""
        self.covered = covered
        self.saved = saved
        self.error: BaseException | None = None
        """Why the point is broken."""
        self._done = done
        """Granules of the point that were read or saved."""
        self._owned: list[Claim] = []
        """Ranges that the sender is reading or a guest is saving."""
        self._breaks_guest_writes = breaks_guest_writes
        self._on_broken = on_broken
        self._on_saved = on_saved
        self._latency = latency
        self._is_over = self._is_sender_waiting = False
        self._cursor = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    # Guests' threads.

    def before_change(self, source: BlockDevice, offset: int, length: int) -> None:
        """A guest is about to change the range on `source`: save what the point still needs of it.
        Raises IO_ERRORS only with `breaks_guest_writes`."""
        # Without the lock: `covered` does not change, and what is done stays done.
        is_covered = self.covered.is_dirty(offset, length)
        if is_covered and self._done.next_clean(offset, length) is not None:
            began_ns = self._latency.clock_ns()
            try:
                self._save(source, offset, length)
            finally:
                self._latency.waited(Held.SAVE, self._latency.clock_ns() - began_ns)

    def _save(self, source: BlockDevice, offset: int, length: int) -> None:
        end = offset + length
        while True:
            offset, claim = self._begin_save(offset, end)
            if claim is None:
                return
            is_saved = False
            try:
                self._put(source, claim)
                is_saved = True
            except IO_ERRORS as error:
                if self._breaks_guest_writes and not self._is_over:
                    raise
                self.break_off(error)
            finally:
                self._end_save(claim, is_saved=is_saved)

    def _begin_save(self, offset: int, end: int) -> tuple[int, Claim | None]:
        """Own pending granules between two offsets that nobody owns; wait if all pending ones are
        owned. None if none is pending, or the point is over. A guest that waits owns nothing. Also
        returns the offset of the first pending granule."""
        with self._lock:
            while not self._is_over and (run := self._pending(offset, end, HOLE_BYTES)):
                offset = run[0]
                if free := self._free(offset, end, HOLE_BYTES):
                    return offset, self._own(*free)
                self._changed.wait()
        return offset, None

    def _put(self, source: BlockDevice, claim: Claim) -> None:
        zero = 0
        if claim.length >= HOLE_BYTES_MIN:
            zero = self._leading_zeroes(source, claim)
        if zero or claim.length > SAVE_BYTES:
            self.shrink(claim, zero or max(SAVE_BYTES, self.covered.granularity))
        parts = self.parts_of(claim)
        content = None
        if not zero:
            start = parts[0][0]
            content = bytearray(sum(parts[-1]) - start)
            source.pread(memoryview(content), start)
            if not content[0] and content == bytes(len(content)):
                content = None
        self.saved.put(Saved(claim.offset, claim.length, parts, content))

    def _leading_zeroes(self, source: BlockDevice, claim: Claim) -> int:
        """Bytes in whole granules."""
        try:
            zero = leading_bytes(source.extents(claim.offset, claim.length), zero=True)
        except IO_ERRORS:
            return 0  # treat as data
        return zero if zero == claim.length else zero - zero % self.covered.granularity

    def _end_save(self, claim: Claim, *, is_saved: bool) -> None:
        with self._lock:
            self._release(claim, is_done=is_saved)
            was_waiting, self._is_sender_waiting = self._is_sender_waiting, False
        if was_waiting:
            self._on_saved()

    def break_off(self, error: BaseException) -> None:
        """Break the point, unless it is over. Guests do not save and wait for it any more."""
        with self._lock:
            if self._is_over:
                return
            self.error = error
            self._end()
        self._on_broken()

    # The sender, on the event loop's thread.

    def claim(self, length_max: int) -> Claim | None:
        """Own the next pending granules, of at most `length_max` bytes (at least one granule), to
        read them. None if there are none now. `read` ends this."""
        with self._lock:
            run = None if self._is_over else self._free(self._cursor, self.covered.size, length_max)
            if run is None:
                self._is_sender_waiting = True
                return None
            self._cursor = run[0]
            return self._own(*run)

    def read(self, claim: Claim) -> bool:
        """The content of a claim was read: guests may change it now. False if the point is over:
        then the content is not used."""
        with self._lock:
            self._release(claim, is_done=True)
            return not self._is_over

    @property
    def is_read(self) -> bool:
        """All content was read, or saved and taken from the store."""
        return self.left_bytes == 0 and self.saved.is_empty and self.error is None

    @property
    def left_bytes(self) -> int:
        """Bytes in granules that were neither read nor saved yet."""
        return self.covered.dirty_bytes - self._done.dirty_bytes

    def end(self) -> None:
        """The point needs nothing any more: committed, or broken and reported."""
        with self._lock:
            self._end()

    # Guests and the sender.

    def shrink(self, claim: Claim, length: int) -> None:
        """Own only the first `length` bytes (whole granules) of a claim."""
        with self._lock:
            if length < claim.length:
                claim.length = length
                self._cursor = min(self._cursor, claim.end)
                self._changed.notify_all()

    def parts_of(self, claim: Claim) -> tuple[Range, ...]:
        """The parts of a claim that belong to the point, ascending; at least one."""
        with self._lock:
            parts = self.covered.parts_in(claim.offset, claim.length)
        return parts or ((claim.offset, claim.length),)

    # With the lock held.

    def _end(self) -> None:
        self._is_over = True
        self._changed.notify_all()

    def _pending(self, offset: int, end: int, length_max: int) -> Range | None:
        """The first run of whole granules between two offsets that belong to the point and are not
        done, owned or not, of at most `length_max` bytes."""
        covered, granularity = self.covered, self.covered.granularity
        end = min(covered.size, -(-end // granularity) * granularity)
        if offset < end:  # else behind the disk's short last granule
            offset -= offset % granularity
        while offset < end and (run := covered.next_run(offset, length_max)) and run[0] < end:
            start, stop = run[0], min(sum(run), end)
            if (first := self._done.next_clean(start, stop - start)) is not None:
                later = self._done.next_run(first, granularity)
                return first, min(stop, later[0] if later else stop) - first
            offset = stop
        return None

    def _free(self, offset: int, end: int, length_max: int) -> Range | None:
        """As `_pending`, of granules that nobody owns."""
        while run := self._pending(offset, end, length_max):
            owners = [c for c in self._owned if c.overlaps(Claim(*run))]
            start = min((c.offset for c in owners), default=sum(run))
            if start > run[0]:
                return run[0], start - run[0]
            offset = max(c.end for c in owners if c.offset <= run[0])
        return None

    def _own(self, offset: int, length: int) -> Claim:
        claim = Claim(offset, length)
        self._owned.append(claim)
        return claim

    def _release(self, claim: Claim, *, is_done: bool) -> None:
        if is_done:
            self._done.mark(claim.offset, claim.length)
        else:
            self._cursor = min(self._cursor, claim.offset)
        self._owned.remove(claim)
        self._changed.notify_all()
