"""The order of a mirror's events and states, as QEMU has it: a plain run, cancelled, paused, and
ended at any moment.

Every test names what must be identical at its end; the `identical` fixture compares it, byte by
byte, after the test, and fails a test that names nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from integration.mirror.mirrorparts import ENDED_CANCELLED, ENDED_WELL, READY, SIZE, SLOW, STARTED
from support.clients import connected
from support.fixtures import Identical
from support.guests import Guest
from support.images import KiB, MiB
from support.serverprocess import Server
from support.servers import Nbdmirror
from support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("identical")


def test_events_of_a_plain_run(identical: Identical, server: Nbdmirror, target: Server) -> None:
    identical(Path(server.disks[0]), target.uri())
    qmp = server.qmp
    qmp.add_target("tgt", target)
    qmp.forget()
    qmp.start_mirror("tgt", **SLOW)
    running = qmp.job()
    assert running["status"] == "running" and running["type"] == "mirror"
    assert running["len"] == SIZE and running["offset"] < SIZE
    assert (running["ready"], running["paused"], running["busy"]) == (False, False, True)
    assert (running["io-status"], running["speed"]) == ("ok", SLOW["speed"])
    assert (running["auto-finalize"], running["auto-dismiss"]) == (True, True)
    qmp.execute("block-job-set-speed", device="j", speed=0)
    told = qmp.wait_ready()
    assert told == {"device": "j", "len": SIZE, "offset": SIZE, "speed": 0, "type": "mirror"}
    ready = qmp.job()
    assert (ready["status"], ready["ready"], ready["busy"]) == ("ready", True, False)
    assert qmp.execute("query-jobs") == [
        {
            "id": "j",
            "type": "mirror",
            "status": "ready",
            "current-progress": SIZE,
            "total-progress": SIZE,
        }
    ]
    traffic = {"x-nbdmirror-sent-bytes": 0, "x-nbdmirror-changed-bytes": 0}
    assert qmp.complete() == {**told, **traffic, "x-nbdmirror-lag-s": 0}
    qmp.wait_status("null")
    assert qmp.execute("query-block-jobs") == []
    assert [step for step in qmp.steps("j") if step != "return"] == [
        *["created", "running"],
        *READY,
        *ENDED_WELL,
    ]
    steps = qmp.steps("j")
    assert steps[:3] == STARTED
    assert steps.index("waiting") - 1 == max(
        i for i, step in enumerate(steps[: steps.index("waiting")]) if step == "return"
    ), "the answer to complete goes first, then its events"


def test_events_without_automatic_finalize_and_dismiss(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        qmp.start_mirror(target.uri(), auto_finalize=False, auto_dismiss=False)
        qmp.wait_ready()
        qmp.forget()
        qmp.execute("block-job-complete", device="j")
        qmp.wait_for_event("BLOCK_JOB_PENDING")
        assert qmp.events[-1]["data"] == {"type": "mirror", "id": "j"}
        guest.wait_for_requests(50)  # written after PENDING, and still mirrored
        pending = qmp.job()
        assert (pending["status"], pending["ready"]) == ("pending", False)
        qmp.execute("block-job-finalize", id="j")
        assert qmp.job()["status"] == "concluded"
        assert "error" not in qmp.job()
        qmp.execute("block-job-dismiss", id="j")
        guest.wait_for_requests(50)
    assert qmp.execute("query-jobs") == []
    steps = qmp.steps("j")
    finalized = ["BLOCK_JOB_COMPLETED", "concluded", "return"]
    assert steps == [
        *["return", "waiting", "pending", "BLOCK_JOB_PENDING", "return"],
        *finalized,
        *["return", "return", "null", "return", "return"],
    ]


def test_cancel_in_pending_keeps_the_source(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, disk)
        qmp.start_mirror(target.uri(), auto_finalize=False, auto_dismiss=False)
        qmp.wait_ready()
        qmp.execute("block-job-complete", device="j")
        qmp.wait_for_event("BLOCK_JOB_PENDING")
        qmp.forget()
        qmp.execute("block-job-cancel", device="j")
        assert qmp.steps("j") == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "return"]
        assert qmp.job()["error"] == "Operation canceled"
        qmp.execute("job-dismiss", id="j")
        guest.wait_for_requests(50)


@pytest.mark.rule(17)
@pytest.mark.parametrize(
    "command", [("block-job-cancel", {}), ("block-job-cancel", {"force": True}), ("job-cancel", {})]
)
def test_cancel_before_ready(
    identical: Identical,
    server: Nbdmirror,
    target: Server,
    disk: Path,
    command: tuple[str, dict[str, Any]],
) -> None:
    """The target is undefined then; the source is what the guest has written."""
    verb, arguments = command
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, disk)
        identical(guest, server.uri())
        qmp.start_mirror(target.uri(), **SLOW)
        wait_until(lambda: qmp.job()["offset"] > 0, "it copies")
        qmp.forget()
        qmp.execute(verb, **{"id" if verb == "job-cancel" else "device": "j"}, **arguments)
        told = qmp.wait_for_event("BLOCK_JOB_CANCELLED")
        qmp.wait_status("null")
        assert set(told) == {"device", "len", "offset", "speed", "type"}
        assert qmp.steps("j") == ["return", *ENDED_CANCELLED]
        guest.wait_for_requests(50)


def test_soft_cancel_after_ready_leaves_a_copy(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    """It is a copy of a moment between the command and COMPLETED: the guest stands still then."""
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        qmp.start_mirror(target.uri())
        qmp.wait_ready()
        guest.wait_for_requests(100)
    identical(guest, target.uri())
    qmp.forget()
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()
    qmp.wait_status("null")
    assert qmp.steps("j") == ["return", *ENDED_WELL]
    with Guest(server.uri(), guest.model, seed=2) as later:
        identical(later, disk)
        later.wait_for_requests(50)


@pytest.mark.rule(17)
@pytest.mark.guarantee("Completed means identical")
def test_soft_cancel_while_a_guest_writes_is_a_copy_of_one_moment(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    """The guest counts: each request sets one more block of the row to one. At any moment the row
    is a run of ones, and so must the copy be."""
    qmp = server.qmp
    block, rows = 64 * KiB, SIZE // (64 * KiB)
    with connected(server.uri()) as guest:
        guest.zero(SIZE, 0)
        qmp.start_mirror(target.uri())
        qmp.wait_ready()
        for number in range(rows):
            guest.pwrite(b"\1" * block, number * block)
            if number == rows // 2:
                qmp.execute("block-job-cancel", device="j")
        qmp.wait_completed()
    identical(server.uri(), disk)
    with connected(target.uri()) as copy:
        first = [bytes(copy.pread(block, n * block)) for n in range(rows)]
    count = sum(any(data) for data in first)
    assert count >= rows // 2, "what was answered before the command is in the copy"
    identical(b"\1" * block * count + bytes((rows - count) * block), target.uri())


@pytest.mark.rule(17)
@pytest.mark.parametrize("verb", ["block-job-cancel", "job-cancel"])
def test_force_cancel_after_ready(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path, verb: str
) -> None:
    qmp = server.qmp
    force: dict[str, Any] = {"id": "j"}
    if verb == "block-job-cancel":
        force = {"device": "j", "force": True}
    with Guest(server.uri(), disk) as guest:
        identical(guest, disk)
        qmp.start_mirror(target.uri(), auto_dismiss=False)
        qmp.wait_ready()
        qmp.forget()
        qmp.execute(verb, **force)
        qmp.wait_for_event("BLOCK_JOB_CANCELLED")
        qmp.wait_status("concluded")
        assert qmp.steps("j") == ["return", *ENDED_CANCELLED[:-1]]
        assert qmp.job()["error"] == "Operation canceled"
        qmp.execute("block-job-dismiss", id="j")
        guest.wait_for_requests(50)


@pytest.mark.rule(22)
def test_pause_and_resume_before_ready(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        qmp.start_mirror(target.uri(), **SLOW)
        wait_until(lambda: qmp.job()["offset"] > 0, "it copies")
        qmp.execute("block-job-pause", device="j")
        wait_until(lambda: qmp.job()["status"] == "paused", "it is paused")
        assert qmp.refusal("block-job-pause", device="j") == "Job is already paused"
        refused = qmp.refusal("block-job-complete", device="j")
        assert refused == "Job 'j' in state 'paused' cannot accept command verb 'complete'"
        offset = qmp.job()["offset"]
        guest.wait_for_requests(100)
        paused = qmp.job()
        assert paused["offset"] == offset, "a paused job lets nothing fly"
        assert (paused["paused"], paused["busy"]) == (True, False)
        qmp.execute("block-job-set-speed", device="j", speed=0)
        assert qmp.job()["offset"] == offset, "set-speed does not resume"
        qmp.execute("block-job-resume", device="j")
        qmp.wait_ready()
        assert qmp.refusal("block-job-resume", device="j").startswith("Can't resume a job")
        qmp.complete()
        guest.wait_for_requests(50)
    statuses = [step for step in qmp.steps("j") if step in ("running", "paused", "ready")]
    assert statuses == ["running", "paused", "running", "ready"]


@pytest.mark.rule(14)
def test_pause_after_ready_is_standby(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        qmp.start_mirror(target.uri())
        qmp.wait_ready()
        qmp.execute("job-pause", id="j")
        wait_until(lambda: qmp.job()["status"] == "standby", "it stands by")
        offset = qmp.job()["offset"]
        guest.wait_for_requests(100)
        standby = qmp.job()
        assert standby["offset"] == offset
        assert (standby["ready"], standby["paused"]) == (True, True)
        soft = qmp.refusal("block-job-cancel", device="j")
        assert soft == "The block job for device 'j' is currently paused"
        qmp.execute("job-resume", id="j")
        wait_until(lambda: qmp.job()["status"] == "ready", "it is ready again")
        qmp.complete()
        guest.wait_for_requests(50)
    assert qmp.steps("j").count("BLOCK_JOB_READY") == 1


@pytest.mark.rule(46)
def test_complete_in_standby_is_done_after_resume(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        qmp.start_mirror(target.uri())
        qmp.wait_ready()
        qmp.execute("block-job-pause", device="j")
        wait_until(lambda: qmp.job()["status"] == "standby", "it stands by")
        qmp.forget()
        qmp.execute("block-job-complete", device="j")
        guest.wait_for_requests(30)
        assert qmp.job()["status"] == "standby"
        qmp.execute("block-job-resume", device="j")
        qmp.wait_status("null")
        guest.wait_for_requests(30)
    assert qmp.steps("j") == ["return", "return", "ready", "return", *ENDED_WELL]


def test_force_cancel_of_a_paused_job(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    identical(server.uri(), disk)
    qmp = server.qmp
    qmp.start_mirror(target.uri(), **SLOW)
    qmp.execute("block-job-pause", device="j")
    wait_until(lambda: qmp.job()["status"] == "paused", "it is paused")
    qmp.forget()
    qmp.execute("job-cancel", id="j")
    qmp.wait_status("null")
    assert qmp.steps("j") == ["running", "return", *ENDED_CANCELLED]


@pytest.mark.alone
@pytest.mark.rule(38)
def test_speed_is_kept_and_changed_at_once(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    identical(disk, target.uri())
    qmp = server.qmp
    began_s = time.monotonic()
    qmp.start_mirror(target.uri(), speed=2 * MiB, buf_size=64 * KiB)
    wait_until(lambda: qmp.job()["offset"] >= 1 * MiB, "the first MiB")
    took_s = time.monotonic() - began_s
    assert took_s > 0.25, "a MiB at 2 MiB/s takes half a second"
    offset, now_s = qmp.job()["offset"], time.monotonic() - began_s
    assert offset <= (now_s + 0.3) * 2 * MiB
    began_s = time.monotonic()
    qmp.execute("block-job-set-speed", device="j", speed=0)
    qmp.wait_ready()
    assert time.monotonic() - began_s < 2.5, "the rest of 11 MiB does not wait for the old speed"
    qmp.complete()


@pytest.mark.rule(16, 46)
def test_complete_before_ready_is_refused_and_changes_nothing(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    identical(disk, target.uri())
    qmp.start_mirror(target.uri(), **SLOW)
    refused = qmp.refusal("block-job-complete", device="j")
    assert refused == "Job 'j' in state 'running' cannot accept command verb 'complete'"
    qmp.execute("block-job-set-speed", device="j", speed=0)
    qmp.wait_ready()
    assert qmp.job()["status"] == "ready", "the refused command is not remembered"
    qmp.complete()
