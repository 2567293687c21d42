"""ConnectionPool: the connections of one NBD device: who uses which, and what becomes of lost ones.

One Connection is always there: the event loop's, and everybody's where there is no other. If the
server announces multi-conn, guests' threads get Links beside it, opened by a thread of their own
when the first guest asks. A lost connection of a device that guests are served from is opened again
by the guest's thread that finds it lost; of a mirror's target, by the job (`reopen`, `replace`),
which has to know (rule 39).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import nbd

from nbdmirror.connection import Connection
from nbdmirror.errors import ConfigError, DeviceLost
from nbdmirror.handshake import Announcement, connect
from nbdmirror.link import Link
from nbdmirror.loop import Loop

log = logging.getLogger(__name__)

LINKS_MAX = 8
"""As many as `nbdmirror serve` has threads a guest. Servers have limits of their own, and who takes
the last connection leaves none for others (qemu-nbd -e)."""

LINK_TIMEOUT_S = 1.0
"""For opening a further one: a server that is full answers late or never."""

PATIENCE_S = 2.0
"""How long guests' requests wait for a lost server before they fail, unless more was asked for."""

REVIVE_TIMEOUT_S = 2.0
"""For one attempt to connect again."""

REVIVE_PAUSE_S_MIN, REVIVE_PAUSE_S_MAX = 0.05, 1.0
"""Between attempts; and how long requests fail at once after the last of them."""


_LINKING = "nbdmirror-links"


def wait_for_handshakes() -> None:
    """Of a process that ends, when all pools are closed: a server that is left in the middle of a
    handshake complains."""
    for thread in threading.enumerate():
        if thread.name == _LINKING:
            thread.join(LINK_TIMEOUT_S)


