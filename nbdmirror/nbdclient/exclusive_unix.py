"""ExclusiveUnixConnection: a link on a Unix socket whose server does not notice a give-up.

A thread in one of libnbd's blocking calls is freed when the socket is shut down for reading. Unlike
on TCP, the server at the other end of a Unix socket notices that, and cannot answer any more. But
only an answer shows that a write will not be carried out later. So here the thread waits in steps
of LOOK_MS, and checks whether it may leave. That costs one more turn at the GIL for each request.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import nbd

from nbdmirror.devices.base import Buffer
from nbdmirror.errors import DeviceLost
from nbdmirror.nbdclient.exclusive_connection import ExclusiveConnection

LOOK_MS = 100
"""How long a thread may wait after its request was given up."""


class ExclusiveUnixConnection(ExclusiveConnection):
    """As ExclusiveConnection: for any thread; one request at a time, others wait."""

    def __init__(self, handle: nbd.NBD, description: str) -> None:
        super().__init__(handle, description)
        self._cookie = 0
        """libnbd's cookie of the request in flight; 0 if there is none."""
        self._kept: Buffer = b""
        """The request's data, which libnbd may still send after the caller has left."""

    def read(self, buf: memoryview, offset: int) -> None:
        with self._lock:
            data = bytearray(len(buf))
            self._wait(self._handle.aio_pread, data, offset)
            buf[:] = data

    def write(self, buf: Buffer, offset: int, flags: int = 0) -> None:
        with self._lock:
            self._wait(self._handle.aio_pwrite, bytes(buf), offset, flags=flags)

    def zero(self, length: int, offset: int, flags: int) -> None:
        with self._lock:
            self._wait(self._handle.aio_zero, length, offset, flags=flags)

    def trim(self, length: int, offset: int, flags: int) -> None:
        with self._lock:
            self._wait(self._handle.aio_trim, length, offset, flags=flags)

    def cache(self, length: int, offset: int) -> None:
        with self._lock:
            self._wait(self._handle.aio_cache, length, offset)

    def flush(self) -> None:
        with self._lock:
            self._wait(self._handle.aio_flush)

    def give_up(self) -> None:
        self.is_lost = True
        if self._handle_state.direction() & nbd.AIO_DIRECTION_WRITE:
            self.kill()  # not wholly sent: the server does not carry it out

    def end(self) -> bool:
        if not self._lock.acquire(blocking=False):
            return False  # its owner leaves soon
        try:
            if self._cookie and not self._handle_state.is_gone:
                with suppress(nbd.Error):  # it is gone, and looked at again
                    self._handle.poll(0)
                    if not self._handle_state.completed(self._cookie):
                        return False
            self._say_good_bye()
            self._let_go()
            return True
        finally:
            self._lock.release()

    def _let_go(self) -> None:
        super()._let_go()
        self._cookie, self._kept = 0, b""

    def _wait(self, method: Callable[..., int], *arguments: Any, flags: int = 0) -> None:
        """Locked."""
        if self.is_lost:
            raise DeviceLost(f"{self.description}: connection lost")
        self._kept = arguments[0] if arguments else b""
        try:
            self._cookie = method(*arguments, flags=flags)
            while not (done := self._handle_state.completed(self._cookie)):
                if self.is_lost:
                    raise DeviceLost(f"{self.description}: connection lost")
                self._handle.poll(LOOK_MS)
        except nbd.Error as error:
            self._cookie = 0
            raise self._error(error) from error
        self._cookie = 0
        if done < 0:
            raise self._failure(*self._handle_state.error())
