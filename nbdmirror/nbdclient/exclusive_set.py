"""ExclusiveSet: the links of one NBD device: opened as guests need them, and given back.

A server has a limited number of places for clients, and does not report the number. Other clients
need places too: the host that a guest moves to, a backup, a user who examines the disk. So there is
no link at first. The first one is opened when guests are at work (demand.py). More are opened, up
to a bound, while requests wait for each other on those that there are. After each one the set
checks for room for one more, and gives places back if there is none. Links that were not used for a
while are closed.

A helper thread opens links; it runs as long as it has work. No request waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from nbdmirror.errors import ConfigError
from nbdmirror.nbdclient.exclusive_connection import ExclusiveConnection
from nbdmirror.threads import start_thread

log = logging.getLogger(__name__)

CONNECTIONS_DEFAULT = 9
"""The shared connection, and a link for each thread that `nbdmirror serve` has for a guest. With
fewer, threads wait for one another: with five links a guest had a third fewer requests."""

IDLE_S = 5.0
"""An unused link is closed after this time."""

GIVEN_BACK = 2
"""Links that are closed when a server has no room for more: a guest's next host needs one place,
and another one for its check of the disk."""

FULL_S = 300.0
"""How long no link is opened after a server had no room."""

END_S_MAX = 1.0
"""How long to wait for a handshake in progress when the process ends."""

_NAME = "nbdmirror-links"


def wait_for_handshakes() -> None:
    """Wait for handshakes in progress at the end of the process, after all pools are closed: a
    server logs an error if a client leaves in the middle of a handshake."""
    for thread in threading.enumerate():
        if thread.name == _NAME:
            thread.join(END_S_MAX)


class ExclusiveSet:
    """The links of one pool. For any thread."""

    def __init__(
        self,
        description: str,
        connect: Callable[[], ExclusiveConnection],
        *,
        is_wanted: Callable[[], bool],
    ) -> None:
        """`connect` opens a further connection, and raises ConfigError. While `is_wanted` returns
        False, no link is opened."""
        self.open: tuple[ExclusiveConnection, ...] = ()
        self._leaving: tuple[ExclusiveConnection, ...] = ()
        """Links that are closed after their requests in flight."""
        self.may_grow = True
        """Whether `ask` can have an effect."""
        self.connections_max = CONNECTIONS_DEFAULT
        """Most connections, including the shared one."""
        self._description = description
        self._connect = connect
        self._is_wanted = is_wanted
        self._lock = threading.Lock()  # guards changes of `open`, and the thread
        self._has_thread = False
        self._asked = threading.Event()
        self._generation = 0
        self._epoch = 0
        """Number of calls of `begin_anew`: links that were requested before a call are dropped."""
        self._full_until_s = 0.0
        self._is_closed = False

    def ask(self) -> None:
        """A request has to wait: open one more link soon, if that is allowed."""
        if self._asked.is_set() or not self.may_grow:
            return
        with self._lock:
            if self._is_closed or 1 + len(self.open) >= self.connections_max:
                self.may_grow = False
                return
            self._asked.set()
            if not self._has_thread:
                self._has_thread = True
                start_thread(self._run, _NAME)

    def begin_anew(self, generation: int) -> tuple[ExclusiveConnection, ...]:
        """Begin the pool's next generation without links. Returns the old links; the caller closes
        them."""
        with self._lock:
            links, self.open = (*self.open, *self._leaving), ()
            self._generation = generation
            self._epoch += 1
            self.may_grow = not self._is_closed
            self._full_until_s = 0.0
        return links

    def stop(self) -> None:
        """Open no more links; the helper thread ends."""
        with self._lock:
            self._is_closed, self.may_grow = True, False
        self._asked.set()

    def close(self) -> None:
        """Nothing may be in flight. Idempotent."""
        self.stop()
        with self._lock:
            links, self.open = self.open, ()
        for link in links:
            link.close()

    # The thread.

    def _run(self) -> None:
        looked_s = time.monotonic()
        while True:
            is_asked = self._asked.wait(IDLE_S)
            self._asked.clear()
            if is_asked and self.may_grow:  # may have changed since `ask`
                self._grow()
            now_s = time.monotonic()
            if now_s - looked_s >= IDLE_S:
                looked_s = now_s
                self._close_idle()
            with self._lock:
                if self._full_until_s and now_s >= self._full_until_s:
                    self._full_until_s, self.may_grow = 0.0, True
                is_done = not self.open and not self._full_until_s and not self._asked.is_set()
                if is_done or self._is_closed:
                    self._has_thread = False
                    return

    def _grow(self) -> None:
        epoch = self._epoch
        link = self._open_one(epoch)
        if link is not None and self._add(link, epoch):
            spare = self._open_one(epoch)  # is there room for another client?
            if spare is not None:
                spare.close()

    def _open_one(self, epoch: int) -> ExclusiveConnection | None:
        if not self._is_wanted():
            return None
        try:
            return self._connect()
        except ConfigError as error:
            if self._is_wanted() and epoch == self._epoch:
                self._give_back(error)
            return None

    def _add(self, link: ExclusiveConnection, epoch: int) -> bool:
        """Add the link, or close it if links of this epoch are not wanted any more. Returns whether
        it was added."""
        with self._lock:
            is_wanted = not self._is_closed and epoch == self._epoch
            if is_wanted:
                link.generation = self._generation
                self.open = (*self.open, link)
                self.may_grow = 1 + len(self.open) < self.connections_max
        if not is_wanted:
            link.close()
        return is_wanted

    def _give_back(self, error: ConfigError) -> None:
        with self._lock:
            kept, given = self.open[:-GIVEN_BACK], self.open[-GIVEN_BACK:]
            self.open, self._leaving = kept, given
            self.may_grow = False
            self._full_until_s = time.monotonic() + FULL_S
        text = "%s: accepts no further connection: continuing with %d (%s)"
        log.info(text, self._description, 1 + len(kept), error)
        self._close_leaving()

    def _close_idle(self) -> None:
        with self._lock:
            idle = [link for link in self.open if not link.is_used and not link.is_busy]
            self.open = tuple(link for link in self.open if link not in idle)
            if idle and not self._full_until_s:
                self.may_grow = not self._is_closed
            for link in self.open:
                link.is_used = False
            self._leaving = tuple(idle)
        self._close_leaving()

    def _close_leaving(self) -> None:
        for link in self._leaving:
            with suppress(OSError):
                link.close()
        self._leaving = ()
