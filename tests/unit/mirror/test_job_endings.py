"""How a job's end is written down, and jobs that end together, or are taken up again.
In one process, with a clock that stands still."""

from __future__ import annotations

import errno

import pytest
from unit.mirror.jobdevices import StillLoop
from unit.mirror.jobparts import (
    IO_ERROR,
    JobWorld,
    a_group,
    aborting,
    created,
    ready,
)

from nbdmirror.mirror.group import HOLD_S
from nbdmirror.mirror.options import Ending, Policy
from nbdmirror.mirror.timers import RETRY_S

FOR_EVER_S = 300.0


# How an end is written down.


def test_an_end_is_written_down_before_it_is_one() -> None:
    world = ready()
    world.resources.holds = {"commit"}
    world.job.complete()
    world.pass_s(FOR_EVER_S)
    assert world.status == "pending" and world.is_held and "pivot" not in world.resources.calls
    world.resources.answer()
    assert world.resources.calls == ["prepare", "commit", "pivot", "released", "dismissed"]


def test_nothing_comes_between_an_end_and_its_record() -> None:
    world = ready()
    world.resources.holds = {"commit"}
    world.job.complete()
    world.pass_s(1.0)
    world.job.cancel(force=True)
    world.job.copy_failed("write", IO_ERROR)
    world.pass_s(5.0)
    assert world.status == "pending" and world.is_held
    world.resources.answer()
    assert "pivot" in world.resources.calls and not world.told("BLOCK_JOB_CANCELLED")
    assert world.disk.source is world.target


def test_a_forced_cancel_of_an_end_that_is_being_written_down_leaves_the_target_alone() -> None:
    """Guests are about to be served from it."""
    world = ready()
    world.resources.holds = {"commit"}
    world.job.complete()
    world.pass_s(1.0)
    world.job.cancel(force=True)
    world.pass_s(5.0)
    world.resources.answer()
    assert "pivot" in world.resources.calls and world.target.times_given_up == 0


@pytest.mark.parametrize("policy", [Policy.STOP, Policy.REPORT, Policy.IGNORE])
def test_an_error_while_an_end_cannot_be_written_down_is_one(policy: Policy) -> None:
    world = JobWorld(on_target_error=policy).ready()
    world.resources.errors["prepare"] = OSError(errno.EIO, "the state directory failed")
    world.job.complete()
    world.pass_s(10.0)
    world.target.requests.errors["write"] = IO_ERROR
    world.write()
    world.pass_s(1.0)
    assert world.told("BLOCK_JOB_ERROR")
    assert (world.status, world.job.is_over) == {
        Policy.STOP: ("standby", False),
        Policy.REPORT: ("null", True),
        Policy.IGNORE: ("ready", False),
    }[policy]


@pytest.mark.parametrize("step", ["prepare", "commit"])
def test_an_end_that_cannot_be_written_down_is_tried_again(step: str) -> None:
    world = ready()
    world.resources.errors[step] = OSError(errno.EIO, "the state directory failed")
    world.job.complete()
    world.pass_s(20.0)
    assert not world.job.is_over and "pivot" not in world.resources.calls
    tries = world.resources.calls.count(step)
    assert 3 <= tries <= 10, "with a back-off"
    assert not world.is_held, "the guest goes on meanwhile"
    world.write()
    world.resources.errors.clear()
    world.pass_s(2 * RETRY_S[1])
    assert "pivot" in world.resources.calls


def test_a_soft_cancel_that_gets_level_at_once_is_tried_again_as_well() -> None:
    """Nothing has to be waited for on a disk of no bytes: the job is at its end before the others
    of its group, of which there are none, hear that it was cancelled."""
    world = JobWorld(size=0).ready()
    world.resources.holds = {"commit"}
    world.resources.errors["commit"] = OSError(errno.EIO, "the state directory failed")
    world.job.cancel(force=False)
    world.job.advance()
    assert world.status == "pending"
    world.settle()
    world.resources.holds.clear()
    world.resources.answer()
    world.resources.errors.clear()
    world.pass_s(2 * RETRY_S[1])
    assert world.job.is_over and world.job.error is None


