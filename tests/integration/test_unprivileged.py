"""`serve --user`: what was opened as root works on, and nothing else of root's is left."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_image, make_noise
from support.processes import ROOT, nbdmirror, run
from support.servers import PLUGIN, NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import STOP_S_MAX, wait_until

NOBODY = pwd.getpwnam("nobody")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(autouse=True)
def _readable() -> None:
    test = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "test", "-r"]
    if run(*test, PLUGIN, check=False).returncode:
        pytest.skip("the checkout is not readable for other users")


@pytest.fixture
def disk(folder: Path) -> Path:
    """Root's alone, in a folder that is root's alone."""
    image = make_image(folder / "disk.img", 4 * MiB)
    image.chmod(0o600)
    return image


@pytest.fixture
def open_folder(folder: Path) -> Path:
    """Where nobody can go, too."""
    folder.chmod(0o755)
    return folder


def identity(server: Nbdmirror) -> dict[str, list[int]]:
    """Real, effective, saved and file-system ids, further groups, and capabilities."""
    found: dict[str, list[int]] = {}
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name in ("Uid", "Gid", "Groups"):
            found[name] = [int(number) for number in numbers.split()]
        elif name in ("CapPrm", "CapEff", "CapAmb"):
            found[name] = [int(numbers, 16)]
    return found


def as_root_may(path: Path) -> None:
    """A target's socket to which every user may connect."""
    path.chmod(0o777)


def with_a_folder_of_its_own(folder: Path, disk: Path) -> Nbdmirror:
    """Where it may remove its control socket."""
    own = folder / "own"
    own.mkdir()
    shutil.chown(own, NOBODY.pw_uid)
    server = Nbdmirror(folder, disk, options=("--user", "nobody"))
    server.qmp_path = own / "qmp"
    return server


def end_leaving_the_socket(server: Nbdmirror) -> None:
    """The end of a server that may not remove its control socket, because the folder is root's."""
    assert server.process is not None
    server.process.terminate()
    assert server.process.wait(STOP_S_MAX) == 0
    server.process = None
    server._close_qmp()


@pytest.mark.parametrize("bare", [False, True])
def test_it_runs_as_that_user_with_no_rights_of_roots(disk: Path, bare: bool) -> None:
    server = Nbdmirror(disk.parent, disk, bare=bare)
    if bare:
        server.nbdkit = ("-u", "nobody", "-g", str(NOBODY.pw_gid))
    else:
        server.options = ("--user", "nobody")
    server.start()
    try:
        uid, gid = NOBODY.pw_uid, NOBODY.pw_gid
        assert identity(server) == {
            "Uid": [uid] * 4,
            "Gid": [gid] * 4,
            "Groups": [gid],
            "CapPrm": [0],
            "CapEff": [0],
            "CapAmb": [0],
        }
        assert server.qmp_path.stat().st_uid == 0
        assert server.qmp_path.stat().st_mode & 0o777 == 0o600
        with Guest(server.uri(), disk, pause_s=0) as guest:
            guest.wait_for_requests(200)
        assert_identical(guest.model, server.uri())
    except BaseException:
        server.abandon()
        raise
    end_leaving_the_socket(server)
    assert_identical(guest.model, disk)


def test_numbers_and_groups_are_taken(disk: Path) -> None:
    server = Nbdmirror(disk.parent, disk, options=("--user", "54321", "--group", "54322"))
    server.start()
    try:
        found = identity(server)
        assert found["Uid"] == [54321] * 4
        assert found["Gid"] == [54322] * 4
        assert found["Groups"] == [54322]
    except BaseException:
        server.abandon()
        raise
    end_leaving_the_socket(server)


def test_mirror_and_pivot(
    open_folder: Path, disk: Path, start: Start, identical: Identical
) -> None:
    target = start(QemuNbd(open_folder, make_noise(open_folder / "target.img", 4 * MiB)))
    as_root_may(target.socket)
    server = with_a_folder_of_its_own(open_folder, disk)
    start(server)  # which finds, at its end, that the control socket is gone: the folder is its own
    with Guest(server.uri(), disk, connections=2) as guest:
        server.qmp.start_mirror(target.uri(), copy_mode="write-blocking")
        server.qmp.wait_ready()
        guest.wait_for_requests(50)
        server.qmp.complete()
        guest.wait_for_requests(50)
    identical(guest, target.uri())
    identical(server.uri(), target.uri())


def test_a_lost_target_is_connected_again(
    open_folder: Path, disk: Path, start: Start, identical: Identical
) -> None:
    image = make_noise(open_folder / "target.img", 4 * MiB)
    target = start(NbdkitTarget(open_folder, "file", str(image)))
    as_root_may(target.socket)
    server = with_a_folder_of_its_own(open_folder, disk)
    server.allowed.append("target|lost")
    start(server)
    address = {"type": "unix", "path": str(target.socket)}
    options = {"driver": "nbd", "node-name": "t", "server": address, "reconnect-delay": 30}
    server.qmp.execute("blockdev-add", **options)
    server.qmp.start_mirror("t")
    server.qmp.wait_ready()
    target.kill()
    target.come_back()
    as_root_may(target.socket)
    with Guest(server.uri(), disk) as guest:
        guest.wait_for_requests(50)
    server.qmp.complete()
    identical(guest, target.uri())


