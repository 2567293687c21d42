"""The journal's format: superblocks, headers, index entries and footers, as bytes.

docs/points-format.md describes the format. This module alone knows the bytes, and does no I/O. All
numbers are little-endian. A block has BLOCK_BYTES; a sealed block ends with the CRC-32 of the rest.

Places. The ring is a loop of `ring_bytes`. A *place* is a number of bytes that only grows, as if
the ring had no end; `Superblock.spans` gives the ranges of the export. So a block of an earlier lap
has another place, and cannot be mistaken for a block of this one.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from nbdmirror.errors import Error
from nbdmirror.names import POINT_BYTES_MAX

MAGIC = b"NBMJ"
"""What a superblock begins with."""

VERSION = 1
BLOCK_BYTES = 4096
"""Unit of all places and lengths in a journal, and of the ranges of the disk in its index."""

SLOTS = (0, 64 << 10)
"""Where the superblocks A and B are: so far apart that no physical block has both."""

RING_START = 128 << 10
RING_BYTES_MIN = 1 << 20
SAMPLES_MAX = 64
ENTRY_BYTES_MAX = 1 << 20
"""Data of one index entry. A reader reads and checks an entry as a whole."""

_SUPERBLOCK = struct.Struct("<4sIQ16sQQQQqB7xQQQQI4x")
_SAMPLE = struct.Struct("<QII")
_APPLIER = struct.Struct("<Q")
_HEADER = struct.Struct("<4sIQQQQ32s32s")
_FOOTER = struct.Struct("<4sIQQQ32s")
_POINT = struct.Struct("<QqQH6x256s")
_ENTRY = struct.Struct("<QQQII")
_CRC = struct.Struct("<I")
_DATA, _ZERO = 1, 2
DIGEST_BYTES = 32
ENTRY_BYTES = _ENTRY.size
_APPLIER_AT = _SUPERBLOCK.size + _POINT.size + DIGEST_BYTES + SAMPLES_MAX * _SAMPLE.size


class JournalError(Error):
    """A journal cannot be used; `str(error)` says why. Nothing was changed."""


class State(Enum):
    """What the image is, beside the journal."""

    EMPTY = 0
    """The journal was created; the image is anything."""
    SEEDING = 1
    """The image is being filled for the first time; there is no point yet."""
    OK = 2
    TORN = 3
    """The image is being changed in place after an outage; there is no point until that ends."""
    PROMOTED = 4
    """The image was made a point's content, and belongs to whoever asked for that."""
    SERVED = 5
    """The image becomes the point `applying` while guests write to it (regions.py)."""


_KNOWN_STATES = {state.value: state for state in State}

SERIAL_MAX = 2**63 - 1
"""Whatever is written gets the next one, so none comes near: a greater one is damage."""

IN_USE = (State.PROMOTED, State.SERVED)
"""The states in which nobody but a user's guests may change the image."""


@dataclass(frozen=True, slots=True)
class Point:
    """One moment of the disk. Points are ordered by `sequence`; times are labels."""

    sequence: int
    """1, 2, 3 and so on; 0 is no point."""
    time_ns: int
    """Wall time of the cut, nanoseconds since 1970."""
    name: str = ""
    """What a user calls it."""
    group: int = 0
    """The number of the moment that several disks share; 0: none."""

    def pack(self) -> bytes:
        name = self.name.encode()
        assert len(name) <= POINT_BYTES_MAX, "the caller checks names"
        return _POINT.pack(self.sequence, self.time_ns, self.group, len(name), name)

    @classmethod
    def unpack(cls, data: bytes) -> Point:
        sequence, time_ns, group, length, name = _POINT.unpack(data)
        return cls(sequence, time_ns, name[:length].decode(errors="replace"), group)


