"""Nothing is left behind, in whichever way a server ends; and what a killed one had to leave is
taken over, or taken away, by the next. What belongs to a server that lives is never touched."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_image, make_noise
from support.kept import Kept
from support.processes import nbdmirror, patched
from support.servers import Nbdmirror, QemuNbd
from support.waiting import STOP_S_MAX, WAIT_S_MAX, wait_until

MEMORY = Path("/dev/shm")


class Everything(Kept):
    """With all that a server can make: two sockets, a pid file, a state directory."""

    def __init__(self, folder: Path, disk: Path | str, *options: str) -> None:
        self.pidfile = folder / "pid"
        super().__init__(folder, disk, "--pidfile", str(self.pidfile), *options)

    def left(self) -> set[str]:
        """The places that are there."""
        places = {"qmp": self.qmp_path, "socket": self.socket, "pidfile": self.pidfile}
        found = {name for name, path in places.items() if path.exists()}
        return found | {path.name for path in self.state.glob("*.new")}

    def memory(self) -> set[str]:
        """What this process has there now."""
        maps = Path(f"/proc/{self.pid}/maps").read_text()
        return set(re.findall(r"/dev/shm/nbdmirror-state-\w+", maps))


@pytest.fixture
def memories() -> Iterator[set[str]]:
    """All that a test's servers have had in memory: it must have gone in the end."""
    seen: set[str] = set()
    yield seen
    assert seen
    assert not [path for path in seen if os.path.exists(path)]


def test_an_orderly_end(folder: Path, disk: Path, memories: set[str]) -> None:
    server = Everything(folder, disk)
    with server:
        assert server.left() == {"qmp", "socket", "pidfile"}
        assert int(server.pidfile.read_text()) == server.pid
        memories |= server.memory()
    assert server.left() == set()
    assert_identical(disk, make_image(folder / "again.img", 4 * MiB))


def test_by_the_plugin_alone(folder: Path, disk: Path) -> None:
    server = Nbdmirror(folder, disk, bare=True)
    with server:
        assert server.socket.exists()
    assert not server.socket.exists()


def test_in_the_background(folder: Path, disk: Path, memories: set[str]) -> None:
    server = Everything(folder, disk, "--daemonize")
    subprocess.run(server.argv(), env=server.environment(), timeout=WAIT_S_MAX, check=True)
    pid = int(server.pidfile.read_text())
    memories |= set(
        re.findall(r"/dev/shm/nbdmirror-state-\w+", Path(f"/proc/{pid}/maps").read_text())
    )
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not server.left(), "all has gone", STOP_S_MAX)


@pytest.mark.parametrize("end", ["nothing", "mirror", "complete"])
def test_a_server_that_was_killed_and_is_started_again(
    folder: Path, disk: Path, start: Start, memories: set[str], end: str
) -> None:
    """Killed three times; with a mirror, without, and after its pivot on the new side, where
    nothing in the state directory speaks of a mirror any more."""
    target = start(QemuNbd(folder, make_noise(folder / "target.img", 4 * MiB)))
    server = Everything(folder, disk).start()
    memories |= server.memory()
    if end != "nothing":
        server.qmp.start_mirror(target.uri(), device="vda")
        server.qmp.wait_ready()
    if end == "complete":
        server.qmp.complete()
        server.disks = [f"vda={target.uri()}"]
    for _ in range(3):
        server.kill()
        assert server.left() >= {"qmp", "socket", "pidfile"}
        server.start()
        memories |= server.memory()
        assert {path for path in memories if os.path.exists(path)} == server.memory()
    with Guest(server.uri(), disk) as guest:
        guest.wait_for_requests(20)
    if end == "mirror":
        wait_until(lambda: server.qmp.job()["ready"], "the mirror went on")
        server.qmp.complete()
    server.stop()
    assert server.left() == set()
    assert_identical(guest.model, disk if end == "nothing" else target.image)


def test_memory_of_a_disk_that_is_not_served_this_time_stays(
    folder: Path, disk: Path, start: Start, memories: set[str]
) -> None:
    """What is dirty in its mirror is known there alone."""
    target = start(QemuNbd(folder, make_noise(folder / "target.img", 4 * MiB)))
    other = make_image(folder / "other.img", MiB)
    server = Everything(folder, disk)
    both, one = [f"vda={disk}", f"other={other}"], [f"other={other}"]
    server.disks = both
    server.start()
    server.qmp.start_mirror(target.uri(), device="vda")
    server.qmp.wait_ready()
    memories |= server.memory()
    server.kill()
    kept = str(server.definition()["memory"])
    server.disks = one
    with server:
        assert os.path.exists(kept)
        memories |= server.memory()
    server.disks = both
    with server:
        memories |= server.memory()
        wait_until(lambda: server.qmp.job()["ready"], "the mirror went on")
        server.qmp.complete()
    assert_identical(disk, target.image)


