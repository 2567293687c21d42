"""Commands that stop waiting: by a signal, because the server hangs, or because the job has ended
in another way. The last line is so, and comes within a bound."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes import URI, Fake
from support.waiting import wait_until
from unit.cli.cliparts import WAIT_S_MAX, Main, one_line
from unit.points.pointparts import FarSide

from nbdmirror.cli import common
from nbdmirror.cli import session as cli_session
from nbdmirror.points.appliers_block import EXPORT_BYTES_MIN

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def stuck(fake: Fake) -> Fake:
    fake.plan["stuck"] = True
    fake.add_job("j", offset=400, ready=True, status="ready")
    return fake


def started(*argv: str, qmp: str = "", ignored: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    """A command; `ignored`: signals that are ignored at its start."""

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    return subprocess.Popen(
        [sys.executable, "-m", "nbdmirror", *argv],
        env={**os.environ, "NBDMIRROR_QMP": qmp},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignore,  # noqa: PLW1509 - nothing else runs in the child
    )


def waiting(fake: Fake, *argv: str, ignored: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    """A command that waits for the job."""
    process = started(*argv, qmp=fake.path, ignored=ignored)
    assert process.stderr
    assert process.stderr.readline().startswith("j: ready")
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_that_ends_a_command(stuck: Fake, number: signal.Signals) -> None:
    """Ctrl-C, `timeout 10 nbdmirror wait`, and a terminal that is closed."""
    process = waiting(stuck, "wait", "--concluded")
    process.send_signal(number)
    _, err = process.communicate(timeout=WAIT_S_MAX)
    assert process.returncode == common.INTERRUPTED
    assert err.splitlines()[-1] == "nbdmirror: interrupted; job j: ready, 100.0%, 0 B left"


def test_what_was_ignored_at_the_start_stays_ignored(stuck: Fake) -> None:
    """A script's background and nohup."""
    process = waiting(stuck, "wait", "--concluded", ignored=(signal.SIGINT, signal.SIGHUP))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGHUP)
    stuck.pivot("j")
    stuck.end("j", "BLOCK_JOB_COMPLETED")
    out, _ = process.communicate(timeout=WAIT_S_MAX)
    assert (process.returncode, "job j completed" in out) == (common.DONE, True)


def test_what_an_applier_ignored_at_the_start_stays_ignored(tmp_path: Path, run: Main) -> None:
    """`nohup nbdmirror apply ... &` outlives its terminal."""
    far = FarSide(journal_bytes=EXPORT_BYTES_MIN)
    far.seed()
    places = {"--image": str(tmp_path / "image"), "--journal": str(tmp_path / "journal")}
    for device, path in zip((far.image, far.journal), places.values(), strict=True):
        Path(path).write_bytes(device.data)

    def said() -> dict[str, Any]:
        return dict(json.loads(run("points", places["--journal"], "--json")[1])["applier"])

    ignored = signal.SIGINT, signal.SIGHUP
    process = started("apply", *itertools.chain(*places.items()), ignored=ignored)
    assert process.stderr
    assert process.stderr.readline().startswith("applying points to")
    for number in ignored:
        process.send_signal(number)
    before = said()["time"]
    wait_until(lambda: said()["time"] > before, "it says something after the signals")
    assert said()["phase"] == "resting"
    process.terminate()
    process.communicate(timeout=WAIT_S_MAX)
    assert process.returncode == common.DONE
    assert said()["phase"] == "ended"


@pytest.fixture
def hung(stuck: Fake) -> Iterator[threading.Event]:
    """When this is set the server answers nothing any more."""
    hangs, is_over = threading.Event(), threading.Event()
    query = stuck.do_x_nbdmirror_query_status

    def answer(arguments: dict[str, Any]) -> Any:
        if hangs.is_set():
            is_over.wait(WAIT_S_MAX)
        return query(arguments)

    stuck.do_x_nbdmirror_query_status = answer  # type: ignore[method-assign]
    yield hangs
    is_over.set()


def test_an_interrupt_while_the_server_hangs(stuck: Fake, hung: threading.Event) -> None:
    process = waiting(stuck, "wait", "--concluded")
    hung.set()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S_MAX)
    assert process.returncode == common.INTERRUPTED
    assert "interrupted; the state of job j is not known; see: nbdmirror status" in one_line(err)


