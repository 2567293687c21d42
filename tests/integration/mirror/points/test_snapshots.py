"""Points that are snapshots of the target, with real servers: each snapshot that was acknowledged
is the disk of one moment, whatever is killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from integration.mirror.points.killrounds import Lag, NumberedGuest
from integration.mirror.points.pointsparts import left_bytes, points_of
from integration.mirror.points.snapshotsparts import Exec, SnapshotFarSide
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import KiB, MiB, assert_identical, make_empty, make_image
from support.kept import Kept
from support.processes import nbdmirror, nbdmirror_environment
from support.seeds import SEED, print_seed
from support.servers import Nbdmirror, QemuNbd
from support.waiting import WAIT_S_MAX, wait_until

SMALL = 2 * MiB


@pytest.fixture
def far(start: Start, folder: Path) -> SnapshotFarSide:
    return SnapshotFarSide(start, folder)


@pytest.fixture
def server(start: Start, far: SnapshotFarSide, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, disk, bare=True))


def awaited(server: Nbdmirror) -> int:
    return int(points_of(server).get("awaited", {}).get("sequence", 0))


def wait_for_awaited(server: Nbdmirror) -> int:
    wait_until(lambda: awaited(server) > 0, "a point waits")
    return awaited(server)


def wait_for_rest(server: Nbdmirror, command: Exec) -> None:
    """Until the last point has everything, and `command` knows that it was acknowledged."""

    def is_at_rest() -> bool:
        last = points_of(server).get("sequence")
        return not left_bytes(server) and command.acked[-1] == last and not awaited(server)

    wait_until(is_at_rest, "nothing is left")


def ack(server: Nbdmirror, number: int, **arguments: str) -> bool:
    said = server.qmp.execute("x-nbdmirror-point-ack", id="j", sequence=number, **arguments)
    return bool(said["repeated"])


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


def test_kills_of_the_source_while_points_are_made(start: Start, folder: Path) -> None:
    """The last snapshot that was acknowledged is the disk of one moment, and no older than the lag
    has said. The numbers go on."""
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
            server.kill()
            promised_s = lag.promised_s
            has_ended.set()
            watcher.join()
            guest.stop()
            # An answer of the server to its last acknowledgement may have been lost.
            made = sorted(int(path.name) for path in far.snapshots.glob("*[0-9]"))
            for number in command.acked:
                guest.check(far.snapshot(number), answered_before_s=0)
            last = far.snapshot(made[-1] if made[-1] in command.acked else command.acked[-1])
            guest.check(last, answered_before_s=min(promised_s, before_last(lag, made, command)))
            server.restart()
        command.wait_for_more()
        wait_for_rest(server, command)
        assert_identical(disk.read_bytes(), far.snapshot(command.acked[-1]))
        assert command.acked == sorted(set(command.acked))
        server.qmp.execute("block-job-cancel", device="j")
        assert command.wait() == 0, command.err
    server.stop()


def before_last(lag: Lag, made: list[int], command: Exec) -> float:
    """What was promised, if all snapshots that were made are known to be acknowledged."""
    return lag.promised_s if made[-1] in command.acked else 0.0


def test_a_command_that_fails(server: Nbdmirror, far: SnapshotFarSide, disk: Path) -> None:
    """The point is refused, with its last words, and the next one follows."""
    far.start_mirror(server)
    fails = "test $NBDMIRROR_SEQUENCE -ge 3 || { echo no >&2; echo 'pool is full' >&2; exit 7; }"
    with Exec(server, f"{fails}; {far.command}", "--job", "j") as command:
        command.wait_for(3)
        assert command.acked == [3]
        assert command.err.count("pool is full\n") == 4, "of the command, and of nbdmirror"
        assert ": the command failed: exit status 7: pool is full\n" in command.err
        server.qmp.wait_ready()
        events = [e["data"] for e in server.qmp.events if e["event"] == "X_NBDMIRROR_POINT_BROKEN"]
        reasons = [event["reason"] for event in events]
        assert reasons == [f"point {n} was refused: exit status 7: pool is full" for n in (1, 2)]
        assert_identical(disk.read_bytes(), far.snapshot(3))
        server.qmp.execute("job-cancel", id="j")
        assert command.wait() == 1
        assert "was cancelled" in command.err


def test_what_the_command_is_told(server: Nbdmirror, far: SnapshotFarSide, folder: Path) -> None:
    far.start_mirror(server, x_nbdmirror_interval=86400)
    note = folder / "note"
    with Exec(server, f"env >{note}.$NBDMIRROR_SEQUENCE", "--device", "disk0") as command:
        command.wait_for(1)
        with connected(server.uri()) as guest:
            guest.pwrite(b"x" * 64 * KiB, MiB)
        control = ("--qmp", str(server.qmp_path))
        done = nbdmirror("point", "--name", "before upgrade", "--wait", *control)
        assert done.returncode == 0, done.stderr
        lines = Path(f"{note}.2").read_text().splitlines()
        told = dict(line.split("=", 1) for line in lines if line.startswith("NBDMIRROR_"))
        time = told.pop("NBDMIRROR_TIME")
        assert (
            told.items()
            >= {
                "NBDMIRROR_SEQUENCE": "2",
                "NBDMIRROR_NAME": "before upgrade",
                "NBDMIRROR_ID": "j",
                "NBDMIRROR_DEVICE": "disk0",
                "NBDMIRROR_BYTES": str(64 * KiB),
            }.items()
        )
        assert len(time) == len("20260102T030405.678Z") and time.endswith("Z")
        assert f"job j: point 2 of {time}: acknowledged\n" in command.out
        server.qmp.complete()
        assert command.wait() == 0, command.err


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_ends_and_another_one(
    server: Nbdmirror, far: SnapshotFarSide, folder: Path, how: signal.Signals
) -> None:
    """The point stays as it is, and the next run gets it."""
    far.start_mirror(server)
    begun = folder / "begun"
    hangs = f"echo $$ >{begun}.new; mv {begun}.new {begun}; exec sleep 600"
    with Exec(server, hangs) as command:
        wait_until(begun.exists, "the command runs")
        status = command.end(how)
        assert status == (-9 if how is signal.SIGKILL else 130)
        if how is not signal.SIGKILL:
            text = "nbdmirror: interrupted; job j continues, and point 1 is not acknowledged\n"
            assert command.err == text
    child = int(begun.read_text())
    is_there = Path(f"/proc/{child}").exists()
    assert is_there is (how is signal.SIGKILL), "its command is ended with it, if it can be"
    if is_there:
        subprocess.run(["kill", str(child)], check=True)
    assert awaited(server) == 1
    with Exec(server, far.command) as command:
        command.wait_for(1)
        server.qmp.wait_ready()
        assert_identical(far.image.read_bytes(), far.snapshot(1))


def test_acknowledgements_by_hand(
    server: Nbdmirror, far: SnapshotFarSide, disk: Path, identical: Identical
) -> None:
    """The image stays as it is until then, though guests write."""
    far.start_mirror(server)
    assert wait_for_awaited(server) == 1
    image = far.image.read_bytes()
    with Guest(server.uri(), disk) as guest:
        guest.wait_for_requests(40)
        (job,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
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
    command_refused(one, "mirror", target, "--snapshots", "--journal", target)
    mode = "--copy-mode: --snapshots has a copy mode of its own: give one of the two"
    command_refused(mode, "mirror", target, "--snapshots", "--copy-mode", "background")
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


def test_the_command_line(
    server: Nbdmirror, far: SnapshotFarSide, disk: Path, identical: Identical
) -> None:
    """As docs/disaster-recovery.md has it."""
    control = ("--qmp", str(server.qmp_path))
    argv = (
        "mirror",
        far.server.uri(),
        "--snapshots",
        "--every",
        "1s",
        "--rpo",
        "20s",
        "--job",
        "j",
    )
    done = nbdmirror(*argv, *control)
    assert done.returncode == 0, done.stderr
    wait_for_awaited(server)
    explained = nbdmirror("explain", *control).stdout
    assert "waits for the acknowledgement of point 1" in explained
    with subprocess.Popen(
        [sys.executable, "-m", "nbdmirror", "points", "--exec", far.command, *control],
        env=nbdmirror_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as command:
        server.qmp.wait_ready()
        assert "point 1 is safe" in nbdmirror("explain", *control).stdout
        done = nbdmirror("complete", *control)
        assert done.returncode == 0, done.stderr
        out, _ = command.communicate(timeout=WAIT_S_MAX)
        assert command.returncode == 0
        assert "completed" in out.splitlines()[-1]
    server.stop()
    far.server.stop()
    identical(disk, far.image)