def test_a_stale_control_socket_is_taken_over(disk: Path) -> None:
    server = Nbdmirror(disk.parent, disk, options=("--user", "nobody"))
    for _ in range(2):
        server.start()
        server.qmp.execute("query-status")
        end_leaving_the_socket(server)
        assert server.qmp_path.exists()
    server.options = ()
    with server:
        server.qmp.execute("query-status")


def test_state_that_lasts(
    open_folder: Path, disk: Path, start: Start, identical: Identical
) -> None:
    """A mirror goes on after its server was killed; the directory is made, and is the user's."""
    target = start(QemuNbd(open_folder, make_noise(open_folder / "target.img", 4 * MiB)))
    as_root_may(target.socket)
    state = open_folder / "state"
    server = Nbdmirror(open_folder, disk, options=("--user", "nobody", "--state-dir", str(state)))
    server.start()
    with Guest(server.uri(), disk) as guest:
        server.qmp.start_mirror(target.uri())
        server.qmp.wait_ready()
        guest.wait_for_requests(50)
    server.kill()
    server.start()
    try:
        assert state.stat().st_uid == NOBODY.pw_uid
        wait_until(lambda: server.qmp.job()["ready"], "the mirror went on and is ready")
        with Guest(server.uri(), guest.model, seed=2) as guest:
            guest.wait_for_requests(50)
            server.qmp.complete()
        assert_identical(guest.model, target.uri())
        assert not re.search(server.unwanted, server.stderr), server.stderr
    except BaseException:
        server.abandon()
        raise
    end_leaving_the_socket(server)
    done = nbdmirror(*server.argv()[3:])
    assert "is not the disk any more" in done.stderr
    identical(guest, target.uri())


def test_a_state_directory_that_the_user_cannot_write(disk: Path) -> None:
    folder = disk.parent
    state = folder / "state"
    places = ("--socket", folder / "s", "--qmp", folder / "q", "--state-dir", state)
    done = nbdmirror("serve", disk, *places, "--user", "nobody")
    text = f"nbdmirror: --state-dir: {state}: user nobody cannot write there\n"
    assert (done.returncode, done.stderr) == (1, text)
    assert not state.exists()
    state.mkdir(mode=0o700)
    assert nbdmirror("serve", disk, *places, "--user", "nobody").stderr == text


def test_a_state_directory_is_the_last_that_is_made(open_folder: Path, disk: Path) -> None:
    """A start that is refused leaves none."""
    state = open_folder / "state"
    with socket.create_server(("127.0.0.1", 0)) as other:
        places = ("--port", str(other.getsockname()[1]), "--qmp", open_folder / "q")
        as_user = ("--user", "nobody", "--state-dir", state)
        done = nbdmirror("serve", disk, *places, *as_user)
    assert "--port: cannot listen" in done.stderr
    assert not state.exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--user", "no-such-user"], "--user no-such-user: no such user on this host"),
        (["--user", ""], "--user: is empty (see: nbdmirror --help)"),
        (["--group", "no-such-group"], "--group no-such-group: no such group on this host"),
        (["--user", "54321"], "--user 54321: this user has no group: name one with --group"),
        (["--user", "4294967295"], "--user 4294967295: no such user on this host"),
    ],
)
def test_who_is_not_there(disk: Path, options: list[str], text: str) -> None:
    socket = str(disk.parent / "s")
    done = nbdmirror("serve", disk, "--socket", socket, "--qmp", socket + "q", *options)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"nbdmirror: {text}\n")


def test_a_pidfile_that_the_user_cannot_write(disk: Path) -> None:
    folder = disk.parent
    pidfile = folder / "pid"
    places = ("--socket", folder / "s", "--qmp", folder / "q", "--pidfile", pidfile)
    done = nbdmirror("serve", disk, *places, "--user", "nobody", "--daemonize")
    text = f"nbdmirror: --pidfile: {pidfile}: user nobody cannot write there\n"
    assert (done.returncode, done.stderr) == (1, text)
    assert {path.name for path in folder.iterdir()} == {"disk.img"}


def test_a_user_that_cannot_read_nbdmirror_is_refused(disk: Path, open_folder: Path) -> None:
    """It would serve, and answer nobody on its control socket."""
    installed = disk.parent / "installed"
    shutil.copytree(ROOT / "nbdmirror", installed / "nbdmirror")
    shutil.copytree(ROOT / "plugin", installed / "plugin")
    installed.chmod(0o700)
    command = ["env", f"--chdir={disk.parent}", f"PYTHONPATH={installed}", sys.executable]
    words = ["-m", "nbdmirror", "serve", "--user", "nobody", "--socket"]
    done = run(*command, *words, disk.parent / "s", disk, check=False)
    assert done.returncode == 1
    assert f"user nobody cannot read {installed}/nbdmirror" in done.stderr
