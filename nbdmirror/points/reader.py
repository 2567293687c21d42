"""Reading a journal: which points it holds, and what the disk was at one of them.

The chain begins at the superblock's tail, after its base. Each batch names the digest of the one
before. The chain ends where the next batch has no sound footer: that batch was never committed, or
was damaged since. A superblock that knows of a later point shows which of the two.

A process that has lost its connection knows the chain already. It could begin behind the last batch
that it knows; but that is not safe. What a process knows was durable, as the server has said. A
server that has lost its cache in spite of that may have lost any block, and so may a journal that
was copied back: the footer of an old batch and not that of the last one. For whoever recovers, the
chain ends there. The process would go on to announce points that nobody can have. So all is read
again, and all is checked again: what is believed does not depend on what was known. `known` says
where batches are, and no more. So they are read many at a time, instead of one after the other,
each a round trip.

These programs read, and change nothing.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bitarray import bitarray
from bitarray.util import zeros

from nbdmirror.devices.base import pieces
from nbdmirror.points.format import (
    BLOCK_BYTES,
    RING_START,
    Entry,
    Header,
    JournalError,
    Point,
    State,
    Superblock,
    blocks,
    pack_footer,
    unpack_entries,
)
from nbdmirror.points.requests import Program, Read, Side
from nbdmirror.points.superblocks import Found, find

READ_BYTES_MAX = 1 << 20
"""An index is read in pieces of this size, and data in requests of this size, if what belongs
together is not larger."""

ATTEMPTS_MAX = 10
"""How often a journal that is being written to is read again."""

GROUP_BYTES = 16 << 20
"""Data that is in memory at once."""

ENTRIES_AT_ONCE = 1000
"""Entries of an index that are looked at in one step. A point may have millions after an outage, at
four microseconds and some hundred bytes each, and guests' requests wait for the event loop."""

AHEAD_MAX = 256
AHEAD_BYTES = 4 << 20
"""Batches whose indexes and footers are read at once, if it is known where they are; and the bytes
of that. More would hold the event loop for longer than 10 ms."""


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal holds: the chain after the superblock's base."""

    name: str
    """Its export's description, for messages."""
    found: Found
    headers: tuple[Header, ...]
    damage: tuple[str, ...]
    """A line for each thing that is damaged; empty if nothing is."""
    unfinished: str
    """What a batch after the last point lacks: it is being written, or never was finished."""
    export_bytes: int = 0

    @property
    def superblock(self) -> Superblock:
        return self.found.current

    @property
    def is_cut_short(self) -> bool:
        """Points that were announced are lost."""
        return bool(self.superblock.state is State.OK and self.damage[len(self.found.damage) :])

    @property
    def points(self) -> list[Point]:
        """The points that can be recovered, in order."""
        block = self.superblock
        if block.state is State.PROMOTED:
            return [block.base]
        if block.state is State.SERVED:
            return [h.point for h in self.headers if h.point.sequence == block.applying]
        if block.state is not State.OK:
            return []
        base = [block.base] if block.is_base_offered and not block.applying else []
        return base + [h.point for h in self.headers if h.point.sequence >= block.applying]


def read(
    name: str, export_bytes: int, known: Sequence[Header] = (), until: float = math.inf
) -> Program[Journal]:
    """Read the journal `name`, on an export of `export_bytes`. Raises JournalError if it is none.
    Damage is no error: the points before it are sound. `known`: batches that may be there, in
    order; what is found is the same without them. `until`: the last point that is looked for.

    A server may write to the journal meanwhile: what looks damaged is read again, until it looks
    the same twice."""
    journal = yield from _read(name, export_bytes, known, until)
    for _ in range(ATTEMPTS_MAX):
        if not journal.damage:
            break
        before, journal = journal, (yield from _read(name, export_bytes, known, until))
        if journal.damage == before.damage:
            break
    return journal


def check_export(name: str, block: Superblock, export_bytes: int) -> None:
    """Raise JournalError if the export of the journal `name` has become too small for it."""
    if RING_START + block.ring_bytes > export_bytes:
        text = f"{export_bytes} bytes instead of {RING_START + block.ring_bytes}"
        raise JournalError(f"{name}: the export is smaller than its journal: {text}")


