"""SharedConnection: one libnbd handle, shared by guest threads (blocking) and the event loop
(asynchronous).

Any thread may start a request; libnbd serialises that. What must not be shared is waiting: a thread
inside libnbd's own poll holds the handle's lock and keeps all others out. So the handle is polled
from here, outside of libnbd, by one *driver* at a time:

 - the event loop while the connection is attached to one;
 - otherwise one of the guests' threads that wait (leader and followers). One thread alone drives
   its own request without any hand-over; many threads pipeline their requests on one connection.

Whoever drives wakes the others as their replies come. A connection that breaks fails each request
in flight with DeviceLost: the outcome of those is unknown.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import nbd

from nbdmirror.devices.base import Buffer, Done
from nbdmirror.errors import DeviceError, DeviceLost
from nbdmirror.event_loop import Loop
from nbdmirror.identity import Peer
from nbdmirror.nbdclient.handle_state import HandleState
from nbdmirror.nbdclient.handshake import connect, export_of, has_wide_lengths, reason, widen
from nbdmirror.nbdclient.request import Parts, Request, nobody
from nbdmirror.nbdclient.tcp_watch import TcpWatch

log = logging.getLogger(__name__)


class SharedConnection:
    """An NBD connection that is ready for commands. `handle` is libnbd's, for its `aio_...`
    methods."""

    def __init__(self, handle: nbd.NBD, description: str) -> None:
        self.handle = handle
        self.description = description
        self._handle_state = HandleState(handle)
        self.is_lost = not handle.aio_is_ready()
        self.generation = 0
        """The pool's."""
        self.to_mirror = False
        self.handshake_s = 0.0
        """How long it took to connect."""
        self.on_lost: Callable[[], None] | None = None
        """Called on the loop's thread when the connection broke while attached."""
        self.peer: Peer | None = None
        """What is at the other end (rule 44), also once the connection is broken; None: never."""
        self.is_wide = False
        """Lengths have 64 bits."""
        self.can_df = False
        """The server can be asked for a read in one piece, without parts left out."""
        self._fd: int = -1 if self.is_lost else handle.aio_get_fd()
        # Of our own: libnbd closes its own when the connection is broken, and the number is reused.
        self._socket = socket.socket() if self.is_lost else socket.socket(fileno=os.dup(self._fd))
        self._own_fd = self._socket.fileno()
        self.watch = TcpWatch(self._socket)
        widen(self._socket)
        with suppress(OSError, nbd.Error):  # it is lost again
            name, label, size = *export_of(handle), int(handle.get_size())
            self.peer = Peer.of(self._socket, description, export=name, label=label, size=size)
            self.is_wide = has_wide_lengths(handle)
            self.can_df = bool(handle.can_df())
        self._requests: set[Request] = set()
        self._reaped: list[Request] = []
        self._is_killed = False  # whoever drives finds out; at the latest who detaches
        self._is_retired = False
        self.is_refused = False
        """The server ends: it refuses further requests, and waits for its clients to leave."""
        self._when_over: Callable[[], None] | None = None
        self._loop: Loop | None = None
        self._lead = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wake_fd, select.POLLIN)
        if not self.is_lost:
            self._poll.register(self._own_fd, 0)

    @classmethod
    def open(cls, uri: str, timeout_s: float, *, to_mirror: bool = False) -> SharedConnection:
        """Connect within `timeout_s`, the handshake included. `to_mirror` as in `connect`. Raises
        ConfigError with one clear line."""
        opened = cls.opened_by(partial(connect, uri, timeout_s, to_mirror=to_mirror), uri)
        opened.to_mirror = to_mirror
        return opened

    @classmethod
    def opened_by(cls, connect: Callable[[], nbd.NBD], description: str) -> SharedConnection:
        """The connection that `connect` makes; raises what that does."""
        began_s = time.monotonic()
        connection = cls(connect(), description)
        connection.handshake_s = time.monotonic() - began_s
        return connection

    @classmethod
    def absent(cls, uri: str) -> SharedConnection:
        """One that is lost from the start, to be replaced: its server is not there yet."""
        return cls(nbd.NBD(), uri)

    @property
    def is_busy(self) -> bool:
        """Requests are in flight."""
        return bool(self._requests)

    @property
    def pending(self) -> frozenset[Request]:
        """The requests in flight. On the loop's thread, while attached."""
        return frozenset(self._requests)

    @property
    def unanswered(self) -> int:
        return len(self._requests)

    # Requests, from any thread.

    def start(
        self,
        method: Callable[..., int],
        *arguments: Any,
        flags: int = 0,
        done: Done | None = None,
    ) -> Request:
        """Start `method`, one of the handle's `aio_...`, with `arguments` and a completion
        callback.

        `done` is called on the loop's thread at the end; without it, call the request's `wait`.
        """
        request = Request(self, arguments, done)
        self._requests.add(request)
        if self._is_retired:  # after `add`: else `retire` has seen it
            request.error = self._lost()
            request.finish()
            if self._loop is not None:
                self._loop.call_soon(self._after_ready)
            return request
        try:
            method(*arguments, request, flags)
        except nbd.Error as error:
            if request in self._requests:
                request.error = self.error(error.errnum or errno.EIO, reason(error))
                request.finish()
            if done is not None and self._loop is not None:
                self._loop.call_soon(self._after_ready)
        if done is None and not self.is_lost and self._handle_state.mask() != select.POLLIN:
            self._wake_driver()  # it may wait to read only; or the handle has just died, for it too
        return request

    def call(self, method: Callable[..., int], *arguments: Any, flags: int = 0) -> None:
        """Start a request and wait for its end; raises its error."""
        request = self.start(method, *arguments, flags=flags)
        while not request.is_finished:
            if self._loop is None and self._lead.acquire(blocking=False):
                try:
                    self._drive_until(request)
                finally:
                    self._lead.release()
            else:
                request.sleep()
        if self._requests:
            self._appoint_leader()
        if request.error is not None and (loop := self._loop) is not None:
            loop.call_soon(self._after_ready)  # it finds out before it hears of this error
        elif request.error is not None or self.is_refused:
            self._look_whether_gone()
        if request.error is not None:
            raise request.error

    # ExclusiveConnection's requests, which block, in the same form.

    def read(self, buf: memoryview, offset: int) -> None:
        parts = Parts(self.description, len(buf))
        self.call(self.handle.aio_pread_structured, buf, offset, parts)
        if (error := parts.error) is not None:
            raise error

    def write(self, buf: Buffer, offset: int, flags: int = 0) -> None:
        if self._loop is not None:  # `give_up` lets the caller go, whose buffer that is
            buf = bytes(buf)
        self.call(self.handle.aio_pwrite, buf, offset, flags=flags)

    def zero(self, length: int, offset: int, flags: int) -> None:
        self.call(self.handle.aio_zero, length, offset, flags=flags)

    def trim(self, length: int, offset: int, flags: int) -> None:
        self.call(self.handle.aio_trim, length, offset, flags=flags)

    def cache(self, length: int, offset: int) -> None:
        self.call(self.handle.aio_cache, length, offset)

    def flush(self) -> None:
        self.call(self.handle.aio_flush)

    def finished(self, request: Request) -> None:
        """A request tells its end; its `done` is called later, outside of libnbd."""
        self._requests.discard(request)
        if request.done is not None and request.done is not nobody:
            self._reaped.append(request)

    def error(self, code: int, reason: str = "") -> DeviceError:
        """The exception for a failed command of this connection."""
        self.is_refused = self.is_refused or code == errno.ESHUTDOWN
        # libnbd's verdict on a command that was in flight on a dying handle is ENOTCONN.
        if self.is_refused or self.is_lost or code == errno.ENOTCONN or self._handle_state.is_gone:
            return self._lost()
        return DeviceError(f"{self.description}: {reason or os.strerror(code)}", code)

    def _lost(self) -> DeviceLost:
        return DeviceLost(f"{self.description}: connection lost")

    # The loop's side.

    def attach(self, loop: Loop) -> None:
        """Have `loop` drive from now on; on the loop's thread."""
        assert self._loop is None
        self._loop = loop
        os.eventfd_write(self._wake_fd, 1)
        if not self.is_lost:
            loop.attach(self)

    def detach(self) -> None:
        """Leave driving to the threads that wait; on the loop's thread, or when that has ended.
        Nobody hears any more of requests with a `done` that are in flight."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.detach(self)
        for request in [request for request in tuple(self._requests) if request.done is not None]:
            request.done = nobody
            self._requests.discard(request)
        self._reaped.clear()
        self.is_lost = self.is_lost or self._is_killed
        self._appoint_leader()

    def fileno(self) -> int:
        return self._fd

    def poll_mask(self) -> int:
        mask = self._handle_state.mask()
        if not mask and self._loop is not None:  # dead, and another thread found out
            self._loop.call_soon(self._after_ready)
        return mask

    def on_ready(self, mask: int) -> None:
        self._notify(mask)
        self._after_ready()

    def kill(self) -> None:
        """Break the connection now, from any thread: what is in flight fails, hung or not."""
        self._is_killed = True
        with suppress(OSError):  # broken already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._wake_driver()

    def retire(self, when_over: Callable[[], None] | None = None) -> None:
        """It takes no more requests; those in flight go on. If attached (then on the loop's
        thread), it is closed when each was answered, or the connection has ended by itself, and
        `when_over` is called; else see `say_good_bye_if_idle`."""
        self.on_lost = None
        self._is_retired = True
        if self._loop is not None:
            self._when_over = when_over or (lambda: None)
            self._loop.call_soon(self._after_ready)

    def say_good_bye_if_idle(self) -> bool:
        """Retired: give the server its place back, unless requests are in flight: then False. A
        thread may still be leaving it, so `close` comes later."""
        if self._requests:
            return False
        if self._loop is None and not self.is_lost:  # else the loop closes it
            self.is_lost = True
            with suppress(nbd.Error):  # it is gone
                self.handle.aio_disconnect(0)
        return True

    def give_up(self, when_over: Callable[[], None]) -> None:
        """On the loop's thread, attached. What is in flight fails at once, as when the connection
        breaks, but the connection stays (`retire`): the server may carry those requests out yet,
        and only an answer says that it has."""
        loop = self._loop
        assert loop is not None
        self.retire(when_over)
        for request in tuple(self._requests):
            if request.done is None:
                request.give_up(self._lost())
            else:
                done, request.done = request.done, nobody
                loop.call_soon(partial(done, self._lost()))

    def close(self) -> None:
        """Say good-bye and let go of the handle; nothing may be in flight. Idempotent."""
        self.detach()
        if not self.is_lost:
            self.is_lost = True
            with suppress(nbd.Error):  # it is gone
                self.handle.aio_disconnect(0)
            # libnbd's binding closes a handle when the last reference goes. In its place is one
            # that was never connected: its methods fail in order.
            self.handle = nbd.NBD()
            self._handle_state = HandleState(self.handle)
        self._socket.close()
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _after_ready(self) -> None:
        # Whoever hears of a lost request may want to connect again, and `is_lost` must tell by
        # then; a request that is started in answer to the one before may be what finds out.
        was_lost, left = self.is_lost, len(self._reaped)
        while self._reaped and (left or self._loop is None):
            left -= 1
            request = self._reaped.pop(0)
            assert request.done is not None
            if request.error is not None:
                self._look_whether_gone()
            request.done(request.error)
        if self._reaped and self._loop is not None:
            self._loop.call_soon(self._after_ready)  # started just now, and over: others' turn
        self._look_whether_gone()
        if self.is_lost and not was_lost and self.on_lost is not None:
            self.on_lost()
        is_over = not self._requests or (self.is_lost and not self.is_refused)
        if self._when_over is not None and is_over and not self._reaped:
            when_over, self._when_over = self._when_over, None
            self.close()
            when_over()

    def _look_whether_gone(self) -> None:
        if self.is_refused:
            self._leave()
        elif not self.is_lost and self._handle_state.is_gone:
            self.is_lost = True
            self._let_loop_go()

    def _leave(self) -> None:
        """The server has refused a request, since it ends. What it has not answered it may do late:
        so the connection stays until then. A mirror's target is replaced with `give_up`."""
        self.is_lost = self.is_lost or self.on_lost is None or not self._requests
        if not self._requests and not self._is_killed:
            self.kill()
            self._let_loop_go()

    def _let_loop_go(self) -> None:
        if self._loop is not None:
            self._loop.detach(self)

    # Driving.

    def _drive_until(self, request: Request) -> None:
        while not request.is_finished and self._loop is None:
            self._drive()

    def _drive(self) -> None:
        """One wait and what came of it; by the leader."""
        self._poll.modify(self._own_fd, self._handle_state.mask())
        for fd, mask in self._poll.poll():
            if fd == self._wake_fd:
                try:
                    os.eventfd_read(fd)
                except BlockingIOError:
                    pass  # the leader before has read it
            else:
                self._notify(mask)
        if (loop := self._loop) is not None:  # since now: what came may be its own
            loop.call_soon(self._after_ready)

    def _notify(self, mask: int) -> None:
        try:
            self._handle_state.notify(mask)
        except nbd.Error as error:  # dead: libnbd has failed every request, and only here tells why
            log.warning("%s: connection broken: %s", self.description, reason(error))

    def _wake_driver(self) -> None:
        if self._loop is not None:
            self._loop.wake()
        elif self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def _appoint_leader(self) -> None:
        """Wake one waiting thread, so that it may lead. Each thread does so when it leaves; so
        there is always a driver while requests wait."""
        while self._requests:
            try:
                request = next(iter(self._requests))
            except (RuntimeError, StopIteration):
                continue  # changed under the iterator: look again
            request.wake()
            return
