"""The guest is throttled so that its mirror ends, if that is allowed, and not for longer than
needed: by the rules alone, and with a job whose guest is too fast, in virtual time."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from unit.mirror.jobparts import KIB, MIB, JobWorld
from unit.mirror.watched import STEP_S, Watched

from nbdmirror.mirror.ladder import (
    HALVED_S,
    PART,
    PART_MAX,
    PART_MIN,
    PIVOT_S,
    RESERVE,
    Rung,
    Situation,
    Step,
    next_step,
)
from nbdmirror.mirror.options import CopyMode, MirrorOptions, OnDeadline
from nbdmirror.mirror.outlook import NEVER_S
from nbdmirror.server.course import Course

ONE, BOTH = ("throttle",), ("throttle", "write-blocking")
LONG_S = 300.0


def asked(may: tuple[str, ...] = ONE, **more: Any) -> Step | None:
    known: dict[str, Any] = {"is_ready": False, "never": False, "pivot_waits_s": 0.0}
    return next_step(MirrorOptions("j", may=may), Situation(**known | {"bytes_per_s": MIB} | more))


# The rules.


def part(**more: Any) -> float:
    step = asked(never=True, **more)
    assert step is not None and step.rung is Rung.THROTTLE and step.bytes_per_s is not None
    return step.bytes_per_s / MIB


def test_how_much_a_guest_may_change() -> None:
    assert part() == PART
    assert part(deadline_left_s=100.0, left_bytes=RESERVE * 60 * MIB) == pytest.approx(0.4)
    assert part(deadline_left_s=1e6, left_bytes=MIB) == PART_MAX
    assert part(deadline_left_s=0.0, left_bytes=MIB) == PART_MIN
    assert part(deadline_left_s=9.0, left_bytes=100 * MIB) == PART_MIN


@pytest.mark.parametrize("may", [ONE, BOTH])
def test_the_throttle_comes_first(may: tuple[str, ...]) -> None:
    step = asked(may, never=True)
    assert step is not None and step.rung is Rung.THROTTLE and step.reason


def test_without_a_known_rate_there_is_no_throttle() -> None:
    assert asked(never=True, bytes_per_s=None) is None
    step = asked(BOTH, never=True, bytes_per_s=None)
    assert step is not None and step.rung is Rung.WRITE_BLOCKING


def test_a_throttle_that_is_not_enough() -> None:
    more: dict[str, Any] = {"never": True, "throttle": PART * MIB}
    assert asked(BOTH, throttled_s=NEVER_S - 1, **more) is None
    assert asked(ONE, throttled_s=NEVER_S, **more) is None
    step = asked(BOTH, throttled_s=NEVER_S, **more)
    assert step is not None and step.rung is Rung.WRITE_BLOCKING


def test_a_throttle_follows_the_copy() -> None:
    assert asked(throttle=PART * MIB, bytes_per_s=1.1 * MIB) is None
    step = asked(throttle=PART * MIB, bytes_per_s=2 * MIB)
    assert step is not None and step.bytes_per_s == 2 * PART * MIB


def test_a_pivot_that_waits_halves_it() -> None:
    more: dict[str, Any] = {
        "is_ready": True,
        "is_ending": True,
        "throttle": PART * MIB,
        "pivot_waits_s": 1.0,
    }
    assert asked(throttled_s=HALVED_S - 1, **more) is None
    step = asked(throttled_s=HALVED_S, **more)
    assert step is not None and step.bytes_per_s == PART * MIB / 2


def test_it_ends_when_the_mirror_is_ready() -> None:
    step = asked(is_ready=True, throttle=PART * MIB)
    assert step is not None and step.bytes_per_s is None and step.rung is Rung.THROTTLE
    assert asked(is_ready=True, is_ending=True, throttle=PART * MIB) is None


# A job.


def throttled(**more: Any) -> Watched:
    """A job whose guest is too fast, from the moment on that it is throttled."""
    found = Watched(may=ONE, buffer_bytes=64 * KIB, **more)
    write_until(found, lambda: found.world.job.throttle.bytes_per_s is not None)
    return found


def write_until(found: Watched, is_so: Any) -> None:
    until_s = found.world.loop.now_s + LONG_S
    while not is_so():
        assert found.world.loop.now_s < until_s, "not within the time"
        found.write_everywhere(until=is_so)
        found.world.pass_s(STEP_S)


def told(world: JobWorld) -> list[tuple[str, bool]]:
    """The rungs, and whether each throttle is one."""
    events = world.told("X_NBDMIRROR_CONVERGENCE")
    assert all(data["reason"] for data in events)
    return [(data["rung"], "bytes-per-s" in data) for data in events]


def check_released(world: JobWorld) -> None:
    assert world.job.throttle.bytes_per_s is None
    assert world.job.throttle not in world.disk.ledger.bitmaps


def test_a_guest_that_is_too_fast_is_throttled_until_the_mirror_is_ready() -> None:
    found = throttled()
    world = found.world
    assert told(world) == [("throttle", True)] and found.course.throttle is not None
    write_until(found, lambda: world.status == "ready")
    assert found.waited_s > 0 and world.disk.synchronous is None
    world.job.complete()
    write_until(found, lambda: world.job.pivoted)
    check_released(world)
    assert told(world)[0] == ("throttle", True) and told(world)[-1] == ("throttle", False)
    waited_s = found.waited_s
    world.assert_identical()
    found.write_everywhere()
    assert found.waited_s == waited_s


def test_a_ready_mirror_that_nobody_ends_has_no_throttle() -> None:
    found = throttled()
    write_until(found, lambda: found.world.status == "ready")
    found.world.pass_s(2.0)
    check_released(found.world)
    assert told(found.world)[-1] == ("throttle", False)
    found.world.pass_s(10.0)
    found.world.job.complete()
    found.world.pass_s(10.0)
    found.world.assert_identical()


@pytest.mark.guarantee("Nobody is throttled who did not allow it")
def test_nobody_is_throttled_who_did_not_allow_it() -> None:
    found = Watched(may=("write-blocking",), buffer_bytes=64 * KIB)
    assert found.write_until_changed(4 * NEVER_S) is not None
    assert (found.waited_s, told(found.world)) == (0.0, [("write-blocking", False)])
    silent = Watched(buffer_bytes=64 * KIB)
    assert silent.write_until_changed(2 * NEVER_S) is None
    assert (silent.waited_s, told(silent.world)) == (0.0, [])
    check_released(silent.world)


def test_a_deadline_is_kept_that_would_be_missed() -> None:
    """The guest is throttled long before the copy counts as one that does not end."""
    found = Watched(may=ONE, buffer_bytes=64 * KIB)
    at_s = found.time_s() + 40.0
    more = {"deadline_at_s": at_s, "on_deadline": OnDeadline.CANCEL}
    found.world.job.change(CopyMode.BACKGROUND, **more)
    write_until(found, lambda: found.world.status == "ready")
    found.world.job.complete()
    write_until(found, lambda: found.world.job.pivoted)
    assert found.time_s() < at_s and told(found.world)[0] == ("throttle", True)
    found.world.assert_identical()


def test_a_pivot_with_a_short_pause_gets_its_moment() -> None:
    found = Watched(may=ONE, max_pause_s=0.5, buffer_bytes=64 * KIB)
    world = found.world
    world.pass_s(10.0)
    assert world.status == "ready"
    world.job.complete()
    write_until(found, lambda: world.job.pivoted)
    assert (world.job.pause_s or 0) <= 0.5 and world.disk.synchronous is None
    assert ("throttle", True) in told(world)
    check_released(world)
    world.assert_identical()


def by_force(world: JobWorld) -> None:
    world.job.cancel(force=True)


def error(world: JobWorld) -> None:
    world.job.copy_failed("write", OSError(5, "the target fails"))


def not_allowed(world: JobWorld) -> None:
    world.job.change(CopyMode.BACKGROUND, may=())


def synchronous(world: JobWorld) -> None:
    world.job.change(CopyMode.WRITE_BLOCKING)


def pause(world: JobWorld) -> None:
    world.job.pause()


@pytest.mark.guarantee("Nobody is throttled who did not allow it")
@pytest.mark.parametrize("end", [by_force, error, not_allowed, synchronous, pause])
def test_it_ends_with_what_it_is_for(end: Any) -> None:
    found = throttled()
    end(found.world)
    found.world.settle()
    check_released(found.world)
    found.world.pass_s(1.5)
    assert told(found.world) == [("throttle", True), ("throttle", False)]


def test_a_guest_that_waits_is_let_go_before_writes_are_held() -> None:
    """A pivot that waited for the throttle would hold all guests meanwhile."""
    found = throttled()
    world = found.world
    write_until(found, lambda: world.status == "ready")
    world.job.complete()
    seen: list[bool] = []
    close = world.disk.ledger.close_gate

    def close_gate(*arguments: Any, **more: Any) -> None:
        seen.append(world.job.throttle.bytes_per_s is None)
        close(*arguments, **more)

    with patch.object(world.disk.ledger, "close_gate", close_gate):
        write_until(found, lambda: world.job.pivoted)
    assert seen and all(seen)
    world.assert_identical()


def test_no_throttle_begins_while_writes_are_held() -> None:
    """Requests that are in progress then would wait for it, and the pivot for them, in vain."""
    found = Watched(may=ONE, size=8 * MIB, buffer_bytes=64 * KIB)
    world, held = found.world, list[bool]()
    world.pass_s(40.0)
    assert world.status == "ready"
    world.job.complete()
    take = Course.take

    def taken(self: Course, step: Step) -> None:
        held.append(world.is_held)
        take(self, step)

    until_s = world.loop.now_s + PIVOT_S + 15.0
    with patch.object(Course, "take", taken):
        write_until(found, lambda: world.loop.now_s >= until_s)
    assert world.job.quiesce_timeouts > 10 and held and not any(held)
    world.pass_s(40.0)
    assert world.job.pivoted
    world.assert_identical()