NO_POINT = Point(0, 0)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the image reads as in one range, so that the image of another disk is noticed."""

    offset: int
    length: int
    crc: int


def pack_samples(samples: Sequence[Sample]) -> bytes:
    return b"".join(_SAMPLE.pack(one.offset, one.length, one.crc) for one in samples)


def unpack_samples(block: bytes, at: int, count: int) -> tuple[Sample, ...]:
    """As many as there are from `at` on, `count` at most."""
    fields = _SAMPLE.iter_unpack(block[at : at + count * _SAMPLE.size])
    return tuple(Sample(*one) for one in fields)


@dataclass(frozen=True, slots=True)
class Superblock:
    """The journal as a whole. Two copies are written by turns; the greater `serial` counts."""

    disk_id: bytes
    """16 random bytes, from the journal's creation."""
    disk_bytes: int
    ring_bytes: int
    generation: int
    """Who may write: a random number of each process that writes to the journal."""
    taken: int
    """The last point from before this generation."""
    state: State
    since_ns: int
    """Wall time at which `state` began, nanoseconds since 1970."""
    base: Point
    """The image holds this point, and all before it; the chain continues after it. The image holds
    no point of its own if `is_base_offered` is false."""
    base_digest: bytes
    """Of the base's header: the next batch names it. Random if there is no such header."""
    is_base_offered: bool
    tail: int
    """Place of the first batch after the base."""
    applying: int = 0
    """The sequence of the point that is being applied, or 0: the image is between base and it."""
    newest: int = 0
    """A point that was announced: a chain that ends earlier is damaged."""
    samples: tuple[Sample, ...] = ()
    applier: int = 0
    """The applier that makes the image the point `applying` (follower.py); 0: whoever wrote this
    does."""
    serial: int = 1

    def pack(self) -> bytes:
        head = _SUPERBLOCK.pack(
            MAGIC, VERSION, self.serial, self.disk_id, self.disk_bytes, self.ring_bytes,
            self.generation, self.taken, self.since_ns, self.state.value, self.is_base_offered,
            self.tail, self.applying, self.newest, len(self.samples),
        )  # fmt: skip
        content = head + self.base.pack() + self.base_digest + pack_samples(self.samples)
        return sealed(content.ljust(_APPLIER_AT, b"\0") + _APPLIER.pack(self.applier))

    @classmethod
    def unpack(cls, block: bytes) -> Superblock:
        """Raises JournalError, whose text follows the name of the block."""
        fields = _SUPERBLOCK.unpack_from(block)
        magic, version, serial, disk_id, disk_bytes, ring_bytes, generation, taken = fields[:8]
        since_ns, state, is_base_offered, tail, applying, newest, count = fields[8:]
        if magic != MAGIC:
            raise JournalError("is no superblock of a journal")
        check_seal(block)
        if version != VERSION:
            text = f"has version {version} of the format, and this nbdmirror reads {VERSION}"
            raise JournalError(text)
        if disk_bytes < 0 or ring_bytes < RING_BYTES_MIN or ring_bytes % BLOCK_BYTES:
            raise JournalError("is damaged: its sizes are impossible")
        if count > SAMPLES_MAX or serial > SERIAL_MAX:
            raise JournalError("is damaged: its numbers are impossible")
        if state not in _KNOWN_STATES:
            raise JournalError(f"has the state {state}, which this nbdmirror does not know")
        at = _SUPERBLOCK.size + _POINT.size
        first = at + DIGEST_BYTES
        return cls(
            disk_id=disk_id,
            disk_bytes=disk_bytes,
            ring_bytes=ring_bytes,
            generation=generation,
            taken=taken,
            state=_KNOWN_STATES[state],
            since_ns=since_ns,
            base=Point.unpack(block[_SUPERBLOCK.size : at]),
            base_digest=block[at:first],
            is_base_offered=bool(is_base_offered),
            tail=tail,
            applying=applying,
            newest=newest,
            samples=unpack_samples(block, first, count),
            applier=_APPLIER.unpack_from(block, _APPLIER_AT)[0],
            serial=serial,
        )

    def spans(self, place: int, length: int) -> Iterator[tuple[int, int]]:
        """Offsets and lengths in the export of `length` bytes at `place`: one range, or two where
        the ring ends."""
        while length:
            at = place % self.ring_bytes
            span = min(length, self.ring_bytes - at)
            yield RING_START + at, span
            place, length = place + span, length - span


