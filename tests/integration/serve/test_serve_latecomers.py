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

from nbdmirror.nbdkit_host.latecomers import HANDSHAKE_S_MAX, handshake_s


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


# The target of --mirror-to


def test_a_target_that_starts_later(folder: Path, disk: Path) -> None:
    """The disk is served meanwhile."""
    target = QemuNbd(folder, make_image(folder / "target.img", disk.stat().st_size, 7))
    options = ("--mirror-to", target.uri(), "--open-timeout", "600")
    with Nbdmirror(folder, f"vda={disk}", options=options) as server:
        wait_until(lambda: "trying again" in server.stderr, "it has tried")
        with connected(server.uri()) as guest:
            guest.pwrite(b"meanwhile", 0)
            guest.flush()
        qmp = server.qmp  # hears events from now on
        with target:
            assert qmp.wait_ready("vda")["type"] == "mirror"
            qmp.complete("vda")
            assert_identical(disk, target.image)
            server.stop()
        assert server.stderr.count("mirror-to") == 1


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_target_that_never_comes(folder: Path, disk: Path, seconds: int) -> None:
    uri = f"nbd+unix:///?socket={folder}/never"
    options = ("--mirror-to", uri, "--open-timeout", str(seconds))
    with Nbdmirror(folder, disk, options=options) as server:
        server.allowed = ["ERROR: mirror-to"]
        wait_until(lambda: "served without a mirror" in server.stderr, "it gives up")
        assert server.stderr.count("mirror-to") == 1 + seconds
        assert_identical(disk, server.uri())


def test_a_target_that_takes_its_time_to_answer(folder: Path, disk: Path) -> None:
    """It is waited for as long as was said, by each way to say it."""
    place = folder / "silent"
    uri = f"nbd+unix:///?socket={place}"
    with socket.socket(socket.AF_UNIX) as listener, Nbdmirror(folder, disk) as server:
        listener.bind(str(place))
        listener.listen()
        done = nbdmirror("mirror", uri, "--open-timeout", "1", "--qmp", server.qmp_path)
        assert done.returncode == 1
        assert f"{uri}: no answer from the NBD server within 1 s" in done.stderr
        for seconds in ("0", "3601"):
            done = nbdmirror("mirror", uri, "--open-timeout", seconds, "--qmp", server.qmp_path)
            assert (done.returncode, "from 1 to 3600" in done.stderr) == (2, True)
        mirror = {"device": "disk0", "sync": "full", "mode": "existing"}
        text = server.qmp.refusal(
            "drive-mirror", target=uri, x_nbdmirror_open_timeout=3601, **mirror
        )
        assert "'x-nbdmirror-open-timeout' expects at most 3600" in text
    assert [handshake_s(seconds) for seconds in (0, 30, 600)] == [10, 30, HANDSHAKE_S_MAX]
