"""Disk: what the guest sees. Every guest operation goes through here, and through the ledger.

The source is one attribute. A request reads it after it has announced itself to the ledger. So a
replacement behind a closed gate (`swap`) loses no request, serves none twice, and is invisible on
the guest's connections. The same holds for the copy mode: a request decides once, when it begins,
whether its write is synchronous (rule 11).

Calls are for any thread, except `swap`, `watch`, `unwatch` and setting `synchronous`, which are for
the event loop's thread.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, cast

from nbdmirror.devices.base import BlockDevice, Buffer, Extent
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim
from nbdmirror.disk.frozen import Frozen
from nbdmirror.disk.hot import HotGranules
from nbdmirror.disk.latency import SAMPLED, Held, Kind, Latency
from nbdmirror.disk.ledger import Ledger
from nbdmirror.disk.tracker import Tracker
from nbdmirror.errors import IO_ERRORS, DeviceError


class Disk:
    """A named disk of a fixed size. The guest operations mean the same as in BlockDevice, and raise
    the same errors."""

    def __init__(self, name: str, source: BlockDevice, size: int | None = None) -> None:
        """`size`: bytes, if the device is larger than the disk."""
        self.name = name
        self.size = source.size if size is None else size
        self.read_only = source.read_only
        self.ledger = Ledger()
        self.synchronous: SynchronousWrites | None = None
        """Set while guests' writes, or some of them, wait for a mirror's target."""
        self.frozen: Frozen | None = None
        """The point that is being read, as of its cut; set behind a closed gate (changes.py)."""
        self.has_moved = False
        """True after a pivot in this process."""
        self._source = source

    @property
    def source(self) -> BlockDevice:
        """The device that guests are served from now."""
        source = self._source
        return source.device if isinstance(source, WatchedDevice) else source

    def watch(self) -> WatchedDevice:
        """Watch each read from now on, until `unwatch`. A later watch replaces an earlier one."""
        watched = WatchedDevice(self.source)
        self._source = cast(BlockDevice, watched)
        return watched

    def unwatch(self, watched: WatchedDevice) -> None:
        """End this watch, unless a later one has replaced it."""
        source = self._source
        if isinstance(source, WatchedDevice) and source is watched:
            self._source = source.device

    def swap(self, target: BlockDevice) -> BlockDevice:
        """Serve guests from `target` from now on. Returns the old device.

        The gate is closed and no changing request is in progress. Reads may still use the old
        device: wait for Ledger.reads before closing it.
        """
        assert self.ledger.is_idle, "swap behind a closed gate only"
        assert self.frozen is None, "a point is still read from the old source"
        assert target.size >= self.size, "the job has compared the sizes"
        old, self._source = self.source, target
        self.has_moved = True
        return old

    def unwrap(self, device: BlockDevice) -> None:
        """Serve guests from `device`, the device inside the source. A request uses the same inner
        device before and after, so no request must be held. From any thread."""
        self._source = device

    def lose_writes(self, settled: DirtyBitmap | None = None) -> None:
        """The source may have lost acknowledged writes, in unknown places. So each bitmap of the
        disk is marked everywhere, and a mirror at rest looks. From any thread. `settled`: a bitmap
        that is marked already."""
        self.ledger.changed(self.size, settled)

    def pread(self, buf: memoryview, offset: int) -> None:
        ledger = self.ledger
        token = next(ledger.tokens)  # as enter_read
        if not token % SAMPLED:
            ledger.latency.timed(Kind.READ, self.pread, buf, offset)
            return
        ledger.reading.add(token)
        source = self._source
        try:
            if source.read_part((buf,), offset) != len(buf):
                source.pread(buf, offset)
        finally:
            ledger.reading.discard(token)  # as leave_read

    def pwrite(self, buf: Buffer, offset: int, fua: bool) -> None:
        ledger = self.ledger
        token = next(ledger.tokens)  # as enter
        if not token % SAMPLED:
            ledger.latency.timed(Kind.WRITE, self.pwrite, buf, offset, fua)
            return
        ledger.writing.add(token)
        if ledger.gate is not None:
            ledger.wait_at_gate(token)
        synchronous, settled = self.synchronous, None
        try:
            if (frozen := self.frozen) is not None:
                frozen.before_change(self._source, offset, len(buf))
            if synchronous is None or not synchronous.takes(offset, len(buf)):
                source = self._source
                if fua or source.write_part(buf, offset) != len(buf):
                    source.pwrite(buf, offset, fua)
            else:
                settled = synchronous.pwrite(self._source, buf, offset, fua)
        finally:
            if ledger.bitmaps:
                ledger.leave(token, offset, len(buf), settled)
            else:  # as leave
                ledger.writing.discard(token)
                if ledger.gate is not None:
                    ledger.tell_gate()

    def zero(self, offset: int, length: int, *, may_trim: bool, fua: bool, fast: bool) -> None:
        self.ledger.latency.timed(Kind.ZERO, self._zero, offset, length, may_trim, fua, fast)

    def _zero(self, offset: int, length: int, may_trim: bool, fua: bool, fast: bool) -> None:
        ledger = self.ledger
        token = ledger.enter()
        synchronous, settled = self.synchronous, None
        try:
            if (frozen := self.frozen) is not None:
                frozen.before_change(self._source, offset, length)
            if synchronous is None or not synchronous.takes(offset, length):
                self._source.zero(offset, length, may_trim=may_trim, fua=fua, fast=fast)
            elif fast:
                # Two devices are not faster than a write, and one alone would not be synchronous.
                raise DeviceError("no fast zero in copy mode write-blocking", errno.ENOTSUP)
            else:
                settled = synchronous.zero(self._source, offset, length, may_trim, fua)
        finally:
            ledger.leave(token, offset, length, settled)

    def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """The device decides how a trimmed range reads. So the target gets the result, by a copy,
        and not the trim."""
        self.ledger.latency.timed(Kind.TRIM, self._trim, offset, length, fua)

    def _trim(self, offset: int, length: int, fua: bool) -> None:
        ledger = self.ledger
        token = ledger.enter()
        try:
            if (frozen := self.frozen) is not None:
                frozen.before_change(self._source, offset, length)
            self._source.trim(offset, length, fua=fua)
        finally:
            ledger.leave(token, offset, length)

    def flush(self) -> None:
        self.ledger.latency.timed(Kind.FLUSH, self._flush)

    def _flush(self) -> None:
        ledger = self.ledger
        token = ledger.enter_flush()
        synchronous = self.synchronous
        try:
            self._source.flush()
            if synchronous is not None:
                synchronous.flush()
        finally:
            ledger.leave_flush(token)

    def sync(self) -> None:
        """Make guests' writes durable for nbdmirror itself. An error is not used up: the next guest
        flush still reports it."""
        self._source.sync()

    def extents(self, offset: int, length: int) -> list[Extent]:
        ledger = self.ledger
        token = ledger.enter_read()
        try:
            return self._source.extents(offset, length)
        finally:
            ledger.leave_read(token)

    def cache(self, offset: int, length: int) -> None:
        ledger = self.ledger
        token = ledger.enter_read()
        try:
            self._source.cache(offset, length)
        finally:
            ledger.leave_read(token)


class WatchedDevice:
    """A disk's source while it is watched: `is_seen` becomes true when a read of `wanted` comes,
    offset and length in bytes. All other calls go straight to `device`. The watched device takes
    the source's place, so that requests need no check."""

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self.wanted = (0, 0)
        self.is_seen = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def read_part(self, buffers: tuple[memoryview], offset: int) -> int:
        if self.wanted == (offset, len(buffers[0])):
            self.is_seen = True
        return self.device.read_part(buffers, offset)


