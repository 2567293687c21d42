"""What the requests of points count for, beside the copier's: what the job waits for, what is sent,
and where the image has zeroes. On the event loop's thread.
"""

from __future__ import annotations

from typing import Protocol

from nbdmirror.devices.base import AsyncSource, AsyncTarget, Done, Extent, ExtentsDone
from nbdmirror.disk.cells import Zeroes
from nbdmirror.mirror.traffic import PointTraffic
from nbdmirror.mirror.waits import Cause, Waits


class WatchedSource(AsyncSource):
    """The disk, as points are read from it."""

    def __init__(self, source: AsyncSource, waits: Waits) -> None:
        self.size = source.size
        self._source = source
        self._waits = waits

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        self._source.start_read(buf, offset, waited(self._waits, Cause.SOURCE_READ, done))

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        waits = self._waits

        def ended(extents: list[Extent] | None, error: BaseException | None) -> None:
            waits.ends(Cause.SOURCE_READ)
            done(extents, error)

        waits.begins(Cause.SOURCE_READ)
        self._source.start_extents(offset, length, ended)


class Export(AsyncSource, AsyncTarget, Protocol):
    """What points are sent to."""

    description: str

    def start_durable_write(self, buf: memoryview, offset: int, done: Done) -> None: ...

    def start_trim(self, offset: int, length: int, done: Done) -> None: ...


class WatchedExport(AsyncSource, AsyncTarget):
    """The image, or the journal. `zeroes`: those of the image; None: this is the journal."""

    def __init__(
        self, export: Export, waits: Waits, traffic: PointTraffic, zeroes: Zeroes | None = None
    ) -> None:
        self.description = export.description
        self.size = export.size
        self._export = export
        self._waits = waits
        self._traffic = traffic
        self._zeroes = zeroes

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        self._export.start_read(buf, offset, self._waited(Cause.TARGET_WRITE, done))

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        self._export.start_extents(offset, length, done)

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        self._sends(buf, offset)
        self._export.start_write(buf, offset, self._waited(Cause.TARGET_WRITE, done))

    def start_durable_write(self, buf: memoryview, offset: int, done: Done) -> None:
        self._sends(buf, offset)
        self._export.start_durable_write(buf, offset, self._waited(Cause.TARGET_FLUSH, done))

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        if self._zeroes is not None:
            self._zeroes.add(offset, length)
        ended = self._waited(Cause.TARGET_WRITE, done)
        self._export.start_zero(offset, length, may_trim, ended)

    def start_trim(self, offset: int, length: int, done: Done) -> None:
        self._export.start_trim(offset, length, self._waited(Cause.TARGET_WRITE, done))

    def start_flush(self, done: Done) -> None:
        self._export.start_flush(self._waited(Cause.TARGET_FLUSH, done))

    def _sends(self, buf: memoryview, offset: int) -> None:
        self._traffic.sent_bytes += len(buf)
        if self._zeroes is not None:
            self._zeroes.remove(offset, len(buf))

    def _waited(self, cause: Cause, done: Done) -> Done:
        return waited(self._waits, cause, done)


def waited(waits: Waits, cause: Cause, done: Done) -> Done:
    """Something that begins now is waited for until it has ended, which calls `done`."""

    def ended(error: BaseException | None) -> None:
        waits.ends(cause)
        done(error)

    waits.begins(cause)
    return ended
