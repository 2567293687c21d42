"""BitmapSnapshot: NAME.bitmaps, what was dirty in a disk's bitmaps at one moment."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Annotated, Self

from nbdmirror.state.json_record import COUNT, ID, INTEGER, NUMBER, Key, MapOf, dump, load
from nbdmirror.state.sealed_files import StateError, seal, unseal

KIND_BITMAPS = "bitmaps"


@dataclass(frozen=True, slots=True)
class SnapshotHead:
    """The first line of NAME.bitmaps."""

    disk_id: Annotated[str, Key("disk", ID)]
    time_s: Annotated[float, Key("time", NUMBER)]
    lengths: Annotated[dict[str, int], Key("bitmaps", MapOf(COUNT))]
    """Lengths of the packed bitmaps that follow, in bytes, by their keys."""
    mtime_ns: Annotated[int, Key("mtime", INTEGER)] = 0
    newest_point: Annotated[int, Key("newest_point", COUNT)] = 0
    newest_point_ns: Annotated[int, Key("newest_point_time", COUNT)] = 0


@dataclass(frozen=True, slots=True)
class BitmapSnapshot:
    """NAME.bitmaps: DirtyBitmap.to_bytes of each bitmap, by its key."""

    disk_id: str
    time_s: float
    bits: dict[str, bytes]
    mtime_ns: int = 0
    """The file's time of change at the save; 0 without a file, or from an older version."""
    newest_point: int = 0
    """The number of the mirror's last committed point; 0: none."""
    newest_point_ns: int = 0
    """The wall time of that point, in nanoseconds since 1970; 0: not known."""

    def to_bytes(self) -> bytes:
        packed = {key: zlib.compress(bits, 1) for key, bits in self.bits.items()}
        lengths = {key: len(one) for key, one in packed.items()}
        point = self.newest_point, self.newest_point_ns
        head = SnapshotHead(self.disk_id, self.time_s, lengths, self.mtime_ns, *point)
        return seal(KIND_BITMAPS, b"".join([dump(head, indent=None), b"\n", *packed.values()]))

    @classmethod
    def from_bytes(cls, content: bytes, sizes: dict[str, int]) -> Self:
        """`sizes`: the bytes of each wanted bitmap, by its key. Raises StateError."""
        head, _, rest = unseal(KIND_BITMAPS, content).partition(b"\n")
        said = load(SnapshotHead, head)
        bits: dict[str, bytes] = {}
        for key, length in said.lengths.items():
            if key in sizes:
                try:
                    bits[key] = zlib.decompressobj().decompress(rest[:length], sizes[key] + 1)
                except zlib.error as error:
                    raise StateError(f"bitmap {key}: cannot be unpacked: {error}") from error
            rest = rest[length:]
        point = said.newest_point, said.newest_point_ns
        return cls(said.disk_id, said.time_s, bits, said.mtime_ns, *point)
