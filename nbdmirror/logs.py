"""The destination and the format of the server's log lines: the same as nbdkit's.

In the foreground the log goes to stderr. If stderr is the journal, each line begins with its
priority for journald, `<3>` for an error (sd-daemon(3)); otherwise lines have the time. In the
background nbdkit has closed stderr and writes to syslog, and so does nbdmirror.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress

from nbdmirror.quiet_log import STDERR, CallbackErrors, Quiet, QuietFilter, Relay

SYSLOG_SOCKET = "/dev/log"

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Levels of logging, and syslog's priorities for them and higher ones."""
_DEBUG = 7


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
    priority = next((number for least, number in _PRIORITIES if level >= least), _DEBUG)
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


def print_startup_error(text: str, level: int = logging.ERROR) -> None:
    """Print one line on stderr before the log exists: why the server does not start, or waits."""
    text = f"nbdmirror: {text}"
    line = with_priority(text, level) if goes_to_journal() else text
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class Log:
    """The server's log, from its creation on. Once in a process."""

    def __init__(self, *, in_background: bool) -> None:
        """Logs everything from level INFO on."""
        self._handler = _handler(in_background)
        self._quiet = Quiet(self._emit)
        self._handler.addFilter(QuietFilter(self._quiet))
        if in_background:
            # stderr is /dev/null; with --log=stderr nbdkit writes there, and not to syslog.
            self._relay = Relay(self._pass_on)
            with suppress(OSError, RuntimeError):
                self._relay.start()
        else:
            self._relay = Relay()
            self._quiet.on_calm.append(self._relay.stop)
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
        self._quiet.stop()
        self._relay.stop()

    def _emit(self, level: int, text: str) -> None:
        """Log without the filter."""
        record = logging.LogRecord("nbdmirror", level, "", 0, text, None, None)
        with suppress(Exception), self._handler.lock or nullcontext():
            self._handler.emit(record)

    def _pass_on(self, lines: bytes) -> None:
        for line in lines.decode(errors="replace").splitlines():
            self._emit(logging.ERROR, line)


def _handler(in_background: bool) -> logging.Handler:
    handler: logging.Handler
    if in_background and os.path.exists(SYSLOG_SOCKET):
        handler = logging.handlers.SysLogHandler(
            SYSLOG_SOCKET, facility=logging.handlers.SysLogHandler.LOG_DAEMON
        )
        handler.setFormatter(logging.Formatter(f"nbdmirror[{os.getpid()}]: %(message)s"))
    else:
        # A separate one: the relay's pipe that replaces stderr may be full.
        stream = os.fdopen(os.dup(STDERR), "w", encoding="utf-8", errors="backslashreplace")
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_JournalFormatter() if goes_to_journal() else _PlainFormatter())
    return handler


class _PlainFormatter(logging.Formatter):
    """Adds the time, since no one else does."""

    def __init__(self) -> None:
        super().__init__("nbdmirror: %(asctime)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S")


class _JournalFormatter(logging.Formatter):
    """Without time and level: the journal has the time, and the priority is the level."""

    def __init__(self) -> None:
        super().__init__("nbdmirror: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return with_priority(super().format(record), record.levelno)
