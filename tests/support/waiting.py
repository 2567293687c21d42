"""How tests wait: for what can be polled, with a bound, and never for a guessed time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

START_S_MAX = 20.0
STOP_S_MAX = 10.0
WAIT_S_MAX = 30.0
POLL_S = 0.01


def wait_until(is_so: Callable[[], Any], what: str, timeout_s: float = WAIT_S_MAX) -> Any:
    """Poll until `is_so` gives something true, and return that."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := is_so()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)
    return found


class InThread:
    """A call in a thread of its own; `result` waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            self._error = error

    def has_ended_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self, timeout_s: float = WAIT_S_MAX) -> None:
        assert self.has_ended_within(timeout_s), "the request does not return"
        if self._error is not None:
            raise self._error
