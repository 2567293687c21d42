"""A point that guests write to, before its image holds it: served at once, and put into the image
meanwhile.

A range is read from the journal as long as its region of the image is not durably the point
(regions.py), and from the image from then on. A guest's first write to such a region waits until
the region is: that is a copy, a flush and a write of the map, for all regions at once that are
waited for. A helper thread brings the regions that nobody asks for. When the image has all, the
journal says so (`promoted`), and guests are served from the image alone.

The journal belongs to this process: it has a generation of its own, so the old source stops, and
what the point needs is not overwritten. A process that ends in between loses nothing: the next one
continues with the map.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from bitarray import bitarray

from nbdmirror.backoff import Backoff
from nbdmirror.devices.base import BlockDevice, BlockSize, Buffer, Extent, Wrapper
from nbdmirror.errors import IO_ERRORS, DeviceError
from nbdmirror.points.format import BLOCK_BYTES, JournalError
from nbdmirror.points.index import Piece, Pieces, extents_of
from nbdmirror.points.promotion import finish, looked_up, taken, with_superblock
from nbdmirror.points.recovery import confirm
from nbdmirror.points.regions import RegionMap, write_map
from nbdmirror.points.requests import Program, Side, run
from nbdmirror.points.superblocks import JournalTaken, Superblocks, wall_time

log = logging.getLogger("nbdmirror")

SAVE_BYTES = 64 << 20
"""What the helper thread copies before it makes that durable."""

RETRY_S, RETRY_S_MAX = 1.0, 30.0
"""Pauses of the helper thread after an error."""

STOP_S = 5.0
"""How long `close` waits for a request of the helper thread."""


class Damaged(DeviceError):
    """Data of the journal is not what was written."""


class ServedPoint(Wrapper):
    """The disk at a point, for guests that read and write: a BlockDevice. Calls are for any thread;
    changes only after `start`."""

    def __init__(self, image: BlockDevice, journal: BlockDevice, *, wanted: str | None) -> None:
        """`image` takes requests of any offset and length. Both are this device's from now on.
        `wanted`: as for `look_up`. Raises JournalError and IO_ERRORS; nothing is changed."""
        self.inner = image
        self._journal = journal
        self._wanted = wanted
        self._sides = {Side.IMAGE: image, Side.JOURNAL: journal}
        self._found = looked_up(self._sides, wanted)
        self.description = image.description
        self.size = self._found.journal.superblock.disk_bytes
        self.read_only = False
        self.block_size = BlockSize(1, max(BLOCK_BYTES, image.block_size.preferred))
        self._pieces = Pieces(journal)
        self._superblocks: Superblocks | None = None
        self.gone = ""
        """Why the image belongs to somebody else by now, as far as that was noticed."""
        self._changed = threading.Condition()
        """Guards what follows; no request is made under it."""
        self._left = bitarray()
        """Regions that the image may lack, or not have durably."""
        self._copied = bitarray()
        """Those of them that the image has, since the last flush that failed."""
        self._copying: set[int] = set()
        self._failures = 0
        """Flushes that have failed: they may have lost what was copied."""
        self._saving = threading.Lock()
        """Held from a flush to the write of the map; and by guests' flushes, since one of those may
        get the error that says that a copy is lost."""
        self._stopping = threading.Event()
        self._helper: threading.Thread | None = None
        if not self.is_complete:
            self._find_what_is_left()

    @property
    def is_complete(self) -> bool:
        """The image holds the point; this device is not needed any more."""
        return self._found.is_in_image

    def start(self, *, now_ns: int) -> None:
        """Take the journal. Changes are allowed from now on. Raises JournalError and IO_ERRORS."""
        if self.is_complete:
            run(confirm(self._found.journal), self._sides)
        else:
            self._found, self._superblocks = taken(
                self._found, self._sides, self._wanted, now_ns=now_ns
            )
        if self.is_complete:
            block, point = self._found.journal.superblock, self._found.point
            text = "%s is point %d since %s: the journal is not needed any more"
            log.info(text, self.inner.description, point.sequence, wall_time(block.since_ns))
        else:
            self._find_what_is_left()
            log.info("%s", self.description)

    def bring_all(self, on_complete: Callable[[], None]) -> None:
        """Begin to make the image the point. `on_complete` is called once the image is, on any
        thread."""
        self._helper = threading.Thread(
            target=self._bring_all, args=(on_complete,), name="nbdmirror-point", daemon=True
        )
        self._helper.start()

    def bring_some(self) -> None:
        """Bring the next regions into the image, or note that the image has all. Raises
        IO_ERRORS."""
        if not self._left.any():
            self._complete()
            return
        count, damage = max(1, SAVE_BYTES // self._found.regions.region_bytes), None
        for region in self._left_in(0, len(self._left)):
            if not count or self._stopping.is_set():
                break
            try:
                self._bring(region)
                count -= 1
            except Damaged as error:  # the others can be brought
                damage = error
        self._save()
        if damage is not None:
            raise damage

    def _find_what_is_left(self) -> None:
        """Find out what the image lacks."""
        self._left = self._found.needed & ~self._found.regions.bits
        self._copied = bitarray(len(self._left), "little")
        self._copied.setall(False)
        self._describe()

    def _describe(self) -> None:
        found, left = self._found, self._left.count()
        total = found.needed.count()
        point = f"point {found.point.sequence} of {wall_time(found.point.time_ns)}"
        percent = 100 * (total - left) // max(1, total)
        self.description = f"{self.inner.description}, which becomes {point} ({percent} %)"

    # Reading.

    def pread(self, buf: memoryview, offset: int) -> None:
        for start, length, piece in self._ranges(offset, len(buf)):
            part = buf[start - offset : start - offset + length]
            if piece is None:
                self.inner.pread(part, start)
            elif piece.is_zero:
                part[:] = bytes(length)
            else:
                part[:] = self._data(piece, start, length)

    def extents(self, offset: int, length: int) -> list[Extent]:
        return extents_of(self.inner, self._ranges(offset, length))[0]

    def cache(self, offset: int, length: int) -> None:
        if not self._lacks(offset, length):
            self.inner.cache(offset, length)

    def _ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, Piece | None]]:
        """The range, in order: offset, length, and where the content is; None: in the image."""
        self._refuse_if_gone()
        if not self._lacks(offset, length):
            yield offset, length, None
            return
        size = self._found.regions.region_bytes
        for start, span, piece in self._found.index.pieces(offset, length):
            end = start + span
            while start < end:
                stop = min(end, start // size * size + size)
                is_left = piece is not None and self._left[start // size]
                yield start, stop - start, piece if is_left else None
                start = stop

    def _lacks(self, offset: int, length: int) -> bool:
        first, end = self._found.regions.span(offset, length)
        return self._left.find(True, first, end) >= 0

    def _left_in(self, first: int, end: int) -> Iterator[int]:
        while (first := self._left.find(True, first, end)) >= 0:
            yield first
            first += 1

    def _data(self, piece: Piece, start: int, length: int) -> bytes | memoryview:
        data = self._pieces.cached(piece)
        if data is None:
            data = self._pieces.read(self._found.journal.superblock, piece)
        if data is None:
            text = f"the data at {piece.start} of the disk, of point {self._found.point.sequence}"
            raise Damaged(f"{self._found.journal.name}: {text}, is damaged")
        return memoryview(data)[start - piece.start : start - piece.start + length]

    # Changes.

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        with self._change(offset, len(buf), fua) as is_durable:
            self.inner.pwrite(buf, offset, is_durable)

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        with self._change(offset, length, fua) as is_durable:
            self.inner.zero(offset, length, may_trim=may_trim, fua=is_durable, fast=fast)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        with self._change(offset, length, fua) as is_durable:
            self.inner.trim(offset, length, fua=is_durable)

    def flush(self) -> None:
        self._flush(self.inner.flush)

    def sync(self) -> None:
        self._flush(self.inner.sync)

    def _flush(self, flush: Callable[[], None]) -> None:
        self._refuse_if_gone()
        if self.is_complete:
            flush()
            return
        with self._saving, self._noting_failures():
            flush()

    @contextmanager
    def _change(self, offset: int, length: int, fua: bool) -> Iterator[bool]:
        """Before and after a guest's change of a range. Gives whether the change itself is to be
        durable; if not, a flush follows where that was asked for: its error says whether a copy was
        lost, which that of the change might not."""
        self._refuse_if_gone()
        while self._lacks(offset, length):
            first, end = self._found.regions.span(offset, length)
            for region in self._left_in(first, end):
                self._bring(region)
            self._save()
        is_complete = self.is_complete
        yield fua and is_complete
        if fua and not is_complete:
            self.flush()

    # Bringing regions into the image.

    def _bring(self, region: int) -> None:
        """Copy a region from the journal, unless the image has that already. Raises IO_ERRORS."""
        with self._changed:
            while region in self._copying:
                self._changed.wait()
            if self._copied[region] or not self._left[region]:
                return
            self._copying.add(region)
            failures = self._failures
        is_done = False
        try:
            self._copy(region)
            is_done = True
        finally:
            with self._changed:
                self._copying.discard(region)
                self._copied[region] = is_done and failures == self._failures
                self._changed.notify_all()

    def _copy(self, region: int) -> None:
        size = self._found.regions.region_bytes
        start = region * size
        span = min(size, self.size - start)
        for at, length, piece in self._found.index.pieces(start, span):
            if piece is None:
                continue
            if piece.is_zero:
                self.inner.zero(at, length, may_trim=True)
            else:
                self.inner.pwrite(self._data(piece, at, length), at)

    def _save(self) -> None:
        """Make what was copied durable, and write that down. Raises IO_ERRORS."""
        superblocks = self._superblocks
        assert superblocks is not None
        with self._saving:
            found = self._found  # behind the lock: each map has a serial number of its own
            with self._changed:
                done = self._copied & self._left
            if not done.any():
                return
            with self._noting_failures():
                self.inner.sync()
            left = self._left & ~done
            new = RegionMap(found.regions.region_bytes, ~left, found.regions.serial + 1)
            self._run(superblocks.check())
            self._run(write_map(superblocks.current, new))
            self._run(superblocks.check())  # nobody has read the map before, and takes it for all
            self._found = replace(found, regions=new)
            with self._changed:
                self._left = left
                self._copied &= left
            self._describe()

    @contextmanager
    def _noting_failures(self) -> Iterator[None]:
        """Around a flush: if that fails, what was copied since the last one may be lost."""
        try:
            yield
        except IO_ERRORS:
            with self._changed:
                self._failures += 1
                self._copied.setall(False)
            raise

    def _bring_all(self, on_complete: Callable[[], None]) -> None:
        """On the helper thread."""
        pause = Backoff(RETRY_S, RETRY_S_MAX)
        while not self._stopping.is_set() and not self.gone:
            if self.is_complete:
                on_complete()
                return
            try:
                self.bring_some()
                pause.reset()
            except IO_ERRORS as error:
                if not self.gone:
                    log.warning("the point is not put into the image yet: %s", error)
                    self._stopping.wait(pause.next_s())

    def _complete(self) -> None:
        found, superblocks = self._found, self._superblocks
        assert superblocks is not None
        with self._saving:
            self._run(finish(found, superblocks))
            self._found = replace(found, journal=with_superblock(found.journal, superblocks))
        self.description = self.inner.description
        text = "%s has all of point %d of %s: the journal is not needed any more"
        point = found.point
        log.info(text, self.description, point.sequence, wall_time(point.time_ns))

    # Whose the image is.

    def _run(self, program: Program[None]) -> None:
        try:
            run(program, self._sides)
        except JournalTaken as error:
            self.gone = str(error)
            log.error("the disk is not served any more: %s", error)
            raise DeviceError(str(error)) from error
        except JournalError as error:
            raise DeviceError(str(error)) from error

    def _refuse_if_gone(self) -> None:
        if self.gone:
            raise DeviceError(self.gone, errno.EIO)

    def close(self) -> None:
        self._stopping.set()
        if self._helper is not None:
            self._helper.join(STOP_S)
        self.inner.close()
        self._journal.close()
