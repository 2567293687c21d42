"""A quiet log: the first lines of one lasting cause, then a count from time to time.

`Quiet` decides. nbdmirror's log lines pass through it (`QuietFilter`). nbdkit's lines do not: it
writes them itself, and cannot be configured. So its stderr is a pipe (`Relay`), whose reader asks
`Quiet` (`admits_nbdkits`). The lines about failed callbacks have a better cause: nbdkit's Python
plugin asks Python for the text just before it writes, so an unwanted line is marked there
(`CallbackErrors`). The pipe never blocks: nbdkit writes to it with the GIL held, which the pipe's
reader needs.

For any thread. A request that succeeds uses none of this.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

PERIOD_S = 10.0
"""Interval of the counts of a lasting cause. A cause without a line for so long has ended."""

LINES_MAX = 5
"""Lines of one cause before further ones are only counted."""

CAUSES_MAX = 256
"""Most causes that are counted; all lines of further causes are logged."""

MARK = "(one of many)"
"""The text of a line that is dropped."""

STDERR = 2
_PIPE_BYTES = 1 << 20
_READ_BYTES = 1 << 16
_ATTENDED = re.compile(rb"\(one of many\)(\x1b\[0m)?\s*$")
_NUMBER = re.compile(r"(?<![\w./:-])\d+(?![\w./-])")
_QUOTED = re.compile(r"'[^']*'")
_ANY_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
_NBDKIT = "nbdkit: ", "pthread_create: ", "accept: "
"""The last ones are perror's."""
_CALLBACK = "nbdmirror-plugin.py: "

Tell = Callable[[int, str], None]


@dataclass(slots=True)
class _Cause:
    level: int
    text: str
    last_s: float
    lines: int = 1
    left_out: int = 0


class Quiet:
    """Decides which lines are logged. `tell` logs the counts."""

    def __init__(self, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._causes: dict[str, _Cause] = {}
        self._lock = threading.Lock()  # a leaf: nothing is called under it
        self._timer: threading.Timer | None = None

    def admits(self, cause: str, level: int, text: str) -> bool:
        """Whether a line of `cause` is logged; if not, it is counted."""
        now_s = self._clock()
        with self._lock:
            known = self._causes.get(cause)
            if known is None or (not known.left_out and now_s - known.last_s > PERIOD_S):
                if known is not None or self._has_room(now_s):
                    self._causes[cause] = _Cause(level, text, now_s)
                return True
            known.last_s = now_s
            if known.lines < LINES_MAX:
                known.lines += 1
                return True
            known.left_out += 1
            if self._timer is None:
                self._start_timer()
            return False

    def tick(self) -> None:
        """Log the counts. Called every PERIOD_S while there are any."""
        with self._lock:
            counted = [(c.level, c.text, c.left_out) for c in self._causes.values() if c.left_out]
            for cause in self._causes.values():
                cause.left_out = 0
            self._timer = None
            if counted:
                self._start_timer()
        for level, text, number in counted:
            self._tell(level, f"{text} ({number} more within {PERIOD_S:g} s)")

    def stop(self) -> None:
        """Log the remaining counts, and nothing later."""
        self._forget_timer()
        self.tick()
        self._forget_timer()

    def _forget_timer(self) -> None:
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _has_room(self, now_s: float) -> bool:
        if len(self._causes) < CAUSES_MAX:
            return True
        for key, cause in list(self._causes.items()):
            if not cause.left_out and now_s - cause.last_s > PERIOD_S:
                del self._causes[key]
        return len(self._causes) < CAUSES_MAX

    def _start_timer(self) -> None:
        timer = threading.Timer(PERIOD_S, self.tick)
        timer.daemon = True
        timer.name = "nbdmirror-log"
        with suppress(RuntimeError):  # no more threads: the next line tries again
            timer.start()
            self._timer = timer


class QuietFilter(logging.Filter):
    """Filters warnings and errors; the progress of jobs (INFO) is always logged."""

    def __init__(self, quiet: Quiet) -> None:
        super().__init__()
        self._quiet = quiet

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        text = record.getMessage()
        cause = str(record.msg) if record.exc_info else _NUMBER.sub("#", text)
        return self._quiet.admits(cause, record.levelno, text)


def admits_nbdkits(quiet: Quiet, line: str) -> bool:
    """Whether a line that nbdkit has written is logged: about a client that is no guest, or that is
    refused, or a request that makes no sense. All others are: of the end of a traceback, of
    debugging, and of callbacks, which were decided on before."""
    if not line.startswith(_NBDKIT) or ": debug: " in line or _CALLBACK in line:
        return True
    return quiet.admits(_ANY_NUMBER.sub("#", line), logging.ERROR, line)


class Relay:
    """Forwards everything that is written to stderr, by C code too, except the marked lines."""

    def __init__(self, write: Callable[[bytes], None] | None = None) -> None:
        """`write`: the destination; by default the former stderr."""
        self._write = write
        self._before = -1
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start. Idempotent. Raises OSError or RuntimeError if no descriptors or threads are left;
        then stderr has not changed."""
        with self._lock:
            if self._thread is not None:
                return
            before = os.dup(STDERR)
            try:
                reader, writer = os.pipe()
            except OSError:
                os.close(before)
                raise
            with suppress(OSError):  # more than the system allows
                fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            os.set_blocking(writer, False)
            write = self._write or (lambda data: _write_all(before, data))
            thread = threading.Thread(
                target=_pass_on, args=(reader, write), name="nbdmirror-relay", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:
                for fd in (before, reader, writer):
                    os.close(fd)
                raise
            self._before, self._thread = before, thread
            os.dup2(writer, STDERR)
            os.close(writer)

    def stop(self) -> None:
        """Restore stderr, after the pipe's content. Idempotent."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            os.dup2(self._before, STDERR)  # the pipe's only writing end
            thread.join(1.0)
            if not thread.is_alive():
                os.close(self._before)


def _pass_on(reader: int, write: Callable[[bytes], None]) -> None:
    rest = b""
    try:
        while data := os.read(reader, _READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            kept = [line + b"\n" for line in lines if not _ATTENDED.search(line)]
            if kept:
                write(b"".join(kept))
        if rest:
            write(rest)
    except OSError:
        pass  # no place to report this
    finally:
        os.close(reader)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


class CallbackErrors:
    """nbdkit's lines about failed callbacks."""

    def __init__(self, quiet: Quiet, relay: Relay) -> None:
        self._quiet = quiet
        self._relay = relay

    def text(self, error: BaseException, text: str) -> str:
        """The text for nbdkit: `text`, or the mark of a dropped line."""
        line = text.strip().rpartition("\n")[2]
        cause = f"{type(error).__name__}: {_QUOTED.sub('#', _NUMBER.sub('#', line))}"
        if self._quiet.admits(cause, logging.ERROR, f"a guest's request failed: {line}"):
            return text
        try:
            self._relay.start()  # if that failed before
        except (OSError, RuntimeError):
            return text
        return MARK