class ConnectionPool:
    """Starts with one connection to an export that is as `announced`. `attach`, `detach` and
    `replace` are for the loop's thread, the rest for any."""

    def __init__(
        self,
        uri: str,
        first: Connection,
        announced: Announcement,
        *,
        on_revived: Callable[[], None],
    ) -> None:
        """`on_revived`: a guest's thread has connected again; what was not flushed may be lost."""
        self.shared = first
        self._uri = uri
        self._announced = announced
        self._retired: Connection | None = None
        """The one before `shared`, which a thread may still be leaving."""
        self._links: tuple[Link, ...] = ()
        self._turns = itertools.count()
        self._sticky = threading.local()
        self._loop: Loop | None = None
        self._on_lost: Callable[[], None] | None = None
        self._lock = threading.Lock()  # guards changes of the connections; one thread opens them
        self._linking: threading.Thread | None = None
        self.patience_s = PATIENCE_S
        self.generation = 0
        """Counts the times that a lost connection was opened again; one that works is of the last
        generation."""
        self._lost_at_s = 0.0
        self._revive_not_before_s = 0.0
        self._on_revived = on_revived
        self._closing = threading.Event()

    @property
    def is_lost(self) -> bool:
        """A connection is broken or closed."""
        return any(connection.is_lost for connection in self._all)

    @property
    def is_busy(self) -> bool:
        """Requests are in flight."""
        return any(connection.is_busy for connection in self._all)

    @property
    def _all(self) -> tuple[Link | Connection, ...]:
        return (self.shared, *self._links)

    def pick(self) -> Link | Connection:
        """This thread's connection for a blocking request: with as many as threads, nobody waits
        for another one's reply. Raises DeviceLost if there is none."""
        links = self._links
        if not links:
            self.open_links()
            return self.pick_shared()
        try:
            number: int = self._sticky.number
        except AttributeError:
            number = self._sticky.number = next(self._turns)
        link = links[number % len(links)]
        return self._revive_link(number) if link.is_lost else link

    def pick_shared(self) -> Connection:
        """The connection with structured replies, for block status."""
        return self._revive_shared() if self.shared.is_lost else self.shared

    # The loop.

    def attach(self, loop: Loop, on_lost: Callable[[], None] | None) -> None:
        """Have `loop` drive the shared connection; `on_lost` is called when it breaks. Without it
        the guests' threads replace lost ones, as they do while there is no loop."""
        self._loop, self._on_lost = loop, on_lost
        self.shared.on_lost = on_lost
        self.shared.attach(loop)

    def detach(self) -> None:
        """Give the connection back to the threads that wait."""
        self._loop = self._on_lost = None
        self.shared.on_lost = None
        self.shared.detach()

    # Coming and going.

    def open_links(self) -> None:
        """Begin to open links for guests' threads, unless that was done before, or the server
        supports no more than one connection."""
        if self._may_link:
            with self._lock:
                if self._may_link:
                    self._linking = threading.Thread(
                        target=self._open_links, name=_LINKING, daemon=True
                    )
                    self._linking.start()

    @property
    def _may_link(self) -> bool:
        return (
            self._linking is None and self._announced.can_multi_conn and not self._closing.is_set()
        )

    def _open_links(self) -> None:
        for number in range(LINKS_MAX):
            if self._closing.is_set() or self.shared.is_lost:
                return
            try:
                handle = self._connect(LINK_TIMEOUT_S, for_data_alone=True)
            except ConfigError as error:
                # It may announce multi-conn and yet take only so many.
                log.info("%s: goes on with %d connections: %s", self._uri, number + 1, error)
                return
            if not self._add_link(Link(handle, self._uri)):
                return

    def _add_link(self, link: Link) -> bool:
        """False if links are not wanted any more, or not this thread's."""
        with self._lock:
            is_wanted = not self._closing.is_set() and self._linking is threading.current_thread()
            if is_wanted:
                link.generation = self.generation
                self._links = (*self._links, link)
        if not is_wanted:
            link.close()
        return is_wanted

    def reopen(self, *, timeout_s: float) -> Connection:
        """A new connection to the same disk as before, for `replace`; blocking. Raises ConfigError:
        a disk that has changed is not written to (rule 40)."""
        return Connection(self._connect(timeout_s), self._uri)

    def _connect(self, timeout_s: float, *, for_data_alone: bool = False) -> nbd.NBD:
        handle = connect(self._uri, timeout_s, for_data_alone=for_data_alone)
        if change := self._announced.change(Announcement.of(handle, self._uri)):
            with suppress(nbd.Error):
                handle.aio_disconnect(0)
            raise ConfigError(f"{self._uri}: came back changed ({change}); it is not written to")
        return handle

    def replace(self, connection: Connection) -> None:
        """Use `connection` instead of all that there were; nothing is in flight (`is_busy`)."""
        loop, on_lost = self._loop, self._on_lost
        self.detach()
        with self._lock:
            old = self._all
            connection.generation = self.generation
            self.shared, self._links, self._linking = connection, (), None
        for one in old:
            one.close()
        if loop is not None:
            self.attach(loop, on_lost)

    def kill_if_busy(self) -> None:
        """Break the connections that have requests in flight: nobody waits for those any more."""
        for connection in self._all:
            if connection.is_busy:
                connection.kill()

    def kill(self) -> None:
        """Break every connection: what is in flight fails at once."""
        for connection in self._all:
            connection.kill()

    def abandon(self) -> None:
        """Break every connection, for good: what is in flight fails, and is not tried again."""
        self._closing.set()
        self.kill()

    def close(self) -> None:
        """Nothing may be in flight. Idempotent."""
        self._closing.set()
        for connection in self._all:
            connection.close()
        if self._retired is not None:
            self._retired.close()

    # A guest's thread that finds its connection lost.

    def _revive_link(self, number: int) -> Link | Connection:
        with self._lock:
            links = self._links
            if not links:  # the job has replaced all
                return self.shared
            index = number % len(links)
            lost = links[index]
            if not lost.is_lost:
                return lost  # opened again by another thread
            link = Link(self._connect_again(for_data_alone=True), self._uri)
            is_first = self._is_first_found(lost)
            link.generation = self.generation
            self._links = (*links[:index], link, *links[index + 1 :])
            if is_first:
                self._lose_all_but(link)
        lost.close()
        return link

    def _revive_shared(self) -> Connection:
        with self._lock:
            lost = self.shared
            if not lost.is_lost:
                return lost
            connection = Connection(self._connect_again(for_data_alone=False), self._uri)
            is_first = self._is_first_found(lost)
            connection.generation = self.generation

            def swap() -> None:
                """On the loop's thread."""
                lost.detach()
                self.shared = connection
                if self._loop is not None and not connection.is_attached:
                    connection.attach(self._loop)

            if self._loop is None:
                self.shared = connection
            # A loop that is attached meanwhile has been set by then, or finds the new one.
            if (loop := self._loop) is not None:
                loop.run(swap).result()
            retired, self._retired = self._retired, lost
            if retired is not None:
                retired.close()
            if is_first:
                self._lose_all_but(connection)
            return connection

    def _is_first_found(self, lost: Link | Connection) -> bool:
        """What breaks one connection breaks the others as a rule, and each is found lost when it is
        used next. That must not look like another loss, of what was written since. So there is one
        loss for all, when the first is found; those that still seem to work go as well."""
        is_first = lost.generation == self.generation
        if is_first:
            self.generation += 1
        return is_first

    def _lose_all_but(self, one: Link | Connection) -> None:
        for other in self._all:
            if other is not one:
                other.kill()
        self._on_revived()

    def _connect_again(self, *, for_data_alone: bool) -> nbd.NBD:
        """Until `patience_s` after the loss was found, requests wait for the server; after that
        they fail, each after one attempt in a second. (As `reconnect-delay` of QEMU's driver.)"""
        now_s = time.monotonic()
        if self._on_lost is not None or now_s < self._revive_not_before_s:
            raise DeviceLost(f"{self._uri}: connection lost")
        deadline_s = self._lost_at_s = self._lost_at_s or now_s
        deadline_s += self.patience_s
        pause_s = REVIVE_PAUSE_S_MIN
        while not self._closing.is_set():
            try:
                handle = self._connect(REVIVE_TIMEOUT_S, for_data_alone=for_data_alone)
                break
            except ConfigError as error:
                if time.monotonic() >= deadline_s:
                    self._revive_not_before_s = time.monotonic() + REVIVE_PAUSE_S_MAX
                    log.error("%s: lost: %s", self._uri, error)
                    raise DeviceLost(f"{self._uri}: {error}") from error
            self._closing.wait(pause_s)
            pause_s = min(REVIVE_PAUSE_S_MAX, pause_s * 2)
        else:
            raise DeviceLost(f"{self._uri}: connection lost")
        log.warning("%s: connected again", self._uri)
        self._lost_at_s = 0.0
        return handle
