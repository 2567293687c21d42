"""PointPromises: whether the lag and the history of a mirror with points are as promised, and
whether its journal and its applier do their part. Each change is an event, and a line of the log.
On the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbdmirror.amounts import duration, size
from nbdmirror.mirror.far_side import JournalRoom
from nbdmirror.mirror.lag import BaseLag, round_up
from nbdmirror.mirror.outage import Outage
from nbdmirror.mirror.point_run import PointRun
from nbdmirror.point_sentences import APPLIER_AGAIN, of_applier
from nbdmirror.subject_log import SubjectLog


class PointPromises:
    """`rpo_s`: the promised lag; 0: none. `keep_s`: for how long points are kept. `tell`: appends
    an event."""

    def __init__(
        self,
        *,
        rpo_s: float,
        keep_s: float,
        outage: Outage,
        tell: Callable[[str, dict[str, Any]], None],
        log: SubjectLog,
    ) -> None:
        self.rpo_s = rpo_s
        self.keep_s = keep_s
        self.is_window_kept = True
        """No point was applied before its time, since its room was needed."""
        self.outage = outage
        self.is_journal_enough = True
        self._is_applier_silent = False
        self._is_rpo_kept = True
        self._tell = tell
        self._log = log

    def look_at_lag(self, lag: BaseLag) -> None:
        """Call this several times a second."""
        lag_s = round_up(lag.lag_s)
        if self.rpo_s and (is_kept := lag_s <= self.rpo_s) is not self._is_rpo_kept:
            self._is_rpo_kept = is_kept
            data = {"rpo-s": self.rpo_s, "lag-s": lag_s, "kept": is_kept}
            self._tell("X_NBDMIRROR_RPO", data)
            if is_kept:
                self._log.info("the lag is not larger than %g s any more", self.rpo_s)
            else:
                self._log.warning("the lag is larger than %g s", self.rpo_s)

    def look_at_window(self, run: PointRun) -> None:
        """The same, while the job is not ending: then the image becomes the last point."""
        if (is_kept := run.is_window_kept) is not self.is_window_kept:
            self.is_window_kept = is_kept
            reaches_s = round(run.reaches_s, 3)
            data = {"keep-s": self.keep_s, "reaches-s": reaches_s, "kept": is_kept}
            self._tell("X_NBDMIRROR_KEEP", data)
            kept = duration(self.keep_s)
            if is_kept:
                self._log.info("the points reach back as far as is asked for: %s", kept)
            else:
                text = "the points reach back %s, and %s are asked for"
                self._log.warning(text, duration(reaches_s), kept)

    def look_at_journal(self, run: PointRun | None, room: JournalRoom | None) -> None:
        """Call this several times a second, also before there are points."""
        self.outage.look(run, room)
        is_enough = not self.outage.is_alarmed
        if run is None or room is None or is_enough is self.is_journal_enough:
            return
        self.is_journal_enough = is_enough
        data = {"left-bytes": run.left_bytes, "point-bytes": room.point_bytes, "enough": is_enough}
        lasts_s = self.outage.lasts_s(run, room)
        self._tell(
            "X_NBDMIRROR_JOURNAL",
            data if lasts_s is None else {**data, "lasts-s": round(lasts_s, 3)},
        )
        if is_enough:
            self._log.info("the next point does not take much of the journal any more")
        else:
            text = "the next point takes %s of the %s that the journal has room for"
            self._log.warning(text, size(run.left_bytes), size(room.point_bytes))

    def look_at_applier(self, room: JournalRoom | None) -> None:
        """Call this several times a second."""
        silent_s = room.applier_silent_s if room is not None else None
        trouble = of_applier(silent_s)
        if room is None or bool(trouble) is self._is_applier_silent:
            return
        self._is_applier_silent = bool(trouble)
        data = {"silent-s": round(silent_s or 0.0, 3), "works": not trouble}
        self._tell("X_NBDMIRROR_APPLIER", data)
        if trouble:
            self._log.warning("%s", trouble)
        else:
            self._log.info("%s", APPLIER_AGAIN)
