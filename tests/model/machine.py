"""The mirror's invariant, as a state machine over the real Ledger, Tracker and Copier.

    target equals source, or the granule is dirty, or it is claimed by a copy in flight,
    or a guest write that covers it is under way

is checked after each step of any guest and any request (world.py). At the end everything is let
through, and source and target must be identical.

To replay a failure: Hypothesis prints the steps, and keeps them in .hypothesis/, so that the next
run starts with them; elsewhere, put the printed @reproduce_failure(...) above `MirrorMachine`.
"""

from __future__ import annotations

from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model import choices as st
from model.parts import EXTENT_UNIT_BYTES, Guest
from model.world import World

GUESTS_MAX = 3

GRANULE = 512
REQUEST_ACTIONS = (
    "first",
    "others",
    "others",
    "well",
    "well",
    "works",
    "half",
    "unchanged",
    "torn",
)
COPIER_ACTIONS = (
    "copy",
    "copy",
    "copy",
    "pump",
    "start",
    "stop",
    "disown",
    "speed",
    "flush",
    "refine",
)
"""`disown`: wait no longer for what the source was asked."""

LATE_PARTS = {"late": 1.0, "half": 0.5, "never": 0.0}
LOST_ACTIONS = ("back", "back", "late", *LATE_PARTS)

GATE_ACTIONS = ("in sync", "hold", "announcement")

slots = st.sampled_from((0, 0, 1, 2, 3, 5, 11))
"""Which guest or request: modulo how many there are."""


