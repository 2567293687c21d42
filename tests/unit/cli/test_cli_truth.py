"""What a command says at its end is what the server says then: which side is served, whether the
job is paused, whether it goes on, how the last one ended. Its exit status tells the same."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from support.fakes import URI, Fake
from unit.cli.cliparts import WAIT_S_MAX, Main, one_line

from nbdmirror.cli import common
from nbdmirror.cli import control as cli_control
from nbdmirror.errors import CommandError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_control, "PAUSE_S_MAX", 0.1)
    monkeypatch.setattr(cli_control, "RESUME_S_MAX", 0.1)


@pytest.fixture
def ready(fake: Fake) -> dict[str, Any]:
    """A job that is ready, and does nothing by itself."""
    fake.plan["stuck"] = True
    fake.add_job("j", offset=400, ready=True, status="ready")
    return fake.jobs["j"]


# Which side is served


@pytest.mark.guarantee("What a command says at its end is so")
def test_cancel_of_a_job_that_pivots_before_it_hears(
    fake: Fake, run: Main, ready: dict[str, Any]
) -> None:
    """Somebody's complete was first: the event of the end is the same, the side is not."""

    def cancel(arguments: dict[str, Any]) -> Any:
        fake.pivot("j")
        fake.end("j", "BLOCK_JOB_COMPLETED")
        return {}

    fake.do_block_job_cancel = cancel  # type: ignore[method-assign]
    status, out, err = run("cancel")
    assert (status, out) == (common.FAILED, "")
    assert "had already been completed" in one_line(err)
    assert f"disk disk0 is served from {URI}" in err
    assert "a.img" not in err


def test_cancel_of_a_job_that_is_completing(fake: Fake, run: Main, ready: dict[str, Any]) -> None:
    """A soft cancel would change nothing, so none is sent."""
    ready["ending"] = "complete"
    status, _, err = run("cancel")
    assert (status, "cancel --force" in one_line(err)) == (common.FAILED, True)
    assert not [name for name, _ in fake.calls if "cancel" in name]
    status, out, _ = run("cancel", "--force")
    assert (status, "disk disk0 is served from a.img" in out) == (common.DONE, True)


def test_complete_that_somebody_cancels(fake: Fake, run: Main, ready: dict[str, Any]) -> None:
    def complete(arguments: dict[str, Any]) -> Any:
        fake.end("j", "BLOCK_JOB_COMPLETED")
        return {}

    fake.do_job_complete = complete  # type: ignore[method-assign]
    status, out, err = run("complete")
    assert (status, out) == (common.FAILED, "")
    assert "cancelled by another client" in one_line(err)
    assert "disk disk0 is served from a.img" in err


def test_another_disks_pivot_is_not_this_ones(fake: Fake, run: Main, ready: dict[str, Any]) -> None:
    def cancel(arguments: dict[str, Any]) -> Any:
        fake.ring.append("X_NBDMIRROR_PIVOTED", {"device": "b", "id": "b", "pause-ms": 1.0})
        fake.end("j", "BLOCK_JOB_COMPLETED")
        return {}

    fake.do_block_job_cancel = cancel  # type: ignore[method-assign]
    status, out, _ = run("cancel")
    assert status == common.DONE
    assert out == f"job j ended; {URI} is a consistent copy; disk disk0 is served from a.img\n"


def test_what_happens_to_another_disk_of_the_jobs_name(
    fake: Fake, run: Main, ready: dict[str, Any]
) -> None:
    """A job's ID may be the name of another disk, or that of another disk's earlier job."""

    def cancel(arguments: dict[str, Any]) -> Any:
        sizes = {"size": 1, "target-size": 2}
        fake.ring.append("X_NBDMIRROR_SIZES_DIFFER", {"device": "j", "id": "other", **sizes})
        fake.end("j", "BLOCK_JOB_COMPLETED")
        return {}

    def status(arguments: dict[str, Any]) -> Any:
        found = query(arguments)
        earlier = {"id": "j", "result": "failed", "reason": "long ago", "ended-at-s": 1.0}
        found["disks"].append({"name": "other", "source": "b.img", "last-job": earlier})
        return found

    query = fake.do_x_nbdmirror_query_status
    fake.do_x_nbdmirror_query_status = status  # type: ignore[method-assign]
    fake.do_block_job_cancel = cancel  # type: ignore[method-assign]
    status_, out, _ = run("cancel")
    assert status_ == common.DONE
    assert out == f"job j ended; {URI} is a consistent copy; disk disk0 is served from a.img\n"


# Commands that stop waiting


@pytest.mark.parametrize("ending", ["complete", "cancel"])
def test_what_was_asked_for_goes_on_when_time_runs_out(
    fake: Fake, run: Main, ready: dict[str, Any], ending: str
) -> None:
    def end(arguments: dict[str, Any]) -> Any:
        ready.update({"ending": ending, "ending-for-s": 2.0})
        return {}

    fake.do_job_complete = fake.do_block_job_cancel = end  # type: ignore[method-assign]
    status, _, err = run(ending, "--timeout", "1")
    last = err.splitlines()[-1]
    assert status == common.TIMED_OUT
    assert (
        "completing for 0:02" if ending == "complete" else "being cancelled without --force"
    ) in last
    assert last.endswith("stop that with: nbdmirror cancel --force")


