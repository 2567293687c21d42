"""Log lines whose reader hangs: nobody who logs waits, and nothing is lost that can be kept."""

from __future__ import annotations

import logging
import os
import pty
import socket
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.waiting import wait_until

from nbdmirror.log_lines import LINES_MAX, LineHandler, Send, Stream, Syslog

TEXT = "x" * 200


@dataclass
class Reader:
    """Who reads the log, or does not."""

    handler: LineHandler
    read: Callable[[], bytes]
    """What can be read now."""
    resume: Callable[[], None] = lambda: None


def available(fd: int) -> bytes:
    found = b""
    with suppress(BlockingIOError):
        while more := os.read(fd, 1 << 16):
            found += more
    return found


def handled(stack: ExitStack, send: Send) -> LineHandler:
    handler = LineHandler(send)
    stack.callback(handler.close)
    return handler


def pipe(stack: ExitStack, _: Path) -> Reader:
    ours, theirs = os.pipe()
    stack.callback(os.close, ours)
    stack.callback(os.close, theirs)
    os.set_blocking(ours, False)
    return Reader(handled(stack, Stream(theirs)), lambda: available(ours))


def journal(stack: ExitStack, _: Path) -> Reader:
    ours, theirs = (stack.enter_context(one) for one in socket.socketpair())
    ours.setblocking(False)
    return Reader(handled(stack, Stream(theirs.fileno())), lambda: available(ours.fileno()))


def terminal(stack: ExitStack, _: Path) -> Reader:
    """Ctrl-S was pressed."""
    ours, theirs = pty.openpty()
    stack.callback(os.close, ours)
    stack.callback(os.close, theirs)
    tty.setraw(theirs)
    os.set_blocking(ours, False)
    termios.tcflow(theirs, termios.TCOOFF)
    resume = lambda: termios.tcflow(theirs, termios.TCOON)  # noqa: E731
    return Reader(handled(stack, Stream(theirs)), lambda: available(ours), resume)


def syslog(stack: ExitStack, folder: Path) -> Reader:
    daemon = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    daemon.bind(str(folder / "log"))
    daemon.setblocking(False)
    return Reader(handled(stack, Syslog(str(folder / "log"))), lambda: available(daemon.fileno()))


@pytest.fixture(params=[pipe, journal, terminal, syslog])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reader]:
    with ExitStack() as stack:
        yield request.param(stack, tmp_path)


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("nbdmirror", logging.INFO, "", 0, text, None, None)


def fill(handler: LineHandler) -> int:
    """Until there is no room. Returns the number of lines."""
    number = 0
    while not handler.is_stuck:
        handler.handle(record(f"{number} {TEXT}"))
        number += 1
        assert number < 1 << 16
    return number


def everything(reader: Reader, until: str) -> list[str]:
    found = b""

    def is_there() -> bool:
        nonlocal found
        found += reader.read()
        return until.encode() in found

    wait_until(is_there, f"{until} is read")
    return found.decode().splitlines()


def test_nobody_waits_for_a_reader_that_hangs(reader: Reader) -> None:
    handler = reader.handler
    number = fill(handler)
    for more in range(100):
        handler.handle(record(f"{number + more} {TEXT}"))
    reader.resume()
    lines = everything(reader, f"{number + 99} {TEXT}\n")
    assert lines == [f"{n} {TEXT}" for n in range(number + 100)]
    wait_until(lambda: not handler.is_stuck, "all is written")
    handler.handle(record("again at once"))
    assert everything(reader, "again at once\n") == ["again at once"]


@pytest.mark.slow
def test_what_is_lost_is_counted(reader: Reader) -> None:
    handler = reader.handler
    number = fill(handler) - 1  # the last one is kept
    for more in range(LINES_MAX + 6):
        handler.handle(record(f"{number + 1 + more} {TEXT}"))
    reader.resume()
    lines = everything(reader, "lines of this log are lost")
    assert lines[-1] == "7 lines of this log are lost: nobody read it"
    assert lines[:-1] == [f"{n} {TEXT}" for n in range(number + LINES_MAX)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_reader_that_is_gone(stack: ExitStack, tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    handler = handled(stack, Stream(theirs))
    os.close(ours)
    os.close(theirs)
    for _ in range(3):
        handler.handle(record("to nobody"))
    nowhere = handled(stack, Syslog(str(tmp_path / "log")))
    nowhere.handle(record("to nobody"))
    assert not handler.is_stuck and not nowhere.is_stuck


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_syslog_that_is_started_again(stack: ExitStack, tmp_path: Path, kind: int) -> None:
    handler = handled(stack, Syslog(str(tmp_path / "log")))
    for number in range(2):
        with socket.socket(socket.AF_UNIX, kind) as daemon:
            daemon.bind(str(tmp_path / "log"))
            if kind == socket.SOCK_STREAM:
                daemon.listen()
            handler.handle(record(str(number)))
            if kind == socket.SOCK_STREAM:
                with daemon.accept()[0] as connection:
                    assert connection.recv(100) == f"{number}\n".encode()
            else:
                assert daemon.recv(100) == f"{number}\n".encode()
        (tmp_path / "log").unlink()


def test_a_log_file_is_appended_to(stack: ExitStack, tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb", buffering=0) as file:
        file.write(b"nbdkit's\n")
        handler = handled(stack, Stream(file.fileno()))
        handler.handle(record("ours"))
        file.write(b"nbdkit's\n")
        handler.handle(record("\udce4"))
    assert (tmp_path / "log").read_text() == "nbdkit's\nours\nnbdkit's\n\\udce4\n"
