"""Ending on a signal even while guests are connected and idle.

nbdkit 1.32 waits at its end for every connection's threads, and those wait in read(2) for the
guest's next request: a guest that stays connected and says nothing keeps the process for ever. So
the signals are taken here, by a thread that waits for them (no handler is installed), and at the
end the guests' sockets are shut for reading: requests under way are still answered.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

HANG_UP_PAUSE_S = 0.05
"""Between looks for guests that have just connected; until the process has ended."""


def end_on_signal(end: Callable[[], None], *, spare: socket.socket | None) -> None:
    """Have `end` called, once, in a thread of its own, when a signal asks the process to end; then
    hang up on the guests: on everybody but those that `spare`, a listening socket, has accepted.
    Call it before any other thread is started: threads inherit what is blocked."""
    spared = None if spare is None else _door(spare)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        signal.sigwait(SIGNALS)
        end()
        pause = threading.Event()
        while not pause.wait(HANG_UP_PAUSE_S):
            _hang_up(spared)

    threading.Thread(target=wait, name="nbdmirror-signals", daemon=True).start()


def _hang_up(spared: object) -> None:
    """Shut the connections that listening sockets of this process have accepted."""
    doors, connections = set(), []
    for sock in _sockets():
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            doors.add(_door(sock))
            sock.close()
        else:
            connections.append(sock)
    for sock in connections:
        with sock, suppress(OSError):
            if _door(sock) in doors - {spared}:
                sock.shutdown(socket.SHUT_RD)


def _door(sock: socket.socket) -> object:
    """What a listening socket and those that it accepted have in common: a path, or a port."""
    name = sock.getsockname()
    return name if sock.family == socket.AF_UNIX else name[1]


def _sockets() -> Iterator[socket.socket]:
    """Duplicates of this process's sockets, with a name."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.stat(int(name)).st_mode):
                sock = socket.socket(fileno=os.dup(int(name)))
                if sock.family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
                    yield sock
                else:
                    sock.close()
