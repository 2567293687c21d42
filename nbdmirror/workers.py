"""Workers: the threads that wait for one storage, so that no other thread has to.

They are daemons: a storage that hangs does not prevent the end of the process. They start when
there is work, and end soon after."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from nbdmirror.threads import start_thread

IDLE_S = 2.0
"""How long a thread waits for more work."""

Call = Callable[[], None]
"""A call that never raises."""


class Workers:
    """At most `count` threads with this name. For any thread; only `wait` blocks."""

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._count = count
        self._calls: deque[Call] = deque()
        self._last: Call | None = None
        self._threads = 0
        self._idle = 0
        self._changed = threading.Condition()  # guards all of the above; nothing is called under it

    def submit(self, call: Call) -> None:
        """Run `call` soon; with one thread, in the order of the calls."""
        with self._changed:
            self._calls.append(call)
            self._see_to_calls()

    def submit_last(self, call: Call) -> None:
        """Run `call` after all other calls have ended; no call may follow."""
        with self._changed:
            self._last = call
            self._see_to_last()

    def wait(self, timeout_s: float) -> bool:
        """Wait for all calls, for `timeout_s` at most. Returns whether they have ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_at_rest, timeout_s)

    @property
    def _is_at_rest(self) -> bool:
        return not self._calls and self._idle == self._threads

    def _see_to_calls(self) -> None:
        if len(self._calls) > self._idle and self._threads < self._count:
            self._threads += 1
            start_thread(self._run, self._name)
        self._changed.notify_all()

    def _see_to_last(self) -> None:
        if self._last is not None and self._is_at_rest:
            self._calls.append(self._last)
            self._last = None
            self._see_to_calls()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._see_to_last()
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._calls), IDLE_S)
                self._idle -= 1
                if not self._calls:
                    self._threads -= 1
                    return
                call = self._calls.popleft()
            call()