class SynchronousWrites:
    """Copy mode write-blocking: a guest's write is answered when the target has it as well.

    The guest gets the source's result. If the target fails, the range is dirty again and `on_error`
    is called, on the guest's thread (rule 10). If the source fails, the target is not written.
    `pwrite` and `zero` return the bitmap that needs no further mark, or raise the source's error.

    A source may hang. Then `give_up` takes the granules from requests that are still at the source:
    the granules are dirty, the target does not get them, and each request marks once more at its
    end.

    `whole_granules`: parts of granules are left to the copier, which copies whole ones. Needed if
    the target has large blocks, or a backing file that is not in place yet (sync top and none): the
    first write to a cluster must carry all of the cluster.
    """

    def __init__(
        self,
        *,
        tracker: Tracker,
        target: BlockDevice,
        whole_granules: bool,
        on_error: Callable[[BaseException], None],
        latency: Latency,
    ) -> None:
        self._tracker = tracker
        self._latency = latency
        self._target = target
        self._whole_granules = whole_granules
        self._on_error = on_error
        self.only: HotGranules | None = None
        """Only requests that touch these granules are synchronous; None: all are. A request looks
        once, when it begins (rule 11). The others are as in copy mode background: they mark at
        their end, so the invariant does not depend on who looks when."""
        self._is_over = False
        self._at_source: dict[Claim, bool] = {}
        self._at_target: set[object] = set()

    def takes(self, offset: int, length: int) -> bool:
        """Whether a guest's change of this range is synchronous."""
        only = self.only
        return only is None or only.is_hot(offset, length)

    def give_up(self) -> bool:
        """Let no further request use the target. Returns whether none uses it any more; call
        repeatedly until then."""
        self._is_over = True
        for claim in tuple(self._at_source):
            if self._at_source.pop(claim, False):  # one call of C: the request gets it, or this
                self._tracker.end_write(claim, failed=True)
        return not self._at_target

    def pwrite(
        self, source: BlockDevice, buf: Buffer, offset: int, fua: bool
    ) -> DirtyBitmap | None:
        view = memoryview(buf)

        def to_target(start: int, length: int) -> None:
            self._target.pwrite(view[start - offset : start - offset + length], start, fua)

        def to_source() -> None:
            source.pwrite(buf, offset, fua)

        return self._both(offset, len(buf), fua, to_source, to_target)

    def zero(
        self, source: BlockDevice, offset: int, length: int, may_trim: bool, fua: bool
    ) -> DirtyBitmap | None:
        def to_source() -> None:
            source.zero(offset, length, may_trim=may_trim, fua=fua)

        def to_target(start: int, length: int) -> None:
            self._target.zero(start, length, may_trim=may_trim, fua=fua)

        return self._both(offset, length, fua, to_source, to_target)

    def flush(self) -> None:
        """Flush the target: an acknowledged flush is durable on both sides (rule 45). Not where
        only some writes are synchronous: the others are not on the target anyway."""
        if self.only is not None:
            return
        began_ns = self._latency.clock_ns()
        self._fails(object(), self._target.flush, flushes=True)
        self._latency.waited(Held.TARGET, self._latency.clock_ns() - began_ns)

    def _both(
        self,
        offset: int,
        length: int,
        fua: bool,
        to_source: Callable[[], None],
        to_target: Callable[[int, int], None],
    ) -> DirtyBitmap | None:
        tracker = self._tracker
        start, span = self._whole(offset, length) if self._whole_granules else (offset, length)
        began_ns = self._latency.clock_ns()
        claim = tracker.begin_write(offset, length)
        self._at_source[claim] = True
        failed, is_ours = True, False
        source_ns = 0
        try:
            try:
                source_ns = self._latency.clock_ns()
                to_source()
            finally:
                source_ns = self._latency.clock_ns() - source_ns
                is_ours = self._at_source.pop(claim, False)
            if is_ours and span > 0:
                failed = self._fails(claim, lambda: to_target(start, span), flushes=fua)
            if not failed and span < length:
                tracker.dirty.mark(offset, start - offset)
                tracker.dirty.mark(start + span, offset + length - start - span)
        finally:
            if is_ours:
                tracker.end_write(claim, failed=failed)
            self._latency.waited(Held.TARGET, self._latency.clock_ns() - began_ns - source_ns)
        return tracker.dirty if is_ours else None

    def _fails(self, request: object, call: Callable[[], None], *, flushes: bool) -> bool:
        """Run a call on the target. The request announces itself, then checks whether it may go on;
        `give_up` forbids requests, then checks for announced ones: one of the two sees the
        other."""
        self._at_target.add(request)
        try:
            if self._is_over:
                return True
            if flushes:
                self._flushing(call)
            else:
                call()
        except IO_ERRORS as error:
            self._on_error(error)
            return True
        except MemoryError:
            self._on_error(DeviceError("no memory for the request", errno.ENOMEM))
            return True
        finally:
            self._at_target.discard(request)
        return False

    def _flushing(self, call: Callable[[], None]) -> None:
        meanwhile, failed = self._tracker.begin_guests_flush(), True
        try:
            call()
            failed = False
        finally:
            self._tracker.end_guests_flush(meanwhile, failed=failed)

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """The granules that the range covers whole; the length is 0 or less if it covers none."""
        granularity, end = self._tracker.granularity, offset + length
        start = -(-offset // granularity) * granularity
        stop = end if end == self._tracker.size else end // granularity * granularity
        return start, stop - start
