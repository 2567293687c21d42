"""Until when a mirror is to have ended, whether it can, and what happens then: in virtual time."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from unit.mirror.jobparts import KIB, MIB, JobWorld
from unit.mirror.watched import STEP_S, Watched

from nbdmirror.mirror.deadline import Kept
from nbdmirror.mirror.options import CopyMode, OnDeadline

SLOW: dict[str, Any] = {"buffer_bytes": 64 * KIB, "write_s": 1.0}
"""A copy of 16 s."""


def watched(in_s: float, on_deadline: str = "report", **more: Any) -> Watched:
    """A job with a deadline in `in_s` seconds."""
    found = Watched(**more)
    change(found, in_s, on_deadline)
    return found


def change(found: Watched, in_s: float, on_deadline: str = "report") -> None:
    job, action = found.world.job, OnDeadline(on_deadline)
    at_s = found.time_s() + in_s
    job.change(CopyMode.BACKGROUND, deadline_at_s=at_s, on_deadline=action)
    assert found.course.deadline.left_s == pytest.approx(in_s)


def told(found: Watched) -> list[tuple[str, str]]:
    events = found.world.told("X_NBDMIRROR_DEADLINE")
    assert all(data["reason"] for data in events)
    return [(data["action"], data["done"]) for data in events]


# Whether it can be kept.


@pytest.mark.parametrize(
    ("in_s", "kept"), [(60.0, Kept.YES), (8.0, Kept.NO), (3.2, Kept.NO), (12.0, Kept.MAYBE)]
)
def test_whether_the_copy_is_fast_enough(in_s: float, kept: Kept) -> None:
    """Asked after 3 s, when the copy has about 12 s to go."""
    found = watched(in_s, **SLOW)
    assert found.course.kept is Kept.UNKNOWN
    found.world.pass_s(3.0)
    prediction = found.course.prediction
    assert prediction is not None and prediction.end_s is not None
    if kept is Kept.MAYBE:
        change(found, prediction.end_s)
    assert found.course.kept is kept


def test_a_guest_that_is_too_fast_keeps_no_deadline() -> None:
    found = watched(3600.0, buffer_bytes=64 * KIB)
    found.write_until_changed(60.0)
    assert found.course.kept is Kept.NO


def test_of_a_job_that_copies_nothing_nothing_is_said() -> None:
    found = watched(3600.0, **SLOW)
    found.world.pass_s(3.0)
    found.world.job.pause()
    found.world.pass_s(3.0)
    assert (found.world.status, found.course.kept) == ("paused", Kept.UNKNOWN)


def test_of_a_ready_job_its_pause_counts() -> None:
    found = watched(3600.0, max_pause_s=0.1)
    found.world.pass_s(5.0)
    assert (found.world.status, found.course.kept) == ("ready", Kept.YES)
    found.world.job.watch.outlook.rate = 64 * KIB
    found.world.target.requests.holds = {"write"}
    found.write_everywhere()
    found.world.pass_s(6.0)
    assert found.course.kept is Kept.MAYBE
    found.world.target.requests.answer_all()


def test_of_a_ready_job_of_an_unknown_speed_nothing_is_said() -> None:
    """Its copy was too short."""
    found = watched(3600.0, max_pause_s=0.1, size=8 * MIB, buffer_bytes=8 * MIB)
    found.world.pass_s(5.0)
    assert (found.world.status, found.course.kept) == ("ready", Kept.YES)
    found.world.target.requests.holds = {"write"}
    found.write_everywhere()
    found.world.pass_s(6.0)
    assert found.course.kept is Kept.UNKNOWN
    found.world.target.requests.answer_all()


def test_of_a_job_that_waits_for_finalize_nothing_is_known() -> None:
    """It is as near its end as it can be by itself, and may never get there."""
    found = watched(3600.0, auto_finalize=False)
    found.world.pass_s(5.0)
    found.world.job.complete()
    found.world.pass_s(5.0)
    assert (found.world.status, found.course.kept) == ("pending", Kept.UNKNOWN)
    found.world.target.requests.holds = {"flush"}  # which the pivot waits for
    found.world.job.finalize()
    found.world.pass_s(0.5)
    assert (found.world.status, found.course.kept) == ("pending", Kept.YES)
    found.world.target.requests.answer_all()
    found.world.pass_s(5.0)
    assert found.world.job.pivoted
    found.world.assert_identical()


# What happens then.


def test_report_only_tells() -> None:
    found = watched(4.0, **SLOW)
    found.world.pass_s(3.0)
    assert told(found) == []
    found.world.pass_s(3.0)
    assert (told(found), found.course.kept) == ([("report", "nothing")], Kept.PASSED)
    assert found.course.deadline.left_s == 0
    found.world.pass_s(60.0)
    assert (found.world.status, len(told(found))) == ("ready", 1)
    found.world.job.complete()
    found.world.pass_s(5.0)
    assert found.world.job.pivoted
    found.world.assert_identical()


def test_a_deadline_that_is_moved_passes_again() -> None:
    found = watched(4.0, **SLOW)
    found.world.pass_s(6.0)
    change(found, 3.0)
    assert found.course.kept is not Kept.PASSED
    found.world.pass_s(6.0)
    assert told(found) == [("report", "nothing")] * 2


def test_what_is_to_be_done_can_be_changed_after_the_deadline() -> None:
    found = watched(4.0, **SLOW)
    found.world.pass_s(6.0)
    found.world.job.change(CopyMode.BACKGROUND, on_deadline=OnDeadline.CANCEL)
    found.world.pass_s(2.0)
    assert told(found) == [("report", "nothing"), ("cancel", "cancel-by-force")]


def test_without_a_deadline_nothing_happens() -> None:
    found = watched(4.0, "cancel", **SLOW)
    found.world.job.change(CopyMode.BACKGROUND, deadline_at_s=None)
    found.world.pass_s(60.0)
    assert (found.world.status, told(found)) == ("ready", [])


def test_a_copy_that_is_not_ready_is_cancelled_by_force() -> None:
    found = watched(4.0, "cancel", **SLOW)
    found.world.pass_s(6.0)
    assert told(found) == [("cancel", "cancel-by-force")]
    assert str(found.world.job.failure) == "its deadline has passed"
    assert found.world.disk.source is found.world.source and not found.world.job.pivoted
    found.world.write()


def test_a_ready_job_is_cancelled_softly() -> None:
    """Its target is a copy of one moment."""
    found = watched(20.0, "cancel")
    found.world.pass_s(10.0)
    found.write_everywhere()
    found.world.pass_s(20.0)
    assert told(found) == [("cancel", "cancel")]
    assert found.world.job.failure is None and not found.world.job.pivoted
    found.world.assert_identical()


@pytest.mark.parametrize("is_paused", [True, False])
def test_a_job_that_does_not_get_to_its_end_is_cancelled_by_force(is_paused: bool) -> None:
    """It is paused, or waits for a pivot that is short enough."""
    found = watched(30.0, "cancel", max_pause_s=0.1)
    found.world.pass_s(10.0)
    found.world.target.requests.holds = {"write"}
    if is_paused:
        found.world.job.pause()
        found.world.pass_s(1.0)
        assert found.world.status == "standby"
    else:
        found.write_everywhere()
        found.world.job.complete()
    found.world.pass_s(18.0)
    assert told(found) == []
    found.world.pass_s(5.0)
    assert told(found) == [("cancel", "cancel-by-force")] and not found.world.job.pivoted
    assert found.world.disk.source is found.world.source


def test_a_ready_job_is_completed() -> None:
    found = watched(20.0, "complete")
    found.world.pass_s(19.0)
    assert (found.world.status, told(found)) == ("ready", [])
    found.world.pass_s(5.0)
    assert told(found) == [("complete", "complete")] and found.world.job.pivoted
    found.world.assert_identical()


def test_a_copy_is_completed_when_it_is_ready() -> None:
    found = watched(4.0, "complete", **SLOW)
    found.world.pass_s(6.0)
    assert (told(found), found.world.status) == ([("complete", "complete-when-ready")], "running")
    found.world.pass_s(30.0)
    assert found.world.job.pivoted and len(told(found)) == 1
    found.world.assert_identical()


def test_a_job_that_is_cancelled_meanwhile_is_not_completed() -> None:
    found = watched(30.0, "complete")
    found.world.pass_s(10.0)
    found.world.target.requests.holds = {"flush"}
    found.world.job.cancel(force=False)
    found.world.pass_s(25.0)
    assert told(found) == [("complete", "nothing")]
    found.world.target.requests.answer_all()
    found.world.pass_s(10.0)
    assert not found.world.job.pivoted
    found.world.assert_identical()


def test_the_pause_that_is_allowed_holds_after_the_deadline() -> None:
    found = watched(15.0, "complete", max_pause_s=0.1)
    found.world.pass_s(10.0)
    found.world.job.watch.outlook.rate = 64 * KIB
    found.world.target.requests.holds = {"write"}
    found.write_everywhere()
    for _ in range(int(60.0 / STEP_S)):
        found.world.pass_s(STEP_S)
        assert not found.world.is_held
    assert told(found) == [("complete", "complete")] and not found.world.job.pivoted
    found.world.target.requests.answer_all()
    found.world.pass_s(20.0)
    assert found.world.job.pivoted and (found.world.job.pause_s or 0) <= 0.1
    found.world.assert_identical()


@pytest.mark.parametrize("by_s", [-86400.0, 86400.0])
def test_a_wall_clock_that_is_stepped_moves_nothing(by_s: float) -> None:
    found = watched(20.0, "cancel")
    found.world.pass_s(5.0)
    found.wall_s += by_s
    found.world.pass_s(5.0)
    assert told(found) == []
    assert found.course.deadline.left_s == pytest.approx(10.0)
    found.world.pass_s(15.0)
    assert told(found) == [("cancel", "cancel")]
    found.world.assert_identical()


# After a restart.


def take_up(world: JobWorld, *, is_paused: bool) -> None:
    mark_all = world.job.tracker.dirty.mark_all
    world.job.take_up(mark_all, is_scanned=True, is_paused=is_paused)
    world.settle()


@pytest.mark.parametrize("is_paused", [True, False])
@pytest.mark.parametrize(
    ("action", "done"), [("cancel", "cancel-by-force"), ("complete", "complete-when-ready")]
)
def test_a_deadline_that_passed_while_the_server_was_away(
    action: str, done: str, is_paused: bool
) -> None:
    """Nothing is done to a job before it runs, or is paused, again."""
    start = partial(take_up, is_paused=is_paused)
    more: dict[str, Any] = {"deadline_at_s": 1.0, "on_deadline": OnDeadline(action)}
    found = Watched(start=start, **more, **SLOW)
    assert found.course.kept is Kept.PASSED
    assert (told(found), found.world.status) == ([], "paused" if is_paused else "running")
    found.world.pass_s(2.0)
    assert told(found) == [(action, done)]
    if is_paused and action == "complete":
        found.world.job.resume()
    found.world.pass_s(60.0)
    assert (found.world.job.pivoted, found.world.job.is_over) == (action == "complete", True)
    if found.world.job.pivoted:
        found.world.assert_identical()
