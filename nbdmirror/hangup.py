"""Hanging up on guests when the server ends.

nbdkit 1.32 waits at its end for every connection's threads, and those wait in read(2) for the
guest's next request: a guest that stays connected and says nothing keeps the process for ever. So
the guests' sockets are shut for reading: requests under way are still answered.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress

HANG_UP_PAUSE_S = 0.05
"""Between looks for guests that have just connected; until the process has ended."""


class Guests:
    """The connections that listening sockets of this process have accepted; but for those of
    `spare`, a listening socket. From any thread, one at a time."""

    def __init__(self, *, spare: socket.socket | None) -> None:
        self._spared = None if spare is None else _door(spare)

    def hang_up(self) -> None:
        """Again and again, on those that have connected meanwhile. Does not return: the process
        ends."""
        pause = threading.Event()
        while not pause.wait(HANG_UP_PAUSE_S):
            for sock in self._connections():
                with sock, suppress(OSError):
                    sock.shutdown(socket.SHUT_RD)

    def _connections(self) -> Iterator[socket.socket]:
        """Duplicates, to be closed."""
        doors, connections = set(), []
        for sock in _sockets():
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                doors.add(_door(sock))
                sock.close()
            else:
                connections.append(sock)
        for sock in connections:
            if _door(sock) in doors - {self._spared}:
                yield sock
            else:
                sock.close()


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
