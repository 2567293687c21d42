"""A log whose reader hangs: a terminal after Ctrl-S, a pipe that nobody empties, a syslog daemon
that was stopped. Guests, mirrors, commands and the end of the server wait for none of them, and
what they were to read is there when they go on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import socket
import subprocess
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import nbd
import pytest
from support.clients import connected
from support.fixtures import Identical
from support.processes import patched
from support.servers import Nbdmirror, QemuNbd
from support.waiting import START_S_MAX, STOP_S_MAX, WAIT_S_MAX, wait_until


@dataclass
class Log:
    server: Nbdmirror
    pid: int
    resume: Callable[[], None]
    read: Callable[[], bytes]


@contextlib.contextmanager
def in_foreground(server: Nbdmirror, stderr: int) -> Iterator[int]:
    server.process = subprocess.Popen(
        server.argv(), env=server.environment(), stdout=subprocess.DEVNULL, stderr=stderr
    )
    try:
        wait_until(server._look, "it serves", START_S_MAX)
        yield server.pid
        server._close_qmp()
        server.process.terminate()
        assert server.process.wait(STOP_S_MAX) == 0
    finally:
        server._close_qmp()
        server.process.kill()
        server.process.wait()


def available(fd: int) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return os.read(fd, 1 << 16)
    return b""


@contextlib.contextmanager
def terminal(folder: Path, disk: Path) -> Iterator[Log]:
    ours, theirs = pty.openpty()
    try:
        tty.setraw(theirs)
        os.set_blocking(ours, False)
        with in_foreground(server := Nbdmirror(folder, disk), theirs) as pid:
            termios.tcflow(theirs, termios.TCOOFF)
            resume = lambda: termios.tcflow(theirs, termios.TCOON)  # noqa: E731
            yield Log(server, pid, resume, lambda: available(ours))
    finally:
        os.close(theirs)
        os.close(ours)


@contextlib.contextmanager
def pipe(folder: Path, disk: Path) -> Iterator[Log]:
    ours, theirs = os.pipe()
    try:
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(ours, False)
        with in_foreground(server := Nbdmirror(folder, disk), theirs) as pid:
            fill(lambda: os.write(theirs, b"x" * 64), theirs)
            yield Log(server, pid, lambda: None, lambda: available(ours))
    finally:
        os.close(theirs)
        os.close(ours)


def fill(write: Callable[[], object], fd: int) -> None:
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            write()
    os.set_blocking(fd, True)


@contextlib.contextmanager
def syslog(folder: Path, disk: Path) -> Iterator[Log]:
    path = str(folder / "log")
    pidfile = folder / "pid"
    server = Nbdmirror(folder, disk, options=("--daemonize", "--pidfile", str(pidfile)))
    place = f"from nbdmirror import logs\nlogs.SYSLOG_SOCKET = {path!r}\n"
    with ExitStack() as stack:
        daemon, other = (
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) for _ in range(2)
        )
        daemon.bind(path)
        daemon.setblocking(False)
        environment = patched(server.environment(), folder, place)
        subprocess.run(server.argv(), env=environment, check=True, timeout=WAIT_S_MAX)
        pid = int(pidfile.read_text())
        try:
            other.connect(path)
            fill(lambda: other.send(b"x"), other.fileno())
            yield Log(server, pid, lambda: None, lambda: available(daemon.fileno()))
        finally:
            server._close_qmp()
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not os.path.exists(server.qmp_path), "it ends", STOP_S_MAX)


@pytest.mark.parametrize("kind", [terminal, pipe, syslog])
def test_nobody_waits_for_a_log_that_is_not_read(
    folder: Path,
    disk: Path,
    target: QemuNbd,
    identical: Identical,
    kind: Callable[[Path, Path], contextlib.AbstractContextManager[Log]],
) -> None:
    identical(disk, target.image)
    with kind(folder, disk) as log:
        qmp = log.server.qmp
        with connected(log.server.uri()) as guest:
            guest.set_strict_mode(0)
            for _ in range(3):
                with pytest.raises(nbd.Error):  # nbdkit writes a line
                    guest.pread(512, 1 << 40)
            qmp.add_target("t", target)
            qmp.start_mirror("t")
            qmp.wait_ready()
            guest.pwrite(b"g" * 512, 0)
            qmp.complete()
            guest.flush()
        log.resume()
        said = b""

        def is_said() -> bool:
            nonlocal said
            said += log.read()
            return b"pivoted: disk disk0 is served from" in said

        wait_until(is_said, "what was to be read is there")
        assert said.count(b"offset and count are out of range") == 3


def test_a_syslog_daemon_that_starts_later(folder: Path, disk: Path) -> None:
    """Its log has all, from the start on; the command says that there is none yet."""
    pidfile, path = folder / "pid", str(folder / "log")
    server = Nbdmirror(folder, disk, options=("--daemonize", "--pidfile", str(pidfile)))
    place = f"from nbdmirror import logs\nlogs.SYSLOG_SOCKET = {path!r}\n"
    environment = patched(server.environment(), folder, place)
    begun = subprocess.run(
        server.argv(), env=environment, check=True, timeout=WAIT_S_MAX, capture_output=True
    )
    said = b""
    try:
        assert begun.stderr.decode() == (
            f"nbdmirror: warning: {path} does not exist: the log begins when a syslog daemon is"
            " there\n"
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
            daemon.bind(path)
            daemon.setblocking(False)

            def is_said() -> bool:
                nonlocal said
                said += available(daemon.fileno())
                return b"control socket: " in said

            wait_until(is_said, "what was logged before is there")
            assert f"disk0: served from {disk}".encode() in said
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGTERM)
        wait_until(lambda: not os.path.exists(server.qmp_path), "it ends", STOP_S_MAX)


def test_a_server_whose_log_is_never_read_ends(folder: Path, disk: Path) -> None:
    with pipe(folder, disk) as log:
        with connected(log.server.uri()) as guest:
            assert guest.pread(512, 0) is not None
        assert log.pid, "its end is bounded"
