"""Random guests, acknowledgements, errors, pauses and lost targets: whenever a point waits, the
image is exactly what the disk held at its cut, each snapshot too, the bitmaps have all that
differs, and the lag never says less than the truth."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support.seeds import SEED, print_seed
from unit.mirror.jobparts import IO_ERROR, SIZE
from unit.mirror.snapshotparts import BLOCK, Moment, SnapshotsWorld

from nbdmirror.mirror.options import Policy

STEPS = 250
PLACES = 12
"""Blocks that guests change: few, so that they are changed again and again."""


class Walk:
    """One world, and what may happen to it."""

    def __init__(self, seed: str) -> None:
        self.chance = random.Random(seed)
        policy = self.chance.choice([Policy.STOP, Policy.IGNORE])
        self.world = SnapshotsWorld(on_target_error=policy, reconnect_delay_s=60)
        self.history = [Moment(self.world.loop.now_s, bytes(self.world.source.data))]
        """What the disk held since when."""
        self.world.start()

    def run(self) -> None:
        steps: dict[Callable[[], None], int] = {
            self.change: 8,
            self.wait: 8,
            self.acknowledge: 6,
            self.refuse: 1,
            self.hold: 3,
            self.answer: 8,
            self.fail: 1,
            self.heal: 4,
            self.lose: 1,
            self.pause: 1,
            self.resume: 3,
        }
        for _ in range(STEPS):
            self.chance.choices(list(steps), list(steps.values()))[0]()
            self.check()
        self.to_the_end()

    def change(self) -> None:
        self.world.settle()  # this thread cannot wait for a read that it has to answer itself
        if self.world.is_held:
            return
        offset = self.chance.randrange(PLACES) * (SIZE // PLACES // BLOCK) * BLOCK
        length = self.chance.choice([512, BLOCK, 3 * BLOCK])
        if self.chance.random() < 0.8:
            self.world.disk.pwrite(self.chance.randbytes(length), offset, False)
        else:
            self.world.disk.zero(offset, length, may_trim=True, fua=False, fast=False)
        self.history.append(Moment(self.world.loop.now_s, bytes(self.world.source.data)))

    def wait(self) -> None:
        self.world.pass_s(self.chance.choice([0.01, 0.06, 0.5, 1.2]))

    def acknowledge(self) -> None:
        if self.world.acks.awaited:
            self.world.ack()

    def refuse(self) -> None:
        if self.world.acks.awaited:
            self.world.job.acknowledge(self.world.acks.awaited, "no")
            self.world.settle()

    def hold(self) -> None:
        self.world.target.requests.holds = {self.chance.choice(["write", "flush", "zero"])}

    def answer(self) -> None:
        requests = self.world.target.requests
        if requests.held and self.chance.random() < 0.7:
            requests.answer(requests.held[0][0])
        else:
            requests.answer_all()

    def fail(self) -> None:
        kind = self.chance.choice(["write", "flush", "zero"])
        self.world.target.requests.errors[kind] = IO_ERROR

    def heal(self) -> None:
        self.world.target.requests.errors.clear()

    def lose(self) -> None:
        """Late answers do not come any more, and the target is there again at once."""
        if self.world.job.activity.copies:
            self.world.target.requests.give_up()
            self.world.job.target_lost()

    def pause(self) -> None:
        if not self.world.job.pause_wanted and self.world.status in ("ready", "running"):
            self.world.job.pause()

    def resume(self) -> None:
        if self.world.job.pause_wanted:
            self.world.job.resume()

    def check(self) -> None:
        world = self.world
        assert not world.job.is_over
        if world.acks.awaited:
            world.check_image()
        world.check_invariant()
        if world.job.lag is not None:
            self.check_lag(world.loop.now_s - world.job.lag.lag_s)

    def check_lag(self, promised_s: float) -> None:
        """Each write before that time is in the last snapshot."""
        acked = self.world.acked
        assert acked is not None
        promised = max(
            (one for one in self.history if one.at_s < promised_s),
            key=lambda one: one.at_s,
            default=self.history[0],
        )
        last = [one for one in self.history if one.at_s == promised.at_s][-1]
        if acked.at_s < last.at_s:
            assert acked.content == last.content, "the lag is larger than the job says"

    def to_the_end(self) -> None:
        world = self.world
        self.heal()
        for _ in range(10):
            world.target.requests.answer_all()
            self.resume()
            world.pass_s(10.0)
            self.check()
            self.acknowledge()
        assert world.status == "ready" and not world.acks.awaited
        assert world.snapshots[world.acks.last] == bytes(world.source.data)
        world.assert_identical()
        for number, content in world.snapshots.items():
            assert content in {cut.content for cut in world.cuts}, number


@pytest.mark.guarantee("A point that waits for its snapshot is left alone")
@pytest.mark.parametrize("number", range(12))
def test_each_snapshot_is_the_disk_at_one_moment(number: int) -> None:
    print_seed()
    Walk(f"{SEED}-{number}").run()
