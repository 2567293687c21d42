"""Under a supervisor: log lines that journald can sort, and what systemd is told and when."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_image, make_noise
from support.kept import Kept
from support.processes import run
from support.servers import Nbdmirror, QemuNbd
from support.waiting import WAIT_S_MAX, wait_until

from nbdmirror import logs

NOWHERE = "nbd+unix:///?socket=/nonexistent/target.sock"


# The journal


class Journal:
    """What journald is to a service: a socket that is its stderr, named in JOURNAL_STREAM."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(WAIT_S_MAX)
        found = os.fstat(self.theirs.fileno())
        self.stream = f"{found.st_dev}:{found.st_ino}"

    def read_until(self, pattern: str) -> str:
        """All up to a line that matches."""
        text = ""
        while not re.search(pattern, text, re.MULTILINE):
            received = self.ours.recv(1 << 16)
            assert received, f"it ended without {pattern}: {text}"
            text += received.decode()
        return text

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.theirs.close()


@contextlib.contextmanager
def in_journal(server: Nbdmirror, journal: Journal) -> Iterator[subprocess.Popen[bytes]]:
    environ = {**server.environment(), "JOURNAL_STREAM": journal.stream}
    process = subprocess.Popen(
        server.argv(), env=environ, stdin=subprocess.DEVNULL, stderr=journal.theirs.fileno()
    )
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(WAIT_S_MAX) in (0, 1)


def test_lines_in_the_journal_have_their_priority(disk: Path) -> None:
    server = Nbdmirror(disk.parent, disk, options=("--mirror-to", NOWHERE))
    with Journal() as journal, in_journal(server, journal):
        text = journal.read_until("served without")
        assert re.search(r"^<3>nbdmirror: mirror-to: .*served without a mirror$", text, re.M)
        wait_until(server.is_ready, "it serves")
        with QemuNbd(disk.parent, make_noise(disk.parent / "target.img", 4 * MiB)) as target:
            server.qmp.start_mirror(target.uri())
            server.qmp.wait_ready()
            assert "<6>nbdmirror: job j: running -> ready\n" in journal.read_until("-> ready")
            server.qmp.complete()
            assert_identical(disk, target.image)
            server._close_qmp()


@pytest.mark.parametrize("bare", [False, True])
def test_what_is_refused_is_an_error_in_the_journal(folder: Path, bare: bool) -> None:
    server = Nbdmirror(folder, folder / "none", bare=bare)
    with Journal() as journal, in_journal(server, journal) as process:
        assert journal.read_until(r"none.*\n").startswith("<3>nbdmirror: ")
        assert process.wait(WAIT_S_MAX) == 1


def test_lines_that_go_elsewhere_are_plain(start: Start, disk: Path) -> None:
    """JOURNAL_STREAM is inherited by what runs within a service with its stderr redirected."""

    class Redirected(Nbdmirror):
        def environment(self) -> dict[str, str]:
            return {**super().environment(), "JOURNAL_STREAM": "1:1"}

    server = Redirected(disk.parent, disk, options=("--mirror-to", NOWHERE))
    server.allowed.append("mirror-to")
    start(server)
    wait_until(lambda: "served without" in server.stderr, "the mirror is refused")
    assert re.search("^nbdmirror: [-0-9: ]+ ERROR: mirror-to: ", server.stderr, re.MULTILINE)


def test_each_line_of_a_message_has_the_priority() -> None:
    assert logs.with_priority("one\ntwo", 40) == "<3>one\n<3>two"
    levels = (50, 40, 35, 30, 20, 10)
    assert [logs.with_priority("", level) for level in levels] == [
        *["<2>", "<3>", "<4>", "<4>", "<6>", "<7>"]
    ]


def test_in_the_background_lines_go_to_syslog(disk: Path) -> None:
    folder = disk.parent
    pidfile = folder / "pid"
    # Its name is fixed: the server is told another one as it starts.
    place = f"from nbdmirror import logs\nlogs.SYSLOG_SOCKET = {str(folder / 'log')!r}\n"
    (folder / "sitecustomize.py").write_text(place)
    server = Nbdmirror(folder, disk, options=("--mirror-to", NOWHERE))
    server.options += ("--daemonize", "--pidfile", str(pidfile))
    environ = server.environment()
    environ["PYTHONPATH"] = f"{folder}{os.pathsep}{environ['PYTHONPATH']}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(folder / "log"))
        syslog.settimeout(WAIT_S_MAX)
        subprocess.run(server.argv(), env=environ, check=True, timeout=WAIT_S_MAX)
        try:
            while "mirror-to" not in (line := syslog.recv(1 << 16).decode()):
                pass  # first what is served
            wait_until(server.is_ready, "the daemon serves")
        finally:
            pid = int(pidfile.read_text())
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not os.path.exists(server.qmp_path), "it ends")
    assert re.match(rf"<27>nbdmirror\[{pid}\]: mirror-to: ", line), line


# systemd


class Supervisor:
    """The receiving end of sd_notify(3)."""

    def __init__(self, folder: Path, *, abstract: bool = False) -> None:
        name = str(folder / "notify")
        self.address = f"@{name}" if abstract else name
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{name}" if abstract else name)
        self.socket.settimeout(WAIT_S_MAX)
        self.heard: list[str] = []

    def next(self) -> dict[str, str]:
        message = self.socket.recv(1 << 16).decode()
        self.heard.append(message)
        return dict(line.split("=", 1) for line in message.split("\n"))

    def wait_for(self, **wanted: str) -> None:
        while not wanted.items() <= self.next().items():
            pass

    def drain(self) -> None:
        """Forget what has been said."""
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.next()
        self.socket.settimeout(WAIT_S_MAX)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class Supervised(Nbdmirror):
    notify_socket = ""

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "NOTIFY_SOCKET": self.notify_socket}


