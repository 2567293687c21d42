"""Mirrors that outlive the process (--state-dir), over orderly ends, killed processes and power
cuts: what is copied again, and which side is served."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import nbd
import pytest
from integration.state.stateparts import GRANULE, SIZE, End, begin, ends, finish, settle
from integration.state.test_state_bitmaps import add, bitmaps
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_image, make_noise
from support.kept import Kept, power_cut, refusal
from support.processes import freeze
from support.servers import OnTcp, QemuNbd
from support.waiting import wait_until


@pytest.mark.guarantee("A mirror continues where it was")
@ends
def test_a_mirror_goes_on_where_it_was(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, end: End
) -> None:
    begin(server, target).wait_ready()
    settle(server)
    end(server)
    qmp = server.restart()
    assert finish(server) == 0, "nothing had changed"
    assert qmp.execute("query-block")[0]["inserted"]["file"] == target.uri()
    identical(disk, target.image)


@pytest.mark.guarantee("A mirror continues where it was")
@ends
def test_what_was_written_while_the_target_hung_is_copied(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, end: End
) -> None:
    """Dirty, and in flight, when the process ends; and no more than that is copied again."""
    begin(server, target).wait_ready()
    settle(server)
    freeze(target.pid)
    try:
        with connected(server.uri()) as guest:
            for number in range(8):
                guest.pwrite(bytes([number + 1]) * GRANULE, number * MiB)
            guest.flush()
        wait_until(lambda: server.job_status()["in-flight-bytes"], "copies are in flight")
        end(server)
    finally:
        os.kill(target.pid, signal.SIGCONT)
    server.restart()
    again = finish(server)
    assert 8 * GRANULE <= again <= (8 * GRANULE if end is not power_cut else 8 * MiB)
    identical(disk, target.image)


@pytest.mark.guarantee("A mirror continues where it was")
@ends
@pytest.mark.parametrize("phase", ["first copy", "ready"])
def test_a_guest_that_writes_when_it_ends(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, end: End, phase: str
) -> None:
    slow = {"speed": 16 * MiB} if phase == "first copy" else {}
    qmp = begin(server, target, **slow)
    if phase == "ready":  # before the guest: its writes may be faster than a copy
        qmp.wait_ready()
    guest = Guest(server.uri(), disk, connections=2, pause_s=0).start()
    guest.wait_for_requests(300)
    server.allowed.append(".*")  # nbdkit complains of guests that it ends on
    end(server)
    with pytest.raises(nbd.Error):
        guest.stop()
    qmp = server.restart()
    qmp.execute("block-job-set-speed", device="j", speed=0)
    with connected(server.uri()) as other:
        other.pwrite(b"later", 12345)
    finish(server)
    identical(disk, target.image)


def test_an_orderly_end_in_the_first_copy_keeps_what_was_copied(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path
) -> None:
    qmp = begin(server, target, speed=8 * MiB)
    wait_until(lambda: qmp.job()["offset"] >= 8 * MiB, "a part is copied")
    target_flushed = qmp.job()["offset"]
    server.stop()
    qmp = server.restart()
    qmp.execute("block-job-set-speed", device="j", speed=0)
    assert finish(server) <= SIZE, target_flushed
    identical(disk, target.image)


def test_what_a_job_is_told_is_kept(server: Kept, target: QemuNbd) -> None:
    qmp = begin(server, target, auto_dismiss=False, on_target_error="stop", speed=MiB)
    qmp.execute("block-job-set-speed", device="j", speed=2 * MiB)
    qmp.execute("block-job-pause", device="j")
    qmp.wait_status("paused")
    settle(server)
    server.kill()
    qmp = server.restart()
    job = qmp.job()
    assert (job["speed"], job["status"], job["auto-dismiss"]) == (2 * MiB, "paused", False)
    qmp.execute("block-job-cancel", device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")


@pytest.mark.guarantee("A job that was reported as ended stays ended")
@pytest.mark.parametrize("how", ["pivot", "soft cancel", "forced cancel", "error"])
def test_a_job_that_has_ended_does_not_go_on(
    server: Kept, target: QemuNbd, disk: Path, how: str
) -> None:
    """Not even if the process is killed the moment after its last event."""
    qmp = begin(server, target)
    if how == "pivot":
        qmp.wait_ready()
        qmp.complete()
    elif how == "soft cancel":
        qmp.wait_ready()
        qmp.execute("block-job-cancel", device="j")
        qmp.wait_completed()
    elif how == "forced cancel":
        qmp.execute("block-job-cancel", device="j", force=True)
        qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")
    else:
        qmp.wait_ready()
        server.allowed.append(".*")
        target.kill()
        assert "error" in qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")
    server.kill()
    assert not (server.state / "vda.json").exists()
    if how == "pivot":
        server.disks = [f"vda={target.uri()}"]
    assert server.restart().execute("query-block-jobs") == []
    if how != "error":
        assert_identical(disk, target.image) if how != "forced cancel" else None


@pytest.mark.parametrize("ending", ["block-job-complete", "block-job-cancel"])
def test_after_a_mirror_guests_do_not_wait_for_the_state_directory(
    server: Kept, target: QemuNbd, ending: str
) -> None:
    """Their first write to a part of the disk is not written down any more."""
    qmp = begin(server, target)
    qmp.wait_ready()
    qmp.execute(ending, device="j")
    qmp.wait_completed()
    before = (server.state / "vda.intents").read_bytes()
    with connected(server.uri()) as guest:
        guest.pwrite(bytes(512), 0)
    assert (server.state / "vda.intents").read_bytes() == before


def accept(server: Kept) -> str:
    """Have the next start accept the old side that this one refuses; returns the id."""
    found = re.search(r"--accept-old-side ([0-9a-f]{8})\b", refusal(server))
    assert found is not None
    server.options = (*server.options, "--accept-old-side", found[1])
    server.allowed.append("WARNING|removed|counts as dirty")
    return found[1]


@pytest.mark.guarantee("Which side is the disk is never ambiguous")
def test_the_old_side_is_not_served(server: Kept, target: QemuNbd, disk: Path) -> None:
    begin(server, target).wait_ready()
    server.qmp.complete()
    with connected(server.uri()) as guest:
        guest.pwrite(b"new", 0)
        guest.flush()
    server.kill()
    refused = refusal(server)
    assert f"{disk} is not the disk any more" in refused
    assert target.uri() in refused and "--accept-old-side" in refused
    hard_link = disk.with_name("other-name.img")
    hard_link.hardlink_to(disk)
    server.disks = [f"vda={hard_link}"]
    assert "is not the disk any more" in refusal(server)
    for other in (f"other={disk}", f"other={hard_link}", str(disk)):
        server.disks = [other]
        assert "is the old side of the disk vda" in refusal(server)

    server.disks = [f"vda={target.uri()}"]
    server.restart()
    with connected(server.uri()) as guest:
        assert guest.pread(3, 0) == b"new"
    server.stop()

    server.disks = [f"vda={disk}"]
    accept(server)
    server.restart()
    with connected(server.uri()) as guest:
        assert guest.pread(3, 0) != b"new"
    server.stop()
    server.options = server.options[:-2]
    server.restart()  # it is the disk again, from then on


def test_what_is_accepted_is_one_pivot(
    start: Start, server: Kept, target: QemuNbd, disk: Path
) -> None:
    """There and back again, with the switch left in the command: the next pivot counts, after a
    crash too, until it is accepted beside the first one."""
    begin(server, target).wait_ready()
    server.qmp.complete()
    server.kill()
    first = accept(server)
    begin_again = server.restart()
    begin_again.add_target("t", target)
    begin_again.start_mirror("t", device="vda", granularity=GRANULE)
    begin_again.wait_ready()
    begin_again.complete()
    server.kill()
    said = refusal(server)
    assert "is not the disk any more" in said and first not in said
    command = server.options
    assert accept(server) != first
    server.restart()
    server.stop()
    server.options = command
    server.restart().add_target("t", target)  # a third move, from the side that was accepted
    server.qmp.start_mirror("t", device="vda", granularity=GRANULE)
    server.qmp.wait_ready()
    server.qmp.complete()
    server.kill()
    assert "is not the disk any more" in refusal(server)
    server.disks = [f"vda={target.uri()}"]
    server.restart()  # where it does not matter
    server.stop()
    assert_identical(disk, target.image)


@ends
def test_a_disk_with_bitmaps_is_accepted(server: Kept, target: QemuNbd, end: End) -> None:
    """They know nothing of what was written on the other side: all of them is dirty."""
    add(server.qmp)
    begin(server, target).wait_ready()
    server.qmp.complete()
    end(server)
    accept(server)
    server.restart()
    nodes = server.qmp.execute("query-named-block-nodes")
    bitmap = next(n for n in nodes if n["node-name"] == "vda")["dirty-bitmaps"][0]
    assert (bitmap["name"], bitmap["count"]) == ("b", SIZE)
    end(server)
    server.restart()


def test_a_record_that_cannot_be_read_is_accepted_by_its_id(server: Kept, target: QemuNbd) -> None:
    begin(server, target).wait_ready()
    server.qmp.complete()
    server.kill()
    record = server.state / "vda.pivoted"
    record.write_bytes(record.read_bytes()[:-9])
    accept(server)
    server.restart()
    assert not record.exists()


@pytest.mark.parametrize("said", ["true", "yes", "3F9A60C2", "3f9a60c", "all", "*"])
def test_what_is_no_id_is_refused(server: Kept, said: str) -> None:
    server.stop()
    server.options = (*server.options, "--accept-old-side", said)
    assert "expected the 8 digits that the refusal" in refusal(server)


def test_the_new_side_by_any_name(start: Start, folder: Path, disk: Path) -> None:
    """However it is spelt, it is served; what may be something else is not."""
    target = start(OnTcp(folder, make_image(folder / "target.img", SIZE)))
    server = start(Kept(folder, disk))
    server.qmp.execute(
        "drive-mirror", device="vda", target=target.uri(), sync="full", mode="existing"
    )
    server.qmp.wait_ready("vda")
    server.qmp.complete("vda")
    server.stop()
    for host in ("localhost", "[::ffff:127.0.0.1]", "127.1"):
        server.disks = [f"vda={target.uri(host=host)}"]
        server.restart()
        server.stop()
    copy = folder / "copy.img"
    copy.write_bytes(target.image.read_bytes())
    for other in (target.uri(host="127.0.0.2"), str(copy), str(target.image)):
        server.disks = [f"vda={other}"]
        assert "may be the disk's old side" in refusal(server)


@ends
def test_the_way_back_goes_on(start: Start, target: QemuNbd, folder: Path, end: End) -> None:
    """A mirror to the old source, which is a node of the disk's name: after a restart that name is
    the disk's alone."""
    source = start(QemuNbd(folder, make_image(folder / "source.img", SIZE)))
    server = start(Kept(folder, source.uri()))
    begin(server, target).wait_ready()
    server.qmp.complete()
    server.qmp.start_mirror("vda", device="t", granularity=GRANULE)
    server.qmp.wait_ready()
    settle(server, "t")  # "vda" is the node of the old source, a target now
    end(server)
    server.disks = [f"vda={target.uri()}"]
    qmp = server.restart()
    assert finish(server) == 0
    assert qmp.execute("query-block")[0]["inserted"]["file"] == source.uri()
    server.stop()
    assert_identical(source.image, target.image)


