"""Steps of a job with points, and of what may go wrong, in all orders (runworld.py)."""

from __future__ import annotations

from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from model import choices as st
from model.runparts import BLOCKS, Member
from model.runworld import RunWorld

from nbdmirror.errors import CommandError
from nbdmirror.mirror.options import CopyMode

blocks = st.integers(0, BLOCKS - 1)
which = st.integers(0, 1)
sides = st.integers(0, 1)
modes = st.sampled_from((CopyMode.POINTS, CopyMode.BACKGROUND))
TROUBLES = ("link", "power", "pause", "kill", "changes", "write", "fail", "")
seconds = st.sampled_from((0.02, 0.06, 0.3, 0.6, 1.3, 4.0))


class RunMachine(RuleBasedStateMachine):
    world_class: type[RunWorld] = RunWorld
    world: RunWorld | None = None

    @initialize(seed=st.integers(0, 2**32), is_ready=st.booleans())
    def begin(self, seed: int, is_ready: bool) -> None:
        self.world = self.world_class(seed)
        if is_ready:
            self.world.pass_s(2.0)

    @property
    def w(self) -> RunWorld:
        assert self.world is not None
        return self.world

    def member(self, number: int) -> Member:
        return self.w.members[number % len(self.w.members)]

    def _write(self, member: Member, block: int, count: int) -> None:
        if not member.is_held:
            member.change(block, count)
            self.w.settle()

    @rule(number=which, block=blocks, count=st.integers(1, 12))
    def guest_writes(self, number: int, block: int, count: int) -> None:
        self._write(self.member(number), block, count)

    @rule(number=which, block=blocks)
    def request_begins(self, number: int, block: int) -> None:
        member = self.member(number)
        if not member.is_held and len(member.tokens) < 2 and not member.job.is_over:
            member.begin_request(block)

    @rule(number=which)
    def request_ends(self, number: int) -> None:
        member = self.member(number)
        if member.tokens:
            member.end_request()
            self.w.settle()

    @rule(time_s=seconds)
    def time_passes(self, time_s: float) -> None:
        self.w.pass_s(time_s)

    @rule(number=which, side=sides)
    def far_side_is_slow(self, number: int, side: int) -> None:
        self.member(number).devices[side].is_slow = True

    @rule(number=which, side=sides)
    def far_side_is_quick(self, number: int, side: int) -> None:
        self.member(number).devices[side].answer_all()
        self.w.settle()

    @rule(number=which, side=sides, count=st.integers(1, 6), fails=st.sampled_from((0, 0, 0, 1)))
    def requests_are_answered(self, number: int, side: int, count: int, fails: int) -> None:
        for turn in range(count):
            self.member(number).devices[side].answer(fails=fails > turn)
            self.w.settle()

    @rule(number=which, with_power=st.booleans(), time_s=seconds)
    def link_is_lost(self, number: int, with_power: bool, time_s: float) -> None:
        self.member(number).lose_link(with_power=with_power)
        self.w.pass_s(time_s)

    @rule(number=which)
    def link_is_back(self, number: int) -> None:
        self.member(number).is_cut = False
        self.w.pass_s(0.2)

    @rule(number=which, name=st.sampled_from(("", "x", "y")))
    def point_is_asked_for(self, number: int, name: str) -> None:
        self.w.ask(self.member(number), name)
        self.w.settle()

    @rule(number=which, is_pause=st.booleans())
    def job_is_paused(self, number: int, is_pause: bool) -> None:
        try:
            if is_pause:
                self.member(number).job.pause()
            else:
                self.member(number).job.resume()
        except CommandError:
            return
        self.w.settle()

    @rule(number=which, mode=modes, is_busy=st.booleans(), time_s=seconds)
    def copy_mode_changes(self, number: int, mode: CopyMode, is_busy: bool, time_s: float) -> None:
        member = self.member(number)
        if is_busy:
            self._write(member, 7, 2)
        self.w.change_mode(member, mode)
        self.w.pass_s(time_s)

    @rule(number=which, block=blocks)
    def source_loses_writes(self, number: int, block: int) -> None:
        if not self.member(number).job.is_over:
            self.member(number).change_by_itself(block)
            self.w.settle()

    @rule(is_slow=st.booleans())
    def process_is_killed(self, is_slow: bool) -> None:
        w = self.w
        w.kill()
        for member in w.members:
            for device in member.devices:
                device.is_slow = is_slow
        w.pass_s(0.3)

    @rule(
        number=which,
        how=st.sampled_from(("complete", "complete", "cancel", "cancel", "force")),
        side=st.sampled_from((None, 0, 1)),
        is_busy=st.booleans(),
        time_s=seconds,
    )
    def job_ends(
        self, number: int, how: str, side: int | None, is_busy: bool, time_s: float
    ) -> None:
        """While the far side is slow, perhaps, and with a point on its way."""
        member = self.member(number)
        if member.job.is_over:
            return
        if side is not None:
            member.devices[side].is_slow = True
        if is_busy:
            self._write(member, 3, 2)
            self.w.pass_s(0.6)
            self._write(member, 4, 2)
        self.w.end(member, how)
        self.w.pass_s(time_s)

    @rule(
        number=which,
        how=st.sampled_from(("", "", "complete", "cancel")),
        answers=st.integers(0, 40),
        trouble=st.sampled_from(TROUBLES),
    )
    def something_is_disturbed(self, number: int, how: str, answers: int, trouble: str) -> None:
        """A point on its way, and the image that follows; or an end. At any step of it."""
        w, member = self.w, self.member(number)
        if member.job.is_over:
            return
        for device in member.devices:
            device.is_slow = True
        self._write(member, 5, 3)
        w.end(member, how)
        w.pass_s(0.6)
        for _ in range(answers):
            w.random.choice(member.devices).answer()
            w.pass_s(w.random.choice((0.0, 0.0, 0.01)))
        if trouble in ("link", "power"):
            member.lose_link(with_power=trouble == "power")
        elif trouble == "pause":
            self.job_is_paused(number, True)
        elif trouble == "kill":
            w.kill()
        elif trouble == "changes":
            self.source_loses_writes(number, 5)
        elif trouble == "write":
            self._write(member, 6, 3)
        else:
            w.random.choice(member.devices).answer(fails=trouble == "fail")
        w.settle()

    @rule(number=which, block=blocks, time_s=seconds)
    def points_are_made(self, number: int, block: int, time_s: float) -> None:
        """In peace."""
        member = self.member(number)
        for device in member.devices:
            device.answer_all()
        self.w.settle()
        for turn in range(3):
            self._write(member, (block + turn) % BLOCKS, 1)
            self.w.pass_s(time_s)

    @rule()
    def trouble_is_over(self) -> None:
        self.w.calm()

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            try:
                self.world.calm()
            finally:
                self.world.close()