@dataclass(frozen=True, slots=True)
class Header:
    """Begins a batch: payload, index and footer follow, in this order."""

    point: Point
    generation: int
    place: int
    """Its own."""
    payload_bytes: int
    entries: int
    index_digest: bytes
    """SHA-256 of the index, with the zeroes that fill its last block."""
    previous: bytes
    """`digest` of the header before."""

    def pack(self) -> bytes:
        head = _HEADER.pack(
            b"NBMh", VERSION, self.generation, self.place, self.payload_bytes, self.entries,
            self.index_digest, self.previous,
        )  # fmt: skip
        return sealed(head + self.point.pack())

    @classmethod
    def unpack(cls, block: bytes) -> Header:
        """Raises JournalError."""
        magic, _, generation, place, payload, entries, index, previous = _HEADER.unpack_from(block)
        if magic != b"NBMh":
            raise JournalError("is no header")
        check_seal(block)
        point = Point.unpack(block[_HEADER.size : _HEADER.size + _POINT.size])
        return cls(point, generation, place, payload, entries, index, previous)

    @property
    def digest(self) -> bytes:
        """What the footer and the next header have of this one. It covers the index too."""
        return hashlib.sha256(self.pack()).digest()

    @property
    def index_bytes(self) -> int:
        return blocks(self.entries * ENTRY_BYTES)

    @property
    def index_place(self) -> int:
        return self.place + BLOCK_BYTES + self.payload_bytes

    @property
    def footer_place(self) -> int:
        return self.index_place + self.index_bytes

    @property
    def end(self) -> int:
        """The place of the next batch."""
        return self.footer_place + BLOCK_BYTES


def pack_footer(header: Header) -> bytes:
    """The block whose presence commits the batch."""
    point = header.point.sequence
    fields = (b"NBMf", VERSION, header.generation, point, header.footer_place, header.digest)
    return sealed(_FOOTER.pack(*fields))


@dataclass(frozen=True, slots=True)
class Entry:
    """A range of the disk in a batch's index."""

    offset: int
    length: int
    place: int
    """Of its data, which fills whole blocks; not used for zeroes."""
    crc: int
    """CRC-32 of these blocks."""
    is_zero: bool


def pack_data(offset: int, length: int, place: int, crc: int) -> bytes:
    """An entry of the index: a range whose data is in the ring."""
    return _ENTRY.pack(offset, length, place, crc, _DATA)


def pack_zeroes(offset: int, length: int) -> bytes:
    """An entry of the index: a range of zeroes."""
    return _ENTRY.pack(offset, length, 0, 0, _ZERO)


def unpack_entries(index: bytes | bytearray | memoryview, end: int, start: int = 0) -> list[Entry]:
    """The entries `start` to `end` of an index whose digest is right."""
    fields = _ENTRY.iter_unpack(memoryview(index)[start * ENTRY_BYTES : end * ENTRY_BYTES])
    return [
        Entry(offset, length, place, crc, is_zero=kind == _ZERO)
        for offset, length, place, crc, kind in fields
    ]


def blocks(length: int) -> int:
    """`length`, rounded up to whole blocks."""
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES


def batch_bytes_max(data_bytes: int) -> int:
    """What a batch of `data_bytes` takes of the ring at most, however its ranges are cut. Its
    ranges must be whole blocks of the disk, the last one of the disk excepted."""
    data_bytes = blocks(data_bytes)
    return 2 * BLOCK_BYTES + data_bytes + blocks(data_bytes // BLOCK_BYTES * ENTRY_BYTES)


def data_bytes_max(ring_bytes: int) -> int:
    """How much data a batch can have that takes all of the ring: `batch_bytes_max` of that fits."""
    whole = max(0, ring_bytes // BLOCK_BYTES - 2)
    return whole * BLOCK_BYTES // (BLOCK_BYTES + ENTRY_BYTES) * BLOCK_BYTES


def sealed(content: bytes) -> bytes:
    content = content.ljust(BLOCK_BYTES - _CRC.size, b"\0")
    return content + _CRC.pack(zlib.crc32(content))


def check_seal(block: bytes) -> None:
    content = memoryview(block)[: -_CRC.size]
    if _CRC.unpack(block[-_CRC.size :]) != (zlib.crc32(content),):
        raise JournalError("is damaged: its checksum is wrong")
