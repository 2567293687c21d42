"""Steps of a source that sends points, and of what may go wrong, in all orders (pointworld.py)."""

from __future__ import annotations

from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from model import choices as st
from model.pointworld import BLOCKS, PointWorld

WAYS = ("all", "all", "part", "fail", "trim", "late", "give up", "kill", "quick")


class PointMachine(RuleBasedStateMachine):
    world_class: type[PointWorld] = PointWorld
    world: PointWorld | None = None

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.world = self.world_class(seed)

    @property
    def w(self) -> PointWorld:
        assert self.world is not None
        return self.world

    @rule(first=st.integers(0, BLOCKS - 1), count=st.integers(1, 3), zero=st.booleans())
    def guest_writes(self, first: int, count: int, zero: bool) -> None:
        self.w.write(first, count, zero=zero)

    @rule()
    def cut(self) -> None:
        self.w.cut()

    @rule()
    def send(self) -> None:
        self.w.send()

    @rule(number=st.integers(0, 11), count=st.integers(1, 4))
    def requests_end(self, number: int, count: int) -> None:
        for _ in range(count):
            self.w.end_request(number, fails=False)

    @rule()
    def point_is_finished(self) -> None:
        self.w.finish()

    @rule(count=st.integers(0, 2), how=st.sampled_from(WAYS))
    def whole_point(self, count: int, how: str) -> None:
        self.w.write(self.w.random.randrange(BLOCKS), count, zero=False)
        self.w.whole_point(how)

    @rule(count=st.integers(1, 2), then=st.sampled_from(("", "kill", "go on")))
    def footer_is_forgotten(self, count: int, then: str) -> None:
        """It can be read, the next flush succeeds, and a power cut takes the footer away."""
        w = self.w
        w.end_all()
        w.write(w.random.randrange(BLOCKS), count, zero=False)
        w.cut_and_send()
        w.end_while(lambda: w.writer.is_busy)
        w.finish()
        w.end_while(lambda: not w.durable_writes)
        w.forget(0)
        if then == "kill":
            w.kill()
        if then:
            w.end_all()
            w.whole_point("all")

    def _quick_point(self, first: int) -> None:
        """A point is announced, and the superblock has yet to note it."""
        self.w.end_all()
        self.w.apply(0)
        self.w.end_all()
        self.w.write(first, 1, zero=False)
        self.w.whole_point("quick")

    @rule(first=st.integers(0, BLOCKS - 1), is_committing=st.booleans())
    def next_point_is_forgotten(self, first: int, is_committing: bool) -> None:
        """While the superblock notes a point, the next one is written; its loss is told there."""
        w = self.w
        self._quick_point(first)
        w.end_while(lambda: not w.durable_writes)
        noting = w.in_flight
        w.write((first + 1) % BLOCKS, 1, zero=False)
        w.cut_and_send()
        w.end_all(late=noting)
        if is_committing:
            w.finish()
            w.end_all(but="flush", late=noting)
        if noting:
            w.forget(0)
        w.finish()
        w.end_all()
        w.whole_point("all")

    @rule(first=st.integers(0, BLOCKS - 1), second=st.integers(0, BLOCKS - 1))
    def point_follows_at_once(self, first: int, second: int) -> None:
        """It is being committed while the superblock notes the one before, which ends first."""
        w = self.w
        self._quick_point(first)
        noting = w.in_flight
        w.write(second, 1, zero=False)
        w.cut_and_send()
        w.end_all(late=noting)
        w.finish()
        w.end_all(late=[one for one in w.in_flight if one not in noting])

    @rule(first=st.integers(0, BLOCKS - 1), back=st.integers(0, 1), is_trimmed=st.booleans())
    def ring_fills_while_a_point_is_applied(self, first: int, back: int, is_trimmed: bool) -> None:
        """Points that are being applied, and of which the image has nothing yet, are needed. Or the
        image has them, and the trims of their space come late."""
        w = self.w
        w.end_all()
        for number in range(2):
            w.write((first + number) % BLOCKS, 1, zero=False)
            w.whole_point("all")
        w.apply(back)
        if is_trimmed:
            w.end_all(but="trim")
        else:
            w.end_while(lambda: not w.image.pending)
        late = w.in_flight if is_trimmed else w.image.pending[:]
        for _ in range(5):  # more than any ring has room for
            w.write(first, 2, zero=False)
            w.point_beside(late)
        if is_trimmed:
            w.end_all()

    @rule(first=st.integers(0, BLOCKS - 1), count=st.integers(1, 2))
    def point_follows_one_that_is_given_up(self, first: int, count: int) -> None:
        """What was in flight of that one comes late."""
        w = self.w
        w.end_all()
        for number in range(count):
            w.write((first + 2 * number) % BLOCKS, 1, zero=False)
        w.cut_and_send()
        w.give_up()
        late = w.in_flight
        w.write(first, 1, zero=False)
        w.point_beside(late)
        w.end_all()

    @rule(back=st.integers(0, 2), how=st.sampled_from(("", "part", "trim")))
    def point_is_applied(self, back: int, how: str) -> None:
        self.w.apply(back)
        if how:
            self.w.end_all(but=how)

    @rule(first=st.integers(0, BLOCKS - 1), is_killed=st.booleans())
    def earlier_point_follows_one_that_is_cut_off(self, first: int, is_killed: bool) -> None:
        """The image has parts of the later one."""
        w = self.w
        w.end_all()
        for number in range(2):
            w.write((first + number) % BLOCKS, 1, zero=False)
            w.whole_point("all")
        w.apply(0)
        w.end_while(lambda: not w.image.pending)
        if is_killed:
            w.kill()
        else:
            w.lose_link()
        w.apply(1)
        w.end_all(but="part")

    @rule(
        trouble=st.sampled_from(
            ("fail", "forget", "give up", "kill", "power", "link", "seed", "create")
        )
    )
    def something_goes_wrong(self, trouble: str) -> None:
        w = self.w
        if trouble == "fail":
            w.end_request(w.random.randrange(12), fails=True)
        elif trouble == "forget":
            w.forget(w.random.randrange(12))
        elif trouble == "give up":
            w.give_up()
        elif trouble == "kill":
            w.kill()
        elif trouble == "power":
            w.lose_power()
        elif trouble == "link":
            w.lose_link()
        elif trouble == "seed":
            w.finish()
            w.end_all()
            w.write(w.random.randrange(BLOCKS), 1, zero=False)
            w.start_over()
        else:
            w.create_again()

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.close()
