"""Where the content of a point is: an index of the ranges of the disk that a journal has, and their
data, read and checked."""

from __future__ import annotations

import struct
import threading
import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bitarray import bitarray

from nbdmirror.devices.base import BlockDevice, Extent, merge_extents
from nbdmirror.points.applier import headers_to
from nbdmirror.points.format import BLOCK_BYTES, Superblock
from nbdmirror.points.reader import Journal, Part, fetch, newest_parts
from nbdmirror.points.requests import Program, Side, run

CACHE_BYTES = 32 << 20
"""Data of the journal that was read and checked; an entry is read as a whole."""

EXTENTS_MAX = 4096
"""About so many extents are an answer."""

_RECORD = struct.Struct(">QQQQQI?")  # big-endian: sorted by the first number


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of the disk, and the index entry that has its content."""

    offset: int
    length: int
    start: int
    """Of the entry in the disk."""
    place: int
    """Of the entry's data in the ring."""
    data_bytes: int
    """In whole blocks."""
    crc: int
    is_zero: bool


class Index:
    """The newest content of each range of the disk that differs from the journal's base."""

    def __init__(self, records: Sequence[bytes]) -> None:
        self._records = b"".join(sorted(records))
        numbers = range(0, len(self._records), _RECORD.size)
        self._starts = array("Q", (_RECORD.unpack_from(self._records, at)[0] for at in numbers))

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, Piece | None]]:
        """The range, in order: offset, length, and where the content is; None: in the image."""
        end = offset + length
        number = max(0, bisect_right(self._starts, offset) - 1)
        while offset < end:
            piece = self._piece(number) if number < len(self._starts) else None
            if piece is None or piece.offset >= end:
                yield offset, end - offset, None
                return
            if piece.offset > offset:
                yield offset, piece.offset - offset, None
                offset = piece.offset
            if (stop := min(end, piece.offset + piece.length)) > offset:
                yield offset, stop - offset, piece
                offset = stop
            number += 1

    def _piece(self, number: int) -> Piece:
        return Piece(*_RECORD.unpack_from(self._records, number * _RECORD.size))


def extents_of(
    image: BlockDevice, ranges: Iterable[tuple[int, int, Piece | None]]
) -> tuple[list[Extent], bool]:
    """The extents of `ranges` of a disk, offsets and lengths in order, each with the piece that has
    the content; None: the image has it. Also returns whether the image was asked."""
    found: list[Extent] = []
    was_asked = False
    for start, span, piece in ranges:
        if piece is not None:  # the same at any time, wherever it is read from
            found.append(Extent(span, zero=piece.is_zero, hole=piece.is_zero))
            continue
        was_asked = True
        extents = image.extents(start, span)
        found += extents
        if sum(extent.length for extent in extents) < span or len(found) >= EXTENTS_MAX:
            break
    return merge_extents(found), was_asked


def index_to(journal: Journal, sequence: int) -> Program[tuple[Index, bitarray]]:
    """Where the content of the point `sequence` is, and which blocks of the disk the journal has.
    Raises DamagedData, and IO_ERRORS."""
    records: list[bytes] = []

    def visit(parts: list[Part]) -> Program[None]:
        for part in parts:
            entry = part.entry
            data_bytes = 0 if entry.is_zero else -(-entry.length // BLOCK_BYTES) * BLOCK_BYTES
            what = (entry.offset, entry.place, data_bytes, entry.crc, entry.is_zero)
            records.append(_RECORD.pack(part.offset, part.length, *what))
        yield []

    changed = yield from newest_parts(journal, headers_to(journal, sequence), visit)
    return Index(records), changed


class Pieces:
    """The data of pieces, from the export `journal`. For any thread."""

    def __init__(self, journal: BlockDevice) -> None:
        self._journal = journal
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def cached(self, piece: Piece) -> bytes | None:
        """What the piece's entry has, whole; None: it has to be read."""
        with self._lock:
            if (cached := self._cache.get(piece.place)) is not None:
                self._cache.move_to_end(piece.place)
            return cached

    def read(self, block: Superblock, piece: Piece) -> bytes | None:
        """What the piece's entry has, whole; None: the journal has something else there. Raises
        IO_ERRORS."""
        data = run(fetch(block, piece.place, piece.data_bytes), {Side.JOURNAL: self._journal})
        if zlib.crc32(data) != piece.crc:
            return None
        self._keep(piece.place, found := bytes(data))
        return found

    def _keep(self, place: int, data: bytes) -> None:
        with self._lock:
            if place not in self._cache:
                self._cache[place] = data
                self._cached_bytes += len(data)
            while self._cached_bytes > CACHE_BYTES:
                _, old = self._cache.popitem(last=False)
                self._cached_bytes -= len(old)