def test_an_interrupt_says_that_the_job_will_pivot(fake: Fake, ready: dict[str, Any]) -> None:
    def complete(arguments: dict[str, Any]) -> Any:
        ready.update({"ending": "complete", "ending-for-s": 7.0})
        return {}

    fake.do_job_complete = complete  # type: ignore[method-assign]
    process = subprocess.Popen(
        [sys.executable, "-m", "nbdmirror", "complete"],
        env={**os.environ, "NBDMIRROR_QMP": fake.path},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    while "completing" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S_MAX)
    assert process.returncode == common.INTERRUPTED
    assert "interrupted; job j: ready" in err.splitlines()[-1]
    assert "the job will pivot as soon as possible" in err.splitlines()[-1]


# Pauses


def test_a_pause_that_takes_its_time(fake: Fake, run: Main) -> None:
    fake.plan |= {"stuck": True, "slow to pause": True}
    fake.add_job("j")
    status, out, err = run("pause")
    assert (status, out) == (common.TIMED_OUT, "")
    assert "not yet: job j: pausing" in one_line(err)


def test_a_second_pause_waits_for_the_first(fake: Fake, run: Main) -> None:
    """To the server it is paused already, as soon as it is to be."""
    fake.plan["stuck"] = True
    fake.add_job("j", paused=True)
    assert run("pause")[0] == common.TIMED_OUT
    fake.jobs["j"]["status"] = "paused"
    fake.calls.clear()

    def refuse(arguments: dict[str, Any]) -> Any:
        raise CommandError("Job is already paused")

    fake.do_job_pause = refuse  # type: ignore[method-assign]
    status, _, err = run("pause")
    assert (status, "already paused" in one_line(err)) == (common.FAILED, True)


def test_a_pause_that_the_job_does_not_live_to_see(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")

    def pause(arguments: dict[str, Any]) -> Any:
        fake.end("j", "BLOCK_JOB_COMPLETED", error="Input/output error")
        return {}

    fake.do_job_pause = pause  # type: ignore[method-assign]
    status, out, err = run("pause")
    assert (status, out) == (common.FAILED, "")
    assert f"job j failed: {URI}: Input/output error" in one_line(err)


@pytest.mark.guarantee("What a command says at its end is so")
@pytest.mark.parametrize(
    ("plan", "status", "text"),
    [
        ({}, common.DONE, "job j continues: running"),
        ({"stops again": True}, common.FAILED, "has stopped again: no route to the target"),
        ({"silent": True}, common.TIMED_OUT, "nothing was copied yet: job j: running"),
    ],
)
def test_resume(fake: Fake, run: Main, plan: dict[str, Any], status: int, text: str) -> None:
    fake.plan |= {"stuck": True, **plan}
    error = {"operation": "write", "action": "stop", "reason": "no route to the target"}
    fake.add_job("j", status="paused", paused=True, **{"last-error": error})
    found, out, err = run("resume")
    assert (found, text in out + err) == (status, True)


def test_resume_of_a_job_that_is_to_complete(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j", status="standby", paused=True, ready=True, ending="complete")

    def resume(arguments: dict[str, Any]) -> Any:
        fake.pivot("j")
        fake.end("j", "BLOCK_JOB_COMPLETED")
        return {}

    fake.do_job_resume = resume  # type: ignore[method-assign]
    status, out, _ = run("resume")
    assert (status, f"served from {URI}" in out) == (common.DONE, True)


@pytest.mark.parametrize(
    ("rate", "text"), [("0", "copies without a limit"), ("10M", "copies 10 MiB/s at most")]
)
def test_set_speed_says_which(fake: Fake, run: Main, rate: str, text: str) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")
    assert run("set-speed", rate)[:2] == (common.DONE, f"job j {text} from now on\n")


def test_copy_mode(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")
    _, out, _ = run("copy-mode", "write-blocking")
    assert "write-blocking (not actively synced); nbdmirror status shows when it is" in out
    fake.jobs["j"]["actively-synced"] = True
    assert "copy mode write-blocking (actively synced)\n" in run("copy-mode", "write-blocking")[1]
    assert run("copy-mode", "background")[:2] == (common.DONE, "job j: copy mode background\n")


# How the last job ended, though nobody waited


@pytest.mark.guarantee("How a job ended is known afterwards")
@pytest.mark.parametrize("until", ["--ready", "--concluded"])
@pytest.mark.parametrize("which", [[], ["--job", "j"], ["--device", "disk0"]])
@pytest.mark.parametrize(
    ("ending", "status", "text"),
    [
        ("fails", common.FAILED, f"failed: {URI}: No space left on device"),
        ("is cancelled", common.FAILED, "was cancelled (cancelled by force)"),
        (
            "pivots",
            common.DONE,
            f"for 3.2 ms; disk disk0 is served from {URI}",
        ),
        (
            "ends",
            common.DONE,
            f"ended; {URI} is a consistent copy; disk disk0 is served from a.img",
        ),
    ],
)
def test_wait_for_a_job_that_ended_long_ago(
    fake: Fake, run: Main, ending: str, status: int, text: str, which: list[str], until: str
) -> None:
    fake.add_job("j")
    if ending == "pivots":
        fake.pivot("j")
    event = "BLOCK_JOB_CANCELLED" if ending == "is cancelled" else "BLOCK_JOB_COMPLETED"
    fake.end("j", event, **({"error": "No space left on device"} if ending == "fails" else {}))
    found, out, err = run("wait", until, *which)
    assert (found, text in out + err) == (status, True), out + err
    if ending == "fails":
        for verb in (["complete"], ["cancel"], ["pause"]):
            found, _, err = run(*verb, *which)
            assert (found, "the last job j: failed" in one_line(err)) == (common.FAILED, True)
            assert "No space left on device" in err
        assert "last job j: failed" in run("status")[1]


# What is to be known while a command waits


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"target-silent-for-s": 7.0}, "the target has not answered for 0:07"),
        ({"target-lost-for-s": 5.0, "target-wait-left-s": 55.0}, "reconnecting for 0:55 more"),
        ({"target-lost-for-s": 5.0}, "reconnecting without a limit"),
        (
            {"target-lost-for-s": 5.0, "target-lost-reason": "came back changed"},
            "came back changed",
        ),
        ({"source-silent-for-s": 7.0}, "the source has not answered for 0:07"),
        ({"falling-behind": True, "copy-mode": "background"}, "copy-mode write-blocking"),
        ({"falling-behind": True, "speed": 1 << 20}, "nbdmirror set-speed"),
        ({"status": "pending"}, "nbdmirror finalize"),
        ({"status": "standby", "paused": True}, "nbdmirror resume"),
        (
            {"ending": "complete", "ending-for-s": 9.0, "quiesce-timeouts": 3},
            "held 3 times without success",
        ),
    ],
)
def test_a_hint_stands_where_one_is_stuck(
    fake: Fake, run: Main, ready: dict[str, Any], state: dict[str, Any], text: str
) -> None:
    """In status, and once with a command that waits."""
    ready.update({"falling-behind": False, **state})
    assert text in run("status")[1]
    status, _, err = run("wait", "--concluded", "--timeout", "1")
    assert status == common.TIMED_OUT
    *notes, last = err.splitlines()
    assert sum(text in line for line in notes) == 1
    assert text in last
    if "target" in text or "source" in text:
        assert "cancel --force" in last


