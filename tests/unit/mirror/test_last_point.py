"""The last point of a job that ends (last_point.py): what the image has then, and who is held for
it."""

from __future__ import annotations

import pytest
from unit.mirror.groupparts import INTERVAL_S, PointsWorld, worlds_of

from nbdmirror.points.format import State


def with_points(**options: float) -> PointsWorld:
    (world,) = worlds_of("j", **options)
    world.job.start()
    world.pass_s(5.0)
    assert world.status == "ready" and world.points
    return world


@pytest.mark.parametrize("keep_s", [0.0, 3600.0])
def test_a_cancelled_job_has_all_that_was_answered_before(keep_s: float) -> None:
    """The guest was shut down. The point that was on its way then is not the last one."""
    world = with_points(keep_s=keep_s)
    world.journal_requests.holds = {"write"}
    world.count(1)
    world.pass_s(2 * INTERVAL_S)
    assert world.job.run is not None and world.job.run.changes.frozen is not None
    world.count(2)
    world.job.cancel(force=False)
    world.settle()
    world.journal_requests.answer_all()
    world.pass_s(5.0)
    assert world.status == "null"
    world.assert_identical()
    assert world.last.sequence == 3


def test_a_cancelled_job_that_has_all_makes_no_further_point() -> None:
    world = with_points()
    world.count(1)
    world.pass_s(2 * INTERVAL_S)
    count = world.last.sequence
    world.job.cancel(force=False)
    world.pass_s(1.0)
    assert world.status == "null" and world.last.sequence == count
    world.assert_identical()


def test_a_cancelled_job_holds_nobody() -> None:
    world = with_points()
    world.journal_requests.holds = {"write"}
    world.count(1)
    world.job.cancel(force=False)
    world.pass_s(2.0)
    assert not world.is_held
    world.count(2)
    world.journal_requests.answer_all()
    world.pass_s(5.0)
    assert world.status == "null"
    assert world.number(bytes(world.target.data)) in (1, 2)
    assert world.read().superblock.state is State.OK
