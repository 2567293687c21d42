"""The rules of a mirror job that has trouble: hung and lost sides, errors, pauses, bounds.

`test_job_mutants` breaks the rules one by one: each must fail a test of these files.
"""

from __future__ import annotations

import pytest
from unit.mirror.jobparts import (
    GRANULARITY,
    IO_ERROR,
    NO_SPACE,
    JobWorld,
    end,
    several_writes,
)

from nbdmirror.errors import CommandError, DeviceError
from nbdmirror.mirror.options import CopyMode, Ending, Policy
from nbdmirror.mirror.timers import RETRY_S

FOR_EVER_S = 300.0
MOMENT_S = 0.1
CANCEL_S_MAX = 1.0
"""Rule 42."""


# Rule 19, and the first half of 42: a forced cancel with a target, or a source, that hangs.


@pytest.mark.rule(19)
@pytest.mark.parametrize("ending", [Ending.NONE, Ending.COMPLETE, Ending.CANCEL])
@pytest.mark.parametrize("kind", ["write", "flush"])
def test_a_forced_cancel_gives_a_hung_target_up(kind: str, ending: Ending) -> None:
    world = JobWorld().ready()
    world.target.requests.holds = {kind}
    world.write()
    end(world, ending)
    world.pass_s(5.0)
    world.job.cancel(force=True)
    world.settle()
    world.pass_s(CANCEL_S_MAX)
    assert world.status == "null" and not world.is_held
    if world.target.times_given_up == 0:
        assert kind == "flush" and ending is Ending.NONE, "nothing was in flight"


def test_a_forced_cancel_waits_a_moment_for_requests_that_end_by_themselves() -> None:
    world = JobWorld()
    world.target.requests.holds = {"write"}
    world.start()
    world.job.cancel(force=True)
    world.pass_s(MOMENT_S)
    assert world.status == "running"
    world.target.requests.answer_all()
    assert world.status == "null" and world.target.times_given_up == 0


def test_a_forced_cancel_does_not_wait_for_a_hung_source() -> None:
    world = JobWorld()
    world.source.requests.holds = {"read"}
    world.start()
    world.job.cancel(force=True)
    world.pass_s(CANCEL_S_MAX)
    assert world.status == "null"


# Rules 20 and 21: errors and policies.


@pytest.mark.rule(20)
def test_ignore_does_not_mean_skip() -> None:
    world = JobWorld(on_target_error=Policy.IGNORE)
    world.target.requests.errors["write"] = IO_ERROR
    world.start().pass_s(FOR_EVER_S)
    assert world.status == "running" and len(world.told("BLOCK_JOB_ERROR")) > 10
    world.target.requests.errors.clear()
    world.pass_s(RETRY_S[1])
    assert world.status == "ready"
    world.assert_identical()


def test_ignored_errors_of_the_source_are_tried_again() -> None:
    world = JobWorld(on_source_error=Policy.IGNORE)
    world.source.requests.errors["read"] = IO_ERROR
    world.start().pass_s(FOR_EVER_S)
    assert world.status == "running"
    assert {told["operation"] for told in world.told("BLOCK_JOB_ERROR")} == {"read"}
    world.source.requests.errors.clear()
    world.pass_s(RETRY_S[1])
    assert world.status == "ready"
    world.assert_identical()


@pytest.mark.rule(21)
def test_report_ends_the_job_with_its_first_error_when_all_has_drained() -> None:
    world = JobWorld(on_target_error=Policy.REPORT)
    several_writes(world)
    world.target.requests.errors["write"] = NO_SPACE
    world.target.requests.answer("write")
    assert world.status == "running", "the others are in flight"
    world.target.requests.errors["write"] = IO_ERROR
    world.target.requests.answer_all()
    (completed,) = world.told("BLOCK_JOB_COMPLETED")
    assert completed["error"] == "No space left on device"
    assert len(world.told("BLOCK_JOB_ERROR")) == 1


@pytest.mark.rule(21)
@pytest.mark.parametrize(
    ("policy", "error", "io_status"),
    [
        (Policy.STOP, IO_ERROR, "failed"),
        (Policy.STOP, NO_SPACE, "nospace"),
        (Policy.ENOSPC, NO_SPACE, "nospace"),
        (Policy.AUTO, NO_SPACE, "nospace"),
    ],
)
def test_stop_pauses_with_one_event(policy: Policy, error: DeviceError, io_status: str) -> None:
    world = JobWorld(on_target_error=policy)
    several_writes(world)
    world.target.requests.errors["write"] = error
    world.target.requests.answer_all()
    world.pass_s(FOR_EVER_S)
    assert world.status == "paused" and world.job.io_status == io_status
    assert world.told("BLOCK_JOB_ERROR") == [
        {"device": "j", "operation": "write", "action": "stop"}
    ]
    world.target.requests.errors.clear()
    world.job.resume()
    assert world.job.io_status == "ok"
    world.pass_s(1.0)
    assert world.status == "ready"
    world.assert_identical()


@pytest.mark.parametrize("policy", [Policy.ENOSPC, Policy.AUTO])
def test_enospc_reports_other_errors(policy: Policy) -> None:
    world = JobWorld(on_target_error=policy)
    world.target.requests.errors["write"] = IO_ERROR
    world.start().pass_s(1.0)
    assert world.status == "null" and world.job.error == "Input/output error"


@pytest.mark.parametrize("action", [Policy.STOP, Policy.IGNORE, Policy.REPORT])
def test_each_side_has_a_policy(action: Policy) -> None:
    world = JobWorld(on_source_error=action, on_target_error=Policy.REPORT)
    world.source.requests.errors["read"] = IO_ERROR
    world.start().pass_s(MOMENT_S / 2)
    assert world.told("BLOCK_JOB_ERROR") == [
        {"device": "j", "operation": "read", "action": str(action)}
    ]


