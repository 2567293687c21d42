"""Transactions with completion-mode grouped: jobs that end together, all well or none."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_image, make_noise
from support.paritysides import Faulty
from support.qmpclient import Qmp
from support.serverprocess import Server
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

SIZE = 4 * MiB
JOBS = ("j0", "j1")
GROUPED = {"completion-mode": "grouped"}
ENDED_WELL = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
ENDED_BADLY = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


class Pair:
    """A server with two disks, each with a target and a guest. A target is qemu-nbd; `faulty`: the
    second one is a server whose requests can be made to fail or hang."""

    def __init__(self, start: Start, folder: Path, *, faulty: bool = False) -> None:
        self.disks = [make_image(folder / f"d{n}", SIZE, n) for n in range(2)]
        self.images = [make_noise(folder / f"t{n}", SIZE, n) for n in range(2)]
        self.targets: list[Server] = [start(QemuNbd(folder, self.images[0]))]
        self.faulty = Faulty(folder, self.images[1])
        self.targets.append(start(self.faulty if faulty else QemuNbd(folder, self.images[1])))
        names = [f"d{n}={disk}" for n, disk in enumerate(self.disks)]
        self.server = start(Nbdmirror(folder, *names, bare=True))
        self.qmp = self.server.qmp
        for n, target in enumerate(self.targets):
            self.qmp.add_target(f"t{n}", target)
        self.guests = [
            Guest(self.server.uri(f"d{n}"), disk, seed=n) for n, disk in enumerate(self.disks)
        ]

    def begin(self, *options: dict[str, Any]) -> None:
        """Both jobs; `options` of each, where it has some."""
        actions = [
            {
                "type": "blockdev-mirror",
                "data": {"job-id": job, "device": f"d{n}", "target": f"t{n}", "sync": "full"},
            }
            for n, job in enumerate(JOBS)
        ]
        for action, more in zip(actions, options, strict=False):
            action["data"] |= more  # type: ignore[operator]
        self.qmp.forget()
        self.qmp.execute("transaction", actions=actions, properties=GROUPED)

    def wait_ready(self) -> None:
        for job in JOBS:
            wait_until(partial(self._is_ready, job), f"{job} is ready")

    def _is_ready(self, job: str) -> bool:
        return bool(self.qmp.job(job)["ready"])

    def end_in_order(self, *jobs: str) -> None:
        """Complete them one after the other; all but the last one wait."""
        for job in jobs[:-1]:
            self.qmp.execute("block-job-complete", device=job)
            self.qmp.wait_status("waiting", job)
        self.qmp.execute("block-job-complete", device=jobs[-1])

    def wait_gone(self) -> None:
        wait_until(lambda: not self.qmp.execute("query-jobs"), "both have ended")

    def steps(self, job: str) -> list[str]:
        return [step for step in self.qmp.steps(job) if step != "return"]

    def served(self) -> list[str]:
        status = self.qmp.execute("x-nbdmirror-query-status")
        return [disk["source"] for disk in status["disks"]]

    def assert_on_sources(self, identical: Identical) -> None:
        """Nothing was pivoted; the guests go on, and their disks hold what they wrote."""
        assert self.served() == [str(disk) for disk in self.disks]
        for guest, disk in zip(self.guests, self.disks, strict=True):
            guest.wait_for_requests(20)
            identical(guest, disk)

    def assert_on_targets(self, identical: Identical) -> None:
        assert self.served() == [target.uri() for target in self.targets]
        for guest, image in zip(self.guests, self.images, strict=True):
            guest.wait_for_requests(20)
            identical(guest, image)


def tail(steps: list[str], expected: list[str]) -> None:
    assert steps[-len(expected) :] == expected, steps


@pytest.mark.parametrize("order", [JOBS, JOBS[::-1]], ids="-".join)
@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_both_complete_and_pivot_together(
    start: Start, identical: Identical, folder: Path, mode: str, order: tuple[str, str]
) -> None:
    pair = Pair(start, folder)
    with pair.guests[0], pair.guests[1]:
        pair.begin({"copy-mode": mode}, {"copy-mode": mode})
        pair.wait_ready()
        first, _ = order
        pair.qmp.execute("block-job-complete", device=first)
        pair.qmp.wait_status("waiting", first)
        for guest in pair.guests:  # none is held
            guest.wait_for_requests(100)
        assert pair.qmp.job(first)["status"] == "waiting"
        assert pair.served() == [str(disk) for disk in pair.disks]
        for verb in ("pause", "complete"):
            assert "waiting" in pair.qmp.refusal(f"block-job-{verb}", device=first)
        pair.end_in_order(order[1])
        pair.wait_gone()
        for job in JOBS:
            tail(pair.steps(job), ENDED_WELL)
        told = [(e["event"], e["data"].get("status")) for e in pair.qmp.events]
        pivots = [n for n, (name, _) in enumerate(told) if name == "X_NBDMIRROR_PIVOTED"]
        pending = [n for n, (_, status) in enumerate(told) if status == "pending"]
        assert len(pivots) == len(pending) == 2
        assert max(pending) < min(pivots)
        pair.assert_on_targets(identical)


def test_without_guests_sources_and_targets_are_equal(start: Start, folder: Path) -> None:
    pair = Pair(start, folder)
    pair.begin()
    pair.wait_ready()
    pair.end_in_order("j1", "j0")
    pair.wait_gone()
    for disk, image in zip(pair.disks, pair.images, strict=True):
        assert_identical(disk, image)


def test_finalize_of_one_ends_both(start: Start, identical: Identical, folder: Path) -> None:
    """One with auto-finalize false holds both in PENDING; who finalizes any of them ends them all,
    and has heard all of it when the answer comes."""
    pair = Pair(start, folder)
    with pair.guests[0], pair.guests[1]:
        pair.begin({"auto-finalize": False})
        pair.wait_ready()
        pair.end_in_order("j0", "j1")
        pair.qmp.wait_status("pending", "j0")
        for guest in pair.guests:
            guest.wait_for_requests(100)
        assert [pair.qmp.job(job)["status"] for job in JOBS] == ["pending", "pending"]
        pair.qmp.execute("job-finalize", id="j1")
        for job in JOBS:
            wanted = [step for step in ENDED_WELL if step != "waiting"]
            if job == "j0":
                wanted.insert(1, "BLOCK_JOB_PENDING")
            tail(pair.steps(job), wanted)
        assert "BLOCK_JOB_PENDING" not in pair.steps("j1")
        pair.assert_on_targets(identical)


@pytest.mark.parametrize("phase", ["running", "ready", "waiting"])
def test_one_that_fails_takes_the_other_along(
    start: Start, identical: Identical, folder: Path, phase: str
) -> None:
    pair = Pair(start, folder, faulty=True)
    with pair.guests[0], pair.guests[1]:
        if phase == "running":
            pair.faulty.set("write", "hold")
        pair.begin({}, {"on-target-error": "report"})
        if phase == "running":
            pair.qmp.wait_ready("j0")
        else:
            pair.wait_ready()
        if phase == "waiting":
            pair.qmp.execute("block-job-complete", device="j0")
            pair.qmp.wait_status("waiting", "j0")
        pair.faulty.set("write", "EIO")
        pair.wait_gone()
        tail(pair.steps("j0"), ENDED_BADLY)
        tail(pair.steps("j1"), ["aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"])
        ends = [e["data"] for e in pair.qmp.events if e["event"] == "BLOCK_JOB_COMPLETED"]
        assert [(e["device"], e["error"]) for e in ends] == [("j1", "Input/output error")]
        pair.assert_on_sources(identical)


def test_a_waiting_job_whose_target_fails(start: Start, identical: Identical, folder: Path) -> None:
    """It cannot be paused any more, so that `stop` is `report`."""
    pair = Pair(start, folder, faulty=True)
    with pair.guests[0], pair.guests[1]:
        pair.begin({}, {"on-target-error": "stop"})
        pair.wait_ready()
        pair.qmp.execute("block-job-complete", device="j1")
        pair.qmp.wait_status("waiting", "j1")
        pair.faulty.set("write", "ENOSPC")
        error = pair.qmp.wait_for_event("BLOCK_JOB_ERROR", device="j1")
        assert (error["operation"], error["action"]) == ("write", "report")
        pair.wait_gone()
        tail(pair.steps("j0"), ENDED_BADLY)
        pair.assert_on_sources(identical)


def test_a_target_that_is_killed(start: Start, identical: Identical, folder: Path) -> None:
    pair = Pair(start, folder)
    with pair.guests[0], pair.guests[1]:
        pair.begin({}, {"on-target-error": "report"})
        pair.wait_ready()
        pair.qmp.execute("block-job-complete", device="j0")
        pair.targets[1].kill()
        pair.wait_gone()
        tail(pair.steps("j0"), ENDED_BADLY)
        pair.assert_on_sources(identical)


def test_a_target_of_another_size(start: Start, identical: Identical, folder: Path) -> None:
    pair = Pair(start, folder)
    pair.server.allowed = ["the source has .* the target"]
    odd = start(QemuNbd(folder, make_noise(folder / "odd", SIZE - MiB)))
    pair.qmp.add_target("odd", odd)
    with pair.guests[0], pair.guests[1]:
        pair.begin({}, {"target": "odd"})
        pair.wait_gone()
        tail(pair.steps("j0"), ENDED_BADLY)
        pair.assert_on_sources(identical)


@pytest.mark.parametrize(
    ("phase", "command", "arguments"),
    [
        ("running", "job-cancel", {"id": "j1"}),
        ("running", "block-job-cancel", {"device": "j1"}),
        ("ready", "job-cancel", {"id": "j1"}),
        ("standby", "block-job-cancel", {"device": "j1", "force": True}),
        ("waiting", "job-cancel", {"id": "j0"}),
        ("waiting", "block-job-cancel", {"device": "j0"}),
        ("waiting", "job-cancel", {"id": "j1"}),
        ("pending", "job-cancel", {"id": "j1"}),
    ],
)
def test_cancelling_one_cancels_both(
    start: Start,
    identical: Identical,
    folder: Path,
    phase: str,
    command: str,
    arguments: dict[str, Any],
) -> None:
    pair = Pair(start, folder)
    with pair.guests[0], pair.guests[1]:
        slow = {"speed": 65536} if phase == "running" else {}
        pair.begin({}, {"auto-finalize": phase != "pending", **slow})
        if phase == "running":
            pair.qmp.wait_ready("j0")
        else:
            pair.wait_ready()
        if phase == "standby":
            pair.qmp.execute("job-pause", id="j1")
            pair.qmp.wait_status("standby", "j1")
        elif phase == "waiting":
            pair.qmp.execute("block-job-complete", device="j0")
            pair.qmp.wait_status("waiting", "j0")
        elif phase == "pending":
            pair.end_in_order(*JOBS)
            pair.qmp.wait_for_event("BLOCK_JOB_PENDING", id="j1")
        pair.qmp.execute(command, **arguments)
        if phase == "pending" or (phase, arguments.get("id")) == ("waiting", "j0"):
            assert pair.steps("j0")[-1] == pair.steps("j1")[-1] == "null"  # before the answer
        pair.wait_gone()
        for job in JOBS:
            tail(pair.steps(job), ENDED_BADLY)
        pair.assert_on_sources(identical)


def test_a_soft_cancel_keeps_its_own_copy_alone(start: Start, folder: Path) -> None:
    pair = Pair(start, folder)
    pair.begin()
    pair.wait_ready()
    pair.qmp.execute("block-job-cancel", device="j1")
    pair.wait_gone()
    tail(pair.steps("j0"), ENDED_BADLY)
    tail(pair.steps("j1"), ENDED_WELL)
    assert pair.served() == [str(disk) for disk in pair.disks]
    assert_identical(pair.disks[1], pair.images[1])


def test_soft_cancels_in_one_transaction_keep_both_copies(start: Start, folder: Path) -> None:
    pair = Pair(start, folder)
    with pair.guests[0], pair.guests[1]:
        pair.begin()
        pair.wait_ready()
        for guest in pair.guests:
            guest.wait_for_requests(50)
    cancels = [{"type": "block-job-cancel", "data": {"device": job}} for job in JOBS]
    pair.qmp.execute("transaction", actions=cancels)
    pair.wait_gone()
    for job in JOBS:
        tail(pair.steps(job), ENDED_WELL)
    assert pair.served() == [str(disk) for disk in pair.disks]
    for disk, image in zip(pair.disks, pair.images, strict=True):
        assert_identical(disk, image)


@pytest.mark.alone
def test_a_target_that_hangs_at_the_end_holds_no_other_guest_for_long(
    start: Start, identical: Identical, folder: Path
) -> None:
    """j0 gets level and holds its guest for j1, whose target does not answer: once, and in vain. It
    holds it again when j1 has got level."""
    pair = Pair(start, folder, faulty=True)
    with pair.guests[0], pair.guests[1]:
        pair.begin({"auto-finalize": False})
        pair.wait_ready()
        pair.end_in_order(*JOBS)
        pair.qmp.wait_status("pending", "j0")
        pair.faulty.set("flush", "hold")
        pair.guests[1].wait_for_requests(50)  # so that there is something to flush
        with Qmp(pair.server.qmp_path) as other:
            finalize = threading.Thread(
                target=other.execute, args=("job-finalize",), kwargs={"id": "j0"}
            )
            finalize.start()
            pair.qmp.wait_for_event("X_NBDMIRROR_QUIESCE_TIMEOUT", device="j0")
            for guest in pair.guests:
                guest.wait_for_requests(500)
            pair.qmp.execute("query-jobs")
            timeouts = [e for e in pair.qmp.events if e["event"] == "X_NBDMIRROR_QUIESCE_TIMEOUT"]
            assert [e["data"]["device"] for e in timeouts].count("j0") == 1
            pair.faulty.heal("flush")
            finalize.join(20)
            assert not finalize.is_alive()
        pair.wait_gone()
        pair.assert_on_targets(identical)
    assert pair.guests[0].longest_s < 3


def test_an_error_at_the_end_is_tried_again_under_ignore(
    start: Start, identical: Identical, folder: Path
) -> None:
    pair = Pair(start, folder, faulty=True)
    with pair.guests[0], pair.guests[1]:
        pair.begin({"auto-finalize": False}, {"on-target-error": "ignore"})
        pair.wait_ready()
        pair.end_in_order(*JOBS)
        pair.qmp.wait_status("pending", "j0")
        pair.faulty.set("flush", "EIO", times=2)
        pair.guests[1].wait_for_requests(50)  # so that there is something to flush
        pair.qmp.execute("job-finalize", id="j0")
        pair.assert_on_targets(identical)
    assert "BLOCK_JOB_ERROR" in pair.steps("j1")


def test_what_is_refused(start: Start, folder: Path) -> None:
    """Actions that start no job cannot be grouped; a refused action takes the others back."""
    pair = Pair(start, folder)
    mirror = {"device": "d0", "target": "t0", "sync": "full", "job-id": "j0"}
    first = {"type": "blockdev-mirror", "data": mirror}
    for name, data in {
        "job-complete": {"id": "j0"},
        "block-job-complete": {"device": "j0"},
        "block-job-cancel": {"device": "j0"},
        "block-dirty-bitmap-add": {"node": "d0", "name": "b"},
        "abort": {},
    }.items():
        actions = [first, {"type": name, "data": data}]
        text = f"Action '{name}' does not support transaction property completion-mode = grouped"
        assert pair.qmp.refusal("transaction", actions=actions, properties=GROUPED) == text
    assert pair.steps("j0") == []
    second = {"type": "blockdev-mirror", "data": {**mirror, "device": "d1", "target": "t1"}}
    text = pair.qmp.refusal("transaction", actions=[first, second], properties=GROUPED)
    assert text == "Job ID 'j0' already in use"
    tail(pair.steps("j0"), ["created", "aborting", "concluded", "null"])
    assert pair.qmp.execute("query-jobs") == []
    pair.begin()
    pair.wait_ready()
    pair.end_in_order(*JOBS)
    pair.wait_gone()
    for disk, image in zip(pair.disks, pair.images, strict=True):
        assert_identical(disk, image)


def test_the_server_ends_with_a_group(start: Start, identical: Identical, folder: Path) -> None:
    pair = Pair(start, folder)
    with pair.guests[0], pair.guests[1]:
        pair.begin()
        pair.wait_ready()
        pair.qmp.execute("block-job-complete", device="j0")
        pair.qmp.wait_status("waiting", "j0")
    pair.qmp.execute("quit")
    for job in JOBS:
        tail(pair.steps(job), ENDED_BADLY)
    for guest, disk in zip(pair.guests, pair.disks, strict=True):
        identical(guest, disk)