def test_a_bad_end_is_written_down_before_it_is_told() -> None:
    world = aborting()
    world.pass_s(FOR_EVER_S)
    assert world.status == "aborting" and not world.told("BLOCK_JOB_CANCELLED")
    assert not world.is_held and not world.disk.ledger.bitmaps, "the guest is let go of"
    world.resources.answer()
    assert world.status == "null" and world.told("BLOCK_JOB_CANCELLED")


# What an earlier process left.


@pytest.mark.parametrize("is_paused", [False, True])
@pytest.mark.parametrize("is_scanned", [False, True])
def test_a_job_is_taken_up(is_scanned: bool, is_paused: bool) -> None:
    world = created()
    world.job.take_up(world.job.tracker.mark_all, is_scanned=is_scanned, is_paused=is_paused)
    world.pass_s(1.0)
    if is_paused:
        assert world.status == "paused" and not world.target.requests.started
        world.job.resume()
        world.pass_s(1.0)
    assert world.status == "ready" and ("scan" in world.resources.calls) is not is_scanned
    world.assert_identical()


# Groups.


def test_jobs_of_a_group_wait_for_one_another_and_end_in_one_step() -> None:
    first, second = a_group("a", "b")
    first.job.complete()
    first.pass_s(FOR_EVER_S)
    assert (first.status, second.status) == ("waiting", "ready")
    assert not first.is_held, "its guest goes on meanwhile"
    first.write()
    second.job.complete()
    first.pass_s(3.0)
    assert (first.status, second.status) == ("null", "null")
    assert "pivot" in first.resources.calls and "pivot" in second.resources.calls


def test_a_job_that_fails_takes_its_group_along() -> None:
    first, second = a_group("a", "b")
    first.job.complete()
    first.pass_s(1.0)
    second.job.cancel(force=True)
    first.pass_s(1.0)
    assert first.told("BLOCK_JOB_CANCELLED") and second.told("BLOCK_JOB_CANCELLED")
    assert "job b of its group" in str(first.job.failure)
    assert "pivot" not in first.resources.calls


def test_a_soft_cancel_of_one_cancels_the_others_by_force() -> None:
    first, second = a_group("a", "b")
    first.job.cancel(force=False)
    first.pass_s(3.0)
    assert first.told("BLOCK_JOB_COMPLETED") and second.told("BLOCK_JOB_CANCELLED")


def test_jobs_that_are_cancelled_softly_in_one_step_end_well() -> None:
    first, second = a_group("a", "b")
    first.job.cancel(force=False)
    second.job.cancel(force=False)
    first.pass_s(3.0)
    for world in (first, second):
        assert world.told("BLOCK_JOB_COMPLETED") and not world.told("BLOCK_JOB_CANCELLED")


def test_guests_are_not_held_for_long_for_another_job_of_the_group() -> None:
    first, second = a_group("a", "b", auto_finalize=False)
    for world in (first, second):
        world.job.complete()
    first.pass_s(3.0)
    assert (first.status, second.status) == ("pending", "pending")
    second.target.requests.holds = {"write", "flush"}
    second.write()
    first.job.finalize()
    first.settle()
    assert first.is_held
    gate = first.disk.ledger.gate
    assert gate is not None
    first.pass_s(HOLD_S)
    assert gate.opened.is_set() and first.told("X_NBDMIRROR_QUIESCE_TIMEOUT")
    first.pass_s(FOR_EVER_S)
    assert not first.is_held and len(first.told("X_NBDMIRROR_QUIESCE_TIMEOUT")) == 1
    second.target.requests.answer_all()
    first.pass_s(3.0)
    assert (first.status, second.status) == ("null", "null")


