"""`nbdmirror apply` beside the image: the image follows the points, and the source sends each
change to the journal alone."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from integration.mirror.points.applierparts import Applier, applier_of, wait_to_follow
from integration.mirror.points.pointsparts import (
    INTERVAL_S,
    SERVERS,
    FarSide,
    points_of,
    recovered,
    wait_for_points,
    wait_for_rest,
    wait_until_points_continue,
)
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_image
from support.processes import nbdmirror
from support.servers import Nbdmirror
from support.waiting import wait_until

from nbdmirror.points.appliers_block import EXPORT_BYTES_MIN

RING_BYTES = 2 * EXPORT_BYTES_MIN


@pytest.fixture
def far(start: Start, folder: Path) -> FarSide:
    return FarSide(start, folder, ring=RING_BYTES)


def traffic(server: Nbdmirror) -> tuple[int, int]:
    """Bytes that were sent, and bytes that guests have changed."""
    (job,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
    return job["sent-bytes"], job["changed-bytes"]


def check_it_follows(
    applier: Applier, server: Nbdmirror, far: FarSide, disk: Path, identical: Identical
) -> None:
    """A guest's writes come to the image."""
    with Guest(server.uri(), disk) as guest:
        wait_to_follow(applier)
        guest.wait_for_requests(30)
    wait_for_rest(server)
    applier.stop()
    identical(guest, disk)
    identical(guest, far.image)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_guest_pivots_to_an_image_that_was_made_there(
    start: Start, identical: Identical, folder: Path, disk: Path, kind: str
) -> None:
    far = FarSide(start, folder, kind=kind, ring=RING_BYTES)
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    with Guest(server.uri(), disk, connections=2) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server)
        server.qmp.wait_ready()
        applier = start(applier_of(far, folder))
        wait_to_follow(applier)
        wait_for_points(server, 3)
        server.qmp.complete()
        guest.wait_for_requests(60)
    assert applier.wait_to_end() == 0
    assert re.search("the mirror has ended at .*: the image is in use", applier.stderr)


def test_each_change_is_sent_once(
    start: Start, identical: Identical, server: Nbdmirror, far: FarSide, folder: Path, disk: Path
) -> None:
    far.start_mirror(server)
    server.qmp.wait_ready()
    start(applier_of(far, folder))
    with connected(server.uri()) as guest:

        def is_asked() -> bool:
            guest.pwrite(os.urandom(4096), 0)
            return "applier-silent-s" in points_of(server)

        wait_until(is_asked, "the applier is asked")
        wait_for_rest(server)
        before = traffic(server)
        for number in range(8):
            guest.pwrite(os.urandom(MiB), number * MiB)
        wait_for_rest(server)
        after = traffic(server)
    sent, changed = (now - then for now, then in zip(after, before, strict=True))
    assert changed == 8 * MiB and changed <= sent <= 1.1 * changed
    identical(disk, far.image)


def test_an_applier_on_the_files_themselves(
    start: Start, identical: Identical, folder: Path, disk: Path
) -> None:
    """Which the source has by way of nbdkit."""
    far = FarSide(start, folder, kind="nbdkit", ring=RING_BYTES)
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    far.start_mirror(server)
    server.qmp.wait_ready()
    applier = start(Applier(folder, str(far.image), str(far.journal)))
    with Guest(server.uri(), disk) as guest:
        wait_to_follow(applier)
        guest.wait_for_requests(60)
    wait_for_rest(server)
    applier.stop()
    identical(guest, disk)
    identical(guest, far.image)


def test_an_applier_that_is_killed_and_one_that_ends(
    start: Start, identical: Identical, server: Nbdmirror, far: FarSide, folder: Path, disk: Path
) -> None:
    """At any moment what is there is a point. After a kill the source waits for another applier;
    after an end in order it applies points itself."""
    far.start_mirror(server)
    server.qmp.wait_ready()
    with Guest(server.uri(), disk) as guest:
        for applier in [applier_of(far, folder) for _ in range(3)]:
            wait_to_follow(start(applier))
            wait_for_points(server, 2)
            applier.kill()
            guest.wait_for_requests(30)
            server.qmp.execute("job-pause", id="j")  # so that copies are of one moment
            server.qmp.wait_for_event("JOB_STATUS_CHANGE", status="standby")
            recovered(far.image, far.journal)
            server.qmp.execute("job-resume", id="j")
        last = start(applier_of(far, folder))
        wait_to_follow(last)
        last.stop()
        guest.wait_for_requests(30)
    wait_for_rest(server)
    assert "applier-silent-s" not in points_of(server)
    identical(guest, disk)
    identical(guest, far.image)


