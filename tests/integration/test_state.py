"""What outlives the process (--state-dir): mirrors and persistent bitmaps over orderly ends, killed
processes and power cuts; what is refused, and what is copied again.

A power cut is a killed process whose memory is taken away (`lose_memory`): the bitmaps that were
last saved and the log of intents are what is left. That every byte of the files may be lost in a
crash is tests/test_powerloss.py's affair.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest
from clients import connected
from fixtures import Identical, Start
from guests import Guest
from images import KiB, MiB, assert_identical, make_image, make_noise
from kept import Kept, power_cut, refusal
from mounts import mounted
from processes import patched
from qmpclient import Qmp
from servers import Nbdmirror, QemuNbd
from waiting import InThread, wait_until

SIZE = 32 * MiB
GRANULE = 64 * KiB
TOLD = r"ERROR: (state|disk|job)|refused|put aside|counts as dirty|lost"
"""What a server says of a state that it cannot use."""


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def target(start: Start, folder: Path) -> QemuNbd:
    return start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))


@pytest.fixture
def server(start: Start, folder: Path, disk: Path) -> Kept:
    return start(Kept(folder, disk))


def begin(server: Kept, target: QemuNbd, **options: object) -> Qmp:
    qmp = server.qmp
    qmp.add_target("t", target)
    qmp.start_mirror("t", device="vda", granularity=GRANULE, **options)
    return qmp


def settle(server: Kept) -> None:
    """Have what is dirty saved twice: the second time takes regions that were written to before the
    first one out of the log. A command about a persistent bitmap is answered when that is done."""
    for _ in range(2):
        server.qmp.execute("block-dirty-bitmap-add", node="vda", name="x", persistent=True)
        server.qmp.execute("block-dirty-bitmap-remove", node="vda", name="x")


def finish(server: Kept, job: str = "j") -> int:
    """Complete the mirror; returns how many bytes it has copied since its server began."""
    qmp = server.qmp
    wait_until(lambda: qmp.job(job)["ready"], "the mirror is ready")
    return int(qmp.complete(job)["offset"])


END: dict[str, Callable[[Kept], None]] = {
    "orderly end": Kept.stop,
    "killed": Kept.kill,
    "power cut": power_cut,
}
ends = pytest.mark.parametrize("end", END.values(), ids=END.keys())
End = Callable[[Kept], None]


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


@ends
def test_what_was_written_while_the_target_hung_is_copied(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, end: End
) -> None:
    """Dirty, and in flight, when the process ends; and no more than that is copied again."""
    begin(server, target).wait_ready()
    settle(server)
    os.kill(target.pid, signal.SIGSTOP)
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

    server.disks = [f"vda={target.uri()}"]
    server.restart()
    with connected(server.uri()) as guest:
        assert guest.pread(3, 0) == b"new"
    server.stop()

    server.disks, server.options = [f"vda={disk}"], (*server.options, "--accept-old-side")
    server.allowed.append("WARNING|removed")
    server.restart()
    with connected(server.uri()) as guest:
        assert guest.pread(3, 0) != b"new"
    server.stop()
    server.options = server.options[:-1]
    server.restart()  # it is the disk again, from then on


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
    settle(server)
    end(server)
    server.disks = [f"vda={target.uri()}"]
    qmp = server.restart()
    assert finish(server) == 0
    assert qmp.execute("query-block")[0]["inserted"]["file"] == source.uri()
    server.stop()
    assert_identical(source.image, target.image)


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


# Bitmaps.


def add(qmp: Qmp, name: str = "b", **options: object) -> None:
    qmp.execute(
        "block-dirty-bitmap-add", node="vda", name=name, granularity=GRANULE, persistent=True,
        **options,
    )  # fmt: skip


def bitmaps(server: Kept) -> dict[str, dict[str, object]]:
    nodes = server.qmp.execute("query-named-block-nodes")
    found = next(n for n in nodes if n["node-name"] == "vda").get("dirty-bitmaps", [])
    return {bitmap["name"]: bitmap for bitmap in found if "name" in bitmap}


@ends
def test_persistent_bitmaps_are_there_again(server: Kept, end: End) -> None:
    qmp = server.qmp
    add(qmp)
    add(qmp, "off", disabled=True)
    qmp.execute("block-dirty-bitmap-add", node="vda", name="gone")
    with connected(server.uri()) as guest:
        guest.pwrite(b"x", 5 * MiB)
        guest.zero(GRANULE, 7 * MiB)
        guest.trim(GRANULE, 9 * MiB)
    before = bitmaps(server)
    assert before["b"]["persistent"] and before["b"]["count"] == 3 * GRANULE
    end(server)
    server.restart()
    after = bitmaps(server)
    assert set(after) == {"b", "off"}
    count = int(str(after["b"]["count"]))
    assert count == 3 * GRANULE or (end is power_cut and 3 * GRANULE < count <= 3 * MiB)
    assert not after["off"]["recording"]
    assert after["off"]["count"] == 0 or end is power_cut


@ends
def test_an_increment_after_a_restart(
    identical: Identical, start: Start, folder: Path, server: Kept, disk: Path, end: End
) -> None:
    """The copy is brought up to date with what was written since, over a restart in between."""
    copy = folder / "copy.img"
    shutil.copyfile(disk, copy)
    add(server.qmp)
    with connected(server.uri()) as guest:
        for number in range(20):
            guest.pwrite(bytes([number + 1]) * 5000, number * 1_500_000)
    end(server)
    qmp = server.restart()
    target = start(QemuNbd(folder, copy))
    qmp.add_target("t", target)
    qmp.start_mirror("t", device="vda", sync="bitmap", bitmap="b")
    qmp.wait_ready()
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()
    assert bitmaps(server)["b"]["count"] == 0
    identical(disk, copy)


def test_commands_about_bitmaps_are_kept_when_they_are_answered(server: Kept) -> None:
    qmp = server.qmp
    for name in ("a", "b", "c"):
        add(qmp, name)
    with connected(server.uri()) as guest:
        guest.pwrite(b"x", 0)
    qmp.execute("block-dirty-bitmap-disable", node="vda", name="a")
    qmp.execute("block-dirty-bitmap-clear", node="vda", name="b")
    qmp.execute("block-dirty-bitmap-merge", node="vda", target="b", bitmaps=["a"])
    qmp.execute("block-dirty-bitmap-remove", node="vda", name="c")
    qmp.execute("block-dirty-bitmap-enable", node="vda", name="a")
    power_cut(server)
    server.restart()
    found = bitmaps(server)
    assert set(found) == {"a", "b"} and found["a"]["recording"]
    assert int(str(found["b"]["count"])) >= GRANULE


def test_a_guests_write_that_hangs_does_not_keep_control_waiting(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path
) -> None:
    """What bitmaps have is put on disk when the writes under way have ended; those that wait for a
    target that hangs do not, and the client that is to cancel the job must be answered."""
    qmp = begin(server, target, copy_mode="write-blocking")
    qmp.wait_ready()
    with connected(server.uri()) as guest:
        os.kill(target.pid, signal.SIGSTOP)
        try:
            write = InThread(lambda: guest.pwrite(b"x" * GRANULE, MiB))
            wait_until(lambda: server.job_status()["in-flight-bytes"], "the write is under way")
            name = {"node": "vda", "name": "b", "persistent": True}
            text = qmp.refusal("block-dirty-bitmap-add", **name)
            assert text == "Done, and not yet kept: guests' writes that are under way do not end"
            assert set(bitmaps(server)) == {"b"}
            qmp.execute("block-job-cancel", device="j", force=True)
            qmp.wait_status("null")
            write.result()
        finally:
            os.kill(target.pid, signal.SIGCONT)
        qmp.execute("block-dirty-bitmap-clear", node="vda", name="b")
        guest.pwrite(b"y", 0)
    server.kill()
    server.restart()
    assert bitmaps(server)["b"]["count"] == GRANULE
    begin(server, target).wait_ready()
    server.qmp.complete()
    identical(disk, target.image)


def test_without_a_state_directory_bitmaps_are_refused_as_by_qemu(
    start: Start, folder: Path, disk: Path
) -> None:
    qmp = start(Nbdmirror(folder, f"vda={disk}")).qmp
    text = qmp.refusal("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
    assert text == "Can't store persistent bitmaps to vda: Operation not supported"


# What cannot be believed.


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def other_version(path: Path) -> None:
    content = path.read_bytes()
    for kind in (b"disk", b"bitmaps", b"pivoted"):
        content = content.replace(b"nbdmirror %s 1 " % kind, b"nbdmirror %s 2 " % kind)
    path.write_bytes(content.replace(b"NBMI\1", b"NBMI\2"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = (truncate, flip, other_version, empty, Path.unlink)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bitmaps_that_cannot_be_read_are_all_dirty(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, damage: Callable[[Path], None]
) -> None:
    begin(server, target).wait_ready()
    settle(server)
    server.stop()
    damage(server.state / "vda.bitmaps")
    server.allowed.append(TOLD)
    server.restart()
    assert "everything counts as dirty" in server.stderr
    assert finish(server) == SIZE
    identical(disk, target.image)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_log_that_cannot_be_read(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, damage: Callable[[Path], None]
) -> None:
    """After a power cut it is needed; after a killed process it is not."""
    begin(server, target).wait_ready()
    settle(server)
    server.kill()
    damage(server.state / "vda.intents")
    server.restart()
    with connected(server.uri()) as guest:
        guest.pwrite(b"x" * GRANULE, 0)
    power_cut(server)
    damage(server.state / "vda.intents")
    server.allowed.append(TOLD)
    server.restart()
    assert "everything counts as dirty" in server.stderr
    assert finish(server) == SIZE
    identical(disk, target.image)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_definition_that_cannot_be_read_is_put_aside(
    server: Kept, target: QemuNbd, disk: Path, damage: Callable[[Path], None]
) -> None:
    """Nobody knows then what there was; it is told, and begins anew when asked to."""
    begin(server, target).wait_ready()
    settle(server)
    server.kill()
    damage(server.state / "vda.json")
    server.allowed.append(TOLD)
    qmp = server.restart()
    if damage is not Path.unlink:
        assert "put aside" in server.stderr
        assert (server.state / "vda.json.refused").exists()
    assert qmp.execute("query-block-jobs") == []
    begin(server, target).wait_ready()
    assert finish(server) == SIZE
    assert_identical(disk, target.image)


@pytest.mark.parametrize("damage", [truncate, flip, other_version, empty])
def test_a_record_of_a_pivot_that_cannot_be_read(
    server: Kept, target: QemuNbd, damage: Callable[[Path], None]
) -> None:
    """Which side is the disk is not guessed."""
    begin(server, target).wait_ready()
    server.qmp.complete()
    server.kill()
    damage(server.state / "vda.pivoted")
    said = refusal(server)
    assert "vda.pivoted" in said and "--accept-old-side" in said


@ends
def test_a_disk_that_somebody_else_has_written_to(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, end: End
) -> None:
    begin(server, target).wait_ready()
    settle(server)
    end(server)
    later_s = time.time() + (120 if end is power_cut else 20)
    with disk.open("r+b") as file:
        file.seek(9 * MiB)
        file.write(b"somebody else")
    os.utime(disk, (later_s, later_s))  # a while after the server was last alive
    server.allowed.append(TOLD)
    server.restart()
    assert "was written to since" in server.stderr
    assert finish(server) == SIZE
    identical(disk, target.image)


def test_a_disk_that_was_replaced(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path
) -> None:
    begin(server, target).wait_ready()
    settle(server)
    server.stop()
    disk.unlink()
    make_image(disk, SIZE, seed=5)
    server.allowed.append(TOLD)
    server.restart()
    assert "another file is there now" in server.stderr
    assert finish(server) == SIZE
    identical(disk, target.image)


def test_a_disk_of_another_size(server: Kept, target: QemuNbd, disk: Path) -> None:
    """Its mirror cannot go on, and its bitmaps know nothing."""
    add(server.qmp)
    begin(server, target).wait_ready()
    server.stop()
    os.truncate(disk, SIZE + MiB)
    server.allowed.append(TOLD)
    qmp = server.restart()
    assert f"the disk had {SIZE} bytes, it has {SIZE + MiB}" in server.stderr
    assert f"the target has {SIZE} bytes, the disk {SIZE + MiB}" in server.stderr
    assert qmp.execute("query-block-jobs") == []
    assert bitmaps(server)["b"]["count"] == SIZE + MiB


def test_another_disk_of_the_same_name_is_refused(
    server: Kept, target: QemuNbd, folder: Path, disk: Path
) -> None:
    """Its mirror would go on, onto the target of the first one."""
    begin(server, target).wait_ready()
    server.stop()
    other = make_image(folder / "other.img", SIZE, seed=8)
    server.disks = [f"vda={other}"]
    said = refusal(server)
    assert f"is of {disk}, not of {other}" in said and "another name" in said
    disk.rename(folder / "moved.img")
    server.disks = [f"vda={folder / 'moved.img'}"]  # the same file by another name is the same
    server.restart()
    assert finish(server) == 0
    assert_identical(folder / "moved.img", target.image)


# The directory.


def test_one_server_at_a_time(server: Kept, folder: Path) -> None:
    other = Kept(folder, make_image(folder / "other.img", MiB))
    assert "is in use by another nbdmirror" in refusal(other)


@pytest.mark.parametrize("kind", ["file", "missing parent", "dangling link"])
def test_a_place_that_is_no_directory(folder: Path, disk: Path, kind: str) -> None:
    server = Kept(folder, disk)
    if kind == "file":
        server.state.write_text("mine")
    elif kind == "dangling link":
        server.state.symlink_to(folder / "nowhere")
    else:
        server.options = ("--state-dir", str(folder / "a" / "b"))
    assert "state-dir: " in refusal(server)
    if kind == "file":
        assert server.state.read_text() == "mine"


def test_its_files_are_the_owners_alone(server: Kept, target: QemuNbd) -> None:
    begin(server, target).wait_ready()
    settle(server)
    assert server.state.stat().st_mode & 0o777 == 0o700
    files = {path.name: path.stat().st_mode & 0o777 for path in server.state.iterdir()}
    assert files == dict.fromkeys(("lock", "vda.json", "vda.bitmaps", "vda.intents"), 0o600)
    memory = Path(str(server.definition()["memory"]))
    assert memory.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in memory.iterdir())


def test_links_in_it_are_not_followed(server: Kept, target: QemuNbd, folder: Path) -> None:
    precious = folder / "precious"
    precious.write_text("mine")
    server.stop()
    (server.state / "vda.intents").unlink(missing_ok=True)
    (server.state / "vda.intents").symlink_to(precious)
    assert "state-dir: " in refusal(server)
    (server.state / "vda.intents").unlink()
    (server.state / "vda.json.new").symlink_to(precious)
    server.restart()
    begin(server, target).wait_ready()
    settle(server)
    assert precious.read_text() == "mine"


def test_nothing_is_left_of_what_has_ended(server: Kept, target: QemuNbd) -> None:
    begin(server, target).wait_ready()
    settle(server)
    memory = Path(str(server.definition()["memory"]))
    server.qmp.execute("block-job-cancel", device="j", force=True)
    server.qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")
    assert {path.name for path in server.state.iterdir()} == {"lock", "vda.intents"}
    assert {path.name for path in memory.iterdir()} == {"alive", "journal"}
    server.stop()
    assert not memory.exists()


def test_a_state_directory_that_is_full(
    identical: Identical, start: Start, folder: Path, target: QemuNbd, disk: Path
) -> None:
    """Guests go on, it is told, and when there is room again all is kept again."""
    with mounted("tmpfs", "size=128k") as small:
        server = start(Kept(folder, disk))
        server.stop()
        server.state = small / "state"
        server.options = ("--state-dir", str(server.state))
        server.restart()
        begin(server, target).wait_ready()
        settle(server)
        filler = small / "filler"
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(os.urandom(4096))
        server.allowed.append(TOLD + "|state cannot be saved")
        with Guest(server.uri(), disk, connections=2) as guest:
            identical(guest, target.image)
            text = server.qmp.refusal(
                "block-dirty-bitmap-add", node="vda", name="b", persistent=True
            )
            assert "No space left on device" in text
            server.qmp.wait_for_event("X_NBDMIRROR_STATE_ERROR")
            guest.wait_for_requests(100)
            filler.unlink()
            settle(server)
            guest.wait_for_requests(100)
        power_cut(server)
        server.restart()
        assert finish(server) <= SIZE
        server.stop()


FAILING = """
import errno, os
fsync, fdatasync, flag = os.fsync, os.fdatasync, {flag!r}

