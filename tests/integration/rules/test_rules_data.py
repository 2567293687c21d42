"""What is copied: whole clusters, odd sizes, holes, what is written while a mirror starts, and what
a target has lost. Rules of a mirror job that the other tests leave open; docs/rules.md has all of
them by number.

Every mirror here ends with images that are compared byte by byte, by the `identical` fixture.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from integration.rules.rulesparts import (
    CHANGED_TARGET,
    GRANULE,
    SIZE,
    Logged,
    Options,
    begin,
    both_modes,
    cancel_by_force,
    end,
    wait_in_sync,
    wait_synced,
)
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import KiB, MiB, make_empty, make_noise
from support.losing import SeldomFlushing
from support.paritysides import Faulty
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("identical")


# 23, 25: whole clusters


@pytest.mark.rule(23, 25)
@pytest.mark.parametrize("policy", ["ignore", "stop"])
def test_a_failed_first_touch_carries_the_whole_cluster_again(
    identical: Identical, server: Nbdmirror, disk: Path, faulty: Faulty, policy: str
) -> None:
    """What was added to a guest's 100 bytes is copied with them, is counted once, and no more than
    that is: the neighbours stay as they were."""
    qmp = server.qmp
    expected = bytearray(faulty.image.read_bytes())
    begin(
        server, faulty, sync="none", granularity=512, on_target_error=policy,
        x_nbdmirror_target_cluster_size=GRANULE,
    )  # fmt: skip
    qmp.wait_ready()
    assert qmp.job()["len"] == 0
    faulty.set("write", "EIO")
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x71" * 100, 3 * GRANULE + 700)
    assert qmp.wait_for_event("BLOCK_JOB_ERROR")["action"] == policy
    assert (qmp.job()["offset"], qmp.job()["len"]) == (0, GRANULE)
    faulty.heal("write")
    if policy == "stop":
        qmp.wait_status("standby")
        qmp.execute("block-job-resume", device="j")
    wait_in_sync(qmp)
    assert (qmp.job()["offset"], qmp.job()["len"]) == (GRANULE, GRANULE)
    expected[3 * GRANULE : 4 * GRANULE] = disk.read_bytes()[3 * GRANULE : 4 * GRANULE]
    identical(expected, faulty.image)
    end(qmp, "block-job-cancel")


# 26, 27, 28: sizes


@pytest.mark.rule(26)
@both_modes
def test_nothing_is_written_behind_the_end(
    start: Start, identical: Identical, folder: Path, copy_mode: str
) -> None:
    size = MiB + 700
    disk = make_noise(folder / "odd.img", size, 5)
    target = start(Logged(folder, make_noise(folder / "oddtarget.img", size + 5000)))
    server = start(Nbdmirror(folder, f"src={disk}", bare=True))
    tail = target.image.read_bytes()[size:]
    begin(server, target, copy_mode=copy_mode, x_nbdmirror_allow_larger_target=True)
    assert server.qmp.wait_ready()["len"] == size
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x72" * 701, size - 701)
        guest.zero(300, size - 300)
    end(server.qmp, "block-job-complete")
    places = target.requests("Write") + target.requests("Zero")
    assert max(offset + length for offset, length, _ in places) == size
    identical(disk.read_bytes() + tail, target.image)


@pytest.mark.rule(27, 40)
@pytest.mark.guarantee("A target that was lost and came back")
@pytest.mark.parametrize("change", ["smaller", "larger", "read-only", "blocks", "no flush"])
def test_a_target_that_changed_within_the_reconnect_delay_is_not_written_to(
    identical: Identical, server: Nbdmirror, folder: Path, disk: Path, image: Path, change: str
) -> None:
    """It is looked for as long as the delay says; then the policy is asked."""
    server.allowed = [CHANGED_TARGET, "connection lost", "write error"]
    target = NbdkitTarget(folder, "file", f"file={image}").start()
    try:
        begin(server, target, node={"reconnect_delay": 1}, on_target_error="report")
        server.qmp.wait_ready()
        target.kill()
        target.socket.unlink(missing_ok=True)
        size = SIZE + {"smaller": -MiB, "larger": MiB}.get(change, 0)
        content = make_noise(image, size, seed=8).read_bytes()
        if change == "read-only":
            target.options = ["--readonly"]
        if change == "blocks":
            target.options = ["--filter=blocksize-policy"]
            target.parameters = (*target.parameters, "blocksize-minimum=4096")
        if change == "no flush":
            target.plugin = "eval"
            copy = f"dd if={image} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none"
            target.parameters = (
                f"get_size=echo {size}", f"pread={copy}", "can_write=exit 0", "can_flush=exit 3",
                f"pwrite=dd of={image} seek=$4 conv=notrunc oflag=seek_bytes status=none",
            )  # fmt: skip
        target.start()
        with connected(server.uri("src")) as guest:
            guest.pwrite(b"\x73" * 4096, 8192)
        assert server.qmp.wait_for_event("BLOCK_JOB_ERROR", 10)["operation"] == "write"
        assert "error" in server.qmp.wait_for_event("BLOCK_JOB_COMPLETED", 10)
        identical(content, image)
        identical(server.uri("src"), disk)
        assert disk.read_bytes()[8192:12288] == b"\x73" * 4096
    finally:
        target.kill()


@pytest.mark.rule(27)
def test_a_disk_that_grows_during_a_mirror_keeps_its_size(
    identical: Identical, server: Nbdmirror, disk: Path, logged: Logged
) -> None:
    qmp = server.qmp
    with Guest(server.uri("src"), disk) as guest:
        identical(guest, logged.image)
        begin(server, logged)
        qmp.wait_ready()
        with disk.open("r+b") as file:
            file.truncate(SIZE + MiB)
        guest.wait_for_requests(50)
        qmp.complete()
        with connected(server.uri("src")) as other:
            assert other.get_size() == SIZE
        guest.wait_for_requests(50)
    assert logged.image.stat().st_size == SIZE


@pytest.mark.rule(28)
@both_modes
@pytest.mark.parametrize(
    "ending",
    ["block-job-complete", "block-job-cancel", pytest.param("force", marks=pytest.mark.alone)],
)
@pytest.mark.parametrize("sync", ["full", "top", "none"])
def test_a_disk_of_no_bytes_waits_for_its_ending(
    start: Start, identical: Identical, folder: Path, sync: str, ending: str, copy_mode: str
) -> None:
    target = start(NbdkitTarget(folder, "memory", "0"))
    empty = make_empty(folder / "empty.img", 0)
    server = start(Nbdmirror(folder, f"src={empty}", bare=True))
    qmp = server.qmp
    begin(server, target, sync=sync, copy_mode=copy_mode)
    qmp.wait_ready()
    job = qmp.job()
    assert (job["ready"], job["len"], job["offset"]) == (True, 0, 0)
    wait_synced(qmp, copy_mode)
    with connected(server.uri("src")) as guest:
        guest.flush()
    if ending == "force":
        assert cancel_by_force(qmp) < 1.0
    else:
        end(qmp, ending)
    identical(server.uri("src"), b"")
    identical(target.uri(), b"")


# 31: what the source says of its holes


@pytest.mark.rule(31)
def test_a_source_that_fails_to_tell_its_extents(
    start: Start, identical: Identical, folder: Path, disk: Path, logged: Logged
) -> None:
    """All is data then; it is no error of the job."""
    errors = ("error-extents=EIO", "error-extents-rate=100%")
    source = start(NbdkitTarget(folder, "file", f"file={disk}", *errors, filters=("error",)))
    server = start(Nbdmirror(folder, f"src={source.uri()}", bare=True))
    with Guest(server.uri("src"), disk) as guest:
        identical(guest, logged.image)
        begin(server, logged)
        server.qmp.wait_ready()
        guest.wait_for_requests(50)
        server.qmp.complete()
        guest.wait_for_requests(50)
    assert not [event for event in server.qmp.events if event["event"] == "BLOCK_JOB_ERROR"]


@pytest.mark.rule(31)
def test_a_hole_that_does_not_read_as_zeroes_is_copied(
    start: Start, identical: Identical, folder: Path, logged: Logged
) -> None:
    """Not allocated says nothing of what is read there."""
    disk = make_noise(folder / "noise.img", SIZE, 6)
    source = start(
        NbdkitTarget(
            folder,
            "eval",
            f"get_size=echo {SIZE}",
            f"pread=dd if={disk} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
            f"pwrite=dd of={disk} seek=$4 conv=notrunc oflag=seek_bytes status=none",
            "can_write=exit 0",
            "can_flush=exit 0",
            "flush=exit 0",
            "can_extents=exit 0",
            f"extents=echo 0 {SIZE} hole",
        )
    )
    server = start(Nbdmirror(folder, f"src={source.uri()}", bare=True))
    begin(server, logged)
    server.qmp.wait_ready()
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x74" * 4096, GRANULE)
    identical(disk, logged.image)
    end(server.qmp, "block-job-complete")


# 33: the start


@pytest.mark.rule(33)
@pytest.mark.parametrize("sync", ["full", "top"])
def test_what_is_written_while_the_source_is_scanned_is_copied(
    start: Start, identical: Identical, folder: Path, sync: str
) -> None:
    """The answer that says "hole" is on its way when the guest writes there."""
    disk = make_empty(folder / "holes.img", SIZE)
    slow = ("delay-extents=3",)
    source = start(NbdkitTarget(folder, "file", f"file={disk}", *slow, filters=("delay",)))
    target = start(Logged(folder, make_empty(folder / "zeroes.img", SIZE)))
    server = start(Nbdmirror(folder, f"src={source.uri()}", bare=True))
    qmp = server.qmp
    with connected(server.uri("src")) as guest:
        known: Options = {"target_is_zero": True} if sync == "full" else {}
        begin(server, target, sync=sync, **known)
        for number in range(0, 60, 7):
            guest.pwrite(bytes([number + 1]) * 5000, number * GRANULE + 100)
        assert not qmp.job()["ready"], "it is still being scanned"
        qmp.wait_ready()
        identical(disk, target.image)
        end(qmp, "block-job-complete")


# 36, 44: the same disk


@pytest.mark.rule(36)
def test_a_node_is_not_mirrored_into_itself(
    start: Start, identical: Identical, server: Nbdmirror, disk: Path
) -> None:
    """Nor to a second node of the same export, nor to another disk that is served."""
    qmp = server.qmp
    identical(disk.read_bytes(), disk)
    arguments = {"job_id": "j", "sync": "full", "device": "src"}
    assert "itself" in qmp.refusal("blockdev-mirror", target="src", **arguments)
    place = {"type": "unix", "path": str(server.socket)}
    with contextlib.suppress(Exception):  # refused here, or below
        qmp.execute("blockdev-add", driver="nbd", node_name="loop", server=place, export="src")
    assert qmp.refusal("blockdev-mirror", target="loop", **arguments)
    assert qmp.execute("query-jobs") == []


# 39, 40: a target that crashes


@pytest.mark.rule(39)
@pytest.mark.guarantee("A target that was lost and came back")
@both_modes
@pytest.mark.parametrize("phase", ["first copy", "ready"])
def test_what_a_target_lost_in_a_crash_is_copied_again(
    start: Start,
    identical: Identical,
    folder: Path,
    disk: Path,
    image: Path,
    phase: str,
    copy_mode: str,
) -> None:
    """It comes back as it was at its last flush: what it acknowledged since then is gone."""
    server = start(SeldomFlushing(disk.parent, f"src={disk}", bare=True))
    target = start(NbdkitTarget(folder, "file", f"file={image}"))
    qmp = server.qmp
    slow: Options = {"speed": 256 * KiB, "buf_size": GRANULE} if phase == "first copy" else {}
    flushed = image.read_bytes()
    begin(server, target, node={"reconnect_delay": 20}, copy_mode=copy_mode, **slow)
    identical(disk, image)
    with connected(server.uri("src")) as guest:
        if phase == "first copy":
            wait_until(lambda: qmp.job()["offset"] >= MiB // 2, "a part is copied")
        else:
            qmp.wait_ready()
            wait_synced(qmp, copy_mode)
            flushed = image.read_bytes()
        for number in range(0, 40, 3):
            guest.pwrite(bytes([number + 1]) * 3000, number * 100_000)
        if phase == "ready":
            wait_in_sync(qmp)
            assert image.read_bytes() == disk.read_bytes() != flushed
        target.kill()
        target.socket.unlink(missing_ok=True)
        image.write_bytes(flushed)
        target.start()
        guest.pwrite(b"\x75", 0)
        qmp.execute("block-job-set-speed", device="j", speed=0)
        if phase == "first copy":
            qmp.wait_ready()
        wait_synced(qmp, copy_mode)
        assert image.read_bytes() == disk.read_bytes()
        end(qmp, "block-job-complete")
    assert not [event for event in qmp.events if event["event"] == "BLOCK_JOB_ERROR"]