def test_no_job_of_a_group_ends_if_one_end_cannot_be_written_down() -> None:
    first, second = a_group("a", "b")
    second.resources.errors["commit"] = OSError(errno.EIO, "the state directory failed")
    for world in (first, second):
        world.job.complete()
    first.pass_s(5.0)
    for world in (first, second):
        assert not world.job.is_over and "pivot" not in world.resources.calls
    assert "uncommit" in first.resources.calls and "uncommit" not in second.resources.calls
    second.resources.errors.clear()
    first.pass_s(4 * RETRY_S[1])
    for world in (first, second):
        assert "pivot" in world.resources.calls


def test_guests_are_held_until_an_end_that_was_written_down_is_undone() -> None:
    """If the server is killed before that, the disk is served from the other side."""
    first, second = a_group("a", "b")
    second.resources.errors["commit"] = OSError(errno.EIO, "the state directory failed")
    first.resources.holds = {"uncommit"}
    for world in (first, second):
        world.job.complete()
    first.pass_s(5.0)
    assert first.is_held and not second.is_held
    second.resources.errors.clear()
    first.resources.holds.clear()
    first.resources.answer()
    assert not first.is_held
    first.pass_s(4 * RETRY_S[1])
    for world in (first, second):
        assert "pivot" in world.resources.calls


def test_a_forced_cancel_while_an_end_is_undone_is_obeyed_after_that() -> None:
    """Also of a job of the group that has nothing to undo."""
    for asked in (0, 1):
        worlds = first, second = a_group("a", "b")
        second.resources.errors["commit"] = OSError(errno.EIO, "the state directory failed")
        first.resources.holds = {"uncommit"}
        for world in worlds:
            world.job.complete()
        first.pass_s(5.0)
        worlds[asked].job.cancel(force=True)
        first.pass_s(1.0)
        assert first.is_held and not first.job.is_over
        first.resources.answer()
        first.pass_s(1.0)
        for world in worlds:
            assert world.status == "null" and world.told("BLOCK_JOB_CANCELLED")
            assert not world.is_held and "pivot" not in world.resources.calls


def test_the_ends_of_a_group_are_all_written_down_before_any_is_one() -> None:
    first, second = a_group("a", "b")
    first.resources.holds = second.resources.holds = {"commit"}
    for world in (first, second):
        world.job.complete()
    first.pass_s(3.0)
    first.resources.answer()
    first.pass_s(FOR_EVER_S)
    assert "pivot" not in first.resources.calls and first.is_held and second.is_held
    second.resources.answer()
    assert "pivot" in first.resources.calls and "pivot" in second.resources.calls


def test_a_job_alone_does_not_wait() -> None:
    world = JobWorld(loop=StillLoop()).ready()
    world.job.complete()
    assert world.job.ending is Ending.COMPLETE
    world.settle()
    assert world.status == "null"


@pytest.mark.rule(13, 15)
def test_an_ending_waits_for_the_flush_that_is_under_way_beside_its_own() -> None:
    """A target that has lost something may tell the one and not the other, although that began
    later."""
    world = JobWorld(on_target_error=Policy.IGNORE).ready()
    before = bytes(world.target.data)
    requests = world.target.requests
    requests.holds = {"flush"}
    world.write()
    world.pass_s(2.0)
    world.job.complete()
    world.settle()
    while len(requests.held) > 1:
        requests.held.pop()[1]()  # the ending's own, which go well
        world.settle()
    assert world.is_held and "pivot" not in world.resources.calls
    world.target.data[:] = before
    requests.errors["flush"] = IO_ERROR
    requests.answer("flush")
    assert not world.is_held
    requests.errors.clear()
    requests.answer_all()
    world.pass_s(RETRY_S[1])
    assert "pivot" in world.resources.calls
    world.assert_identical()


def test_no_other_flush_is_begun_while_guests_may_be_held() -> None:
    """They would wait for that one too."""
    world = ready()
    requests = world.target.requests
    requests.holds = {"flush"}
    world.write()
    world.pass_s(0.01)
    world.job.complete()
    world.settle()
    world.pass_s(0.9)
    assert len(requests.held) == 1, "the flush ahead"
    requests.answer_all()
    world.pass_s(1.0)
    assert "pivot" in world.resources.calls
    world.assert_identical()
