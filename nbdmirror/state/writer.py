"""Writer: the thread that writes a disk's state, a thread that flushes the disk for that, and how
errors of both are reported. A disk has its own, since a disk may hang. A flush has a thread of its
own, since a flush may take long, and guests are held while a pivot is written down.

Calls run one after the other, in the order of `submit`; flushes in the order of `flush`. For the
event loop's thread, except `failed` and `no_spill`.
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
        self._flusher = Workers("nbdmirror-flush", 1)
        self._told_s = -QUIET_S
        self._error = ""
        self._began_s: dict[Workers, float] = {}
        """Since when the present call of each thread has run."""
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
        now_s = self._loop.clock()
        return now_s - min(list(self._began_s.values()), default=now_s)

    def look(self) -> None:
        """Report a write that does not end. Called about once a second."""
        if self._is_told or self._silent_s < TOLD_S:
            return
        self._is_told = True
        self._tell(self.problem)

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Run `call` on the writing thread. An error of the directory is reported."""
        return self._submit(self._thread, call)

    def flush(self, call: Callable[[], None]) -> Future[None]:
        """Run `call`, a flush of the disk, on the flushing thread. An error is reported."""
        return self._submit(self._flusher, call)

    def _submit(self, thread: Workers, call: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        thread.submit(partial(self._do, thread, call, future))
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

    def no_spill(self, error: OSError) -> None:
        """Report that a spill file cannot be created: the state is saved all the same. For any
        thread."""
        reason = f"no spill file: {error}; what guests overwrite is kept in memory alone"
        log.error("%s", reason)
        self._send(reason)

    def _tell(self, reason: str) -> None:
        log.error("state cannot be saved: %s; guests are still served", reason)
        self._send(reason)

    def _send(self, reason: str) -> None:
        self._events.append("X_NBDMIRROR_STATE_ERROR", {"reason": reason})

    def stop(self, timeout_s: float) -> bool:
        """Wait for all submitted calls, for `timeout_s` at most. Returns whether they are done. For
        any thread but the loop's."""
        until_s = self._loop.clock() + timeout_s
        is_flushed = self._flusher.wait(timeout_s)
        return self._thread.wait(max(0.0, until_s - self._loop.clock())) and is_flushed

    def _do(self, thread: Workers, call: Callable[[], None], future: Future[None]) -> None:
        self._began_s[thread] = self._loop.clock()
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
            self._note_end(thread)

    def _note_end(self, thread: Workers) -> None:
        took_s = self._silent_s
        del self._began_s[thread]
        if self._is_told and self._silent_s < TOLD_S:
            self._is_told = False
            log.warning("the state directory, or the disk, answers after %s", duration(took_s))
