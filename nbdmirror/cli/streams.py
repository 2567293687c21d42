"""The standard streams of a command, of which each may be closed, or full, or read by nobody.

What a command did to a job counts, and not whether somebody could read that: a script whose log's
disk is full must not take a pivot for a failure.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import TextIO


def open_streams() -> None:
    """Those that whoever started us has closed: else what is opened next, a disk or a socket, gets
    the number that messages are written to. From now on only `finish`, and what flushes itself,
    finds out that stdout cannot be written to (PYTHONUNBUFFERED would have each line do so)."""
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


def say(text: str) -> None:
    """One line on stderr. Where that cannot be written to, nobody can be told."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def finish(status: int, *, failed: int | None) -> int:
    """Write what is left of stdout. Returns the exit status: `status`, or, if stdout cannot be
    written to and all was well so far, `failed` where that is given."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if error.errno != errno.EPIPE:  # whoever read our output has seen enough
            say(f"nbdmirror: standard output: {error.strerror}")
        return status if failed is None else status or failed
    return status


def _discard(stream: TextIO) -> None:
    """What is left of it, which the interpreter tries to write once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
