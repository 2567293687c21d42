"""A running job changes to points, and from points to another copy mode."""

from __future__ import annotations

import pytest
from unit.mirror.groupparts import PointsWorld, worlds_of

from nbdmirror.errors import CommandError
from nbdmirror.mirror.options import CopyMode
from nbdmirror.points.format import State


def background(*, is_ready: bool = True) -> PointsWorld:
    """A job without points that has copied, or copies."""
    (world,) = worlds_of("j", has_points=False)
    world.job.start()
    if is_ready:
        world.pass_s(1.0)
        assert world.status == "ready"
    return world


def make_points(world: PointsWorld) -> None:
    world.job.check_settled()
    world.job.make_points(world.plan)


def with_points() -> PointsWorld:
    (world,) = worlds_of("j")
    world.job.start()
    world.pass_s(1.0)
    assert world.status == "ready" and world.points
    return world


def readies(world: PointsWorld) -> int:
    return len(world.told("BLOCK_JOB_READY"))


def check_equal(world: PointsWorld) -> None:
    """The target has what the disk has."""
    world.settle()
    assert world.target.data == world.source.data


@pytest.mark.parametrize("is_ready", [False, True])
def test_a_job_begins_to_make_points(is_ready: bool) -> None:
    world = background(is_ready=is_ready)
    world.count(1)
    make_points(world)
    assert world.job.options.copy_mode is CopyMode.POINTS
    world.pass_s(3.0)
    assert (world.status, readies(world)) == ("ready", 1)
    world.count(2)
    world.pass_s(2.0)
    assert world.number(world.content(world.last)) == 2
    world.count(3)
    world.job.complete()
    world.pass_s(3.0)
    assert world.disk.has_moved
    check_equal(world)


def test_the_lag_grows_until_there_is_a_point() -> None:
    world = background()
    world.count(1)
    world.target.requests.holds = {"write"}
    make_points(world)
    world.pass_s(5.0)
    assert world.job.lag is not None and world.job.lag.lag_s >= 5.0
    world.target.requests.answer_all()
    world.pass_s(3.0)
    assert world.points and world.job.lag.lag_s < 2.0


@pytest.mark.parametrize("mode", [CopyMode.BACKGROUND, CopyMode.WRITE_BLOCKING])
def test_points_end_when_the_image_is_the_last_one(mode: CopyMode) -> None:
    world = with_points()
    world.count(1)
    world.pass_s(2.0)
    world.count(2)
    world.job.change(mode)
    world.pass_s(3.0)
    assert world.job.plan is None and world.job.run is None
    assert "drop_points" in world.resources.calls
    assert world.read().superblock.state is State.TORN
    assert (world.status, readies(world)) == ("ready", 1)
    check_equal(world)
    world.count(3)
    world.pass_s(1.0)
    check_equal(world)
    assert world.job.is_actively_synced == (mode is CopyMode.WRITE_BLOCKING)
    world.job.complete()
    world.pass_s(3.0)
    assert world.disk.has_moved


@pytest.mark.parametrize("has_point", [False, True])
def test_what_is_in_no_point_is_kept_before_points_are_dropped(has_point: bool) -> None:
    """From then on nothing else says that it differs."""
    if has_point:
        world = with_points()
    else:
        (world,) = worlds_of("j")
        world.target.requests.holds = {"write"}
        world.job.start()
        world.settle()
    world.count(1)
    world.job.change(CopyMode.BACKGROUND)
    world.target.requests.answer_all()
    world.pass_s(3.0)
    calls = world.resources.calls
    assert calls.index("keep_changes") < calls.index("drop_points")
    assert world.resources.kept is not None and world.resources.kept.is_dirty(0, 512)
    check_equal(world)


def test_a_pause_while_points_are_dropped() -> None:
    world = with_points()
    world.resources.holds = {"keep_changes"}
    world.job.change(CopyMode.BACKGROUND)
    world.pass_s(2.0)
    world.job.pause()
    world.settle()
    assert world.status == "standby" and world.job.plan is not None
    world.resources.holds = set()
    world.job.resume()
    world.pass_s(3.0)
    assert world.job.plan is None and world.resources.calls.count("drop_points") == 1
    check_equal(world)


def test_points_can_be_given_up_before_there_is_one() -> None:
    (world,) = worlds_of("j")
    world.target.requests.holds = {"write"}
    world.job.start()
    world.settle()
    world.job.change(CopyMode.BACKGROUND)
    world.target.requests.answer_all()
    world.pass_s(2.0)
    assert (world.status, readies(world), world.job.plan) == ("ready", 1, None)
    check_equal(world)


def test_there_and_back() -> None:
    world = background()
    for number in range(1, 4):
        make_points(world)
        world.count(2 * number)
        world.pass_s(3.0)
        assert world.number(world.content(world.last)) == 2 * number
        world.count(2 * number + 1)
        world.job.change(CopyMode.BACKGROUND)
        world.pass_s(3.0)
        check_equal(world)
        world.renew()
    assert readies(world) == 1


def test_a_change_that_must_wait_is_refused() -> None:
    world = with_points()
    world.job.change(CopyMode.BACKGROUND)
    with pytest.raises(CommandError, match="cannot be changed now: it is leaving its points"):
        world.job.change(CopyMode.WRITE_BLOCKING)
    world.pass_s(3.0)
    world.job.pause()
    world.settle()
    with pytest.raises(CommandError, match="cannot be changed now: it is paused"):
        world.job.check_settled()
    world.job.resume()
    world.pass_s(1.0)
    world.job.complete()
    with pytest.raises(CommandError, match="is ending: its copy mode cannot be changed"):
        world.job.check_settled()
    world.pass_s(2.0)
    with pytest.raises(CommandError):
        world.job.check_settled()
