"""`serve --daemonize`: nbdkit is started in a session of its own, and the command waits until the
server serves, or says why it does not.

nbdkit's own way into the background leaves the process in the terminal's session, and its parent
ends before the server's last steps. From a terminal that closes with its first process (ssh -t) the
server would be ended by the hangup before it could do anything about that.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from nbdmirror.cli.common import DONE, CliError
from nbdmirror.startup_error import READY, READY_FD

SIGNALLED = 128
"""A shell's exit status for a command that a signal has ended: this and its number."""


class _Signalled(Exception):
    """With the signal's number."""


def run(argv: Sequence[str], env: dict[str, str], *, kept_fds: Sequence[int] = ()) -> int:
    """The exit status of `serve`: 0 once the server serves. `kept_fds` are for it to inherit.
    Raises CliError."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
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
        return DONE
    raise CliError(said or "the server ended while it was starting; its log (syslog) says why")


def _raise(number: int, _: FrameType | None) -> None:
    raise _Signalled(number)
