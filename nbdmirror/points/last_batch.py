"""LastBatch: the data of a journal's last batch, in memory as it was written. With that the image
becomes the last point without a read of the journal, which may be far away. On the event loop's
thread."""

from __future__ import annotations

from itertools import pairwise
from operator import itemgetter

from nbdmirror.devices.base import Buffer, Run
from nbdmirror.points.format import Header, unpack_entries

KEPT_BYTES = 64 << 20
"""Most data that is kept: of the last batch, and of the one that is being written."""


class LastBatch:
    def __init__(self) -> None:
        self._header: Header | None = None
        """Of the last batch, if its data is kept."""
        self._index = b""
        self._pieces: list[tuple[int, bytes]] = []
        """Places in the ring, and what was written there, ascending."""
        self._open: list[tuple[int, bytes]] | None = None
        """The same, of the batch that is being written; None: too much."""
        self._bytes = self._open_bytes = 0

    def begins(self) -> None:
        """A batch is opened. What an earlier one has left that was given up is dropped."""
        self._open, self._open_bytes = [], 0

    def keep(self, place: int, data: Buffer) -> Buffer:
        """`data` is about to be written at `place`. Returns the data to write, which nobody else
        changes if it is kept."""
        if self._open is None:
            return data
        self._open_bytes += len(data)
        if self._bytes + self._open_bytes > KEPT_BYTES:
            self._open = None
            return data
        kept = bytes(data)
        self._open.append((place, kept))
        return kept

    def committed(self, header: Header, index: bytes) -> None:
        """The open batch is the last one now."""
        self.forget()
        if self._open is not None:
            self._header, self._index, self._pieces = header, index, self._open
            self._bytes = self._open_bytes
        self._open = None

    def forget(self) -> None:
        """The image holds the last point, so its data is not needed any more."""
        self._header, self._index, self._pieces, self._bytes = None, b"", [], 0

    def runs(self, header: Header) -> list[Run] | None:
        """What the batch of `header` has of the disk, ascending, each range once. None if that is
        not kept, or if a range was put twice."""
        if self._header is not header:
            return None
        found: list[Run] = []
        pieces = iter(self._pieces)
        place, end, view = 0, 0, memoryview(b"")
        for entry in unpack_entries(self._index, header.entries):
            if entry.is_zero:
                found.append((entry.offset, entry.length, None))
                continue
            while entry.place >= end:
                place, data = next(pieces)
                end, view = place + len(data), memoryview(data)
            at = entry.place - place
            found.append((entry.offset, entry.length, view[at : at + entry.length]))
        found.sort(key=itemgetter(0))
        if any(one[0] + one[1] > other[0] for one, other in pairwise(found)):
            return None
        return found
