"""PointsResources: what a job with points runs on: as every job, and its journal.

On the event loop's thread.
"""

from __future__ import annotations

import errno
import secrets
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from nbdmirror.devices.base import Done
from nbdmirror.errors import DeviceError, DeviceLost
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.durable import DurableExport
from nbdmirror.nbdclient.shared_connection import SharedConnection
from nbdmirror.points.format import JournalError
from nbdmirror.points.ownership import create, take_over
from nbdmirror.points.requests import Exports, Program, Side, start
from nbdmirror.points.superblocks import find
from nbdmirror.points.writer import JournalWriter
from nbdmirror.server.far_side import JournalSide, refusal_of
from nbdmirror.server.job_resources import JobResources
from nbdmirror.server.nodes import Node
from nbdmirror.server.reconnect import reconnect

WAIT_S = 0.02
"""Interval at which the end of earlier requests is looked for."""

LOST_AGAIN_S = 1.0
"""Pause after a connection that was lost at once."""


@dataclass(slots=True, eq=False, kw_only=True)
class PointsResources(JobResources):
    """A mirror.far_side.PointsResources."""

    journal: Node
    far_side: JournalSide | None = field(default=None, init=False)
    _disk_id: bytes = field(default_factory=partial(secrets.token_bytes, 16), init=False)
    _turn: object = field(default=None, init=False)
    """The last call of `reconnect`."""
    _is_opening: bool = field(default=False, init=False)

    @property
    def is_idle(self) -> bool:
        return not self._is_opening and (self.far_side is None or self.far_side.is_idle)

    @property
    def lost_exports(self) -> list[str]:
        devices = (self.node.device, self.journal.device)
        return [device.description for device in devices if device.is_lost]

    def acquire(self, job: MirrorJob) -> None:
        assert isinstance(job, PointsJob)
        JobResources.acquire(self, job)
        if isinstance(self.source, NbdDevice):
            self.source.on_lost_writes = job.source_lost_writes
        device = self.journal.device
        self.journal.job = job
        device.pool.attach(self.loop, partial(job.journal_lost, device.description))

    def released(self) -> None:
        device = self.journal.device
        self.journal.job = None
        self.nodes.leave(device)
        device.pool.detach()
        if self.journal.is_owned:
            self.nodes.forget(self.journal)
            device.close()
        JobResources.released(self)

    def give_up(self) -> None:
        self.node.device.give_up()
        self.journal.device.give_up()

    def reconnect(self, has_copied: bool, done: Done) -> None:
        """Also reconnect the journal, and open the far side."""
        turn = self._turn = object()  # earlier attempts give up
        deadline_s = self.loop.clock() + self.options.reconnect_delay_s

        def is_wanted() -> bool:
            return self._is_in_use and self._turn is turn

        def again() -> None:
            if is_wanted():
                JobResources.reconnect(self, True, image_is_there)

        def image_is_there(error: BaseException | None) -> None:
            if error is not None:
                done(error)
            elif is_wanted():
                self._reconnect_journal(is_wanted, journal_is_there)

        def journal_is_there(error: BaseException | None) -> None:
            if error is not None:
                done(error)
            else:
                self._open(is_wanted, ended)

        def ended(error: BaseException | None) -> None:
            if error is None and self.lost_exports:  # one went while the other one came back
                error = DeviceLost(f"{self.lost_exports[0]}: connection lost")
            if isinstance(error, DeviceLost) and self.loop.clock() < deadline_s:
                self.loop.call_later(LOST_AGAIN_S, again)
            elif isinstance(error, DeviceLost):
                done(DeviceError(str(error), errno.EIO))
            else:
                done(error)

        JobResources.reconnect(self, has_copied, image_is_there)

    def _reconnect_journal(self, is_wanted: Callable[[], bool], done: Done) -> None:
        device, job_id = self.journal.device, self.options.job_id
        if not device.is_lost:
            done(None)
            return

        def ended(error: BaseException | None) -> None:
            if is_wanted():
                self.chronicle.target_waited_for(job_id, is_back=error is None)
            done(error)

        delay_s = self.options.reconnect_delay_s
        self.chronicle.target_lost(job_id, delay_s, device.description)
        reconnect(
            device,
            self.loop,
            reconnect_timeout_s=delay_s,
            is_wanted=is_wanted,
            difference=lambda connection: None,  # the journal says itself what it is
            came_back=lambda: None,
            done=ended,
        )

    def _open(self, is_wanted: Callable[[], bool], done: Done) -> None:
        if not is_wanted():
            return
        if not self.is_idle:  # two writers of one process would spoil the journal
            self.loop.call_later(WAIT_S, partial(self._open, is_wanted, done))
            return
        self._is_opening = True
        exports = {
            Side.IMAGE: DurableExport(self.node.device),
            Side.JOURNAL: DurableExport(self.journal.device),
        }

        def opened(writer: JournalWriter | None, error: BaseException | None) -> None:
            self._is_opening = False
            if writer is not None:
                self.far_side = JournalSide(writer, exports, time.time_ns)
            done(None if error is None else refusal_of(error))

        start(self._take_over(exports), exports, opened)

    def _take_over(self, exports: Exports) -> Program[JournalWriter]:
        journal = exports[Side.JOURNAL]
        name = journal.description
        newest = self.far_side.newest if self.far_side is not None else 0
        if not newest and not (yield from self._is_created(name)):
            yield from create(
                name,
                journal.size,
                disk_bytes=self.disk.size,
                now_ns=time.time_ns(),
                disk_id=self._disk_id,
            )
        writer = yield from take_over(exports, disk_id=self._disk_id, clock=self.loop.clock)
        if not newest:
            yield from writer.seed(time.time_ns())
        elif writer.newest.sequence < newest:
            text = f"ends with point {writer.newest.sequence}, and point {newest} was committed"
            raise JournalError(f"{name}: has lost points: it {text}")
        return writer

    def _is_created(self, name: str) -> Program[bool]:
        """An earlier attempt has created the journal."""
        try:
            found = yield from find(name)
        except JournalError:
            return False
        return found.current.disk_id == self._disk_id

    def _difference(self) -> Callable[[SharedConnection], int | None]:
        """After the first copy the image is what the journal says, and not what the disk is."""
        job = self.node.job
        if not isinstance(job, PointsJob) or job.run is None:
            return JobResources._difference(self)
        samples = self.far_side.samples if self.far_side is not None else ()

        def difference(connection: SharedConnection) -> int | None:
            for sample in samples:
                buf = memoryview(bytearray(sample.length))
                connection.read(buf, sample.offset)
                if zlib.crc32(buf) != sample.crc:
                    return sample.offset
            return None

        return difference
