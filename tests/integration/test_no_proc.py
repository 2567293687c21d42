"""A server without /proc, as in a chroot, an initrd or a minimal container: guests and mirrors
work, and one warning says what is not known."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_image, make_noise
from support.processes import run
from support.servers import Nbdmirror, QemuNbd

SIZE = 4 * MiB
INSIDE = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
WARNING = "warning: /proc is not mounted"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or bool(run(*INSIDE, "true", check=False).returncode),
    reason="only root can have other mounts, in a container that is privileged",
)


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def target(start: Start, folder: Path) -> QemuNbd:
    return start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))


def without_proc(disk: Path, *options: str) -> Nbdmirror:
    server = Nbdmirror(disk.parent, f"vda={disk}", options=options)
    server.inside = INSIDE
    return server


def refusal(server: Nbdmirror) -> str:
    """The last line of a server that does not start; the warning may be before it."""
    done = run(*server.inside, *server.argv(), check=False)
    assert done.returncode == 1
    *before, line = done.stderr.splitlines()
    assert all(WARNING in one for one in before), done.stderr
    return line


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_guest_a_mirror_and_the_end(
    start: Start, identical: Identical, disk: Path, target: QemuNbd, cache: str
) -> None:
    """With a state directory, and a guest that stays connected at the end."""
    server = start(without_proc(disk, "--cache", cache, "--state-dir", str(disk.parent / "state")))
    with Guest(server.uri(), disk) as guest:
        server.qmp.start_mirror(target.uri(), device="vda")
        server.qmp.wait_ready()
        server.qmp.complete()
        guest.wait_for_requests(20)
    with connected(server.uri()) as idle:
        assert idle.pread(SIZE, 0) == guest.model
        server.stop()
    assert server.stderr.count(WARNING) == 1
    identical(guest, target.image)


def test_a_size_that_is_no_multiple_of_a_block(start: Start, folder: Path) -> None:
    """With O_DIRECT the last bytes need another descriptor of the file."""
    disk = make_image(folder / "odd.img", MiB + 100)
    server = start(without_proc(disk, "--cache", "none"))
    with connected(server.uri()) as guest:
        guest.pwrite(b"x" * 100, MiB)
        guest.flush()
        assert guest.pread(200, MiB - 100) == disk.read_bytes()[MiB - 100 :]
    assert disk.read_bytes().endswith(b"x" * 100)


def test_what_a_killed_server_left_is_removed(start: Start, disk: Path) -> None:
    server = start(without_proc(disk))
    server.kill()
    assert server.qmp_path.exists() and server.socket.exists()
    server.start()


def test_a_live_servers_socket_is_not_removed(start: Start, disk: Path, folder: Path) -> None:
    server = start(without_proc(disk))
    other = without_proc(make_image(folder / "other.img", MiB))
    other.qmp_path = server.qmp_path
    assert "is in use by another process" in refusal(other)
    assert server.qmp.execute("query-jobs") == []


def test_a_file_has_one_server(start: Start, disk: Path) -> None:
    start(without_proc(disk))
    assert "another process" in refusal(without_proc(disk))


def test_a_target_has_one_mirror(
    start: Start, identical: Identical, folder: Path, disk: Path, target: QemuNbd
) -> None:
    """The other server is not seen, and that its target is the same is."""
    first = start(without_proc(disk))
    first.qmp.start_mirror(target.uri(), device="vda")
    first.qmp.wait_ready()
    second = start(without_proc(make_image(folder / "second.img", SIZE, seed=7)))
    asked = {"device": "vda", "target": target.uri(), "mode": "existing", "sync": "full"}
    text = second.qmp.refusal("drive-mirror", **asked)
    assert "in use by another process, which is not seen without /proc" in text
    first.qmp.complete()
    identical(disk, target.image)


def test_a_list_says_what_is_not_known(start: Start, disk: Path) -> None:
    start(without_proc(disk))
    done = run(*INSIDE, sys.executable, "-m", "nbdmirror", "list")
    assert "without /proc" in done.stdout
