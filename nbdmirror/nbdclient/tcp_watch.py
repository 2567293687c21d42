"""TcpWatch: whether the peer of a TCP connection is alive.

The kernel detects a lost peer by unacknowledged data, and on an idle connection by keepalive;
`begin` turns both on. The kernel also gives up a peer that acknowledges each probe but has no room
for more data (TCP_USER_TIMEOUT counts a full window, tcp(7)), which may be a slow server. So this
module removes that bound while the peer's window is full, and watches the peer itself.
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
"""A TCP peer is probed after KEEPALIVE_S. Its connection is lost after PEER_LOST_S without a sign
of life, or without an acknowledgement of sent data. (tcp(7), TCP_USER_TIMEOUT)"""

LOOK_S = 5.0
"""Interval for calls of `look`: several times in PEER_LOST_S."""

_SIOCOUTQNSD = 0x894B  # linux/sockios.h: bytes that were not sent yet
_TCP_ENDED = (6, 7, 8, 9, 11)
"""linux/tcp_states.h: the peer has closed, or reset the connection."""

_INFO = struct.Struct("2xBB20xI24xII")


class TcpInfo(NamedTuple):
    """Some members of the kernel's tcp_info (linux/tcp.h)."""

    retransmits: int
    probes: int
    """Unanswered probes whether the peer is alive, or has room."""
    unacknowledged: int
    last_data_ms: int
    """Milliseconds since the peer has sent data."""
    last_acknowledgement_ms: int


def tcp_info(own: socket.socket) -> TcpInfo:
    """The kernel's information on a TCP socket. Raises OSError, and struct.error if the kernel
    returns less."""
    return TcpInfo(*_INFO.unpack(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)))


class TcpWatch:
    """Watches one socket. `begin` and `look` do nothing if it is not a TCP socket. Call `look` from
    one thread only."""

    def __init__(self, own: socket.socket) -> None:
        self._own = own
        self.is_tcp = own.family in (socket.AF_INET, socket.AF_INET6)
        self._is_full = False
        self._heard_s = self._silent_since_s = 0.0

    def begin(self) -> None:
        """Turn the kernel's detection on."""
        if self.is_tcp:
            self._own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._set(socket.TCP_KEEPIDLE, KEEPALIVE_S)
            self._set(socket.TCP_KEEPINTVL, KEEPALIVE_S)
            self._set(socket.TCP_USER_TIMEOUT, PEER_LOST_S * 1000)

    def look(self, now_s: float) -> None:
        """Break the connection if its window is full and the peer does not answer any more.
        `now_s`: monotonic seconds."""
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
            pass  # already broken, or closed

    def has_answered_or_ended(self) -> bool:
        """For a socket that is shut for reading, of any kind: whether the peer has sent something
        since, or has closed."""
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
        """Whether the server greets another client, on any kind of socket: then it runs, even if
        its storage is slow. Blocks for `timeout_s`. A server that is full looks like one that
        hangs."""
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
        """Whether the peer was silent for PEER_LOST_S. `questions`: unanswered probes."""
        if not questions or heard_s > self._heard_s + 0.5:
            self._heard_s, self._silent_since_s = heard_s, now_s
        return now_s - self._silent_since_s > PEER_LOST_S

    def _set(self, option: int, value: int) -> None:
        self._own.setsockopt(socket.IPPROTO_TCP, option, value)
