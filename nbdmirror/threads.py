"""Threads that start late rather than never, and none that starts while the process ends.

A process may have no thread left for a while: its user's limit, or its unit's (TasksMax), counts
the threads of guests too. What waits for a thread then would wait for ever, or fail without need.
So a thread that cannot be started is started later, by the event loop.

A thread that starts while CPython 3.11 ends itself may use its own state after that was freed, and
the process ends by SIGSEGV. Daemon threads run on until then, and may start others. So `end` comes
before that.

For any thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from nbdmirror.process_limits import no_thread

log = logging.getLogger(__name__)

AGAIN_S = 0.5
"""Pause between attempts."""

NO_THREAD = no_thread()


class Later(Protocol):
    """An event loop, which is always there."""

    def call_soon(self, call: Callable[[], None]) -> None: ...

    def call_later(self, delay_s: float, call: Callable[[], None]) -> object: ...


class Starter:
    """Starts threads. Without a loop, before a server starts and after its end, a thread that
    cannot be started is an error."""

    def __init__(self) -> None:
        self._loop: Later | None = None
        self._waiting: deque[tuple[Callable[[], None], str]] = deque()
        self._is_trying = False
        self._starting = threading.Lock()
        """Held while a thread starts."""
        self._has_ended = False

    def use(self, loop: Later | None) -> None:
        """Start what could not be started on the thread of `loop`, from now on."""
        self._loop = loop

    def end(self) -> None:
        """The process ends: no thread starts any more, and none is starting."""
        with self._starting:
            self._has_ended = True

    def start_now(self, target: Callable[[], None], name: str) -> threading.Thread:
        """Run `target` on a new thread, a daemon. Raises RuntimeError if no thread is left, or the
        process ends."""
        thread = threading.Thread(target=target, name=name, daemon=True)
        with self._starting:
            if self._has_ended:
                raise RuntimeError("the process ends")
            thread.start()  # returns when the thread runs
        return thread

    def start(self, target: Callable[[], None], name: str) -> bool:
        """Run `target` on a new thread, a daemon, now or later; never if the process ends. Returns
        whether it runs now. Raises RuntimeError if no thread is left and there is no loop."""
        try:
            self.start_now(target, name)
        except RuntimeError:
            if self._has_ended:
                return False
            if (loop := self._loop) is None:
                raise
            log.error("%s; trying again", NO_THREAD)
            self._waiting.append((target, name))
            loop.call_soon(lambda: self._try_later(loop))
            return False
        return True

    def _try_later(self, loop: Later) -> None:
        """On the loop's thread."""
        if not self._is_trying:
            self._is_trying = True
            loop.call_later(AGAIN_S, lambda: self._try_again(loop))

    def _try_again(self, loop: Later) -> None:
        self._is_trying = False
        try:
            while self._waiting:
                self.start_now(*self._waiting[0])
                self._waiting.popleft()
        except RuntimeError:
            self._try_later(loop)


_starter = Starter()
start_threads_on = _starter.use
start_thread = _starter.start
start_thread_now = _starter.start_now
start_no_more_threads = _starter.end
