"""Signals, terminals and standard streams: what ends a server, and what must not.

Whoever started it, from a script, a terminal or under nohup, a server goes on when that is over."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_image
from support.processes import ROOT, nbdmirror, nbdmirror_environment, patched
from support.servers import Nbdmirror
from support.waiting import START_S_MAX, STOP_S_MAX, WAIT_S_MAX, wait_until

from nbdmirror.nbdkit_host.signals import MEANINGLESS

NOWHERE = "nbd+unix:///?socket=/nonexistent/target.sock"


def signals_of(pid: int, name: str) -> set[int]:
    """`name` is SigIgn, SigBlk, ShdPnd ... of proc(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith(f"{name}:"))
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def works(server: Nbdmirror, disk: Path) -> None:
    """Guests are served, a while after this was asked."""
    with Guest(server.uri(), disk, pause_s=0) as guest:
        guest.wait_for_requests(100)
    assert_identical(guest.model, server.uri())


# What was ignored at the start


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "cli"])
def test_what_was_ignored_at_the_start_stays_ignored(start: Start, disk: Path, bare: bool) -> None:
    """nohup does that to SIGHUP, a script to the others of what it starts in its background. The
    fixture ends the server by SIGTERM, which works in any case."""
    server = Nbdmirror(disk.parent, disk, bare=bare)
    server.inside = ("env", "--ignore-signal=HUP", "--ignore-signal=INT", "--ignore-signal=QUIT")
    start(server)
    numbers = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT}
    for number in numbers:
        os.kill(server.pid, number)
    server.qmp.execute("query-status")
    # Nobody has taken them, and nobody will.
    assert numbers <= signals_of(server.pid, "ShdPnd") | signals_of(server.pid, "SigIgn")
    works(server, disk)


def test_a_scripts_background_job_is_spared_the_terminals_hangup(start: Start, disk: Path) -> None:
    server = Nbdmirror(disk.parent, disk)
    server.inside = ("env", "--ignore-signal=INT", "--ignore-signal=QUIT", "--default-signal=HUP")
    start(server)
    os.kill(server.pid, signal.SIGHUP)
    server.qmp.execute("query-status")
    assert signal.SIGHUP in signals_of(server.pid, "ShdPnd") | signals_of(server.pid, "SigIgn")
    works(server, disk)


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "cli"])
def test_signals_that_mean_nothing_to_it(start: Start, disk: Path, bare: bool) -> None:
    """By default they would end it, or stop it, and the guests' disks with it."""
    server = start(Nbdmirror(disk.parent, disk, bare=bare))
    assert signals_of(server.pid, "SigIgn") >= MEANINGLESS
    for number in MEANINGLESS:
        os.kill(server.pid, number)
    works(server, disk)


# Whoever started it ends


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "cli"])
def test_it_outlives_the_script_that_started_it(disk: Path, bare: bool) -> None:
    server = Nbdmirror(disk.parent, disk, bare=bare)
    pidfile = disk.parent / "pid"
    script = subprocess.Popen(
        ["sh", "-c", f'"$@" & echo $! >{pidfile}; read line', "sh", *server.argv()],
        env=server.environment(),
        stdin=subprocess.PIPE,
    )
    wait_until(server.is_ready, "it serves", START_S_MAX)
    # The script writes it while the server starts already.
    wait_until(lambda: pidfile.exists() and pidfile.read_text().endswith("\n"), "its process")
    pid = int(pidfile.read_text())
    try:
        script.communicate(timeout=WAIT_S_MAX)
        works(server, disk)
        assert is_alive(pid)
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid), "it ends", STOP_S_MAX)
        server._close_qmp()


# In the background


