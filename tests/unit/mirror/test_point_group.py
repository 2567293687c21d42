"""Points of several disks of one guest: of one moment, with one number; and what becomes of them
while one of the jobs cannot take part. Each test ends with points that are recovered and compared.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest
from support.seeds import SEED, print_seed
from unit.mirror.groupparts import (
    INTERVAL_S,
    PointsWorld,
    assert_common_again,
    assert_last_points_are_the_disks,
    at,
    common,
    kept,
    not_started,
    with_points,
)
from unit.mirror.jobparts import IO_ERROR

from nbdmirror.errors import CommandError, DeviceError
from nbdmirror.mirror.cut import CUT_LIMIT_S
from nbdmirror.mirror.options import Policy
from nbdmirror.mirror.point_group import CommonCut, CutRun, Moment, PointGroup
from nbdmirror.mirror.point_run import LATE_PAUSE_S, PointRun

WRITES = 120


def test_points_are_of_one_moment_and_an_idle_disk_has_them_too() -> None:
    worlds = a, b = with_points("a", "b")
    for number in range(1, 6):
        a.count(number)
        a.pass_s(INTERVAL_S)
    a.pass_s(INTERVAL_S)
    groups = common(a, b)
    assert len(groups) >= 5 and len(set(groups)) == len(groups)
    for group in groups:
        (one, other) = ([p for p in world.points if p.group == group] for world in worlds)
        assert [point.time_ns for point in one] == [point.time_ns for point in other]
    assert [a.number(at(a, group)) for group in groups[-5:]] == [1, 2, 3, 4, 5]
    count = len(b.points)
    a.pass_s(10.0)
    assert len(b.points) == count, "there is nothing new"
    assert_last_points_are_the_disks(*worlds)


# The order of writes on several disks.


def in_turn(worlds: Sequence[PointsWorld], seed: str) -> None:
    """A guest writes the next number to the first disk, then to the second one, each when the one
    before was answered; requests and pauses take any time."""
    chance, loop = random.Random(seed), worlds[0].loop

    def let_time_pass() -> None:
        loop.pass_s(chance.choice((0.0, 0.001, 0.004, 0.02, 0.02, 0.07)))

    for world in worlds:
        world.busy.during = let_time_pass
    for number in range(1, WRITES):
        for world in worlds:
            while world.is_held:
                loop.pass_s(0.001)
            world.count(number)
            let_time_pass()
    for world in worlds:
        world.busy.during = lambda: None
    loop.pass_s(2 * INTERVAL_S + LATE_PAUSE_S)


def assert_numbers_are_in_order(worlds: Sequence[PointsWorld]) -> None:
    groups = common(*worlds)
    assert len(groups) >= 10, "too few to say anything"
    before = 0
    for group in groups:
        numbers = [world.number(at(world, group)) for world in worlds]
        assert numbers[0] >= before
        for earlier, later in itertools.pairwise(numbers):
            assert later <= earlier <= later + 1, f"{numbers} is no moment of the guest"
        assert numbers[0] - numbers[-1] <= 1
        before = numbers[0]
    assert before == WRITES - 1


def the_order_of_writes(seed: str, *names: str) -> None:
    worlds = with_points(*names, ring_bytes=4 << 20)
    in_turn(worlds, seed)
    assert_numbers_are_in_order([world for world in worlds if world.points])
    assert_last_points_are_the_disks(*worlds)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c")])
def test_what_was_answered_before_is_in_the_same_moment(names: tuple[str, ...]) -> None:
    print_seed()
    the_order_of_writes(f"{SEED}", *names)


def one_after_the_other(self: CommonCut) -> None:
    """A cut of each disk for itself, under the same number."""
    moments: list[Moment] = []

    def moment() -> Moment:
        moments.append(moments[0] if moments else self._moment())
        return moments[0]

    for number, run in enumerate(self._runs):
        assert isinstance(run, PointRun)
        alone = CommonCut([run], loop=run._loop, moment=moment)
        run.cutting(alone)
        run._loop.call_later(number * 0.05, alone._cut.start)


def without_the_gates(self: CommonCut) -> None:
    """Guests' requests in progress are not waited for."""
    for run in self._runs:
        run.cutting(self)
    self._take()
    self._taken()


def several_orders_of_writes() -> None:
    for number in range(5):
        the_order_of_writes(f"{SEED}-{number}", "a", "b")


