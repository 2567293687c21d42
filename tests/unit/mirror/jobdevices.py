"""A loop whose clock stands still until a test lets time pass, and disks in memory whose requests a
test may hold back, fail or give up: what a mirror job is made of in jobparts.py."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

from nbdmirror.devices.base import Done, Extent, ExtentsDone, MemoryDevice
from nbdmirror.errors import DeviceLost
from nbdmirror.event_loop import Timer

TURNS_MAX = 10_000
"""A loop that is still not at rest after so many turns never will be."""


class StillLoop:
    """An event loop for one thread. `settle` does all that can be done now, `pass_s` lets time go
    by, from timer to timer."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self.after_step: list[Callable[[], object]] = []
        """Called whenever something was done."""

    def clock(self) -> float:
        return self.now_s

    def call_soon(self, call: Callable[[], None]) -> None:
        self._posted.append(call)

    def call(self, call: Callable[[], None], timeout_s: float) -> None:
        self.call_soon(call)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        heapq.heappush(self._timers, (self.now_s + delay_s, next(self._order), timer))
        return timer

    @property
    def is_asleep(self) -> bool:
        """Nothing happens before somebody calls."""
        return not self._posted and not any(timer._call for _, _, timer in self._timers)

    def settle(self) -> None:
        for _ in range(TURNS_MAX):
            if not self._posted:
                return
            self._step(self._posted.popleft())
        raise AssertionError("the loop is never at rest")

    def _step(self, call: Callable[[], None]) -> None:
        call()
        for look in self.after_step:
            look()

    def pass_s(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        self.settle()
        while self._timers and self._timers[0][0] <= until_s:
            at_s, _, timer = heapq.heappop(self._timers)
            self.now_s = max(self.now_s, at_s)
            self._step(timer.fire)
            self.settle()
        self.now_s = until_s


class Requests:
    """Requests of the copier's. Those of a kind in `holds` wait in `held`; the others are answered
    in the next turn, or after the time that `delays_s` has for their kind. `errors`: what requests
    of a kind end with, when they are answered."""

    def __init__(self, loop: StillLoop) -> None:
        self.loop = loop
        self.holds: set[str] = set()
        self.held: list[tuple[str, Callable[[], None]]] = []
        self.errors: dict[str, BaseException] = {}
        self.delays_s: dict[str, float] = {}
        self.started: list[str] = []
        self.is_lost = False
        self._in_flight: dict[object, tuple[str, Done]] = {}

    def start(self, kind: str, effect: Callable[[], None], done: Done) -> None:
        self.started.append(kind)
        token = object()
        self._in_flight[token] = kind, done

        def end() -> None:
            if self._in_flight.pop(token, None) is None:
                return  # given up
            error = DeviceLost(f"{kind}: lost") if self.is_lost else self.errors.get(kind)
            if error is None:
                effect()
            done(error)

        if kind in self.holds and not self.is_lost:
            self.held.append((kind, end))
        elif kind in self.delays_s:
            self.loop.call_later(self.delays_s[kind], end)
        else:
            self.loop.call_soon(end)

    def answer(self, kind: str, count: int = 1) -> None:
        """The oldest of those that are held."""
        for _ in range(count):
            found = next(one for one in self.held if one[0] == kind)
            self.held.remove(found)
            found[1]()
        self.loop.settle()

    def answer_all(self) -> None:
        self.holds.clear()
        while self.held:
            self.answer(self.held[0][0])

    def give_up(self) -> None:
        """What ConnectionPool.give_up does: all fails at once, and what comes later too."""
        self.is_lost = True
        in_flight, self._in_flight = self._in_flight, {}
        self.held.clear()
        for kind, done in in_flight.values():
            done(DeviceLost(f"{kind}: given up"))


class Source(MemoryDevice):
    """No zeroes anywhere. `requests`: reads and questions for extents."""

    def __init__(self, loop: StillLoop, size: int) -> None:
        super().__init__(size, description="source")
        self.pwrite((bytes(range(1, 252)) * (size // 251 + 1))[:size], 0)
        self.requests = Requests(loop)

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        self.requests.start("read", lambda: self.pread(buf, offset), done)

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        found: list[Extent] = []
        effect = lambda: found.extend(self.extents(offset, length))  # noqa: E731
        self.requests.start("extents", effect, lambda error: done(None if error else found, error))


class MemoryTarget(MemoryDevice):
    """A target. `requests`: writes, zeroes and flushes of the copier's."""

    def __init__(self, loop: StillLoop, size: int) -> None:
        super().__init__(size, description="target")
        self.data[:] = b"\xee" * size
        self.requests = Requests(loop)
        self.times_given_up = 0
        self.guests_error: BaseException | None = None
        """What synchronous writes of guests end with."""
        self.guests_flush: Callable[[], None] = lambda: None
        self.guests_fua: Callable[[], None] = lambda: None
        """What a guest's flush does here, and its write with FUA, beside writing."""

    def pwrite(self, buf: Any, offset: int, fua: bool = False) -> None:
        if self.guests_error is not None:
            raise self.guests_error
        super().pwrite(buf, offset, fua)
        if fua:
            self.guests_fua()

    def flush(self) -> None:
        self.guests_flush()

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        content = bytes(buf)
        write = super().pwrite
        self.requests.start("write", lambda: write(content, offset), done)

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        self.requests.start("zero", lambda: self.zero(offset, length, may_trim=may_trim), done)

    def start_flush(self, done: Done) -> None:
        self.requests.start("flush", lambda: None, done)

    def give_up(self) -> None:
        self.times_given_up += 1
        self.requests.give_up()

    def is_server_there(self) -> bool:
        return True
