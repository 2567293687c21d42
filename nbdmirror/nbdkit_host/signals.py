"""The signals that end a server, the signals that it ignores, and how it leaves its terminal.

A signal that was ignored at the start stays ignored: nohup ignores SIGHUP, and a shell without job
control ignores SIGINT and SIGQUIT for its background jobs. Such a job shares the script's terminal
while the script runs, so it ignores the hangup as well. SIGTERM always ends the server. nbdkit
installs handlers for all of these signals, so an ignored one is blocked before that: a signal that
every thread blocks is not delivered.

For the main thread, before other threads start: threads inherit the blocked signals.
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
"""Signals that by default end or stop a process, and with it its guests' disks: a log without a
reader, a file at its size limit, a user's habit, a terminal's suspend key, a log line from the
background."""


PR_SET_PDEATHSIG = 1


class Signals:
    """The signals of this process, as at its start."""

    def __init__(self) -> None:
        """Create this before nbdkit installs its handlers."""
        may_be_ignored = ENDING - {signal.SIGTERM}
        ignored = {one for one in may_be_ignored if signal.getsignal(one) is signal.SIG_IGN}
        if signal.SIGINT in ignored:
            ignored.add(signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
        self._ending = ENDING - ignored
        _outlive_parent()

    def take(self) -> None:
        """From now on only `end` gets signals. Before the first thread starts: that thread would
        get the signal, and nbdkit's handler would wait for guests."""
        for number in MEANINGLESS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, self._ending)

    def end(self, end: Callable[[str], None]) -> None:
        """Call `end` once, on a separate thread, with the signal's name, when a signal asks the
        process to end, or has done so since `take`."""

        def wait() -> None:
            end(signal.Signals(signal.sigwait(self._ending)).name)

        threading.Thread(target=wait, name="nbdmirror-signals", daemon=True).start()


def leave_terminal() -> None:
    """For a process in the background: begin a session without a terminal, so that neither the
    terminal's keys nor its end reach the process. nbdkit does the other steps of a daemon: the
    working directory, and the standard streams."""
    os.setsid()


def _outlive_parent() -> None:
    """Undo a request of Debian 12's nbdkit 1.32, which asks the kernel for a SIGTERM when its
    parent ends, with or without --exit-with-parent (which may be abbreviated): the server would end
    with the shell that started it."""
    words = []
    with suppress(OSError):  # no /proc, in a chroot
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    if not any(word.startswith(b"--exi") for word in words):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