@pytest.mark.parametrize("broken", [one_after_the_other, without_the_gates])
def test_a_cut_that_is_not_of_one_moment_is_noticed(broken: Callable[[CommonCut], None]) -> None:
    print_seed()
    with patch.object(CommonCut, "start", broken), pytest.raises(AssertionError):
        several_orders_of_writes()


# A job that cannot take part.


def test_the_number_of_the_moment_is_told() -> None:
    """In events, as in the journals; and by no point that has none."""
    a, b = with_points("a", "b")
    b.job.pause()
    a.settle()
    a.count(1)
    a.pass_s(2 * INTERVAL_S)
    b.job.resume()
    a.count(2)
    a.pass_s(2 * INTERVAL_S)
    for world in (a, b):
        told = {data["sequence"]: data for data in world.told("X_NBDMIRROR_POINT")}
        assert {n: data.get("group") for n, data in told.items()} == {
            point.sequence: point.group or None for point in world.points
        }
        assert world.job.run is not None and world.job.run.last is not None
        assert world.job.run.last.group == world.last.group
    assert 0 in a.groups() and a.last.group == b.last.group != 0
    assert_last_points_are_the_disks(a, b)


def assert_left_out(a: PointsWorld, b: PointsWorld, count: int = 3) -> None:
    """Points of `a` are made, and have no number; `b` has none."""
    before, others = len(a.points), len(b.points)
    for number in range(count):
        a.count(number)
        a.pass_s(INTERVAL_S + 0.1)
    assert a.groups()[before:] == [0] * count
    assert len(b.points) == others


def test_a_paused_job_is_left_out() -> None:
    a, b = with_points("a", "b")
    b.job.pause()
    a.settle()
    assert b.status == "standby"
    assert_left_out(a, b)
    b.job.resume()
    assert_common_again(a, b)


def test_a_number_that_not_all_share_is_noticed() -> None:
    with (
        patch.object(PointGroup, "cutting", lambda self, runs: True),
        pytest.raises(AssertionError),
    ):
        test_a_paused_job_is_left_out()


def test_the_first_moment_of_all_is_when_all_have_ended_the_first_copy() -> None:
    a, b = not_started("a", "b", interval_s=60.0)
    b.target.requests.holds = {"write"}
    for world in (a, b):
        world.job.start()
    a.pass_s(1.0)
    assert (a.status, b.status) == ("ready", "running")
    a.count(1)
    a.pass_s(61.0)
    assert a.groups() == [0, 0]
    b.target.requests.answer_all()
    a.pass_s(1.0)
    assert b.status == "ready", "the first point does not wait for an interval"
    assert common(a, b) == [a.groups()[-1]] == b.groups()
    a.pass_s(61.0)
    assert len(b.points) == 1, "nothing has changed"
    a.count(2)
    b.count(2)
    a.pass_s(61.0)
    for world in (a, b):
        assert world.content(world.last) == bytes(world.source.data)


def test_a_job_that_stopped_on_an_error_is_left_out() -> None:
    a, b = with_points("a", "b", on_target_error=Policy.STOP)
    b.journal_requests.errors = {"write": IO_ERROR}
    b.count(1)
    a.pass_s(INTERVAL_S + 0.1)
    assert b.status == "standby"
    b.journal_requests.errors = {}
    assert_left_out(a, b)
    b.job.resume()
    a.pass_s(2 * INTERVAL_S)
    assert_common_again(a, b)


def test_a_job_that_waits_for_its_far_side_is_left_out() -> None:
    a, b = with_points("a", "b", on_target_error=Policy.STOP)
    b.resources.holds = {"reconnect"}
    b.job.pause()
    a.settle()
    b.job.resume()
    a.settle()
    assert b.job.activity.value == "reconnecting"
    assert_left_out(a, b)
    b.resources.holds = set()
    b.resources.answer()
    assert_common_again(a, b)


def test_a_job_whose_guest_has_slow_requests_is_left_out_for_a_while() -> None:
    a, b = with_points("a", "b")
    a.pass_s(5.0)
    a.count(5)
    count = len(a.points)
    token = b.disk.ledger.enter()
    a.pass_s(INTERVAL_S / 2 + CUT_LIMIT_S)
    assert len(a.points) == count and b.job.run is not None and b.job.run.late_cuts == 1
    a.pass_s(INTERVAL_S)
    assert a.groups()[count:] == [0], "the others do not wait for it"
    b.disk.ledger.leave(token, 0, 0)
    a.pass_s(LATE_PAUSE_S)
    assert_common_again(a, b)