def test_without_an_applier_that_was_asked_the_job_does_not_pivot(
    start: Start, identical: Identical, server: Nbdmirror, far: FarSide, folder: Path, disk: Path
) -> None:
    """And points go on. The next applier has all of them, and the job pivots."""
    far.start_mirror(server)
    server.qmp.wait_ready()
    applier = start(applier_of(far, folder))
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        wait_to_follow(applier)
        os.kill(applier.pid, signal.SIGSTOP)
        wait_until(lambda: points_of(server).get("applier-silent-s", 0) >= 6, "it is silent")
        refused = server.qmp.refusal("block-job-complete", device="j")
        assert "Job 'j': `nbdmirror apply` beside the image has said nothing for" in refused
        shown = nbdmirror("status", "--qmp", server.qmp_path).stdout
        assert "`nbdmirror apply` beside the image has said nothing for" in shown
        wait_for_points(server, 2)
        os.kill(applier.pid, signal.SIGCONT)
        guest.wait_for_requests(30)
        wait_until(lambda: points_of(server).get("applier-silent-s", 0) < 1, "it works again")
        server.qmp.complete()
        guest.wait_for_requests(30)
    assert applier.wait_to_end() == 0


def test_a_source_that_is_restarted_goes_on_with_the_applier(
    start: Start, identical: Identical, far: FarSide, folder: Path, disk: Path
) -> None:
    options = ("--state-dir", str(folder / "state"))
    server = start(Nbdmirror(disk.parent, disk, options=options))
    far.start_mirror(server)
    server.qmp.wait_ready()
    applier = start(applier_of(far, folder))
    with Guest(server.uri(), disk) as guest:
        wait_to_follow(applier)
        guest.wait_for_requests(60)
    server.kill()
    server.start()
    wait_until_points_continue(server)
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        guest.wait_for_requests(30)
        wait_for_points(server, 3)
        server.qmp.complete()
    assert applier.wait_to_end() == 0


def test_the_copy_mode_is_changed(
    start: Start, identical: Identical, server: Nbdmirror, far: FarSide, folder: Path, disk: Path
) -> None:
    """The image becomes the last point there, and is the source's from then on. An applier of the
    old journal has nothing more to do."""
    far.start_mirror(server)
    server.qmp.wait_ready()
    applier = start(applier_of(far, folder))
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        wait_to_follow(applier)
        wait_for_points(server, 2)
        server.qmp.execute("block-job-change", id="j", type="mirror", copy_mode="background")
        wait_until(lambda: "x-nbdmirror-points" not in server.qmp.job(), "there are no points")
        guest.wait_for_requests(30)
        server.qmp.complete()
        guest.wait_for_requests(30)
    applier.stop()


def test_a_recovery_beside_the_applier(
    start: Start, identical: Identical, server: Nbdmirror, far: FarSide, folder: Path, disk: Path
) -> None:
    """It writes nothing to the image after that, and says why it ends. So does the source."""
    far.start_mirror(server)
    server.qmp.wait_ready()
    applier = start(applier_of(far, folder))
    image, journal = far.image_server.uri(), far.journal_server.uri()
    with Guest(server.uri(), disk):
        wait_to_follow(applier)
        wait_for_points(server, 2)
        server.qmp.execute("job-pause", id="j")
        argv = ("recover", "--image", image, "--journal", journal)
        wait_until(lambda: nbdmirror(*argv).returncode == 0, "a recovery")
        found = far.image.read_bytes()
        assert applier.wait_to_end() == 0
        assert re.search("point [0-9]+ was recovered from this journal at", applier.stderr)
        server.qmp.execute("job-resume", id="j")
        ended = server.qmp.wait_for_event("BLOCK_JOB_COMPLETED")
    assert re.search("point [0-9]+ was recovered from this journal at", ended["error"])
    identical(found, image)
    again = nbdmirror("apply", "--image", image, "--journal", journal)
    assert again.returncode == 1 and "was recovered from this journal at" in again.stderr


def test_what_is_refused(
    start: Start, server: Nbdmirror, far: FarSide, folder: Path, disk: Path, identical: Identical
) -> None:
    far.start_mirror(server)
    server.qmp.wait_ready()
    applier = start(applier_of(far, folder))
    image, journal = far.image_server.uri(), far.journal_server.uri()
    second = nbdmirror("apply", "--image", image, "--journal", journal)
    assert second.returncode == 1
    assert "another `nbdmirror apply` is at work on this journal" in second.stderr
    swapped = nbdmirror("apply", "--image", journal, "--journal", image)
    assert swapped.returncode == 1 and "is not a journal" in swapped.stderr
    same = nbdmirror("apply", "--image", image, "--journal", image)
    assert same.returncode == 1 and "names the same disk" in same.stderr
    check_it_follows(applier, server, far, disk, identical)


