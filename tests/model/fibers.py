"""Fibers: guests' threads of which one runs at a time, and only while a test resumes it.

A fiber pauses wherever another thread may go on: the stand-ins below call `pause`. So the product's
code runs as it is, in any order of its steps, and the same resumes give the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_local = threading.local()


class Abandoned(BaseException):
    """The test has ended: so does the fiber, at its pause."""


class Fiber:
    """One guest's request. `call` runs up to its first pause at the first `resume`."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.where = "begin"
        self.fails_next = False
        """The I/O that it is at fails."""
        self.is_over = False
        self._error: BaseException | None = None
        self._is_abandoned = False
        self._call = call
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        threading.Thread(target=self._run, daemon=True).start()

    def resume(self) -> None:
        """Run to the next pause, or to the end. Raises what the fiber has raised."""
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        self._is_abandoned = True
        while not self.is_over:
            self._go.release()
            self._back.acquire()

    def pause_here(self, where: str) -> None:
        assert not FiberLock.held, f"{where} under a lock"
        self.where = where
        self._back.release()
        self._go.acquire()
        if self._is_abandoned:
            raise Abandoned

    def _run(self) -> None:
        _local.fiber = self
        self._go.acquire()
        try:
            if not self._is_abandoned:
                self._call()
        except Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001 - raised by `resume`
            self._error = error
        self.is_over = True
        self._back.release()


def pause(where: str) -> None:
    """Another thread may go on here. No effect on the event loop's thread."""
    if (fiber := current()) is not None:
        fiber.pause_here(where)


def current() -> Fiber | None:
    fiber: Fiber | None = getattr(_local, "fiber", None)
    return fiber


def fails_here() -> bool:
    """Whether the I/O that the fiber is at is to fail; once."""
    fiber = current()
    fails = fiber is not None and fiber.fails_next
    if fiber is not None:
        fiber.fails_next = False
    return fails


class FiberLock:
    """In place of a lock that is a leaf."""

    held = 0

    def __enter__(self) -> None:
        assert not FiberLock.held, "a lock is taken under a lock"
        FiberLock.held += 1

    def __exit__(self, *_: object) -> None:
        FiberLock.held -= 1


class FiberCondition:
    """In place of a condition on that lock. Who waits goes on only after it was notified."""

    def __init__(self, lock: FiberLock) -> None:
        self._lock = lock
        self._notified = 0

    def wait(self) -> None:
        seen = self._notified
        self._lock.__exit__()
        try:
            while self._notified == seen:
                pause("waiting")
        finally:
            self._lock.__enter__()

    def notify_all(self) -> None:
        self._notified += 1


class FiberEvent:
    """In place of the gate's event."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def wait(self) -> None:
        while not self._is_set:
            pause("gate")


class FiberSet(set[Any]):
    """In place of the ledger's set: other threads go on between a guest's announcement and its look
    at the gate."""

    def add(self, token: Any) -> None:
        super().add(token)
        pause("announced")
