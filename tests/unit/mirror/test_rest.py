"""A mirror at rest does nothing at all, and all that it does otherwise begins with the first change
of a guest, at once. In all orders with guests: tests/model (lagmachine.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from unit.mirror.jobparts import GRANULARITY, IO_ERROR, JobWorld

from nbdmirror.mirror.options import CopyMode, Ending, Policy
from nbdmirror.mirror.poll import POLL_S
from nbdmirror.mirror.rate_limit import ROUND_S_MAX
from nbdmirror.mirror.target_watch import HUNG_S, READY_FLUSH_S
from nbdmirror.server.reconnect import copy_all

LONG_S = 3600.0


def resting(**options: Any) -> JobWorld:
    """A mirror that is READY, and has had nothing to do for long."""
    world = JobWorld(**options).ready()
    assert_rests(world)
    return world


def assert_rests(world: JobWorld) -> None:
    world.pass_s(3 * READY_FLUSH_S)
    assert world.loop.is_asleep
    world.pass_s(LONG_S)
    assert world.loop.is_asleep


def lag_s(world: JobWorld) -> float:
    assert world.job.lag is not None
    return world.job.lag.lag_s


def zero(world: JobWorld) -> None:
    world.disk.zero(0, GRANULARITY, may_trim=False, fua=False, fast=False)


def trim(world: JobWorld) -> None:
    world.disk.trim(0, GRANULARITY, fua=False)


CHANGES: tuple[Callable[[JobWorld], None], ...] = (JobWorld.write, zero, trim)


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_change_is_copied_at_once(change: Callable[[JobWorld], None]) -> None:
    """Then it is flushed, and the mirror rests again."""
    world = resting()
    for _ in range(3):
        flushes = world.target.requests.started.count("flush")
        change(world)
        world.settle()
        world.assert_identical()
        world.pass_s(READY_FLUSH_S + 2 * POLL_S)
        assert world.target.requests.started.count("flush") == flushes + 1
        assert lag_s(world) == 0
        assert_rests(world)


def test_what_follows_is_copied_too() -> None:
    """Also what is written while the first change is on its way."""
    world = resting()
    world.target.requests.holds = {"write"}
    for number in range(5):
        world.write(number * GRANULARITY)
        world.settle()
    world.target.requests.answer_all()
    world.pass_s(ROUND_S_MAX + POLL_S)
    world.assert_identical()
    assert_rests(world)


def test_writes_that_the_source_loses_are_copied() -> None:
    """The source is the disk. Nobody else tells the mirror: no guest has changed anything."""
    world = resting()
    world.source.data[:] = b"\x11" * len(world.source.data)
    world.disk.lose_writes()
    world.pass_s(ROUND_S_MAX + 1.0)
    world.assert_identical()
    assert_rests(world)


def test_writes_that_the_source_loses_are_no_guests_writes() -> None:
    """All of the disk is copied again, and no guest has changed anything."""
    world = resting()
    changed = world.job.tracker.dirty.noted_bytes
    copy_all(world.job.log, world.job.tracker, world.disk)
    assert world.job.tracker.dirty.dirty_bytes == world.disk.size
    assert world.job.tracker.dirty.noted_bytes == changed
    world.pass_s(ROUND_S_MAX + 1.0)
    assert_rests(world)


def test_the_lag_counts_from_the_first_change() -> None:
    """Not from when the mirror came to rest, whoever asks first."""
    world = resting()
    world.target.requests.holds = {"write"}
    world.write()
    assert lag_s(world) == 0, "asked before the mirror has heard of the change"
    world.loop.now_s += 2.0  # and the loop is busy with something else
    assert lag_s(world) == 2.0
    for waited_s in range(3, 20):
        world.pass_s(1.0)
        assert waited_s <= lag_s(world) <= waited_s + POLL_S
    world.target.requests.answer_all()
    world.pass_s(2 * (ROUND_S_MAX + READY_FLUSH_S))
    assert lag_s(world) == 0
    world.assert_identical()


def test_a_mirror_does_not_rest_beside_a_request() -> None:
    """A write that is under way has not marked anything yet."""
    world = resting()
    token = world.begin()
    world.write(GRANULARITY)
    for _ in range(20):
        world.pass_s(1.0)
        assert not world.loop.is_asleep
    world.end(token)
    world.pass_s(2 * POLL_S)
    world.assert_identical()
    assert_rests(world)


def test_a_request_may_begin_before_the_rest_is_over() -> None:
    world = resting()
    token = world.begin()
    world.pass_s(LONG_S)
    assert lag_s(world) == 0
    world.end(token)
    world.assert_identical()
    assert lag_s(world) == 0
    assert_rests(world)


def test_the_speed_limit_holds_for_what_follows() -> None:
    world = resting()
    world.job.set_speed(GRANULARITY)
    assert_rests(world)
    for number in range(4):
        world.write(number * GRANULARITY)
    world.pass_s(2.0)
    assert world.source.data != world.target.data
    world.pass_s(3.0)
    world.assert_identical()
    assert_rests(world)


def test_a_target_was_not_silent_while_nothing_was_asked() -> None:
    world = resting(reconnect_delay_s=60.0)
    world.target.requests.holds = {"write"}
    world.write()
    world.pass_s(HUNG_S - 1.0)
    assert not world.job.watch._is_asking
    world.target.requests.answer_all()
    world.pass_s(1.0)
    world.assert_identical()


def test_a_write_that_fails_is_copied_again() -> None:
    world = resting(on_target_error=Policy.IGNORE)
    world.target.requests.errors = {"write": IO_ERROR}
    world.write()
    world.settle()
    world.target.requests.errors.clear()
    world.pass_s(10.0)
    world.assert_identical()
    assert_rests(world)


def test_a_target_that_is_lost_comes_back() -> None:
    world = resting(reconnect_delay_s=60.0)
    world.target.requests.give_up()
    world.job.target_lost()
    world.write()
    world.pass_s(1.0)
    world.assert_identical()
    assert_rests(world)


def test_a_job_that_pauses_and_goes_on() -> None:
    world = resting()
    world.job.pause()
    world.pass_s(LONG_S)
    world.write()
    world.pass_s(LONG_S)
    assert world.source.data != world.target.data
    world.job.resume()
    world.pass_s(ROUND_S_MAX)
    world.assert_identical()
    assert_rests(world)


@pytest.mark.slow
def test_the_copy_mode_is_changed() -> None:
    """There and back. In write-blocking the mirror looks, since a target may keep a guest."""
    world = resting()
    world.job.change(CopyMode.WRITE_BLOCKING)
    world.pass_s(1.0)
    assert world.job.is_actively_synced
    world.write()
    world.assert_identical()
    world.pass_s(LONG_S)
    assert not world.loop.is_asleep
    world.job.change(CopyMode.BACKGROUND)
    assert_rests(world)
    world.write(GRANULARITY)
    world.settle()
    world.assert_identical()


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("ending", [Ending.COMPLETE, Ending.CANCEL])
def test_a_job_at_rest_ends_well(ending: Ending, writes: bool) -> None:
    world = resting()
    if writes:
        world.write()
    if ending is Ending.COMPLETE:
        world.job.complete()
    else:
        world.job.cancel(force=False)
    world.pass_s(POLL_S)
    world.assert_identical()
    (ended,) = world.told("BLOCK_JOB_COMPLETED")
    assert ended["x-nbdmirror-lag-s"] == 0
    assert world.loop.is_asleep and not world.disk.ledger.bitmaps


def test_a_job_at_rest_is_cancelled_by_force() -> None:
    world = resting()
    world.job.cancel(force=True)
    world.pass_s(1.0)
    assert world.told("BLOCK_JOB_CANCELLED")
    assert world.loop.is_asleep and not world.disk.ledger.bitmaps
