"""Points of two disks of one guest, on real servers: whatever is killed, both images are recovered
to one moment, which the guest's own log knows (twodisks.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.points.twodisks import NAMES, TwoDisks
from support.fixtures import Start
from support.images import assert_identical
from support.processes import nbdmirror
from support.waiting import wait_until


@pytest.mark.guarantee("Disks of one group have one moment")
@pytest.mark.parametrize("keep_s", [0, 3600], ids=["last point", "history"])
@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit, one thread"])
def test_both_disks_are_recovered_to_one_moment(
    start: Start, folder: Path, kind: str, keep_s: int
) -> None:
    """Also after restarts of the server, which continues the points of both."""
    two = TwoDisks(start, folder, kind=kind)
    two.begin({"x-nbdmirror-keep": keep_s})
    before = 0
    for number in range(2):
        two.start_guest()
        two.guest.wait_for(200)
        two.wait_for_moments(1)
        two.kill()
        found = two.guest.check(two.recover())
        assert found > before, f"nothing of round {number} is there"
        two.guest.check([disk.read_bytes() for disk in two.disks])
        before = found
        for one in two.far_servers():
            one.start()
        two.server.restart()
        two.wait_ready()


def test_a_far_side_that_is_killed_is_not_behind_for_good(start: Start, folder: Path) -> None:
    """The other disk's points go on meanwhile, and there is still a moment of both."""
    two = TwoDisks(start, folder)
    two.begin()
    two.start_guest()
    two.wait_for_moments(2)
    far = two.fars[1]
    for one in (far.journal_server, far.image_server):
        one.kill()
    count = len(two.groups(two.fars[0]))
    wait_until(lambda: len(two.groups(two.fars[0])) >= count + 5, "points of the other disk")
    assert two.groups(two.fars[0])[-1] == 0
    two.guest.check(two.recover())
    for one in (far.journal_server, far.image_server):
        one.start()
    two.wait_for_moments(2)
    two.kill()
    two.guest.check(two.recover())


def test_a_point_that_is_asked_for_is_of_both_disks(start: Start, folder: Path) -> None:
    two = TwoDisks(start, folder)
    two.begin({"x-nbdmirror-keep": 3600})
    two.start_guest()
    two.guest.wait_for(50)
    two.guest.stop()
    disks = [disk.read_bytes() for disk in two.disks]
    asked = ("point", "--qmp", two.server.qmp_path, "--job", "vdb", "--name", "nightly", "--wait")
    done = nbdmirror(*asked)
    assert done.returncode == 0, done.stderr
    again = nbdmirror(*asked)
    assert "The journal of job 'vdb' has a point 'nightly' already" in again.stderr
    two.start_guest()
    two.guest.wait_for(50)
    two.wait_for_moments(1)
    two.kill()
    for image, disk in zip(two.recover("--point", "nightly"), disks, strict=True):
        assert_identical(disk, image)


def test_jobs_of_other_intervals_are_no_group(start: Start, folder: Path) -> None:
    two = TwoDisks(start, folder)
    actions = two.actions({"x-nbdmirror-interval": 1}, {"x-nbdmirror-interval": 2})
    refusal = two.server.qmp.refusal(
        "transaction", actions=actions, properties={"completion-mode": "grouped"}
    )
    text = "Parameter 'x-nbdmirror-interval' expects 1, as job 'vda' of its group has"
    assert refusal == text
    assert two.server.qmp.execute("query-jobs") == []
    two.server.qmp.execute("transaction", actions=actions)
    two.wait_ready()
    two.start_guest()
    two.guest.wait_for(50)
    two.guest.stop()
    for job in NAMES:
        two.server.qmp.execute("block-job-cancel", device=job)
    wait_until(lambda: not two.server.qmp.execute("query-jobs"), "both have ended")
    for far, disk in zip(two.fars, two.disks, strict=True):
        assert not any(two.groups(far))
        assert_identical(disk.read_bytes(), far.image.read_bytes())


def test_one_export_by_two_names_is_refused(start: Start, folder: Path) -> None:
    two = TwoDisks(start, folder, kind="nbdkit, one thread")
    two.begin()
    two.start_guest()
    two.wait_for_moments(1)
    two.server.kill()
    two.guest.stop()
    one, other = two.fars
    argv = ["--image", one.image_server.uri(), "--journal", one.journal_server.uri()]
    twice = ["--image", other.image_server.uri(), "--journal", str(one.journal)]
    done = nbdmirror("recover", "--group", *argv, *twice)
    assert done.returncode == 1 and "is the same disk as" in done.stderr, done.stderr
    argv += ["--image", other.image_server.uri(), "--journal", other.journal_server.uri()]
    done = nbdmirror("recover", "--group", *argv)
    assert done.returncode == 0, done.stderr
    two.guest.check([far.image.read_bytes() for far in two.fars])
