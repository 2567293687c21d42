"""The last minutes of each job and the last events of all servers, both bounded, for the page."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nbdmirror.web.records import Key, Report, number

SPAN_S = 300.0
SAMPLE_S = 2.0
"""What comes sooner after another sample is left out."""
NOTES_MAX = 100


@dataclass(frozen=True, slots=True)
class Sample:
    """A job at one moment. Rates and lag are None where the server has none."""

    time_s: float
    copied_bytes_per_s: float | None
    dirtied_bytes_per_s: float | None
    lag_s: float | None


@dataclass(frozen=True, slots=True)
class Note:
    """Something that has happened. `number`: no two notes have the same, and later ones have a
    higher one, also after a restart of this process."""

    number: int
    time_s: float
    server: str
    text: str


class History:
    """`time_s`: seconds since 1970."""

    def __init__(self, time_s: Callable[[], float]) -> None:
        self._time_s = time_s
        self._samples: dict[Key, deque[Sample]] = {}
        self._numbers = itertools.count(int(time_s() * 1000))
        self.notes: deque[Note] = deque(maxlen=NOTES_MAX)
        """The newest first."""

    def samples(self, key: Key) -> list[Sample]:
        return list(self._samples.get(key, ()))

    def note(self, server: str, text: str) -> None:
        self.notes.appendleft(Note(next(self._numbers), self._time_s(), server, text))

    def add(self, report: Report) -> None:
        """The newest report of a server. Jobs that it does not have any more are forgotten."""
        jobs = dict(job for disk in report.disks for job in report.jobs(disk))
        for key in [key for key in self._samples if key[0] == report.socket and key not in jobs]:
            del self._samples[key]
        for key, job in jobs.items():
            samples = self._samples.setdefault(key, deque())
            if samples and report.time_s - samples[-1].time_s < SAMPLE_S:
                continue
            keys = ("copy-bytes-per-s", "dirty-bytes-per-s", "lag-s")
            copied, dirtied, lag_s = (number(job.get(key)) for key in keys)
            samples.append(Sample(report.time_s, copied, dirtied, lag_s))
            while report.time_s - samples[0].time_s > SPAN_S:
                samples.popleft()

    def forget(self, socket: str) -> None:
        for key in [key for key in self._samples if key[0] == socket]:
            del self._samples[key]
