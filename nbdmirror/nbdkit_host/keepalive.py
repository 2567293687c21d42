"""Guests on TCP that vanish: their host lost its power, or their network was cut, without a
message.

TCP waits for such a guest for a quarter of an hour if data is on its way, and for ever otherwise;
each guest holds a descriptor and nbdkit's threads. The kernel probes a silent guest (SO_KEEPALIVE);
this module watches unacknowledged data. TCP_USER_TIMEOUT would do that too, but would also end
guests that are alive and read nothing for a while, for example of a stopped virtual machine.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from nbdmirror.nbdclient.tcp_watch import tcp_info
from nbdmirror.nbdkit_host.hangup import Guests

KEEPALIVE_S = 300
"""Default time after which a guest without a sign of life is disconnected: longer than a network
switch needs to restart."""

PROBES = 5

UNANSWERED = 2
"""Unanswered retransmissions, or window probes: the answer to the last one may be on its way."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of tcp(7), in seconds."""

    idle_s: int
    interval_s: int
    probes: int

    @classmethod
    def within(cls, limit_s: int) -> Self:
        """Times with which a guest is disconnected `limit_s` seconds after its last sign of life,
        or a second later."""
        interval_s = max(1, limit_s // (2 * PROBES))
        probes = max(1, min(PROBES, limit_s // interval_s - 1))
        return cls(max(1, limit_s - probes * interval_s), interval_s, probes)


class Watch:
    """Probes `guests`, and disconnects them `limit_s` seconds after their last sign of life. Unless
    `is_exact`, the host's times (net.ipv4.tcp_keepalive_*) count if they are shorter."""

    def __init__(self, guests: Guests, limit_s: int, *, is_exact: bool) -> None:
        self._guests = guests
        self._limit_s = limit_s
        self._timing = Timing.within(limit_s)
        self._is_exact = is_exact
        self._thread = threading.Thread(target=self._run, name="nbdmirror-guests", daemon=True)

    def start(self) -> None:
        """Set the options on listening sockets, whose accepted sockets inherit them. Then check the
        connections regularly, until the process ends."""
        for listener in self._guests.listeners():
            with listener:
                self._ask(listener)
        self._thread.start()

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._timing.interval_s):
            for guest in self._guests.connections():
                with guest, suppress(OSError):  # already gone
                    self._look_at(guest)

    def _look_at(self, guest: socket.socket) -> None:
        if guest.family not in (socket.AF_INET, socket.AF_INET6):
            return
        if not guest.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            self._ask(guest)  # accepted before the listening socket had the options
        info = tcp_info(guest)
        silent_ms = min(info.last_data_ms, info.last_acknowledgement_ms)
        is_silent = silent_ms >= self._limit_s * 1000
        if is_silent and max(info.retransmits, info.probes) >= UNANSWERED:
            guest.shutdown(socket.SHUT_RDWR)

    def _ask(self, sock: socket.socket) -> None:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        for option, wanted in (
            (socket.TCP_KEEPIDLE, self._timing.idle_s),
            (socket.TCP_KEEPINTVL, self._timing.interval_s),
            (socket.TCP_KEEPCNT, self._timing.probes),
        ):
            if self._is_exact or wanted < sock.getsockopt(socket.IPPROTO_TCP, option):
                sock.setsockopt(socket.IPPROTO_TCP, option, wanted)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