class MirrorMachine(RuleBasedStateMachine):
    world_class: type[World] = World

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.is_broken = False
        self.writes = 0

    @initialize(
        granules=st.sampled_from((1, 2, 3, 12)),
        tail=st.sampled_from((0, 1, 100, 511)),
        granularity=st.sampled_from((GRANULE, GRANULE, 2 * GRANULE)),
        parts=st.sampled_from((4, 4, 1, 2)),
        buffer_bytes=st.sampled_from((4 * GRANULE, GRANULE, 16 * GRANULE)),
        request_bytes_max=st.sampled_from((GRANULE, 2 * GRANULE)),
        data=st.integers(0, (1 << 13) - 1),
        is_mirrored=st.booleans(),
        stops_on_error=st.booleans(),
        early_writers=st.lists(st.integers(1, 3), max_size=2),
    )
    def make(
        self,
        granules: int,
        tail: int,
        granularity: int,
        parts: int,
        buffer_bytes: int,
        request_bytes_max: int,
        data: int,
        is_mirrored: bool,
        stops_on_error: bool,
        early_writers: list[int],
    ) -> None:
        """`early_writers`: how far each has got when the mirror begins."""
        size = granules * GRANULE + tail
        content = b"".join(bytes([0xD0 if data >> i & 1 else 0]) * GRANULE for i in range(13))
        self.world = self.world_class(
            content[:size],
            granularity=granularity,
            unit=granularity // parts,
            begins_fine=bool(data & 1),
            buffer_bytes=buffer_bytes,
            request_bytes_max=request_bytes_max,
            stops_on_error=stops_on_error,
        )
        for steps in early_writers:
            self.guest_asks(0, 0, 1 << 20, False, 0.5, False, steps, False)
        if is_mirrored:
            self.world.attach()
            self.world.mark_all()
            self.world.copier.start()

    # Few rules with much in each: Hypothesis leaves some rules out of each run, and most mutants
    # show only where several things come together.

    @precondition(lambda self: len(self.w.guests) < GUESTS_MAX)
    @rule(
        granule=slots,
        delta=st.sampled_from((0, 0, 0, 100, GRANULE - 1)),
        length=st.sampled_from(
            (128, GRANULE, 1, 100, GRANULE + 100, 2 * GRANULE, 1 << 20, 1 << 20)
        ),
        is_zero=st.sampled_from((False, False, False, True)),
        cut=st.sampled_from((0.0, 0.5)),
        is_synchronous=st.sampled_from((False, False, True)),
        steps=st.sampled_from((9, 1, 2, 0, 3, 9)),
        pumps=st.booleans(),
    )
    def guest_asks(
        self,
        granule: int,
        delta: int,
        length: int,
        is_zero: bool,
        cut: float,
        is_synchronous: bool,
        steps: int,
        pumps: bool,
    ) -> None:
        """`steps`: how far it gets at once."""
        offset = (granule * GRANULE + delta) % self.w.size
        self.writes += 1
        fill = 0 if is_zero else 1 + self.writes % 200
        content = bytes([fill]) * min(length, self.w.size - offset)
        self.w.add_guest(offset, content, cut=cut, is_synchronous=is_synchronous)
        guest = self.w.guests[-1]
        for _ in range(steps):
            self._step(guest)
        if pumps:
            self.w.copier.pump()

    @precondition(lambda self: self.w.guests)
    @rule(which=slots, steps=st.sampled_from((1, 1, 2, 9)), fails=st.sampled_from((False, True)))
    def guest_goes_on(self, which: int, steps: int, fails: bool) -> None:
        """Perhaps its write fails here, half done; no effect where it does no I/O."""
        guest = self._guest(which)
        self.w.step_guest(guest, fail=fails)
        for _ in range(steps - 1):
            self._step(guest)

    @precondition(lambda self: self.w.devices.requests)
    @rule(which=slots, action=st.sampled_from(REQUEST_ACTIONS), count=st.integers(1, 4))
    def requests_go_on(self, which: int, action: str, count: int) -> None:
        """`others`: all but this one, which is stuck; `works`: it has its effect, and no end yet;
        `first`: in order, and well."""
        requests = self.w.devices.requests
        request = requests[which % len(requests)]
        if action == "others":
            self.w.copy_all(request)
        elif action in ("works", "half"):
            request.go_on(1.0 if action == "works" else 0.5)
        elif action == "first":
            for _ in range(count):
                if requests:
                    self.w.devices.end(requests[0], "well")
                    self.w.check()
        else:
            self.w.devices.end(request, action)

    @precondition(lambda self: self.w.devices.requests and len(self.w.guests) < GUESTS_MAX)
    @rule(
        which=slots,
        has_worked=st.booleans(),
        is_zero=st.sampled_from((False, False, True)),
        is_synchronous=st.booleans(),
        others_go_on=st.booleans(),
        outcome=st.sampled_from(("well", "well", "later")),
    )
    def write_meets_request(
        self,
        which: int,
        has_worked: bool,
        is_zero: bool,
        is_synchronous: bool,
        others_go_on: bool,
        outcome: str,
    ) -> None:
        """A guest writes what a request, which is stuck before or after its effect, is at."""
        requests = self.w.devices.requests
        request = requests[which % len(requests)]
        request.go_on(1.0 if has_worked else 0.0)
        granule, delta = divmod(request.offset, GRANULE)
        self.guest_asks(
            granule, delta, request.length, is_zero, 0.0, is_synchronous, 9, others_go_on
        )
        if others_go_on:
            self.w.copy_all(request)
        if outcome != "later" and request in requests:
            self.w.devices.end(request, outcome)

    @precondition(lambda self: self.w.is_tracking)
    @rule(
        action=st.sampled_from(COPIER_ACTIONS),
        at_once=st.lists(st.sampled_from(("well", "unchanged", "torn", "later")), max_size=6),
        speed=st.sampled_from((0, 1000, 100_000)),
    )
    def copier(self, action: str, at_once: list[str], speed: int) -> None:
        copier = self.w.copier
        if action == "copy":
            self.w.copy_all()
            return
        if action == "start" and self.w.devices.is_lost:
            return  # the job does not, before the target is back
        self.w.devices.at_once = at_once
        if action == "speed":
            copier.set_speed(speed)
        elif action == "flush":
            copier.flush(lambda error: None)
        elif action == "refine":
            self.w.refine()
        elif action == "disown":
            copier.stop()
            copier.disown()
        else:
            {"pump": copier.pump, "start": copier.start, "stop": copier.stop}[action]()
        self.w.devices.at_once = []

    @precondition(lambda self: not self.w.is_tracking)
    @rule(action=st.sampled_from(("both", "copy", "attach", "mark")))
    def mirror_begins(self, action: str) -> None:
        """Also mid-write, and with writes ending between its two steps."""
        if not self.w.is_attached:
            self.w.attach()
        if action != "attach":
            self.w.mark_all()
            if action != "mark":
                self.w.copier.start()
            if action == "copy":
                self.w.copy_all()

    @rule(
        elapsed_s=st.sampled_from((0.0, 0.1, 2.0)),
        coarseness_bytes=st.sampled_from((EXTENT_UNIT_BYTES, GRANULE, 3 * GRANULE)),
        extents_max=st.sampled_from((99, 1, 2)),
    )
    def time_passes(self, elapsed_s: float, coarseness_bytes: int, extents_max: int) -> None:
        self.w.loop.turn(elapsed_s)
        self.w.copier.hot.look(self.w.loop.clock(), self.w.copier.cursor, None)
        self.w.devices.coarseness_bytes = coarseness_bytes
        self.w.devices.extents_max = extents_max

    @rule(
        action=st.sampled_from(GATE_ACTIONS),
        which=slots,
        steps=st.integers(0, 3),
        is_kept=st.sampled_from((False, False, True)),
    )
    def gate_or_question(self, action: str, which: int, steps: int, is_kept: bool) -> None:
        if action == "in sync":
            self._ask_in_sync(which)
        elif self.w.is_held:
            self.w.release()
        else:
            if action == "hold" or self._next_to_enter() is None:
                self.w.hold()
            else:
                self._close_gate_after_announcement(steps)
            self.w.check()
            if self.w.is_held and not is_kept:
                self.w.release()

    def _close_gate_after_announcement(self, steps: int) -> None:
        """Between the two steps of `enter`. (Dekker's.)"""
        guest = self._next_to_enter()
        assert guest is not None
        self.w.announced.on_add = self.w.hold_meanwhile
        for _ in range(1 + steps):
            self._step(guest)
        self.w.announced.on_add = None

    def _ask_in_sync(self, which: int) -> None:
        """A guest goes on in the middle of the question; the answer is true of some moment."""
        before = self._is_in_sync()
        if self.w.guests:
            guest = self._guest(which)
            self.w.condition.on_release = lambda: self._step(guest)
        answer = self.w.tracker.in_sync
        self.w.condition.on_release = None
        assert answer in (before, self._is_in_sync()), "in sync, they say, at no moment"

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.world is not None:
            self.is_broken = True
            self.world.check()
            self.is_broken = False

    def teardown(self) -> None:
        if self.world is not None:
            try:
                if not self.is_broken:
                    self.world.drain()
            finally:
                self.world.close()

    @property
    def w(self) -> World:
        assert self.world is not None
        return self.world

    def _guest(self, which: int) -> Guest:
        return self.w.guests[which % len(self.w.guests)]

    def _next_to_enter(self) -> Guest | None:
        return next((guest for guest in self.w.guests if guest.token is None), None)

    def _step(self, guest: Guest) -> None:
        if guest in self.w.guests:
            self.w.step_guest(guest)

    def _is_in_sync(self) -> bool:
        return not self.w.claims and self.w.tracker.dirty.is_empty


class LosingMachine(MirrorMachine):
    """The same with a target whose connection is given up. On its own, since each rule more makes
    the others rarer."""

    @precondition(lambda self: self.w.is_tracking)
    @rule(which=slots, action=st.sampled_from(LOST_ACTIONS))
    def target_is_lost(self, which: int, action: str) -> None:
        """With requests in flight that the server carries out late, in part, or never."""
        if not self.w.devices.is_lost:
            self.w.give_up_target()
        elif action == "back":
            self.w.reconnect()
        if self.w.devices.left and action in LATE_PARTS:
            self.w.devices.carry_out_late(which, LATE_PARTS[action])
