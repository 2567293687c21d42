"""SnapshotSide: an image that has one point at a time, as its job sees the far side.

What a point has is written in place. So the image is overwritten from the point's first write
until the flush at its end, and is of no moment then. The job's bitmaps have, at every moment, all
in which the image may differ from the disk (`Changes.may_differ`): a point that is broken on its
way costs nothing but time, since the next one writes all of that again. On the event loop's
thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from nbdmirror.devices.base import AsyncTarget, Done, Run, all_of
from nbdmirror.mirror.acknowledgements import Acknowledgements
from nbdmirror.mirror.far_side import FarSide, JournalRoom


class SnapshotSide(FarSide):
    """`may_trim`: what reads as zeroes may lose its space in the image."""

    def __init__(self, image: AsyncTarget, acks: Acknowledgements, *, may_trim: bool) -> None:
        self.error: BaseException | None = None
        self._image = image
        self._acks = acks
        self._may_trim = may_trim
        self._in_flight = 0
        self._is_handed_over = False
        self._when_idle: list[Done] = []

    @property
    def is_idle(self) -> bool:
        return not self._in_flight

    @property
    def newest(self) -> int:
        return self._acks.newest

    @property
    def base(self) -> int:
        return self._acks.newest

    @property
    def oldest(self) -> int:
        return self._acks.last

    @property
    def is_applied(self) -> bool:
        return True

    @property
    def is_handed_over(self) -> bool:
        return self._is_handed_over

    @property
    def waits_for_applier(self) -> bool:
        return False

    @property
    def is_kept(self) -> bool:
        return self._acks.was_given

    def withdraw(self, error: BaseException) -> None:
        self._acks.withdraw(error)

    def room(self) -> JournalRoom | None:
        return None

    def in_the_way(self, bytes_max: int) -> int:
        return 0

    def has_name(self, name: str) -> bool:
        return False  # what the snapshots are called is not known here

    def times_ns(self) -> dict[int, int]:
        acks = self._acks
        return {acks.last: acks.last_ns} if acks.last else {}

    def begin(self, time_ns: int, *, bytes_max: int, name: str = "", group: int = 0) -> None:
        self._acks.begins()

    def put(self, runs: Sequence[Run], done: Done) -> None:
        ended = all_of(len(runs), self._counted(done))
        for offset, length, content in runs:
            if content is None:
                self._image.start_zero(offset, length, self._may_trim, ended)
            else:
                self._image.start_write(content, offset, ended)

    def commit(self, done: Done) -> None:
        def flushed(error: BaseException | None) -> None:
            if error is not None:
                done(error)
                return
            self._acks.next_number()
            self._acks.write_down(self._counted(lambda _: self._acks.announce(done)))

        self._image.start_flush(self._counted(flushed))

    def give_up(self, done: Done) -> None:
        if self.is_idle:
            done(None)
        else:
            self._when_idle.append(done)

    def apply(self, done: Done, *, until: int = 0, hands_over: bool = False) -> None:
        self._is_handed_over = self._is_handed_over or hands_over
        done(None)

    def take_back(self, done: Done) -> None:
        self._is_handed_over = False
        done(None)

    def check(self, done: Done) -> None:
        done(None)  # whoever uses a snapshot leaves no mark here

    def begin_in_place(self, done: Done) -> None:
        done(None)

    def _counted(self, done: Done) -> Done:
        self._in_flight += 1

        def then(error: BaseException | None) -> None:
            self._in_flight -= 1
            if error is not None:
                self.error = error
            done(error)
            while self._when_idle and self.is_idle:
                self._when_idle.pop(0)(None)

        return then
