"""A job's states: which verbs each takes, groups, finalize and dismiss, and how an end is written
down. In one process, with a clock that stands still."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from unit.mirror.jobparts import (
    IO_ERROR,
    JobWorld,
    a_group,
    aborting,
    created,
    ready,
)

from nbdmirror.errors import CommandError
from nbdmirror.mirror.job_states import TRANSITIONS, VERBS, JobStatus
from nbdmirror.mirror.options import CopyMode, Policy

FOR_EVER_S = 300.0


# A job in each state.


def running() -> JobWorld:
    world = JobWorld()
    world.target.requests.holds = {"write"}
    return world.start()


def paused() -> JobWorld:
    world = running()
    world.job.pause()
    world.target.requests.answer_all()
    return world


def standby() -> JobWorld:
    world = ready()
    world.job.pause()
    world.settle()
    return world


def waiting() -> JobWorld:
    world, _ = a_group("j", "other")
    world.job.complete()
    world.pass_s(1.0)
    return world


def pending() -> JobWorld:
    world = JobWorld(auto_finalize=False).ready()
    world.job.complete()
    world.pass_s(1.0)
    return world


def concluded() -> JobWorld:
    world = JobWorld(auto_dismiss=False).ready()
    world.job.complete()
    world.pass_s(1.0)
    return world


def null() -> JobWorld:
    world = ready()
    world.job.complete()
    world.pass_s(1.0)
    return world


STATES: dict[JobStatus, Callable[[], JobWorld]] = {
    JobStatus.CREATED: created,
    JobStatus.RUNNING: running,
    JobStatus.PAUSED: paused,
    JobStatus.READY: ready,
    JobStatus.STANDBY: standby,
    JobStatus.WAITING: waiting,
    JobStatus.PENDING: pending,
    JobStatus.ABORTING: aborting,
    JobStatus.CONCLUDED: concluded,
    JobStatus.NULL: null,
}

CALLS: dict[str, Callable[[JobWorld], None]] = {
    "cancel": lambda world: world.job.cancel(force=True),
    "pause": lambda world: world.job.pause(),
    "set-speed": lambda world: world.job.set_speed(1),
    "complete": lambda world: world.job.complete(),
    "finalize": lambda world: world.job.finalize(),
    "dismiss": lambda world: world.job.dismiss(),
    "change": lambda world: world.job.change(CopyMode.WRITE_BLOCKING),
}


@pytest.mark.parametrize("status", STATES)
@pytest.mark.parametrize("verb", CALLS)
def test_each_state_takes_its_verbs_and_no_others(status: JobStatus, verb: str) -> None:
    world = STATES[status]()
    assert world.job.status is status
    seen = len(world.events.pull(0))
    if status in VERBS[verb]:
        if verb == "pause" and status in (JobStatus.PAUSED, JobStatus.STANDBY):
            with pytest.raises(CommandError, match="already paused"):
                CALLS[verb](world)
        else:
            CALLS[verb](world)
        return
    with pytest.raises(CommandError, match=f"in state '{status}' cannot accept command verb"):
        CALLS[verb](world)
    world.settle()
    assert world.job.status is status and len(world.events.pull(0)) == seen


@pytest.mark.parametrize("status", [s for s in STATES if s not in (JobStatus.CREATED,)])
def test_a_forced_cancel_ends_a_job_in_any_state_that_takes_it(status: JobStatus) -> None:
    world = STATES[status]()
    if status in VERBS["cancel"]:
        world.job.cancel(force=True)
        world.pass_s(1.0)
        assert world.status == "null" and world.told("BLOCK_JOB_CANCELLED")
        assert not world.is_held and not world.disk.ledger.bitmaps
        assert world.resources.calls[-2:] == ["released", "dismissed"]


def test_states_follow_the_table() -> None:
    """In all that these tests do a state follows one that the table has it follow."""
    for make in STATES.values():
        seen = [JobStatus.UNDEFINED, *(JobStatus(name) for name in make().states)]
        for old, new in pairwise(seen):
            assert new in TRANSITIONS[old]


# Pause and resume.


@pytest.mark.parametrize("make", [running, ready])
def test_resume_of_what_was_not_paused_is_an_error(make: Callable[[], JobWorld]) -> None:
    with pytest.raises(CommandError, match="not paused"):
        make().job.resume()


def test_resume_before_a_pause_has_come_about() -> None:
    world = running()
    world.job.pause()
    world.job.resume()
    world.target.requests.answer_all()
    world.pass_s(1.0)
    assert world.states == ["created", "running", "ready"]
    world.assert_identical()


@pytest.mark.parametrize("make", [paused, standby])
def test_a_paused_job_takes_a_speed_and_a_copy_mode(make: Callable[[], JobWorld]) -> None:
    world = make()
    world.job.set_speed(1 << 30)
    world.job.change(CopyMode.WRITE_BLOCKING)
    world.pass_s(FOR_EVER_S)
    assert world.disk.synchronous is None and not world.job.copier.is_running
    world.job.resume()
    world.pass_s(1.0)
    assert world.status == "ready" and world.job.options.speed_bytes_per_s == 1 << 30
    assert world.job.is_actively_synced


@pytest.mark.parametrize("make", [paused, standby])
def test_a_soft_cancel_of_a_paused_job_is_refused(make: Callable[[], JobWorld]) -> None:
    with pytest.raises(CommandError, match="currently paused"):
        make().job.cancel(force=False)


@pytest.mark.parametrize("make", [running, ready, paused, standby])
def test_a_negative_speed_changes_nothing(make: Callable[[], JobWorld]) -> None:
    world = make()
    with pytest.raises(CommandError, match="non-negative"):
        world.job.set_speed(-1)
    assert world.job.options.speed_bytes_per_s == 0


def test_a_speed_limit_holds() -> None:
    world = JobWorld(speed_bytes_per_s=64 << 10, buffer_bytes=64 << 10)
    world.start().pass_s(5.0)
    assert world.job.offset <= 7 * (64 << 10)
    world.job.set_speed(0)
    world.pass_s(1.0)
    assert world.status == "ready"


# Pending, finalize and dismiss.


def test_a_pending_job_goes_on_as_a_mirror_and_holds_no_guest() -> None:
    world = pending()
    assert world.told("BLOCK_JOB_PENDING") == [{"type": "mirror", "id": "j"}]
    for _ in range(5):
        world.write()
        world.pass_s(1.0)
        assert world.status == "pending" and not world.is_held
        world.assert_identical()
    world.job.finalize()
    world.pass_s(1.0)
    assert world.status == "null" and "pivot" in world.resources.calls


def test_an_error_of_a_pending_job_is_reported_whatever_the_policy() -> None:
    world = JobWorld(auto_finalize=False, on_target_error=Policy.STOP).ready()
    world.job.complete()
    world.pass_s(1.0)
    world.target.requests.errors["write"] = IO_ERROR
    world.write()
    world.pass_s(1.0)
    assert world.status == "null" and world.job.error == "Input/output error"


def test_when_ended_is_called_once_and_at_once_if_it_has() -> None:
    world, calls = ready(), []
    world.job.when_ended(lambda: calls.append(world.status))
    world.job.complete()
    world.pass_s(1.0)
    assert calls == ["null"]
    world.job.when_ended(lambda: calls.append("late"))
    assert calls == ["null", "late"]


def test_what_was_created_is_discarded_without_a_trace() -> None:
    world = created()
    world.job.discard()
    world.pass_s(1.0)
    assert world.states == ["created", "aborting", "concluded", "null"]
    assert world.resources.calls == ["released", "dismissed"] and not world.target.requests.started


def test_sizes_that_differ_are_an_error_of_a_job_that_runs() -> None:
    world = created()
    world.job.fail_at_start("Source and target image have different sizes")
    world.settle()
    assert world.states == ["created", "running", "aborting", "concluded", "null"]
    assert world.job.error == "Source and target image have different sizes"
    assert not world.target.requests.started
