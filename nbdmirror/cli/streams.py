"""The standard streams of a command, each of which may be closed, full, or without a reader.

The exit status depends on the job, not on the output: a script whose log is on a full disk must not
treat a pivot as a failure.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from contextlib import suppress
from typing import TextIO

from nbdmirror.foreign_text import visible

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def open_streams() -> None:
    """Open closed standard streams: otherwise the next open file, a disk or a socket, would get the
    number to which messages are written. From now on only `finish`, and explicit flushes, notice
    that stdout cannot be written to (with PYTHONUNBUFFERED each line would)."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
            setattr(sys, name, os.fdopen(fd, "r" if fd == 0 else "w", closefd=False))
    with suppress(AttributeError):  # not in a test that replaces stdout
        sys.stdout.reconfigure(write_through=False)  # type: ignore[union-attr]


def is_live(stream: TextIO) -> bool:
    """Whether a live view can be drawn there: on a terminal that can move its cursor, with rich.
    Otherwise there are plain lines."""
    is_able = os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")
    return is_able and stream.isatty() and importlib.util.find_spec("rich") is not None


def say(text: str) -> None:
    """Print one line on stderr; errors are ignored."""
    try:
        print(visible(text), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def finish(status: int, *, failed: int | None) -> int:
    """Flush stdout. Returns the exit status: `status`, or `failed`, if given, after a success whose
    output cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if error.errno != errno.EPIPE:  # the reader has seen enough
            say(f"nbdmirror: standard output: {error.strerror}")
        return status if failed is None else status or failed
    return status


def output_error(error: OSError) -> str:
    """The error as text. An answer that is longer than stdout's buffer fails when it is printed. No
    file is named then, and the client commands write no other files. The rest of the answer is
    dropped."""
    if error.filename is not None or error.errno not in _NO_ROOM:
        return str(error)
    _discard(sys.stdout)
    return f"standard output: {error.strerror}"


def _discard(stream: TextIO) -> None:
    """Drop unwritten output, which the interpreter would try to write again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
