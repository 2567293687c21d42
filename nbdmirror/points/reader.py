"""Reading a journal: which points it holds, and what the disk was at one of them.

The chain begins at the superblock's tail, after its base. Each batch names the digest of the one
before. The chain ends where the next batch has no sound footer: that batch was never committed, or
was damaged since. A superblock that knows of a later point shows which of the two.

These programs read, and change nothing.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bitarray import bitarray

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


def read(name: str, export_bytes: int) -> Program[Journal]:
    """Read the journal `name`, on an export of `export_bytes`. Raises JournalError if it is none.
    Damage is no error: the points before it are sound.

    A server may write to the journal meanwhile: what looks damaged is read again, until it looks
    the same twice."""
    journal = yield from _read(name, export_bytes)
    for _ in range(ATTEMPTS_MAX):
        if not journal.damage:
            break
        before, journal = journal, (yield from _read(name, export_bytes))
        if journal.damage == before.damage:
            break
    return journal


def _read(name: str, export_bytes: int) -> Program[Journal]:
    if export_bytes < RING_START:
        raise JournalError(f"{name}: is not a journal: it has only {export_bytes} bytes")
    found = yield from find(name)
    block = found.current
    if RING_START + block.ring_bytes > export_bytes:
        text = f"{export_bytes} bytes instead of {RING_START + block.ring_bytes}"
        raise JournalError(f"{name}: the export is smaller than its journal: {text}")
    headers: list[Header] = []
    damage = list(found.damage)
    unfinished = ""
    if block.state is not State.PROMOTED:
        unfinished = yield from _walk(block, headers)
        last = headers[-1].point.sequence if headers else block.base.sequence
        known = max(block.newest, block.applying)
        if last < known:
            lost = (
                f"point {last + 1} is" if known == last + 1 else f"points {last + 1} to {known} are"
            )
            damage.append(f"{lost} lost: {unfinished or 'the header is damaged'}")
    return Journal(name, found, tuple(headers), tuple(damage), unfinished)


def _walk(block: Superblock, headers: list[Header]) -> Program[str]:
    """Append the chain's headers. Returns what is wrong with the batch after it, if one began."""
    place, sequence, digest = block.tail, block.base.sequence + 1, block.base_digest
    data = yield from fetch(block, place, BLOCK_BYTES)
    while True:
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
        index, data = hashlib.sha256(), bytearray()
        for start, span in pieces(header.index_place, header.index_bytes, READ_BYTES_MAX):
            index.update((yield from fetch(block, start, span)))
        if index.digest() != header.index_digest:
            return f"the index of point {sequence} is damaged, or was never whole"
        # With the header of the next batch, which saves a round trip for each point.
        data = yield from fetch(block, header.footer_place, 2 * BLOCK_BYTES)
        if data[:BLOCK_BYTES] != pack_footer(header):
            return f"the footer of point {sequence} is damaged, or was never written"
        headers.append(header)
        place, sequence, digest = header.end, sequence + 1, header.digest
        data = data[BLOCK_BYTES:]


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
    batch by batch: each range of the disk occurs once, with its newest content. Returns which
    blocks of the disk these are."""
    block = journal.superblock
    covered = bitarray(-(-block.disk_bytes // BLOCK_BYTES))
    covered.setall(False)
    for header in reversed(headers):
        index = yield from fetch(block, header.index_place, header.index_bytes)
        if hashlib.sha256(index).digest() != header.index_digest:
            raise DamagedData(
                f"{journal.name}: the index of point {header.point.sequence} is damaged",
                header.point.sequence,
            )
        found: list[Part] = []
        for entry in reversed(unpack_entries(index, header.entries)):
            found += _uncovered(covered, entry, header)
        yield from visit(found)
    return covered


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
