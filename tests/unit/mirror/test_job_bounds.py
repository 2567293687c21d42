"""The rules of a mirror job whose target or source is lost, and the bounds of what a job does."""

from __future__ import annotations

import errno
from itertools import pairwise

import pytest
from unit.mirror.jobparts import (
    GRANULARITY,
    IO_ERROR,
    KIB,
    MIB,
    SIZE,
    JobWorld,
)

from nbdmirror.errors import ConfigError, DeviceError
from nbdmirror.mirror.options import Policy
from nbdmirror.mirror.quiesce import (
    CATCH_UP_S,
    CONVERGE_S,
    LEVEL_BYTES,
    LEVEL_STEP_S,
    LIMIT_S,
)
from nbdmirror.mirror.target_watch import RECONNECT_PAUSE_S
from nbdmirror.mirror.timers import RETRY_S

FOR_EVER_S = 300.0
MOMENT_S = 0.1
CANCEL_S_MAX = 1.0
"""Rule 42."""


# Rule 40: a target that is lost.


def lose(world: JobWorld) -> None:
    world.target.requests.give_up()
    world.settle()


@pytest.mark.rule(40)
def test_a_lost_target_is_brought_back_before_the_policy_is_asked() -> None:
    world = JobWorld(reconnect_delay_s=30.0)
    world.target.requests.holds = {"write"}
    world.start()
    world.resources.holds = {"reconnect"}
    lose(world)
    world.pass_s(10.0)
    assert world.status == "running" and not world.told("BLOCK_JOB_ERROR")
    world.target.requests.holds.clear()
    world.resources.answer()
    world.pass_s(1.0)
    assert world.status == "ready"
    world.assert_identical()


def test_the_policy_is_asked_when_the_target_does_not_come_back() -> None:
    world = JobWorld(reconnect_delay_s=30.0, on_target_error=Policy.STOP).ready()
    world.resources.errors["reconnect"] = DeviceError("target: is lost", errno.EIO)
    lose(world)
    world.job.target_lost()
    world.pass_s(1.0)
    assert world.status == "standby" and len(world.told("BLOCK_JOB_ERROR")) == 1


def test_without_a_reconnect_delay_a_lost_target_is_an_error() -> None:
    world = JobWorld(on_target_error=Policy.REPORT)
    world.target.requests.holds = {"write"}
    world.start()
    lose(world)
    assert world.status == "null" and "reconnect" not in world.resources.calls


@pytest.mark.rule(40)
def test_a_target_that_is_lost_again_at_once_is_an_error() -> None:
    world = JobWorld(reconnect_delay_s=30.0, on_target_error=Policy.STOP).ready()
    lose(world)
    world.job.target_lost()
    world.settle()
    assert world.resources.calls == ["reconnect"]
    lose(world)
    world.job.target_lost()
    world.settle()
    assert world.status == "standby" and len(world.told("BLOCK_JOB_ERROR")) == 1
    world.job.resume()
    world.pass_s(2 * RECONNECT_PAUSE_S)
    lose(world)
    world.job.target_lost()
    world.settle()
    assert world.status == "ready", "some time later it is brought back again"


def test_what_was_not_flushed_is_copied_again_after_a_lost_connection() -> None:
    world = JobWorld(reconnect_delay_s=30.0).ready()
    world.target.requests.holds = {"flush"}
    world.write()
    world.pass_s(1.0)
    world.target.requests.holds.clear()
    world.target.data[:512] = bytes(512)  # its server crashed
    lose(world)
    world.pass_s(1.0)
    world.assert_identical()


def test_a_target_lost_in_mid_ending_opens_the_gate_and_the_ending_goes_on_later() -> None:
    world = JobWorld(reconnect_delay_s=30.0).ready()
    world.target.requests.holds = {"flush"}
    world.job.complete()
    world.settle()
    world.target.requests.answer("flush")
    assert world.is_held
    world.resources.holds = {"reconnect"}
    lose(world)
    assert not world.is_held and world.status == "ready"
    world.target.requests.holds.clear()
    world.resources.answer()
    world.pass_s(1.0)
    assert "pivot" in world.resources.calls


def test_a_lost_source_is_brought_back_with_or_without_a_reconnect_delay() -> None:
    world = JobWorld(on_source_error=Policy.REPORT)
    world.source.requests.holds = {"read"}
    world.start()
    world.source.requests.holds.clear()
    world.source.requests.give_up()
    world.pass_s(1.0)
    assert "reconnect_source" in world.resources.calls
    assert world.status == "ready" and not world.told("BLOCK_JOB_ERROR")


def test_a_job_that_waits_for_its_target_is_paused_and_cancelled_at_once() -> None:
    world = JobWorld(reconnect_delay_s=30.0).ready()
    world.resources.holds = {"reconnect"}
    lose(world)
    world.job.target_lost()
    world.settle()
    world.job.pause()
    world.settle()
    assert world.status == "standby"
    world.resources.answer()
    assert world.status == "standby" and not world.job.copier.is_running, "an answer from before"
    world.job.cancel(force=True)
    world.settle()
    assert world.status == "null"


