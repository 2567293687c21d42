"""A disk that fails each request of a guest that tries again and again: the log has the first
lines and a count, in the foreground and in syslog, and all else that is to be said."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import nbd
import pytest
from support.clients import connected
from support.fixtures import Start
from support.images import MiB, make_image
from support.processes import patched
from support.seeds import SEED
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import WAIT_S_MAX, wait_until

REQUESTS = 2000
LINE = r"pread: error: "
COUNT = re.compile(r"a guest's request failed: .* \((\d+) more within")


@pytest.fixture
def trouble(folder: Path) -> Path:
    """While this file is there reads of the source fail."""
    return folder / "trouble"


@pytest.fixture
def source(start: Start, folder: Path, trouble: Path) -> NbdkitTarget:
    image = make_image(folder / "source.img", MiB)
    parameters = (str(image), "error=EIO", "error-pread-rate=100%", f"error-pread-file={trouble}")
    return start(NbdkitTarget(folder, "file", *parameters, filters=("error",)))


def fail(uri: str) -> None:
    with connected(uri) as guest:
        for _ in range(REQUESTS):
            with pytest.raises(nbd.Error):
                guest.pread(512, 0)


def count(said: str) -> int:
    """How many failures were said or counted."""
    return len(re.findall(LINE, said)) + sum(map(int, COUNT.findall(said)))


def test_in_the_foreground(start: Start, folder: Path, source: NbdkitTarget, trouble: Path) -> None:
    target = start(QemuNbd(folder, make_image(folder / "target.img", MiB)))
    server = start(Nbdmirror(folder, source.uri()))
    server.allowed = [LINE, "request failed", "read error", "ended"]
    trouble.touch()
    fail(server.uri())
    server.qmp.add_target("t", target)
    server.qmp.start_mirror("t")
    assert "error" in server.qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")
    fail(server.uri())
    trouble.unlink()
    with connected(server.uri()) as guest:
        assert guest.pread(512, 0) is not None
    server.stop()
    said = server.stderr
    assert count(said) == 2 * REQUESTS
    assert "job j" in said, "what a mirror does is said in between"
    assert len(said.splitlines()) < 40


def test_clients_and_guests_that_send_rubbish(start: Start, folder: Path) -> None:
    server = start(Nbdmirror(folder, make_image(folder / "disk.img", MiB)))
    server.allowed = ["no export is called", "request failed"]
    for number in range(30):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.qmp_path))
            client.sendall(b"]\n" * 2000)
            while client.recv(1 << 16):
                pass
        with pytest.raises(nbd.Error), connected(server.uri(f"rubbish{number}")):
            pass
    server.stop()
    said = server.stderr
    for words in ("sends garbage", "no export is called"):
        lines = [line for line in said.splitlines() if words in line]
        counts = [int(n) for line in lines for n in re.findall(r"\((\d+) more within", line)]
        assert len(lines) - len(counts) + sum(counts) == 30
        assert len(lines) < 20


FORGED = "nbdmirror: 2026-12-01 03:00:00 INFO: job vda: pivoted"


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_names_of_exports_that_clients_make_up(start: Start, folder: Path, log_format: str) -> None:
    """They write no lines of their own, and each of them is not a cause of its own."""
    options = ("--log-format", log_format)
    server = start(Nbdmirror(folder, make_image(folder / "disk.img", MiB), options=options))
    server.allowed = ["no export is called", "request failed"]
    rng = random.Random(SEED)
    kinds = [b"%d\n" + FORGED.encode(), b"it's %d", b"%d\x85\xff", b"\x1b[2J\r<0>%d\xe2\x80\xa8"]
    names = [kind % rng.getrandbits(99) for kind in kinds for _ in range(100)]
    names += [random_word(rng) + b"\n" + random_word(rng) for _ in range(100)]
    for name in names:
        # Python cannot decode libnbd's text with a name that is not UTF-8.
        refused = pytest.raises((nbd.Error, UnicodeDecodeError))
        with refused, connected(server.uri(quote(name, safe=""))):
            pass
    server.stop()
    said = server.stderr
    assert "Traceback" not in said
    begin = "{" if log_format == "json" else ("nbdkit: ", "nbdmirror: ")
    assert all(line.startswith(begin) and line.isprintable() for line in said.split("\n")[:-1])
    assert not re.search(f"^{FORGED}", said, re.MULTILINE)
    assert FORGED not in [json.loads(line)["message"] for line in said.splitlines() if begin == "{"]
    lines = [line for line in said.splitlines() if "no export is called" in line]
    counts = [int(n) for line in lines for n in re.findall(r"\((\d+) more within", line)]
    assert len(lines) - len(counts) + sum(counts) == len(names)
    assert len(lines) < 30


def random_word(rng: random.Random) -> bytes:
    """Without digits, which are not a part of a cause."""
    return bytes(rng.choices(b"abcdefghij", k=20))


def test_in_the_background(folder: Path, source: NbdkitTarget, trouble: Path) -> None:
    place = f"from nbdmirror import logs\nlogs.SYSLOG_SOCKET = {str(folder / 'log')!r}\n"
    pidfile = folder / "pid"
    server = Nbdmirror(folder, source.uri(), options=("--daemonize", "--pidfile", str(pidfile)))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(folder / "log"))
        syslog.settimeout(WAIT_S_MAX)
        environment = patched(server.environment(), folder, place)
        subprocess.run(server.argv(), env=environment, check=True, timeout=WAIT_S_MAX)
        try:
            trouble.touch()
            fail(server.uri())
        finally:
            os.kill(int(pidfile.read_text()), signal.SIGTERM)
        said: list[str] = []
        while count("\n".join(said)) < REQUESTS:
            said.append(syslog.recv(1 << 16).decode())
        wait_until(lambda: not os.path.exists(server.qmp_path), "it ends")
    assert count("\n".join(said)) == REQUESTS
    assert len(said) < 40


def speak(server: Nbdmirror, words: bytes) -> None:
    """Be a client that is none, or hang up too early."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.socket))
        client.recv(18)
        with suppress(OSError):
            client.sendall(words)
            client.recv(100)


