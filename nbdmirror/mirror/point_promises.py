"""PointPromises: whether the lag and the history of a mirror with points are as promised. Each
change is an event. On the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbdmirror.mirror.lag import BaseLag, round_up
from nbdmirror.mirror.point_run import PointRun


class PointPromises:
    """`rpo_s`: the promised lag; 0: none. `keep_s`: for how long points are kept. `tell`: appends
    an event."""

    def __init__(
        self, *, rpo_s: float, keep_s: float, tell: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self.rpo_s = rpo_s
        self.keep_s = keep_s
        self.is_window_kept = True
        """No point was applied before its time, since its room was needed."""
        self._is_rpo_kept = True
        self._tell = tell

    def look_at_lag(self, lag: BaseLag) -> None:
        """Call this several times a second."""
        lag_s = round_up(lag.lag_s)
        if self.rpo_s and (is_kept := lag_s <= self.rpo_s) is not self._is_rpo_kept:
            self._is_rpo_kept = is_kept
            data = {"rpo-s": self.rpo_s, "lag-s": lag_s, "kept": is_kept}
            self._tell("X_NBDMIRROR_RPO", data)

    def look_at_window(self, run: PointRun) -> None:
        """The same, while the job is not ending: then the image becomes the last point."""
        if (is_kept := run.is_window_kept) is not self.is_window_kept:
            self.is_window_kept = is_kept
            reaches_s = round(run.reaches_s, 3)
            data = {"keep-s": self.keep_s, "reaches-s": reaches_s, "kept": is_kept}
            self._tell("X_NBDMIRROR_KEEP", data)
