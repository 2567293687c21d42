"""Traffic: what a mirror has sent since it was READY, beside what guests have changed."""

from __future__ import annotations

from nbdmirror.disk.tracker import Tracker
from nbdmirror.mirror.copier import Copier


class Traffic:
    """Counts bytes of data, from its creation on. Zeroes that were sent do not count. On the event
    loop's thread."""

    def __init__(self, copier: Copier, tracker: Tracker) -> None:
        self._copier = copier
        self._tracker = tracker
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
        tracker = self._tracker
        synchronous = tracker.written_bytes
        return self._copier.written_bytes + synchronous, tracker.dirty.noted_bytes + synchronous
