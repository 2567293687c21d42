"""What a job with points needs of its far side: a journal, and the image beside it; or an image
that has one point at a time, which somebody else snapshots. On the event loop's thread."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdmirror.devices.base import Done
from nbdmirror.errors import CommandError, DeviceError
from nbdmirror.mirror.point_sender import PointWriter
from nbdmirror.mirror.resources import JobState, MirrorResources
from nbdmirror.mirror.window import Journal


class PointsRefused(CommandError):
    """The far side takes no more points of this job, however often that is tried."""


class NoRoom(DeviceError):
    """A point does not fit into what is free of the journal. Nothing was written. `is_final`: it
    does not fit into an empty one either."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message, errno.ENOSPC)
        self.is_final = is_final


@dataclass(frozen=True, slots=True)
class JournalRoom:
    """How full a journal is."""

    total_bytes: int
    used_bytes: int
    points: int
    """How many points can be recovered."""
    point_bytes: int
    """What one point can have of the disk, if all others make room for it."""
    image_point: int = 0
    """The number of the point that the image holds."""
    applier_silent_s: float | None = None
    """How long the process beside the image has been silent that has to apply points now. None:
    points are applied from here."""


class FarSide(PointWriter, Journal, Protocol):
    """`begin`, and the programs that call `done`, fail with PointsRefused, NoRoom or IO_ERRORS."""

    error: BaseException | None
    """The last error that this side has caused."""

    @property
    def is_idle(self) -> bool:
        """No request to journal and image is in flight."""

    @property
    def oldest(self) -> int:
        """The number of the first point that can be recovered; 0: there is none."""

    @property
    def is_applied(self) -> bool:
        """The image holds the newest point."""

    @property
    def is_handed_over(self) -> bool:
        """The journal says that the image may be changed by others."""

    @property
    def waits_for_applier(self) -> bool:
        """A process beside the image makes the image a later point now."""

    @property
    def is_kept(self) -> bool:
        """The last point stays, whatever becomes of the next one."""

    def withdraw(self, error: BaseException) -> None:
        """The point in progress was broken, for this reason: its commit waits for nobody any
        more."""

    def room(self) -> JournalRoom | None:
        """None: there is no journal."""

    def has_name(self, name: str) -> bool:
        """A point of the journal has this name."""

    def times_ns(self) -> Mapping[int, int]:
        """The wall times of the points in journal and image, in nanoseconds since 1970, by their
        numbers, ascending."""

    def apply(self, done: Done, *, until: int = 0, hands_over: bool = False) -> None:
        """Make the image the point of the number `until`, or the newest one, flushed. `hands_over`:
        guests will change the image: the journal offers no other point from then on."""

    def begin_in_place(self, done: Done) -> None:
        """The image, which holds the newest point, is about to be overwritten in place: from now on
        there is no point, until the next one is committed."""

    def take_back(self, done: Done) -> None:
        """Guests do not change the image, although it was handed over to them."""

    def check(self, done: Done) -> None:
        """Look whether the points are still there, and nobody else uses them."""


class PointsResources(MirrorResources, Protocol):
    """Each `reconnect` opens the far side again, after everything of the one before has ended."""

    @property
    def far_side(self) -> FarSide | None:
        """Since the first `reconnect` that has ended well."""

    known_point: tuple[int, int]
    """The number and the wall time of the last point that counts, also before the far side can be
    asked; zeroes where that is not known."""

    has_begun: bool
    """The first copy has ended, perhaps in an earlier process: the journal says what the image
    is."""

    def begin_points(self, state: JobState, done: Done) -> None:
        """The first copy has ended: write that down before there is a first point."""

    def begin_in_place(self, state: JobState, done: Done) -> None:
        """There are no points until `begin_points`: write that down at the far side, and here."""

    def keep_changes(self, done: Done) -> None:
        """Keep what is dirty now for a later process, durably, where state is kept."""

    def drop_points(self) -> None:
        """The job makes no points any more. Nothing is in flight to the journal."""

    @property
    def is_idle(self) -> bool:
        """No request to the journal is in flight, and none to the image beside the copier's."""

    @property
    def lost_exports(self) -> Sequence[str]:
        """Which of image and journal have no connection."""

    def give_up(self) -> None:
        """Give up the connections to image and journal: their requests in flight fail."""
