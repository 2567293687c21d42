"""A job whose history is kept as a server keeps it, with a guest that may be fast: in virtual
time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unit.mirror.jobparts import KIB, JobWorld

from nbdmirror.server.chronicle import Chronicle
from nbdmirror.server.course import Course

STEP_S = 0.05


class Watched:
    """`wall_s`: how far the wall clock is ahead of the loop's."""

    def __init__(
        self,
        *,
        write_s: float = 0.2,
        start: Callable[[JobWorld], object] = JobWorld.start,
        **more: Any,
    ) -> None:
        self.wall_s = 1e9
        self.world = JobWorld(**more)
        loop: Any = self.world.loop
        chronicle = Chronicle(loop, self.world.events, self.time_s, lambda *_: None)
        chronicle.begin(self.world.job)
        self._courses = chronicle.courses
        self.world.target.requests.delays_s["write"] = write_s
        self.world.job.throttle.wait = self._wait
        self.waited_s = 0.0
        """How long the guest has waited at the throttle."""
        start(self.world)

    def time_s(self) -> float:
        """The wall clock."""
        return self.world.loop.now_s + self.wall_s

    @property
    def course(self) -> Course:
        return self._courses[self.world.job.id]

    def write_everywhere(self, until: Callable[[], bool] = lambda: False) -> None:
        """A guest's writes, one for each granule, if they do not wait at the gate."""
        for offset in range(0, self.world.disk.size, 64 * KIB):
            if not self.world.is_held and not until():
                self.world.write(offset)

    def _wait(self, seconds: float) -> None:
        """As a guest's thread: all else goes on meanwhile."""
        until_s = self.world.loop.now_s + seconds
        while self.world.loop.now_s < until_s and self.world.job.throttle.bytes_per_s is not None:
            before_s = self.world.loop.now_s
            self.world.pass_s(min(STEP_S, until_s - before_s))
            self.waited_s += self.world.loop.now_s - before_s

    def write_until_changed(self, most_s: float) -> float | None:
        """A guest that writes everywhere all the time, while that does not wait for the target.
        Returns when the copy mode was changed."""
        at_s = 0.0
        while at_s < most_s:
            if self.world.disk.synchronous is not None:
                return at_s
            self.write_everywhere()
            self.world.pass_s(STEP_S)
            at_s += STEP_S
        return None
