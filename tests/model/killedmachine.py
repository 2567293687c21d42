"""The machine of test_powerloss.py, for kills alone (killed.py)."""

from __future__ import annotations

from hypothesis.stateful import precondition, rule
from model import choices as st
from model.killed import KilledWorld
from model.machine import GRANULE, GUESTS_MAX, slots
from model.powerloss import RECENT_MAX
from model.powermachine import PowerMachine

MOMENTS = ("before the number", "after the position", "before it is put")


class KilledMachine(PowerMachine):
    world_class: type[KilledWorld] = KilledWorld

    @property
    def k(self) -> KilledWorld:
        assert isinstance(self.world, KilledWorld)
        return self.world

    @precondition(lambda self: self.w.is_tracking and not self.w.is_held)
    @rule(
        before=st.lists(st.tuples(slots, st.integers(0, 3)), max_size=3),
        copies=st.sampled_from(("all", "all", "pump", "none", "look")),
        after=st.lists(st.tuples(slots, st.integers(0, 3)), max_size=3),
        outcome=st.sampled_from(("well", "well", "unchanged", "later")),
    )
    def target_is_flushed(
        self,
        before: list[tuple[int, int]],
        copies: str,
        after: list[tuple[int, int]],
        outcome: str,
    ) -> None:
        """Guests write, some of it is copied, the target is flushed, and guests write again before
        that has ended."""
        self.k.refine()
        self._write(before)
        if copies == "all":
            self.k.copy_all()
        elif copies == "pump":
            self.k.copier.pump()
        elif copies == "look":
            self.k.look()
        self.k.copier.flush(lambda error: None)
        self._write(after)
        self._end_flush(outcome)

    @precondition(lambda self: self.w.is_tracking and not self.w.is_held)
    @precondition(lambda self: len(self.w.guests) < GUESTS_MAX)
    @rule(
        moment=st.sampled_from(MOMENTS),
        granule=slots,
        unit=st.integers(0, 3),
        steps=st.sampled_from((1, 2, 9)),
    )
    def two_meet(self, moment: str, granule: int, unit: int, steps: int) -> None:
        """A flush ends while a guest begins, or the other way round."""
        self.k.copy_all()
        self.k.refine()
        self.k.copier.flush(lambda error: None)
        calls = self.k.between.calls
        if moment == MOMENTS[0]:
            calls[moment] = lambda: self._end_flush("well")
            self._write([(granule, unit)], steps)
        else:
            calls[moment] = lambda: self._write([(granule, unit)], steps)
            self._end_flush("well")
        calls.clear()

    @precondition(lambda self: self.w.is_tracking and not self.w.is_held and not self.w.guests)
    @rule(granule=slots, writes=st.integers(1, RECENT_MAX + 2))
    def guest_writes_much(self, granule: int, writes: int) -> None:
        """More than is remembered, perhaps, since the last flush: one write elsewhere, and then
        many to one place."""
        self.k.refine()
        self.k.copy_all()
        self.k.copier.flush(lambda error: None)
        self._end_flush("well")
        self._write([(granule, 1)])
        self._write([(granule, 0)] * writes)

    @precondition(lambda self: self.w.is_tracking and not self.w.is_held and not self.w.guests)
    @rule(which=slots)
    def source_loses_writes(self, which: int) -> None:
        self.k.lose_writes(which * GRANULE % self.k.size)

    def _end_flush(self, outcome: str) -> None:
        flushes = [request for request in self.k.devices.requests if request.kind == "flush"]
        if flushes and outcome != "later":
            self.k.devices.end(flushes[-1], outcome)

    def _write(self, places: list[tuple[int, int]], steps: int = 9) -> None:
        for granule, unit in places:
            if len(self.w.guests) < GUESTS_MAX:
                self.guest_asks(granule, unit * 128, 128, False, 0.0, False, steps, False)
