"""A source that keeps the points of a window (nbdmirror/mirror/window.py).

When the image follows, it becomes what the real Window says, and the oracle says what that may be:
no point of the window, unless the next point has no room without; then no more of them than that
takes. What PointWorld checks holds as well: each later point is on offer, whatever is lost.
"""

from __future__ import annotations

import math

from hypothesis.stateful import rule
from model import choices as st
from model.pointmachine import PointMachine
from model.pointworld import PointWorld

from nbdmirror.mirror.window import Journal, Window
from nbdmirror.points.format import BLOCK_BYTES, Point, batch_bytes_max
from nbdmirror.server.far_side import JournalSide

KEEP_S = (0, 3, 8)


class WindowWorld(PointWorld):
    """Mutants override the classes."""

    window_class: type[Window] = Window
    side_class: type[JournalSide] = JournalSide

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.cut_at_s: dict[int, float] = {0: 0.0}
        """Time of a cut -> the monotonic time then."""
        super().__init__(seed)

    def create(self) -> None:
        self.window = self.window_class(self.random.choice(KEEP_S), lambda: self.now_s)
        super().create()

    def cut(self) -> None:
        number, was_open = self.writer.newest.sequence + 1, self.phase == "open"
        super().cut()
        if self.phase == "open" and not was_open:
            self.cut_at_s[self.time_ns] = self.now_s
            self.window.cut(number)

    def apply(self, back: int) -> None:
        """Have the image follow. `back`: 0: no point is wanted now."""
        if self.is_applying or self.phase == "closed":
            return
        wanted_bytes = max(1, len(self.dirty) * BLOCK_BYTES) if back else 0
        side = self.side_class(self.writer, self.exports, lambda: 0, lambda _: None)
        until = self.window.next(side, wanted_bytes)
        self.check_choice(until, wanted_bytes)
        numbers = [header.point.sequence for header in self.writer.headers]
        if until in numbers:
            super().apply(len(numbers) - 1 - numbers.index(until))

    def check_choice(self, until: int, wanted_bytes: int) -> None:
        headers, base = self.writer.headers, self.writer.superblocks.current.base
        points: list[Point] = [base, *(header.point for header in headers)]
        end_s = self.now_s - self.window.keep_s
        over = [point.sequence for point in points if self.cut_at_s[point.time_ns] <= end_s]
        allowed = max(over, default=0)
        missing = batch_bytes_max(wanted_bytes) - self.writer.room().free_bytes
        assert max(until, base.sequence) >= allowed, "lost: the space of old points"
        if until <= allowed or until <= base.sequence:
            return
        assert wanted_bytes and missing > 0, f"lost: point {until} of the window"
        before = [header for header in headers if header.point.sequence < until]
        freed = before[-1].end - headers[0].place if before else 0
        assert freed < missing, f"lost: point {until} of the window, which was in nobody's way"


class WindowMachine(PointMachine):
    world_class = WindowWorld

    @rule(seconds=st.integers(1, 4))
    def time_passes(self, seconds: int) -> None:
        assert isinstance(self.w, WindowWorld)
        self.w.now_s += seconds

    @rule(seconds=st.integers(0, 4), how=st.sampled_from(("all", "all", "give up", "kill")))
    def interval_passes(self, seconds: int, how: str) -> None:
        """As a job does it: the image follows, and then a point is made."""
        w = self.w
        assert isinstance(w, WindowWorld)
        w.now_s += seconds
        w.write(w.random.randrange(4), 2, zero=False)
        w.apply(1)
        w.end_all()
        w.whole_point(how)


class AppliesOneTooMany(Window):
    """The newest point that is older than the window is still the state at its begin."""

    def _due(self, newest: int) -> int:
        number = super()._due(newest)
        return min(newest, number + 1) if number else 0


class CountsFromABrokenPoint(Window):
    """The point that has its number now was cut later."""

    def cut(self, number: int) -> None:
        self._cuts.append((number, self._clock()))


class MakesRoomInAnyCase(Window):
    """Points go before their time although the next one fits."""

    def next(self, journal: Journal, bytes_wanted: int, until: float = math.inf) -> int:
        number = super().next(journal, bytes_wanted, until)
        is_one = bytes_wanted and journal.newest > journal.base
        return number or (journal.newest if is_one else 0)


class KeepsAllForEver(Window):
    """What is older than the window stays, until its room is needed."""

    def _due(self, newest: int) -> int:
        return 0


class AppliesAllForRoom(JournalSide):
    """One point is in the way, and all are applied."""

    def in_the_way(self, bytes_max: int) -> int:
        return self.newest if super().in_the_way(bytes_max) else 0


WINDOW_MUTANTS = [
    *(
        type(f"World{mutant.__name__}", (WindowWorld,), {"window_class": mutant})
        for mutant in (
            AppliesOneTooMany,
            CountsFromABrokenPoint,
            MakesRoomInAnyCase,
            KeepsAllForEver,
        )
    ),
    type("WorldAppliesAllForRoom", (WindowWorld,), {"side_class": AppliesAllForRoom}),
]
