"""How long a pivot may hold guests' writes, and what the user allows: in virtual time."""

from __future__ import annotations

from typing import Any

import pytest
from unit.mirror.jobparts import KIB, MIB, JobWorld, a_group
from unit.mirror.watched import Watched

from nbdmirror.mirror import pivot_pause
from nbdmirror.mirror.options import CopyMode
from nbdmirror.mirror.pivot_pause import ALONE_S, RECENT
from nbdmirror.mirror.quiesce import OLD_S

ALLOWED_S = 0.1
RATE = 10 * MIB
"""A tenth of a second carries 1 MiB."""

A_WHILE_S = 30.0


def ready() -> JobWorld:
    """READY, at a known speed of the copy."""
    world = JobWorld(max_pause_s=ALLOWED_S).ready()
    world.job.watch.outlook.rate = RATE
    return world


def completing_slowly(step: str) -> JobWorld:
    """READY, to be completed, and `step` has taken longer than guests may be held."""
    world = ready()
    world.resources.holds = {step}
    world.job.complete()
    world.settle()
    world.pass_s(2 * ALLOWED_S)
    return world


def go_on(world: JobWorld) -> None:
    """The step ends, and those after it take no time."""
    world.resources.holds.clear()
    world.resources.answer()


def fall_behind(world: JobWorld) -> None:
    """Leave more to copy than fits: the target answers no write."""
    world.target.requests.holds = {"write"}
    for offset in range(0, MIB, 64 * KIB):
        world.write(offset)
    world.job.watch.outlook.rate = RATE / 8


def test_guests_are_not_held_while_what_is_left_does_not_fit() -> None:
    world = ready()
    fall_behind(world)
    world.job.complete()
    for _ in range(int(A_WHILE_S / 0.05)):
        world.pass_s(0.05)
        assert not world.is_held
    assert world.status == "ready" and world.job.quiesce_timeouts == 0
    world.target.requests.answer_all()
    world.pass_s(5.0)
    assert world.job.pivoted and "pivot" in world.resources.calls
    world.assert_identical()


@pytest.mark.parametrize("kind", ["write", "flush"])
def test_guests_are_held_no_longer_than_is_allowed(kind: str) -> None:
    """The target stops in the very moment that the guests are held."""
    world = ready()
    token = world.begin()
    world.job.complete()
    while not world.is_held:
        world.pass_s(0.01)
    held_since_s = world.loop.now_s
    world.target.requests.holds = {kind}
    world.end(token)
    while world.is_held:
        world.pass_s(0.001)
    assert world.loop.now_s - held_since_s <= ALLOWED_S + 0.005
    assert world.job.quiesce_timeouts == 1 and not world.job.pivoted
    for _ in range(int(ALONE_S[0] / 0.05) - 1):
        world.pass_s(0.05)
        assert not world.is_held
    world.target.requests.answer_all()
    world.pass_s(A_WHILE_S)
    assert world.job.pivoted and (world.job.pause_s or 0) <= ALLOWED_S
    world.assert_identical()


def test_the_record_of_the_end_counts() -> None:
    """It is written while guests are held, as long as its preparation took."""
    world = completing_slowly("prepare")
    go_on(world)
    for _ in range(100):
        world.pass_s(0.05)
        assert not world.is_held and not world.job.pivoted
    world.job.change(CopyMode.BACKGROUND, max_pause_s=4 * ALLOWED_S)
    world.pass_s(5.0)
    assert world.job.pivoted
    world.assert_identical()


def test_the_record_is_prepared_anew_where_the_pivot_waits() -> None:
    """One preparation has met a burst of other work, and guests write all the time."""
    world = completing_slowly("prepare")
    go_on(world)
    for _ in range(int(2 * OLD_S / 0.05)):
        if not world.is_held and not world.job.pivoted:
            world.write()
        world.pass_s(0.05)
    assert world.job.pivoted and (world.job.pause_s or 0) <= ALLOWED_S
    assert world.job.quiesce_timeouts == 0 and world.resources.calls.count("prepare") == 2
    world.assert_identical()


def test_a_question_to_the_other_server_does_not_count() -> None:
    """Guests are not held for that."""
    world = completing_slowly("check_end")
    assert "prepare" not in world.resources.calls
    go_on(world)
    world.pass_s(1.0)
    assert world.job.pivoted
    world.assert_identical()


ROUND_S = 0.05
BUSY: dict[str, Any] = {"write_s": 1.2 * ROUND_S, "max_pause_s": 0.2}
"""Something is always in flight beside a guest of that interval."""