def test_an_error_that_is_tried_again(fake: Fake, run: Main, ready: dict[str, Any]) -> None:
    """Policy ignore: the job looks as if it ran."""
    error = {"operation": "write", "action": "ignore", "reason": "no space", "ago-s": 2.0}
    ready["last-error"] = error
    assert "write error: no space; trying again" in run("status")[1]
    error["ago-s"] = 99.0
    assert "no space" not in run("status")[1]


def test_time_runs_out_before_the_target_answers(fake: Fake, run: Main, monkeypatch: Any) -> None:
    """The server may start the mirror yet; nobody says that it has, or has not."""
    dispatch = fake.dispatch

    async def slow(name: str, arguments: dict[str, Any]) -> Any:
        if name == "drive-mirror":
            await asyncio.sleep(5)
        return await dispatch(name, arguments)

    fake.server._dispatch = slow
    status, _, err = run("mirror", URI, "--wait", "ready", "--timeout", "1")
    assert status == common.TIMED_OUT
    assert "may still start" in one_line(err)


def test_a_short_silence_is_no_news(fake: Fake, run: Main, ready: dict[str, Any]) -> None:
    ready["target-silent-for-s"] = 2.0
    assert "not answered" not in run("status")[1]


def test_an_error_is_told_with_its_reason(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    error = {"operation": "write", "action": "stop", "reason": f"{URI}: connection lost"}
    fake.add_job("j", status="paused", paused=True, **{"last-error": error, "io-status": "failed"})
    line = f"I/O error (failed): {URI}: connection lost; try again with: nbdmirror resume"
    assert line in run("status")[1]


# Jobs that wait for somebody


def test_finalize_and_dismiss(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j", status="pending", paused=True)
    status, out, _ = run("finalize")
    assert (status, f"disk disk0 is served from {URI}" in out) == (common.DONE, True)
    fake.add_job("k", status="concluded", error="Input/output error")
    assert "nbdmirror dismiss" in run("status")[1]
    assert run("dismiss")[:2] == (common.DONE, "job k is dismissed\n")
    assert "no job" in one_line(run("dismiss")[2])