@pytest.mark.parametrize("argv", [["status"], ["complete", "--timeout", "1"]])
def test_a_server_that_does_not_even_greet(
    tmp_path: Path, run: Main, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    """It was stopped, or hangs: it is not missing, and must not be started a second time."""
    if argv == ["status"]:
        monkeypatch.setattr(cli_session, "CONNECT_S_MAX", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        status, out, err = run(*argv, "--qmp", str(tmp_path / "silent"))
    assert (status, out) == (common.TIMED_OUT, "")
    assert re.search("does not answer within (0.2|1) s: it hangs, or is stopped", one_line(err))
    assert "start one" not in err


def test_a_pause_of_a_job_that_completes(stuck: Fake, run: Main) -> None:
    """Somebody's complete was first: nothing is paused, so this is no success."""

    def pause(arguments: dict[str, Any]) -> Any:
        stuck.pivot("j")
        stuck.end("j", "BLOCK_JOB_COMPLETED")
        return {}

    stuck.do_job_pause = pause  # type: ignore[method-assign]
    status, out, err = run("pause")
    assert (status, out) == (common.FAILED, "")
    assert "job j completed" in one_line(err) and "it was not paused" in err
    assert f"disk disk0 is served from {URI}" in err


# An earlier job of the same name


EARLIER = {
    "id": "j",
    "target": "nbd://elsewhere",
    "result": "cancelled",
    "reason": "its deadline has passed",
    "pivoted": False,
    "ended-at-s": 1.6e9,
}


def test_an_earlier_jobs_end_is_not_this_ones(stuck: Fake, run: Main) -> None:
    """The server ends, and the mirror goes on when it is started again: no result is kept."""
    stuck.last = dict(EARLIER)

    query, queries = stuck.do_x_nbdmirror_query_status, 0

    def queried(arguments: dict[str, Any]) -> Any:
        nonlocal queries
        queries += "j" not in stuck.jobs
        if queries == 2:  # the command has heard the event, and asks once more for its last line
            threading.Thread(target=stuck.server.stop).start()
        return query(arguments)

    stuck.do_x_nbdmirror_query_status = queried  # type: ignore[method-assign]

    def cancel(arguments: dict[str, Any]) -> Any:
        del stuck.jobs["j"]
        stuck.ring.append("BLOCK_JOB_CANCELLED", {"device": "j", "len": 400, "offset": 400})
        return {}

    stuck.do_job_complete = cancel  # type: ignore[method-assign]
    status, _, err = run("complete")
    assert status == common.NO_SERVER
    assert "deadline" not in err
    assert "the server" in err.splitlines()[-1]


def test_a_job_that_was_replaced_meanwhile(stuck: Fake, run: Main) -> None:
    """Its own result is told, not that the new one runs."""
    stuck.last = dict(EARLIER)

    def complete(arguments: dict[str, Any]) -> Any:
        stuck.end("j", "BLOCK_JOB_COMPLETED", error="No space left on device")
        stuck.add_job("j")
        return {}

    stuck.do_job_complete = complete  # type: ignore[method-assign]
    status, _, err = run("complete")
    assert status == common.FAILED
    assert f"job j failed: {URI}: No space left on device" in err.splitlines()[-1]


def test_a_server_that_cannot_save_its_state(stuck: Fake, run: Main) -> None:
    """A pivot waits for its record: whoever waits for the pivot is told, once."""
    query = stuck.do_x_nbdmirror_query_status
    trouble = "the last write has not ended for 0:07"
    stuck.do_x_nbdmirror_query_status = (  # type: ignore[method-assign]
        lambda arguments: query(arguments) | {"state-error": trouble}
    )
    status, _, err = run("wait", "--concluded", "--timeout", "1")
    assert status == common.TIMED_OUT
    *notes, last = err.splitlines()
    text = f"the state directory cannot be written: {trouble}"
    assert sum(text in line for line in notes) == 1
    assert text in last


def test_an_answer_that_takes_long_does_not_hide_the_jobs_state(stuck: Fake, run: Main) -> None:
    """The journal hangs, and so does the command; the server answers everybody else."""
    text = "the target has not answered for 0:09"
    stuck.jobs["j"]["target-silent-for-s"] = 9.0
    dispatch = stuck.dispatch

    async def slow(name: str, arguments: dict[str, Any]) -> Any:
        if name == "x-nbdmirror-point":
            await asyncio.sleep(WAIT_S_MAX)
        return await dispatch(name, arguments)

    stuck.server._dispatch = slow
    status, _, err = run("point", "--wait", "--timeout", "1")
    assert (status, text in one_line(err)) == (common.TIMED_OUT, True)