def pivot_beside_a_busy_guest(found: Watched, most_s: float) -> None:
    """Complete the job beside a guest that leaves 256 to 512 KiB at each moment, of which the
    target takes all at once in BUSY["write_s"]."""
    world = found.world
    world.job.complete()
    until_s = world.loop.now_s + most_s
    while not world.job.pivoted:
        assert world.loop.now_s < until_s, "no pivot"
        for offset in range(0, 256 * KIB, 64 * KIB):
            if not world.is_held:
                world.write(offset)
        world.pass_s(ROUND_S)
    assert (world.job.pause_s or 0) <= BUSY["max_pause_s"]
    world.assert_identical()


@pytest.mark.parametrize("is_lifted", [True, False])
def test_the_speed_of_a_limit_is_not_that_of_the_copy(is_lifted: bool) -> None:
    """A limit does not hold while guests are held."""
    found = Watched(speed_bytes_per_s=128 * KIB, **BUSY)
    found.world.pass_s(20.0)
    assert found.world.status == "ready"
    if is_lifted:
        found.world.job.set_speed(0)
    pivot_beside_a_busy_guest(found, 1.0)


def test_a_limit_keeps_no_pivot_whose_rest_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is left at each moment."""
    monkeypatch.setattr(pivot_pause, "LEVEL_BYTES", 128 * KIB)
    found = Watched(speed_bytes_per_s=32 * MIB, **BUSY)
    found.world.pass_s(20.0)
    assert found.world.status == "ready"
    pivot_beside_a_busy_guest(found, 10.0)


def test_a_pause_that_a_limit_makes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivot_pause, "LEVEL_BYTES", 128 * KIB)
    found = Watched(speed_bytes_per_s=64 * KIB, **BUSY)
    world = found.world
    world.pass_s(200.0)
    assert world.status == "ready"
    for _ in range(int(10.0 / ROUND_S)):
        world.write()
        world.pass_s(ROUND_S)
    found.write_everywhere()
    world.pass_s(RECENT + 1.0)
    assert world.job.pivot_pause.is_too_long


def test_no_speed_from_before_a_limit_counts() -> None:
    """Not that since READY either."""
    found = Watched(**BUSY)
    world = found.world
    world.pass_s(5.0)
    for speed in (0, 128 * KIB):
        world.job.set_speed(speed)
        for _ in range(int(10.0 / ROUND_S)):
            world.write()
            world.pass_s(ROUND_S)
    world.target.requests.holds = {"write"}
    found.write_everywhere()
    world.pass_s(RECENT + 1.0)
    world.job.set_speed(0)
    assert world.job.pivot_pause.predicted_s == 0.0  # not known, and not much is left
    world.target.requests.answer_all()


def test_a_speed_that_was_low_before_ready_is_not_the_last_word() -> None:
    """As of a copy that had little but zeroes in the last seconds."""
    found = Watched(**BUSY)
    found.world.pass_s(5.0)
    assert found.world.status == "ready"
    found.world.job.watch.outlook.rate = 64 * KIB
    pivot_beside_a_busy_guest(found, 10.0)


def test_zeroes_say_nothing_of_the_speed() -> None:
    """The target zeroes a gigabyte as fast as a granule."""
    found = Watched(**BUSY)
    world = found.world
    world.pass_s(5.0)
    rate = world.job.watch.outlook.rate = 64 * KIB
    for _ in range(int(10.0 / ROUND_S)):
        world.disk.zero(0, world.disk.size // 2, may_trim=True, fua=False, fast=False)
        world.target.requests.delays_s["zero"] = ROUND_S
        world.pass_s(ROUND_S)
    world.target.requests.holds = {"write"}
    for offset in range(0, MIB, 64 * KIB):
        world.write(offset)
    world.pass_s(RECENT + 1.0)
    assert world.job.pivot_pause.predicted_s == pytest.approx(MIB / rate)
    world.target.requests.answer_all()


def test_in_a_group_the_first_one_that_is_level_waits_no_longer_than_is_allowed() -> None:
    first, second = a_group("a", "b", max_pause_s=ALLOWED_S, auto_finalize=False)
    first.job.complete()
    second.job.complete()
    first.pass_s(5.0)
    token = second.begin()
    first.job.finalize()
    longest_s, since_s = 0.0, None
    for _ in range(2000):
        first.pass_s(0.005)
        if not first.is_held:
            since_s = None
        else:
            since_s = first.loop.now_s if since_s is None else since_s
            longest_s = max(longest_s, first.loop.now_s - since_s)
    assert 0 < longest_s <= ALLOWED_S + 0.005
    second.end(token)
    first.pass_s(A_WHILE_S)
    assert first.job.pivoted and second.job.pivoted
    first.assert_identical()
    second.assert_identical()
