"""Request: a command in flight on a SharedConnection, and the report of its end."""

from __future__ import annotations

import _thread
import errno
from typing import Any, Protocol

from nbdmirror.devices.base import Buffer, Done
from nbdmirror.errors import DeviceError, DeviceLost


class Sender(Protocol):
    """The connection, as a request sees it."""

    def error(self, code: int) -> DeviceError: ...

    def finished(self, request: Request) -> None: ...


class Request:
    """A command in flight, and libnbd's completion callback for it. A blocking caller sleeps until
    the end; otherwise `done` is called.

    The request keeps the command's arguments, and so the buffer, alive until the end.
    """

    __slots__ = ("_arguments", "_connection", "_sleep", "done", "error", "is_finished")

    def __init__(self, connection: Sender, arguments: tuple[Any, ...], done: Done | None) -> None:
        self._connection = connection
        self._arguments = arguments
        self.done = done
        self.error: BaseException | None = None
        self.is_finished = False
        if done is None:
            self._sleep = _thread.allocate_lock()
            self._sleep.acquire()

    def __call__(self, code: Any) -> int:
        """libnbd's callback, with the handle locked: only records the result. 1 retires the
        command."""
        if code.value:
            self.error = self._connection.error(code.value)
        self.finish()
        return 1

    def finish(self) -> None:
        """The command has ended: report that to the connection."""
        self.is_finished = True
        self._arguments = ()
        self._connection.finished(self)
        if self.done is None:
            self.wake()

    def wake(self) -> None:
        """End the present `sleep`, or the next one."""
        if self.done is None:
            try:
                self._sleep.release()
            except RuntimeError:
                pass  # already awake

    def sleep(self) -> None:
        """Wait until `wake`."""
        self._sleep.acquire()

    def give_up(self, error: DeviceLost) -> None:
        """Wake the sleeping caller with `error`; libnbd keeps the arguments until the answer."""
        self.error = error
        self.is_finished = True
        self.wake()


class Parts:
    """Counts the bytes of a structured reply to a read. libnbd accepts a reply that leaves a part
    out."""

    def __init__(self, description: str, length: int) -> None:
        self._description = description
        self._missing_bytes = length

    def __call__(self, part: Buffer, *_: object) -> int:
        """libnbd's callback for each part."""
        self._missing_bytes -= len(part)
        return 0

    @property
    def error(self) -> DeviceError | None:
        """The error if data is missing at the end of the read; else None."""
        if not self._missing_bytes:
            return None
        return DeviceError(f"{self._description}: a reply lacks some data", errno.EIO)

    def check(self, done: Done) -> Done:
        """`done`, with that error if there is no other error."""
        return lambda error: done(error or self.error)


def nobody(error: BaseException | None) -> None:
    """The `done` of a request that no caller waits for. The request owns its buffer until then."""
