"""The machine of machine.py that is asked for the lag at each step, also between two steps of a
guest. On its own, since each rule more makes the others rarer."""

from __future__ import annotations

from hypothesis.stateful import precondition, rule
from model import choices as st
from model.lagworld import LagWorld
from model.machine import GUESTS_MAX, LosingMachine, MirrorMachine, slots
from model.parts import Request
from model.world import World


class LagMachine(MirrorMachine):
    world_class: type[World] = LagWorld

    @precondition(lambda self: self.w.is_tracking)
    @rule(which=slots, steps=st.integers(1, 9), flushes_first=st.booleans())
    def the_lag_is_asked_for(self, which: int, steps: int, flushes_first: bool) -> None:
        """A guest goes on in the middle of the question."""
        world = self.w
        assert isinstance(world, LagWorld) and world.lag is not None
        if flushes_first:
            self._flush("well")

        def go_on() -> None:
            if world.guests:
                guest = self._guest(which)
                for _ in range(steps):
                    self._step(guest)

        world.condition.on_release = go_on
        world.check_lag(world.lag)
        world.condition.on_release = None

    @precondition(lambda self: self.w.is_tracking and not self.w.devices.is_lost)
    @rule(outcome=st.sampled_from(("well", "well", "unchanged")), copies=st.booleans())
    def target_is_flushed(self, outcome: str, copies: bool) -> None:
        """From the flush's begin to its end in one go, perhaps after all that is in flight."""
        if copies:
            self.w.copy_all()
        self._flush(outcome)

    @precondition(lambda self: self.w.is_tracking and not self.w.devices.is_lost)
    @precondition(lambda self: len(self.w.guests) < GUESTS_MAX)
    @rule(granule=slots, ends=st.sampled_from(("first", "second", "both")))
    def two_flushes_are_under_way(self, granule: int, ends: str) -> None:
        """Between their begins a guest writes, and that is copied."""
        self.w.copy_all()
        first = self._flush("later")
        self.guest_asks(granule, 0, 128, False, 0.0, False, 9, False)
        self.w.copy_all(first)
        second = self._flush("later")
        for name, request in (("second", second), ("first", first)):
            if ends in (name, "both"):
                self.w.devices.end(request, "well")
                self.w.check()

    @precondition(lambda self: self.w.is_tracking and self.w.devices.requests)
    @rule(which=slots, outcome=st.sampled_from(("unchanged", "torn")))
    def a_copy_fails_and_the_target_is_flushed(self, which: int, outcome: str) -> None:
        requests = self.w.devices.requests
        request = requests[which % len(requests)]
        self.w.copy_all(request)
        self.w.copier.stop()
        self.w.devices.end(request, outcome)
        self._flush("well")

    @precondition(lambda self: self.w.is_tracking and not self.w.devices.is_lost)
    @precondition(lambda self: not self.w.guests and not self.w.is_held)
    @rule(
        granule=slots,
        where=st.sampled_from(("before", "before the bit", "before the bit", "before the note")),
        steps=st.sampled_from((9, 9, 3)),
        is_synchronous=st.sampled_from((False, False, True)),
        wakes=st.booleans(),
    )
    def the_mirror_rests(
        self, granule: int, where: str, steps: int, is_synchronous: bool, wakes: bool
    ) -> None:
        """Before a guest writes, or while the guest marks what it has written."""
        world = self.w
        assert isinstance(world, LagWorld) and world.lag is not None
        world.copy_all()
        self._flush("well")
        world.wake()
        world.lag.look()
        if where == "before":
            world.rest()
        else:
            world.dirty.between.calls[where] = world.rest
        self.guest_asks(granule, 0, 128, False, 0.0, is_synchronous, steps, False)
        world.dirty.between.calls.clear()
        if wakes:
            world.wake()

    def _flush(self, outcome: str) -> Request:
        """The flush, if it is under way still."""
        self.w.devices.at_once = [outcome]
        self.w.copier.flush(lambda error: None)
        self.w.devices.at_once = []
        return self.w.devices.requests[-1] if outcome == "later" else NONE


NONE = Request("flush", 0, 0, lambda *_: None, lambda error: None)


class LosingLagMachine(LagMachine, LosingMachine):
    """The same with a target that is lost."""

    @precondition(lambda self: self.w.is_tracking and not self.w.devices.is_lost)
    @rule(copies=st.booleans(), is_flushed=st.booleans())
    def target_crashes_and_comes_back(self, copies: bool, is_flushed: bool) -> None:
        """As it was at its last flush, perhaps with one that is asked for at once."""
        if copies:
            self.w.copy_all()
        self.w.give_up_target()
        self.w.devices.left.clear()  # they never happen
        self.w.target[:] = self.w.devices.durable
        self.w.reconnect()
        if is_flushed:
            self._flush("well")
