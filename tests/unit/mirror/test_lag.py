"""The lag of a mirror job, on a clock that stands still. What the lag may never be is in
tests/model (lagworld.py), and with real servers in tests/integration/test_lag.py."""

from __future__ import annotations

import math

import pytest
from unit.mirror.jobparts import GRANULARITY, IO_ERROR, JobWorld

from nbdmirror.mirror.options import CopyMode, Policy
from nbdmirror.mirror.poll import POLL_S
from nbdmirror.mirror.rate_limit import ROUND_S_MAX
from nbdmirror.mirror.target_watch import FLUSH_S, FLUSH_SHARE, READY_FLUSH_S

ROUND_S = ROUND_S_MAX + READY_FLUSH_S + 2 * POLL_S
"""What a backlog takes where source and target answer at once."""


def lag_s(world: JobWorld) -> float:
    assert world.job.lag is not None
    return world.job.lag.lag_s


def finish(world: JobWorld) -> float:
    """End the job well. Returns the lag that its last event told."""
    world.job.complete()
    world.pass_s(5.0)
    (ended,) = world.told("BLOCK_JOB_COMPLETED")
    assert "pivot" in world.resources.calls
    world.assert_identical()
    return float(ended["x-nbdmirror-lag-s"])


def test_before_ready_there_is_none() -> None:
    world = JobWorld()
    world.target.requests.holds = {"write"}
    world.start()
    world.pass_s(30.0)
    assert world.job.lag is None
    world.target.requests.answer_all()
    world.pass_s(1.0)
    assert lag_s(world) == 0
    assert finish(world) == 0


def test_an_idle_mirror_has_none() -> None:
    """And has nothing flushed for it."""
    world = JobWorld().ready()
    flushes = world.target.requests.started.count("flush")
    for _ in range(100):
        world.pass_s(0.33)
        assert lag_s(world) == 0
    assert world.target.requests.started.count("flush") == flushes
    assert finish(world) == 0


@pytest.mark.parametrize("copy_mode", CopyMode)
def test_a_write_counts_until_it_is_flushed(copy_mode: CopyMode) -> None:
    world = JobWorld(copy_mode=copy_mode).ready()
    world.pass_s(60.0)
    world.target.requests.holds = {"flush"}
    world.write()
    for waited_s in range(1, 30):
        world.pass_s(1.0)
        assert waited_s <= lag_s(world) <= waited_s + POLL_S
    world.assert_identical()
    world.target.requests.holds.clear()
    world.target.requests.answer("flush")
    assert lag_s(world) <= ROUND_S
    world.pass_s(ROUND_S)
    assert lag_s(world) == 0
    assert finish(world) == 0


@pytest.mark.parametrize("copy_mode", CopyMode)
def test_of_a_guest_that_never_pauses_it_is_about_two_rounds(copy_mode: CopyMode) -> None:
    world = JobWorld(copy_mode=copy_mode).ready()
    requests = world.target.requests
    flushes = requests.started.count("flush")
    for number in range(2000):
        world.write(number * 7 % 16 * GRANULARITY, bytes([number % 251]))
        world.pass_s(0.02)
        assert lag_s(world) <= 2 * ROUND_S
    assert 20 <= requests.started.count("flush") - flushes <= 40 / READY_FLUSH_S + 1
    world.pass_s(2 * ROUND_S)
    assert lag_s(world) == 0
    assert finish(world) == 0


def test_a_hot_granule_does_not_hold_it_up() -> None:
    world = JobWorld().ready()
    for number in range(1000):
        world.write(0, bytes([number % 251]))
        world.pass_s(0.01)
        assert lag_s(world) <= 2 * ROUND_S
    assert finish(world) == 0


@pytest.mark.parametrize("takes_s", [0.5, 5.0])
def test_a_target_to_which_flushes_are_dear_gets_few(takes_s: float) -> None:
    """A tenth of its time, but one each FLUSH_S, as ever."""
    world = JobWorld().ready()
    requests = world.target.requests
    requests.holds = {"flush"}
    flushes, answer_s = 0, math.inf
    while world.loop.now_s < 1200.0:
        world.write()
        world.pass_s(0.05)
        if requests.held and answer_s == math.inf:
            flushes, answer_s = flushes + 1, world.loop.now_s + takes_s
        elif world.loop.now_s >= answer_s:
            answer_s = math.inf
            requests.answer("flush")
    assert 200 / FLUSH_S - 2 <= flushes <= max(200 * FLUSH_SHARE / takes_s, 200 / FLUSH_S) + 2
    requests.answer_all()
    assert finish(world) == 0


def test_while_a_job_is_paused_it_grows() -> None:
    world = JobWorld().ready()
    world.job.pause()
    world.pass_s(10.0)
    assert lag_s(world) == 0, "nothing is missing"
    world.write()
    world.pass_s(10.0)
    assert 10.0 <= lag_s(world) <= 10.0 + POLL_S
    world.job.resume()
    world.pass_s(ROUND_S)
    assert lag_s(world) == 0
    assert finish(world) == 0


@pytest.mark.parametrize("policy", [Policy.IGNORE, Policy.STOP])
def test_while_the_target_fails_it_grows(policy: Policy) -> None:
    world = JobWorld(on_target_error=policy).ready()
    world.target.requests.errors["write"] = IO_ERROR
    world.write()
    world.pass_s(20.0)
    world.write(GRANULARITY)
    world.pass_s(20.0)
    assert 40.0 <= lag_s(world) <= 40.0 + POLL_S
    world.target.requests.errors.clear()
    if policy is Policy.STOP:
        world.job.resume()
    world.pass_s(6.0 + ROUND_S)
    assert lag_s(world) == 0
    assert finish(world) == 0


def test_a_flush_that_fails_ends_nothing() -> None:
    world = JobWorld(on_target_error=Policy.IGNORE).ready()
    world.target.requests.errors["flush"] = IO_ERROR
    world.write()
    world.pass_s(20.0)
    assert 20.0 <= lag_s(world) <= 20.0 + POLL_S
    world.target.requests.errors.clear()
    world.pass_s(6.0 + ROUND_S)
    assert lag_s(world) == 0
    assert finish(world) == 0


def test_while_the_target_is_lost_it_grows() -> None:
    world = JobWorld(reconnect_delay_s=60.0).ready()
    world.resources.holds = {"reconnect"}
    world.target.requests.give_up()
    world.job.target_lost()
    world.write()
    world.pass_s(20.0)
    assert 20.0 <= lag_s(world) <= 20.0 + POLL_S
    world.resources.answer()
    world.pass_s(2 * ROUND_S)
    assert lag_s(world) == 0
    assert finish(world) == 0


def test_the_last_event_has_the_lag_of_the_end() -> None:
    """Of one by force: what the target lacks. Later writes are none of the job's."""
    world = JobWorld().ready()
    world.job.pause()
    world.write()
    world.pass_s(7.0)
    world.resources.holds = {"forget"}
    world.job.cancel(force=True)
    world.settle()
    world.write(GRANULARITY)
    world.pass_s(100.0)
    world.resources.answer()
    (ended,) = world.told("BLOCK_JOB_CANCELLED")
    assert 7.0 <= ended["x-nbdmirror-lag-s"] <= 7.0 + POLL_S
