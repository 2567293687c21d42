"""A disk whose NBD server is not there yet, as after a power cut: `--open-timeout`."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import pytest
from support.clients import connected
from support.images import MiB, assert_identical, make_image
from support.processes import nbdmirror
from support.servers import Nbdmirror, QemuNbd
from support.waiting import START_S_MAX, WAIT_S_MAX, wait_until


def waiting(folder: Path, *uris: str, seconds: int) -> Nbdmirror:
    return Nbdmirror(folder, *uris, options=("--open-timeout", str(seconds)))


def test_a_server_that_starts_later(folder: Path, disk: Path) -> None:
    """Two of them, in the other order; systemd is told that the start takes its time."""
    other = make_image(folder / "other.img", MiB, 7)
    first, second = QemuNbd(folder, disk), QemuNbd(folder, other)
    server = waiting(folder, first.uri(), second.uri(), seconds=600)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(folder / "notify"))
        supervisor.settimeout(WAIT_S_MAX)
        server.inside = ("env", f"NOTIFY_SOCKET={folder}/notify")
        server.spawn()
        try:
            told = supervisor.recv(1 << 16).decode()
            assert told.startswith(f"STATUS=waiting for {first.uri()}\nEXTEND_TIMEOUT_USEC=")
            with second, first:
                while "READY=1" not in (told := supervisor.recv(1 << 16).decode()):
                    assert told.startswith("STATUS=waiting")
                assert_identical(disk, server.uri("disk0"))
                assert_identical(other, server.uri("disk1"))
                # A line that it waits and one that this is over, however many attempts there were.
                lines = re.findall(
                    "^nbdmirror: .*(?:trying again|connected to).*$", server.stderr, re.M
                )
                assert [first.uri() in line for line in lines] == [True, True]
                server.stop()
        finally:
            server.kill()


def test_a_server_that_does_not_answer_yet(folder: Path, disk: Path) -> None:
    """It listens, and takes its time until it says something: its first connection is lost."""
    place = folder / "late"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        listener.settimeout(WAIT_S_MAX)
        server = waiting(folder, f"nbd+unix:///?socket={place}", seconds=600)
        server.spawn()
        listener.accept()[0].close()
    try:
        place.unlink()
        target = QemuNbd(folder, disk)
        target.socket = place
        with target:
            wait_until(server._look, "it serves", START_S_MAX)
            with connected(server.uri()) as guest:
                assert guest.pread(512, 0) == disk.read_bytes()[:512]
            server.stop()
    finally:
        server.kill()


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_server_that_never_comes(folder: Path, seconds: int) -> None:
    server = waiting(folder, f"nbd+unix:///?socket={folder}/never", seconds=seconds)
    done = nbdmirror(*server.argv()[3:])
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert len(lines) == 1 + bool(seconds), done.stderr
    assert "never" in lines[-1]
    assert not server.qmp_path.exists()


def test_what_cannot_become_right_is_refused_at_once(folder: Path, disk: Path) -> None:
    with QemuNbd(folder, disk, read_only=True) as target:
        server = waiting(folder, target.uri(), seconds=600)
        done = nbdmirror(*server.argv()[3:])
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "read-only" in done.stderr


@pytest.mark.parametrize("parameter", ["open-timeout", "keepalive"])
@pytest.mark.parametrize("value", ["-1", "1.5", "10s", "", "99999999"])
def test_times_that_make_no_sense(disk: Path, parameter: str, value: str) -> None:
    server = Nbdmirror(disk.parent, disk, bare=True, options=(f"{parameter}={value}",))
    process = server.spawn()
    assert process.wait(WAIT_S_MAX) == 1
    why = "expected .*" if value else "is empty"
    assert re.fullmatch(rf"nbdmirror: {parameter}={value}: {why}\n", server.stderr)


def test_whoever_does_not_want_to_wait(folder: Path) -> None:
    """Ctrl-C ends it: without a traceback, and nothing is left."""
    server = waiting(folder, f"nbd+unix:///?socket={folder}/never", seconds=600)
    process = server.spawn()
    try:
        wait_until(lambda: "trying again" in server.stderr, "it waits")
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S_MAX) in (-signal.SIGINT, 128 + signal.SIGINT)
        assert len(server.stderr.splitlines()) == 1, server.stderr
        assert not server.qmp_path.exists()
    finally:
        server.kill()
