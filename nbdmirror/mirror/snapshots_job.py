"""SnapshotsJob: a mirror whose far side is one image, and whose points are snapshots of the image
that somebody else makes.

Each point is written to the image in place. When the image is the point, and flushed, users are
told, and nothing is written until they acknowledge the point (acknowledgements.py). So between two
points the image is of no moment, and only the snapshots are: a point counts when it was
acknowledged. READY is the first point that was, and the lag is the time since the last one.

At an end no acknowledgement is needed, since the image itself is what is used afterwards. A pivot
still waits for the one that is awaited: somebody may be making that snapshot. A job that ends
without a pivot does not wait for it: nothing is written to the image any more, so the point in the
image is the last one. On the event loop's thread.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from nbdmirror.errors import CommandError
from nbdmirror.mirror.acknowledgements import Acknowledgements
from nbdmirror.mirror.options import Ending
from nbdmirror.mirror.point_request import CommittedPoint, PointRequest
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.mirror.waits import Cause


class SnapshotsJob(PointsJob):
    """`acks`: of the far side of `resources`."""

    def __init__(self, *, acks: Acknowledgements, **points: Any) -> None:
        super().__init__(**points)
        self.acks = acks
        acks.on_awaited, acks.is_needed = self._awaited, self._needs_acks
        acks.on_over = partial(self.waits.ends, Cause.ACKNOWLEDGEMENT)
        self.awaited: CommittedPoint | None = None
        """The last point that was announced."""
        self.awaited_since_ns = 0
        """Since this wall time its acknowledgement was awaited."""

    def ask_for_point(self, name: str = "") -> PointRequest:
        if name and self.run is not None and self.run.is_running and self.run.has_name(name):
            raise CommandError(f"Job '{self.id}' is making a point '{name}' already")
        return super().ask_for_point(name)

    def acknowledge(self, sequence: int, refusal: str | None = None) -> bool:
        """As Acknowledgements.give."""
        was_said = self.acks.give(sequence, refusal)
        if not was_said:
            what = "acknowledged" if refusal is None else f"refused: {refusal}"
            self.log.info("point %d was %s", sequence, what)
        return was_said

    def check_settled(self) -> None:
        text = "its points are snapshots: its copy mode cannot be changed"
        raise CommandError(f"Job '{self.id}': {text}; start another job")

    def _needs_acks(self) -> bool:
        return not self.activity.may_hold_guests

    def _awaited(self) -> None:
        """A point is whole, and waits for its acknowledgement."""
        assert self.run is not None
        self.waits.begins(Cause.ACKNOWLEDGEMENT)
        self.awaited_since_ns = self._wall_time_ns()
        self.awaited = replace(self.run.point, sequence=self.acks.awaited)
        self.acks.awaited_ns = self.awaited.time_ns
        super().tell_point(self.awaited, ack=True)

    def tell_point(self, point: CommittedPoint, **extra: Any) -> None:
        if self.awaited is None or self.awaited.sequence != point.sequence:
            super().tell_point(point, ack=False)

    def _advance_copying(self) -> None:
        if self.ending is not Ending.COMPLETE or not self.acks.awaited:
            super()._advance_copying()

    @property
    def _is_last_cut(self) -> bool:
        return bool(self.acks.awaited)

    def _begin_quiesce(self) -> None:
        super()._begin_quiesce()
        if self.ending is not Ending.COMPLETE:
            self.acks.release()
