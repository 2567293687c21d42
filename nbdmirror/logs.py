"""The destination and the format of the server's log lines: the same as nbdkit's.

In the foreground the log goes to stderr. If stderr is the journal, each line begins with its
priority for journald, `<3>` for an error (sd-daemon(3)); otherwise lines have the time. In the
background nbdkit has closed stderr and writes to syslog, and so does nbdmirror.

With the format "json" each line is a JSON object instead, and so are nbdkit's lines, which come
through the relay (quiet_log.py).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from typing import Any

from nbdmirror.errors import ConfigError
from nbdmirror.foreign_text import visible
from nbdmirror.log_lines import LineHandler, Stream, Syslog
from nbdmirror.quiet_log import (
    STDERR,
    CallbackErrors,
    Quiet,
    QuietFilter,
    Relay,
    admits_nbdkits,
)

SYSLOG_SOCKET = "/dev/log"

FORMATS = "plain", "json"

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Levels of logging, and syslog's priorities for them and higher ones."""
_DEBUG = 7
_DAEMON = 3 << 3
"""Syslog's facility."""

_NBDKIT = "nbdkit: "
"""The beginning of nbdkit's lines."""

_is_json = False


def use_format(name: str) -> None:
    """Write "plain" lines or "json" from now on. Raises ConfigError. A process has one log, and
    reports errors before that exists."""
    global _is_json
    if name not in FORMATS:
        raise ConfigError(f"log-format={name}: expected {' or '.join(FORMATS)}")
    _is_json = name == "json"


def goes_to_journal(fd: int = STDERR, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `fd` is the connection to the journal that JOURNAL_STREAM names: a redirection of
    stderr does not change the variable (systemd.exec(5))."""
    try:
        found = os.fstat(fd)
    except OSError:  # closed
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def with_priority(text: str, level: int) -> str:
    """`text`, with the priority before each line, since journald treats each line as a message."""
    return "\n".join(f"<{_priority(level)}>{line}" for line in text.split("\n"))


def _priority(level: int) -> int:
    return next((number for least, number in _PRIORITIES if level >= least), _DEBUG)


def print_startup_error(text: str, level: int = logging.ERROR) -> None:
    """Print one line on stderr before the log exists: why the server does not start, or waits."""
    name = logging.getLevelName(level)
    text = visible(text)
    text = as_json(time.time(), name, text) if _is_json else f"nbdmirror: {text}"
    line = with_priority(text, level) if goes_to_journal() else text
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def as_json(time_s: float, level: str, text: str, about: Mapping[str, Any] | None = None) -> str:
    """A JSON object in one line of ASCII. `time_s`: since 1970."""
    is_nbdkits = text.startswith(_NBDKIT)
    line = {
        "time": datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds"),
        "level": level.lower(),
        "program": "nbdkit" if is_nbdkits else "nbdmirror",
        "message": text.removeprefix(_NBDKIT),
        **(about or {}),
    }
    return json.dumps(line, default=str)


def warn_without_syslog() -> None:
    """For the command that has started a server in the background."""
    if not os.path.exists(SYSLOG_SOCKET):
        text = f"{SYSLOG_SOCKET} does not exist: the log begins when a syslog daemon is there"
        print_startup_error(f"warning: {text}", logging.WARNING)


class Log:
    """The server's log, from its creation on. Once in a process."""

    def __init__(self, *, in_background: bool) -> None:
        """Logs everything from level INFO on."""
        self._handler = _handler(in_background)
        self._quiet = Quiet(self._emit)
        self._handler.addFilter(QuietFilter(self._quiet))
        self._is_raw = not (in_background or _is_json)
        """nbdkit's lines are logged as nbdkit has written them."""
        # With --log=stderr nbdkit writes there in the background too, where stderr is /dev/null.
        self._relay = Relay(self._pass_on)
        with suppress(OSError, RuntimeError):
            self._relay.start()
        self._callbacks = CallbackErrors(self._quiet, self._relay)
        root = logging.getLogger("nbdmirror")
        root.addHandler(self._handler)
        root.setLevel(logging.INFO)
        root.propagate = False

    def text_of(self, error: BaseException, text: str) -> str:
        """The text for nbdkit's line about a callback that failed with `error`; `text`: the full
        one."""
        return self._callbacks.text(error, text)

    def stop(self) -> None:
        """Write counts of omitted lines, and stop."""
        self._relay.stop()  # first: nbdkit's last lines may be counted
        self._quiet.stop()
        self._handler.stop()

    def _emit(self, level: int, text: str) -> None:
        """Log without the filter."""
        record = logging.LogRecord("nbdmirror", level, "", 0, text, None, None)
        with suppress(Exception), self._handler.lock or nullcontext():
            self._handler.emit(record)

    def _pass_on(self, lines: bytes) -> None:
        text = lines.decode(errors="backslashreplace").removesuffix("\n")
        for line in map(visible, text.split("\n")):
            if not admits_nbdkits(self._quiet, line):
                continue
            if self._is_raw:
                self._handler.write(line)
            else:
                is_debug = line.startswith(_NBDKIT) and ": debug: " in line
                self._emit(logging.DEBUG if is_debug else logging.ERROR, line)


def _handler(in_background: bool) -> LineHandler:
    if in_background:
        handler = LineHandler(Syslog(SYSLOG_SOCKET), end=b"\0")
        handler.setFormatter(_SyslogFormatter())
    else:
        # A separate one: the relay's pipe that replaces stderr may be full.
        handler = LineHandler(Stream(STDERR))
        plain = _JsonFormatter() if _is_json else _PlainFormatter()
        handler.setFormatter(_JournalFormatter() if goes_to_journal() else plain)
    return handler


class _LineFormatter(logging.Formatter):
    """A message is one line, whatever is quoted in it. A traceback has several."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = visible(record.message)
        return super().formatMessage(record)


class _PlainFormatter(_LineFormatter):
    """Adds the time, since no one else does."""

    def __init__(self) -> None:
        super().__init__("nbdmirror: %(asctime)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S")


class _JournalFormatter(_LineFormatter):
    """Without time and level: the journal has the time, and the priority is the level."""

    def __init__(self) -> None:
        super().__init__("nbdmirror: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = _JsonFormatter().format(record) if _is_json else super().format(record)
        return with_priority(text, record.levelno)


class _SyslogFormatter(_LineFormatter):
    """With priority, name and process, and without the time: syslog has that."""

    def format(self, record: logging.LogRecord) -> str:
        text = _JsonFormatter().format(record) if _is_json else super().format(record)
        return f"<{_DAEMON | _priority(record.levelno)}>nbdmirror[{os.getpid()}]: {text}"


class _JsonFormatter(logging.Formatter):
    """A traceback is a part of the message."""

    def format(self, record: logging.LogRecord) -> str:
        text, about = super().format(record), getattr(record, "about", None)
        return as_json(record.created, record.levelname, text, about)
