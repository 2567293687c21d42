"""A world that is asked how far its target lags behind, after each step, and an oracle that knows:
it has the source's content at each moment that counts, and at each change since.

There are no clocks in it: each look at the clock is a moment of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from model.parts import Guest
from model.world import World

from nbdmirror.disk.alarm import Alarm
from nbdmirror.mirror.lag import Lag


@dataclass(slots=True)
class Moment:
    """`contents`: of the source, then and after each change since. `busy`: where guests' requests
    were under way, which nobody had been answered."""

    contents: list[bytes]
    busy: list[slice] = field(default_factory=list)


class LagWorld(World):
    lag_class: type[Lag] = Lag
    alarm_class: type[Alarm] = Alarm

    def __init__(self, content: bytes, **options: Any) -> None:
        self.now = 0
        self.moments: dict[float, Moment] = {}
        self.lag: Lag | None = None
        super().__init__(content, **options)
        self.has_rung = False
        self.alarm = self.alarm_class(self.ledger, self.clock, self._on_ring)

    def _on_ring(self) -> None:
        assert not self.condition.is_held, "somebody is told under the lock"
        self.has_rung = True

    def rest(self) -> None:
        """What the job does when it has nothing to do: from now on nobody looks."""
        if self.tracker.is_at_rest:
            self.has_rung = False
            self.alarm.set(lambda: self.tracker.is_at_rest)

    def wake(self) -> None:
        """What the job does when the alarm has rung."""
        assert self.lag is not None
        if self.alarm.is_set:
            self.lag.look()
            self.alarm.stop()
        self.look()

    def check_alarm(self) -> None:
        """While nobody looks, nothing is left to do, or a guest that has left it rings before it is
        answered."""
        if self.alarm.is_set and not self.has_rung and not self.guests:
            assert self.tracker.may_differ().is_empty, "a guest has written, and nobody will look"

    def clock(self) -> float:
        self.now += 1
        busy = [
            slice(guest.offset, guest.offset + guest.length)
            for guest in self.guests
            if guest.token is not None
        ]
        self.moments[self.now] = Moment([bytes(self.source)], busy)
        return self.now

    def mark_all(self) -> None:
        super().mark_all()
        self.lag = self.lag_class(self.tracker, self.clock, 0.0, self.alarm)

    def _land(self, content: bytearray, guest: Guest, start: int, end: int) -> None:
        super()._land(content, guest, start, end)
        if content is self.source:
            for moment in self.moments.values():
                moment.contents.append(bytes(self.source))

    def check(self) -> None:
        super().check()
        self.check_alarm()
        if self.lag is not None:
            self.check_lag(self.lag)

    def check_lag(self, lag: Lag) -> None:
        """The target's storage has of each byte what the source had then, or later."""
        before_s = lag._covered_s
        lag.look()
        assert lag._covered_s >= before_s, "the lag grows by itself"
        followed = (lag._covered_s, lag._backlog_s, *self.alarm._rung_s)
        self.moments = {at_s: m for at_s, m in self.moments.items() if at_s in followed}
        moment = self.moments.get(lag._covered_s)
        if moment is None:
            return  # the job's begin
        durable, newest = self.devices.durable, moment.contents[-1]
        if durable == newest:
            return
        for offset in range(0, self.size, self.unit):
            part = slice(offset, offset + self.unit)
            if any(durable[part] == content[part] for content in reversed(moment.contents)):
                continue  # as each of its bytes
            for at in range(offset, min(offset + self.unit, self.size)):
                assert any(durable[at] == content[at] for content in moment.contents) or any(
                    busy.start <= at < busy.stop for busy in moment.busy
                ), f"the byte at {at} is older on the target than the lag says"

    def drain(self) -> None:
        super().drain()
        if self.lag is not None:
            self.wake()
        if self.lag is not None:
            for _ in range(2):
                self.check_lag(self.lag)
                self.copier.flush(lambda error: None)
                for request in list(self.devices.requests):
                    self.devices.end(request, "well")
            assert self.lag.lag_s == 0, "all is there, and the lag is not over"
