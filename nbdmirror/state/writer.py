"""Writer: the thread that writes a disk's state, and reports its errors. Each disk has one, since
the thread flushes the disk as well, and a disk may hang.

Calls run one after the other, in the order of `submit`. For the event loop's thread, except
`failed`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from nbdmirror.amounts import duration
from nbdmirror.devices.base import Done
from nbdmirror.errors import IO_ERRORS
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.workers import Workers

log = logging.getLogger(__name__)

QUIET_S = 10.0
"""Errors within this time are reported once."""

SILENT_S, TOLD_S = 5.0, 30.0
"""A write that takes so long is a problem, and is reported after TOLD_S. A busy disk's flush may
take some seconds."""


class Writer:
    """The writer of one disk."""

    def __init__(self, loop: Loop, events: EventRing, clock: Callable[[], float]) -> None:
        """`clock`: wall-clock seconds."""
        self.clock = clock
        self._loop = loop
        self._events = events
        self._thread = Workers("nbdmirror-state", 1)
        self._told_s = -QUIET_S
        self._error = ""
        self._began_s: float | None = None
        """Since when the present call has run."""
        self._is_told = False

    @property
    def problem(self) -> str:
        """Why the state on disk is out of date; empty if it is not. For any thread."""
        if (silent_s := self._silent_s) < SILENT_S:
            return self._error
        text = f"the last write has not ended for {duration(silent_s)}"
        return f"{text}: the directory, or the disk, does not answer"

    @property
    def _silent_s(self) -> float:
        began_s = self._began_s
        return 0.0 if began_s is None else self._loop.clock() - began_s

    def look(self) -> None:
        """Report a write that does not end. Called about once a second."""
        if self._is_told or self._silent_s < TOLD_S:
            return
        self._is_told = True
        self._tell(self.problem)

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Run `call` on the thread. An error of the directory, or of a flush of the disk, is
        reported."""
        future: Future[None] = Future()
        self._thread.submit(partial(self._do, call, future))
        return future

    def then(self, future: Future[None], done: Done) -> None:
        """Call `done` on the loop's thread when `future` is done, with its error or None."""

        def tell(future: Future[None]) -> None:
            self._loop.call_soon(partial(done, future.exception()))

        future.add_done_callback(tell)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Run `call` on the loop's thread in `delay_s` seconds."""
        self._loop.call_later(delay_s, call)

    def failed(self, error: BaseException) -> None:
        """Report that the state directory cannot be written. For any thread."""
        now_s = self._loop.clock()
        self._error = str(error)
        if now_s - self._told_s > QUIET_S:
            self._told_s = now_s
            self._tell(self._error)

    def _tell(self, reason: str) -> None:
        log.error("state cannot be saved: %s; guests are still served", reason)
        self._events.append("X_NBDMIRROR_STATE_ERROR", {"reason": reason})

    def stop(self, timeout_s: float) -> bool:
        """Wait for all submitted calls, for `timeout_s` at most. Returns whether they are done. For
        any thread but the loop's."""
        return self._thread.wait(timeout_s)

    def _do(self, call: Callable[[], None], future: Future[None]) -> None:
        self._began_s = self._loop.clock()
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - the future's owner gets it
            if isinstance(error, IO_ERRORS):
                self.failed(error)
            future.set_exception(error)
        else:
            self._error = ""
            future.set_result(None)
        finally:
            self._note_end()

    def _note_end(self) -> None:
        self._began_s, took_s = None, self._silent_s
        if self._is_told:
            self._is_told = False
            log.warning("the state directory, or the disk, answers after %s", duration(took_s))
