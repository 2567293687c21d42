"""`nbdmirror points --exec` with real servers: which command runs when, and what becomes of the
point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import SIZE, points_of
from integration.mirror.snapshots.snapshotsparts import (
    Exec,
    SnapshotFarSide,
    awaited,
    wait_for_awaited,
)
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import KiB, MiB, assert_identical, make_image
from support.processes import nbdmirror, nbdmirror_environment
from support.servers import Nbdmirror
from support.waiting import WAIT_S_MAX, wait_until


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
                "NBDMIRROR_GROUP": "",
                "NBDMIRROR_ID": "j",
                "NBDMIRROR_DEVICE": "disk0",
                "NBDMIRROR_BYTES": str(64 * KiB),
            }.items()
        )
        assert len(time) == len("20260102T030405.678Z") and time.endswith("Z")
        assert f"job j: point 2 of {time}: acknowledged\n" in command.out
        server.qmp.complete()
        assert command.wait() == 0, command.err


def test_snapshots_of_two_disks_are_of_the_same_moments(start: Start, folder: Path) -> None:
    """Their numbers say so: in the commands, in events and in queries."""
    disks = {name: make_image(folder / f"{name}.img", SIZE, n) for n, name in enumerate("ab")}
    fars = {}
    for name in disks:
        (folder / name).mkdir()
        fars[name] = SnapshotFarSide(start, folder / name)
    server = start(Nbdmirror(folder, *(f"{name}={disk}" for name, disk in disks.items())))
    server.qmp.execute("query-version")  # hears events from now on
    targets = [f"{name}={far.server.uri()}" for name, far in fars.items()]
    done = nbdmirror(
        "mirror", *targets, "--snapshots", "--every", "500ms", "--qmp", server.qmp_path
    )
    assert done.returncode == 0, done.stderr
    notes = {name: folder / f"noted-{name}" for name in disks}

    def common() -> set[str]:
        noted = [set(note.read_text().splitlines()) for note in notes.values() if note.exists()]
        return {line for line in set.intersection(*noted) if not line.startswith(" ")}

    def wait_for_more(count: int) -> None:
        wait_until(lambda: len(common()) > count, "snapshots of one moment")

    with ExitStack() as stack:
        for name, far in fars.items():
            command = f"{far.command}; echo $NBDMIRROR_GROUP $NBDMIRROR_TIME >>{notes[name]}"
            stack.enter_context(Exec(server, command, "--job", name))
        guest = stack.enter_context(connected(server.uri("a")))
        wait_until(lambda: all(note.exists() for note in notes.values()), "there are snapshots")
        for number in range(1, 4):
            before = len(common())
            guest.pwrite(bytes([number]) * 4096, 0)
            wait_for_more(before)
    found = common()
    points = [job["x-nbdmirror-points"] for job in server.qmp.execute("query-block-jobs")]
    events = [e["data"] for e in server.qmp.events if e["event"] == "X_NBDMIRROR_POINT"]
    for line in found:
        group = int(line.split()[0])
        told = [event for event in events if event.get("group") == group]
        assert sorted(event["id"] for event in told) == ["a", "b"]
        assert len({event["time-s"] for event in told}) == 1
    assert {point["group"] for point in points} <= {int(line.split()[0]) for line in found}


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
    assert awaited(server) == 1
    with Exec(server, far.command) as command:
        if is_there:
            wait_until(lambda: "for job j: waiting for its end\n" in command.err, "it waits")
            assert not list(far.snapshots.iterdir()) and awaited(server) == 1
            os.kill(child, signal.SIGTERM)
        command.wait_for(1)
        server.qmp.wait_ready()
        assert_identical(far.image.read_bytes(), far.snapshot(1))


def test_output_that_cannot_be_written(
    server: Nbdmirror, far: SnapshotFarSide, disk: Path, identical: Identical
) -> None:
    """It is no reason to make no snapshots, and none for a bad exit status."""
    far.start_mirror(server)
    argv = [sys.executable, "-m", "nbdmirror", "points", "--exec", far.command]
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(
            [*argv, "--qmp", str(server.qmp_path)],
            env=nbdmirror_environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        ) as command,
    ):
        server.qmp.wait_ready()
        with connected(server.uri()) as guest:
            guest.pwrite(b"f" * 64 * KiB, MiB)
        wait_until(lambda: points_of(server)["sequence"] == 2, "another point")
        server.qmp.complete()
        _, err = command.communicate(timeout=WAIT_S_MAX)
        assert (command.returncode, err) == (
            0,
            "nbdmirror: standard output: No space left on device\n",
        )
    server.stop()
    far.server.stop()
    identical(disk, far.image)


def test_two_runs_for_one_job(server: Nbdmirror, far: SnapshotFarSide, disk: Path) -> None:
    """The second one waits, and takes over when the first one has ended."""
    far.start_mirror(server)
    with Exec(server, far.command) as first, Exec(server, far.command) as second:
        wait_until(lambda: first.acked or second.acked, "a point is acknowledged")
        if second.acked:
            first, second = second, first
        wait_until(lambda: not awaited(server), "no point waits")
        assert first.end() == 130
        with connected(server.uri()) as guest:
            guest.pwrite(b"2" * 64 * KiB, MiB)
        second.wait_for(2)
        assert not set(first.acked) & set(second.acked)
        assert_identical(disk.read_bytes(), far.snapshot(second.acked[-1]))


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