@contextlib.contextmanager
def on_a_terminal(*argv: str) -> Iterator[tuple[int, int]]:
    """The process that is the terminal's first, and our end of it."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe(argv[0], argv, nbdmirror_environment())
    try:
        yield pid, terminal
    finally:
        with contextlib.suppress(OSError):
            os.close(terminal)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


class Daemon(Nbdmirror):
    """Its pid is in a file, and it is ended by that."""

    def __init__(self, folder: Path, disk: Path, *options: str, bare: bool = False) -> None:
        self.pidfile = folder / "pid"
        there = ("--daemonize", "--pidfile", str(self.pidfile), *options)
        super().__init__(folder, disk, bare=bare, options=() if bare else there)

    def argv(self) -> list[str]:
        words = super().argv()
        if self.bare:  # nbdkit goes into the background unless -f is said
            words[words.index("-f") : words.index("-f") + 1] = ["-P", str(self.pidfile)]
        return words

    def wait(self) -> int:
        wait_until(lambda: self.pidfile.exists() and self.pidfile.read_text(), "it has a pid")
        wait_until(self.is_ready, "it serves")
        return int(self.pidfile.read_text())

    def end(self) -> None:
        self._close_qmp()
        if self.pidfile.exists():
            pid = int(self.pidfile.read_text())
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not is_alive(pid), "it ends", STOP_S_MAX)
            self.pidfile.unlink(missing_ok=True)


@pytest.fixture
def daemon(disk: Path) -> Iterator[Daemon]:
    server = Daemon(disk.parent, disk)
    yield server
    server.end()


def press_ctrl_c(terminal: int) -> None:
    os.write(terminal, b"\x03")


@pytest.mark.parametrize("end", [press_ctrl_c, os.close], ids=["ctrl-c", "closed"])
def test_a_daemon_has_left_the_terminal_of_its_script(
    daemon: Daemon, disk: Path, end: Callable[[int], None]
) -> None:
    with on_a_terminal("sh", "-c", '"$@"; read line', "sh", *daemon.argv()) as (script, terminal):
        pid = daemon.wait()
        assert os.getsid(pid) != os.getsid(script)
        end(terminal)
        os.waitpid(script, 0)
        works(daemon, disk)


def test_a_daemon_outlives_a_terminal_whose_first_process_was_serve(
    daemon: Daemon, disk: Path
) -> None:
    """`ssh -t HOST nbdmirror serve --daemonize`: the terminal is hung up when the command has
    ended, which no daemon is quick enough to prevent."""
    with on_a_terminal(*daemon.argv()) as (serve, _):
        _, status = os.waitpid(serve, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        works(daemon, disk)


def test_nbdkit_by_itself_leaves_the_terminal_too(disk: Path) -> None:
    daemon = Daemon(disk.parent, disk, bare=True)
    try:
        with on_a_terminal("sh", "-c", '"$@"; read line', "sh", *daemon.argv()) as (script, _):
            pid = daemon.wait()
            assert os.getsid(pid) == pid != os.getsid(script)
    finally:
        daemon.end()


def test_a_daemon_serves_when_the_command_returns(daemon: Daemon, disk: Path) -> None:
    """Nothing has to be waited for: neither its number, nor its sockets. And it holds none of the
    descriptors that the command had: who reads its output gets to the end of that."""
    # Without a syslog there would be a warning. Any file is one here: nobody reads that log.
    there = f"from nbdmirror import logs\nlogs.SYSLOG_SOCKET = {str(disk)!r}\n"
    environment = patched(daemon.environment(), daemon.folder, there)
    done = subprocess.run(
        daemon.argv(), env=environment, capture_output=True, timeout=WAIT_S_MAX, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    pid = int(daemon.pidfile.read_text())
    daemon.qmp.execute("query-status")
    with connected(daemon.uri()) as guest:
        assert guest.pread(512, 0) == disk.read_bytes()[:512]
    assert [os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1)] == ["/dev/null"] * 2
    assert os.readlink(f"/proc/{pid}/cwd") == "/"


def test_a_daemon_that_fails_after_it_went_into_the_background(daemon: Daemon) -> None:
    """The reason is on the terminal, the exit status is 1, and nothing is left."""
    failing = "import nbdmirror.server.server as s\ndef start(self): raise OSError(28, 'No room')\n"
    failing += "s.Server.start = start\n"
    environment = patched(daemon.environment(), daemon.folder, failing)
    done = subprocess.run(
        daemon.argv(),
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S_MAX,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "nbdmirror: [Errno 28] No room\n")
    wait_until(lambda: not daemon.qmp_path.exists(), "it has tidied up")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_daemon_that_is_interrupted_before_it_serves(
    folder: Path, number: signal.Signals
) -> None:
    """Its disk's server takes the connection and says nothing. No process is left that would serve
    some time later."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(folder / "silent"))
        silent.listen()
        silent.settimeout(WAIT_S_MAX)
        server = Nbdmirror(folder, f"nbd+unix:///?socket={folder}/silent", options=("--daemonize",))
        server.inside = ("env", f"--default-signal={number.name[3:]}")
        process = server.spawn()
        connection, _ = silent.accept()
        with connection:
            connection.settimeout(WAIT_S_MAX)
            process.send_signal(number)
            assert process.wait(WAIT_S_MAX) == 128 + number
            assert connection.recv(1) == b""  # nbdkit has ended


