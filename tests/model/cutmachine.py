"""The machine of cutworld.py: guests, cuts and the sender in all orders of their steps."""

from __future__ import annotations

from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model import choices as st
from model.cutparts import Write
from model.cutworld import GRANULE, CutWorld

GUESTS_MAX = 3

slots = st.sampled_from((0, 0, 1, 2, 3, 5))
"""Which guest or request: modulo how many there are."""

kinds = st.sampled_from(("pwrite", "pwrite", "pwrite", "zero", "trim", "flush"))
lengths = st.sampled_from((128, GRANULE, 100, GRANULE + 100, 2 * GRANULE, 1 << 20))
outcomes = st.sampled_from(("well", "well", "well", "half", "unchanged"))


class CutMachine(RuleBasedStateMachine):
    world_class: type[CutWorld] = CutWorld

    def __init__(self) -> None:
        super().__init__()
        self.world: CutWorld | None = None
        self.has_failed = False
        self.asked = 0

    @initialize(
        granules=st.sampled_from((2, 3, 8)),
        tail=st.sampled_from((0, 100)),
        parts=st.sampled_from((1, 4)),
        memory_bytes=st.sampled_from((1 << 20, 1 << 20, 700, 0, 100, 100)),
        spill_bytes=st.sampled_from((0, 1 << 16, 1 << 16, 600)),
        spill_fails=st.sampled_from((False, False, False, True)),
        breaks_guest_writes=st.sampled_from((False, False, True)),
        data=st.integers(0, 255),
        early=st.lists(st.integers(0, 7), max_size=4),
        is_cut=st.booleans(),
    )
    def make(
        self,
        granules: int,
        tail: int,
        parts: int,
        memory_bytes: int,
        spill_bytes: int,
        spill_fails: bool,
        breaks_guest_writes: bool,
        data: int,
        early: list[int],
        is_cut: bool,
    ) -> None:
        """`early`: granules that are written before the first cut."""
        content = b"".join(bytes([0xD0 if data >> i & 1 else 0]) * GRANULE for i in range(8))
        self.world = self.world_class(
            (content + bytes(tail))[: granules * GRANULE + tail],
            unit=GRANULE // parts,
            memory_bytes=memory_bytes,
            spill_bytes=spill_bytes,
            spill_fails=spill_fails,
            breaks_guest_writes=breaks_guest_writes,
        )
        for _ in range(2):
            self.w.changes.look()
        for granule in early:
            self._finish(self._ask("pwrite", granule, 0, 128 if data & 1 else GRANULE))
        if is_cut:
            self._cut(2)

    @precondition(lambda self: len(self.w.under_way) < GUESTS_MAX)
    @rule(
        kind=kinds,
        granule=slots,
        delta=st.sampled_from((0, 0, 100, GRANULE - 1)),
        length=lengths,
        steps=st.sampled_from((30, 1, 2, 3, 4, 6, 8)),
    )
    def guest_asks(self, kind: str, granule: int, delta: int, length: int, steps: int) -> None:
        self._go_on(self._ask(kind, granule, delta, length), steps)

    @precondition(lambda self: self.w.under_way)
    @rule(which=slots, steps=st.sampled_from((1, 1, 2, 4, 30)), fails=st.booleans())
    def guest_goes_on(self, which: int, steps: int, fails: bool) -> None:
        guests = self.w.under_way
        write = guests[which % len(guests)]
        self.w.step(write, fails=fails)
        self._go_on(write, steps - 1)

    @rule(turns=st.integers(0, 3), elapsed_s=st.sampled_from((0.0, 0.0, 0.1)))
    def cut(self, turns: int, elapsed_s: float) -> None:
        self._cut(turns)
        self.w.loop.turn(elapsed_s)

    @precondition(lambda self: self.w.points.view is not None)
    @rule(count=st.integers(0, 3), which=slots, outcome=outcomes, all_end=st.booleans())
    def sender_reads(self, count: int, which: int, outcome: str, all_end: bool) -> None:
        self.w.read_next(count)
        self.w.end_read(which, outcome)
        while all_end and self.w.requests.requests:
            self.w.end_read(0, "well")

    @precondition(lambda self: self.w.points.view is not None)
    @rule(
        action=st.sampled_from(("acknowledge", "acknowledge", "all", "all", "lose", "commit")),
        which=slots,
    )
    def far_side(self, action: str, which: int) -> None:
        if action == "acknowledge":
            self.w.acknowledge(which)
        elif action == "lose":
            self.w.lose()
        elif action == "all":
            self._send_all()
        self.w.commit()

    @precondition(lambda self: self.w.requests.requests and len(self.w.under_way) < GUESTS_MAX)
    @rule(kind=kinds, which=slots, has_read=st.booleans(), ends_first=st.booleans())
    def guest_meets_sender(self, kind: str, which: int, has_read: bool, ends_first: bool) -> None:
        """A guest changes what the sender is reading."""
        requests = self.w.requests.requests
        request = requests[which % len(requests)]
        request.go_on(1.0 if has_read else 0.5)
        write = self._ask(kind, request.offset // GRANULE, 0, request.length)
        if ends_first:
            self._go_on(write, 3)
            self.w.requests.end(request, "well")
        self._go_on(write, 30)

    @precondition(lambda self: len(self.w.under_way) < GUESTS_MAX - 1)
    @rule(
        kind=kinds,
        granule=slots,
        length=lengths,
        steps=st.integers(1, 12),
        other=st.sampled_from((1, 4, 30)),
    )
    def guests_meet(self, kind: str, granule: int, length: int, steps: int, other: int) -> None:
        """Two guests change the same granule, and stand anywhere in it."""
        first = self._ask(kind, granule, 0, length)
        second = self._ask("pwrite", granule, 100, 128)
        self._go_on(first, steps)
        self._go_on(second, other)

    @precondition(lambda self: self.w.points.view is not None)
    @precondition(lambda self: len(self.w.under_way) < GUESTS_MAX)
    @rule(first=slots, second=slots, reads=st.integers(0, 1), length=lengths)
    def saved_meets_sender(self, first: int, second: int, reads: int, length: int) -> None:
        """What a guest has saved is on its way when another guest saves more."""
        for granule in (first, second):
            self._go_on(self._ask("pwrite", granule, 0, length), 30)
            self.w.read_next(reads)

    @rule(elapsed_s=st.sampled_from((0.0, 0.1, 1.0)), looks=st.booleans(), is_asked=st.booleans())
    def time_passes(self, elapsed_s: float, looks: bool, is_asked: bool) -> None:
        self.w.loop.turn(elapsed_s)
        if looks:
            self.w.changes.look()
            self.w.lag.look()
        if is_asked:
            self.w.check_lag()

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.world is not None:
            self.has_failed = True
            self.world.check()
            self.has_failed = False

    def teardown(self) -> None:
        if self.world is not None:
            try:
                if not self.has_failed:
                    self.world.drain()
            finally:
                self.world.close()

    @property
    def w(self) -> CutWorld:
        assert self.world is not None
        return self.world

    def _ask(self, kind: str, granule: int, delta: int, length: int) -> Write:
        offset = (granule * GRANULE + delta) % self.w.size
        self.asked += 1
        content = bytes([1 + self.asked % 200]) * min(length, self.w.size - offset)
        return self.w.ask(kind, offset, content)

    def _go_on(self, write: Write, steps: int) -> None:
        for _ in range(steps):
            self.w.step(write)

    def _finish(self, write: Write) -> None:
        while not write.fiber.is_over:
            self.w.step(write)

    def _cut(self, turns: int) -> None:
        self.w.cut()
        for _ in range(turns):
            self.w.loop.turn()

    def _send_all(self) -> None:
        self.w.read_next(9)
        while self.w.requests.requests or self.w.spill.reads:
            self.w.end_read(0, "well")
        while self.w.sent and self.w.points.view is not None:
            self.w.acknowledge(0)
