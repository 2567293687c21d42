"""Memory for the copier's requests, and where it holds zeroes."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from functools import partial

from nbdmirror.devices.base import Run
from nbdmirror.errors import DeviceError

ZERO_UNIT_BYTES = 64 << 10
"""Unit in which zeroes are detected: the usual cluster size, so that the target can leave out whole
clusters."""

BUFFER_ALIGNMENT = 4096
"""malloc gives large blocks at 16 bytes after a page's start. There `read` copies 3 times slower
than at a multiple of 32 (an AMD EPYC's `rep movsb`: 2.0 GB/s instead of 6.3)."""


_ZEROES = bytes(ZERO_UNIT_BYTES)


class PageBuffer:
    """`length` bytes of page-aligned memory: a part of a bytearray which, unlike mmap, can be
    compared at memory speed."""

    __slots__ = ("_base", "_bytes", "view")

    def __init__(self, length: int) -> None:
        self._bytes = bytearray(length + BUFFER_ALIGNMENT)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))
        self._base = -address % BUFFER_ALIGNMENT
        self.view = memoryview(self._bytes)[self._base : self._base + length]

    @classmethod
    def around(cls, content: bytearray) -> PageBuffer:
        """`content` itself, wherever it is in memory."""
        buffer = cls.__new__(cls)
        buffer._bytes, buffer._base, buffer.view = content, 0, memoryview(content)
        return buffer

    def has(self, content: bytes, start: int) -> bool:
        """Whether `content` is at `start`. (`startswith` is a memcmp that ends at the first byte
        that differs.)"""
        return self._bytes.startswith(content, self._base + start)

    def runs(self, offset: int, length: int, start: int = 0) -> list[Run]:
        """The `length` bytes at `start` of the buffer, which were read from `offset` of the disk,
        as runs of data and of zeroes, cut at multiples of ZERO_UNIT_BYTES of the disk. Data takes
        no time: `has` ends at the first byte that differs."""
        view, unit = self.view, ZERO_UNIT_BYTES
        if offset // unit == (offset + length - 1) // unit:  # what guests change is mostly small
            is_zero = not view[start] and self.has(bytes(length), start)
            return [(offset, length, None if is_zero else view[start : start + length])]
        runs: list[tuple[int, int, bool]] = []
        base, end = offset - start, offset + length
        while offset < end:
            span = min(ZERO_UNIT_BYTES - offset % ZERO_UNIT_BYTES, end - offset)
            zeroes = _ZEROES if span == ZERO_UNIT_BYTES else bytes(span)
            is_zero = self.has(zeroes, offset - base)
            if runs and runs[-1][2] == is_zero:
                runs[-1] = (runs[-1][0], runs[-1][1] + span, is_zero)
            else:
                runs.append((offset, span, is_zero))
            offset += span
        return [
            (at, span, None if is_zero else view[at - base : at - base + span])
            for at, span, is_zero in runs
        ]


class Buffers:
    """Buffers for reuse: fresh memory is expensive, and so is returning memory to the kernel, for
    guests' threads too. On the event loop's thread."""

    def __init__(self) -> None:
        self._at_rest: list[PageBuffer] = []
        self.length = 0
        """Bytes that are kept."""

    def take(self, length: int) -> PageBuffer:
        """A buffer of at least `length` bytes. Kept buffers that are too small are dropped. Raises
        DeviceError if there is no memory."""
        while self._at_rest:
            buffer = self.drop()
            if len(buffer.view) >= length:
                return buffer
        try:
            return PageBuffer(length)
        except MemoryError as error:
            raise DeviceError("no memory for a buffer", errno.ENOMEM) from error

    def keep(self, buffer: PageBuffer) -> None:
        """Keep a buffer for reuse."""
        self._at_rest.append(buffer)
        self.length += len(buffer.view)

    def free(self, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        """Free all, one in each turn of the loop: each holds the GIL for a tenth of a
        millisecond."""
        if self.length:
            self.drop()
            call_later(0, partial(self.free, call_later))

    def drop(self) -> PageBuffer:
        """Remove a kept buffer and return it."""
        buffer = self._at_rest.pop()
        self.length -= len(buffer.view)
        return buffer
