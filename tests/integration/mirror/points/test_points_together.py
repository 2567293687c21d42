"""Several disks of one guest whose points are of the same moments, by the command line alone: one
`nbdmirror mirror` starts them, one `complete` or `cancel` ends them. What is refused changes
nothing."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import SIZE
from integration.mirror.points.twodisks import INTERVAL_S, NAMES, TwoDisks
from support.fixtures import Start
from support.images import assert_identical, make_image
from support.processes import Finished, nbdmirror
from support.servers import QemuNbd
from support.waiting import wait_until

from nbdmirror.cli.common import DONE, FAILED, TIMED_OUT, USAGE
from nbdmirror.points.format import RING_START


class Together(TwoDisks):
    """The same by the command line."""

    def cli(self, *argv: str) -> Finished:
        done = nbdmirror(*argv, "--qmp", self.server.qmp_path)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def targets(self) -> list[str]:
        named = zip(NAMES, self.fars, strict=True)
        return [f"{name}={far.image_server.uri()}" for name, far in named]

    def journals(self) -> list[str]:
        named = zip(NAMES, self.fars, strict=True)
        return [f"{name}={far.journal_server.uri()}" for name, far in named]

    def mirror(self, *more: str) -> Finished:
        journals = [word for journal in self.journals() for word in ("--journal", journal)]
        every = ("--every", f"{INTERVAL_S}")
        return self.cli("mirror", *self.targets(), *journals, *every, *more)

    def begun(self, *more: str) -> Together:
        done = self.mirror("--wait", "ready", *more)
        assert done.returncode == DONE, done.stderr
        ready = "job {} is ready: the far side has a point"
        assert sorted(done.stdout.splitlines()) == [ready.format(name) for name in NAMES]
        return self

    def devices(self) -> list[str]:
        return [word for name in NAMES for word in ("--device", name)]

    def check_nothing_has_happened(self) -> None:
        assert self.server.qmp.execute("query-jobs") == []
        nodes = self.server.qmp.execute("query-named-block-nodes")
        assert sorted(node["node-name"] for node in nodes) == [*NAMES]

    def check_numbers_are_told(self) -> None:
        """The last point's, by queries and events; as the journals have it."""

        def last() -> set[int]:
            """Of the journals, if both have the same, and it is told; empty if not yet."""
            found = {self.groups(far)[-1] for far in self.fars if self.groups(far)}
            status = json.loads(self.cli("status", "--json").stdout)
            jobs = [job for disk in status["disks"] for job in disk["jobs"]]
            told = {job["x-nbdmirror-points"]["group"] for job in jobs}
            return found if len(found) == 1 and told == found else set()

        found = wait_until(last, "the last point of both is told")
        self.server.qmp.execute("query-version")  # reads the events before its answer
        events = [e["data"] for e in self.server.qmp.events if e["event"] == "X_NBDMIRROR_POINT"]
        (number,) = found
        assert sorted(e["id"] for e in events if e.get("group") == number) == [*NAMES]

    def check_images_are_the_disks(self) -> None:
        for far, disk in zip(self.fars, self.disks, strict=True):
            assert_identical(disk, far.image)


@pytest.fixture
def two(start: Start, folder: Path) -> Together:
    return Together(start, folder)


@pytest.mark.guarantee("Disks of one group have one moment")
def test_one_command_starts_points_of_the_same_moments(two: Together) -> None:
    two.server.qmp.execute("query-version")  # hears events from now on
    two.start_guest()
    two.begun()
    two.wait_for_moments(2)
    two.guest.wait_for(100)
    two.guest.stop()
    two.check_numbers_are_told()
    two.kill()
    assert two.guest.check(two.recover())
    for one in two.far_servers():
        one.start()
    two.server.restart()
    two.start_guest()
    two.wait_for_moments(2)  # they belong together after a restart too
    two.kill()
    assert two.guest.check(two.recover())


