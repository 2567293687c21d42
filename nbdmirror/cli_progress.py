"""How the command line shows a job: rates from successive queries, plain lines, or a bar.

What QEMU's numbers mean: `offset` is what was copied so far, `len` is `offset` and what is dirty
now. So between two queries `offset` grows by what was copied and `len` by what the guest dirtied.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

RATE_WINDOW_S = 5.0
PLAIN_S = 5.0
"""A plain line is printed this often, or at each PLAIN_PERCENT, whichever comes first."""
PLAIN_PERCENT = 5


@dataclass(frozen=True, slots=True)
class Progress:
    """A job at one moment. Rates are None until two samples exist; `left_s` where unknown."""

    job: str
    status: str
    offset: int
    length: int
    copied_bytes_per_s: float | None
    dirtied_bytes_per_s: float | None
    left_s: float | None

    @property
    def left(self) -> int:
        return max(0, self.length - self.offset)

    @property
    def percent(self) -> float:
        return 100 * self.offset / self.length if self.length else 100.0

    def __str__(self) -> str:
        parts = [f"{self.job}: {self.status}, {self.percent:.1f}%, {size(self.left)} left"]
        return ", ".join(parts + rates(self))


def rates(progress: Progress) -> list[str]:
    if progress.copied_bytes_per_s is None or progress.dirtied_bytes_per_s is None:
        return []
    parts = [
        f"copying {size(progress.copied_bytes_per_s)}/s",
        f"dirtied {size(progress.dirtied_bytes_per_s)}/s",
    ]
    if progress.left:
        parts.append(left_time(progress))
    return parts


def left_time(progress: Progress) -> str:
    if progress.left_s is not None:
        return f"{duration(progress.left_s)} to go"
    return "not converging" if progress.copied_bytes_per_s else "not copying"


def size(number: float) -> str:
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop()
    digits = 1 if number % 1 and number < 100 else 0
    return f"{number:.{digits}f} {units[-1]}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Meter:
    """Turns successive entries of query-block-jobs into Progress. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=256)

    def update(self, job: dict[str, Any]) -> Progress:
        now_s = self._clock()
        offset, length = int(job.get("offset", 0)), int(job.get("len", 0))
        self._samples.append((now_s, offset, length))
        while len(self._samples) > 2 and now_s - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()
        then_s, old_offset, old_length = self._samples[0]
        copied = dirtied = left_s = None
        if now_s > then_s:
            copied = max(0, offset - old_offset) / (now_s - then_s)
            dirtied = max(0, length - old_length) / (now_s - then_s)
            if copied > dirtied:
                left_s = max(0, length - offset) / (copied - dirtied)
        status = str(job.get("status", "running"))
        if job.get("paused") and status not in ("waiting", "pending"):  # these count, in QEMU
            status = "paused"
        name = str(job.get("device", "?"))
        return Progress(name, status, offset, length, copied, dirtied, left_s)


class Display(Protocol):
    def __enter__(self) -> Display: ...
    def __exit__(self, *_: object) -> None: ...
    def update(self, job: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None:
        """A line of its own."""


class PlainDisplay:
    """For files, pipes and logs: few lines, on stderr."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._meter = Meter(clock)
        self._last: tuple[float, float, str] | None = None

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, job: dict[str, Any]) -> None:
        progress = self._meter.update(job)
        now_s = self._clock()
        if self._last:
            last_s, percent, status = self._last
            moved = abs(progress.percent - percent) >= PLAIN_PERCENT
            if not moved and now_s - last_s < PLAIN_S and status == progress.status:
                return
        self._last = now_s, progress.percent, progress.status
        self.note(str(progress))

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class RichDisplay:
    """For a terminal: one bar that is redrawn. Imports rich."""

    def __init__(self, clock: Callable[[], float]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        self._meter = Meter(clock)
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[rates]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, rates="")

    def __enter__(self) -> RichDisplay:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, job: dict[str, Any]) -> None:
        progress = self._meter.update(job)
        self._bar.update(
            self._task,
            description=f"{progress.job} {progress.status}",
            total=progress.length or 1,
            completed=progress.offset if progress.length else 1,
            rates=", ".join([f"{size(progress.left)} left", *rates(progress)]),
        )

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


def open_display(clock: Callable[[], float]) -> Display:
    if sys.stderr.isatty():
        return RichDisplay(clock)
    return PlainDisplay(clock)
