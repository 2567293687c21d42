"""Regions: how much of a point its image has, while guests already write to it.

The disk is cut into regions. A region's bit says that the image holds the point there, durably, and
that guests may have written to it since. The bits are kept beside the superblocks, in two maps that
are written by turns, so that a sound map exists at every moment. docs/points-format.md has the
bytes.

The order that makes this safe: the image has the region; the image is flushed; the map is durable;
a guest writes. So whatever is lost at whatever moment, a region without its bit has no guest's
write, and can be made the point again.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from bitarray import bitarray

from nbdmirror.points.format import (
    BLOCK_BYTES,
    SLOTS,
    VERSION,
    JournalError,
    Superblock,
    blocks,
    check_seal,
    sealed,
)
from nbdmirror.points.requests import Program, Read, Side, Write

REGION_BYTES_MIN = 64 << 10
"""What a guest's first write to a region waits for is this much, copied."""

HEAD_AT = BLOCK_BYTES
"""Where a map begins, after its superblock: a head, and then the bits."""

BITS_AT = HEAD_AT + BLOCK_BYTES
BITS_MAX = (SLOTS[1] - SLOTS[0] - BITS_AT) * 8

_HEAD = struct.Struct("<4sIQ16sQQQI")


def region_bytes_of(disk_bytes: int) -> int:
    """A power of two, so large that a map has a bit for each region."""
    region_bytes = REGION_BYTES_MIN
    while -(-disk_bytes // region_bytes) > BITS_MAX:
        region_bytes *= 2
    return region_bytes


@dataclass(frozen=True, slots=True)
class RegionMap:
    """One state of the map."""

    region_bytes: int
    bits: bitarray
    """1: the image has the region. Never changed in place."""
    serial: int = 0
    """The greater one counts; 0: there is no map yet."""

    @classmethod
    def empty(cls, disk_bytes: int) -> RegionMap:
        """The image has no region."""
        region_bytes = region_bytes_of(disk_bytes)
        bits = bitarray(-(-disk_bytes // region_bytes), "little")
        bits.setall(False)
        return cls(region_bytes, bits)

    def span(self, offset: int, length: int) -> tuple[int, int]:
        """The first region of a range of the disk, and the one after its last."""
        return offset // self.region_bytes, -(-(offset + length) // self.region_bytes)

    def of_blocks(self, blocks: bitarray) -> bitarray:
        """The regions, a bit for each, in which one of `blocks` of the disk is set."""
        found = bitarray(len(self.bits), "little")
        found.setall(False)
        count, at = self.region_bytes // BLOCK_BYTES, 0
        while (at := blocks.find(True, at)) >= 0:
            region = at // count
            found[region] = True
            at = (region + 1) * count
        return found

    def runs(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The ranges within the range that the image may lack: offsets and lengths in bytes."""
        found, (at, end) = [], self.span(offset, length)
        while at < end and (at := self.bits.find(False, at, end)) >= 0:
            stop = self.bits.find(True, at, end)
            stop = end if stop < 0 else stop
            first = max(offset, at * self.region_bytes)
            found.append((first, min(offset + length, stop * self.region_bytes) - first))
            at = stop
        return found

    def pack(self, block: Superblock) -> bytes:
        """For the journal with the superblock `block`, which is in the state `served`."""
        bits = self.bits.tobytes()
        head = _HEAD.pack(
            b"NBMm", VERSION, self.serial, block.disk_id, block.applying, self.region_bytes,
            len(self.bits), zlib.crc32(bits),
        )  # fmt: skip
        return sealed(head) + bits.ljust(blocks(len(bits)), b"\0")


def _unpack(data: bytes, block: Superblock) -> RegionMap | None:
    """None: the data is no sound map of this journal and point."""
    magic, version, serial, disk_id, point, region_bytes, count, crc = _HEAD.unpack_from(data)
    wanted = RegionMap.empty(block.disk_bytes)
    given = (magic, version, disk_id, point, region_bytes, count)
    try:
        check_seal(data[:BLOCK_BYTES])
    except JournalError:
        return None
    expected = (b"NBMm", VERSION, block.disk_id, block.applying, wanted.region_bytes)
    if given != (*expected, len(wanted.bits)):
        return None
    packed = data[BLOCK_BYTES : BLOCK_BYTES + -(-count // 8)]
    if zlib.crc32(packed) != crc:
        return None
    bits = bitarray(endian="little")
    bits.frombytes(packed)
    return RegionMap(region_bytes, bits[:count], serial)


def read_map(block: Superblock) -> Program[RegionMap]:
    """The map that counts; an empty one if there is none yet. Raises IO_ERRORS."""
    empty = RegionMap.empty(block.disk_bytes)
    length = BLOCK_BYTES + blocks(-(-len(empty.bits) // 8))
    bufs = [bytearray(length) for _ in SLOTS]
    yield [
        Read(Side.JOURNAL, memoryview(buf), slot + HEAD_AT)
        for buf, slot in zip(bufs, SLOTS, strict=True)
    ]
    maps = [found for buf in bufs if (found := _unpack(bytes(buf), block)) is not None]
    return max(maps, key=lambda found: found.serial, default=empty)


def write_map(block: Superblock, regions: RegionMap) -> Program[None]:
    """Make `regions` the map that counts, durably. Its serial is one more than that of the map
    before. Raises IO_ERRORS; then the map before still counts, or this one."""
    slot = SLOTS[regions.serial % 2]
    yield [Write(Side.JOURNAL, regions.pack(block), slot + HEAD_AT, is_durable=True)]
