"""The disk at a point, before the point is applied: a read-only device on the image and its
journal, also beside a source that continues to send points.

A range of the disk is in the newest batch up to the point that has the range, and in the image if
no batch has it. Nothing is written, and the source knows nothing of this reader. So the reader
notices by itself when what it reads is not the point any more:

1. Data of the journal is checked against its CRC-32. The source uses a batch's space again when
   the image holds that batch. From then on the image has the range, and is read instead.
2. The image changes in ranges that no batch up to the point has only when a later point is
   applied. `applying` is durable in both superblocks before the first such write. So a superblock
   that is read after the image, and knows of no later point, shows that the image was right.
3. A server that takes the journal over may have lost the point and made another one of the same
   number. So after each change of the generation the chain must still have the point's header.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass

from nbdmirror.devices.base import BlockDevice, BlockSize, Buffer, Extent, Wrapper
from nbdmirror.errors import DeviceError
from nbdmirror.points.applier import headers_to
from nbdmirror.points.format import (
    BLOCK_BYTES,
    IN_USE,
    Header,
    JournalError,
    Point,
    State,
    Superblock,
)
from nbdmirror.points.index import Index, Piece, Pieces, extents_of, index_to
from nbdmirror.points.reader import Journal, fetch, read
from nbdmirror.points.recovery import check_image, check_size, choose
from nbdmirror.points.requests import Program, Side, run
from nbdmirror.points.superblocks import find, taken_text, wall_time

ATTEMPTS_MAX = 10
"""How often the journal is read again if the source changes it meanwhile."""


@dataclass(frozen=True, slots=True)
class Found:
    """A point that can be served."""

    journal: Journal
    point: Point
    index: Index


def look_up(
    name: str, export_bytes: int, image_bytes: int, *, wanted: str | None = None
) -> Program[Found]:
    """Find the point that a user means (`recovery.choose`), and where its content is. Raises
    JournalError, and IO_ERRORS."""
    problem = ""
    for _ in range(ATTEMPTS_MAX):
        try:
            return (yield from _look_up(name, export_bytes, image_bytes, wanted))
        except JournalError as error:
            if str(error) == problem:  # else the source may have changed the journal meanwhile
                raise
            problem = str(error)
    raise JournalError(problem)


def _look_up(name: str, export_bytes: int, image_bytes: int, wanted: str | None) -> Program[Found]:
    journal = yield from read(name, export_bytes)
    check_size(journal.name, journal.superblock, image_bytes)
    if journal.superblock.state in IN_USE:
        text = taken_text(name, journal.superblock)
        if journal.superblock.state is State.PROMOTED:
            text = f"{text}; serve the image without its journal"
        raise JournalError(text)
    point = choose(journal, wanted)
    index, changed = yield from index_to(journal, point.sequence)
    yield from check_image(journal, changed)
    return Found(journal, point, index)


class PointView(Wrapper):
    """The disk at a point: a read-only BlockDevice. Calls are for any thread.

    As soon as the point cannot be served any more, each read fails with DeviceError."""

    def __init__(self, image: BlockDevice, journal: BlockDevice, found: Found) -> None:
        """`image` takes requests of any offset and length. Both are this device's from now on."""
        self.inner = image
        block, self.point = found.journal.superblock, found.point
        when = wall_time(self.point.time_ns)
        self.description = f"{image.description} at point {self.point.sequence} of {when}"
        self.size = block.disk_bytes
        self.read_only = True
        self.block_size = BlockSize(1, max(BLOCK_BYTES, image.block_size.preferred))
        self._journal = journal
        self._name = found.journal.name
        self._index = found.index
        self._pieces = Pieces(journal)
        headers = headers_to(found.journal, self.point.sequence)
        self._header: Header | None = headers[-1] if headers else None
        self._digest = headers[-1].digest if headers else block.base_digest
        self._block = block
        """The superblock, as it was read last."""
        self.gone = ""
        """Why the point cannot be served any more; only a read notices that."""
        self._lock = threading.Lock()

    # Reading.

    def pread(self, buf: memoryview, offset: int) -> None:
        self._refuse_if_gone()
        is_of_image = False
        for start, length, piece in self._index.pieces(offset, len(buf)):
            part = buf[start - offset : start - offset + length]
            if piece is not None and piece.is_zero:
                part[:] = bytes(length)
            elif data := self._data(piece):
                assert piece is not None
                part[:] = data[start - piece.start : start - piece.start + length]
            else:
                is_of_image = True
                self.inner.pread(part, start)
        if is_of_image:
            self._look_again()

    def extents(self, offset: int, length: int) -> list[Extent]:
        self._refuse_if_gone()
        found, is_of_image = extents_of(self.inner, self._index.pieces(offset, length))
        if is_of_image:
            self._look_again()
        return found

    def _data(self, piece: Piece | None) -> bytes | None:
        """What the piece's entry has, whole; None: the image has the range."""
        if piece is None:
            return None
        if (cached := self._pieces.cached(piece)) is not None:
            return cached
        if piece.place < self._block.tail:
            return None
        if (data := self._pieces.read(self._block, piece)) is not None:
            return data
        self._look_again()
        if piece.place < self._block.tail:
            return None
        text = f"the data at {piece.start} of the disk, of point {self.point.sequence}, is damaged"
        raise DeviceError(f"{self._name}: {text}")

    # Whether the point is still there.

    def _refuse_if_gone(self) -> None:
        if self.gone:
            raise DeviceError(self.gone)

    def _look_again(self) -> None:
        """Read the superblock again. Raise DeviceError if what was read of the image may be of a
        later point, and IO_ERRORS."""
        problem, seen = "", None
        while (block := self._superblock()) != seen:  # it may change while the chain is read
            if not (problem := self._problem(block)):
                break
            seen = block
        if problem:
            text = f"point {self.point.sequence} cannot be served any more"
            self.gone = f"{self._name}: {text}: {problem}"
        self._refuse_if_gone()
        with self._lock:
            if block.serial > self._block.serial:
                self._block = block

    def _superblock(self) -> Superblock:
        try:
            return run(find(self._name), {Side.JOURNAL: self._journal}).current
        except JournalError as error:
            raise DeviceError(str(error)) from error

    def _problem(self, block: Superblock) -> str:
        """Why the point is not there any more, if `block` is the superblock."""
        if block.disk_id != self._block.disk_id:
            return "the journal was created again"
        if block.state is State.PROMOTED:
            when = wall_time(block.since_ns)
            return f"point {block.base.sequence} was recovered at {when}, and the image is in use"
        if block.state is State.SERVED:
            when = wall_time(block.since_ns)
            return f"point {block.applying} is served since {when}, and the image is in use"
        if block.state is not State.OK:
            return f"the image is being copied in place since {wall_time(block.since_ns)}"
        if (newer := max(block.base.sequence, block.applying)) > self.point.sequence:
            return f"the image is being made point {newer}"
        if block.generation != self._block.generation and not self._has_point(block):
            return "another server writes to the journal, and the point is not there any more"
        return ""

    def _has_point(self, block: Superblock) -> bool:
        """Whether the chain of another generation has this very point."""
        if block.base.sequence == self.point.sequence:
            return block.base_digest == self._digest
        if block.taken < self.point.sequence or self._header is None:
            return False
        data = run(fetch(block, self._header.place, BLOCK_BYTES), {Side.JOURNAL: self._journal})
        return bytes(data) == self._header.pack()

    # What a device has beside that.

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        self._refuse()

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        self._refuse()

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self._refuse()

    def _refuse(self) -> None:
        raise DeviceError(f"{self.description}: is read-only", errno.EROFS)

    def flush(self) -> None:
        """There is nothing to flush."""

    def sync(self) -> None:
        """There is nothing to flush."""

    def cache(self, offset: int, length: int) -> None:
        """Nothing is read ahead."""

    def close(self) -> None:
        self.inner.close()
        self._journal.close()
