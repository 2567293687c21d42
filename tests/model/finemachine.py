"""The machine of machine.py with marks and claims in steps: what other threads do between the
details of a granule and its bit. On its own, since each rule more makes the others rarer."""

from __future__ import annotations

from hypothesis.stateful import precondition, rule
from model import choices as st
from model.fineparts import BOUNDS
from model.machine import GRANULE, GUESTS_MAX, MirrorMachine, slots
from model.parts import Guest

BETWEEN = (
    "before the note",
    "before the bit",
    "before details are taken",
    "before whole ones go",
)


class FineMachine(MirrorMachine):
    @precondition(lambda self: self.w.is_tracking and len(self.w.guests) < GUESTS_MAX)
    @rule(
        where=st.sampled_from(BETWEEN),
        action=st.sampled_from(("pump", "copy", "look", "guest", "guest")),
        which=slots,
        delta=st.sampled_from((0, 128, 256)),
        length=st.sampled_from((128, 128, 100, GRANULE + 100)),
        others=st.lists(slots, max_size=2),
        copies_first=st.booleans(),
    )
    def two_meet_in_the_middle(
        self,
        where: str,
        action: str,
        which: int,
        delta: int,
        length: int,
        others: list[int],
        copies_first: bool,
    ) -> None:
        """One marks what it has written, or the copier takes what is dirty, and another thread goes
        on between the two steps of that; first others write to the same granule."""
        if copies_first:
            self._begin_with_details()
        for other in others:
            self.guest_asks(which, other * 128 % GRANULE, 100, False, 0.0, False, 9, False)
            if len(self.w.guests) >= GUESTS_MAX:
                return
        self.guest_asks(which, delta, length, False, 0.5, False, 3, False)
        if not self.w.guests or not self.w.guests[-1].is_under_way:
            return  # it stands at the gate, or was quick
        guest = self.w.guests[-1]

        def meanwhile() -> None:
            if where in BETWEEN[2:]:
                self._finish(guest)
            elif action == "guest":
                others = [g for g in self.w.guests if g.is_under_way and g is not guest]
                for each in others[:1]:
                    self._finish(each)
            elif action == "look":
                self.w.look()
            elif action == "copy":
                self.w.copy_all()
            else:
                self.w.copier.pump()

        self.w.dirty.between.calls[where] = meanwhile
        if where in BETWEEN[2:]:
            (self.w.copy_all if action == "copy" else self.w.copier.pump)()
        else:
            self._finish(guest)
        self.w.dirty.between.calls.clear()

    @precondition(lambda self: self.w.is_tracking and not self.w.guests and not self.w.is_held)
    @precondition(lambda self: self.w.dirty._notes is None)
    @rule(granule=slots, unit=st.integers(0, 3), other=st.integers(0, 3))
    def details_begin(self, granule: int, unit: int, other: int) -> None:
        """One who saw no notes is to set a bit while another one leaves a note."""
        self.w.copy_all()
        self.guest_asks(granule, unit * 128, 128, False, 0.5, False, 3, False)
        if not self.w.guests or not self.w.guests[-1].is_under_way:
            return
        guest = self.w.guests[-1]

        def meanwhile() -> None:
            self.w.refine()
            self.guest_asks(granule, other * 128, 128, False, 0.0, False, 9, False)

        self.w.dirty.between.calls["before the bit"] = meanwhile
        self._finish(guest)
        self.w.dirty.between.calls.clear()

    @precondition(lambda self: self.w.is_tracking and not self.w.guests and not self.w.is_held)
    @rule(
        granule=slots,
        units_and_other=st.sampled_from(
            (((0, 2), 1), ((1, 3), 2), ((0, 1, 3), 2), ((0,), 3), ((0, 2), 2), ((0,), 0))
        ),
        has_read=st.sampled_from((True, True, False)),
        is_synchronous=st.sampled_from((True, True, False)),
    )
    def write_meets_parts(
        self,
        granule: int,
        units_and_other: tuple[tuple[int, ...], int],
        has_read: bool,
        is_synchronous: bool,
    ) -> None:
        """A guest writes to a granule of which parts are being copied, often to a gap."""
        units, other = units_and_other
        self._begin_with_details()
        for unit in units:
            self.guest_asks(granule, unit * 128, 128, False, 0.0, False, 9, False)
        self.w.copier.pump()
        if has_read:
            for request in [r for r in self.w.devices.requests if r.kind == "read"]:
                self.w.devices.end(request, "well")
        self.guest_asks(granule, other * 128, 128, False, 0.0, is_synchronous, 9, False)

    @precondition(lambda self: self.w.is_tracking and not self.w.guests and not self.w.is_held)
    @rule(granule=slots, unit=st.integers(4, 7), other=st.integers(4, 7))
    def a_copy_gives_back(self, granule: int, unit: int, other: int) -> None:
        """All but its first granule, to which a guest writes then, and then it fails."""
        self._begin_with_details()
        for each in (0, unit):
            self.guest_asks(granule, each * 128, 128, False, 0.0, False, 9, False)
        if claim := self.w.tracker.claim(0, 2 * self.w.granularity):
            self.w.tracker.shrink(claim, min(claim.length, self.w.granularity))
            self.w.tracker.settle(claim, failed=True)
            self.guest_asks(granule, other * 128, 128, False, 0.0, False, 9, False)

    @precondition(lambda self: self.w.is_tracking and not self.w.guests and not self.w.is_held)
    @rule(granule=slots, unit=st.integers(0, 3), other=st.integers(0, 3))
    def details_end_for_a_while(self, granule: int, unit: int, other: int) -> None:
        """A guest writes so often that nothing is noted, and later less."""
        self._begin_with_details()
        for _ in range(BOUNDS["NOTES_MAX"]):
            self.guest_asks(granule, 0, 128, False, 0.0, False, 9, False)
        self.w.look()
        self.guest_asks(granule, unit * 128, 128, False, 0.0, False, 9, False)
        for _ in range(BOUNDS["COARSE_LOOKS"] + 1):
            self.w.look()
        self.guest_asks(granule, other * 128, 128, False, 0.0, False, 9, False)

    @precondition(lambda self: self.w.is_tracking and not self.w.guests and not self.w.is_held)
    @rule(granule=slots, unit=st.integers(0, 3), other=st.integers(0, 3))
    def notes_are_too_many(self, granule: int, unit: int, other: int) -> None:
        """A guest writes to one part, and then so often to another that there is no more room."""
        self._begin_with_details()
        self.guest_asks(granule, unit * 128, 128, False, 0.0, False, 9, False)
        for _ in range(BOUNDS["NOTES_MAX"]):
            self.guest_asks(granule, other * 128, 128, False, 0.0, False, 9, False)

    @precondition(lambda self: self.w.is_tracking and not self.w.guests and not self.w.is_held)
    @precondition(lambda self: self.w.dirty._notes is None)
    @rule(granule=slots, unit=st.integers(0, 3), other=st.integers(0, 3))
    def details_begin_over_what_is_dirty(self, granule: int, unit: int, other: int) -> None:
        """A granule is dirty as a whole, and a guest then writes to a part of the granule."""
        self.guest_asks(granule, unit * 128, 128, False, 0.0, False, 9, False)
        self.w.refine()
        self.guest_asks(granule, other * 128, 128, False, 0.0, False, 9, False)

    def _begin_with_details(self) -> None:
        self.w.copy_all()
        self.w.look()
        self.w.refine()

    def _finish(self, guest: Guest) -> None:
        for _ in range(9):
            self._step(guest)