def test_a_failed_synchronous_write_is_an_error_of_the_target() -> None:
    world = JobWorld(copy_mode=CopyMode.WRITE_BLOCKING, on_target_error=Policy.STOP).ready()
    world.pass_s(1.0)
    assert world.job.is_actively_synced
    world.target.guests_error = IO_ERROR
    world.write()
    world.pass_s(1.0)
    assert world.status == "standby" and not world.job.is_actively_synced
    assert not world.job.tracker.dirty.is_empty, "the range is dirty"
    world.target.guests_error = None
    world.job.resume()
    world.pass_s(1.0)
    assert world.job.is_actively_synced
    world.assert_identical()


# Rule 22: a pause.


@pytest.mark.rule(22)
def test_a_paused_job_lets_nothing_fly() -> None:
    world = JobWorld()
    world.target.requests.holds = {"write"}
    world.start()
    world.job.pause()
    world.settle()
    assert world.status == "running" and world.job.pause_wanted, "requests are in flight"
    world.target.requests.answer_all()
    assert world.status == "paused"
    offset, started = world.job.offset, len(world.target.requests.started)
    world.write()
    world.pass_s(FOR_EVER_S)
    assert (world.job.offset, len(world.target.requests.started)) == (offset, started)
    world.job.resume()
    world.pass_s(1.0)
    assert world.status == "ready"
    world.assert_identical()


def test_a_pause_waits_for_the_target_and_not_for_long_for_the_source() -> None:
    world = JobWorld()
    world.source.requests.holds = {"read"}
    world.start()
    world.job.pause()
    world.pass_s(5.0)
    assert world.status == "paused"
    world = JobWorld()
    world.target.requests.holds = {"write"}
    world.start()
    world.job.pause()
    world.pass_s(FOR_EVER_S)
    assert world.status == "running", "what is in flight may change the target yet"


def test_a_pause_ends_synchronous_writes() -> None:
    world = JobWorld(copy_mode=CopyMode.WRITE_BLOCKING).ready()
    world.job.pause()
    world.settle()
    assert world.status == "standby"
    before = bytes(world.target.data)
    world.write()
    assert world.target.data == before


def test_a_pause_in_mid_ending_opens_the_gate() -> None:
    world = JobWorld().ready()
    token = world.begin()
    world.job.complete()
    world.pass_s(0.5)
    assert world.is_held
    world.job.pause()
    world.settle()
    assert not world.is_held
    world.end(token)
    world.pass_s(FOR_EVER_S)
    assert world.status == "standby"
    world.job.resume()
    world.pass_s(1.0)
    assert "pivot" in world.resources.calls


def test_pause_and_resume_of_a_job_that_is_failing_start_nothing() -> None:
    """It drains; what is in flight at a target may take for ever."""
    world = JobWorld(on_source_error=Policy.REPORT)
    several_writes(world)
    world.source.requests.errors["read"] = IO_ERROR
    world.job.copy_failed("read", IO_ERROR)
    world.settle()
    assert world.status == "running"
    world.job.pause()
    with pytest.raises(CommandError, match="not paused"):
        world.job.resume()
    started = len(world.source.requests.started)
    world.pass_s(FOR_EVER_S)
    assert len(world.source.requests.started) == started and not world.job.copier.is_running
    world.target.requests.answer_all()
    world.pass_s(1.0)
    assert world.status == "null" and world.job.error == "Input/output error"


def test_pause_and_resume_while_an_ignored_error_waits_keep_the_back_off() -> None:
    """Errors of what is tried after the resume are errors, and are not tried again at once."""
    world = JobWorld(on_target_error=Policy.IGNORE)
    world.target.requests.errors["write"] = IO_ERROR
    world.start().pass_s(60.0)
    for _ in range(10):
        told = len(world.told("BLOCK_JOB_ERROR"))
        world.job.pause()
        world.settle()
        world.job.resume()
        world.settle()
        assert len(world.told("BLOCK_JOB_ERROR")) == told + 1
    told = len(world.told("BLOCK_JOB_ERROR"))
    world.pass_s(4 * RETRY_S[1])
    assert len(world.told("BLOCK_JOB_ERROR")) <= told + 5


@pytest.mark.rule(13, 45)
@pytest.mark.parametrize("policy", [Policy.IGNORE, Policy.STOP])
@pytest.mark.parametrize("is_fua", [False, True])
def test_what_a_guests_flush_fails_to_cover_is_copied_again(policy: Policy, is_fua: bool) -> None:
    """Write-blocking: the target lost what it had not written back, and told the guest's flush, or
    its write with FUA, and not the job's next flush. The guest is not told."""
    world = JobWorld(copy_mode=CopyMode.WRITE_BLOCKING, on_target_error=policy).ready()
    before = bytes(world.target.data)
    for number in range(4):
        world.write(number * GRANULARITY)

    def lose() -> None:
        world.target.data[:] = before
        raise IO_ERROR

    world.target.guests_flush = lose
    if is_fua:
        world.target.guests_fua = lose
        world.disk.pwrite(b"f" * 512, 5 * GRANULARITY, True)
    else:
        world.disk.flush()
    world.settle()
    world.target.guests_flush = world.target.guests_fua = lambda: None
    if policy is Policy.STOP:
        world.settle()
        assert world.status == "standby"
        world.job.resume()
    world.pass_s(RETRY_S[1])
    world.assert_identical()
    world.job.complete()
    world.pass_s(5.0)
    assert "pivot" in world.resources.calls
