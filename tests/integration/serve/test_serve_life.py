"""Life and end of `nbdmirror serve`: signals, the background, sockets, and starting again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest
from support.clients import connected, nbd_errno
from support.fixtures import Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_image, make_noise
from support.processes import nbdmirror, run
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

END_S_MAX = 5.0
PR_SET_CHILD_SUBREAPER = 36


def test_tcp(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk, tcp=True))
    assert_identical(disk, server.uri())


@pytest.mark.guarantee("The server ends when asked")
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "cli"])
@pytest.mark.parametrize("number", ["TERM", "INT", "HUP", "QUIT"])
def test_a_signal_ends_it_with_a_client_connected(disk: Path, bare: bool, number: str) -> None:
    """Unless it was ignored at the start, as a script has it (test_serve_signals.py)."""
    server = Nbdmirror(disk.parent, disk, bare=bare)
    server.inside = ("env", "--default-signal")
    server.start()
    try:
        process = server.process
        assert process is not None
        guest = nbd.NBD()
        guest.connect_uri(server.uri())
        guest.pwrite(b"last words", 0)
        process.send_signal(signal.Signals[f"SIG{number}"])
        assert process.wait(END_S_MAX) == 0
        assert nbd_errno(guest.pread, 1, 0) != 0
        server.stop()
        assert disk.read_bytes()[:10] == b"last words"
        assert not server.qmp_path.exists()
    finally:
        server.kill()


def test_a_signal_ends_it_while_a_guest_writes(disk: Path) -> None:
    server = Nbdmirror(disk.parent, disk).start()
    try:
        writing = threading.Event()

        def write() -> None:
            with contextlib.suppress(nbd.Error), connected(server.uri()) as guest:
                while True:
                    guest.pwrite(bytes(4096), 0)
                    writing.set()

        threads = [threading.Thread(target=write, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert writing.wait(10)
        server.stop()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    finally:
        server.kill()


def test_quit_ends_it(disk: Path) -> None:
    with Nbdmirror(disk.parent, disk) as server:
        process = server.process
        assert process is not None
        assert server.qmp.execute("quit") == {}
        assert process.wait(END_S_MAX) == 0


@contextlib.contextmanager
def reaping() -> Iterator[None]:
    """The kernel gives us the daemons that our children leave, so that we can wait for them."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def daemon_folder(folder: Path) -> Iterator[Path]:
    """Kills what a failed test leaves running there."""
    yield folder
    pidfile = folder / "pid"
    if pidfile.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pidfile.read_text()), signal.SIGKILL)


def test_in_the_background(daemon_folder: Path) -> None:
    folder = daemon_folder
    disk, target = make_image(folder / "disk.img", 4 * MiB), make_noise(folder / "t.img", 4 * MiB)
    with reaping(), QemuNbd(folder, target) as behind:
        server = Nbdmirror(folder, disk)
        pidfile = folder / "pid"
        server.options = ("--daemonize", "--pidfile", str(pidfile))
        run(*server.argv())
        # nbdkit writes it after the parent has ended.
        wait_until(lambda: pidfile.exists() and pidfile.read_text(), "the pid file is written")
        pid = int(pidfile.read_text())
        wait_until(server.is_ready, "the daemon serves")
        with Guest(server.uri(), disk) as guest:
            guest.wait_for_requests(100)
            # Its loop and its control endpoint live in the process that went into the background.
            nbdmirror_qmp = ("--qmp", server.qmp_path)
            done = nbdmirror("mirror", behind.uri(), "--wait", "completed", *nbdmirror_qmp)
            assert done.returncode == 0, done.stderr
            guest.wait_for_requests(100)
        assert_identical(guest.model, behind.uri())
        with connected(server.uri()) as idle:
            idle.pread(1, 0)
            os.kill(pid, signal.SIGTERM)
            assert wait_until(lambda: _exit_code(pid), "it ends", END_S_MAX) == "exit 0"
        pidfile.unlink(missing_ok=True)
        assert not server.qmp_path.exists()


def test_the_daemon_ends_with_status_0(daemon_folder: Path) -> None:
    folder = daemon_folder
    disk = make_image(folder / "disk.img", MiB)
    with reaping():
        server = Nbdmirror(folder, disk, bare=True)
        argv = [word for word in server.argv() if word != "-f"]
        run(argv[0], "-P", folder / "pid", *argv[1:])
        pidfile = folder / "pid"
        wait_until(lambda: pidfile.exists() and pidfile.read_text(), "the pid file is written")
        pid = int(pidfile.read_text())
        assert_identical(disk, server.uri())
        os.kill(pid, signal.SIGTERM)
        assert wait_until(lambda: _exit_code(pid), "it ends") == "exit 0"
        pidfile.unlink(missing_ok=True)


def _exit_code(pid: int) -> str:
    found, status = os.waitpid(pid, os.WNOHANG)
    return f"exit {os.waitstatus_to_exitcode(status)}" if found else ""


@pytest.mark.guarantee("The control socket is its owner's alone")
def test_the_control_socket_is_the_owners_alone(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    assert server.qmp_path.stat().st_mode & 0o777 == 0o600


def test_restart_on_the_same_sockets(disk: Path) -> None:
    """nbdkit leaves its socket file behind, and `serve` takes it over."""
    server = Nbdmirror(disk.parent, disk)
    for _ in range(2):
        with server:
            assert_identical(disk, server.uri())
    with server:  # killed: both sockets are stale
        server.kill()
    assert server.qmp_path.exists()
    with server:
        assert_identical(disk, server.uri())


def test_nothing_listens_but_what_was_asked_for(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    held = []
    for entry in Path(f"/proc/{server.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held.append(os.readlink(entry))
    ours = {match[1] for name in held if (match := re.fullmatch(r"socket:\[(\d+)\]", name))}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        path = Path(f"/proc/{server.pid}/net/{table}")
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        assert not ours & {line.split()[9] for line in lines}, table
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(server.qmp_path))
