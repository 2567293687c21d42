"""What is done to bring a mirror to its end, and when: by the rules alone, and with a job whose
guest is too fast, in virtual time."""

from __future__ import annotations

from typing import Any

import pytest
from unit.mirror.jobparts import KIB
from unit.mirror.watched import Watched

from nbdmirror.mirror.ladder import (
    LATE_S,
    PIVOT_S,
    Situation,
    next_step,
)
from nbdmirror.mirror.options import CopyMode, MirrorOptions
from nbdmirror.mirror.outlook import NEVER_S

ALLOWED = ("write-blocking",)


def options(**more: Any) -> MirrorOptions:
    return MirrorOptions(**{"job_id": "j", "may": ALLOWED, **more})


def situation(**more: Any) -> Situation:
    return Situation(**{"is_ready": False, "never": False, "pivot_waits_s": 0.0, **more})


NEEDED = [
    situation(never=True),
    situation(is_ready=True, pivot_waits_s=PIVOT_S),
    situation(late_s=LATE_S),
    situation(is_ready=True, pivot_waits_s=LATE_S, deadline_left_s=0.0),
    situation(is_ready=True, pivot_waits_s=LATE_S, deadline_left_s=20.0),
    situation(is_ready=True, pivot_waits_s=PIVOT_S, deadline_left_s=3600.0),
]


@pytest.mark.parametrize("now", NEEDED)
def test_what_is_needed_is_done_if_it_is_allowed(now: Situation) -> None:
    step = next_step(options(), now)
    assert step is not None and step.reason


@pytest.mark.parametrize("now", NEEDED)
@pytest.mark.parametrize("more", [{"may": ()}, {"copy_mode": CopyMode.WRITE_BLOCKING}])
def test_nothing_is_done_that_is_not_allowed_or_was_done(
    now: Situation, more: dict[str, Any]
) -> None:
    assert next_step(options(**more), now) is None


@pytest.mark.parametrize(
    "now",
    [
        situation(),
        situation(is_ready=True),
        situation(is_ready=True, never=True),
        situation(is_ready=True, pivot_waits_s=PIVOT_S - 1),
        situation(pivot_waits_s=PIVOT_S),
        situation(late_s=LATE_S - 1),
        situation(is_ready=True, late_s=LATE_S),
        situation(is_ready=True, pivot_waits_s=LATE_S - 1, deadline_left_s=0.0),
        situation(is_ready=True, pivot_waits_s=PIVOT_S - 1, deadline_left_s=3600.0),
    ],
)
def test_nothing_is_done_that_is_not_needed(now: Situation) -> None:
    assert next_step(options(), now) is None


def test_a_guest_that_is_too_fast_waits_for_the_target_in_the_end() -> None:
    watched = Watched(may=ALLOWED, buffer_bytes=64 * KIB)
    world = watched.world
    at_s = watched.write_until_changed(10 * NEVER_S)
    assert at_s is not None and at_s >= NEVER_S
    (told,) = world.told("X_NBDMIRROR_CONVERGENCE")
    assert (told["device"], told["rung"]) == ("j", "write-blocking") and told["reason"]
    world.pass_s(10.0)
    assert world.status == "ready"
    world.job.complete()
    world.pass_s(5.0)
    assert world.job.pivoted
    world.assert_identical()


def test_nobody_is_slowed_down_who_did_not_allow_it() -> None:
    watched = Watched(buffer_bytes=64 * KIB)
    world = watched.world
    assert watched.write_until_changed(4 * NEVER_S) is None
    assert not world.told("X_NBDMIRROR_CONVERGENCE") and world.status == "running"
    world.pass_s(30.0)
    assert world.status == "ready"
    world.job.complete()
    world.pass_s(5.0)
    world.assert_identical()


def test_a_pivot_that_finds_no_moment_gets_one() -> None:
    """READY, and then the guest is faster than what fits into the pause."""
    watched = Watched(may=ALLOWED, max_pause_s=0.5, buffer_bytes=64 * KIB)
    world = watched.world
    world.pass_s(10.0)
    assert world.status == "ready"
    world.job.complete()
    at_s = watched.write_until_changed(10 * PIVOT_S)
    assert at_s is not None and at_s >= PIVOT_S - 1
    assert len(world.told("X_NBDMIRROR_CONVERGENCE")) == 1
    world.pass_s(10.0)
    assert world.job.pivoted and (world.job.pause_s or 0) <= 0.5
    world.assert_identical()
