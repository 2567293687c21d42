"""JournalSide: the journal and the image of a job, as the job sees its far side.

On the event loop's thread.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from nbdmirror.devices.base import Done, Run
from nbdmirror.errors import DeviceError
from nbdmirror.mirror.far_side import FarSide, JournalRoom, NoRoom, PointsRefused
from nbdmirror.points.applier import apply
from nbdmirror.points.appliers_block import Presence, Watch
from nbdmirror.points.delegation import follow
from nbdmirror.points.format import (
    JournalError,
    Point,
    Sample,
    State,
    batch_bytes_max,
    data_bytes_max,
)
from nbdmirror.points.requests import Exports, Program, start
from nbdmirror.points.superblocks import JournalTaken
from nbdmirror.points.writer import JournalFull, JournalWriter

LOOK_S = 0.5
"""How long an applier at work is left alone."""

HASTE_S = 0.02
"""The same, while guests wait for the end."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What is needed to have points applied by a process beside the image."""

    watch: Watch
    """Over lost connections too."""
    later: Callable[[float, Callable[[], None]], object]
    clock: Callable[[], float]
    on_grant: Callable[[], object]
    """The image is changed by somebody else from now on."""


class JournalSide(FarSide):
    """`writer`: of `exports`. `on_committed` gets a point before anybody else knows that the point
    is committed. `beside`: None: points are applied from here."""

    def __init__(
        self,
        writer: JournalWriter,
        exports: Exports,
        wall_time_ns: Callable[[], int],
        on_committed: Callable[[Point], None],
        beside: Beside | None = None,
    ) -> None:
        self.error: BaseException | None = None
        self.writer = writer
        self._exports = exports
        self._wall_time_ns = wall_time_ns
        self._on_committed = on_committed
        self._beside = beside
        self._programs = 0

    @property
    def is_idle(self) -> bool:
        return not self._programs and self.writer.is_idle

    @property
    def newest(self) -> int:
        return self.writer.newest.sequence

    @property
    def base(self) -> int:
        return self.writer.superblocks.current.base.sequence

    @property
    def oldest(self) -> int:
        current = self.writer.superblocks.current
        if current.applying or current.is_base_offered:
            return current.applying or current.base.sequence
        return self.writer.headers[0].point.sequence if self.writer.headers else 0

    @property
    def is_applied(self) -> bool:
        # The space of what was applied is used again when the program has ended, and not before.
        is_level = self.base == self.newest
        return is_level and not self._programs

    @property
    def waits_for_applier(self) -> bool:
        return bool(self.writer.superblocks.current.applier)

    @property
    def is_handed_over(self) -> bool:
        return self.writer.superblocks.current.state is State.PROMOTED

    @property
    def samples(self) -> tuple[Sample, ...]:
        """What the image reads as; none while points are applied."""
        current = self.writer.superblocks.current
        return () if current.applying else current.samples

    @property
    def is_kept(self) -> bool:
        return True

    def withdraw(self, error: BaseException) -> None:
        pass  # a commit waits for the journal alone

    def room(self) -> JournalRoom:
        room, oldest = self.writer.room(), self.oldest
        points = self.newest - oldest + 1 if oldest else 0
        point_bytes = data_bytes_max(room.ring_bytes)
        return JournalRoom(
            room.ring_bytes,
            room.used_bytes,
            points,
            point_bytes,
            image_point=self.base,
            applier_silent_s=self._applier_silent_s,
        )

    @property
    def _applier_silent_s(self) -> float | None:
        if self._beside is None or not self.waits_for_applier:
            return None
        return self._beside.watch.silent_s

    def in_the_way(self, bytes_max: int) -> int:
        room, headers = self.writer.room(), self.writer.headers
        missing_bytes = batch_bytes_max(bytes_max) - room.free_bytes
        if not 0 < missing_bytes <= room.used_bytes:
            return 0
        ends = (h.point.sequence for h in headers if h.end - headers[0].place >= missing_bytes)
        return next(ends, self.newest)

    def has_name(self, name: str) -> bool:
        return any(point.name == name for point in self._points())

    def times_ns(self) -> dict[int, int]:
        return {point.sequence: point.time_ns for point in self._points() if point.sequence}

    def _points(self) -> list[Point]:
        base = self.writer.superblocks.current.base
        return [base, *(header.point for header in self.writer.headers)]

    def begin(self, time_ns: int, *, bytes_max: int, name: str = "", group: int = 0) -> object:
        try:
            return self.writer.begin(time_ns, bytes_max=bytes_max, name=name, group=group)
        except JournalFull as error:
            is_final = error.missing_bytes > self.writer.room().used_bytes
            self.error = NoRoom(str(error), is_final=is_final)
        except JournalTaken as error:
            self.error = PointsRefused(str(error))
        except JournalError as error:  # opened again, it may be as it should
            self.error = DeviceError(str(error), errno.EIO)
        raise self.error

    def put(self, runs: Sequence[Run], done: Done) -> None:
        self.writer.put(runs, self._noting(done))

    def commit(self, done: Done) -> None:
        def committed(error: BaseException | None) -> None:
            if error is None:
                self._on_committed(self.writer.newest)
            done(error)

        self.writer.commit(self._noting(committed))

    def give_up(self, done: Done) -> None:
        self.writer.give_up(done)

    def apply(self, done: Done, *, until: int = 0, hands_over: bool = False) -> None:
        last = {"state": State.PROMOTED, "since_ns": self._wall_time_ns()} if hands_over else None
        until, beside = until or self.newest, self._beside
        if beside is None:
            self._start(apply(self.writer, until, last=last), done)
            return
        program = follow(self.writer, until, beside.watch, beside.clock, last=last)
        pause_s = HASTE_S if hands_over else LOOK_S
        later = partial(beside.later, pause_s)
        self._start(program, lambda error: self._followed(later, error, done))

    def _followed(
        self, later: Callable[[Callable[[], None]], object], error: BaseException | None, done: Done
    ) -> None:
        """`done` comes later if an applier has to be waited for."""
        beside = self._beside
        assert beside is not None
        if self.writer.superblocks.current.applier:
            beside.on_grant()
        elif beside.watch.presence is not Presence.UNKNOWN:
            done(error)
            return

        def rested() -> None:
            self._programs -= 1
            done(error)

        self._programs += 1
        later(rested)

    def begin_in_place(self, done: Done) -> None:
        self._start(self.writer.seed(self._wall_time_ns()), done)

    def take_back(self, done: Done) -> None:
        superblocks = self.writer.superblocks
        base = superblocks.current.base
        self._start(superblocks.update(state=State.OK, since_ns=base.time_ns), done)

    def check(self, done: Done) -> None:
        self._start(self.writer.superblocks.check(), done)

    def _start(self, program: Program[None], done: Done) -> None:
        self._programs += 1
        noting = self._noting(done)

        def ended(_: None, error: BaseException | None) -> None:
            self._programs -= 1
            noting(error)

        start(program, self._exports, ended)

    def _noting(self, done: Done) -> Done:
        def then(error: BaseException | None) -> None:
            if error is not None:
                error = self.error = refusal_of(error)
            done(error)

        return then


def refusal_of(error: BaseException) -> BaseException:
    """An error of a journal as the job knows it: what the journal holds does not change by itself,
    so another attempt ends in the same way."""
    return PointsRefused(str(error)) if isinstance(error, JournalError) else error
