"""A disk that is a point of a journal: what users ask for, and opening it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from nbdmirror.devices.base import BlockDevice, raw_device
from nbdmirror.devices.file import FileDevice
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import IO_ERRORS, ConfigError
from nbdmirror.nbd_uri import is_uri
from nbdmirror.nbdclient.pair import are_same, check_pair, why_unfit
from nbdmirror.nbdkit_host.latecomers import Opening
from nbdmirror.points.format import BLOCK_BYTES, JournalError
from nbdmirror.points.requests import Side, run
from nbdmirror.points.served import ServedPoint
from nbdmirror.points.view import PointView, look_up


@dataclass(frozen=True, slots=True)
class Wanted:
    """The point to serve."""

    image: str
    journal: str
    point: str | None
    """None: the newest."""
    is_read_only: bool
    """Guests do not write: the point is served beside a source that continues."""

    @classmethod
    def of(
        cls, journal: str, point: str, *, images: list[str], is_read_only: bool, has_state: bool
    ) -> Wanted | None:
        """What the parameters ask for together; None: no point. Raises ConfigError."""
        if not journal:
            if point:
                raise ConfigError("point: needs journal")
            return None
        if len(images) != 1:
            raise ConfigError("journal: belongs to one disk, and more are served")
        if has_state:
            raise ConfigError("journal: not allowed with state-dir: a point has no state")
        if are_same(images[0], journal):
            raise ConfigError("journal: names the same disk as the image")
        return cls(images[0], journal, point or None, is_read_only)

    def on(self, image: BlockDevice, opening: Opening) -> BlockDevice:
        """The disk at the point. `image` is the disk's image. Raises ConfigError."""
        try:
            journal = self._open_journal(opening)
            check_pair(raw_device(image), journal)
            if not self.is_read_only:
                return ServedPoint(image, journal, wanted=self.point)
            sides = {Side.IMAGE: image, Side.JOURNAL: journal}
            program = look_up(journal.description, journal.size, image.size, wanted=self.point)
            return PointView(image, journal, run(program, sides))
        except (JournalError, *IO_ERRORS) as error:
            raise ConfigError(f"journal: {error}") from error

    def _open_journal(self, opening: Opening) -> BlockDevice:
        if not is_uri(self.journal):
            return FileDevice.open(self.journal, read_only=self.is_read_only)
        journal = opening.open(self.journal)
        if not self.is_read_only and (problem := why_unfit(journal, BLOCK_BYTES)):
            journal.close()
            raise ConfigError(f"{journal.uri}: {problem}")
        return journal


def begin(disk: Disk) -> None:
    """Begin to serve `disk` to guests, if it is a point that they write to. Raises JournalError and
    IO_ERRORS."""
    point = disk.source
    if isinstance(point, ServedPoint):
        point.start(now_ns=time.time_ns())
        point.bring_all(partial(disk.unwrap, point.inner))