def test_journals_are_named_in_any_order_or_follow_the_targets(two: Together) -> None:
    """And each may stand behind its target."""
    (one, other), (first, second) = two.targets(), two.journals()
    plain = [journal.partition("=")[2] for journal in (first, second)]
    ways = [
        [one, "--journal", plain[0], other, "--journal", plain[1], "--every", "0.2"],
        ["--every", "0.2", other, one, "--journal", first, "--journal", second],
    ]
    for number, way in enumerate(ways):
        done = two.cli("mirror", *way, "--wait", "ready")
        assert done.returncode == DONE, done.stderr
        assert two.cli("point").returncode == FAILED  # which of the jobs is not said
        done = two.cli("point", "--device", NAMES[number], "--wait")
        assert done.returncode == DONE, done.stderr
        assert two.groups(two.fars[0])[-1] == two.groups(two.fars[1])[-1] != 0
        done = two.cli("cancel", *two.devices())
        assert done.returncode == DONE, done.stderr
        two.check_images_are_the_disks()
        for far in two.fars:
            with far.journal.open("r+b") as file:
                file.write(bytes(RING_START))
        if not number:
            two.disks[0].write_bytes(make_image(two.folder / "new", SIZE, 7).read_bytes())


def test_without_wait_each_job_has_a_line(two: Together) -> None:
    done = two.mirror("--speed", "64K")
    assert done.returncode == DONE
    outages = sorted(done.stderr.splitlines())
    lines = sorted(done.stdout.splitlines())
    for line, outage, name, far in zip(lines, outages, NAMES, two.fars, strict=True):
        assert outage.startswith(f"the journal of job {name}: it has room for an outage")
        uri = far.image_server.uri()
        assert line.startswith(f"job {name} mirrors {name} to {uri}: running")
    # The first copy takes minutes.
    late = two.cli("wait", "--ready", *two.devices(), "--timeout", "3")
    assert late.returncode == TIMED_OUT
    last = late.stderr.splitlines()[-1]
    assert all(f"job {name}: running" in last for name in NAMES)
    done = two.cli("cancel", "--force", *two.devices())
    assert done.returncode == DONE, done.stderr
    assert two.server.qmp.execute("query-jobs") == []


@pytest.mark.parametrize("way", ["mirror", "complete"])
def test_all_are_completed_by_one_command(two: Together, way: str) -> None:
    """They pivot together, or not at all."""
    if way == "mirror":
        done = two.mirror("--wait", "completed")
    else:
        two.begun()
        done = two.cli("complete", *two.devices())
    assert done.returncode == DONE, done.stderr
    assert [f"job {name} completed" in done.stdout for name in NAMES] == [True, True]
    status = json.loads(two.cli("status", "--json").stdout)
    served = [disk["source"] for disk in status["disks"]]
    assert served == [far.image_server.uri() for far in two.fars]
    two.check_images_are_the_disks()
    said = two.cli("wait", "--concluded", *two.devices())
    assert (said.returncode, said.stdout.count(" completed")) == (DONE, 2)


def test_all_are_cancelled_by_one_command(two: Together) -> None:
    two.begun()
    two.start_guest()
    two.guest.wait_for(50)
    two.guest.stop()
    done = two.cli("cancel", "--job", NAMES[1], "--job", NAMES[0])
    assert done.returncode == DONE, done.stderr
    assert done.stdout.count("is a consistent copy") == 2
    two.check_images_are_the_disks()


def test_one_that_is_not_ready_completes_none(two: Together) -> None:
    two.begun()
    two.cli("pause", "--device", NAMES[1])
    refused = two.cli("complete", *two.devices(), "--job", "x")
    assert refused.returncode == USAGE
    refused = two.cli("complete", "--device", NAMES[0], "--device", "vdx")
    assert (refused.returncode, refused.stdout) == (FAILED, "")
    assert "there is no disk vdx" in refused.stderr
    assert {job["status"] for job in two.server.qmp.execute("query-jobs")} == {"ready", "standby"}


def test_a_far_side_that_fails_ends_all_and_each_is_told(two: Together) -> None:
    two.begun()
    two.start_guest()
    two.guest.wait_for(20)
    for server in (two.fars[1].image_server, two.fars[1].journal_server):
        server.kill()
    said = two.cli("wait", "--concluded", *two.devices())
    assert (said.returncode, said.stdout) == (FAILED, "")
    assert "job vdb failed: " in said.stderr and "connection lost" in said.stderr
    assert "job vda was cancelled (job vdb of its group did not complete)" in said.stderr
    two.guest.wait_for(20)
    two.guest.stop()


