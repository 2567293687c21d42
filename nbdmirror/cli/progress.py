"""How the command line shows a job that it waits for: plain lines, or a live view (live.py).

The server reports rates. Without them (an older server, QEMU's migration) they come from successive
queries: `offset` is the bytes copied so far, `len` is `offset` plus the dirty bytes. So between two
queries `offset` grows by the copied bytes, and `len` by the bytes that the guest made dirty.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nbdmirror.cli.streams import is_live, say
from nbdmirror.cli.words import duration, size, state

RATE_WINDOW_S = 5.0
PLAIN_S = 5.0
"""Interval of plain lines; a line is also printed after each PLAIN_PERCENT."""
PLAIN_PERCENT = 5
END_S_MAX = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A job at one moment. Rates are None if they are not known, or nothing is copied."""

    job: str
    state: str
    offset: int
    length: int
    rates: Rates | None

    @property
    def left(self) -> int:
        return max(0, self.length - self.offset)

    @property
    def percent(self) -> float:
        return 100 * self.offset / self.length if self.length else 100.0

    def __str__(self) -> str:
        parts = [f"{self.job}: {self.state}, {self.percent:.1f}%", *self.moves]
        return ", ".join(parts)

    @property
    def moves(self) -> list[str]:
        """Texts: what is left, and the rates."""
        parts = [f"{size(self.left)} left"]
        if self.rates is not None:
            parts += self.rates.texts(is_following=self.state == "ready")
        return parts


@dataclass(frozen=True, slots=True)
class Rates:
    """All but the time are bytes per second."""

    copied: float
    """Data only, if `zeroed` is known."""
    zeroed: float
    dirtied: float
    left_s: float | None
    has_zeroes: bool = False
    """A part of the disk was zeroes, so a part of the rest may be, and then takes less time."""

    def texts(self, *, is_following: bool) -> list[str]:
        """The rates as texts. `is_following`: the job was ready, and continues without an end."""
        parts = [f"copying {size(self.copied)}/s"]
        if self.zeroed:
            parts.append(f"zeroing {size(self.zeroed)}/s")
        parts.append(f"dirtied {size(self.dirtied)}/s")
        if self.left_s and not is_following:
            less = " or less" if self.has_zeroes else ""
            parts.append(f"{duration(self.left_s)} to go{less}")
        return parts

    def end(self, now_s: float, *, is_following: bool) -> str:
        """When nothing is left, as predicted, as a text; empty if that is not known, or is years
        away. `now_s`: seconds since 1970."""
        if self.left_s is None or is_following or not 0 <= self.left_s < END_S_MAX:
            return ""
        end = time.localtime(now_s + self.left_s)
        day = "" if end[:3] == time.localtime(now_s)[:3] else "%Y-%m-%d "
        sooner = " or sooner" if self.has_zeroes else ""
        return f"about {time.strftime(f'{day}%H:%M:%S', end)}{sooner}"


class Meter:
    """Turns successive entries of query-block-jobs into Progress. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=256)

    def update(self, job: dict[str, Any]) -> Progress:
        offset, length = int(job.get("offset", 0)), int(job.get("len", 0))
        name = str(job.get("device", "?"))
        return Progress(name, state(job), offset, length, self._rates(job, offset, length))

    def _rates(self, job: dict[str, Any], offset: int, length: int) -> Rates | None:
        if "falling-behind" in job:  # the server measures rates
            if "copy-bytes-per-s" not in job:
                return None
            copied, zeroed, dirtied = (
                job.get(f"{what}-bytes-per-s", 0) for what in ("copy", "zero", "dirty")
            )
            has_zeroes = job.get("copied-bytes", 0) > job.get("written-bytes", 0)
            return Rates(copied, zeroed, dirtied, job.get("left-s"), has_zeroes)
        if job.get("paused"):
            self._samples.clear()
            return None
        now_s = self._clock()
        self._samples.append((now_s, offset, length))
        while len(self._samples) > 2 and now_s - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()
        then_s, old_offset, old_length = self._samples[0]
        if now_s <= then_s:
            return None
        copied = max(0, offset - old_offset) / (now_s - then_s)
        dirtied = max(0, length - old_length) / (now_s - then_s)
        left_s = max(0, length - offset) / (copied - dirtied) if copied > dirtied else None
        return Rates(copied, 0, dirtied, left_s)


class Display(Protocol):
    @property
    def map_cells(self) -> int:
        """The cells of a map for `update`; 0: no map is shown."""

    def __enter__(self) -> Display: ...
    def __exit__(self, *_: object) -> None: ...
    def update(self, job: dict[str, Any], job_map: dict[str, Any] | None = None) -> None:
        """`job_map`: the server's answer, if there is one."""

    def heard(self, event: Mapping[str, Any]) -> None:
        """Show an event, if there is a place for events."""

    def note(self, text: str) -> None:
        """Print a separate line."""

    def result(self, text: str) -> None:
        """Print how the job ended, or what it is now, on stdout: the last line."""


class PlainDisplay:
    """For files, pipes and logs: few lines, on stderr."""

    map_cells = 0

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._meter = Meter(clock)
        self._last: tuple[float, float, str] | None = None

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, job: dict[str, Any], job_map: dict[str, Any] | None = None) -> None:
        progress = self._meter.update(job)
        now_s = self._clock()
        if self._last:
            last_s, percent, before = self._last
            moved = abs(progress.percent - percent) >= PLAIN_PERCENT
            if not moved and now_s - last_s < PLAIN_S and before == progress.state:
                return
        self._last = now_s, progress.percent, progress.state
        self.show(progress, job)

    def show(self, progress: Progress, job: dict[str, Any]) -> None:
        """Print what is due now."""
        self.note(str(progress))

    def heard(self, event: Mapping[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        say(text)

    def result(self, text: str) -> None:
        print(text)


class JsonDisplay(PlainDisplay):
    """For scripts: JSON objects on stdout, one a line, each with one key: `job`, `event`, `note` or
    `result`."""

    def show(self, progress: Progress, job: dict[str, Any]) -> None:
        self._print(job=job)

    def heard(self, event: Mapping[str, Any]) -> None:
        self._print(event=dict(event))

    def note(self, text: str) -> None:
        self._print(note=text)

    def result(self, text: str) -> None:
        self._print(result=text)

    def _print(self, **line: Any) -> None:
        print(json.dumps(line), flush=True)


def open_display(
    clock: Callable[[], float], *, as_json: bool = False, is_alone: bool = True
) -> Display:
    """`clock`: monotonic seconds. `is_alone`: the command is about no other job."""
    if as_json:
        return JsonDisplay(clock)
    if is_alone and is_live(sys.stderr):
        from nbdmirror.cli.live import JobView

        return JobView(clock)
    return PlainDisplay(clock)