@pytest.mark.guarantee("Which side is the disk is never ambiguous")
def test_back_and_forth(start: Start, server: Kept, target: QemuNbd, folder: Path) -> None:
    """After a pivot to B and one to C, neither A nor B is the disk."""
    third = start(QemuNbd(folder, make_noise(folder / "third.img", SIZE, 7)))
    qmp = begin(server, target)
    qmp.wait_ready()
    qmp.complete()
    qmp.add_target("c", third)
    qmp.start_mirror("c", device="vda")
    qmp.wait_ready()
    qmp.complete()
    a = server.disks
    server.kill()
    assert "not the disk any more" in refusal(server)
    server.disks = [f"vda={target.uri()}"]
    assert "not the disk any more" in refusal(server)
    server.disks = [f"vda={third.uri()}"]
    server.restart().start_mirror(target.uri(), device="vda")
    server.qmp.wait_ready()
    server.qmp.complete()
    server.stop()
    server.disks = [f"vda={third.uri()}"]
    assert "not the disk any more" in refusal(server)
    assert a != server.disks


def test_a_target_that_comes_later_than_its_server(
    identical: Identical, start: Start, server: Kept, target: QemuNbd, disk: Path
) -> None:
    """After a power cut on a whole site nobody knows who is up first: the mirror waits, whatever
    the policy says."""
    begin(server, target).wait_ready()
    settle(server)
    server.kill()
    target.kill()
    server.allowed.append("WARNING")
    qmp = server.restart()
    with connected(server.uri()) as guest:
        guest.pwrite(b"x" * 5000, 70_000)
    assert qmp.job()["status"] == "running"
    target.socket.unlink(missing_ok=True)
    target.start()
    assert finish(server) == GRANULE
    identical(disk, target.image)


