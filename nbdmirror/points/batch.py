"""Batch: the part of a journal that one point takes, while the point is written."""

from __future__ import annotations

import hashlib

from nbdmirror.devices.base import Buffer, Done
from nbdmirror.points.format import BLOCK_BYTES, ENTRY_BYTES, Header, Point, blocks

GATHER_BYTES = 256 << 10
"""Small writes are joined to requests of about this size."""


class Batch:
    """The batch that is being written. Its data lies in the ring in the order in which the data
    came."""

    def __init__(self, point: Point, place: int, failure: BaseException | None) -> None:
        self.point = point
        self.failure = failure
        """Of a superblock, the last one when this began."""
        self.place = place
        self.next = place + BLOCK_BYTES
        """Where the next data goes."""
        self.index = bytearray()
        self.error: BaseException | None = None
        """The first error of a write."""
        self.requests = 0
        """Of data, in flight."""
        self.gathered_bytes = 0
        """Of data that waits to be sent as one request. The data ends at `next`."""
        self._gathered: list[Buffer] = []
        self._waiting: list[Done] = []

    def gather(self, data: list[Buffer], length: int, done: Done) -> None:
        """Give data of `length` bytes the next place. It must stay as it is until `done`."""
        self.next += length
        self._gathered += data
        self._waiting.append(done)
        self.gathered_bytes += length

    def take_gathered(self) -> tuple[int, Buffer, list[Done]]:
        """The place of the gathered data in the ring, the data, and who waits for the end."""
        place = self.next - self.gathered_bytes
        gathered, waiting = self._gathered, self._waiting
        self._gathered, self._waiting, self.gathered_bytes = [], [], 0
        return place, gathered[0] if len(gathered) == 1 else b"".join(gathered), waiting

    def header(self, generation: int, previous: bytes) -> Header:
        """The header of the whole batch. From now on the index is as it is written."""
        entries = len(self.index) // ENTRY_BYTES
        self.index.extend(bytes(blocks(len(self.index)) - len(self.index)))
        digest = hashlib.sha256(self.index).digest()
        payload = self.next - self.place - BLOCK_BYTES
        return Header(self.point, generation, self.place, payload, entries, digest, previous)
