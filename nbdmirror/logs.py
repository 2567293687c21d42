"""Where the server's log lines go, and how they look there: to the same place as nbdkit's.

In the foreground that is stderr. If stderr is the journal, each line begins with its priority as
journald reads it, `<3>` for an error (sd-daemon(3)); elsewhere lines have the time. In the
background nbdkit has put stderr away and writes to syslog, so we do.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from collections.abc import Mapping

SYSLOG_SOCKET = "/dev/log"
STDERR = 2

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Levels of logging, and syslog's priorities from there on."""
_DEBUG = 7


def goes_to_journal(fd: int = STDERR, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `fd` is the connection to the journal that JOURNAL_STREAM names: whoever redirects
    stderr leaves the variable as it was (systemd.exec(5))."""
    try:
        found = os.fstat(fd)
    except OSError:  # it is closed
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def with_priority(text: str, level: int) -> str:
    """journald takes each line for a message of its own, so each has the prefix."""
    priority = next((number for least, number in _PRIORITIES if level >= least), _DEBUG)
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


def complain(text: str) -> None:
    """One line on stderr, where there is no log yet: the server does not start."""
    text = f"nbdmirror: {text}"
    line = with_priority(text, logging.ERROR) if goes_to_journal() else text
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def set_up(*, in_background: bool) -> None:
    """Let everything from info on be logged. Once in a process."""
    root = logging.getLogger("nbdmirror")
    root.addHandler(_handler(in_background))
    root.setLevel(logging.INFO)
    root.propagate = False


def _handler(in_background: bool) -> logging.Handler:
    handler: logging.Handler
    if in_background and os.path.exists(SYSLOG_SOCKET):
        handler = logging.handlers.SysLogHandler(
            SYSLOG_SOCKET, facility=logging.handlers.SysLogHandler.LOG_DAEMON
        )
        handler.setFormatter(logging.Formatter(f"nbdmirror[{os.getpid()}]: %(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JournalFormatter() if goes_to_journal() else _PlainFormatter())
    return handler


class _PlainFormatter(logging.Formatter):
    """Nobody else adds the time."""

    def __init__(self) -> None:
        super().__init__("nbdmirror: %(asctime)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S")


class _JournalFormatter(logging.Formatter):
    """The journal knows the time, and the priority tells the level."""

    def __init__(self) -> None:
        super().__init__("nbdmirror: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return with_priority(super().format(record), record.levelno)
