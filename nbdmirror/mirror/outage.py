"""Outage: for how long the far side of a mirror with points may be away before what guests change
meanwhile does not fit into the journal any more: the first point after an outage has all of that.

The rate is that of the last minute, in granules as points have them, each once for each point. A
longer point has a granule that is changed again only once: so an outage may mostly last longer
than is told. On the event loop's thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import Changes
from nbdmirror.mirror.far_side import JournalRoom
from nbdmirror.mirror.point_run import PointRun
from nbdmirror.point_sentences import MUCH

LOOK_S = 1.0
RATE_S = 60.0
"""The rate is an average of so much time at most."""
RATE_S_MIN = 2.0
"""It is not known before."""
GRANULES_MAX = 1 << 20
"""Of the bitmap that counts before there are points: 128 KiB."""

WARN, CALM = MUCH, MUCH / 2
"""The parts of the journal that one point takes when users are warned, and when that is over."""
CALM_S = 60.0
"""It is over when the journal has been calm for so long."""


class Outage:
    """`changes`: those of the points, which need not be tracked yet."""

    def __init__(self, changes: Changes, clock: Callable[[], float]) -> None:
        self._ledger = changes.disk.ledger
        self._clock = clock
        granularity = changes.granularity
        while changes.size // granularity > GRANULES_MAX:
            granularity *= 2
        self._counted = DirtyBitmap(changes.size, granularity)
        """What guests have changed since the last look, while there are no points."""
        self._is_counting = False
        self._run: PointRun | None = None
        self._run_bytes = self._total_bytes = 0
        self._samples: deque[tuple[float, int]] = deque()
        self._alarmed_s: float | None = None
        """When the next point last took too much of the journal."""
        self.is_alarmed = False

    def look(self, run: PointRun | None, room: JournalRoom | None) -> None:
        """Call this several times a second."""
        now_s = self._clock()
        if self._samples and now_s - self._samples[-1][0] < LOOK_S:
            return
        self._count(run)
        self._samples.append((now_s, self._total_bytes))
        while now_s - self._samples[0][0] > RATE_S:
            self._samples.popleft()
        if room is not None and run is not None:
            self._look_at_room(now_s, run.left_bytes / max(1, room.point_bytes))

    def end(self) -> None:
        """Guests do not mark anything for this any more."""
        if self._is_counting:
            self._ledger.detach(self._counted)
            self._is_counting = False

    @property
    def bytes_per_s(self) -> float | None:
        """How much guests change; None: not known yet."""
        if not self._samples:
            return None
        (then_s, then), (now_s, now) = self._samples[0], self._samples[-1]
        return (now - then) / (now_s - then_s) if now_s - then_s >= RATE_S_MIN else None

    def lasts_s(self, run: PointRun | None, room: JournalRoom) -> float | None:
        """For how long the far side may be away from now on, or yet; None: nothing is known, or
        guests change nothing."""
        left_bytes = run.left_bytes if run is not None else 0
        rate = self.bytes_per_s
        return max(0, room.point_bytes - left_bytes) / rate if rate else None

    def _count(self, run: PointRun | None) -> None:
        if self._is_counting:
            self._total_bytes += self._counted.dirty_bytes
        self._counted.clear_all()
        if run is None and not self._is_counting:
            self._ledger.attach(self._counted)
            self._is_counting = True
        elif run is not None:
            self.end()
            run_bytes = run.sent_bytes + run.left_bytes
            if run is self._run:
                self._total_bytes += max(0, run_bytes - self._run_bytes)
            self._run_bytes = run_bytes
        self._run = run

    def _look_at_room(self, now_s: float, share: float) -> None:
        if share > WARN:
            self.is_alarmed = True
        if share > CALM:
            self._alarmed_s = now_s
        elif self._alarmed_s is None or now_s - self._alarmed_s >= CALM_S:
            self.is_alarmed = False
