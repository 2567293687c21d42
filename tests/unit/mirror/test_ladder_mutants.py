"""Mutants of deadlines and of the ladder: each breaks one rule, and the test beside it must then
fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from unit.disk import test_throttle as throttles
from unit.mirror import jobmutants
from unit.mirror import test_deadline as deadlines
from unit.mirror import test_throttle_rung as rungs
from unit.mirror.test_job_mutants import Mutant, broken

from nbdmirror.disk.disk import Disk
from nbdmirror.disk.throttle import Throttle
from nbdmirror.mirror.deadline import Deadline, Done
from nbdmirror.mirror.ladder import Situation, Step, next_step
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import MirrorOptions, OnDeadline
from nbdmirror.mirror.quiesce import Quiesce
from nbdmirror.server import course


def allowed_or_not(options: MirrorOptions, now: Situation) -> Step | None:
    return next_step(replace(options, may=("throttle",)), now)


def trim_past_the_throttle(self: Disk, offset: int, length: int, *, fua: bool) -> None:
    token = self.ledger.enter()
    self.source.trim(offset, length, fua=fua)
    for bitmap in self.ledger.bitmaps:
        if not isinstance(bitmap, Throttle):
            bitmap.mark(offset, length)
    self.ledger.writing.discard(token)


def hold_with_a_throttle(self: Quiesce) -> None:
    self._before_hold = lambda: None
    CLOSE_GATE(self)


CLOSE_GATE = Quiesce._close_gate


def all_that_is_written(self: Throttle, offset: int, length: int) -> int:
    return length


def as_the_wall_clock_says(self: Deadline) -> float | None:
    at_s = self._job.options.deadline_at_s
    self._at_s = at_s
    return None if at_s is None else max(0.0, at_s - self._time_s())


def always_by_force(self: Deadline) -> Done:
    return Done.CANCEL_BY_FORCE


def not_without_ready(self: Deadline) -> Done:
    """Complete now or never."""
    if self._job.is_ready:
        return Done.COMPLETE
    self._job.options = replace(self._job.options, on_deadline=OnDeadline.REPORT)
    return Done.COMPLETE_WHEN_READY


def each_kind(change: Any) -> None:
    throttles.test_each_kind_of_change_counts(throttles.Parts(), change, 512)


def dirty_already(change: Any) -> None:
    throttles.test_what_is_dirty_already_costs_nothing(throttles.Parts(), change)


MUTANTS = [
    Mutant(
        "a throttle stays after the end",
        Throttle,
        "release",
        jobmutants.nothing,
        rungs.test_it_ends_with_what_it_is_for,
        (rungs.by_force,),
    ),
    Mutant(
        "a throttle stays in a pause",
        MirrorJob,
        "left",
        jobmutants.nothing,
        rungs.test_it_ends_with_what_it_is_for,
        (rungs.pause,),
    ),
    Mutant(
        "a guest is throttled who did not allow it",
        course,
        "next_step",
        allowed_or_not,
        rungs.test_nobody_is_throttled_who_did_not_allow_it,
    ),
    Mutant(
        "trims do not count", Disk, "trim", trim_past_the_throttle, each_kind, (throttles.trim,)
    ),
    Mutant(
        "what is dirty already counts",
        Throttle,
        "_fresh_bytes",
        all_that_is_written,
        dirty_already,
        (throttles.write,),
    ),
    Mutant(
        "guests are held with a throttle",
        Quiesce,
        "_close_gate",
        hold_with_a_throttle,
        rungs.test_a_guest_that_waits_is_let_go_before_writes_are_held,
    ),
    Mutant(
        "a step of the clock moves a deadline",
        Deadline,
        "left_s",
        property(as_the_wall_clock_says),
        deadlines.test_a_wall_clock_that_is_stepped_moves_nothing,
        (86400.0,),
    ),
    Mutant(
        "a ready mirror is cancelled by force at its deadline",
        Deadline,
        "_cancellation",
        property(always_by_force),
        deadlines.test_a_ready_job_is_cancelled_softly,
    ),
    Mutant(
        "a late copy is not completed when it is ready",
        Deadline,
        "_completion",
        property(not_without_ready),
        deadlines.test_a_copy_is_completed_when_it_is_ready,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_rule_is_noticed(mutant: Mutant) -> None:
    mutant.test(*mutant.arguments)
    with broken(mutant), pytest.raises((Exception, pytest.fail.Exception)):
        mutant.test(*mutant.arguments)