# Standard streams


@pytest.mark.parametrize(
    ("closed", "background"), [("2>&-", False), ("<&- >&- 2>&-", False), ("<&- >&- 2>&-", True)]
)
def test_closed_streams_do_not_become_the_disk(disk: Path, closed: str, background: bool) -> None:
    """Whatever is opened next gets the number of a closed stream; log lines must not go there."""
    before = disk.read_bytes()
    server = Daemon(disk.parent, disk, "--mirror-to", NOWHERE)  # which is worth a line
    argv = [word for word in server.argv() if background or word != "--daemonize"]
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *argv], env=server.environment()
    )
    try:
        server.wait()
        streams = [os.readlink(f"/proc/{server.wait()}/fd/{number}") for number in (0, 1, 2)]
        assert str(disk) not in streams
        assert_identical(before, server.uri())
    finally:
        server.end()
        process.wait(STOP_S_MAX)
    assert disk.read_bytes() == before


def test_commands_without_an_output(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *server.argv()[:3], "status"]
    environment = server.environment() | {"NBDMIRROR_QMP": str(server.qmp_path)}
    assert subprocess.run(command, env=environment, timeout=WAIT_S_MAX, check=False).returncode == 0
    assert_identical(disk, server.uri())


def test_a_log_that_nobody_reads_any_more(folder: Path) -> None:
    """`serve 2>&1 | head -1`: the reader has gone, and lines go nowhere."""
    disk = make_image(folder / "disk.img", MiB)
    server = Nbdmirror(folder, disk, options=("--mirror-to", NOWHERE))
    ours, theirs = os.pipe()
    os.close(ours)
    server.process = subprocess.Popen(
        server.argv(), env=server.environment(), stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        wait_until(server._look, "it serves", START_S_MAX)
        works(server, disk)
    finally:
        server._close_qmp()
        server.process.terminate()
        assert server.process.wait(STOP_S_MAX) == 0


@pytest.mark.parametrize(("named", "shown"), [(".././", ""), ("vm/.././", "below/vm/../")])
def test_a_daemon_whose_control_socket_was_named_in_another_directory(
    disk: Path, monkeypatch: pytest.MonkeyPatch, named: str, shown: str
) -> None:
    """nbdkit goes to the root directory; `list` finds the socket that the process has."""
    daemon = Daemon(disk.parent, disk, bare=True)
    socket_ = daemon.qmp_path
    (disk.parent / "below").mkdir()
    (disk.parent / "current").mkdir()
    (disk.parent / "below" / "vm").symlink_to(disk.parent / "current")
    monkeypatch.chdir(disk.parent / "below")
    name = f"qmp={named}{socket_.name}"
    words = [word.replace(f"qmp={socket_}", name) for word in daemon.argv()]
    null = subprocess.DEVNULL
    subprocess.run(words, env=daemon.environment(), stdout=null, stderr=null, check=True)
    pid = daemon.wait()
    try:
        monkeypatch.chdir("/")
        place = f"{disk.parent}/{shown}{socket_.name}"
        assert f"{place}  process {pid}\n  disk0  " in nbdmirror("list").stdout
    finally:
        daemon.end()
