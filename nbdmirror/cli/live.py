"""Live views on a terminal: of the job that a command waits for, and of a server, for
`status --watch`. Imports rich, so it is imported only when there is a terminal to draw on.

A view keeps the last few events and a meter for each job, and no more: it may run for weeks. What
servers say is not trusted: control characters are shown as such, and do nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Self, TextIO, cast

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from nbdmirror.cli import disk_map
from nbdmirror.cli.progress import Meter, Progress
from nbdmirror.cli.status import (
    disk_text,
    event_text,
    forget_meters,
    is_routine,
    job_parts,
    last_text,
)
from nbdmirror.cli.words import disk_troubles, doing, remarks, server_troubles
from nbdmirror.ending_signals import heeded
from nbdmirror.foreign_text import visible

EVENTS_MAX = 5
BAR_CELLS, BAR_CELLS_MIN = 30, 5
MARGIN = 6
"""Columns beside a map."""

_BAD, _WARNING, _QUIET = "red", "yellow", "dim"
_LOOKS = {
    disk_map.IN_FLIGHT: ("▒", "*", "yellow"),
    disk_map.DIRTY: ("▁▂▃▄▅▆▇█", "#", "magenta"),
    disk_map.UNFLUSHED: ("░", "~", "cyan"),
    disk_map.ZERO: ("·", ".", "dim"),
    disk_map.CLEAN: ("─", "-", "green"),
}
"""Of a kind of cells: its character, that of a terminal that has only ASCII, and its colour. Of
dirty cells the height says how much of the cell is dirty."""


class _Lasting:
    """A terminal that may end (a connection that is lost): a command goes on without it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class _Screen:
    """A part of a terminal that is redrawn in place."""

    def __init__(self, stream: TextIO, *, is_transient: bool) -> None:
        self.console = Console(file=stream, force_terminal=True, highlight=False)
        self._size = self.console.size
        self._live = Live(
            console=self.console,
            auto_refresh=False,
            transient=is_transient,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    @property
    def map_cells(self) -> int:
        return max(1, min(256, self.console.size.width - MARGIN))

    def draw(self, body: list[RenderableType], foot: list[RenderableType]) -> None:
        if self.console.size != self._size:  # the old lines may have been broken anew
            self._size = self.console.size
            self.console.control(Control.clear(), Control.home())
        self._live.update(_Fitted(body, foot), refresh=True)

    def text(self, text: str, style: str = "", *, indent: int = 0) -> RenderableType:
        """One line, or more in a narrow window."""
        shown = Text(self._plain(text), style, overflow="fold")
        if not indent:
            return shown
        row = Table.grid()
        row.add_column(width=indent)
        row.add_column(overflow="fold")
        row.add_row("", shown)
        return row

    def _plain(self, text: str) -> str:
        """Without control characters, and in the terminal's encoding."""
        encoding = self.console.encoding
        return visible(text).encode(encoding, "backslashreplace").decode(encoding)

    def job(
        self, progress: Progress, job: dict[str, Any], job_map: dict[str, Any] | None
    ) -> list[RenderableType]:
        """A job's bar, what is left and until when, what is wrong, and its map."""
        moves = progress.moves
        if progress.rates is not None:
            end = progress.rates.end(time.time(), is_following=progress.state == "ready")
            moves += [f"ends {end}"] if end else []
        lines = filter(None, (moves, job_parts(job)))
        found = [self._bar(progress), *(self.text(", ".join(parts), indent=2) for parts in lines)]
        found += [self.text(sentence, indent=2) for sentence in [doing(job)] if sentence]
        for remark in remarks(job):
            style = _WARNING if remark.is_trouble else ""
            found.append(self.text(remark.text, style, indent=2))
        if job_map and (picture := disk_map.picture(job_map)):
            found.append(self._map(picture))
        return found

    def _bar(self, progress: Progress) -> RenderableType:
        """As long as there is room for it beside the words."""
        words, percent = f"{progress.job}: {progress.state}", f"{progress.percent:.1f}%"
        cells = min(BAR_CELLS, self.console.size.width - len(words) - len(percent) - 3)
        if cells < BAR_CELLS_MIN:
            return self.text(f"{words} {percent}", "bold")
        whole = max(1, progress.length)
        row = Table.grid(padding=(0, 1))
        row.add_row(
            self.text(words, "bold"),
            ProgressBar(whole, progress.offset if progress.length else 1, cells),
            percent,
        )
        return row

    def _map(self, picture: disk_map.Picture) -> RenderableType:
        shown = Text("  [", no_wrap=True, overflow="crop")
        for cell in picture.cells:
            shown.append(self._character(cell), _LOOKS[cell.kind][2])
        return shown.append("]")

    def _character(self, cell: disk_map.Cell) -> str:
        characters, plain, _ = _LOOKS[cell.kind]
        if not self._has_blocks:
            return plain
        return characters[min(len(characters) - 1, int(cell.share * len(characters)))]

    @property
    def _has_blocks(self) -> bool:
        return self.console.encoding.startswith("utf")

    @property
    def legend(self) -> RenderableType:
        """What the characters of maps mean."""
        shown = Text("  ", _QUIET)
        for kind, (characters, plain, style) in _LOOKS.items():
            shown.append(characters[-1] if self._has_blocks else plain, f"not dim {style}")
            shown.append(f" {kind}  ")
        return shown


class _Fitted:
    """The body's first lines, as many as fit above the foot into the window."""

    def __init__(self, body: list[RenderableType], foot: list[RenderableType]) -> None:
        self._body = body
        self._foot = foot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = console.size.height - 1
        foot = console.render_lines(Group(*self._foot), options, pad=False)
        foot = foot[: room // 2] if self._foot else []
        body = console.render_lines(Group(*self._body), options, pad=False)
        room -= len(foot)
        if len(body) > room:
            text = f"({len(body) - room + 1} more lines: the window is too small)"
            body = body[: max(0, room - 1)]
            body += console.render_lines(Text(text, _QUIET, no_wrap=True), options, pad=False)
        for line in (*body, *foot):
            yield from line
            yield Segment.line()


class _Events:
    """The last events, as lines."""

    def __init__(self) -> None:
        self._texts: deque[str] = deque(maxlen=EVENTS_MAX)

    def add(self, event: Mapping[str, Any]) -> None:
        if not is_routine(dict(event)):
            self._texts.append(event_text(dict(event)))

    def lines(self, screen: _Screen) -> list[RenderableType]:
        return [screen.text(text, _QUIET) for text in self._texts]


class _LiveView:
    """What is drawn again and again on one screen, with the last events below."""

    def __init__(self, screen: _Screen) -> None:
        self._screen = screen
        self._events = _Events()

    def __enter__(self) -> Self:
        self._screen.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.__exit__()

    @property
    def map_cells(self) -> int:
        return self._screen.map_cells

    def heard(self, event: Mapping[str, Any]) -> None:
        self._events.add(event)


class JobView(_LiveView):
    """The job that a command waits for, on stderr; at the end it is wiped away. A Display."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds."""
        stream = cast(TextIO, _Lasting(sys.stderr))
        super().__init__(_Screen(stream, is_transient=True))
        self._meter = Meter(clock)

    def update(self, job: dict[str, Any], job_map: dict[str, Any] | None = None) -> None:
        body = self._screen.job(self._meter.update(job), job, job_map)
        if job_map:
            body.append(self._screen.legend)
        self._screen.draw(body, self._events.lines(self._screen))

    def note(self, text: str) -> None:
        self._screen.console.print(self._screen.text(text))

    def result(self, text: str) -> None:
        print(text)


class HostView(_LiveView):
    """A server's disks and jobs, on stdout; the last picture stays. A View."""

    def __init__(self) -> None:
        super().__init__(_Screen(sys.stdout, is_transient=False))
        self._meters: dict[str, Meter] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(RuntimeError, ValueError):  # no loop, or not the main thread
            for number in heeded([signal.SIGTERM]):
                asyncio.get_running_loop().add_signal_handler(number, self._end)
        return super().__enter__()

    def _end(self) -> None:
        """SIGTERM: leave the terminal as it was, and end as without this handler."""
        self.__exit__()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def show(
        self, status: dict[str, Any], maps: dict[str, dict[str, Any]], trouble: str = ""
    ) -> None:
        text, body = self._screen.text, list[RenderableType]()
        body += [text(trouble, _BAD)] if trouble else []
        body += [text(one, _BAD) for one in server_troubles(status)]
        for disk in status.get("disks", []):
            body.append(text(disk_text(disk)))
            body += [text(one, _BAD, indent=2) for one in disk_troubles(disk)]
            for job in disk.get("jobs") or []:
                name = str(job.get("device"))
                meter = self._meters.setdefault(name, Meter(time.monotonic))
                body += self._screen.job(meter.update(job), job, maps.get(name))
            if last := last_text(disk):
                body.append(text(last, indent=2))
        if any(maps.values()):
            body.append(self._screen.legend)
        forget_meters(self._meters, status)
        self._screen.draw(body or [text("no disks")], self._events.lines(self._screen))
