"""How long a pivot may hold guests' writes, and what the user allows: in virtual time."""

from __future__ import annotations

import pytest
from unit.mirror.jobparts import KIB, MIB, JobWorld, a_group

from nbdmirror.mirror.options import CopyMode
from nbdmirror.mirror.pivot_pause import ALONE_S

ALLOWED_S = 0.1
RATE = 10 * MIB
"""A tenth of a second carries 1 MiB."""

A_WHILE_S = 30.0


def ready() -> JobWorld:
    """READY, at a known speed of the copy."""
    world = JobWorld(max_pause_s=ALLOWED_S).ready()
    world.job.watch.outlook.rate = RATE
    return world


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
    world = ready()
    world.resources.holds = {"prepare"}
    world.job.complete()
    world.settle()
    world.pass_s(2 * ALLOWED_S)
    world.resources.holds.clear()
    world.resources.answer()
    for _ in range(100):
        world.pass_s(0.05)
        assert not world.is_held and not world.job.pivoted
    world.job.change(CopyMode.BACKGROUND, max_pause_s=4 * ALLOWED_S)
    world.pass_s(5.0)
    assert world.job.pivoted
    world.assert_identical()


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
