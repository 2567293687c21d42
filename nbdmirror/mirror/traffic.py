"""Traffic: what a mirror has sent since it was READY, beside what guests have changed."""

from __future__ import annotations

from nbdmirror.disk.changes import Changes
from nbdmirror.disk.tracker import Tracker
from nbdmirror.mirror.copier import Copier


class PointTraffic:
    """Counts bytes from the first point of a job on. On the event loop's thread."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        """To the journal and to the image, and so mostly twice."""
        self._changes: Changes | None = None
        self._before_bytes = 0

    def follow(self, changes: Changes | None) -> None:
        """Guests' changes are counted there from now on; None: there are no points."""
        self._before_bytes = self.changed_bytes - (changes.noted_bytes if changes else 0)
        self._changes = changes

    @property
    def changed_bytes(self) -> int:
        """Bytes that guests have written, each as often as it was written."""
        changes = self._changes
        return self._before_bytes + (changes.noted_bytes if changes is not None else 0)


class Traffic:
    """Counts bytes of data, from its creation on. Zeroes that were sent do not count. On the event
    loop's thread."""

    def __init__(
        self, copier: Copier, tracker: Tracker, points: PointTraffic | None = None
    ) -> None:
        self._copier = copier
        self._tracker = tracker
        self._points = points or PointTraffic()
        self._begin = self._now()

    @property
    def since_ready(self) -> tuple[int, int]:
        """Bytes that were sent, and bytes that guests have written."""
        sent, changed = self._now()
        return sent - self._begin[0], changed - self._begin[1]

    def at_the_end(self) -> dict[str, object]:
        """The same, as members of the job's last event."""
        sent, changed = self.since_ready
        return {"x-nbdmirror-sent-bytes": sent, "x-nbdmirror-changed-bytes": changed}

    def _now(self) -> tuple[int, int]:
        tracker, points = self._tracker, self._points
        synchronous = tracker.written_bytes
        sent = self._copier.written_bytes + synchronous + points.sent_bytes
        return sent, tracker.dirty.noted_bytes + synchronous + points.changed_bytes