@pytest.mark.parametrize("abstract", [False, True])
def test_ready_when_it_serves_and_stopping_when_it_ends(disk: Path, abstract: bool) -> None:
    server = Supervised(disk.parent, disk)
    with Supervisor(disk.parent, abstract=abstract) as supervisor:
        server.notify_socket = supervisor.address
        server.spawn()
        try:
            assert supervisor.next() == {"READY": "1", "STATUS": "serving disk0"}
            # No waiting and no second attempt: it said that it serves.
            with connected(server.uri()) as guest:
                assert guest.pread(512, 0) == disk.read_bytes()[:512]
            server.qmp.execute("query-status")
        except BaseException:
            server.abandon()
            raise
        server.stop()
        assert supervisor.next() == {"STOPPING": "1"}


def test_the_status_follows_jobs_and_pivots(disk: Path, start: Start) -> None:
    target = start(QemuNbd(disk.parent, make_noise(disk.parent / "target.img", 4 * MiB)))
    with Supervisor(disk.parent) as supervisor:
        server = Supervised(
            disk.parent, f"sys={disk}", f"data={make_image(disk.parent / 'd', MiB)}"
        )
        server.notify_socket = supervisor.address
        start(server)
        supervisor.wait_for(READY="1", STATUS="serving sys, data")
        server.qmp.start_mirror(target.uri(), device="sys")
        supervisor.wait_for(STATUS="serving sys, data; job j: ready")
        server.qmp.wait_ready()
        server.qmp.complete()
        supervisor.wait_for(STATUS="serving sys, data; sys: served from its mirror's target")
        assert_identical(disk, target.image)
        server.qmp.execute("quit")
        supervisor.wait_for(STOPPING="1")


def test_a_server_that_was_killed_is_back_with_its_mirror(folder: Path, start: Start) -> None:
    """As the unit has it: started again by the same command, over what the killed one has left.
    What that takes is printed; the unit waits for a tenth of a second more."""
    disk = make_image(folder / "disk.img", 4 * MiB)
    target = start(QemuNbd(folder, make_noise(folder / "target.img", 4 * MiB)))

    class Service(Kept):
        def environment(self) -> dict[str, str]:
            return {**super().environment(), "NOTIFY_SOCKET": str(folder / "notify")}

    with Supervisor(folder) as supervisor:
        server = start(Service(folder, disk))
        server.qmp.start_mirror(target.uri(), device="vda")
        server.qmp.wait_ready()
        with Guest(server.uri(), disk) as guest:
            guest.wait_for_requests(50)
        for _ in range(2):  # however often
            server.kill()
            supervisor.drain()
            killed_s = time.monotonic()
            server.spawn()
            supervisor.wait_for(READY="1")
            sys.stdout.write(f"back after {time.monotonic() - killed_s:.2f} s\n")
            with Guest(server.uri(), guest.model, seed=2) as guest:  # at once
                guest.wait_for_requests(50)
            wait_until(lambda: server.qmp.job()["ready"], "the mirror went on")
        server.qmp.complete()
        assert_identical(guest.model, target.uri())


def test_a_service_that_cannot_start_does_not_say_that_it_serves(folder: Path) -> None:
    server = Supervised(folder, folder / "none", bare=True)
    with Supervisor(folder) as supervisor:
        server.notify_socket = supervisor.address
        assert server.spawn().wait(WAIT_S_MAX) == 1
        supervisor.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            supervisor.next()


def test_a_supervisor_that_is_gone_harms_nothing(disk: Path, start: Start) -> None:
    server = Supervised(disk.parent, disk)
    server.notify_socket = str(disk.parent / "nobody")
    start(server)
    assert_identical(disk, server.uri())


def test_commands_do_not_speak_to_the_supervisor(folder: Path) -> None:
    with Supervisor(folder) as supervisor:
        environ = {**os.environ, "NOTIFY_SOCKET": supervisor.address}
        run("env", f"NOTIFY_SOCKET={environ['NOTIFY_SOCKET']}", sys.executable, "-m", "nbdmirror",
            "plugin-path")  # fmt: skip
        supervisor.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            supervisor.next()


# Containers


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a namespace of processes")
def test_as_the_first_process_of_a_container_it_ends_on_a_signal(disk: Path) -> None:
    """The kernel keeps signals from such a process for which it has not provided."""

    class Contained(Nbdmirror):
        def argv(self) -> list[str]:
            return ["unshare", "--pid", "--fork", "--mount-proc", *super().argv()]

        def stop(self) -> None:
            if self.process is not None:
                children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
                os.kill(int(children), signal.SIGTERM)
                self.process.wait(WAIT_S_MAX)
            super().stop()

    with Contained(disk.parent, disk) as server, connected(server.uri()) as guest:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().strip()
        status = Path(f"/proc/{children}/status").read_text()
        assert re.search(r"^NSpid:\t\d+\t1$", status, re.MULTILINE)
        assert guest.pread(512, 0) == disk.read_bytes()[:512]
