"""AlignedDevice: any offset and length on a device that takes only whole units.

This module widens requests: reads go through a bounce buffer, the odd edges of writes and zeroes
are read, changed and written back, trims shrink inward. Two kinds of device need it: files opened
with O_DIRECT, which want aligned memory too (`bounce`), and NBD exports with a minimum block size.

The promise is that of a device without units: two requests that share no byte do not disturb each
other, even in one unit. The danger is the read-change-write of an edge, which writes neighbours
back as they were when it read them; meanwhile `_Ranges` keeps every other change off those units.
Reads need no guard: neighbours are written back with the same content.

Calls are for any thread. Each wait here ends when another thread's request ends.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nbdmirror.devices.base import (
    BlockDevice,
    BlockSize,
    Buffer,
    Extent,
    Wrapper,
    round_out,
)
from nbdmirror.errors import DeviceError

BOUNCE_BYTES = 1 << 20
"""Size of a bounce buffer. Larger requests go in pieces: a request of 64 MiB (what nbdkit takes) on
each of 16 threads would need 1 GiB, and pieces of 1 MiB already run at the device's full speed."""


class AlignedDevice(Wrapper):
    """`inner` with a minimum block size of 1.

    `bounce`: `inner` wants page-aligned memory; then all data is copied through such a buffer.
    To query each buffer's address instead takes as long as to copy 4 KiB (0.24 us both), and
    nbdkit's buffers come from malloc, which never aligns them to pages.

    `tail`: a device on the same medium that takes any offset. It is needed if the size is not a
    multiple of the unit: no aligned request reaches the last odd bytes without passing the end. All
    requests from the last page boundary on go through it, so that no page of the page cache is
    written through both. A flush of `inner` flushes `tail`; both are closed with this device.
    """

    def __init__(
        self, inner: BlockDevice, *, bounce: bool = False, tail: BlockDevice | None = None
    ) -> None:
        unit = inner.block_size.minimum
        assert not unit & (unit - 1) and unit <= BOUNCE_BYTES, "NBD's limits of the minimum"
        assert tail is not None or not inner.size % unit, "an odd size needs a tail"
        self.inner = inner
        self.description = inner.description
        self.size = inner.size
        self.read_only = inner.read_only
        self.block_size = BlockSize(1, inner.block_size.preferred, inner.block_size.maximum)
        self._unit = unit
        self._mask = unit - 1
        self._bounce = bounce
        self._tail = inner if tail is None else tail
        self._body = self.size if tail is None else self.size - self.size % max(unit, mmap.PAGESIZE)
        self._ranges = _Ranges()
        # A list, not a threading.local: as many buffers as requests at once, whatever happens to
        # nbdkit's thread states. Pages that were never touched take no memory.
        self._buffers: list[memoryview] = []
        if bounce:
            self.read_part = self._read_part
            if not inner.read_only:
                self.write_part = self._write_part

    def pread(self, buf: memoryview, offset: int) -> None:
        end = offset + len(buf)
        if end > self._body:
            count = max(0, self._body - offset)
            self._tail.pread(buf[count:], offset + count)
            if not count:
                return
            buf, end = buf[:count], self._body
        if self._bounce or (offset | end) & self._mask:
            self._read_bounced(buf, offset)
        else:
            self.inner.pread(buf, offset)

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        self._refuse_if_read_only()
        view = memoryview(buf)
        end = offset + len(view)
        if end > self._body:
            count = max(0, self._body - offset)
            self._tail.pwrite(view[count:], offset + count, fua)
            if not count:
                return
            view, end = view[:count], self._body
        if (offset | end) & self._mask:
            self._write_odd(view, offset, fua)
            return
        key = self._ranges.enter(offset, end)
        try:
            self._write_whole(view, offset, fua)
        finally:
            self._ranges.leave(key)

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        self._refuse_if_read_only()
        end = offset + length
        body_end = min(end, self._body)
        if offset < body_end:
            self._zero_body(offset, body_end, may_trim, fua, fast)
            fast = False  # a part is done: the rest, less than a page, must not be refused now
        if end > self._body:
            start = max(offset, self._body)
            self._tail.zero(start, end - start, may_trim=may_trim, fua=fua, fast=fast)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self._refuse_if_read_only()
        end = offset + length
        first, last, _ = self._cut(offset, min(end, self._body))
        if first < last:
            key = self._ranges.enter(first, last)
            try:
                self.inner.trim(first, last - first, fua=fua)
            finally:
                self._ranges.leave(key)
        if end > self._body:
            start = max(offset, self._body)
            self._tail.trim(start, end - start, fua=fua)

    def flush(self) -> None:
        self.inner.flush()

    def sync(self) -> None:
        self.inner.sync()

    def extents(self, offset: int, length: int) -> list[Extent]:
        start, span = round_out(offset, length, self._unit)
        found = self.inner.extents(start, min(span, self.size - start))
        clipped: list[Extent] = []
        position, end = start, offset + length
        for extent in found:
            kept = min(position + extent.length, end) - max(position, offset)
            position += extent.length
            if kept > 0:
                clipped.append(Extent(kept, extent.zero, extent.hole))
        return clipped or [Extent(length, zero=False, hole=False)]

    def cache(self, offset: int, length: int) -> None:
        start, span = round_out(offset, length, self._unit)
        self.inner.cache(start, min(span, self.size - start))

    def close(self) -> None:
        self._buffers.clear()
        self._tail.close()
        self.inner.close()

    def _refuse_if_read_only(self) -> None:
        if self.read_only:
            raise DeviceError(f"{self.description}: is read-only", errno.EROFS)

    def _cut(self, offset: int, end: int) -> tuple[int, int, list[tuple[int, int]]]:
        """The whole units [first, last) within a range, and its edges, each within one unit."""
        first, last = -(-offset // self._unit) * self._unit, end // self._unit * self._unit
        if first > last:
            return end, end, [(offset, end)]
        return first, last, [edge for edge in ((offset, first), (last, end)) if edge[0] < edge[1]]

    def _read_part(self, bufs: tuple[memoryview], offset: int) -> int:
        """The most frequent requests: whole units of at most one buffer, with as little byte code
        as possible. `pread` does the others."""
        (buf,) = bufs
        count = len(buf)
        end = offset + count
        if (offset | end) & self._mask or count > BOUNCE_BYTES or end > self._body:
            return 0
        bounce = self._take()
        try:
            part = bounce[:count]
            done = self.inner.read_part((part,), offset)
            buf[:] = part
        finally:
            self._buffers.append(bounce)
        return done

    def _write_part(self, buf: Buffer, offset: int) -> int:
        """As `_read_part`; for writes without FUA."""
        count = len(buf)
        end = offset + count
        if (offset | end) & self._mask or count > BOUNCE_BYTES or end > self._body:
            return 0
        key = self._ranges.enter(offset, end)
        bounce = self._take()
        try:
            part = bounce[:count]
            part[:] = buf
            return self.inner.write_part(part, offset)
        finally:
            self._buffers.append(bounce)
            self._ranges.leave(key)

    def _read_bounced(self, buf: memoryview, offset: int) -> None:
        bounce = self._take()
        try:
            done = 0
            while done < len(buf):
                skip = (offset + done) & self._mask
                count = min(len(buf) - done, BOUNCE_BYTES - skip)
                span = (skip + count + self._mask) & ~self._mask
                self.inner.pread(bounce[:span], offset + done - skip)
                buf[done : done + count] = bounce[skip : skip + count]
                done += count
        finally:
            self._buffers.append(bounce)

    def _write_whole(self, view: memoryview, offset: int, fua: bool) -> None:
        """Whole units; the caller is in `_ranges`."""
        if not self._bounce:
            self.inner.pwrite(view, offset, fua)
            return
        bounce = self._take()
        try:
            for done in range(0, len(view), BOUNCE_BYTES):
                count = min(BOUNCE_BYTES, len(view) - done)
                bounce[:count] = view[done : done + count]
                self.inner.pwrite(bounce[:count], offset + done, fua)
        finally:
            self._buffers.append(bounce)

    def _write_odd(self, view: memoryview, offset: int, fua: bool) -> None:
        first, last, edges = self._cut(offset, offset + len(view))
        with self._ranges.alone(*round_out(offset, len(view), self._unit)):
            if first < last:
                self._write_whole(view[first - offset : last - offset], first, fua)
            for start, end in edges:
                self._write_edge(view[start - offset : end - offset], start, fua)

    def _zero_body(self, offset: int, end: int, may_trim: bool, fua: bool, fast: bool) -> None:
        first, last, edges = self._cut(offset, end)
        if fast and first == last:
            # The rest would be a read and a write, which `fast` does not allow.
            raise DeviceError(
                f"{self.description}: no fast zero of less than a block", errno.ENOTSUP
            )
        if not edges:
            key = self._ranges.enter(first, last)
            try:
                self.inner.zero(first, last - first, may_trim=may_trim, fua=fua, fast=fast)
            finally:
                self._ranges.leave(key)
            return
        with self._ranges.alone(*round_out(offset, end - offset, self._unit)):
            if first < last:  # before the edges: a refusal of `fast` must leave nothing changed
                self.inner.zero(first, last - first, may_trim=may_trim, fua=fua, fast=fast)
            for edge_start, edge_end in edges:
                self._write_edge(bytes(edge_end - edge_start), edge_start, fua)

    def _write_edge(self, data: Buffer, offset: int, fua: bool) -> None:
        """Change a part of one unit; the caller is alone on it."""
        bounce = self._take()
        try:
            skip = offset & self._mask
            unit = bounce[: self._unit]
            self.inner.pread(unit, offset - skip)
            unit[skip : skip + len(data)] = data
            self.inner.pwrite(unit, offset - skip, fua)
        finally:
            self._buffers.append(bounce)

    def _take(self) -> memoryview:
        try:
            return self._buffers.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, BOUNCE_BYTES))


