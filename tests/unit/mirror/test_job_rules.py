"""The rules of a mirror job (docs/rules.md), each in one process, with a clock that stands still.

`test_job_mutants` breaks the rules one by one: each must fail a test of these files.
"""

from __future__ import annotations

import pytest
from unit.mirror.jobparts import (
    IO_ERROR,
    KIB,
    NO_SPACE,
    JobWorld,
    end,
    several_writes,
)

from nbdmirror.errors import CommandError
from nbdmirror.mirror.options import Ending, Policy
from nbdmirror.mirror.timers import RETRY_S

FOR_EVER_S = 300.0
MOMENT_S = 0.1
CANCEL_S_MAX = 1.0
"""Rule 42."""


# Rules 13 and 14: flushes, and READY.


@pytest.mark.rule(14)
def test_ready_comes_after_a_flush_and_not_before() -> None:
    world = JobWorld()
    world.target.requests.holds = {"flush"}
    world.start().pass_s(5.0)
    assert world.job.tracker.in_sync and world.status == "running"
    world.target.requests.answer("flush")
    assert world.status == "ready"
    world.assert_identical()


def test_dirt_during_the_flush_for_ready_is_copied_later() -> None:
    world = JobWorld()
    world.target.requests.holds = {"flush"}
    world.start()
    world.write()
    world.target.requests.answer_all()
    assert world.status == "ready"
    world.pass_s(1.0)
    world.assert_identical()


@pytest.mark.rule(13)
def test_a_flush_that_fails_before_ready_is_a_write_error() -> None:
    world = JobWorld(on_target_error=Policy.REPORT)
    world.target.requests.errors["flush"] = IO_ERROR
    world.start().pass_s(1.0)
    assert world.states[-3:] == ["aborting", "concluded", "null"]
    assert world.told("BLOCK_JOB_ERROR") == [
        {"device": "j", "operation": "write", "action": "report"}
    ]
    assert not world.told("BLOCK_JOB_READY")


def test_a_flush_that_fails_before_ready_is_tried_again_if_errors_are_ignored() -> None:
    world = JobWorld(on_target_error=Policy.IGNORE)
    world.target.requests.errors["flush"] = IO_ERROR
    world.start().pass_s(5.0)
    assert world.status == "running" and len(world.told("BLOCK_JOB_ERROR")) > 1
    world.target.requests.errors.clear()
    world.pass_s(RETRY_S[1])
    assert world.status == "ready"


@pytest.mark.rule(13)
def test_a_guests_flush_is_the_sources_alone_in_background_mode() -> None:
    world = JobWorld().ready()
    flushes = world.target.requests.started.count("flush")
    world.disk.flush()
    world.settle()
    assert world.target.requests.started.count("flush") == flushes


@pytest.mark.rule(14)
def test_ready_comes_once_and_is_never_taken_back() -> None:
    world = JobWorld().ready()
    for _ in range(10):
        world.write()
        world.pass_s(MOMENT_S)
        assert world.status == "ready"
    world.job.pause()
    world.pass_s(1.0)
    world.job.resume()
    world.pass_s(1.0)
    assert world.status == "ready" and len(world.told("BLOCK_JOB_READY")) == 1


def test_after_an_error_was_reported_there_is_no_ready() -> None:
    world = JobWorld(on_target_error=Policy.REPORT)
    world.target.requests.holds = {"write"}
    world.start()
    world.target.requests.errors["write"] = IO_ERROR
    world.target.requests.answer("write")
    world.target.requests.errors.clear()
    world.target.requests.answer_all()
    world.pass_s(5.0)
    assert world.status == "null" and "ready" not in world.states


# Rule 15: an ending holds guests, counts again, and flushes.


@pytest.mark.rule(15)
def test_an_ending_waits_for_requests_under_way_and_counts_again() -> None:
    world = JobWorld().ready()
    token = world.begin()
    world.job.complete()
    world.pass_s(0.5)
    assert world.is_held and "pivot" not in world.resources.calls
    world.end(token)
    world.pass_s(MOMENT_S)
    assert "pivot" in world.resources.calls and not world.is_held
    assert world.disk.source is world.target


@pytest.mark.parametrize("ending", [Ending.COMPLETE, Ending.CANCEL])
def test_an_ending_flushes_behind_the_gate(ending: Ending) -> None:
    world = JobWorld().ready()
    world.target.requests.holds = {"flush"}
    end(world, ending)
    world.settle()
    assert not world.is_held, "the first flush comes before guests are held"
    world.target.requests.answer("flush")
    assert world.is_held and world.status == "ready"
    world.target.requests.answer("flush")
    assert world.states[-4:] == ["waiting", "pending", "concluded", "null"]


@pytest.mark.rule(15)
def test_what_is_dirty_after_the_last_flush_is_copied_and_flushed_again() -> None:
    world = JobWorld().ready()
    world.target.requests.holds = {"flush"}
    world.job.complete()
    world.settle()
    world.target.requests.answer("flush")
    world.job.tracker.dirty.mark(0, 1)  # say, a copy that failed
    world.target.requests.answer("flush")
    assert "pivot" not in world.resources.calls
    world.target.requests.answer("flush")
    assert "pivot" in world.resources.calls


def test_a_flush_that_fails_behind_the_gate_opens_it_and_the_ending_begins_again() -> None:
    world = JobWorld(on_target_error=Policy.IGNORE).ready()
    world.target.requests.holds = {"flush"}
    world.job.complete()
    world.settle()
    world.target.requests.answer("flush")
    assert world.is_held
    world.target.requests.errors["flush"] = IO_ERROR
    world.target.requests.answer("flush")
    assert not world.is_held and world.status == "ready"
    world.target.requests.errors.clear()
    world.target.requests.answer_all()
    world.pass_s(RETRY_S[1])
    assert "pivot" in world.resources.calls


