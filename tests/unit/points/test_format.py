"""The journal's bytes are where docs/points-format.md says: read here with its tables alone."""

from __future__ import annotations

import hashlib
import re
import zlib

from support.processes import ROOT
from unit.points.pointparts import SECOND_NS, with_points

PAGE = (ROOT / "docs" / "points-format.md").read_text()
FAR = with_points(2)
RING = 128 << 10


def table(title: str) -> dict[str, tuple[int, int]]:
    """The first words of the rows of the first table after `title` -> offset and bytes."""
    rows = re.findall(r"^\| (\d+) \| (\d+)[^|]*\| (.*) \|$", PAGE.partition(title)[2], re.MULTILINE)
    found: dict[str, tuple[int, int]] = {}
    for offset, length, what in rows:
        if int(offset) == 0 and found:
            break
        found[re.split(r"[:,;]| of the process| in bytes", what)[0]] = (int(offset), int(length))
    return found


def number(block: bytes, row: tuple[int, int]) -> int:
    return int.from_bytes(block[row[0] : row[0] + row[1]], "little")


def block(place: int) -> bytes:
    found = bytes(FAR.journal.data[RING + place : RING + place + 4096])
    assert zlib.crc32(found[:4092]) == int.from_bytes(found[4092:], "little")
    return found


def test_the_superblock() -> None:
    rows = table("## Superblock")
    blocks = [bytes(FAR.journal.data[at : at + 4096]) for at in (0, 64 << 10)]
    serial = rows["serial number"]
    superblock = max(blocks, key=lambda one: number(one, serial))
    assert superblock.startswith(b"NBMJ")
    assert zlib.crc32(superblock[:4092]) == int.from_bytes(superblock[4092:], "little")
    current = FAR.writer.superblocks.current
    expected = {
        "version": 1,
        "serial number": current.serial,
        "disk ID": int.from_bytes(FAR.disk_id, "little"),
        "size of the disk": 64 << 10,
        "size of the ring": 1 << 20,
        "generation": current.generation,
        "taken": 0,
        "since": SECOND_NS,
        "state": 2,
        "1 if the base is a point that can be recovered": 0,
        "tail": 0,
        "applying": 0,
        "newest": 2,
        "number of samples": 0,
    }
    for name, value in expected.items():
        (row,) = [where for key, where in rows.items() if key.startswith(name)]
        assert number(superblock, row) == value, name


def test_the_batches() -> None:
    rows = table("**Header**")
    place, previous = 0, FAR.writer.superblocks.current.base_digest
    for sequence, name in ((1, b"n1"), (2, b"n2")):
        header = block(place)
        assert header.startswith(b"NBMh")
        assert number(header, rows["its own place"]) == place
        payload = number(header, rows["size of the payload"])
        entries = number(header, rows["number of index entries"])
        (at, _), (names, _) = rows["SHA-256 of the index"], rows["digest of the header before"]
        record = header[rows["a point record"][0] :]
        assert int.from_bytes(record[:8], "little") == sequence
        assert int.from_bytes(record[8:16], "little") == sequence * SECOND_NS
        length = int.from_bytes(record[24:26], "little")
        assert record[32 : 32 + length] == name
        assert header[names : names + 32] == previous
        index_at = RING + place + 4096 + payload
        index = bytes(FAR.journal.data[index_at : index_at + 4096])
        assert hashlib.sha256(index).digest() == header[at : at + 32]
        disk = FAR.contents[sequence]
        for first in range(0, entries * 32, 32):
            entry = index[first : first + 32]
            offset, length, where = (int.from_bytes(entry[n : n + 8], "little") for n in (0, 8, 16))
            data = bytes(FAR.journal.data[RING + where : RING + where + length])
            assert int.from_bytes(entry[24:28], "little") == zlib.crc32(data)
            assert int.from_bytes(entry[28:], "little") == 1
            assert data == disk[offset : offset + length]
        previous = hashlib.sha256(header).digest()
        footer = block(place + 4096 + payload + 4096)
        assert footer.startswith(b"NBMf")
        assert int.from_bytes(footer[16:24], "little") == sequence
        assert int.from_bytes(footer[24:32], "little") == place + 8192 + payload
        assert footer[32:64] == previous
        place += 8192 + payload + 4096
    assert place == FAR.writer.room().used_bytes