def sockets(two: Together) -> int:
    """That the server has open."""
    folder, found = Path(f"/proc/{two.server.pid}/fd"), 0
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):
            found += os.readlink(folder / name).startswith("socket:")
    return found


def refused(two: Together, targets: list[str], journals: list[str], text: str) -> Finished:
    """With that text; and nothing has changed: no job, no connection, and nothing written."""
    before, contents = sockets(two), [far.image.read_bytes() for far in two.fars]
    argv = [*targets, *(word for journal in journals for word in ("--journal", journal))]
    done = two.cli("mirror", *argv)
    assert (done.returncode in (FAILED, USAGE), done.stdout) == (True, ""), text
    assert text in done.stderr
    wait_until(lambda: sockets(two) <= before, "all connections are closed")
    two.check_nothing_has_happened()
    assert contents == [far.image.read_bytes() for far in two.fars]
    return done


def test_what_one_disk_is_refused_is_refused_for_all(
    start: Start, two: Together, folder: Path
) -> None:
    (target, other), (journal, second) = two.targets(), two.journals()
    small, large, link = folder / "small", folder / "large", folder / "link"
    small.write_bytes(bytes(RING_START))
    large.write_bytes(bytes(2 * SIZE))
    link.symlink_to(two.fars[0].image_server.socket)
    uri = start(QemuNbd(folder, small)).uri()
    refused(two, [target, other], [journal, f"vdb={uri}"], f"Journal {uri}: is too small")
    unknown = [one.replace("vdb=", "vdx=") for one in (other, second)]
    refused(two, [target, unknown[0]], [journal, unknown[1]], "there is no disk vdx")
    uri = f"nbd+unix:///?socket={folder}/nobody"
    refused(two, [target, f"vdb={uri}"], [journal, second], f"Failed to connect to '{uri}'")
    uri = f"nbd+unix:///?socket={link}"
    refused(two, [target, other], [journal, f"vdb={uri}"], f"{uri}: is the same export as")
    uri = start(QemuNbd(folder, large)).uri()
    text = f"the disk has {SIZE} bytes, the target {2 * SIZE}"
    done = refused(two, [target, f"vdb={uri}"], [journal, second], text)
    assert "job vda was cancelled (job vdb of its group did not complete)" in done.stderr
    two.begun()  # the right ones are as good as before
    assert two.cli("cancel", "--force", *two.devices()).returncode == DONE
    for far in two.fars:
        with far.journal.open("r+b") as file:
            file.write(bytes(RING_START) if far is two.fars[0] else b"something")
    text = f"Journal {two.fars[1].journal_server.uri()}: is not empty"
    refused(two, [target, other], [journal, second], text)


def test_one_journal_has_the_points_of_one_disk(two: Together) -> None:
    refused = two.cli("mirror", *two.targets(), "--journal", two.journals()[0])
    text = "--journal: each disk needs a journal of its own: 2 disks and 1 journal are given"
    assert (refused.returncode, refused.stderr) == (USAGE, f"nbdmirror: {text}\n")
    two.check_nothing_has_happened()


def test_a_group_of_one_transaction_has_jobs_of_both_kinds(two: Together) -> None:
    """The same over QMP: `drive-mirror` beside `blockdev-mirror`."""
    first, _ = two.actions()
    far = two.fars[1]
    data = {
        "device": "vdb",
        "sync": "full",
        "mode": "existing",
        "target": far.image_server.uri(),
        "copy-mode": "points",
        "x-nbdmirror-journal": far.journal_server.uri(),
        "x-nbdmirror-interval": INTERVAL_S,
    }
    second = {"type": "drive-mirror", "data": data}
    bad = {"type": "drive-mirror", "data": {**data, "x-nbdmirror-interval": 5}}
    how = {"completion-mode": "grouped"}
    text = two.server.qmp.refusal("transaction", actions=[first, bad], properties=how)
    assert "'x-nbdmirror-interval' expects 0.2, as job 'vda' of its group has" in text
    assert two.server.qmp.execute("query-jobs") == []
    two.server.qmp.execute("transaction", actions=[first, second], properties=how)
    two.wait_ready()
    two.start_guest()
    two.wait_for_moments(2)
    two.kill()
    assert two.guest.check(two.recover())
