"""ExclusiveConnection: one NBD connection for guests' threads, with libnbd's blocking calls.

A request is one call of libnbd, so the GIL is released once, and the kernel wakes the very thread
that waits for the reply. A request costs half of what it costs on a SharedConnection
(docs/measurements/2026-11-23.md). The price is one connection for each busy thread, so the server
needs multi-conn. Elsewhere in this package such a connection is called a link.

A link that breaks fails the request in flight with DeviceLost: its outcome is unknown.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import nbd

from nbdmirror.devices.base import Buffer
from nbdmirror.errors import DeviceError, DeviceLost
from nbdmirror.nbdclient.handle_state import HandleState
from nbdmirror.nbdclient.handshake import readable
from nbdmirror.nbdclient.tcp_watch import TcpWatch


class ExclusiveConnection:
    """Takes over `handle`, which is ready for requests. For any thread; one request at a time,
    others wait. Offsets and lengths are bytes. Requests raise DeviceLost if the connection is lost,
    DeviceError for the server's errors."""

    def __init__(self, handle: nbd.NBD, description: str) -> None:
        self.description = description
        self.is_lost = False
        self.is_used = True
        """Since the pool's last check for idle links."""
        self.generation = 0
        """The pool's generation at the connect."""
        self._handle = handle
        self._handle_state = HandleState(handle)
        # A duplicate, since libnbd closes its descriptor when it finds the connection broken.
        self._socket = socket.socket(fileno=os.dup(handle.aio_get_fd()))
        self.watch = TcpWatch(self._socket)
        self._lock = threading.Lock()  # guards what follows: held during a request
        self._is_unknown = False
        """The outcome of the last request is unknown."""

    @property
    def is_busy(self) -> bool:
        """A request is in flight."""
        return self._lock.locked()

    @property
    def unanswered(self) -> int:
        """Requests that the server may still carry out, after `give_up` and until `end`."""
        return 1

    def read(self, buf: memoryview, offset: int) -> None:
        with self._lock:
            try:
                buf[:] = self._handle.pread(len(buf), offset)
            except nbd.Error as error:
                raise self._error(error) from error

    def write(self, buf: Buffer, offset: int, flags: int = 0) -> None:
        with self._lock:
            try:
                self._handle.pwrite(buf, offset, flags)
            except nbd.Error as error:
                raise self._error(error) from error

    def zero(self, length: int, offset: int, flags: int) -> None:
        self._call(lambda handle: handle.zero(length, offset, flags))

    def trim(self, length: int, offset: int, flags: int) -> None:
        self._call(lambda handle: handle.trim(length, offset, flags))

    def cache(self, length: int, offset: int) -> None:
        self._call(lambda handle: handle.cache(length, offset))

    def flush(self) -> None:
        self._call(lambda handle: handle.flush())

    def kill(self) -> None:
        """Break the connection now, from any thread: the request in flight fails, hung or not."""
        self.is_lost = True
        with suppress(OSError):  # broken already
            self._socket.shutdown(socket.SHUT_RDWR)

    def give_up(self) -> None:
        """From any thread: the request in flight fails at once, without a message to the server,
        which may still carry it out; see `end`. Only a request that is not wholly sent is cut off:
        the server does not carry out such a request."""
        self.is_lost = True
        is_sending = self._handle_state.direction() & nbd.AIO_DIRECTION_WRITE
        with suppress(OSError):  # broken already
            self._socket.shutdown(socket.SHUT_RDWR if is_sending else socket.SHUT_RD)

    def end(self) -> bool:
        """After `give_up`, on TCP: close the connection if its request was answered or the server
        has ended the connection. Returns whether it is closed."""
        if not self._lock.acquire(blocking=False):
            return False  # its owner leaves soon
        try:
            if self._is_unknown and not self.watch.has_answered_or_ended():
                return False
            self._let_go()
            return True
        finally:
            self._lock.release()

    def close(self) -> None:
        """Disconnect in order, after the request in flight. Idempotent."""
        with self._lock:
            self._close()

    def close_if_idle(self) -> bool:
        """As `close`, but only if no request is in flight. Returns whether it is closed."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._close()
        finally:
            self._lock.release()
        return True

    def _close(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            self._say_good_bye()
        self._let_go()

    def _say_good_bye(self) -> None:
        with suppress(nbd.Error):  # the server is gone
            self._handle.aio_disconnect(0)

    def _let_go(self) -> None:
        # libnbd's binding closes a handle when its last reference goes. The handle that takes its
        # place was never connected: its methods fail in order.
        self._handle = nbd.NBD()
        self._handle_state = HandleState(self._handle)
        self._socket.close()

    def _call(self, call: Callable[[nbd.NBD], Any]) -> None:
        with self._lock:
            try:
                call(self._handle)
            except nbd.Error as error:
                raise self._error(error) from error

    def _error(self, error: Any) -> DeviceError:
        return self._failure(error.errnum, str(error.string))

    def _failure(self, code: int, text: str) -> DeviceError:
        """The error of a failed request; `code` and `text` are libnbd's. Locked."""
        # While it waits libnbd may find the socket broken, and leave the handle as it was.
        if self._handle_state.is_gone or code == errno.ENOTCONN:
            self.is_lost = self._is_unknown = True
        elif code == errno.ESHUTDOWN:  # the server ends, and waits for its clients to leave
            self.kill()
        if self.is_lost:
            return DeviceLost(f"{self.description}: connection lost: {readable(text)}")
        return DeviceError(f"{self.description}: {readable(text)}", code or errno.EIO)
