"""A point that a user asks for of a job in a group: of all jobs, at one moment, or of none."""

from __future__ import annotations

import pytest
from unit.mirror.groupparts import (
    INTERVAL_S,
    PointsWorld,
    not_started,
    while_one_sends,
    with_points,
)

from nbdmirror.errors import CommandError, DeviceError
from nbdmirror.mirror.points_view import REQUEST_S_MAX


def assert_the_last_points_have(name: str, *worlds: PointsWorld) -> None:
    (group,) = {world.last.group for world in worlds}
    assert group
    for world in worlds:
        assert world.last.name == name
        assert world.content(world.last) == bytes(world.source.data)


def assert_nobody_has(name: str, *worlds: PointsWorld) -> None:
    for world in worlds:
        assert name not in [point.name for point in world.points]


def assert_points_go_on(*worlds: PointsWorld) -> None:
    for number, world in enumerate(worlds):
        world.count(number + 1)
    worlds[0].pass_s(2 * INTERVAL_S)
    for world in worlds:
        assert world.content(world.last) == bytes(world.source.data)


@pytest.mark.parametrize("whom", [0, 1])
def test_all_jobs_make_the_point(whom: int) -> None:
    worlds = a, b = with_points("a", "b")
    a.pass_s(5.0)
    b.count(4)
    request = worlds[whom].job.ask_for_point("nightly")
    b.settle()
    assert request.taken.result(0).sequence == worlds[whom].last.sequence
    assert request.committed.result(0).name == "nightly"
    assert_the_last_points_have("nightly", a, b)
    with pytest.raises(CommandError, match=r"journal of job 'b' has a point 'nightly' already$"):
        b.job.ask_for_point("nightly")
    text = "of job 'a' has a point 'nightly' already$"
    with pytest.raises(CommandError, match=text):
        a.job.ask_for_point("nightly")


def test_it_is_there_when_all_far_sides_have_it() -> None:
    a, b = with_points("a", "b")
    a.pass_s(5.0)
    b.journal_requests.holds = {"write"}
    request = a.job.ask_for_point("nightly")
    a.settle()
    assert request.taken.done() and a.last.name == "nightly"
    assert not request.committed.done()
    b.journal_requests.answer_all()
    a.settle()
    assert request.committed.result(0).sequence == a.last.sequence
    assert_the_last_points_have("nightly", a, b)


def test_a_name_that_another_job_has_is_refused() -> None:
    a, b = with_points("a", "b")
    a.pass_s(5.0)
    count = len(a.points)
    b.job.point_group.leave(a.job)
    b.job.ask_for_point("nightly")
    a.settle()
    b.job.point_group.add(a.job)
    text = "journal of job 'b' has a point 'nightly' already; job 'a' makes its points together"
    with pytest.raises(CommandError, match=text):
        a.job.ask_for_point("nightly")
    a.pass_s(5.0)
    assert len(a.points) == count
    assert_points_go_on(a, b)


def test_a_job_that_cannot_make_a_point_is_named() -> None:
    a, b = with_points("a", "b")
    b.job.pause()
    a.settle()
    with pytest.raises(CommandError, match=r"'b' is currently paused; job 'a' makes its points"):
        a.job.ask_for_point("nightly")
    b.job.resume()
    assert_points_go_on(a, b)
    assert_nobody_has("nightly", a, b)


def test_the_first_copy_of_another_job_is_named() -> None:
    a, b = not_started("a", "b")
    b.target.requests.holds = {"write"}
    for world in (a, b):
        world.job.start()
    a.pass_s(1.0)
    with pytest.raises(CommandError, match=r"Job 'b' makes no points yet: .*; job 'a' makes its"):
        a.job.ask_for_point()
    b.target.requests.answer_all()
    a.pass_s(1.0)
    assert_points_go_on(a, b)


def test_no_job_makes_the_point_if_one_stops_before() -> None:
    a, b = while_one_sends()
    request = a.job.ask_for_point("nightly")
    a.pass_s(1.0)
    assert not request.taken.done()
    b.job.pause()
    a.settle()
    error = request.taken.exception(0)
    assert str(error) == "job 'b' of its group: the job is pausing"
    b.journal_requests.answer_all()
    a.pass_s(5.0)
    b.job.resume()
    assert_points_go_on(a, b)
    assert_nobody_has("nightly", a, b)


def test_no_job_makes_the_point_if_no_moment_is_found() -> None:
    a, b = while_one_sends()
    request = a.job.ask_for_point("nightly")
    a.pass_s(REQUEST_S_MAX)
    assert "no moment was found" in str(request.taken.exception(0))
    assert request.committed.exception(0) is not None
    b.journal_requests.answer_all()
    assert_points_go_on(a, b)
    assert_nobody_has("nightly", a, b)
    again = a.job.ask_for_point("nightly")
    a.settle()
    assert again.committed.result(0).name == "nightly"
    assert_the_last_points_have("nightly", a, b)


def test_a_point_that_one_job_breaks_is_told() -> None:
    a, b = with_points("a", "b")
    a.pass_s(5.0)
    b.journal_requests.holds = {"write"}
    b.count(1)
    request = a.job.ask_for_point("nightly")
    a.settle()
    assert b.job.run is not None
    b.job.run._points.break_off(DeviceError("no room"))
    a.settle()
    b.journal_requests.answer_all()
    assert str(request.committed.exception(0)) == "job 'b' of its group: no room"
    assert request.taken.done() and a.last.name == "nightly"
    assert_nobody_has("nightly", b)
    assert_points_go_on(a, b)


def test_a_job_that_has_ended_makes_none() -> None:
    """It was not dismissed yet."""
    (world,) = with_points("j", auto_dismiss=False)
    world.job.cancel(force=False)
    world.pass_s(1.0)
    assert world.status == "concluded"
    with pytest.raises(CommandError, match="in state 'concluded' cannot accept command verb 'po"):
        world.job.ask_for_point("nightly")


def test_a_request_to_all_is_not_for_a_job_alone() -> None:
    """The group is broken up between the command and the moment."""
    a, b = while_one_sends()
    request = a.job.ask_for_point("nightly")
    a.settle()
    for world in (a, b):
        world.job.cancel(force=False)
    b.journal_requests.answer_all()
    a.pass_s(5.0)
    assert "cannot make a point at one moment now" in str(request.taken.exception(0))
    for world in (a, b):
        assert world.status == "null"
        world.assert_identical()
    assert_nobody_has("nightly", a, b)
