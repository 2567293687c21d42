"""PointRunOwner: the job, as its points see it. On the event loop's thread."""

from __future__ import annotations

from typing import Protocol

from nbdmirror.mirror.point_group import PointGroup
from nbdmirror.mirror.point_request import CommittedPoint


class PointRunOwner(Protocol):
    point_group: PointGroup

    def new_group(self) -> int:
        """A number for a cut that no other cut has."""

    def point_committed(self, point: CommittedPoint) -> None:
        """The far side has this point, whatever is lost from now on."""

    def point_broken(self, error: BaseException, name: str) -> None:
        """A point is given up; the next one has its content. `name`: what a user called it."""

    def far_side_failed(self, error: BaseException) -> None:
        """A request to the far side has failed."""

    def source_failed(self, error: BaseException) -> None:
        """The disk could not be read for a point."""

    def run_advanced(self) -> None:
        """Something has ended: look at the state again."""