# Rules 16 to 18: complete, cancel, and errors after them.


@pytest.mark.rule(16)
def test_complete_before_ready_is_refused_and_changes_nothing() -> None:
    world = JobWorld()
    world.target.requests.holds = {"write"}
    world.start()
    with pytest.raises(CommandError, match="in state 'running' cannot accept command verb"):
        world.job.complete()
    world.target.requests.answer_all()
    world.pass_s(FOR_EVER_S)
    assert world.status == "ready" and world.job.ending is Ending.NONE


def test_complete_in_standby_is_remembered_until_the_job_is_resumed() -> None:
    world = JobWorld().ready()
    world.job.pause()
    world.settle()
    world.job.complete()
    world.pass_s(FOR_EVER_S)
    assert world.status == "standby" and not world.is_held
    world.job.resume()
    world.pass_s(1.0)
    assert "pivot" in world.resources.calls


@pytest.mark.rule(17)
@pytest.mark.parametrize("force", [False, True])
def test_a_cancel_before_ready_leaves_the_target_undefined(force: bool) -> None:
    world = JobWorld()
    world.target.requests.holds = {"write"}
    world.start()
    world.job.cancel(force=force)
    world.target.requests.answer_all()
    world.pass_s(CANCEL_S_MAX)
    assert world.states[-3:] == ["aborting", "concluded", "null"]
    assert world.told("BLOCK_JOB_CANCELLED") and not world.told("BLOCK_JOB_COMPLETED")
    assert world.job.error == "Operation canceled" and "forget" in world.resources.calls


@pytest.mark.rule(17)
def test_a_soft_cancel_after_ready_is_a_copy_of_one_moment() -> None:
    world = JobWorld().ready()
    world.write(3 * 64 * KIB)
    world.job.cancel(force=False)
    world.pass_s(1.0)
    assert world.states[-4:] == ["waiting", "pending", "concluded", "null"]
    (completed,) = world.told("BLOCK_JOB_COMPLETED")
    assert "error" not in completed and "pivot" not in world.resources.calls
    assert world.disk.source is world.source
    assert "commit" in world.resources.calls, "FakeResources compares the disks there"


def test_a_forced_cancel_after_ready_is_cancelled() -> None:
    world = JobWorld().ready()
    world.write()
    world.job.cancel(force=True)
    world.pass_s(CANCEL_S_MAX)
    assert world.told("BLOCK_JOB_CANCELLED") and world.disk.source is world.source


def test_complete_after_a_soft_cancel_is_refused() -> None:
    world = JobWorld().ready()
    world.target.requests.holds = {"flush"}
    world.job.cancel(force=False)
    world.settle()
    with pytest.raises(CommandError, match="cannot be completed"):
        world.job.complete()


def test_a_soft_cancel_does_not_take_a_complete_back() -> None:
    world = JobWorld().ready()
    world.target.requests.holds = {"flush"}
    world.job.complete()
    world.settle()
    world.job.cancel(force=False)
    world.target.requests.answer_all()
    world.pass_s(1.0)
    assert "pivot" in world.resources.calls


@pytest.mark.rule(18)
@pytest.mark.parametrize("ending", [Ending.COMPLETE, Ending.CANCEL])
def test_an_error_while_it_ends_stops_it_and_resume_goes_on(ending: Ending) -> None:
    world = JobWorld(on_target_error=Policy.STOP).ready()
    world.target.requests.errors["write"] = IO_ERROR
    world.write()
    end(world, ending)
    world.pass_s(FOR_EVER_S)
    assert world.status == "standby" and world.job.io_status == "failed"
    assert len(world.told("BLOCK_JOB_ERROR")) == 1 and not world.is_held
    world.target.requests.errors.clear()
    world.job.resume()
    world.pass_s(1.0)
    (completed,) = world.told("BLOCK_JOB_COMPLETED")
    assert "error" not in completed
    assert (world.disk.source is world.target) is (ending is Ending.COMPLETE)


@pytest.mark.parametrize("ending", [Ending.COMPLETE, Ending.CANCEL])
def test_an_error_while_it_ends_is_reported(ending: Ending) -> None:
    world = JobWorld(on_target_error=Policy.REPORT).ready()
    world.target.requests.errors["write"] = IO_ERROR
    world.write()
    end(world, ending)
    world.pass_s(1.0)
    (completed,) = world.told("BLOCK_JOB_COMPLETED")
    assert completed["error"] == "Input/output error" and world.disk.source is world.source


@pytest.mark.rule(18)
@pytest.mark.parametrize("policy", [Policy.STOP, Policy.IGNORE])
def test_a_forced_cancel_gets_through_errors(policy: Policy) -> None:
    world = JobWorld(on_target_error=policy).ready()
    world.target.requests.errors["write"] = IO_ERROR
    world.write()
    world.job.cancel(force=False)
    world.pass_s(FOR_EVER_S)
    world.job.cancel(force=True)
    world.pass_s(CANCEL_S_MAX)
    assert world.told("BLOCK_JOB_CANCELLED")


def test_a_forced_cancel_does_not_hide_an_error() -> None:
    world = JobWorld(on_target_error=Policy.REPORT)
    several_writes(world)
    world.target.requests.errors["write"] = NO_SPACE
    world.target.requests.answer("write")
    world.job.cancel(force=True)
    world.target.requests.answer_all()
    assert world.job.error == "No space left on device"