def test_mirror_to_does_not_begin_a_second_one(
    start: Start, folder: Path, target: QemuNbd, disk: Path
) -> None:
    server = start(Kept(folder, disk, "--mirror-to", target.uri()))
    wait_until(lambda: any(j["ready"] for j in server.qmp.execute("query-block-jobs")), "READY")
    settle(server)
    server.kill()
    server.restart()
    assert finish(server, "vda") == 0
    assert_identical(disk, target.image)


@pytest.mark.parametrize("has_bitmap", [False, True])
def test_killed_between_the_files_of_a_pivot(
    server: Kept, target: QemuNbd, disk: Path, has_bitmap: bool
) -> None:
    """The record of the pivot is there, and the definition is of before. The new side is served, as
    the refusal of the old one says, and has the bitmaps."""
    begin(server, target).wait_ready()
    if has_bitmap:
        add(server.qmp)
        with connected(server.uri()) as guest:
            guest.pwrite(b"x", 5 * MiB)
    settle(server)
    before = (server.state / "vda.json").read_bytes()
    server.qmp.complete()
    server.kill()
    (server.state / "vda.json").write_bytes(before)
    assert target.uri() in refusal(server)
    server.disks = [f"vda={target.uri()}"]
    qmp = server.restart()
    assert qmp.execute("query-block-jobs") == []
    if has_bitmap:
        assert int(str(bitmaps(server)["b"]["count"])) >= GRANULE
    assert (server.state / "vda.json").exists() == has_bitmap
    server.stop()
    server.disks = [f"vda={disk}"]
    assert "is not the disk any more" in refusal(server)