NOT_NBD = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HUGE_OPTION = b"\0\0\0\1IHAVEOPT\0\0\0\x63\xff\xff\xff\xff"


def counted(said: str, text: str) -> int:
    """How many lines with `text` the log has, or counts."""
    lines = [one for one in said.splitlines() if text in one]
    counts = [int(n) for one in lines for n in re.findall(r"\((\d+) more within", one)]
    return len(lines) - len(counts) + sum(counts)


@pytest.mark.parametrize("form", ["plain", "json"])
@pytest.mark.parametrize(
    ("words", "line"), [(NOT_NBD, "unexpected flags"), (HUGE_OPTION, "data too long")]
)
def test_lines_that_nbdkit_writes_by_itself(
    start: Start, folder: Path, form: str, words: bytes, line: str
) -> None:
    """Of clients that are no guests; those of requests that make no sense follow."""
    options = ("--log-format", form)
    server = start(Nbdmirror(folder, make_image(folder / "disk.img", MiB), options=options))
    server.allowed = [line, "are out of range"]
    for _ in range(100):
        speak(server, words)
    with connected(server.uri()) as guest:
        guest.set_strict_mode(0)
        for number in range(100):
            with pytest.raises(nbd.Error):
                guest.pread(512, (1 << 40) + 512 * number)
    server.stop()
    said = server.stderr
    for text in (line, "are out of range"):
        assert counted(said, text) == 100
    assert len(said.splitlines()) < 40


LATE = """
import threading
import nbdmirror.quiet_log as quiet_log

stopping = threading.Event()
pass_on, stop = quiet_log._pass_on, quiet_log.Relay.stop

def pass_on_late(reader, write):
    stopping.wait()
    pass_on(reader, write)

def stop_late(relay):
    stopping.set()
    stop(relay)

quiet_log._pass_on, quiet_log.Relay.stop = pass_on_late, stop_late
"""


class Late(Nbdmirror):
    """What nbdkit writes is read when the server ends, as on a busy machine."""

    patches = LATE


def test_lines_that_nbdkit_writes_last_are_counted_too(start: Start, folder: Path) -> None:
    server = start(Late(folder, make_image(folder / "disk.img", MiB)))
    server.allowed = ["are out of range"]
    with connected(server.uri()) as guest:
        guest.set_strict_mode(0)
        for number in range(100):
            with pytest.raises(nbd.Error):
                guest.pread(512, (1 << 40) + 512 * number)
    server.stop()
    assert counted(server.stderr, "are out of range") == 100