class _Ranges:
    """The ranges that are being changed: shared (`enter`), or exclusive (`alone`).

    Changes of whole units are the hot path and take no lock. A shared change registers itself, then
    checks for exclusive ones; an exclusive change registers itself, then checks for shared ones.
    The GIL keeps both orders, so of two that overlap at least one sees the other. If only the
    exclusive change sees the other, it waits. If the shared change sees the other, it withdraws and
    waits. So two that see each other do not deadlock, and an exclusive change does not starve:
    later shared changes that overlap see it and stay out.

    No wake-up is lost: a change that leaves deletes itself, then checks for exclusive ones, and
    notifies under the lock, which a waiter holds from its check until it sleeps.

    `_changed` guards changes of `_alone` (reads take no lock) and every wait.
    """

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._together: dict[int, tuple[int, int]] = {}
        self._alone: dict[int, tuple[int, int]] = {}
        self._changed = threading.Condition()

    def enter(self, start: int, end: int) -> int:
        """Begin a shared change of [start, end), after exclusive ones. Returns the key for
        `leave`."""
        while True:
            key = next(self._keys)
            self._together[key] = (start, end)
            if not self._alone or not _overlap(self._alone, start, end):
                return key
            self.leave(key)
            with self._changed:
                self._changed.wait_for(lambda: not _overlap(self._alone, start, end))

    def leave(self, key: int) -> None:
        del self._together[key]
        if self._alone:
            with self._changed:
                self._changed.notify_all()

    @contextmanager
    def alone(self, start: int, length: int) -> Iterator[None]:
        """An exclusive change of the range, in bytes."""
        end = start + length
        key = next(self._keys)
        with self._changed:
            self._changed.wait_for(lambda: not _overlap(self._alone, start, end))
            self._alone[key] = (start, end)
            self._changed.wait_for(lambda: not _overlap(self._together, start, end))
        try:
            yield
        finally:
            with self._changed:
                del self._alone[key]
                self._changed.notify_all()


def _overlap(ranges: dict[int, tuple[int, int]], start: int, end: int) -> bool:
    # tuple() of a dict's values is one C call: other threads may change the dict meanwhile.
    return any(first < end and start < last for first, last in tuple(ranges.values()))


def for_guests(device: BlockDevice) -> BlockDevice:
    """A device on `device` that takes requests of any offset and length."""
    return AlignedDevice(device) if device.block_size.minimum > 1 else device
