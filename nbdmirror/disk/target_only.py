"""TargetOnly: a disk's old side while it is the target of the way home.

After a pivot away from this device another server has the disk, and the data here may be old. Only
that server may use the device (exports.py), and even that server can read a range only if all of it
was written since this process began. An ordinary disk does not use this module.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, bisect_right

from nbdmirror.devices.base import BlockDevice, Buffer, Extent, Wrapper, round_out
from nbdmirror.disk.bitmap import BITS_BYTES_MAX, DirtyBitmap
from nbdmirror.errors import DeviceError

GRANULE_BYTES = 4096
"""Granularity of the bitmap. Runs that begin or end within a granule are kept to the byte."""

EDGES_MAX = 1 << 16
"""Ends of runs that fill no granule. If there are more, all of these runs are forgotten and do not
count as written, which is the safe mistake."""


class Coverage:
    """The bytes of a device that were written, exactly. From any thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        granule = GRANULE_BYTES
        while size // granule > BITS_BYTES_MAX * 8:
            granule *= 2
        self._granule = granule
        self._left = DirtyBitmap(size, granule)
        """Granules with bytes that were not written."""
        self._left.mark_all()
        self._edges: list[int] = []
        """Begin and end of each written run in those granules, by turns, ascending."""
        self._lock = threading.Lock()

    def add(self, offset: int, length: int) -> None:
        """The range, in bytes, was written."""
        if not length:
            return
        with self._lock:
            self._left.clear(offset, length)
            end = offset + length
            for at in {offset, end - 1}:
                start = at // self._granule * self._granule
                stop = min(start + self._granule, self._size)
                if not self._left.is_dirty(start, 1):
                    self._set_run(start, stop, False)
                    continue
                self._set_run(max(start, offset), min(stop, end), True)
                if self._has_run(start, stop):
                    self._left.clear(start, stop - start)
                    self._set_run(start, stop, False)
            if len(self._edges) > EDGES_MAX:
                self._edges.clear()

    def has(self, offset: int, length: int) -> bool:
        """Whether each byte of the range was written."""
        with self._lock:
            start, span = round_out(offset, length, self._granule)
            stop, end = start + span, offset + length
            while start < stop and (run := self._left.next_run(start, stop - start)):
                if run[0] >= end:
                    break
                start = run[0] + run[1]
                if not self._has_run(max(run[0], offset), min(start, end)):
                    return False
            return True

    @property
    def is_whole(self) -> bool:
        """All bytes were written."""
        with self._lock:
            return self._left.is_empty

    def _set_run(self, start: int, stop: int, covered: bool) -> None:
        first, last = bisect_left(self._edges, start), bisect_right(self._edges, stop)
        begins = [start] if first % 2 != covered else []
        ends = [stop] if last % 2 != covered else []
        self._edges[first:last] = begins + ends

    def _has_run(self, start: int, stop: int) -> bool:
        first = bisect_right(self._edges, start)
        return first % 2 == 1 and self._edges[first] >= stop


class TargetOnly(Wrapper):
    """`inner`, the old side of a disk that is served from the URI `truth`. Reads of ranges that
    were not written raise DeviceError with EPERM. A trim does not count as a write, and does not
    undo one."""

    def __init__(self, inner: BlockDevice, truth: str) -> None:
        self.inner = inner
        self.truth = truth
        self.description = inner.description
        self.size = inner.size
        self.read_only = inner.read_only
        self.block_size = inner.block_size
        self.writer = ""
        """The ID of the server process whose requests are accepted (exports.py)."""
        self._coverage = Coverage(inner.size)

    @property
    def is_whole(self) -> bool:
        """All of the device was written since this process began."""
        return self._coverage.is_whole

    def pread(self, buf: memoryview, offset: int) -> None:
        self._refuse_old(offset, len(buf))
        self.inner.pread(buf, offset)

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        self.inner.pwrite(buf, offset, fua)
        self._coverage.add(offset, len(buf))

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        self.inner.zero(offset, length, may_trim=may_trim, fua=fua, fast=fast)
        self._coverage.add(offset, length)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self.inner.trim(offset, length, fua=fua)

    def flush(self) -> None:
        self.inner.flush()

    def sync(self) -> None:
        self.inner.sync()

    def extents(self, offset: int, length: int) -> list[Extent]:
        self._refuse_old(offset, length)
        return self.inner.extents(offset, length)

    def cache(self, offset: int, length: int) -> None:
        self._refuse_old(offset, length)
        self.inner.cache(offset, length)

    def close(self) -> None:
        self.inner.close()

    def _refuse_old(self, offset: int, length: int) -> None:
        if not self._coverage.has(offset, length):
            raise DeviceError(
                f"{self.description}: {length} bytes at {offset} may be old and are not read: "
                f"target only, the disk is served from {self.truth}",
                errno.EPERM,
            )