def _read(name: str, export_bytes: int, known: Sequence[Header], until: float) -> Program[Journal]:
    if export_bytes < RING_START:
        raise JournalError(f"{name}: is not a journal: it has only {export_bytes} bytes")
    found = yield from find(name)
    block = found.current
    check_export(name, block, export_bytes)
    headers: list[Header] = []
    damage = list(found.damage)
    unfinished = ""
    if block.state is not State.PROMOTED:
        unfinished = yield from _walk(block, headers, _Ahead(block, known), until)
        last = headers[-1].point.sequence if headers else block.base.sequence
        announced = max(block.newest, block.applying)
        if last < min(announced, until):
            lost = f"points {last + 1} to {announced} are"
            if announced == last + 1:
                lost = f"point {announced} is"
            damage.append(f"{lost} lost: {unfinished or 'the header is damaged'}")
    return Journal(name, found, tuple(headers), tuple(damage), unfinished, export_bytes)


def _walk(block: Superblock, headers: list[Header], ahead: _Ahead, until: float) -> Program[str]:
    """Append the chain's headers, to the point `until`. Returns what is wrong with the batch after
    it, if one began."""
    place, sequence, digest = block.tail, block.base.sequence + 1, block.base_digest
    data: bytes | bytearray = yield from fetch(block, place, BLOCK_BYTES)
    while sequence <= until:
        try:
            header = Header.unpack(bytes(data))
        except JournalError:
            return ""
        is_next = (header.place, header.point.sequence, header.previous) == (
            place,
            sequence,
            digest,
        )
        is_owners = sequence <= block.taken or header.generation == block.generation
        if not (is_next and is_owners and header.end - block.tail <= block.ring_bytes):
            return ""
        index_digest, data = yield from ahead.rest_of(header)
        if index_digest != header.index_digest:
            return f"the index of point {sequence} is damaged, or was never whole"
        if data[:BLOCK_BYTES] != pack_footer(header):
            return f"the footer of point {sequence} is damaged, or was never written"
        headers.append(header)
        place, sequence, digest = header.end, sequence + 1, header.digest
        data = data[BLOCK_BYTES:]
    return ""


class _Ahead:
    """What follows the headers of batches. Known batches are read together with those after
    them."""

    def __init__(self, block: Superblock, known: Sequence[Header]) -> None:
        self._block = block
        self._known = {h.place: h for h in known if h.index_bytes <= READ_BYTES_MAX}
        self._read: dict[int, bytearray] = {}
        """By the places of indexes: the index and all after it."""

    def rest_of(self, header: Header) -> Program[tuple[bytes, bytes | bytearray]]:
        """The digest of the batch's index; and the footer, with the header of the next batch, which
        saves a round trip for each point."""
        place, length = header.index_place, header.index_bytes
        if length > READ_BYTES_MAX:
            index = hashlib.sha256()
            for start, span in pieces(place, length, READ_BYTES_MAX):
                index.update((yield from fetch(self._block, start, span)))
            data = yield from fetch(self._block, header.footer_place, 2 * BLOCK_BYTES)
            return index.digest(), data
        if len(self._read.get(place, b"")) != length + 2 * BLOCK_BYTES:
            yield from self._read_together(header)
        data = self._read.pop(place)
        return hashlib.sha256(memoryview(data)[:length]).digest(), data[length:]

    def _read_together(self, header: Header) -> Program[None]:
        """What `header` says of itself, and what is known of those after it."""
        self._read = {}
        reads: list[Read] = []
        one: Header | None = header
        length = 0
        while one is not None and len(self._read) < AHEAD_MAX and length < AHEAD_BYTES:
            buf = bytearray(one.index_bytes + 2 * BLOCK_BYTES)
            reads += _reads(self._block, one.index_place, memoryview(buf))
            self._read[one.index_place] = buf
            length += len(buf)
            one = self._known.get(one.end)
        yield reads


def fetch(block: Superblock, place: int, length: int) -> Program[bytearray]:
    """Read `length` bytes at `place` of the ring."""
    buf = bytearray(length)
    yield _reads(block, place, memoryview(buf))
    return buf


def _reads(block: Superblock, place: int, buf: memoryview) -> list[Read]:
    reads, done = [], 0
    for at, span in block.spans(place, len(buf)):
        reads.append(Read(Side.JOURNAL, buf[done : done + span], at))
        done += span
    return reads


# The disk at a point.


