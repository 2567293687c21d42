"""A server with too little of a resource: it starts wholly, or says in one line which limit is too
low, and leaves nothing behind. (What a client can make a server use is in test_limits.py.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_image, make_noise
from support.processes import run
from support.servers import Nbdmirror, QemuNbd

SIZE = 4 * MiB
STRANGER = ("setpriv", f"--reuid={200000 + os.getpid()}", "--regid=nogroup", "--clear-groups")
"""A user of this test alone: the processes of a user count together."""


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


def refusal(folder: Path, disk: Path, *inside: str, options: tuple[str, ...] = ()) -> str:
    """The only line of a server that does not start, whatever runs it `inside`."""
    server = Nbdmirror(folder, f"vda={disk}", options=options)
    done = run(*inside, *server.argv(), check=False)
    assert done.returncode == 1, done.stderr
    (line,) = (done.stdout + done.stderr).splitlines()
    assert not server.qmp_path.exists() and not server.socket.exists(), "something was left behind"
    return line


def works(server: Nbdmirror, disk: Path, target: QemuNbd, identical: Identical) -> None:
    """A guest and a mirror, up to its pivot."""
    with Guest(server.uri("vda"), disk) as guest:
        server.qmp.start_mirror(target.uri(), device="vda")
        server.qmp.wait_ready()
        server.qmp.complete()
        guest.wait_for_requests(20)
    identical(guest, target.image)


@pytest.fixture
def target(start: Start, folder: Path) -> QemuNbd:
    return start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))


@pytest.mark.parametrize("limit", [6, 10, 16, 24, 32, 40, 44])
def test_few_descriptors(folder: Path, disk: Path, limit: int) -> None:
    line = refusal(folder, disk, "prlimit", f"--nofile={limit}:{limit}")
    assert f"may have {limit} open files" in line and "ulimit -n" in line


def test_few_descriptors_in_the_background(folder: Path, disk: Path) -> None:
    line = refusal(folder, disk, "prlimit", "--nofile=16:16", options=("--daemonize",))
    assert "may have 16 open files" in line and "ulimit -n" in line


def test_few_descriptors_for_many_disks(folder: Path, disk: Path) -> None:
    """Each has its own, and the last ones would be gone."""
    more = [make_image(folder / f"more{number}.img", MiB) for number in range(40)]
    server = Nbdmirror(folder, disk, *more)
    done = run("prlimit", "--nofile=64:64", *server.argv(), check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "descriptors are in use" in line and "ulimit -n" in line
    assert not server.qmp_path.exists()


def test_enough_descriptors(
    start: Start, identical: Identical, folder: Path, disk: Path, target: QemuNbd
) -> None:
    server = Nbdmirror(folder, f"vda={disk}")
    server.inside = ("prlimit", "--nofile=64:64")
    works(start(server), disk, target, identical)


@pytest.mark.parametrize("limit", [30, 100, 300, 450])
def test_little_memory(folder: Path, disk: Path, limit: int) -> None:
    line = refusal(folder, disk, "prlimit", f"--as={limit * MiB}:{limit * MiB}")
    assert f"{limit} MiB of address space" in line and "ulimit -v" in line


def test_enough_memory(
    start: Start, identical: Identical, folder: Path, disk: Path, target: QemuNbd
) -> None:
    server = Nbdmirror(folder, f"vda={disk}")
    server.inside = ("prlimit", f"--as={1024 * MiB}:{1024 * MiB}")
    works(start(server), disk, target, identical)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without processes")
@pytest.mark.parametrize("limit", [1, 4, 12, 24])
def test_few_threads(folder: Path, disk: Path, limit: int) -> None:
    folder.chmod(0o777)
    disk.chmod(0o666)
    python = Nbdmirror(folder, disk).argv()[0]
    if run(*STRANGER, python, "-c", "import nbdmirror.cli.serve", check=False).returncode:
        pytest.skip("the checkout is not readable for other users")
    line = refusal(folder, disk, "prlimit", f"--nproc={limit}:{limit}", *STRANGER)
    assert "no thread can be started" in line and "ulimit -u, TasksMax" in line
