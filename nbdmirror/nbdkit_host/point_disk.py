"""A disk that is a point of a journal: what users ask for, and opening it."""

from __future__ import annotations

from dataclasses import dataclass

from nbdmirror.devices.base import BlockDevice, raw_device
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import IO_ERRORS, ConfigError
from nbdmirror.nbd_uri import is_uri
from nbdmirror.nbdclient.pair import are_same, check_pair
from nbdmirror.nbdkit_host.latecomers import Opening
from nbdmirror.points.format import JournalError
from nbdmirror.points.requests import Side, run
from nbdmirror.points.view import PointView, look_up


@dataclass(frozen=True, slots=True)
class Wanted:
    """The point to serve."""

    image: str
    journal: str
    point: str | None
    """None: the newest."""

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
        if not is_read_only:
            text = "a point is served read-only; to write to the disk, make the image that point"
            raise ConfigError(f"journal: {text} with nbdmirror recover, and serve the image alone")
        if has_state:
            raise ConfigError("journal: not allowed with state-dir: a point has no state")
        if are_same(images[0], journal):
            raise ConfigError("journal: names the same disk as the image")
        return cls(images[0], journal, point or None)

    def on(self, image: BlockDevice, opening: Opening) -> BlockDevice:
        """The disk at the point. `image` is the disk's image. Raises ConfigError."""
        if is_uri(self.journal):
            journal: BlockDevice = opening.open(self.journal)
        else:
            journal = FileDevice.open(self.journal, read_only=True)
        try:
            check_pair(raw_device(image), journal)
            sides = {Side.IMAGE: image, Side.JOURNAL: journal}
            program = look_up(journal.description, journal.size, image.size, wanted=self.point)
            return PointView(image, journal, run(program, sides))
        except (JournalError, *IO_ERRORS) as error:
            raise ConfigError(f"journal: {error}") from error
