"""Writer: the thread that writes a disk's state, and what becomes of its errors. Each disk has its
own, since it flushes the disk as well, and a disk may hang.

Calls are done one after the other, in the order of `submit`. From the event loop's thread, but for
`failed`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from nbdmirror.devices.base import Done
from nbdmirror.errors import IO_ERRORS
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.workers import Workers

log = logging.getLogger(__name__)

QUIET_S = 10.0
"""Errors that follow one another within this are told once."""


class Writer:
    def __init__(self, loop: Loop, events: EventRing, clock: Callable[[], float]) -> None:
        """`clock`: wall-clock seconds."""
        self.clock = clock
        self._loop = loop
        self._events = events
        self._thread = Workers("nbdmirror-state", 1)
        self._told_s = -QUIET_S
        self.error = ""
        """Why what is on disk is older than it should be; empty where it is not."""

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Do it soon. An error of the directory, or of a disk that is flushed, is told of."""
        future: Future[None] = Future()
        self._thread.submit(partial(self._do, call, future))
        return future

    def then(self, future: Future[None], done: Done) -> None:
        """Have `done` called on the loop's thread when that is done."""

        def tell(future: Future[None]) -> None:
            self._loop.call_soon(partial(done, future.exception()))

        future.add_done_callback(tell)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self._loop.call_later(delay_s, call)

    def failed(self, error: BaseException) -> None:
        """Tell that the state directory cannot be written. From any thread."""
        now_s = self._loop.clock()
        self.error = str(error)
        if now_s - self._told_s > QUIET_S:
            self._told_s = now_s
            log.error("state cannot be saved: %s; guests are still served", error)
            self._events.append("X_NBDMIRROR_STATE_ERROR", {"reason": str(error)})

    def stop(self, timeout_s: float) -> bool:
        """Wait for what was submitted; False if that takes longer. From any thread but the
        loop's."""
        return self._thread.wait(timeout_s)

    def _do(self, call: Callable[[], None], future: Future[None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - the future's owner gets it
            if isinstance(error, IO_ERRORS):
                self.failed(error)
            future.set_exception(error)
        else:
            self.error = ""
            future.set_result(None)
