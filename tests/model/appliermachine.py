"""Steps of a source and of an applier beside its image, in all orders (applierworld.py)."""

from __future__ import annotations

from hypothesis.stateful import rule
from model import choices as st
from model.applierworld import WORK_MAX, AppliedWorld
from model.pointmachine import PointMachine
from model.pointworld import BLOCKS


class ApplierMachine(PointMachine):
    world_class = AppliedWorld

    @property
    def a(self) -> AppliedWorld:
        assert isinstance(self.world, AppliedWorld)
        return self.world

    @rule()
    def applier_starts(self) -> None:
        self.a.start_applier()

    @rule(count=st.integers(1, 20))
    def applier_goes_on(self, count: int) -> None:
        self.a.go_on(count)

    @rule(seconds=st.sampled_from((0.5, 1.5, 6.0)))
    def time_passes(self, seconds: float) -> None:
        self.a.time_passes(seconds)

    @rule(is_in_order=st.booleans())
    def applier_ends(self, is_in_order: bool) -> None:
        if is_in_order:
            self.a.end_applier()
        else:
            self.a.kill_applier()

    @rule(first=st.integers(0, BLOCKS - 1), count=st.integers(0, 40), points=st.integers(1, 3))
    def applier_is_given_a_point(self, first: int, count: int, points: int) -> None:
        """And does a part of it, or all. Further points follow it."""
        a = self.a
        a.start_applier()
        a.go_on(20)
        for number in range(points):
            a.write((first + number) % BLOCKS, 2, zero=False)
            a.whole_point("all")
        a.meet()
        a.write(first, 1, zero=False)
        a.whole_point("all")
        a.go_on(count)

    @rule(first=st.integers(0, BLOCKS - 1))
    def applier_follows(self, first: int) -> None:
        """Each point, and the source sees that."""
        a = self.a
        for _ in range(2):
            a.go_on(WORK_MAX // 4)
            a.apply(0)
            a.end_all()
            a.write(first, 1, zero=False)
            a.whole_point("all")
            a.time_passes(1.5)

    @rule(first=st.integers(0, BLOCKS - 1), count=st.integers(0, 40))
    def applier_is_silent(self, first: int, count: int) -> None:
        """In the middle of a point, and goes on later."""
        a = self.a
        self.applier_is_given_a_point(first, count, 1)
        for _ in range(3):
            a.time_passes(6.0)
            a.apply(0)
            a.end_all()
            a.write(first, 1, zero=False)
            a.whole_point("all")
        a.go_on(WORK_MAX // 4)

    @rule(first=st.integers(0, BLOCKS - 1), count=st.integers(-3, 30))
    def point_is_recovered_beside_the_applier(self, first: int, count: int) -> None:
        """Which does anything, or changes the image (`count` is negative)."""
        self.applier_is_given_a_point(first, max(0, count), 1)
        if count < 0:
            self.a.go_on_until_it_writes()
        self.a.recover_beside()
