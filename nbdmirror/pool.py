"""ConnectionPool: the connections of one NBD device: who uses which, and what becomes of lost ones.

A server that announces multi-conn is used by several connections, opened little by little; else one
serves everybody. A lost connection of a device that guests are served from is opened again by the
guest's thread that finds it lost; of a mirror's target, by the job (`reopen`, `replace`), which has
to know (rule 39).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

import nbd

from nbdmirror.connection import Connection
from nbdmirror.errors import ConfigError, DeviceLost
from nbdmirror.loop import Loop

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 8
"""For guest threads, where the server supports several: more than nbdkit's busy threads gains
nothing."""

REVIVE_TIMEOUT_S = 2.0
"""How long a guest's request waits for a lost server before it fails."""

REVIVE_PAUSE_S = 1.0
"""After an attempt that failed, requests fail at once for this long."""


class ConnectionPool:
    """Starts with one connection. `attach`, `detach`, `adopt` and `replace` are for the loop's
    thread, the rest for any."""

    def __init__(self, uri: str, first: Connection) -> None:
        self._uri = uri
        self._announced = _announcement(first)
        self._connections = [first]
        self._turns = itertools.count()
        self._sticky = threading.local()
        self._loop: Loop | None = None
        self._on_lost: Callable[[], None] | None = None
        self._revive_lock = threading.Lock()  # one thread opens a connection, the others wait
        self._revive_not_before_s = 0.0
        self._is_closed = False

    @property
    def size(self) -> int:
        """Connections, dead ones included."""
        return len(self._connections)

    @property
    def is_lost(self) -> bool:
        """A connection is broken or closed."""
        return any(connection.is_lost for connection in self._connections)

    @property
    def is_busy(self) -> bool:
        """Requests are in flight."""
        return any(connection.is_busy for connection in self._connections)

    def pick(self) -> Connection:
        """This thread's connection, for a blocking request: with as many as threads, nobody waits
        for another one's reply. Raises DeviceLost if there is none."""
        connections = self._connections
        if len(connections) == 1:
            connection = connections[0]
        else:
            try:
                number: int = self._sticky.number
            except AttributeError:
                number = self._sticky.number = next(self._turns)
            connection = connections[number % len(connections)]
        return self._revive() if connection.is_lost else connection

    def next(self) -> Connection:
        """The next connection in turn that lives, for an asynchronous request; a dead one, whose
        requests fail, if none does."""
        connections = self._connections
        for _ in connections:
            connection = connections[next(self._turns) % len(connections)]
            if not connection.is_lost:
                break
        return connection

    # The loop.

    def attach(self, loop: Loop, on_lost: Callable[[], None] | None) -> None:
        """Have `loop` drive the connections; `on_lost` is called when one breaks. Without it the
        guests' threads replace lost ones, as they do while there is no loop."""
        self._loop, self._on_lost = loop, on_lost
        for connection in self._connections:
            connection.on_lost = on_lost
            connection.attach(loop)

    def detach(self) -> None:
        """Give the connections back to the threads that wait."""
        self._loop = self._on_lost = None
        for connection in self._connections:
            connection.on_lost = None
            connection.detach()

    # Coming and going.

    def open_another(self, *, timeout_s: float) -> Connection | None:
        """One more connection, for `adopt`; blocking. None where the server supports no more: it
        may announce multi-conn and yet take only so many (qemu-nbd -e N leaves the next one
        waiting)."""
        if not self._connections[0].handle.can_multi_conn() or self.is_lost:
            return None
        try:
            return self.reopen(timeout_s=timeout_s)
        except ConfigError as error:
            log.info("%s: goes on with %d connections: %s", self._uri, self.size, error)
            return None

    def adopt(self, connection: Connection) -> None:
        """Use `connection` as well."""
        if self.is_lost:
            connection.close()
            return
        if self._loop is not None:
            connection.on_lost = self._on_lost
            connection.attach(self._loop)
        self._connections = [*self._connections, connection]

    def reopen(self, *, timeout_s: float) -> Connection:
        """A new connection to the same disk as before; blocking. Raises ConfigError: a disk that
        has changed is not written to (rule 40)."""
        connection = Connection.open(self._uri, timeout_s)
        for what, before, now in zip(
            _ANNOUNCED, self._announced, _announcement(connection), strict=True
        ):
            if before != now:
                connection.close()
                raise ConfigError(
                    f"{self._uri}: came back changed ({what} was {before}, is {now}); it is not "
                    f"written to"
                )
        return connection

    def replace(self, connection: Connection) -> None:
        """Use `connection` instead of all that there were; nothing is in flight (`is_busy`)."""
        loop, on_lost = self._loop, self._on_lost
        self.detach()
        for old in self._connections:
            old.close()
        self._connections = [connection]
        if loop is not None:
            self.attach(loop, on_lost)

    def kill_if_busy(self) -> None:
        """Break the connections that have requests in flight: nobody waits for those any more."""
        for connection in self._connections:
            if connection.is_busy:
                connection.kill()

    def kill(self) -> None:
        """Break every connection: what is in flight fails at once."""
        for connection in self._connections:
            connection.kill()

    def close(self) -> None:
        """Nothing may be in flight. Idempotent."""
        self._is_closed = True
        for connection in self._connections:
            connection.close()

    def _revive(self) -> Connection:
        with self._revive_lock:
            for connection in self._connections:
                if not connection.is_lost:
                    return connection
            now_s = time.monotonic()
            if self._on_lost is not None or self._is_closed or now_s < self._revive_not_before_s:
                raise DeviceLost(f"{self._uri}: connection lost")
            try:
                connection = self.reopen(timeout_s=REVIVE_TIMEOUT_S)
            except ConfigError as error:
                self._revive_not_before_s = time.monotonic() + REVIVE_PAUSE_S
                log.error("%s: lost: %s", self._uri, error)
                raise DeviceLost(f"{self._uri}: {error}") from error
            log.warning("%s: connected again", self._uri)
            loop = self._loop
            if loop is not None:
                loop.run(lambda: self.replace(connection)).result()
            else:
                self._connections = [connection]
            return connection


_ANNOUNCED = ("size", "read-only", "flush", "FUA", "write-zeroes", "minimum block size")


def _announcement(connection: Connection) -> tuple[int, bool, bool, bool, bool, int]:
    """What a server said of its disk that we rely on."""
    handle = connection.handle
    return (
        handle.get_size(),
        bool(handle.is_read_only()),
        bool(handle.can_flush()),
        bool(handle.can_fua()),
        bool(handle.can_zero()),
        handle.get_block_size(nbd.SIZE_MINIMUM) or 1,
    )
