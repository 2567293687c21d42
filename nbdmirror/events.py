"""A numbered ring of events between the jobs and the front ends (QMP, systemd).

Jobs append events; each reader keeps the number of its next event and pulls. `subscribe` only
reports new events, by a callback that must not block and is called without a lock: callbacks that
work under locks are how such servers deadlock. Readers are called after the step that appends:
their threads would compete for the GIL with a pivot while guests' writes are held.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EVENTS_KEPT_MAX = 4096
"""How far a reader may fall behind before it misses events (QMP then drops that client)."""


@dataclass(frozen=True, slots=True)
class Event:
    """One QMP event. `number` counts from 0 without gaps; `timestamp_s` is wall-clock time."""

    number: int
    name: str
    data: dict[str, Any]
    timestamp_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """A command's result, and the number of the next event at the command's end: earlier events are
    sent before the reply, later events after it."""

    value: Any
    next_event: int


class EventRing:
    """Thread-safe. The lock guards `_events` and `_next`; nothing is called under it."""

    def __init__(
        self,
        clock: Callable[[], float],
        call_soon: Callable[[Callable[[], None]], None] = lambda call: call(),
    ) -> None:
        """`call_soon`: runs a call after the present step, as a loop does; else at once."""
        self._clock = clock
        self._call_soon = call_soon
        self._is_told = False
        """Readers are about to be called."""
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT_MAX)
        self._next = 0
        self._wakers: tuple[Callable[[], None], ...] = ()

    @property
    def next_number(self) -> int:
        """The number of the next event: the start for a new reader."""
        return self._next

    def append(self, name: str, data: dict[str, Any]) -> None:
        with self._lock:
            self._events.append(Event(self._next, name, data, self._clock()))
            self._next += 1
        if not self._is_told:
            self._is_told = True
            self._call_soon(self._tell)

    def _tell(self) -> None:
        self._is_told = False  # before the readers pull: later events call them again
        for wake in self._wakers:
            wake()

    def pull(self, number: int) -> list[Event]:
        """The kept events from `number` on. If the first one has a greater number, some were
        missed."""
        with self._lock:
            behind = self._next - number
            return list(self._events)[-behind:] if behind > 0 else []

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` after new events, on any thread; once for those of one step. Returns a
        function that ends this."""
        with self._lock:
            self._wakers = (*self._wakers, wake)

        def unsubscribe() -> None:
            with self._lock:
                self._wakers = tuple(w for w in self._wakers if w is not wake)

        return unsubscribe
