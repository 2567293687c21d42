"""JobTimers: what a job waits for: steps that others do, timers by name, and its next attempt.

On the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.backoff import Backoff
from nbdmirror.devices.base import Done
from nbdmirror.event_loop import Loop, Timer

RETRY_S = 0.1, 5.0
"""The first and the longest wait before what has failed is tried again."""

RETRY = "retry"


class JobTimers:
    """`advance` is called after each step that has ended, well or not."""

    def __init__(self, loop: Loop, advance: Callable[[], None]) -> None:
        self._loop = loop
        self._advance = advance
        self._step: object | None = None
        self._by_name: dict[str, Timer] = {}
        self._backoff = Backoff(*RETRY_S)

    # A step: a scan, a reconnect, a flush. One at a time.

    def do(
        self,
        step: Callable[[Done], None],
        then: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Do `step`, and `then` if it ended well and nothing came between, or `failed`."""
        token = self._step = object()

        def done(error: BaseException | None) -> None:
            if self._step is token:
                self._step = None
                if error is not None:
                    failed(error)
                else:
                    then()
            self._advance()

        step(done)

    def abandon_step(self) -> None:
        """Its end means nothing any more."""
        self._step = None

    # Timers.

    def after(self, name: str, delay_s: float, call: Callable[[], None]) -> None:
        def fire() -> None:
            del self._by_name[name]
            call()

        self.cancel(name)
        self._by_name[name] = self._loop.call_later(delay_s, fire)

    def has(self, name: str) -> bool:
        return name in self._by_name

    def cancel(self, name: str) -> None:
        if (timer := self._by_name.pop(name, None)) is not None:
            timer.cancel()

    def cancel_all(self) -> None:
        for name in list(self._by_name):
            self.cancel(name)

    # The next attempt.

    def retry(self, call: Callable[[], None]) -> None:
        """Try again, later each time."""
        self.after(RETRY, self._backoff.next_s(), call)

    def went_well(self) -> None:
        """The next failure is a new one."""
        self._backoff.reset()