class DamagedData(JournalError):
    """Data of a point is not what was written. `sequence`: the point whose batch has it."""

    def __init__(self, message: str, sequence: int) -> None:
        super().__init__(message)
        self.sequence = sequence


@dataclass(frozen=True, slots=True)
class Part:
    """A range of the disk whose newest content is in `entry`, of the batch of `header`."""

    offset: int
    length: int
    entry: Entry
    header: Header


def newest_parts(
    journal: Journal, headers: Sequence[Header], visit: Callable[[list[Part]], Program[None]]
) -> Program[bitarray]:
    """Call `visit` with the parts of the disk that differ from the base at the last of `headers`,
    the newest batch first, some entries at a time: each range of the disk occurs once, with its
    newest content. Returns which blocks of the disk these are."""
    block = journal.superblock
    covered = zeros(-(-block.disk_bytes // BLOCK_BYTES))  # takes memory where it is set
    for header in reversed(headers):
        index = yield from _index_of(journal, header)
        for end in range(header.entries, 0, -ENTRIES_AT_ONCE):
            found: list[Part] = []
            for entry in reversed(unpack_entries(index, end, max(0, end - ENTRIES_AT_ONCE))):
                found += _uncovered(covered, entry, header)
            yield from visit(found)
    return covered


def _index_of(journal: Journal, header: Header) -> Program[bytearray]:
    index, digest = bytearray(header.index_bytes), hashlib.sha256()
    for start, span in pieces(0, len(index), READ_BYTES_MAX):
        piece = memoryview(index)[start : start + span]
        yield _reads(journal.superblock, header.index_place + start, piece)
        digest.update(piece)
    if digest.digest() != header.index_digest:
        sequence = header.point.sequence
        raise DamagedData(f"{journal.name}: the index of point {sequence} is damaged", sequence)
    return index


def _uncovered(covered: bitarray, entry: Entry, header: Header) -> Iterator[Part]:
    """The parts of `entry` that are not covered by newer ones; they are from now on."""
    entry_end = entry.offset + entry.length
    at, end = entry.offset // BLOCK_BYTES, -(-entry_end // BLOCK_BYTES)
    while at < end and (first := covered.find(False, at, end)) >= 0:
        at = covered.find(True, first, end)
        at = end if at < 0 else at
        offset = first * BLOCK_BYTES
        yield Part(offset, min(at * BLOCK_BYTES, entry_end) - offset, entry, header)
    covered[entry.offset // BLOCK_BYTES : end] = True


def contents(journal: Journal, parts: Sequence[Part]) -> Program[list[memoryview]]:
    """The data of `parts`, none of which is zero. Raises DamagedData."""
    wanted = {part.entry.place: part for part in parts}
    bufs: dict[int, memoryview] = {}
    reads: list[Read] = []
    for run in _joined(sorted((at, blocks(part.entry.length)) for at, part in wanted.items())):
        buf = memoryview(bytearray(sum(length for _, length in run)))
        reads += _reads(journal.superblock, run[0][0], buf)
        for at, length in run:
            bufs[at], buf = buf[:length], buf[length:]
    yield reads
    for place, part in wanted.items():
        if zlib.crc32(bufs[place]) != part.entry.crc:
            text = f"at {part.entry.offset} of the disk, in the batch of point"
            sequence = part.header.point.sequence
            raise DamagedData(f"{journal.name}: the data {text} {sequence} is damaged", sequence)
    found = []
    for part in parts:
        start = part.offset - part.entry.offset
        found.append(bufs[part.entry.place][start : start + part.length])
    return found


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """`spans`, ascending places and lengths, in runs without gaps, each of which one request
    reads."""
    run: list[tuple[int, int]] = []
    for place, length in spans:
        if run and (place != sum(run[-1]) or sum(run[-1]) - run[0][0] + length > READ_BYTES_MAX):
            yield run
            run = []
        run.append((place, length))
    if run:
        yield run


def groups(parts: Iterable[Part], bytes_max: int = GROUP_BYTES) -> Iterator[list[Part]]:
    """`parts` in groups whose data may be in memory at once; parts of an entry stay together."""
    group: list[Part] = []
    length, last = 0, None
    for part in parts:
        if part.entry is not last and length + part.entry.length > bytes_max and group:
            yield group
            group, length = [], 0
        if part.entry is not last:
            length += part.entry.length
        group.append(part)
        last = part.entry
    if group:
        yield group
