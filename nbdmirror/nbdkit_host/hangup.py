"""Hanging up on guests when the server ends.

nbdkit 1.32 waits at its end for every connection's threads, and those wait in read(2) for the
guest's next request: an idle guest that stays connected blocks the end for ever. So the guests'
sockets are shut for reading; requests in progress are still answered. A guest that reads none of
its answers blocks threads in send(2) as well; the server does not wait for it."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from nbdmirror.nbdkit_host.descriptors import FILES_MAX

HANG_UP_PAUSE_S = 0.05
"""Pause between checks for new connections, until the process has ended."""

TAKES_NOTHING_S = 5.0
"""How long answers may wait for a guest that reads none of them."""


class Guests:
    """The connections that this process's listening sockets have accepted, except those of
    `except_listener`. For any thread, one at a time."""

    def __init__(self, *, except_listener: socket.socket | None) -> None:
        self._excepted = None if except_listener is None else _address(except_listener)

    def hang_up(self, leave: Callable[[], None]) -> None:
        """Hang up on all guests, repeatedly, since more may connect. `leave` is called when the
        remaining guests read no answers. Does not return: the process ends.

        To shut such a connection for writing too would end the wait, but before nbdkit 1.34 also
        the process, with a failed assertion."""
        pause, waiting = threading.Event(), _Waiting()
        while not pause.wait(HANG_UP_PAUSE_S):
            times_s = []
            for sock in self.connections():
                with sock, suppress(OSError):  # ended meanwhile
                    times_s.append(waiting.time_s(sock))
                    sock.shutdown(socket.SHUT_RD)
            if times_s and min(times_s) > TAKES_NOTHING_S:
                leave()

    def connections(self) -> Iterator[socket.socket]:
        """Duplicates of the connections; the caller closes them."""
        addresses, connections = set(), []
        for sock in own_sockets():
            if _is_listening(sock):
                addresses.add(_address(sock))
                sock.close()
            else:
                connections.append(sock)
        for sock in connections:
            if _address(sock) in addresses - {self._excepted}:
                yield sock
            else:
                sock.close()

    def listeners(self) -> Iterator[socket.socket]:
        """Duplicates of the listening sockets of guests; the caller closes them."""
        for sock in own_sockets():
            if _is_listening(sock) and _address(sock) != self._excepted:
                yield sock
            else:
                sock.close()


class _Waiting:
    """How long the unsent data of each connection has not changed."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}

    def time_s(self, sock: socket.socket) -> float:
        """Seconds for this connection; 0 if nothing is unsent."""
        (unsent,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
        key, now_s = os.fstat(sock.fileno()).st_ino, time.monotonic()
        before, since_s = self._seen.get(key, (0, now_s))
        if unsent != before:
            since_s = now_s
        self._seen[key] = (unsent, since_s)
        return now_s - since_s if unsent else 0.0


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def unix_listeners() -> dict[str, os.stat_result]:
    """The files of this process's listening Unix sockets, by their paths."""
    found = {}
    for sock in own_sockets():
        with sock, suppress(OSError):  # no file, or not any more
            path = sock.getsockname()
            # An abstract name, in bytes, is no file: reservations have such names.
            if _is_listening(sock) and sock.family == socket.AF_UNIX and isinstance(path, str):
                found[path] = os.lstat(path)
    return found


def _address(sock: socket.socket) -> object:
    """The path or port that a listening socket and its accepted sockets share."""
    name = sock.getsockname()
    return name if sock.family == socket.AF_UNIX else name[1]


def own_sockets() -> Iterator[socket.socket]:
    """Duplicates of this process's sockets; the caller closes them. Does not use fstat(2) on the
    descriptors, since a disk's file system may hang."""
    is_listed, numbers = _descriptors()
    for number in numbers:
        with suppress(OSError):  # closed meanwhile, or no socket
            if is_listed and not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            sock = _duplicate(number)
            if sock.family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
                yield sock
            else:
                sock.close()


def _descriptors() -> tuple[bool, Iterable[int]]:
    """The open descriptors of this process, and whether they are known: without /proc these are all
    that there may be."""
    try:
        return True, [int(name) for name in os.listdir("/proc/self/fd")]
    except FileNotFoundError:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return False, range(min(limit, FILES_MAX))
    except OSError:  # no descriptor is left
        return True, ()


def _duplicate(number: int) -> socket.socket:
    """Raises OSError if the descriptor is closed, or no socket."""
    fd = os.dup(number)
    try:
        return socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise
