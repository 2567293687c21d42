"""Points that are snapshots of the target, with real servers: each snapshot that was acknowledged
is the disk of one moment, whatever is killed."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from integration.mirror.points.killrounds import Lag, NumberedGuest
from integration.mirror.points.pointsparts import points_of
from integration.mirror.snapshots.snapshotsparts import (
    Exec,
    SnapshotFarSide,
    ack,
    awaited,
    wait_for_awaited,
    wait_for_rest,
)
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_empty, make_image
from support.kept import Kept
from support.processes import nbdmirror
from support.seeds import SEED, print_seed
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.cli.common import USAGE
from nbdmirror.qmp.results import EVENTS, STATUS

SMALL = 2 * MiB


@pytest.mark.guarantee("A point that waits for its snapshot is left alone")
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_each_snapshot_is_the_disk_of_one_moment(
    start: Start, folder: Path, identical: Identical, fmt: str
) -> None:
    print_seed()
    disk = make_image(folder / "disk.img", SMALL)
    far = SnapshotFarSide(start, folder, fmt, SMALL)
    server = start(Nbdmirror(folder, disk, bare=True))
    guest = NumberedGuest(disk, SEED)
    guest.start(server.uri())
    far.start_mirror(server)
    with Exec(server, far.command) as command:
        command.wait_for(5)
        guest.stop()
        wait_for_rest(server, command)
        for number in command.acked:
            guest.check(far.snapshot(number), answered_before_s=0)
        last = command.acked[-1]
        assert_identical(disk.read_bytes(), far.snapshot(last))
        assert points_of(server)["sequence"] == last
        server.qmp.execute("block-job-cancel", device="j")
        assert command.wait() == 0, command.err
    assert command.err == ""
    assert "a consistent copy" in command.out.splitlines()[-1]
    server.stop()
    far.server.stop()
    identical(disk, far.raw(far.image))


def test_ends_of_the_server_while_points_are_made(start: Start, folder: Path) -> None:
    """Killed, or in order. The last snapshot that was acknowledged is the disk of one moment, and
    no older than the lag has said. The numbers go on."""
    print_seed()
    chance = random.Random(SEED)
    disk = make_image(folder / "disk.img", SMALL)
    far = SnapshotFarSide(start, folder, size=SMALL)
    server = start(Kept(folder, disk))
    server.allowed.append(".*")  # nbdkit complains of guests that it ends on
    far.start_mirror(server, device="vda", x_nbdmirror_reconnect_delay=60)
    guest, lag = NumberedGuest(disk, SEED), Lag()
    with Exec(server, far.command) as command:
        for _ in range(4):
            has_ended = threading.Event()
            watcher = threading.Thread(target=lag.watch, args=(server, has_ended))
            watcher.start()
            guest.start(server.uri())
            command.wait_for_more(chance.randint(1, 3))
            has_ended.set()
            watcher.join()
            promised_s = lag.promised_s
            chance.choice([server.kill, server.stop])()
            guest.stop()
            # An answer of the server to its last acknowledgement may have been lost.
            made = sorted(int(path.name) for path in far.snapshots.glob("*[0-9]"))
            acked = command.acked
            for number in acked:
                guest.check(far.snapshot(number), answered_before_s=0)
            # What was promised counts if all snapshots are known to be acknowledged.
            least_s = promised_s if made[-1] in acked else 0.0
            guest.check(far.snapshot(acked[-1]), answered_before_s=least_s)
            server.restart()
        command.wait_for_more()
        wait_for_rest(server, command)
        assert_identical(disk.read_bytes(), far.snapshot(command.acked[-1]))
        assert command.acked == sorted(set(command.acked))
        server.qmp.execute("block-job-cancel", device="j")
        assert command.wait() == 0, command.err
    server.stop()


def test_acknowledgements_by_hand(
    server: Nbdmirror, far: SnapshotFarSide, disk: Path, identical: Identical
) -> None:
    """The image stays as it is until then, though guests write."""
    far.start_mirror(server)
    assert wait_for_awaited(server) == 1
    image = far.image.read_bytes()
    with Guest(server.uri(), disk) as guest:
        guest.wait_for_requests(40)
        status = server.qmp.execute("x-nbdmirror-query-status")
        STATUS.check(status, "status")
        (job,) = status["disks"][0]["jobs"]
        assert job["explanation"][0].startswith("waits for the acknowledgement of point 1")
        assert far.image.read_bytes() == image
        refusal = server.qmp.refusal("x-nbdmirror-point-ack", id="j", sequence=2)
        waits = "the job waits for that of point 1"
        assert refusal == f"No acknowledgement of point 2 is awaited: {waits}"
        assert ack(server, 1) is False
        assert ack(server, 1) is True
        server.qmp.wait_ready()
    number = wait_for_awaited(server)
    assert number == 2
    assert ack(server, 2, error="no room") is False
    for event in server.qmp.events:
        EVENTS[event["event"]].check(event["data"], event["event"])
    broken = server.qmp.wait_for_event("X_NBDMIRROR_POINT_BROKEN")
    assert broken["reason"] == "point 2 was refused: no room"
    wait_until(lambda: awaited(server) == 3, "the next point")
    assert_identical(disk.read_bytes(), far.image.read_bytes())
    server.qmp.execute("job-pause", id="j")
    server.qmp.wait_status("standby")
    assert "the job waits for none now" in server.qmp.refusal(
        "x-nbdmirror-point-ack", id="j", sequence=3
    )
    server.qmp.execute("job-resume", id="j")
    wait_until(lambda: awaited(server) == 4, "it is made again")
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    server.stop()
    far.server.stop()
    identical(disk, far.image)


def test_a_target_that_is_lost_while_a_point_waits(
    server: Nbdmirror, far: SnapshotFarSide, disk: Path
) -> None:
    far.start_mirror(server, x_nbdmirror_reconnect_delay=60)
    wait_for_awaited(server)
    ack(server, 1)
    server.qmp.wait_ready()
    with connected(server.uri()) as guest:
        guest.pwrite(b"l" * MiB, 0)
    wait_until(lambda: awaited(server) == 2, "a point waits")
    far.server.kill()
    server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
    assert "is awaited" in server.qmp.refusal("x-nbdmirror-point-ack", id="j", sequence=2)
    far.server.start()
    server.qmp.wait_for_event("X_NBDMIRROR_TARGET_BACK")
    wait_until(lambda: awaited(server) == 3, "it is made again")
    assert_identical(disk.read_bytes(), far.image.read_bytes())


def test_another_image_is_noticed(server: Nbdmirror, far: SnapshotFarSide) -> None:
    """As that of every mirror is, when the target comes back."""
    far.start_mirror(server, x_nbdmirror_reconnect_delay=60)
    wait_for_awaited(server)
    ack(server, 1)
    server.qmp.wait_ready()
    far.server.kill()
    content = far.image.read_bytes()
    far.image.write_bytes(bytes(byte ^ 1 for byte in content))
    far.server.start()
    server.allowed.append(".*came back changed.*")

    def reason() -> str:
        (job,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
        return str(job.get("target-lost-reason", ""))

    wait_until(lambda: "came back changed" in reason(), "the image is refused")
    far.server.kill()
    far.image.write_bytes(content)
    far.server.start()
    server.qmp.wait_for_event("X_NBDMIRROR_TARGET_BACK")


def test_what_is_refused(
    start: Start, server: Nbdmirror, far: SnapshotFarSide, folder: Path
) -> None:
    """With one line, and the image is not touched."""
    (folder / "journal").mkdir()
    journal = start(QemuNbd(folder / "journal", make_empty(folder / "journal.img", 32 * MiB)))
    before = far.image.read_bytes()
    target = far.server.uri()

    def refused(text: str, **arguments: object) -> None:
        refusal = server.qmp.refusal(
            "drive-mirror", device="disk0", target=target, sync="full", mode="existing", **arguments
        )
        assert refusal == text

    needs = "needs 'x-nbdmirror-journal', or, for a target whose snapshots are the points"
    needs = f"Copy mode 'points' {needs}, 'x-nbdmirror-auto-point' false"
    refused(needs, copy_mode="points", x_nbdmirror_auto_point=True)
    refused(needs, copy_mode="points")
    text = "Parameter 'x-nbdmirror-auto-point' needs copy-mode 'points'"
    refused(text, x_nbdmirror_auto_point=False)
    text = "accepts no 'x-nbdmirror-journal' if it is false: give one of the two"
    refused(
        f"Parameter 'x-nbdmirror-auto-point' {text}",
        copy_mode="points",
        x_nbdmirror_auto_point=False,
        x_nbdmirror_journal=journal.uri(),
    )
    for key, value in {"keep": 5, "on-journal-full": "stop"}.items():
        given = {f"x-nbdmirror-{key}": value}
        text = f"Parameter 'x-nbdmirror-{key}' needs 'x-nbdmirror-journal'"
        refused(text, copy_mode="points", x_nbdmirror_auto_point=False, **given)

    def command_refused(text: str, *argv: str, status: int = 1) -> None:
        done = nbdmirror(*argv, "--qmp", str(server.qmp_path))
        assert (done.returncode, done.stdout) == (status, "")
        assert text in done.stderr and done.stderr.count("\n") == 1, done.stderr

    one = "--snapshots: points are in the journal, or are snapshots: give one of both"
    command_refused(one, "mirror", target, "--snapshots", "--journal", target, status=USAGE)
    mode = "--copy-mode: --snapshots has a copy mode of its own: give one of the two"
    argv = ("mirror", target, "--snapshots", "--copy-mode", "background")
    command_refused(mode, *argv, status=USAGE)
    command_refused("there is no job (start one", "points", "--exec", "true")
    assert_identical(before, far.image.read_bytes())
    server.qmp.start_mirror(target)
    server.qmp.wait_ready()
    command_refused("job j makes no points; start one with", "points", "--exec", "true")
    text = "Job 'j' awaits no acknowledgements: its copy mode is 'background'"
    assert server.qmp.refusal("x-nbdmirror-point-ack", id="j", sequence=1) == text
    assert server.qmp.refusal("x-nbdmirror-point-ack", id="k", sequence=1) == "Job not found"
    server.qmp.execute("job-cancel", id="j")
    server.qmp.wait_for_event("BLOCK_JOB_CANCELLED")
