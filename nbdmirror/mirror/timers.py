"""JobTimers: what a job waits for: one asynchronous step, named timers, and the next attempt.

On the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.backoff import Backoff
from nbdmirror.devices.base import Done
from nbdmirror.event_loop import Loop, Timer

RETRY_S = 0.1, 5.0
"""First and longest wait before a failed attempt is repeated."""

RETRY = "retry"


class JobTimers:
    """`advance` is called after each step, whether it ended well or not."""

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
        """Do `step`, then `then`, or `failed` with its error. Neither is called if `abandon_step`
        or another step came in between."""
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
        """Ignore the end of the present step."""
        self._step = None

    # Timers.

    def after(self, name: str, delay_s: float, call: Callable[[], None]) -> None:
        """Call `call` in `delay_s` seconds. Replaces an earlier timer of this name."""

        def fire() -> None:
            del self._by_name[name]
            call()

        self.cancel(name)
        self._by_name[name] = self._loop.call_later(delay_s, fire)

    def has(self, name: str) -> bool:
        """Whether a timer of this name is running."""
        return name in self._by_name

    def cancel(self, name: str) -> None:
        """Stop the timer of this name, if it is running."""
        if (timer := self._by_name.pop(name, None)) is not None:
            timer.cancel()

    def cancel_all(self) -> None:
        for name in list(self._by_name):
            self.cancel(name)

    # The next attempt.

    def retry(self, call: Callable[[], None]) -> None:
        """Call `call` after a wait that grows with each failure."""
        self.after(RETRY, self._backoff.next_s(), call)

    def went_well(self) -> None:
        """The next failure begins with the first wait again."""
        self._backoff.reset()
