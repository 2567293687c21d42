"""Threads for the tests of Ledger and Tracker, with bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbdmirror.disk.tracker import Tracker

WAIT_S = 20.0
GRANULE = 512
SIZE = 16 * GRANULE + 100


@contextmanager
def running(*calls: Callable[[], None]) -> Iterator[None]:
    """Each call in a thread of its own, joined at the end; what they raise is raised here."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(WAIT_S)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"


def wait(event: threading.Event) -> None:
    assert event.wait(WAIT_S), "nobody came"


def count_waiting(tracker: Tracker, count: int) -> None:
    """Return when so many synchronous writes wait. They cannot tell themselves: they sleep."""
    for _ in range(1_000_000):
        with tracker._lock:
            if len(tracker._waiting) == count:
                return
    raise AssertionError("nobody waits")
