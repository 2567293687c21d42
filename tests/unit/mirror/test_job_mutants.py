"""Mutants of the job's rules: each breaks one rule, and the test that is named beside it must then
fail. A test that lets its mutant pass proves nothing about the real code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
from unit.mirror import jobmutants
from unit.mirror import test_job_bounds as bounds
from unit.mirror import test_job_endings as endings
from unit.mirror import test_job_rules as rules
from unit.mirror import test_job_states as states
from unit.mirror import test_job_trouble as trouble
from unit.mirror import test_pivot_pause as pauses
from unit.mirror.jobparts import IO_ERROR, NO_SPACE

from nbdmirror.mirror import pivot_pause, quiesce, stopping
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.group import Group
from nbdmirror.mirror.job import Job
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import Ending, MirrorOptions, Policy
from nbdmirror.mirror.pivot_pause import PivotPause
from nbdmirror.mirror.quiesce import Quiesce
from nbdmirror.mirror.stopping import Stopping
from nbdmirror.mirror.target_watch import TargetWatch
from nbdmirror.mirror.timers import JobTimers


@dataclass(frozen=True)
class Mutant:
    """`owner.name` is `broken`; then `test` fails."""

    name: str
    owner: Any
    attribute: str
    broken: Any
    test: Callable[..., None]
    arguments: tuple[Any, ...] = ()


MUTANTS = [
    Mutant(
        "no flush for READY",
        MirrorJob,
        "_advance_copying",
        jobmutants.ready_at_once,
        rules.test_ready_comes_after_a_flush_and_not_before,
    ),
    Mutant(
        "an error of the flush for READY is not heard",
        Copier,
        "flush",
        jobmutants.flush_never,
        rules.test_a_flush_that_fails_before_ready_is_a_write_error,
    ),
    Mutant(
        "an ending does not flush",
        Copier,
        "flush",
        jobmutants.flush_never,
        rules.test_an_ending_flushes_behind_the_gate,
        (Ending.COMPLETE,),
    ),
    Mutant(
        "an ending does not wait for requests under way",
        Quiesce,
        "_close_gate",
        jobmutants.close_without_a_look,
        rules.test_an_ending_waits_for_requests_under_way_and_counts_again,
    ),
    Mutant(
        "an ending does not count again",
        Quiesce,
        "_flushed",
        jobmutants.level_after_the_flush,
        rules.test_what_is_dirty_after_the_last_flush_is_copied_and_flushed_again,
    ),
    Mutant(
        "a flush that fails behind the gate is not heard",
        Quiesce,
        "_flushed",
        jobmutants.level_after_the_flush,
        rules.test_a_flush_that_fails_behind_the_gate_opens_it_and_the_ending_begins_again,
    ),
    Mutant(
        "complete is taken before READY",
        Job,
        "check_complete",
        jobmutants.nothing,
        rules.test_complete_before_ready_is_refused_and_changes_nothing,
    ),
    Mutant(
        "a soft cancel is a forced one",
        Job,
        "cancel",
        jobmutants.cancel_forgets_softness,
        rules.test_a_soft_cancel_after_ready_is_a_copy_of_one_moment,
    ),
    Mutant(
        "a soft cancel takes a complete back",
        Job,
        "cancel",
        jobmutants.cancel_overrules,
        rules.test_a_soft_cancel_does_not_take_a_complete_back,
    ),
    Mutant(
        "errors after a soft cancel are ignored",
        MirrorJob,
        "copy_failed",
        jobmutants.skip,
        rules.test_an_error_while_it_ends_is_reported,
        (Ending.CANCEL,),
    ),
    Mutant(
        "a hung target is never given up",
        Stopping,
        "_cut",
        jobmutants.for_ever,
        trouble.test_a_forced_cancel_gives_a_hung_target_up,
        ("write", Ending.NONE),
    ),
    Mutant(
        "a hung target is given up at once",
        stopping,
        "CANCEL_GRACE_S",
        0.0,
        trouble.test_a_forced_cancel_waits_a_moment_for_requests_that_end_by_themselves,
    ),
    Mutant(
        "a hung source is waited for",
        Stopping,
        "_disown",
        jobmutants.for_ever,
        trouble.test_a_forced_cancel_does_not_wait_for_a_hung_source,
    ),
    Mutant(
        "ignore means skip",
        MirrorJob,
        "copy_failed",
        jobmutants.skip,
        trouble.test_ignore_does_not_mean_skip,
    ),
    Mutant(
        "the last error wins",
        MirrorJob,
        "fail",
        jobmutants.last_error_wins,
        rules.test_a_forced_cancel_does_not_hide_an_error,
    ),
    Mutant(
        "what is in flight does not drain before a job has failed",
        Stopping,
        "is_over",
        jobmutants.over_at_once,
        trouble.test_report_ends_the_job_with_its_first_error_when_all_has_drained,
    ),
    Mutant(
        "each error of those in flight is reported",
        MirrorJob,
        "copy_failed",
        jobmutants.each_error_is_told,
        trouble.test_stop_pauses_with_one_event,
        (Policy.STOP, IO_ERROR, "failed"),
    ),
    Mutant(
        "a full target is an error as any other",
        Policy,
        "action",
        jobmutants.always_report,
        trouble.test_stop_pauses_with_one_event,
        (Policy.ENOSPC, NO_SPACE, "nospace"),
    ),
    Mutant(
        "both sides have the target's policy",
        MirrorOptions,
        "policy",
        lambda self, operation: self.on_target_error,
        trouble.test_each_side_has_a_policy,
        (Policy.STOP,),
    ),
    Mutant(
        "a pause does not wait for what is in flight",
        Stopping,
        "is_over",
        jobmutants.over_at_once,
        trouble.test_a_paused_job_lets_nothing_fly,
    ),
    Mutant(
        "a pause leaves the gate closed",
        MirrorJob,
        "_release_guest",
        jobmutants.nothing,
        trouble.test_a_pause_in_mid_ending_opens_the_gate,
    ),
    Mutant(
        "the policy is asked before a reconnect",
        TargetWatch,
        "may_reconnect",
        jobmutants.never,
        bounds.test_a_lost_target_is_brought_back_before_the_policy_is_asked,
    ),
    Mutant(
        "a target that is lost at once again is brought back for ever",
        TargetWatch,
        "may_reconnect",
        jobmutants.always,
        bounds.test_a_target_that_is_lost_again_at_once_is_an_error,
    ),
    Mutant(
        "an answer from before a pause counts",
        JobTimers,
        "abandon_step",
        jobmutants.nothing,
        bounds.test_a_job_that_waits_for_its_target_is_paused_and_cancelled_at_once,
    ),
    Mutant(
        "guests are held though what is left does not fit into the pause",
        PivotPause,
        "_fits",
        jobmutants.always,
        pauses.test_guests_are_not_held_while_what_is_left_does_not_fit,
    ),
    Mutant(
        "a record that was slow to prepare once counts for ever",
        quiesce,
        "OLD_S",
        1e9,
        pauses.test_the_record_is_prepared_anew_where_the_pivot_waits,
    ),
    Mutant(
        "guests are held until the target has all",
        pivot_pause,
        "LIMIT_S",
        60.0,
        bounds.test_guests_are_held_for_a_second_at_most,
    ),
    Mutant(
        "an ending waits for the guest to write less",
        quiesce,
        "CONVERGE_S",
        60.0,
        bounds.test_an_ending_holds_guests_after_a_while_however_much_is_dirty,
    ),
    Mutant(
        "retries without a back-off",
        JobTimers,
        "retry",
        jobmutants.retry_at_once,
        bounds.test_retries_come_later_each_time_up_to_a_bound,
    ),
    Mutant(
        "a success does not end the back-off",
        JobTimers,
        "went_well",
        jobmutants.nothing,
        bounds.test_after_a_success_the_next_failure_is_a_new_one,
    ),
    Mutant(
        "a resumed job stays paused",
        Job,
        "unpause",
        jobmutants.unpause_keeps_the_status,
        states.test_a_paused_job_takes_a_speed_and_a_copy_mode,
        (states.standby,),
    ),
    Mutant(
        "an end counts before it is written down",
        MirrorJob,
        "commit",
        lambda self, done: done(None),
        endings.test_an_end_is_written_down_before_it_is_one,
    ),
    Mutant(
        "an end that could not be written down counts",
        MirrorJob,
        "commit_failed",
        jobmutants.commit_cannot_fail,
        endings.test_an_end_that_cannot_be_written_down_is_tried_again,
        ("commit",),
    ),
    Mutant(
        "an end of a group that could not be written down is not taken back",
        MirrorJob,
        "commit_failed",
        jobmutants.not_taken_back,
        endings.test_no_job_of_a_group_ends_if_one_end_cannot_be_written_down,
    ),
    Mutant(
        "a cancel comes between an end and its record",
        MirrorJob,
        "fail",
        jobmutants.ends_at_any_time,
        endings.test_nothing_comes_between_an_end_and_its_record,
    ),
    Mutant(
        "jobs of a group do not wait",
        Group,
        "arrived",
        lambda self: self.jobs[0].pend() or self.finalize(),
        endings.test_jobs_of_a_group_wait_for_one_another_and_end_in_one_step,
    ),
    Mutant(
        "a group stays when one of its jobs fails",
        Group,
        "break_up",
        jobmutants.nothing,
        endings.test_a_job_that_fails_takes_its_group_along,
    ),
    Mutant(
        "guests are held for as long as the group takes",
        pivot_pause,
        "HOLD_S",
        60.0,
        endings.test_guests_are_not_held_for_long_for_another_job_of_the_group,
    ),
    Mutant(
        "guests are held in vain again and again",
        Group,
        "may_hold",
        jobmutants.always,
        endings.test_guests_are_not_held_for_long_for_another_job_of_the_group,
    ),
]


@contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    with patch.object(mutant.owner, mutant.attribute, mutant.broken):
        yield


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_rule_is_noticed(mutant: Mutant) -> None:
    mutant.test(*mutant.arguments)
    with broken(mutant), pytest.raises((Exception, pytest.fail.Exception)):
        mutant.test(*mutant.arguments)
