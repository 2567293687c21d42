"""Mirrors with points from end to end: a guest writes all the while, and what the far side has at
the end is compared with what the disk had."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from integration.mirror.points.pointsparts import (
    RING_BYTES,
    SERVERS,
    SIZE,
    FarSide,
    last_point,
    left_bytes,
    wait_for_points,
    wait_for_rest,
)
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import KiB, MiB, assert_identical
from support.processes import nbdmirror
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.points.format import RING_BYTES_MIN


@pytest.mark.parametrize("kind", SERVERS)
def test_a_guest_pivots_to_the_image(
    start: Start, identical: Identical, folder: Path, disk: Path, kind: str
) -> None:
    far = FarSide(start, folder, kind=kind, ring=RING_BYTES)
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    with Guest(server.uri(), disk, connections=2) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server)
        server.qmp.wait_ready()
        wait_for_points(server, 3)
        server.qmp.complete()
        guest.wait_for_requests(60)
    listed = nbdmirror("points", far.journal_server.uri(), "--json")
    assert '"state": "promoted"' in listed.stdout, "no older point can be had from now on"


def test_a_cancelled_mirror_leaves_its_last_point_in_the_image(
    identical: Identical, server: Nbdmirror, far: FarSide, disk: Path
) -> None:
    with Guest(server.uri(), disk) as guest:
        far.start_mirror(server)
        server.qmp.wait_ready()
        guest.wait_for_requests(60)
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    far.stop()
    copy = far.image.read_bytes()
    identical(guest, disk)
    identical(guest, copy)
    identical(copy, far.recover())


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_server_leaves_a_moment_of_the_disk(
    start: Start, server: Nbdmirror, far: FarSide, disk: Path, seed: int
) -> None:
    """Blocks get one number after the other: so one number says what each block must hold."""
    block, count = 64 * KiB, SIZE // (64 * KiB)
    before = disk.read_bytes()
    answered: list[float] = []
    far.start_mirror(server)
    with connected(server.uri()) as guest:
        end_s = None
        while end_s is None or time.time() < end_s:
            number = len(answered)
            data = number.to_bytes(8, "little") * (block // 8)
            guest.pwrite(data, number % count * block)
            answered.append(time.time())
            points = [e for e in server.qmp.events if e["event"] == "X_NBDMIRROR_POINT"]
            server.qmp.execute("query-status")  # hears the events
            if end_s is None and len(points) > 3:
                end_s = time.time() + 0.05 * seed
        server.kill()
    newest = points[-1]["data"]
    far.stop()
    found = far.recover()
    last = max(
        (int.from_bytes(found[at : at + 8], "little") for at in range(0, SIZE, block)
         if found[at : at + block] == found[at : at + 8] * (block // 8)
         and int.from_bytes(found[at : at + 8], "little") < len(answered)),
        default=-1,
    )  # fmt: skip
    expected = bytearray(before)
    for number in range(max(0, last + 1 - count), last + 1):
        at = number % count * block
        expected[at : at + block] = number.to_bytes(8, "little") * (block // 8)
    assert_identical(bytes(expected), found)
    promised = sum(at_s < newest["time-s"] - 0.001 for at_s in answered)
    assert last + 1 >= promised, "a write that the announced point has is missing"


def test_pause_and_a_forced_end(
    server: Nbdmirror, far: FarSide, disk: Path, identical: Identical
) -> None:
    """After the last point nothing was written in place: the far side has that point."""
    with Guest(server.uri(), disk) as guest:
        far.start_mirror(server)
        server.qmp.wait_ready()
        server.qmp.execute("job-pause", id="j")
        server.qmp.wait_for_event("JOB_STATUS_CHANGE", status="standby")
        paused = last_point(server)
        guest.wait_for_requests(30)
        assert last_point(server) == paused
        server.qmp.execute("job-resume", id="j")
        wait_for_points(server, 2)
    wait_until(lambda: left_bytes(server) == 0, "a point has everything")
    server.qmp.execute("job-cancel", id="j")
    server.qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    far.stop()
    identical(guest, disk)
    assert_identical(bytes(guest.model), far.recover())


@pytest.mark.parametrize("end", ["cancel", "server"])
def test_a_far_side_that_hangs_holds_nobody(
    server: Nbdmirror, far: FarSide, disk: Path, identical: Identical, end: str
) -> None:
    """Neither guests nor a forced end, and it still has its last point. Guests come afterwards, so
    there is no other point before it hangs."""
    far.start_mirror(server)
    server.qmp.wait_ready()
    os.kill(far.journal_server.pid, signal.SIGSTOP)
    with Guest(server.uri(), disk) as guest:
        try:
            guest.wait_for_requests(100)
            if end == "cancel":
                server.qmp.execute("job-cancel", id="j")
                server.qmp.wait_for_event("BLOCK_JOB_CANCELLED")
        finally:
            if end == "cancel":
                os.kill(far.journal_server.pid, signal.SIGCONT)
        guest.wait_for_requests(30)
    assert guest.longest_s < 5.0
    identical(guest, disk)
    if end == "server":
        server.stop()
        os.kill(far.journal_server.pid, signal.SIGCONT)
    far.stop()
    assert "; 1 point" in nbdmirror("points", str(far.journal)).stdout
    far.recover()


def test_a_broken_promise_is_reported_and_its_end(
    server: Nbdmirror, far: FarSide, disk: Path, identical: Identical
) -> None:
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server, x_nbdmirror_rpo=5)
        server.qmp.wait_ready()
        os.kill(far.journal_server.pid, signal.SIGSTOP)
        try:
            broken = server.qmp.wait_for_event("X_NBDMIRROR_RPO")
            shown = nbdmirror("status", "--qmp", server.qmp_path).stdout
        finally:
            os.kill(far.journal_server.pid, signal.SIGCONT)
        assert (broken["kept"], broken["rpo-s"]) == (False, 5) and broken["lag-s"] > 5
        assert "is larger than the 5 s of --rpo; check the far side" in shown
        kept = server.qmp.wait_for_event("X_NBDMIRROR_RPO")
        assert kept["kept"] and kept["lag-s"] <= 5
        server.qmp.complete()


def test_a_full_journal_stops_the_job_and_keeps_its_points(
    start: Start, folder: Path, disk: Path, identical: Identical
) -> None:
    far = FarSide(start, folder, ring=RING_BYTES_MIN)
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    far.start_mirror(server, x_nbdmirror_interval=1)
    server.qmp.wait_ready()
    before = disk.read_bytes()
    with connected(server.uri()) as guest:
        guest.pwrite(b"x" * 2 * MiB, 0)
    error = server.qmp.wait_for_event("BLOCK_JOB_ERROR")
    assert error == {"device": "j", "operation": "write", "action": "stop"}
    server.qmp.wait_for_event("JOB_STATUS_CHANGE", status="standby")
    (job,) = server.qmp.execute("query-block-jobs")
    assert job["io-status"] == "nospace"
    (status,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
    assert "does not fit" in status["last-error"]["reason"]
    server.qmp.execute("job-cancel", id="j")
    far.stop()
    identical(before, far.recover())


def test_with_the_command_line(
    identical: Identical, server: Nbdmirror, far: FarSide, disk: Path
) -> None:
    control = ("--qmp", server.qmp_path)
    image, journal = far.image_server.uri(), far.journal_server.uri()
    with Guest(server.uri(), disk) as guest:
        identical(guest, image)
        argv = ("mirror", image, "--journal", journal, "--every", "100ms", "--wait", "ready")
        done = nbdmirror(*argv, *control)
        assert done.returncode == 0, done.stderr
        guest.wait_for_requests(30)
        shown = nbdmirror("status", *control).stdout
        assert " points, " in shown and "lag " in shown and "point " in shown
        refused = nbdmirror("change", "--max-pause", "5", *control)
        assert refused.returncode == 1
        assert "Copy mode 'points' accepts no --max-pause" in refused.stderr
        done = nbdmirror("complete", *control)
        assert done.returncode == 0, done.stderr
        guest.wait_for_requests(30)


def test_what_is_refused(start: Start, server: Nbdmirror, far: FarSide, folder: Path) -> None:
    """With one line, and neither image nor journal is touched."""
    files = {}
    for name, content in (
        ("small", bytes(MiB)),
        ("full", b"x" * 2 * MiB),
        ("fixed", bytes(2 * MiB)),
    ):
        (folder / name).mkdir()
        files[name] = folder / name / "file"
        files[name].write_bytes(content)
    uris = {
        name: start(QemuNbd(folder / name, path, read_only=name == "fixed")).uri()
        for name, path in files.items()
    }
    image, journal = far.image_server.uri(), far.journal_server.uri()
    before = [path.read_bytes() for path in (far.image, far.journal, *files.values())]
    mode = {"copy_mode": "points"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "Copy mode 'points' needs 'x-nbdmirror-journal'"),
        (
            {"x_nbdmirror_journal": uris["small"]},
            r"Journal nbd\+unix:.* is too small: it has 1048576",
        ),
        ({"x_nbdmirror_journal": uris["full"]}, r"Journal nbd\+unix:.* is not empty: it holds"),
        ({"x_nbdmirror_journal": uris["fixed"]}, r"Journal 'nbd\+unix:.*' is read-only"),
        ({"x_nbdmirror_journal": image}, "Journal .* is "),
        ({"x_nbdmirror_journal": server.uri()}, "Journal"),
        ({"x_nbdmirror_journal": "nbd+unix:///?socket=/nowhere"}, "Journal: .*/nowhere"),
        ({"x_nbdmirror_journal": "nowhere"}, "Journal: "),
        ({"x_nbdmirror_journal": journal, "sync": "none"}, "Copy mode 'points' needs sync 'full'"),
        (
            {"x_nbdmirror_journal": journal, "x_nbdmirror_max_pause": 9},
            "Copy mode 'points' accepts no 'x-nbdmirror-max-pause'",
        ),
        (
            {"x_nbdmirror_journal": journal, "x_nbdmirror_may": ["write-blocking"]},
            "Copy mode 'points' accepts no 'x-nbdmirror-may'",
        ),
        ({"x_nbdmirror_journal": journal, "x_nbdmirror_interval": 0}, "expects 0.1 to 86400"),
        ({"x_nbdmirror_journal": journal, "copy_mode": "background"}, "needs copy-mode 'points'"),
        ({"x_nbdmirror_journal": journal, "x_nbdmirror_rpo": 1}, "expects more than the interval"),
        ({"x_nbdmirror_rpo": 5, "copy_mode": "background"}, "needs copy-mode 'points'"),
        ({"x_nbdmirror_interval": 1, "copy_mode": "background"}, "needs copy-mode 'points'"),
    ]
    for arguments, text in cases:
        refused = server.qmp.refusal(
            "drive-mirror",
            **({"device": "disk0", "target": image, "mode": "existing", "sync": "full"} | mode
               | arguments),
        )  # fmt: skip
        assert re.search(text, refused), refused
        assert "\n" not in refused
    assert server.qmp.execute("query-block-jobs") == []
    assert server.qmp.execute("query-named-block-nodes")[1:] == [], "nothing is left"
    after = [path.read_bytes() for path in (far.image, far.journal, *files.values())]
    assert before == after


def test_a_node_as_journal(identical: Identical, server: Nbdmirror, far: FarSide) -> None:
    """It is in use as long as the job is there, and free after that."""
    server.qmp.add_target("image", far.image_server)
    server.qmp.add_target("journal", far.journal_server)
    server.qmp.start_mirror("image", copy_mode="points", x_nbdmirror_journal="journal")
    server.qmp.wait_ready()
    assert "in use" in server.qmp.refusal("blockdev-del", node_name="journal")
    refused = server.qmp.refusal("block-dirty-bitmap-add", node="journal", name="b")
    assert "journal" in refused
    with connected(server.uri()) as guest:
        identical(guest.pread(SIZE, 0), far.image_server.uri())
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    server.qmp.execute("blockdev-del", node_name="journal")
    server.qmp.execute("blockdev-del", node_name="image")


def test_a_journal_that_was_recovered_from_is_noticed_by_a_source_at_rest(
    identical: Identical, server: Nbdmirror, far: FarSide, disk: Path
) -> None:
    """No guest writes, so the source makes no points; `status` must not say that they are there."""
    with Guest(server.uri(), disk) as guest:
        far.start_mirror(server)
        server.qmp.wait_ready()
        guest.wait_for_requests(30)
    wait_for_rest(server)
    identical(guest, disk)
    assert _recovered(far.image_server.uri(), far.journal_server.uri())
    ended = server.qmp.wait_for_event("BLOCK_JOB_COMPLETED")
    assert re.search("point [0-9]+ was recovered from this journal at", ended["error"])
    identical(disk, far.image)


def test_a_journal_that_was_recovered_from_takes_nothing_more(
    identical: Identical, server: Nbdmirror, far: FarSide, disk: Path
) -> None:
    """The source was not dead, only its link: it is refused, with one line that says why. The
    recovery refuses the source first, and says last what became of the journal."""
    with Guest(server.uri(), disk) as guest:
        far.start_mirror(server)
        server.qmp.wait_ready()
        guest.wait_for_requests(30)
        image, journal = far.image_server.uri(), far.journal_server.uri()
        wait_until(lambda: _recovered(image, journal), "a recovery that the source did not cross")
        recovered = far.image.read_bytes()
        ended = server.qmp.wait_for_event("BLOCK_JOB_COMPLETED")
    at_last, before = "point [0-9]+ was recovered from this journal at", "journal: a recovery, or"
    assert re.search(f"{at_last}|{before}", ended["error"])
    identical(recovered, image)


def _recovered(image: str, journal: str) -> bool:
    return nbdmirror("recover", "--image", image, "--journal", journal).returncode == 0


def test_a_journal_is_no_target(start: Start, far: FarSide, server: Nbdmirror, disk: Path) -> None:
    """Neither for a plain mirror, nor with image and journal confused: its points stay."""
    far.start_mirror(server)
    server.qmp.wait_ready()
    server.qmp.execute("block-job-cancel", device="j", force=True)
    server.qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    server.allowed.append("is a journal")
    before = far.journal.read_bytes()
    larger: dict[str, Any] = {"x_nbdmirror_allow_larger_target": True}
    kinds: tuple[dict[str, Any], ...] = ({}, {"target_is_zero": True}, {"sync": "none"})
    for options in kinds:
        server.qmp.forget()
        server.qmp.start_mirror(far.journal_server.uri(), **options, **larger)
        server.qmp.wait_for_event("BLOCK_JOB_COMPLETED")
        (shown,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
        assert "is a journal, and holds points of a disk" in shown["last-job"]["reason"]
    text = "was not written to; disk disk0 is served"
    wait_until(lambda: text in server.stderr, "the log says what the target is")
    assert far.journal.read_bytes() == before
    with far.journal.open("r+b") as file:
        file.write(bytes(128 * KiB))
    server.qmp.forget()
    server.qmp.start_mirror(far.journal_server.uri(), **larger)
    server.qmp.wait_ready()
    server.qmp.complete()
    assert_identical(disk, far.journal.read_bytes()[: disk.stat().st_size])
