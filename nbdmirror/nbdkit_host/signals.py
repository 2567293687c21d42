"""Which signals end a server, which it ignores, and how it leaves the terminal that started it.

A signal that was ignored when the process was started stays ignored: nohup does that to SIGHUP, and
a shell without job control to SIGINT and SIGQUIT of what it starts in the background. Such a job
shares the script's terminal as long as the script lives, so it is spared the hangup as well.
SIGTERM ends the server in any case. nbdkit installs handlers for all of these, so an ignored one is
blocked before that: a signal that every thread blocks is not delivered.

For the main thread, before other threads are started: threads inherit what is blocked.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}

MEANINGLESS = {
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
}
"""By default they end or stop a process, and with it its guests' disks: a log that nobody reads any
more, a file at its limit, somebody's habit, a terminal's suspend key, a log line from the
background."""


PR_SET_PDEATHSIG = 1


class Signals:
    """Of this process, as it was started."""

    def __init__(self) -> None:
        """Before nbdkit installs its handlers."""
        may_be_ignored = ENDING - {signal.SIGTERM}
        ignored = {one for one in may_be_ignored if signal.getsignal(one) is signal.SIG_IGN}
        if signal.SIGINT in ignored:
            ignored.add(signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
        self._ending = ENDING - ignored
        _outlive_parent()

    def take(self) -> None:
        """From now on only `end` hears of a signal. Before the first thread is started: it would
        get the signal, and nbdkit's handler would wait for guests."""
        for number in MEANINGLESS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, self._ending)

    def end(self, end: Callable[[str], None]) -> None:
        """Have `end` called, once, in a thread of its own, when a signal asks the process to end,
        or has done so since `take`; with the signal's name."""

        def wait() -> None:
            end(signal.Signals(signal.sigwait(self._ending)).name)

        threading.Thread(target=wait, name="nbdmirror-signals", daemon=True).start()


def leave_terminal() -> None:
    """For a process in the background: begin a session, which has no terminal, so that neither the
    terminal's keys nor its end reach the process. nbdkit has seen to the rest of what a daemon
    does: the working directory, and the standard streams."""
    os.setsid()


def _outlive_parent() -> None:
    """nbdkit 1.32 as Debian 12 has it asks the kernel for a SIGTERM when its parent ends, whether
    --exit-with-parent was given (which may be abbreviated) or not: the disk would go with the shell
    that started the server."""
    words = []
    with suppress(OSError):  # there is no /proc, in a chroot
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    if not any(word.startswith(b"--exi") for word in words):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
