"""Writer: the thread that writes to the state directory, and what becomes of its errors.

Calls are done one after the other, in the order of `submit`. From the event loop's thread, but for
`failed`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from nbdmirror.device import Done
from nbdmirror.errors import IO_ERRORS
from nbdmirror.events import EventRing
from nbdmirror.loop import Loop

log = logging.getLogger(__name__)

QUIET_S = 10.0
"""Errors that follow one another within this are told once."""


class Writer:
    def __init__(self, loop: Loop, events: EventRing, clock: Callable[[], float]) -> None:
        """`clock`: wall-clock seconds."""
        self.clock = clock
        self._loop = loop
        self._events = events
        self._thread = ThreadPoolExecutor(1, "nbdmirror-state")
        self._told_s = -QUIET_S
        self.error = ""
        """Why what is on disk is older than it should be; empty where it is not."""

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Do it soon. An error of the directory, or of a disk that is flushed, is told of."""
        return self._thread.submit(self._do, call)

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
            log.error("state cannot be saved: %s; guests go on", error)
            self._events.append("X_NBDMIRROR_STATE_ERROR", {"reason": str(error)})

    def stop(self) -> None:
        """Wait for what was submitted. From any thread but the loop's."""
        self._thread.shutdown()

    def _do(self, call: Callable[[], None]) -> None:
        try:
            call()
        except IO_ERRORS as error:
            self.failed(error)
            raise
        self.error = ""
