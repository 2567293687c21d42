"""The side that the disk has left, as a target only: who may do what there. Nobody but the server
that has the disk."""

from __future__ import annotations

import errno
import subprocess

import nbd
import pytest
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
    server_id,
    start_as_target,
    way_in,
)
from support.clients import connected, nbd_errno
from support.fixtures import Start
from support.images import MiB, assert_identical, make_noise
from support.kept import Kept, refusal
from support.servers import QemuNbd
from support.waiting import wait_until


@pytest.mark.guarantee("Which side is the disk is never ambiguous")
def test_no_request_of_a_guest_is_carried_out(a: Kept, b: Kept) -> None:
    """Not before the mirror home, not while it runs, and not when all was written: what a guest
    wrote then, it would lose. The guest that waits there, as a QEMU that a running guest is to
    come to, has the disk once that is home."""
    gone_to(a, b)
    start_as_target(a)
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 8M 4k", a.uri("vda")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Operation not permitted" in done.stdout + done.stderr
    with connected(a.uri("vda")) as guest:
        assert guest.get_size() == SIZE and refuses_all(guest)
        a.wait_to_say("refused a client's request: target only, the disk is served from")
        begin(b, a, speed=4 * MiB, buf_size=MiB)
        wait_until(lambda: b.qmp.job()["offset"], "a part is copied")
        assert refuses_all(guest)
        b.qmp.execute("block-job-set-speed", device="j", speed=0)
        b.qmp.wait_ready()
        assert refuses_all(guest)
        b.qmp.complete()
        assert not role(a), "A hears of it before the job has completed"
        assert_identical(image(a), image(b))
        assert guest.pread(3, 0) == b"new" and not refuses_all(guest)


def test_only_the_server_with_the_disk_writes_there(a: Kept, b: Kept, start: Start) -> None:
    """Another nbdmirror cannot mirror there, nor can one that says it is the right one, nor a
    server process of before; two never write there at once."""
    gone_to(a, b)
    start_as_target(a)
    other = start(Kept(a.folder, make_noise(a.folder / "c.img", SIZE), state="state-c"))
    other.allowed.append(".*")
    arguments = {"device": "vda", "target": a.uri("vda"), "sync": "full", "mode": "existing"}
    assert "is the old side of a disk" in other.qmp.refusal("drive-mirror", **arguments)
    for asker in ("", "x", server_id(other), server_id(a)):
        with pytest.raises(nbd.Error):
            nbd.NBD().connect_uri(way_in(a, asker))
    with connected(way_in(a, server_id(b))) as before:
        assert nbd_errno(before.pwrite, b"x" * 512, 0) == 0
        b.allowed.append(".*")
        b.kill()
        b.restart()
        begin(b, a)
        b.qmp.wait_ready()
        assert nbd_errno(before.pwrite, b"x" * 512, 0) == errno.EPERM
    assert "is the old side of a disk" in other.qmp.refusal("drive-mirror", **arguments)
    for asker in ("", "x", server_id(other)):  # though all of it was written
        with connected(a.uri(f"x-nbdmirror-moved-here/{asker}/vda")):
            assert role(a) == b.uri("vda")
    b.qmp.complete()
    b.stop()
    assert read(a, 3) == b"new" and not role(a)
    assert_identical(image(a), image(b))


def test_nothing_is_read_there_that_was_not_written(a: Kept, b: Kept) -> None:
    """Not even by the server that has the disk. Another start begins from nothing."""
    gone_to(a, b)
    start_as_target(a)
    asker = server_id(b)
    with connected(way_in(a, asker)) as mirror:
        assert mirror.get_size() == SIZE
        mirror.trim(MiB, 0)
        assert nbd_errno(mirror.pread, 512, 0) == errno.EPERM
        mirror.pwrite(b"x" * 700, 100)
        mirror.zero(MiB, 2 * MiB)
        mirror.flush()
        assert mirror.pread(700, 100) == b"x" * 700 and not any(mirror.pread(MiB, 2 * MiB))
        assert nbd_errno(mirror.pread, 702, 99) == errno.EPERM
        assert nbd_errno(mirror.pread, MiB + 1, 2 * MiB) == errno.EPERM
    a.kill()
    start_as_target(a)
    with connected(way_in(a, asker)) as mirror:
        assert nbd_errno(mirror.pread, 700, 100) == errno.EPERM
    move(b, a)


@pytest.mark.parametrize("how", ["SIGTERM", "quit"])
def test_a_guest_that_is_there_at_the_end_is_not_met_by_a_target_only(
    a: Kept, b: Kept, how: str
) -> None:
    """It would get errors. As after a crash it finds no server, and waits as it was told to."""
    begin(a, b)
    a.qmp.wait_ready()
    a.qmp.complete()
    assert_identical(image(a), image(b))
    with connected(a.uri("vda")) as guest:
        guest.pwrite(b"new", 0)
        if how == "quit":
            a.qmp.execute("quit")
        a.stop()
    assert read(b, 3) == b"new"
    assert REFUSED in refusal(a)


@pytest.mark.parametrize("how", ["none", "top", "target-is-zero"])
def test_a_mirror_that_does_not_write_all_is_no_way_home(a: Kept, b: Kept, how: str) -> None:
    gone_to(a, b)
    start_as_target(a)
    options = {how: True} if how == "target-is-zero" else {"sync": how}
    said = b.qmp.refusal(
        "drive-mirror", device="vda", job_id="j", target=a.uri("vda"), mode="existing",
        **{"sync": "full", **options},
    )  # fmt: skip
    assert "mirror all of it" in said
    assert not b.qmp.execute("query-block-jobs")
    move(b, a)


def test_a_target_only_is_no_disk_to_mirror(a: Kept, b: Kept, target: QemuNbd) -> None:
    gone_to(a, b)
    start_as_target(a)
    arguments = {"device": "vda", "target": target.uri(), "sync": "full", "mode": "existing"}
    assert "is a target only" in a.qmp.refusal("drive-mirror", **arguments)
    said = a.qmp.refusal("block-dirty-bitmap-add", node="vda", name="x", persistent=True)
    assert "is a target only" in said
    move(b, a)


def test_the_questions_are_no_exports(a: Kept, b: Kept) -> None:
    """No list has them, no disk can be called so, and of no disk they are refused."""
    listed = subprocess.run(
        ["nbdinfo", "--list", "--json", a.uri("")], capture_output=True, text=True, check=True
    ).stdout
    assert "x-nbdmirror" not in listed
    with connected(a.uri("x-nbdmirror-side/x/vda")) as asked:
        assert asked.get_size() == 0 and asked.is_read_only()
    with connected(a.uri("x-nbdmirror-moved-here/x/vda")) as asked:
        assert asked.get_size() == 0
    a.allowed.append("no export is called")
    with pytest.raises(nbd.Error):
        nbd.NBD().connect_uri(a.uri("x-nbdmirror-side/x/other"))
    with pytest.raises(nbd.Error):
        nbd.NBD().connect_uri(a.uri("x-nbdmirror-other/x/vda"))
    b.stop()
    b.disks = [f"x-nbdmirror-side/vda={image(b)}"]
    assert "no such disk" in refusal(b)
