"""The error policies, compared with qemu-storage-daemon: policy x side x phase x fault.

Each script knows from QEMU's rules what comes (`action_of`), and goes on until the fault is gone
and the images are equal, or the job has failed and the source is served as before.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.parity import assert_alike
from support.paritydifferences import BACK_OFF, Difference, substituted
from support.paritypolicies import (
    COMPLETE,
    ENDINGS,
    FORCE_CANCEL,
    IN_SYNC,
    OPERATIONS,
    RESUME,
    SOFT_CANCEL,
    SOME_POLICIES,
    action_of,
    by_policy,
    by_side,
    completed,
    failed,
    faulty,
)
from support.paritysteps import (
    Script,
    dismiss,
    do,
    error_event,
    fault,
    heal,
    held,
    images,
    mirror,
    query,
    ready,
    start,
    status,
    swapped,
    write,
)


@pytest.mark.rule(20)
@by_side
@by_policy
def test_for_ever_in_the_first_copy(folder: Path, policy: str, errno_name: str, side: str) -> None:
    operation, action = OPERATIONS[side], action_of(policy, errno_name)
    script: list[Script] = [
        [fault(side, operation, errno_name)],
        start(**{f"on_{side}_error": policy}),
        [error_event(operation, action)],
    ]
    if action == "report":
        script += [failed(side, operation)]
    elif action == "stop":
        script += [
            [status("paused"), query()],
            [do("block-job-pause", device="j"), COMPLETE, SOFT_CANCEL],
            [do("job-resume", id="j"), error_event(operation, "stop"), status("paused"), query()],
            [heal(side, operation), RESUME, ready(), query()],
            completed(),
        ]
    else:
        script += [
            [error_event(operation, "ignore"), query(), COMPLETE],
            [heal(side, operation), ready(), IN_SYNC, query()],
            completed(),
        ]
    assert_alike(folder, faulty(side), script, BACK_OFF)


@pytest.mark.guarantee("Errors are never skipped")
@by_side
@pytest.mark.parametrize("policy", ["ignore", "stop"])
def test_once_in_the_first_copy(folder: Path, policy: str, side: str) -> None:
    operation, action = OPERATIONS[side], action_of(policy, "ENOSPC")
    script: list[Script] = [
        [fault(side, operation, "ENOSPC", 1)],
        start(**{f"on_{side}_error": policy}),
        [error_event(operation, action)],
    ]
    if action == "stop":
        script += [[status("paused"), query(), RESUME]]
    script += [[ready(), query()], completed()]
    assert_alike(folder, faulty(side), script, BACK_OFF)


@pytest.mark.rule(21)
@pytest.mark.guarantee("Errors are never skipped")
@by_side
@pytest.mark.parametrize(("policy", "errno_name"), [*SOME_POLICIES, ("enospc", "ENOSPC")])
def test_after_ready(folder: Path, policy: str, errno_name: str, side: str) -> None:
    operation, action = OPERATIONS[side], action_of(policy, errno_name)
    script: list[Script] = [
        start(**{f"on_{side}_error": policy}),
        [ready(), fault(side, operation, errno_name), write(), error_event(operation, action)],
    ]
    if action == "report":
        script += [failed(side, operation)]
    elif action == "stop":
        script += [
            [status("standby"), query()],
            [do("job-pause", id="j"), SOFT_CANCEL, COMPLETE],  # the last is remembered
            [RESUME, error_event(operation, "stop"), status("standby"), query()],
            [heal(side, operation), RESUME, status("concluded"), query(), images(), swapped()],
        ]
    else:
        script += [
            [error_event(operation, "ignore"), query()],
            [heal(side, operation), IN_SYNC, query()],
            completed(),
        ]
    assert_alike(folder, faulty(side), script, BACK_OFF)


@pytest.mark.rule(18)
@pytest.mark.guarantee("Errors are never skipped")
@pytest.mark.parametrize("ending", ENDINGS)
@by_side
@pytest.mark.parametrize(
    ("policy", "errno_name"),
    [("report", "EIO"), ("ignore", "EIO"), ("stop", "EIO")],
)
def test_while_it_ends(folder: Path, policy: str, errno_name: str, side: str, ending: str) -> None:
    """A copy hangs, the end is asked for, the copy fails (iotest mirror-ready-cancel-error)."""
    operation, action = OPERATIONS[side], action_of(policy, errno_name)
    script: list[Script] = [
        start(**{f"on_{side}_error": policy}),
        [ready(), fault(side, operation, "hold"), write()],
        [held(side, operation), ENDINGS[ending], query()],
        [fault(side, operation, errno_name), error_event(operation, action)],
    ]
    if action == "report":
        script += [failed(side, operation)]
    elif action == "stop":
        script += [
            [status("standby"), query()],
            [SOFT_CANCEL, COMPLETE],
            [RESUME, error_event(operation, "stop"), status("standby"), query()],
            [heal(side, operation), RESUME, status("concluded"), query(), images()],
        ]
    else:
        script += [
            [error_event(operation, "ignore"), query()],
            [heal(side, operation), status("concluded"), query(), images()],
        ]
    if action != "report":
        script += [[swapped()] if ending == "complete" else []]
    assert_alike(folder, faulty(side), script, BACK_OFF)


@pytest.mark.rule(18)
@by_side
@pytest.mark.parametrize("policy", ["ignore", "stop"])
@pytest.mark.parametrize("phase", ["first copy", "ready", "completing", "soft cancelling"])
def test_force_cancel_of_a_job_with_errors(
    folder: Path, policy: str, side: str, phase: str
) -> None:
    operation = OPERATIONS[side]
    ending = {"completing": COMPLETE, "soft cancelling": SOFT_CANCEL}.get(phase)
    script: list[Script] = []
    if phase == "first copy":
        script += [[fault(side, operation, "EIO")], start(**{f"on_{side}_error": policy})]
    else:
        script += [start(**{f"on_{side}_error": policy}), [ready(), fault(side, operation, "hold")]]
        script += [[write(), held(side, operation)]]
        script += [[ending] if ending else [], [fault(side, operation, "EIO")]]
    script += [[error_event(operation, policy)]]
    if policy == "stop":
        script += [[status("paused" if phase == "first copy" else "standby")]]
    script += [[FORCE_CANCEL, status("concluded"), query(), dismiss()]]
    script += [[heal(side, operation), images(target=False), mirror(), ready(), IN_SYNC]]
    assert_alike(folder, faulty(side), [script, completed()], BACK_OFF)


# The target's flush


@pytest.mark.rule(13, 14)
@pytest.mark.parametrize(("policy", "errno_name"), SOME_POLICIES)
def test_flush_before_ready(folder: Path, policy: str, errno_name: str) -> None:
    action = action_of(policy, errno_name)
    script: list[Script] = [
        [fault("target", "flush", errno_name)],
        start(on_target_error=policy),
        [error_event("write", action)],
    ]
    if action == "report":
        script += [failed("target", "flush")]
    elif action == "stop":
        script += [
            [status("paused"), query(), RESUME, error_event("write", "stop"), status("paused")],
            [heal("target", "flush"), RESUME, ready(), query()],
            completed(),
        ]
    else:
        script += [[query(), heal("target", "flush"), ready(), query()], completed()]
    assert_alike(folder, faulty("target"), script, BACK_OFF)


def _answer_first(lines: list[str]) -> list[str]:
    kept = list(lines)
    for number, line in enumerate(kept):
        if re.match(r"-- block-job-(complete|cancel)", line):
            kept.insert(number + 1, kept.pop(kept.index("<- return", number + 1)))
    return kept


ENDING_ANSWER = Difference(
    "when the answer to complete and cancel comes",
    "QEMU's job may have had its next error by then, where it has nothing else to do",
    _answer_first,
)


@pytest.mark.rule(14)
@pytest.mark.parametrize("ending", ENDINGS)
def test_flush_where_nothing_was_written(folder: Path, ending: str) -> None:
    """With sync=none: before READY and at the end, since what the target holds was written by
    others, and may be in its caches alone."""
    stopped = [query(), heal("target", "flush"), RESUME]
    script: list[Script] = [
        [fault("target", "flush", "EIO"), start(sync="none", on_target_error="stop")],
        [error_event("write", "stop"), status("paused"), stopped, ready(), query()],
        [fault("target", "flush", "EIO"), ENDINGS[ending]],
        [error_event("write", "stop"), status("standby"), stopped],
        [status("concluded"), query(), images(equal=False)],
    ]
    assert_alike(folder, faulty("target"), script, ENDING_ANSWER)


DRAINED = Difference(
    "guests held while the last flush is tried again",
    "QEMU keeps its guest's requests back as long as the flush fails, and shows `paused`; "
    "nbdmirror gives the guest its I/O back between attempts (rule 41)",
    substituted(r'paused=\w+ ready=true (.*) status="ready"', r'ready=true \1 status="ready"'),
)


@pytest.mark.rule(13, 15)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("policy", "errno_name"),
    SOME_POLICIES,
)
def test_flush_at_the_end(folder: Path, policy: str, errno_name: str, ending: str) -> None:
    action = action_of(policy, errno_name)
    script: list[Script] = [
        start(on_target_error=policy),
        [ready(), fault("target", "flush", errno_name), ENDINGS[ending]],
        [error_event("write", action)],
    ]
    if action == "report":
        script += [failed("target", "flush")]
    elif action == "stop":
        script += [
            [status("standby"), query(), SOFT_CANCEL, COMPLETE],
            [RESUME, error_event("write", "stop"), status("standby"), query()],
            [write(), heal("target", "flush"), RESUME, status("concluded")],
            [query(), images()],
        ]
    else:
        script += [[query(), heal("target", "flush"), status("concluded")]]
        script += [[query(), images()]]
    if action != "report":
        script += [[swapped()] if ending == "complete" else []]
    assert_alike(folder, faulty("target"), script, BACK_OFF, DRAINED)
