"""SavedGranules: the content of granules that guests overwrite before it was read for a point.

Content is kept in memory up to a bound. Then it is appended to a spill file, if there is one, as
records that are read in the same order: so a spilled range takes no memory. A granule is saved once
for each point at most.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nbdmirror.devices.base import Done
from nbdmirror.disk.claim import Range
from nbdmirror.errors import DeviceError

ENTRY_BYTES = 512
"""What an entry takes of the memory beside its content, rounded up: zeroes are bounded too."""

SPILL_READ_BYTES = 1 << 20
"""Spilled records are read in pieces of this size, if a record is not larger."""

_HEAD = struct.Struct("<QQII")
_PART = struct.Struct("<QQ")


class Spill(Protocol):
    """A file for content that memory has no room for."""

    size: int
    """Bytes that may be used."""

    def write(self, content: bytes, place: int) -> None:
        """Write `content` at offset `place`. On a guest's thread. Raises OSError."""

    def start_read(self, buf: memoryview, place: int, done: Done) -> None:
        """As AsyncSource.start_read, for the event loop's thread."""


class SavedFull(DeviceError):
    """The content of a granule has no room in memory, nor in the spill file."""

    def __init__(self) -> None:
        super().__init__("no room to save what a guest overwrites", errno.ENOSPC)


@dataclass(frozen=True, slots=True)
class Saved:
    """The content of one range of whole granules, offsets and lengths in bytes."""

    offset: int
    length: int
    parts: tuple[Range, ...]
    """The parts that belong to the point, ascending; at least one."""
    content: bytearray | None
    """From the first part's begin to the last part's end; None: zeroes."""

    def to_record(self) -> bytes:
        """As the spill file has it."""
        content = self.content or b""
        head = _HEAD.pack(self.offset, self.length, len(self.parts), len(content))
        return b"".join((head, *(_PART.pack(*part) for part in self.parts), content))

    @classmethod
    def from_record(cls, buf: memoryview) -> tuple[Saved | None, int]:
        """The first record of `buf`, and its length in bytes; None if `buf` has only a part of the
        record, and then the length is a lower bound."""
        if len(buf) < _HEAD.size:
            return None, _HEAD.size
        offset, length, count, content_bytes = _HEAD.unpack_from(buf)
        start = _HEAD.size + count * _PART.size
        end = start + content_bytes
        if len(buf) < end:
            return None, end
        parts = tuple(
            _PART.unpack_from(buf, _HEAD.size + index * _PART.size) for index in range(count)
        )
        content = bytearray(buf[start:end]) if content_bytes else None
        return cls(offset, length, parts, content), end


SpilledDone = Callable[[list[Saved], BaseException | None], None]


class SavedGranules:
    """What was saved for one point. `put` is for guests' threads, several at once; all other calls
    for the thread that sends. `memory_bytes`: the bound."""

    def __init__(self, memory_bytes: int, spill: Spill | None = None) -> None:
        self._entries: deque[Saved] = deque()
        self._spill = spill
        self._lock = threading.Lock()  # a leaf, for all of the following
        self._free_bytes = memory_bytes
        self._end = self._next = 0
        """Where the spill file's records end, and where the next one to read begins."""
        self._writing: set[int] = set()
        """Where records are being written."""
        self._failed: dict[int, int] = {}
        """Place and length of records that could not be written. After the first one the file is
        not used any more."""
        self._is_reading = False

    def put(self, saved: Saved) -> None:
        """Save a range of granules. Raises SavedFull, or the spill file's OSError."""
        with self._lock:
            needed_bytes = ENTRY_BYTES + len(saved.content or b"")
            if needed_bytes <= self._free_bytes:
                self._free_bytes -= needed_bytes
                self._entries.append(saved)
                return
        self._put_in_file(saved)

    def _put_in_file(self, saved: Saved) -> None:
        if self._spill is None:
            raise SavedFull
        record = saved.to_record()
        with self._lock:
            if self._failed or len(record) > self._spill.size - self._end:
                raise SavedFull
            place = self._end
            self._end += len(record)
            self._writing.add(place)
        is_written = False
        try:
            self._spill.write(record, place)
            is_written = True
        finally:
            with self._lock:
                self._writing.remove(place)
                if not is_written:
                    self._failed[place] = len(record)

    def take(self, bytes_max: int) -> list[Saved]:
        """Remove the oldest ranges in memory and return them, with content of `bytes_max` or a
        little more. Their memory counts as free from now on."""
        found: list[Saved] = []
        taken_bytes = 0
        with self._lock:
            while self._entries and taken_bytes < bytes_max:
                saved = self._entries.popleft()
                found.append(saved)
                taken_bytes += ENTRY_BYTES + len(saved.content or b"")
            self._free_bytes += taken_bytes
        return found

    @property
    def may_read_spilled(self) -> bool:
        """The spill file has records that were written and not read, and no read is in progress."""
        return not self._is_reading and self._readable_bytes() > 0

    @property
    def is_empty(self) -> bool:
        """All that was saved was taken, or read from the spill file."""
        return not self._readable_bytes() and not self._entries and self._next == self._end

    def read_spilled(self, done: SpilledDone) -> None:
        """Read the next records, at least one; allowed if `may_read_spilled`."""
        self._is_reading = True
        self._read(min(SPILL_READ_BYTES, self._readable_bytes()), done)

    def _read(self, length: int, done: SpilledDone) -> None:
        assert self._spill is not None
        buf = memoryview(bytearray(length))

        def then(error: BaseException | None) -> None:
            found: list[Saved] = []
            at = needed_bytes = 0
            while error is None and at < length:
                saved, needed_bytes = Saved.from_record(buf[at:])
                if saved is None:
                    break
                found.append(saved)
                at += needed_bytes
            if error is None and not found:
                self._read(needed_bytes, done)
                return
            self._is_reading = False
            self._next += at
            done(found, error)

        self._spill.start_read(buf, self._next, then)

    def _readable_bytes(self) -> int:
        """Bytes of whole records from `_next` on."""
        with self._lock:
            while self._next in self._failed:
                self._next += self._failed[self._next]
            ends = [place for place in (*self._writing, *self._failed) if place >= self._next]
            return min(ends, default=self._end) - self._next
