"""ConnectionPool: the connections of one NBD device, which thread uses which, and reconnects.

One SharedConnection always exists: the event loop's, which guests use too if there is no other. If
the server announces multi-conn, guests' threads get ExclusiveConnections beside it ("links"), as
many as they need (exclusive_set.py). If a disk's server is lost, a thread reconnects without a time
limit, while guests' requests wait for a bounded time. A mirror's target is reconnected by the job
(`reopen`, `replace`), which must know about the loss (rule 39).

No connection is cut while its server lives and has requests to answer: the server may carry them
out late, over newer data that came on another connection.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import nbd

from nbdmirror.backoff import Backoff
from nbdmirror.errors import ConfigError, DeviceLost
from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.demand import Demand
from nbdmirror.nbdclient.exclusive_connection import ExclusiveConnection
from nbdmirror.nbdclient.exclusive_set import CONNECTIONS_DEFAULT, ExclusiveSet
from nbdmirror.nbdclient.exclusive_unix import ExclusiveUnixConnection
from nbdmirror.nbdclient.handshake import ExportInfo, connect
from nbdmirror.nbdclient.shared_connection import SharedConnection
from nbdmirror.threads import start_thread

log = logging.getLogger(__name__)

AnyConnection = ExclusiveConnection | SharedConnection

CONNECT_TIMEOUT_S = 10.0
"""For connecting with the handshake, without an `open-timeout`. A reconnect may take as long as the
first connect."""

LINK_TIMEOUT_S = 1.0
LINK_PATIENCE = 3
"""For opening a further connection: so long, or so many times the time of the first handshake, if
that is longer. A server that is full answers late or never."""

RECONNECT_TIMEOUT_S = 2.0
"""How long guests' requests wait for a lost server before they fail, without a
`reconnect-delay`."""

LIFE_S = 10.0
"""How long to wait for a sign of life of a server that answers nothing."""

RECONNECT_PAUSE_S = 0.05, 1.0
"""First and longest pause between attempts to reconnect."""

LEFT_LOOK_S = 0.05
"""Interval at which a given-up link is checked."""

_LEFT = "%s: %d requests are not answered; no other connection writes there until they are"


class ConnectionPool:
    """Begins with one connection to an export that is as `announced`. `attach`, `detach` and
    `replace` are for the loop's thread, the other calls for any thread."""

    def __init__(
        self,
        uri: str,
        first: SharedConnection,
        announced: ExportInfo,
        *,
        on_reconnected: Callable[[], None],
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """`on_reconnected` is called after a reconnect: unflushed data may be lost. `timeout_s`:
        for each handshake."""
        self.shared = first
        self._uri = uri
        self._announced = announced
        self.left: tuple[AnyConnection, ...] = ()
        """Given-up connections, with requests that the server may still carry out."""
        self._retired: tuple[SharedConnection, ...] = ()
        """Earlier shared connections, with unanswered requests; and the last one, which a thread
        may still be leaving."""
        self._leaving: tuple[ExclusiveConnection, ...] = ()
        """The same for links."""
        self.links = ExclusiveSet(uri, self._connect_link, is_wanted=self._may_link)
        self.limit(CONNECTIONS_DEFAULT)
        self._demand = Demand()
        self._turns = itertools.count()
        self._sticky = threading.local()
        self._loop: Loop | None = None
        self._on_lost: Callable[[], None] | None = None
        self._changed = threading.Condition()  # guards what follows
        self._is_reconnecting = False
        self.reconnect_problem = ""  # why the last attempt failed, while lost
        self._lost_at_s = 0.0
        self.reconnect_timeout_s = RECONNECT_TIMEOUT_S
        self.timeout_s = timeout_s
        self.to_mirror = first.to_mirror
        self.generation = 0
        """Number of reconnects. A working connection has the last generation."""
        self._on_reconnected = on_reconnected
        self._closing = threading.Event()

    @property
    def is_lost(self) -> bool:
        """A connection is broken or closed, or its server ends."""
        return self.shared.is_refused or any(connection.is_lost for connection in self._all)

    @property
    def is_busy(self) -> bool:
        """Requests are in flight."""
        return any(connection.is_busy for connection in (*self._all, *self._old))

    @property
    def _all(self) -> tuple[AnyConnection, ...]:
        return (self.shared, *self.links.open)

    @property
    def _old(self) -> tuple[AnyConnection, ...]:
        return (*self._retired, *self._leaving)

    def pick(self) -> AnyConnection:
        """This thread's connection for a blocking request. With as many links as threads, no thread
        waits for another one's reply. Raises DeviceLost if no connection works."""
        links = self.links.open
        if not links:
            return self._pick_without_links()
        try:
            number: int = self._sticky.number
        except AttributeError:
            number = self._sticky.number = next(self._turns)
        link = links[number % len(links)]
        if self.links.may_grow and link.is_busy:
            self.links.ask()
        link.is_used = True
        return self._reconnect(link) if link.is_lost else link

    def _pick_without_links(self) -> SharedConnection:
        shared = self.shared
        if shared.is_lost:
            return self._reconnect(shared)
        if self._demand.grows(is_in_use=shared.is_busy, is_detour=self._loop is not None):
            self.links.ask()
        return shared

    def pick_shared(self) -> SharedConnection:
        """The connection with structured replies, for block status."""
        return self._reconnect(self.shared) if self.shared.is_lost else self.shared

    # The loop.

    def attach(self, loop: Loop, on_lost: Callable[[], None] | None) -> None:
        """Let `loop` drive the shared connection. `on_lost` is called when the connection breaks.
        Without `on_lost`, and without a loop, guests' threads replace lost connections. A mirror's
        target has no links yet."""
        self._loop, self._on_lost = loop, on_lost
        self.shared.on_lost = on_lost
        self.shared.attach(loop)

    def detach(self) -> None:
        """Return the shared connection to guests' threads."""
        self._loop = self._on_lost = None
        self.shared.on_lost = None
        links = self.links.open
        if any(isinstance(one, ExclusiveUnixConnection) for one in links):  # others follow
            self._leaving += self.links.begin_anew(self.generation)
            self._see_off()
        for connection in (self.shared, *self._retired):
            connection.detach()

    def limit(self, connections: int) -> None:
        """Open at most `connections`; one if the server does not announce multi-conn."""
        self.links.connections_max = connections if self._announced.can_multi_conn else 1

    def _may_link(self) -> bool:
        """Not while it is unknown whether the server is still the same."""
        return not self._closing.is_set() and not self.shared.is_lost and not self._is_reconnecting

    def _connect_link(self) -> ExclusiveConnection:
        timeout_s = max(LINK_TIMEOUT_S, LINK_PATIENCE * self.shared.handshake_s)
        handle = self._connect(min(self.timeout_s, timeout_s), for_data_alone=True)
        is_unix_target = self._on_lost is not None and not self.shared.watch.is_tcp
        kind = ExclusiveUnixConnection if is_unix_target else ExclusiveConnection
        return kind(handle, self._uri)

    def reopen(self) -> SharedConnection:
        """A new connection to the same disk, for `replace`. Blocks, as long as the first connect
        could. Raises ConfigError, also if the disk has changed: then it is not written to (rule
        40)."""
        return SharedConnection.opened_by(partial(self._connect, self.timeout_s), self._uri)

    def _connect(self, timeout_s: float, *, for_data_alone: bool = False) -> nbd.NBD:
        handle = connect(
            self._uri, timeout_s, for_data_alone=for_data_alone, to_mirror=self.to_mirror
        )
        now = ExportInfo.of(handle, self._uri)
        if not now.can_multi_conn:  # it may be another version, or behind something else
            self.links.connections_max = 1
        # A disk that is served, and has grown meanwhile, keeps the size that guests know.
        may_gain = self._on_lost is None
        if problem := self._announced.refusal(now, may_gain=may_gain, is_link=for_data_alone):
            with suppress(nbd.Error):
                handle.aio_disconnect(0)
            raise ConfigError(f"{self._uri}: {problem}")
        return handle

    def replace(self, connection: SharedConnection) -> None:
        """Use `connection` in place of all others. Nothing is in flight (`is_busy`)."""
        loop, on_lost = self._loop, self._on_lost
        self.detach()
        with self._changed:
            old, self.shared = self.shared, connection
            connection.generation = self.generation
        old.close()
        for link in self.links.begin_anew(self.generation):
            link.close()
        if loop is not None:
            self.attach(loop, on_lost)

    def look_at_peers(self, now_s: float) -> None:
        """Call this every tcp_watch.LOOK_S seconds, on the loop's thread."""
        for connection in (*self._all, *self._old, *self.left):
            connection.watch.look(now_s)

    def is_server_there(self) -> bool:
        """Whether the server greets another client. Blocks, for LIFE_S at most."""
        return self.shared.watch.is_server_there(LIFE_S)

    @property
    def unanswered(self) -> int:
        """Number of unanswered requests on given-up connections. Until they are answered, nothing
        may be written to the export on another connection: the server may do the old ones last."""
        return sum(one.unanswered for one in self.left)

    def give_up(self) -> None:
        """Attached: requests in flight fail at once, and the pool is lost. See `unanswered`."""
        loop, on_lost, shared = self._loop, self._on_lost, self.shared
        assert loop is not None
        if not shared.is_lost:
            absent = SharedConnection.absent(self._uri)
            absent.peer, absent.handshake_s = shared.peer, shared.handshake_s
            absent.generation, absent.on_lost = shared.generation, on_lost
            with self._changed:
                self.shared = absent
            absent.attach(loop)
            self.left += (shared,)
            shared.give_up(partial(self._is_over, shared))
            if on_lost is not None:
                loop.call_soon(on_lost)
        links = self.links.begin_anew(self.generation)  # no more are opened, since it is lost
        for link in links:
            link.give_up()
        self.left += tuple(link for link in links if not link.end())
        if self.unanswered:
            log.warning(_LEFT, self._uri, self.unanswered)
        if links:
            self._look_at_left(loop)

    def _look_at_left(self, loop: Loop) -> None:
        links = [one for one in self.left if isinstance(one, ExclusiveConnection)]
        for link in links:
            if link.end():
                self._is_over(link)
        if links:
            loop.call_later(LEFT_LOOK_S, partial(self._look_at_left, loop))

    def _is_over(self, connection: AnyConnection) -> None:
        self.left = tuple(one for one in self.left if one is not connection)

    def abandon(self) -> None:
        """Break every connection for ever: requests in flight fail and are not repeated."""
        self._end()
        for connection in (*self._all, *self._old, *self.left):
            connection.kill()

    def close(self) -> None:
        """Nothing may be in flight. Idempotent."""
        self._end()
        self.links.close()
        for connection in (self.shared, *self._old):
            connection.close()

    def _end(self) -> None:
        self._closing.set()
        self.links.stop()
        with self._changed:
            self._changed.notify_all()

    # A guest's thread that finds its connection lost.

    def _reconnect(self, lost: AnyConnection) -> SharedConnection:
        """As a rule all connections break together, and each loss is detected at the next use. That
        must not look like a second loss, of later writes. So the first detected loss counts for all
        connections, and all of them are replaced.

        Connections that still work are not cut: a request on one is answered there, and is not
        repeated. A request on the lost one is repeated at once if `shared` still works.

        For `reconnect_timeout_s` requests wait for the server; after that they fail at once, until
        the server is back. (As `reconnect-delay` of QEMU's driver.)"""
        with self._changed:
            if lost not in self._all:
                return self.shared  # closed as idle, or all were replaced
            if self._on_lost is not None or self._closing.is_set():
                raise DeviceLost(f"{self._uri}: connection lost")
            if not self._is_reconnecting:
                self._lost_at_s = time.monotonic()
                self._is_reconnecting, self.reconnect_problem = True, ""
                self._leaving += self.links.begin_anew(self.generation)
                start_thread(self._connect_again, "nbdmirror-reconnect")
            self._wait_for_reconnect()
            return self.shared

    def _wait_for_reconnect(self) -> None:
        """Wait until `shared` works; it may work already. Raises DeviceLost."""
        while self.shared.is_lost and self._is_reconnecting and not self._closing.is_set():
            left_s = self._lost_at_s + self.reconnect_timeout_s - time.monotonic()
            if left_s <= 0:
                break
            self._changed.wait(left_s)
        if self._closing.is_set() or self.shared.is_lost:
            raise DeviceLost(f"{self._uri}: connection lost")

    def _connect_again(self) -> None:
        """On a helper thread. An attempt in progress when requests begin to fail is finished: the
        server may be slow and not gone."""
        backoff, connection = Backoff(*RECONNECT_PAUSE_S), None
        while not self._closing.is_set() and self._on_lost is None:
            self._see_off()  # a server that ends accepts no client before these have left
            try:
                connection = self.reopen()
                break
            except ConfigError as error:
                is_late = time.monotonic() >= self._lost_at_s + self.reconnect_timeout_s
                if is_late and str(error) != self.reconnect_problem:
                    self.reconnect_problem = str(error)
                    log.error("%s: lost: %s", self._uri, error)
            self._closing.wait(backoff.next_s())
        if connection is not None:
            self._adopt(connection)
        with self._changed:
            self._is_reconnecting = False
            self._changed.notify_all()
        while not self._see_off() and not self._closing.wait(LEFT_LOOK_S):
            pass

    def _see_off(self) -> bool:
        """Close old connections that have no request any more. Returns whether none is left. From
        any number of threads."""
        is_done = True
        for link in self._leaving:
            if link.close_if_idle():
                with self._changed:
                    self._leaving = tuple(one for one in self._leaving if one is not link)
            else:
                is_done = False
        for connection in self._retired:
            if not connection.say_good_bye_if_idle():
                is_done = False
        return is_done

    def _adopt(self, connection: SharedConnection) -> None:
        """Serve guests from `connection`, unless a job has taken over, or the pool is closing."""
        loop, is_adopted = self._loop, False

        def swap() -> None:
            """On the loop's thread, if there is one."""
            nonlocal is_adopted
            if self._closing.is_set() or self._on_lost is not None:
                return
            before = self.shared
            self.generation += 1
            connection.generation = self.generation
            self._on_reconnected()  # before the new connection acknowledges anything
            self.shared = connection
            before.retire()
            idle = [one for one in self._retired if not one.is_busy]
            self._retired = (*(one for one in self._retired if one not in idle), before)
            for one in idle:
                one.close()
            if self._loop is not None:
                connection.attach(self._loop)
            is_adopted = True

        if loop is None:
            swap()
        else:
            loop.run(swap).result()
        if not is_adopted:
            connection.close()
            return
        with self._changed:
            self._leaving += self.links.begin_anew(self.generation)
        log.warning("%s: connected again", self._uri)