# Rule 42: bounds.


@pytest.mark.rule(42)
def test_guests_are_held_for_a_second_at_most() -> None:
    world = JobWorld().ready()
    world.target.requests.holds = {"write"}
    token = world.begin()
    world.job.complete()
    world.pass_s(0.5)
    gate = world.disk.ledger.gate
    assert gate is not None
    world.end(token)  # what it changed cannot be copied now
    world.pass_s(LIMIT_S - 0.5)
    assert gate.opened.is_set() and len(world.told("X_NBDMIRROR_QUIESCE_TIMEOUT")) == 1
    assert world.status == "ready" and world.job.quiesce_timeouts == 1
    world.target.requests.answer_all()
    world.pass_s(5.0)
    assert "pivot" in world.resources.calls


def test_an_ending_holds_guests_after_a_while_however_much_is_dirty() -> None:
    world = JobWorld(size=16 * MIB).ready()
    world.target.requests.holds = {"write"}
    world.job.tracker.dirty.mark(0, 8 * MIB)
    world.job.complete()
    world.pass_s(CONVERGE_S / 2)
    assert not world.is_held
    world.pass_s(CONVERGE_S / 2 + CATCH_UP_S + MOMENT_S)
    assert world.is_held
    world.target.requests.answer_all()
    assert "pivot" in world.resources.calls


@pytest.mark.rule(42)
def test_retries_come_later_each_time_up_to_a_bound() -> None:
    world = JobWorld(on_target_error=Policy.IGNORE)
    world.target.requests.errors["write"] = IO_ERROR
    times: list[float] = []
    world.start()
    for _ in range(400):
        world.pass_s(0.05)
        while len(times) < len(world.told("BLOCK_JOB_ERROR")):
            times.append(world.loop.now_s)
        assert len(times) < 40
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert all(after >= before - 0.06 for before, after in pairwise(waits))
    assert 0.05 <= waits[0] <= 0.2 and RETRY_S[1] - 0.1 <= waits[-1] <= RETRY_S[1] + 0.1


def test_after_a_success_the_next_failure_is_a_new_one() -> None:
    world = JobWorld(on_target_error=Policy.IGNORE)
    world.target.requests.errors["write"] = IO_ERROR
    world.start().pass_s(60.0)
    world.target.requests.errors.clear()
    world.pass_s(RETRY_S[1])
    assert world.status == "ready"
    world.target.requests.errors["write"] = IO_ERROR
    world.write()
    world.pass_s(0.3)
    before = len(world.told("BLOCK_JOB_ERROR"))
    world.pass_s(0.5)
    assert len(world.told("BLOCK_JOB_ERROR")) > before


def test_progress_never_goes_back() -> None:
    world = JobWorld(on_target_error=Policy.IGNORE)
    offset = 0
    for number in range(40):
        if number == 0:
            world.start()
        world.target.requests.errors = {"write": IO_ERROR} if number % 3 == 1 else {}
        world.write(number % 16 * 64 * KIB)
        world.pass_s(0.2)
        assert offset <= world.job.offset <= world.job.length
        offset = world.job.offset
    assert offset >= SIZE


@pytest.mark.parametrize("step", ["check_end", "prepare"])
def test_a_target_that_cannot_be_the_disk_ends_the_job(step: str) -> None:
    world = JobWorld().ready()
    world.resources.errors[step] = ConfigError("target: is a part of the disk")
    world.job.complete()
    world.pass_s(1.0)
    assert world.status == "null" and "pivot" not in world.resources.calls
    assert isinstance(world.job.failure, ConfigError)


def test_a_lost_target_with_nothing_in_flight_is_noticed() -> None:
    world = JobWorld(on_target_error=Policy.STOP).ready()
    world.target.requests.is_lost = True
    world.job.target_lost()
    world.settle()
    assert world.status == "standby"
    assert len(world.told("BLOCK_JOB_ERROR")) == 1


def test_an_ending_notices_what_is_left_while_a_guest_writes_on() -> None:
    """A copy is in flight at each moment, and time stands still: nobody looks but the copies."""
    world = JobWorld(size=8 * MIB, buffer_bytes=8 * MIB).ready()
    requests = world.target.requests
    requests.holds = {"write"}
    for offset in range(0, LEVEL_BYTES + MIB, GRANULARITY):
        world.write(offset)
    world.job.complete()
    world.settle()
    before = requests.started.count("flush")
    for _ in range(MIB // GRANULARITY):
        assert requests.started.count("flush") == before and not world.is_held
        requests.answer("write")
    assert requests.started.count("flush") == before + 1, "the target is flushed ahead"
    while len(requests.held) > 3:
        requests.answer("write")
    world.pass_s(1.5 * LEVEL_STEP_S)
    assert not world.is_held
    world.write()
    requests.answer("write")
    assert world.is_held, "the rest is little"
    requests.answer_all()
    assert world.job.pivoted and world.job.copier.on_settled is None, "nobody looks any more"
    world.assert_identical()
