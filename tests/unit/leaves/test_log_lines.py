"""Log lines whose reader hangs: nobody who logs waits, and nothing is lost that can be kept."""

from __future__ import annotations

import logging
import os
import pty
import resource
import socket
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
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
    lines = everything(reader, "lines of this log are lost: they could not be written\n")
    assert lines[-1] == "7 lines of this log are lost: they could not be written"
    assert lines[:-1] == [f"{n} {TEXT}" for n in range(number + LINES_MAX)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_reader_that_is_gone(stack: ExitStack) -> None:
    """Nobody waits for another one, and the end does not either."""
    ours, theirs = os.pipe()
    handler = handled(stack, Stream(theirs))
    os.close(ours)
    os.close(theirs)
    for _ in range(LINES_MAX + 1):
        handler.handle(record("to nobody"))
    assert handler.is_stuck
    handler.stop()


def fifo(stack: ExitStack, folder: Path) -> Reader:
    """Its reader is started again."""
    os.mkfifo(folder / "fifo")
    first = os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    theirs = os.open(folder / "fifo", os.O_WRONLY)
    stack.callback(os.close, theirs)
    os.close(first)
    found: list[int] = []

    def resume() -> None:
        found.append(os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK))
        stack.callback(os.close, found[0])

    return Reader(handled(stack, Stream(theirs)), lambda: available(found[0]), resume)


def full_disk(stack: ExitStack, folder: Path) -> Reader:
    """The first line fits into it by half."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resume = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
    stack.callback(resume)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    theirs = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    ours = os.open(folder / "log", os.O_RDONLY)
    stack.callback(os.close, theirs)
    stack.callback(os.close, ours)
    return Reader(handled(stack, Stream(theirs)), lambda: available(ours), resume)


def late_syslog(stack: ExitStack, folder: Path) -> Reader:
    """It is not there yet, as in an early boot."""
    daemon = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    daemon.setblocking(False)
    resume = partial(daemon.bind, str(folder / "log"))
    return Reader(
        handled(stack, Syslog(str(folder / "log"))), lambda: available(daemon.fileno()), resume
    )


@pytest.mark.parametrize("kind", [fifo, full_disk, late_syslog])
def test_a_place_that_can_be_written_to_later(
    stack: ExitStack, tmp_path: Path, kind: Callable[[ExitStack, Path], Reader]
) -> None:
    reader = kind(stack, tmp_path)
    for number in range(LINES_MAX + 3):
        reader.handler.handle(record(f"{number} {TEXT}"))
    reader.resume()
    lines = everything(reader, "lines of this log are lost: they could not be written\n")
    assert lines[:-1] == [f"{n} {TEXT}" for n in range(LINES_MAX)]
    assert lines[-1] == "3 lines of this log are lost: they could not be written"


def test_a_line_that_is_too_long_for_syslog(stack: ExitStack, tmp_path: Path) -> None:
    """It is lost, and not all that comes after it."""
    reader = syslog(stack, tmp_path)
    reader.handler.handle(record("x" * (1 << 20)))
    reader.handler.handle(record("the next one"))
    assert everything(reader, "the next one") == [
        "1 lines of this log are lost: they could not be written",
        "the next one",
    ]


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