def test_half_a_file_of_the_state_directory_goes(
    folder: Path, disk: Path, memories: set[str]
) -> None:
    server = Everything(folder, disk)
    server.state.mkdir(mode=0o700)
    for name in ("vda.json.new", "vda.pivoted.new", "vda.bitmaps.new"):
        (server.state / name).write_text("half")
    with server:
        memories |= server.memory()
        assert server.left() == {"qmp", "socket", "pidfile"}


@pytest.mark.parametrize("place", ["qmp", "socket", "pidfile", "state"])
def test_what_a_live_server_has_is_left_alone(
    folder: Path, disk: Path, memories: set[str], place: str
) -> None:
    """Another one that wants the same place is refused, and the first one goes on with all it
    has."""
    with Everything(folder, disk) as server:
        memories |= server.memory()
        server.allowed.append("nbdkit: ")  # of who looks whether it lives
        other = Everything(folder, make_image(folder / "other.img", MiB))
        other.pidfile = folder / "other-pid"
        setattr(other, {"qmp": "qmp_path"}.get(place, place), vars_of(server)[place])
        if place != "state":
            other.state = folder / "other-state"
        options = ("--pidfile", str(other.pidfile), "--state-dir", str(other.state))
        other.options = options
        done = nbdmirror(*other.argv()[3:])
        assert done.returncode == 1
        assert "in use by another" in done.stderr
        assert server.left() == {"qmp", "socket", "pidfile"}
        assert int(server.pidfile.read_text()) == server.pid
        server.qmp.execute("query-status")
        with connected(server.uri()) as guest:
            assert guest.pread(512, 0) == disk.read_bytes()[:512]
        mine = {other.qmp_path, other.socket, other.pidfile, other.state}
        its = {server.qmp_path, server.socket, server.pidfile, server.state}
        assert not [path for path in mine - its if path.exists()]


def vars_of(server: Everything) -> dict[str, Path]:
    return {
        "qmp": server.qmp_path,
        "socket": server.socket,
        "pidfile": server.pidfile,
        "state": server.state,
    }


class Failing(Everything):
    """Its start fails at its last steps."""

    def environment(self) -> dict[str, str]:
        failing = (
            "import nbdmirror.server.server as s\ndef start(self): raise OSError(28, 'No room')\n"
        )
        return patched(super().environment(), self.folder, f"{failing}s.Server.start = start\n")


@pytest.mark.parametrize("background", [False, True])
def test_a_start_that_fails_at_its_last_steps(folder: Path, disk: Path, background: bool) -> None:
    """Sockets, pid file and state directory are there by then. Of those only the latter stays."""
    server = Failing(folder, disk, *(["--daemonize"] if background else []))
    done = subprocess.run(
        server.argv(),
        env=server.environment(),
        capture_output=True,
        timeout=WAIT_S_MAX,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count(b"No room") == 1
    wait_until(lambda: not server.left(), "all has gone")


@pytest.mark.parametrize("step", ["first", "last"])
def test_the_control_socket_of_a_killed_server_stays_until_another_one_serves(
    folder: Path, disk: Path, memories: set[str], step: str
) -> None:
    """Whoever watches servers is to see that there is none, also while starts fail."""
    server = Everything(folder, disk).start()
    memories |= server.memory()
    server.kill()
    failing = Failing(folder, disk) if step == "last" else Everything(folder, "/nonexistent/d")
    failing.qmp_path, failing.socket, failing.state = server.qmp_path, server.socket, server.state
    options = ("--state-dir", str(server.state), "--pidfile", str(server.pidfile))
    failing.options = options
    assert nbdmirror_fails(failing)
    assert "qmp" in server.left()
    with socket.socket(socket.AF_UNIX) as client:
        assert client.connect_ex(str(server.qmp_path)) == errno.ECONNREFUSED
    with server:
        memories |= server.memory()
        server.qmp.execute("query-status")
    assert server.left() == set()


def nbdmirror_fails(server: Everything) -> bool:
    argv, environment = server.argv(), server.environment()
    done = subprocess.run(argv, env=environment, timeout=WAIT_S_MAX, check=False)
    return done.returncode == 1


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_start_that_is_refused_makes_nothing(
    folder: Path, disk: Path, is_shared: bool, is_there: bool
) -> None:
    """Also where other users may create files, and where the pid file was there, as after a
    kill."""
    server = Everything(folder, disk)
    server.disks.append("nbd+unix:///?socket=/nonexistent/s")
    if is_shared:
        folder.chmod(0o1777)
    if is_there:
        server.pidfile.write_text("")
    done = nbdmirror(*server.argv()[3:])
    assert done.returncode == 1
    assert "/nonexistent/s" in done.stderr
    assert server.left() == ({"pidfile"} if is_there else set())
    assert not server.state.exists()


@pytest.mark.parametrize("background", [False, True])
def test_a_start_that_is_refused_by_its_state_leaves_no_pid_file(
    folder: Path, disk: Path, background: bool
) -> None:
    """The state directory is opened last."""
    folder.chmod(0o1777)
    server = Everything(folder, disk, *(["--daemonize"] if background else []))
    server.state.write_text("a file")
    done = nbdmirror(*server.argv()[3:])
    assert done.returncode == 1
    assert "state-dir: " in done.stderr
    assert server.left() == set()