def test_a_broken_point_is_missing_in_one_journal() -> None:
    a, b = with_points("a", "b")
    a.pass_s(5.0)
    b.journal_requests.holds = {"write"}
    a.count(1)
    b.count(1)
    a.pass_s(2 * INTERVAL_S)
    group = a.last.group
    assert group and group not in b.groups()
    assert b.job.run is not None
    b.job.run._points.break_off(DeviceError("the store is full"))
    a.settle()
    b.journal_requests.answer_all()
    a.pass_s(2 * INTERVAL_S)
    assert b.told("X_NBDMIRROR_POINT_BROKEN")
    assert group in a.groups() and group not in b.groups()
    assert a.number(at(a, common(a, b)[-1])) == b.number(at(b, common(a, b)[-1])) == 1
    assert_common_again(a, b)


def test_no_moment_comes_while_a_point_is_being_sent() -> None:
    a, b = with_points("a", "b")
    a.pass_s(5.0)
    b.journal_requests.holds = {"write"}
    a.count(1)
    b.count(1)
    a.pass_s(2 * INTERVAL_S)
    count = len(a.points)
    a.count(2)
    a.pass_s(5.0)
    assert len(a.points) == count
    b.journal_requests.answer_all()
    a.pass_s(0.1)
    assert a.number(at(a, common(a, b)[-1])) == 2, "it is overdue"
    assert_common_again(a, b)


def test_a_job_that_stops_during_the_cut_does_not_hold_the_others() -> None:
    a, b = with_points("a", "b")
    a.pass_s(5.0)
    a.count(1)
    token = b.disk.ledger.enter()
    a.pass_s(INTERVAL_S / 10)
    assert a.is_held and b.is_held
    count = len(a.points)
    b.job.pause()
    assert not a.is_held and not b.is_held
    a.pass_s(0.1)
    assert a.groups()[count:] == [0], "at once"
    b.disk.ledger.leave(token, 0, 0)
    b.job.resume()
    assert_common_again(a, b)


def test_jobs_of_a_group_have_the_same_interval() -> None:
    a, b = with_points("a", "b")
    a.job.point_group.check_interval(INTERVAL_S)
    text = r"'x-nbdmirror-interval' expects 0\.5, as job 'a' of its group has"
    with pytest.raises(CommandError, match=text):
        a.job.point_group.check_interval(60.0)
    assert_last_points_are_the_disks(a, b)


# Endings.


def test_a_group_pivots_together() -> None:
    a, b = with_points("a", "b")
    a.count(1)
    for world in (a, b):
        world.job.complete()
    a.pass_s(5.0)
    for world in (a, b):
        assert world.status == "null" and world.job.pivoted
        world.assert_identical()


def test_jobs_that_are_cancelled_softly_make_their_last_points_alone() -> None:
    a, b = with_points("a", "b")
    a.pass_s(5.0)
    for world in (a, b):
        world.count(3)
    for world in (a, b):
        world.job.cancel(force=False)
    a.pass_s(5.0)
    for world in (a, b):
        assert world.status == "null"
        assert world.groups()[-1:] == [0]
        world.assert_identical()


def test_a_job_that_is_broken_off_leaves_each_job_alone() -> None:
    a, b = with_points("a", "b")
    a.job.group.break_up(a.job)
    assert a.job.point_group is not b.job.point_group
    assert a.job.point_group.members == [a.job]
    a.count(1)
    a.pass_s(2 * INTERVAL_S)
    assert a.last.group == 0 and a.content(a.last) == bytes(a.source.data)
    assert not b.job.point_group.members, "it was cancelled"


def test_the_jobs_that_are_left_have_a_moment_of_all_of_them() -> None:
    """As after a restart: their ends do not belong together."""
    a, b, c = kept("a", "b", "c")
    a.pass_s(5.0)
    a.count(1)
    a.pass_s(INTERVAL_S)
    assert len(common(a, b, c)) == 2
    c.job.cancel(force=False)
    a.pass_s(5.0)
    assert c.status == "null"
    c.assert_identical()
    assert_common_again(a, b)


def test_runs_of_some_jobs_are_not_the_whole_group() -> None:
    a, b = with_points("a", "b")
    run: CutRun | None = a.job.cut_run
    assert run is not None
    group = a.job.point_group
    assert not group.cutting([run])
    assert not PointGroup().cutting([])
    assert group.key and group.key == b.job.point_group.key
    assert not PointsWorld().job.point_group.key
    assert_last_points_are_the_disks(a, b)
