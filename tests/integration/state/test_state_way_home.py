"""The disk moves back and forth between two hosts: what may end or be killed on the way, and which
side is the disk then."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from integration.state.stateparts import SIZE
from integration.state.wayhome import (
    REFUSED,
    begin,
    gone_to,
    image,
    move,
    read,
    refuses_all,
    role,
    start_as_target,
    write,
)
from support.clients import connected, nbd_errno
from support.fixtures import Start
from support.images import MiB, assert_identical, make_empty, make_image
from support.kept import Kept, refusal
from support.mounts import loop_device
from support.servers import NbdkitTarget, QemuNbd
from support.waiting import wait_until

from nbdmirror.state.sealed_files import seal, unseal


def test_back_and_forth_by_commands_that_never_change(a: Kept, b: Kept) -> None:
    gone_to(a, b)
    start_as_target(a)
    assert role(a) == b.uri("vda")
    move(b, a)
    assert read(a, 3) == b"new" and not role(a)
    write(a, b"third")
    a.kill()
    a.restart()  # it is the disk, whatever ends it
    assert read(a, 5) == b"third" and not role(a)
    start_as_target(b)
    move(a, b)
    assert read(b, 5) == b"third"
    write(b, b"fourth")
    start_as_target(a)
    begin(b, a)
    b.qmp.wait_ready()
    a.allowed.append("error: (read|write)|NBD_OPT")  # B may be killed while it says so to A
    b.qmp.complete()
    b.kill()
    assert read(a, 6) == b"fourth"
    assert REFUSED in refusal(b)
    a.stop()
    assert_identical(image(a), image(b))


def test_after_a_crash_the_old_side_is_refused(a: Kept, b: Kept) -> None:
    """A guest may come back to it."""
    begin(a, b)
    a.qmp.wait_ready()
    a.qmp.complete()
    b.allowed.append("reset by peer")
    a.kill()
    assert REFUSED in refusal(a)
    assert_identical(image(a), image(b))


def test_a_crash_of_the_server_of_the_new_side_counts_too(a: Kept, b: Kept) -> None:
    """Served from where the disk is by A's own state directory, and ended in order before, A's
    server is killed: guests may come back to it."""
    move(a, b)
    file = a.disks
    a.disks = [f"vda={b.uri('vda')}"]
    a.restart()
    a.kill()
    a.disks = file
    assert REFUSED in refusal(a)
    a.disks = [f"vda={b.uri('vda')}"]
    a.restart()
    a.stop()
    a.disks = file
    start_as_target(a)


def test_the_old_side_cannot_write_down_that_it_is_the_disk(a: Kept, b: Kept) -> None:
    """It stays a target only. Both logs say so, and what to do; the data is there."""
    gone_to(a, b)
    start_as_target(a)
    begin(b, a)
    b.qmp.wait_ready()
    record = a.state / "vda.pivoted"
    away = record.rename(a.folder / "away")
    record.mkdir()  # cannot be removed as a file is
    for server in (a, b):
        server.allowed.append(".*")
    b.qmp.complete()
    assert role(a) == b.uri("vda")
    assert_identical(image(a), image(b))
    with connected(b.uri("vda")) as guest:
        guest.pwrite(b"later", 0)
        guest.flush()
    with connected(a.uri("vda")) as guest:
        assert refuses_all(guest)
    assert "it needs --accept-old-side" in b.stderr and "stays a target only" in a.stderr
    b.kill()
    record.rmdir()
    away.rename(record)
    assert "as a target only: end that server" in refusal(b)
    a.kill()
    refused = refusal(a)
    a.options = (*a.options, "--accept-old-side", refused.partition("--accept-old-side ")[2][:8])
    a.restart()
    assert read(a, 5) == b"later" and not role(a)


def test_a_place_of_the_disk_that_cannot_be_reached(a: Kept, b: Kept) -> None:
    move(a, b)
    b.stop()
    assert REFUSED in refusal(a)


def test_a_place_of_the_disk_that_is_no_nbdmirror(
    start: Start, folder: Path, a: Kept, b: Kept
) -> None:
    """qemu-nbd knows no such export, and nbdkit serves one by any name and describes nothing."""
    move(a, b)
    b.stop()
    for server in (
        QemuNbd(folder, image(b), export="vda"),
        NbdkitTarget(folder, "file", str(image(b))),
    ):
        server.socket = b.socket
        with server:
            assert REFUSED in refusal(a)
    b.restart()
    start_as_target(a)


def test_a_way_home_that_is_cancelled(a: Kept, b: Kept) -> None:
    gone_to(a, b)
    start_as_target(a)
    begin(b, a, speed=4 * MiB, buf_size=MiB)
    wait_until(lambda: b.qmp.job()["offset"], "a part is copied")
    b.qmp.execute("block-job-cancel", device="j", force=True)
    b.qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")
    assert role(a) and read(b, 3) == b"new"
    with connected(a.uri("vda")) as guest:
        assert nbd_errno(guest.pread, 512, SIZE - 512) == errno.EPERM
    move(b, a)
    assert not role(a)


def test_the_disks_server_is_killed_on_the_way_home(a: Kept, b: Kept) -> None:
    """Its mirror goes on when it is back, and comes home."""
    gone_to(a, b)
    a.options = (*a.options, "--threads", "1")  # an nbdkit before 1.34 may end with its client
    start_as_target(a)
    begin(b, a, speed=4 * MiB, buf_size=MiB)
    wait_until(lambda: b.qmp.job()["offset"], "a part is copied")
    b.kill()
    assert role(a)
    b.restart().execute("block-job-set-speed", device="j", speed=0)
    wait_until(lambda: b.qmp.job()["ready"], "the mirror is ready")
    b.qmp.complete()
    b.stop()
    assert read(a, 3) == b"new" and not role(a)
    assert_identical(image(a), image(b))


def test_the_target_is_killed_on_the_way_home(a: Kept, b: Kept) -> None:
    """What it had before it was killed counts no more: the mirror does not go on onto it, another
    one does."""
    gone_to(a, b)
    start_as_target(a)
    b.allowed.append(".*")
    begin(b, a, **{"x-nbdmirror-reconnect-delay": 1})
    b.qmp.wait_ready()
    a.kill()
    start_as_target(a)
    b.qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")
    assert role(a) and read(b, 3) == b"new"
    move(b, a)
    assert not role(a)


def test_it_is_the_disk_though_it_is_killed_right_after(a: Kept, b: Kept) -> None:
    gone_to(a, b)
    start_as_target(a)
    move(b, a)
    a.kill()
    assert not (a.state / "vda.pivoted").exists()
    a.restart()
    assert read(a, 3) == b"new" and not role(a)


def test_persistent_bitmaps_are_there_again_and_all_dirty(a: Kept, b: Kept) -> None:
    a.qmp.execute("block-dirty-bitmap-add", node="vda", name="x", persistent=True)
    gone_to(a, b)
    start_as_target(a)
    move(b, a)

    def dirty() -> dict[str, int]:
        disk = a.qmp.execute("x-nbdmirror-query-status")["disks"][0]
        return {bitmap["name"]: bitmap["count"] for bitmap in disk["bitmaps"]}

    wait_until(lambda: dirty() == {"x": SIZE}, "the bitmap is there")
    a.stop()
    a.restart()
    assert dirty() == {"x": SIZE}


def test_an_nbd_source_as_the_old_side(start: Start, folder: Path, b: Kept) -> None:
    storage = start(QemuNbd(folder, make_image(folder / "storage.img", SIZE)))
    a = start(Kept(folder, storage.uri(), state="state-a"))
    begin(a, b)
    a.qmp.wait_ready()
    a.qmp.complete()
    a.stop()
    write(b, b"new")
    start_as_target(a)
    with connected(a.uri("vda")) as guest:
        assert nbd_errno(guest.pread, 512, 0) == errno.EPERM
    begin(b, a)
    b.qmp.wait_ready()
    b.qmp.complete()
    b.stop()
    assert read(a, 3) == b"new" and not role(a)
    a.stop()
    assert_identical(storage.image, image(b))


def test_a_block_device_by_another_name(start: Start, folder: Path, b: Kept) -> None:
    with loop_device(make_empty(folder / "device.img", SIZE)) as device:
        alias = folder / "alias"
        alias.symlink_to(device)
        a = start(Kept(folder, device, state="state-a"))
        move(a, b)
        write(b, b"new")
        a.disks = [f"vda={alias}"]
        start_as_target(a)
        with connected(a.uri("vda")) as guest:
            assert nbd_errno(guest.pread, 512, 0) == errno.EPERM
        move(b, a)
        assert read(a, 3) == b"new" and not role(a)
        a.stop()


def test_a_record_of_an_older_version_does_not_say_that_its_server_ended(a: Kept, b: Kept) -> None:
    """So its side is refused. The ID of a record is the same whether it says so or not."""
    move(a, b)
    record = a.state / "vda.pivoted"
    with_flag = record.read_bytes()
    said = json.loads(unseal("pivoted", with_flag))
    assert said.pop("has_ended") is True
    record.write_bytes(seal("pivoted", json.dumps(said, indent=1).encode()))
    refused = refusal(a)
    record.write_bytes(with_flag)
    b.stop()
    assert refusal(a) == refused
    a.options = (*a.options, "--accept-old-side", refused.partition("--accept-old-side ")[2][:8])
    a.allowed.append("WARNING")
    a.restart()
    assert not record.exists() and not role(a)
    a.stop()
    assert_identical(image(a), image(b))
