"""Loop: one thread that polls file descriptors, runs timers and posted calls.

Jobs and copiers run only on this thread, so they need no lock. This is not asyncio because the loop
is on the copy path and shares the GIL with the guest's threads: an iteration here is a poll(2) and
the callbacks.

`call_soon`, `call`, `run` and `wake` are for any thread; all other calls for the loop's thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Pollable(Protocol):
    """Something with a file descriptor that the loop watches."""

    def fileno(self) -> int:
        """The descriptor; it does not change while attached."""

    def poll_mask(self) -> int:
        """What to wait for now: POLLIN, POLLOUT, or 0. Called before each wait."""

    def on_ready(self, mask: int) -> None:
        """Handle the events of poll(2) in `mask`. Must not raise and must not block."""


class Timer:
    """A call at a later time; `cancel` is idempotent."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self._call = None

    def fire(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class Loop:
    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` is monotonic seconds."""
        self.clock = clock
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._watched: dict[int, tuple[Pollable, int]] = {}
        self._poll = select.poll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake_fd, select.POLLIN)
        self._is_woken = False
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, a daemon, so that it never prevents the end of the process."""
        self._thread = threading.Thread(target=self._main, name="nbdmirror-loop", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread after its present call; posted calls are dropped. Waits for
        `timeout_s`."""
        self._is_stopping = True
        self.wake()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Run `call` on the loop's thread, soon. For any thread; never blocks."""
        self._posted.append(call)
        self.wake()

    def call(self, call: Callable[[], None], timeout_s: float) -> None:
        """As `call_soon`, and wait for its end, for `timeout_s` at most. For other threads."""
        done = threading.Event()

        def step() -> None:
            try:
                call()
            finally:
                done.set()

        self.call_soon(step)
        done.wait(timeout_s)

    def run(self, call: Callable[[], Result]) -> Future[Result]:
        """Run `call` on the loop's thread; the future gets its result or its exception."""
        future: Future[Result] = Future()

        def step() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - the future's owner gets it
                future.set_exception(error)

        self.call_soon(step)
        return future

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        heapq.heappush(self._timers, (self.clock() + delay_s, next(self._order), timer))
        return timer

    def attach(self, pollable: Pollable) -> None:
        fd = pollable.fileno()
        self._watched[fd] = (pollable, 0)
        self._poll.register(fd, 0)

    def detach(self, pollable: Pollable) -> None:
        fd = next((fd for fd, (p, _) in self._watched.items() if p is pollable), None)
        if fd is not None:
            del self._watched[fd]
            self._poll.unregister(fd)

    def wake(self) -> None:
        """Make the loop read all poll masks again. For any thread."""
        if not self._is_woken:
            self._is_woken = True
            os.eventfd_write(self._wake_fd, 1)

    def _main(self) -> None:
        while not self._is_stopping:
            try:
                self.run_once()
            except Exception:
                # A bug in one callback must not end the mirrors of all disks.
                log.exception("error in the event loop")

    def run_once(self, timeout_max_s: float | None = None) -> None:
        """One iteration: wait for at most `timeout_max_s`, then run what is ready, due and
        posted."""
        ready = self._poll.poll(self._prepare(timeout_max_s))
        for fd, mask in ready:
            if fd == self._wake_fd:
                os.eventfd_read(fd)
            elif fd in self._watched:
                self._watched[fd][0].on_ready(mask)
        # Cleared before the queue is drained: a call posted from here on writes the eventfd again.
        self._is_woken = False
        for _ in range(len(self._posted)):
            self._posted.popleft()()
        now = self.clock()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].fire()

    def _prepare(self, timeout_max_s: float | None) -> float | None:
        """Pass the poll masks to poll(2). Returns the time to wait in milliseconds."""
        for fd, (pollable, known) in self._watched.items():
            mask = pollable.poll_mask()
            if mask != known:
                self._poll.modify(fd, mask)
                self._watched[fd] = (pollable, mask)
        if self._posted:
            return 0
        waits = [] if timeout_max_s is None else [timeout_max_s]
        if self._timers:
            waits.append(max(0.0, self._timers[0][0] - self.clock()))
        return min(waits) * 1000 if waits else None
