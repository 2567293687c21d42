"""Several requests in flight that fail, the guest meanwhile, and targets that are lost, compared
with qemu-storage-daemon.

Each script knows from QEMU's rules what comes (`action_of`), and goes on until the fault is gone
and the images are equal, or the job has failed and the source is served as before.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.images import KiB, MiB
from support.parity import assert_alike
from support.paritydifferences import (
    BACK_OFF,
    ONE_ERROR_A_STOP,
    PROGRESS,
    Difference,
    substituted,
    without,
)
from support.paritypolicies import (
    ENDINGS,
    FORCE_CANCEL,
    IN_SYNC,
    OPERATIONS,
    RESUME,
    by_side,
    completed,
    failed,
    faulty,
)
from support.paritysides import Setting, Side
from support.paritysteps import (
    Script,
    add,
    call,
    dismiss,
    do,
    error_event,
    event,
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
    until,
    untold,
    write,
)
from support.waiting import wait_until

# Several in flight; the guest; lost connections


@pytest.mark.rule(21)
@by_side
@pytest.mark.parametrize("policy", ["report", "stop"])
def test_sixteen_in_flight(folder: Path, policy: str, side: str) -> None:
    operation = OPERATIONS[side]
    script: list[Script] = [
        [fault(side, operation, "EIO")],
        start(**{f"on_{side}_error": policy}),
        [status("paused" if policy == "stop" else "concluded"), query()],
    ]
    if policy == "stop":
        script += [[RESUME, status("paused"), query(), heal(side, operation), RESUME, ready()]]
        script += [completed()]
    assert_alike(folder, faulty(side, size=4 * MiB), script, ONE_ERROR_A_STOP)


def _errors_while_stopped(lines: list[str]) -> list[str]:
    kept: list[str] = []
    is_stopped = False
    for line in lines:
        if "JOB_STATUS_CHANGE" in line:
            is_stopped = 'status="standby"' in line
        if not (is_stopped and "BLOCK_JOB_ERROR" in line):
            kept.append(line)
    for number, line in enumerate(
        kept[:-1]
    ):  # and the answer to resume comes before the event, then
        if line == "<- return" and "ready" in kept[number + 1] and "resume" in kept[number - 1]:
            kept[number : number + 2] = reversed(kept[number : number + 2])
    return kept


STOPPED_IS_BACKGROUND = Difference(
    "a stopped write-blocking job leaves the target alone",
    "QEMU goes on writing each guest write to the target while the job is stopped, with a further "
    "event for each; in nbdmirror a paused job lets nothing fly (rule 22), and it is copied later",
    _errors_while_stopped,
)


@pytest.mark.rule(10)
@pytest.mark.guarantee("In write-blocking mode")
@pytest.mark.parametrize("policy", ["report", "ignore", "stop"])
def test_write_blocking_hides_the_targets_errors_from_the_guest(folder: Path, policy: str) -> None:
    script: list[Script] = [
        start(on_target_error=policy, copy_mode="write-blocking"),
        [ready(), write(65536), fault("target", "write", "EIO"), write(131072)],
        [error_event("write", policy)],
    ]
    if policy == "report":
        script += [failed("target", "write")]
    else:
        stopped = [status("standby"), query(), write(4096, 8192)]
        script += [stopped if policy == "stop" else []]
        script += [[heal("target", "write"), RESUME, IN_SYNC, query(), write(262144)]]
        script += [[IN_SYNC], completed()]
    assert_alike(folder, faulty("target"), script, BACK_OFF, STOPPED_IS_BACKGROUND)


def restart(side: Side) -> None:
    server = side.targets["tgt"][0]
    server.socket.unlink(missing_ok=True)
    server.start()


KILL_TARGET = call("the target's server dies", lambda side: side.targets["tgt"][0].kill())
RESTART_TARGET = call("the target's server is back", restart)

RECONNECT = Difference(
    "resumes after a lost connection",
    "QEMU 7.2 reconnects only when asked for I/O, so its first resume fails once more; nbdmirror "
    "reconnects before it goes on, and needs one. So the step tells nothing of its own",
    lambda lines: lines,
)


@pytest.mark.parametrize("phase", ["first copy", "ready"])
def test_a_target_that_is_lost_and_comes_back(folder: Path, phase: str) -> None:
    """With policy stop: what was acknowledged and not flushed is copied again (rule 39), on what
    is the same file here."""
    is_first = phase == "first copy"
    if is_first:
        script: list[Script] = [
            [fault("target", "write", "hold")],
            start(on_target_error="stop"),
            [held("target", "write"), KILL_TARGET],
            [heal("target", "write"), error_event("write", "stop"), status("paused"), query()],
        ]
    else:
        script = [
            start(on_target_error="stop"),
            [ready(), KILL_TARGET, write()],
            [error_event("write", "stop"), status("standby"), query()],
        ]

    def goes_on(side: Side) -> bool:
        job = side.qmp.job()
        if job["paused"]:
            side.qmp.execute("job-resume", id="j")
        return bool(job["ready"] and not job["paused"] and job["len"] == job["offset"])

    def resume(side: Side) -> None:
        with untold(side, events=True):
            wait_until(lambda: goes_on(side), "the job goes on")

    script += [[RESTART_TARGET, call("resume, as often as it takes", resume), IN_SYNC], completed()]
    assert_alike(folder, faulty("target"), script, RECONNECT)


@pytest.mark.rule(40)
def test_a_target_that_is_lost_within_the_reconnect_delay(folder: Path) -> None:
    """No event at all, and the guest notices nothing."""
    script: list[Script] = [
        [add(reconnect_delay=20), mirror(), ready(), KILL_TARGET, write(), query(progress=False)],
        [RESTART_TARGET, IN_SYNC, write(65536 * 3, 4096), IN_SYNC],
        completed(),
    ]
    assert_alike(folder, faulty("target"), script)


NOTICED_AT_ONCE = Difference(
    "a lost connection is noticed at once",
    "QEMU learns of it from its next request; nbdmirror's job fails when the connection does, "
    "before the guest's write counts",
    PROGRESS.rewrite,
)


def test_a_target_that_is_lost_for_good(folder: Path) -> None:
    script: list[Script] = [
        start(),
        [ready(), KILL_TARGET, write(), event("BLOCK_JOB_ERROR", action="report")],
        [status("concluded"), query(), images(target=False), dismiss()],
        [do("blockdev-del", node_name="tgt"), RESTART_TARGET, add(), mirror(), ready()],
        completed(),
    ]
    assert_alike(folder, faulty("target"), script, NOTICED_AT_ONCE)


@pytest.mark.rule(21)
def test_what_fits_again_after_enospc_is_copied(folder: Path) -> None:
    """Iotest 248: a full target that has room again."""
    script: list[Script] = [
        start(on_target_error="enospc", buf_size=64 * KiB),
        [ready(), fault("target", "write", "ENOSPC")],
        [write(offset) for offset in range(0, MiB, 256 * KiB)],
        [error_event("write", "stop"), status("standby")],
        [heal("target", "write"), RESUME, IN_SYNC],
        completed(),
    ]
    assert_alike(folder, faulty("target"), script, ONE_ERROR_A_STOP)


# While a lost target is waited for

WAITED_FOR = [
    # Less than a step may take: a request of QEMU's that meets the lost connection only after the
    # cancel is not given up by that, but waits for as long.
    [add(reconnect_delay=15), mirror(), ready(), KILL_TARGET, write()],
    [until(lambda job: job["len"] > job["offset"], "the write counts")],
]

GIVEN_UP = Difference(
    "a forced cancel is no error of the target",
    "QEMU cancels the request that waits for the target, tells of it and shows it in the query; "
    "nbdmirror has none in flight",
    lambda lines: substituted('error="(Input/output error|Operation canceled)"', "error=X")(
        without('BLOCK_JOB_ERROR action="report"')(lines)
    ),
)


def _pause_at_once(lines: list[str]) -> list[str]:
    """Everything of the pause in its own step, in one order."""
    at = next(n for n, line in enumerate(lines) if line.startswith("-- block-job-pause"))
    told = [n for n in range(at, len(lines)) if 'status="standby"' in lines[n]][:1]
    kept = [line for n, line in enumerate(lines) if n not in told]
    return [*kept[: at + 1], *(lines[n] for n in told), *kept[at + 1 :]]


PAUSED_AT_ONCE = Difference(
    "a pause does not wait for the target",
    "QEMU is paused when the request that waits for the target has come back; nbdmirror has none",
    _pause_at_once,
)


@pytest.mark.parametrize("ending", ["force", "job-cancel"])
def test_a_cancel_while_a_lost_target_is_waited_for(folder: Path, ending: str) -> None:
    """Iotest 264 (how quickly is looked at in tests/faults); then all of it again."""
    cancel = {"force": FORCE_CANCEL, "job-cancel": do("job-cancel", id="j")}[ending]
    script: list[Script] = [
        [WAITED_FOR, cancel, status("concluded"), query(), dismiss()],
        [do("blockdev-del", node_name="tgt"), RESTART_TARGET, start(), ready()],
        completed(),
    ]
    assert_alike(folder, Setting(), script, GIVEN_UP, PROGRESS)


def test_a_pause_while_a_lost_target_is_waited_for(folder: Path) -> None:
    script: list[Script] = [
        [WAITED_FOR, do("block-job-pause", device="j"), RESTART_TARGET, status("standby")],
        [query(), RESUME, IN_SYNC, write(4096, 512), IN_SYNC],
        completed(),
    ]
    assert_alike(folder, Setting(), script, PAUSED_AT_ONCE, PROGRESS)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_while_a_lost_target_is_waited_for(folder: Path, ending: str) -> None:
    """It comes when the target is back."""
    script: list[Script] = [
        [WAITED_FOR, ENDINGS[ending], query(), RESTART_TARGET, status("concluded"), query()],
        [images(), swapped() if ending == "complete" else query(), dismiss()],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


@by_side
def test_an_error_of_a_limited_job(folder: Path, side: str) -> None:
    """The same is told; QEMU ends the job when its slice of time is over, nbdmirror at once."""
    operation = OPERATIONS[side]
    script: list[Script] = [
        [fault(side, operation, "EIO"), start(speed=64 * KiB, buf_size=64 * KiB)],
        [status("concluded"), query(), heal(side, operation), images(target=False), dismiss()],
    ]
    assert_alike(folder, faulty(side), script)
