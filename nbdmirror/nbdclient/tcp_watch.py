"""TcpWatch: whether the peer of a TCP connection is there.

The kernel finds out for data that nobody acknowledges, and for a connection at rest: `begin` has it
do so. It also gives a peer up that acknowledges each of its questions and yet has no room for more
(TCP_USER_TIMEOUT counts a window that is full, tcp(7)): a server that is slow to take what it is
sent. So that bound is taken off while the peer's window is full, and looked after here.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

KEEPALIVE_S = 10
PEER_LOST_S = 30
"""A TCP peer is asked for a sign of life after KEEPALIVE_S, and after PEER_LOST_S without one, or
without an acknowledgement of what was sent, its connection is lost. (tcp(7), TCP_USER_TIMEOUT)"""

LOOK_S = 5.0
"""How often `look` is to be called: several times in PEER_LOST_S."""

_SIOCOUTQNSD = 0x894B  # linux/sockios.h: bytes that were not sent yet
_TCP_ENDED = (6, 7, 8, 9, 11)
"""linux/tcp_states.h: the peer has closed, or reset the connection."""

_INFO = struct.Struct("2xBB20xI24xII")


class TcpInfo(NamedTuple):
    """Some members of the kernel's tcp_info (linux/tcp.h)."""

    retransmits: int
    probes: int
    """Questions whether the peer is there, or has room, that were not answered."""
    unacknowledged: int
    last_data_ms: int
    """Milliseconds since the peer has sent data."""
    last_acknowledgement_ms: int


def tcp_info(own: socket.socket) -> TcpInfo:
    """Raises OSError, and struct.error if the kernel has less to say."""
    return TcpInfo(*_INFO.unpack(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)))


class TcpWatch:
    """Of one socket. `begin` and `look` leave one that is no TCP socket alone. `look` from one
    thread."""

    def __init__(self, own: socket.socket) -> None:
        self._own = own
        self.is_tcp = own.family in (socket.AF_INET, socket.AF_INET6)
        self._is_full = False
        self._heard_s = self._silent_since_s = 0.0

    def begin(self) -> None:
        if self.is_tcp:
            self._own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._set(socket.TCP_KEEPIDLE, KEEPALIVE_S)
            self._set(socket.TCP_KEEPINTVL, KEEPALIVE_S)
            self._set(socket.TCP_USER_TIMEOUT, PEER_LOST_S * 1000)

    def look(self, now_s: float) -> None:
        """Breaks the connection if its window is full and the peer does not answer any more."""
        if not self.is_tcp:
            return
        try:
            info = tcp_info(self._own)
            (unsent,) = struct.unpack("i", fcntl.ioctl(self._own, _SIOCOUTQNSD, bytes(4)))
            heard_s = now_s - info.last_acknowledgement_ms / 1000
            self._note(unsent > 0 and not info.unacknowledged)
            if self._is_full and self._is_silent(info.probes, heard_s, now_s):
                self._own.shutdown(socket.SHUT_RDWR)
        except (OSError, struct.error):
            pass  # it is broken already, or closed

    def has_answered_or_ended(self) -> bool:
        """Of a socket that is shut for reading: whether something came from the peer since, or the
        peer has closed. On any kind of socket."""
        try:
            if self._own.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return True
            if self.is_tcp:
                return self._own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _TCP_ENDED
            poll = select.poll()
            poll.register(self._own, 0)
            return bool(poll.poll(0))
        except BlockingIOError:
            return False
        except OSError:
            return True

    def is_server_there(self, timeout_s: float) -> bool:
        """Whether the server greets another client, on any kind of socket: its storage may be slow,
        but it runs. Blocks. A server that is full looks as one that hangs."""
        with socket.socket(self._own.family) as other, suppress(OSError):
            other.settimeout(timeout_s)
            other.connect(self._own.getpeername())
            return bool(other.recv(1))
        return False

    def _note(self, is_full: bool) -> None:
        if is_full != self._is_full:
            self._is_full = is_full
            self._set(socket.TCP_USER_TIMEOUT, 0 if is_full else PEER_LOST_S * 1000)

    def _is_silent(self, questions: int, heard_s: float, now_s: float) -> bool:
        """For so long; `questions` are those to which there was no answer."""
        if not questions or heard_s > self._heard_s + 0.5:
            self._heard_s, self._silent_since_s = heard_s, now_s
        return now_s - self._silent_since_s > PEER_LOST_S

    def _set(self, option: int, value: int) -> None:
        self._own.setsockopt(socket.IPPROTO_TCP, option, value)
