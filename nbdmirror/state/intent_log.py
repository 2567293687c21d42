"""IntentLog: the file of a disk's write intents: the regions in which guests may have written since
the last save of the dirty bits (journal.Regions explains why, and when).

The file has two slots, written by turns, each with a whole log. A slot has sectors of 512 bytes,
which a power cut leaves old or new; each sector has its sequence number and a checksum. So an
interrupted write, on which no guest's write depends, can be distinguished from damage, which is
refused.

    sector: 4s "NBMI", H version, H index, 16s disk, Q size, Q sequence, d time, Q region bytes,
            452 bytes of bits (one a region, the first in the first byte's lowest), I CRC-32
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bitarray import bitarray

from nbdmirror.state.sealed_files import VERSION, Slots, StateError, check_version

SLOTS = 2
SECTOR_BYTES = 512

REGION_BYTES_MIN, REGION_BYTES_MAX = 1 << 20, 64 << 20
REGIONS_WANTED = 1024
"""A disk has at most so many regions, within the bounds above."""

DISK_BYTES_MAX = 1 << 50
"""Of a larger disk the log would be some megabytes, and be written for each new region."""

_MAGIC = b"NBMI"
_HEAD = struct.Struct("<4sHH16sQQdQ")
_CHECKSUM = struct.Struct("<I")
_BITS_BYTES = SECTOR_BYTES - _HEAD.size - _CHECKSUM.size
_REGIONS_A_SECTOR = _BITS_BYTES * 8


def region_bytes(size: int) -> int:
    """Size of a region of a disk of `size` bytes: a power of two."""
    wanted = max(1, -(-size // REGIONS_WANTED))
    return min(REGION_BYTES_MAX, max(REGION_BYTES_MIN, 1 << (wanted - 1).bit_length()))


def region_count(size: int) -> int:
    """The number of regions of a disk of `size` bytes; at least one."""
    return max(1, -(-size // region_bytes(size)))


def slot_bytes(size: int) -> int:
    """Bytes of one slot."""
    return SECTOR_BYTES * -(-region_count(size) // _REGIONS_A_SECTOR)


class _Sector(NamedTuple):
    sequence: int
    time_s: float
    bits: bytes


@dataclass(frozen=True, slots=True)
class IntentLog:
    """The content of the file."""

    disk_id: str
    """32 hexadecimal digits."""
    size: int
    sequence: int
    time_s: float
    """When it was written, in seconds since 1970."""
    regions: bytes
    """One byte for each region: 1 if guests may have written there."""

    def to_bytes(self) -> bytes:
        """The content of a slot."""
        packed = bitarray(endian="little")
        packed.pack(self.regions)
        bits = packed.tobytes().ljust(slot_bytes(self.size) // SECTOR_BYTES * _BITS_BYTES, b"\0")
        sectors = []
        for index in range(slot_bytes(self.size) // SECTOR_BYTES):
            head = _HEAD.pack(
                _MAGIC, VERSION, index, bytes.fromhex(self.disk_id), self.size, self.sequence,
                self.time_s, region_bytes(self.size),
            )  # fmt: skip
            content = head + bits[index * _BITS_BYTES : (index + 1) * _BITS_BYTES]
            sectors.append(content + _CHECKSUM.pack(zlib.crc32(content)))
        return b"".join(sectors)

    @classmethod
    def read(cls, slots: Slots, *, disk_id: str, size: int) -> IntentLog:
        """The newest log. Raises StateError if a part is damaged, or belongs to another disk."""
        try:
            found = [_sectors(slots.read(index), disk_id, size) for index in range(SLOTS)]
        except OSError as error:
            raise StateError(f"cannot be read: {error.strerror}") from error
        whole = [slot for slot in found if len({sector.sequence for sector in slot}) == 1]
        if not whole:
            raise StateError("is damaged: neither of its halves is whole")
        base = max(whole, key=lambda slot: slot[0].sequence)
        bits = bytearray(b"".join(sector.bits for sector in base))
        newest = base[0]
        for slot in found:
            for index, sector in enumerate(slot):
                if sector.sequence > base[0].sequence:  # of a write that was cut short
                    newest = max(newest, sector)
                    for at, byte in enumerate(sector.bits, index * _BITS_BYTES):
                        bits[at] |= byte
        unpacked = bitarray(buffer=bits, endian="little").unpack(b"\0", b"\1")
        regions = unpacked[: region_count(size)]
        return cls(disk_id, size, newest.sequence, newest.time_s, regions)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Offset and length, in bytes, of each run of regions, cut at the disk's end."""
        unit, position = region_bytes(self.size), 0
        while (first := self.regions.find(1, position)) >= 0:
            last = self.regions.find(0, first)
            position = len(self.regions) if last < 0 else last
            start = first * unit
            yield start, min(position * unit, self.size) - start


def disk_ids(slots: Slots) -> set[str]:
    """The disk IDs of all sectors, sound or not. Raises OSError."""
    found = set()
    for index in range(SLOTS):
        content = slots.read(index)
        for start in range(0, len(content) - SECTOR_BYTES + 1, SECTOR_BYTES):
            magic, _, _, disk, *_ = _HEAD.unpack_from(content, start)
            if magic == _MAGIC:
                found.add(disk.hex())
    return found


def check_newer(content: bytes) -> None:
    """Raise UnknownFormat if any sound sector has a newer version, whatever the rest is."""
    for start in range(0, len(content) - SECTOR_BYTES + 1, SECTOR_BYTES):
        sector = content[start : start + SECTOR_BYTES]
        magic, version, *_ = _HEAD.unpack_from(sector)
        if magic == _MAGIC and version > VERSION and _is_sound(sector):
            check_version(version)


def _is_sound(sector: bytes) -> bool:
    (checksum,) = _CHECKSUM.unpack(sector[-_CHECKSUM.size :])
    return bool(checksum == zlib.crc32(sector[: -_CHECKSUM.size]))


def _sectors(content: bytes, disk_id: str, size: int) -> list[_Sector]:
    """Raises StateError."""
    wanted = slot_bytes(size)
    if len(content) != wanted:
        raise StateError(f"is damaged: {wanted} bytes are missing")
    found = []
    for index in range(wanted // SECTOR_BYTES):
        sector = content[index * SECTOR_BYTES : (index + 1) * SECTOR_BYTES]
        body = sector[: -_CHECKSUM.size]
        magic, version, number, disk, of_size, sequence, time_s, unit = _HEAD.unpack_from(body)
        if magic != _MAGIC:
            raise StateError("is damaged: its first bytes are wrong")
        if not _is_sound(sector) or number != index:
            raise StateError("is damaged: a checksum is wrong")
        check_version(version)
        if (disk.hex(), of_size, unit) != (disk_id, size, region_bytes(size)):
            raise StateError("belongs to another disk")
        found.append(_Sector(sequence, time_s, body[_HEAD.size :]))
    return found
