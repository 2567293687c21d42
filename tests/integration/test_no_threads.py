"""No thread can be started for a while: the user's limit, or the unit's, counts guests' threads
too. What needs one waits, and goes on when there is one; nothing fails or hangs for good."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from support.clients import connected, nbd_errno
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_image, make_noise
from support.losing import Lossy
from support.processes import patched
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.threads import NO_THREAD

SIZE = 4 * MiB

REFUSING = """
import os, threading

for name in ("_start_new_thread", "_start_joinable_thread"):
    start = getattr(threading, name, None)

    def refuse(*arguments, start=start, **options):
        if os.path.exists({flag!r}):
            raise RuntimeError("can't start new thread")
        return start(*arguments, **options)

    if start is not None:
        setattr(threading, name, refuse)
"""
"""As Python says it, while the file is there."""


class Limited(Nbdmirror):
    """nbdmirror that can be kept from starting threads."""

    @property
    def flag(self) -> Path:
        return self.folder / "no-threads"

    def environment(self) -> dict[str, str]:
        code = REFUSING.format(flag=str(self.flag))
        return patched(super().environment(), self.folder, code)


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def target(start: Start, folder: Path) -> Lossy:
    return start(Lossy(folder, make_noise(folder / "target.img", SIZE)))


@pytest.fixture
def server(start: Start, folder: Path, disk: Path) -> Limited:
    server = start(Limited(folder, f"vda={disk}"))
    server.allowed.append(f"{NO_THREAD[:20]}|connection lost|not flushed|lost: |is lost")
    return server


def test_a_copy(start: Start, identical: Identical, server: Limited, disk: Path) -> None:
    """The threads that wait for the source's file start when the copy begins."""
    target = start(QemuNbd(server.folder, make_noise(server.folder / "target.img", SIZE)))
    server.qmp.add_target("t", target)
    server.flag.touch()
    server.qmp.start_mirror("t", device="vda")
    wait_until(lambda: NO_THREAD in server.stderr, "the server says so")
    server.flag.unlink()
    server.qmp.wait_ready()
    server.qmp.complete()
    identical(disk, target.image)


def test_a_target_that_is_lost(
    identical: Identical, server: Limited, target: Lossy, disk: Path
) -> None:
    where = {"type": "unix", "path": str(target.socket)}
    options = {"driver": "nbd", "server": where, "reconnect_delay": 60}
    server.qmp.execute("blockdev-add", node_name="t", **options)
    with Guest(server.uri("vda"), disk) as guest:
        server.qmp.start_mirror("t", device="vda")
        server.qmp.wait_ready()
        server.flag.touch()
        target.kill()
        wait_until(lambda: NO_THREAD in server.stderr, "the server says so")
        (shown,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
        assert shown["target-lost-reason"] == NO_THREAD
        target.come_back()
        server.flag.unlink()
        guest.wait_for_requests(20)
        server.qmp.complete()
        guest.wait_for_requests(20)
    identical(guest, target.image)


def test_the_disks_own_server_is_lost(server: Limited, target: Lossy) -> None:
    """After a pivot, and while guests are at work: they want more connections, each opened by a
    thread."""
    server.qmp.start_mirror(target.uri(), device="vda")
    server.qmp.wait_ready()
    server.flag.touch()
    server.qmp.complete()
    with connected(server.uri("vda")) as guest:
        for number in range(1000):
            guest.pwrite(b"x" * 512, 512 * number)
        guest.flush()
        target.kill()
        assert nbd_errno(guest.pread, 512, 0) == errno.EIO, "as long as there is no thread"
        target.come_back()
        server.flag.unlink()
        wait_until(lambda: "connected again" in server.stderr, "the server is there again")
        assert guest.pread(512, 0) == b"x" * 512


def test_commands_and_the_end(server: Limited, target: Lossy) -> None:
    server.flag.touch()
    asked = {"device": "vda", "target": target.uri(), "mode": "existing", "sync": "full"}
    text = server.qmp.refusal("drive-mirror", **asked)
    assert text.startswith(NO_THREAD)
    assert server.qmp.refusal("quit").startswith(NO_THREAD)
    with connected(server.uri("vda")) as guest:
        guest.pwrite(b"x" * 512, 0)
        server.stop()