def failing(call):
    def wrapped(fd):
        if os.path.exists(flag) and "/state" in os.readlink(f"/proc/self/fd/{{fd}}"):
            raise OSError(errno.EIO, "as ordered")
        return call(fd)
    return wrapped

os.fsync, os.fdatasync = failing(fsync), failing(fdatasync)
"""


class FailingState(Kept):
    """Its state directory fails with EIO while the file `flag` exists."""

    def environment(self) -> dict[str, str]:
        self.flag = self.folder / "fail"
        return patched(super().environment(), self.folder, FAILING.format(flag=str(self.flag)))


@pytest.mark.parametrize("ending", ["block-job-complete", "block-job-cancel"])
def test_a_state_directory_that_fails(
    identical: Identical, start: Start, folder: Path, target: QemuNbd, disk: Path, ending: str
) -> None:
    """Guests go on; the job does not end before its end is on disk; a forced cancel is heard."""
    server = start(FailingState(folder, disk))
    qmp = begin(server, target)
    qmp.wait_ready()
    settle(server)
    server.flag.touch()
    server.allowed.append(TOLD + "|cannot be saved|cannot be written down")
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.image if ending == "block-job-complete" else disk)
        qmp.execute(ending, device="j")
        qmp.wait_for_event("X_NBDMIRROR_STATE_ERROR")
        guest.wait_for_requests(200)
        assert qmp.job()["status"] in ("ready", "waiting", "pending")
        server.flag.unlink()
        qmp.wait_completed()
        guest.wait_for_requests(50)
    pivoted = (server.state / "vda.pivoted").exists()
    assert pivoted == (ending == "block-job-complete")


def test_a_forced_cancel_does_not_wait_for_a_state_directory_that_fails(
    start: Start, folder: Path, target: QemuNbd, disk: Path
) -> None:
    server = start(FailingState(folder, disk))
    qmp = begin(server, target)
    qmp.wait_ready()
    server.flag.touch()
    server.allowed.append(TOLD + "|cannot be saved")
    qmp.execute("block-job-cancel", device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED", 5, device="j")
    server.flag.unlink()
    wait_until(lambda: not (server.state / "vda.json").exists(), "it is tried again")


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
