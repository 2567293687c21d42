"""The last point of a job that ends (last_point.py): what the image has then, and who is held for
it."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from support.rings import rings_of
from unit.mirror.groupparts import INTERVAL_S, SIZE, PointsWorld, worlds_of

from nbdmirror.devices.base import Done
from nbdmirror.mirror.quiesce import CONVERGE_S
from nbdmirror.points.format import State
from nbdmirror.points.requests import Side

ONE_AND_A_HALF = SIZE + SIZE // 2
"""A ring that has room for one point of the whole disk, and not for two."""


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


@rings_of(ONE_AND_A_HALF)
def test_a_last_point_for_which_there_is_no_room_yet() -> None:
    """Guests are held, and the image has to become the point before first. That is waited for, and
    not tried again and again."""
    world = with_points(ring_bytes=ONE_AND_A_HALF, keep_s=0.0)
    world.journal_requests.holds = {"write"}
    world.disk.pwrite(b"1" * SIZE, 0, False)
    world.job.complete()
    world.pass_s(CONVERGE_S + 1.0)
    assert world.status == "ready" and not world.is_held
    world.disk.pwrite(b"2" * SIZE, 0, False)
    image = world.exports[Side.IMAGE].requests
    image.holds = {"write"}
    world.journal_requests.answer_all()
    assert world.is_held and image.held
    assert not world.told("X_NBDMIRROR_POINT_BROKEN")
    image.answer_all()
    world.pass_s(1.0)
    assert world.disk.has_moved and not world.is_held
    assert not world.told("X_NBDMIRROR_POINT_BROKEN")
    assert world.target.data == world.source.data


def test_a_disk_that_changes_by_itself_while_it_is_handed_over() -> None:
    """A server of the disk has lost writes that the image has: the image is not level any more."""
    world = with_points()
    world.count(1)
    far, changes = world.resources.far_side, 0
    assert far is not None
    apply = far.apply

    def change_and_apply(done: Done, *, until: int = 0, hands_over: bool = False) -> None:
        nonlocal changes
        if hands_over and not changes:
            changes += 1
            assert world.is_held
            world.source.data[512:1024] = b"c" * 512
            world.job.source_lost_writes()
        apply(done, until=until, hands_over=hands_over)

    with patch.object(far, "apply", change_and_apply):
        world.job.complete()
        world.pass_s(5.0)
    assert changes and world.disk.has_moved
    assert world.target.data == world.source.data