@pytest.mark.parametrize("way", ["itself", "another server of it", "a mirror to it"])
def test_the_disk_itself_is_no_image(
    start: Start, server: Nbdmirror, far: FarSide, folder: Path, disk: Path, way: str
) -> None:
    """By any way that nbdmirrors know: old points would be written under the guest."""
    far.start_mirror(server)
    server.qmp.wait_ready()
    place = server.uri()
    if way == "another server of it":
        place = start(Nbdmirror(folder, server.uri())).uri()
    elif way == "a mirror to it":
        image = make_image(folder / "other.img", disk.stat().st_size)
        other = start(Nbdmirror(folder, image))
        other.qmp.start_mirror(server.uri())
        other.qmp.wait_ready()
        place = other.uri()
    before = disk.read_bytes()
    refused = nbdmirror("apply", "--image", place, "--journal", far.journal_server.uri())
    assert refused.returncode == 1 and "is the disk whose points that journal has" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert disk.read_bytes() == before


def test_the_file_of_the_disk_itself_is_no_image(
    server: Nbdmirror, far: FarSide, disk: Path
) -> None:
    far.start_mirror(server)
    server.qmp.wait_ready()
    refused = nbdmirror("apply", "--image", disk, "--journal", far.journal_server.uri())
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    assert "in use" in refused.stderr


def test_an_image_that_an_nbdmirror_serves(
    start: Start, server: Nbdmirror, far: FarSide, folder: Path, disk: Path, identical: Identical
) -> None:
    """It is asked, and says that it is another disk."""
    far_server = start(Nbdmirror(folder, far.image_server.uri()))
    points: dict[str, Any] = {"copy_mode": "points", "x_nbdmirror_interval": INTERVAL_S}
    journal = far.journal_server.uri()
    server.qmp.start_mirror(far_server.uri(), x_nbdmirror_journal=journal, **points)
    server.qmp.wait_ready()
    applier = start(Applier(folder, far_server.uri(), journal))
    check_it_follows(applier, server, far, disk, identical)


def test_a_journal_without_a_place(
    start: Start, folder: Path, disk: Path, identical: Identical
) -> None:
    """A small one, or one of an earlier version: the source applies the points."""
    far = FarSide(start, folder, ring=16 * MiB)
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    far.start_mirror(server)
    server.qmp.wait_ready()
    refused = nbdmirror(
        "apply", "--image", far.image_server.uri(), "--journal", far.journal_server.uri()
    )
    assert refused.returncode == 1 and "has no place for an applier" in refused.stderr
    with Guest(server.uri(), disk) as guest:
        guest.wait_for_requests(30)
    wait_for_rest(server)
    identical(guest, disk)
    identical(guest, far.image)


@pytest.mark.parametrize("is_at_rest", [True, False], ids=["at rest", "busy"])
def test_another_image_is_not_written_to(
    start: Start,
    identical: Identical,
    server: Nbdmirror,
    far: FarSide,
    folder: Path,
    disk: Path,
    is_at_rest: bool,
) -> None:
    """Also if no point has written anything yet, or all have changed the same blocks."""
    far.start_mirror(server)
    server.qmp.wait_ready()
    with connected(server.uri()) as guest:

        def write() -> None:
            guest.pwrite(os.urandom(4096), 8 * MiB)

        if not is_at_rest:
            write()
            wait_for_rest(server)
        other = folder / "other"
        other.write_bytes(bytes(far.image.stat().st_size))
        applier = start(Applier(folder, str(other), far.journal_server.uri()))

        def has_ended() -> bool:
            write()
            assert applier.process is not None
            return applier.process.poll() is not None

        wait_until(has_ended, "the applier ends")
    assert applier.wait_to_end() == 1
    assert "it is another disk's, or was written to" in applier.stderr
    assert not any(other.read_bytes())
    wait_for_rest(server)
    identical(disk, far.image)


def test_an_export_that_has_shrunk(
    server: Nbdmirror, far: FarSide, folder: Path, disk: Path, identical: Identical
) -> None:
    far.start_mirror(server)
    server.qmp.wait_ready()
    small = folder / "small"
    small.write_bytes(far.journal.read_bytes()[: RING_BYTES // 2])
    done = nbdmirror("apply", "--image", far.image_server.uri(), "--journal", str(small))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the export is smaller than its journal" in done.stderr
    wait_for_rest(server)
    identical(disk, far.image)
