"""`serve --daemonize`: starts nbdkit in a new session, and waits until the server serves, or
reports why it does not.

nbdkit's daemon mode leaves the process in the terminal's session, and its parent ends before the
server's last steps. If the terminal closes with its first process (ssh -t), the hangup would end
the server before it could ignore that signal."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from nbdmirror.cli.common import DONE, CliError
from nbdmirror.ending_signals import heeded
from nbdmirror.logs import warn_without_syslog
from nbdmirror.startup_error import READY, READY_FD

SIGNALLED = 128
"""A shell's exit status for a command that a signal has ended: this plus the signal's number."""


class _Signalled(Exception):
    """A signal has arrived; the argument is its number."""


def run(argv: Sequence[str], env: dict[str, str], *, kept_fds: Sequence[int] = ()) -> int:
    """The exit status of `serve`: 0 when the server serves. The server inherits `kept_fds`. Raises
    CliError."""
    for number in heeded():
        signal.signal(number, _raise)
    ours, theirs = os.pipe()
    try:
        nbdkit = subprocess.Popen(
            argv,
            env={**env, READY_FD: str(theirs)},
            pass_fds=(theirs, *kept_fds),
            start_new_session=True,
            restore_signals=False,
        )
        os.close(theirs)
        try:
            with open(ours, encoding="utf-8", errors="replace") as pipe:
                said = pipe.read()
            status = nbdkit.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(nbdkit.pid, signal.SIGTERM)
            raise
    except _Signalled as signalled:
        return SIGNALLED + int(signalled.args[0])
    if status:
        return status if status > 0 else SIGNALLED - status
    if said == READY:
        warn_without_syslog()
        return DONE
    raise CliError(said or "the server ended while it was starting; its log (syslog) says why")


def _raise(number: int, _: FrameType | None) -> None:
    raise _Signalled(number)
