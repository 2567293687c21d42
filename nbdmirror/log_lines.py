"""Writes log lines where they belong, and never waits for who reads them there: a terminal that is
stopped (Ctrl-S), a pipe that nobody empties, a journal or a syslog daemon that hangs. Whoever logs
may be the event loop, with guests held.

A line that cannot be written now is kept, with the lines after it, and a thread writes them later:
also if a disk is full, or a syslog daemon is not there yet, or not any more.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import threading
from collections import deque
from contextlib import suppress
from typing import Protocol

from nbdmirror.threads import start_thread_now

LINES_MAX = 1000
"""Lines that are kept; further ones are counted."""

RETRY_S = 0.1
FAILED_RETRY_S = 1.0
"""After an error: it may last for ever."""
END_S_MAX = 1.0
"""How long the end of the log waits for a reader."""


class Send(Protocol):
    """Does not block."""

    def __call__(self, line: bytes) -> int:
        """Write a line, and return how many bytes of it were written. Raises BlockingIOError if
        there is no room now, and OSError if the line cannot be written at all."""

    def close(self) -> None: ...


class LineHandler(logging.Handler):
    """Writes records with `send`, as its formatter makes them."""

    def __init__(self, send: Send, *, end: bytes = b"\n") -> None:
        """`end` follows each record."""
        super().__init__()
        self._send = send
        self._end = end
        self._kept: deque[bytes] = deque()
        self._lost = 0
        self._thread: threading.Thread | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether lines wait for room."""
        return bool(self._kept)

    def emit(self, record: logging.LogRecord) -> None:
        """Write or keep the line. With `lock` held, as `handle` does."""
        try:
            line = self._encode(record)
        except Exception:  # noqa: BLE001 - as logging does: a bad record is no reason to fail
            self.handleError(record)
            return
        self._add(line)

    def write(self, text: str) -> None:
        """Write or keep a line as it is."""
        self.acquire()
        try:
            self._add(text.encode(errors="backslashreplace") + self._end)
        finally:
            self.release()

    def _add(self, line: bytes) -> None:
        if len(self._kept) >= LINES_MAX:
            self._lost += 1
        else:
            self._kept.append(line)
        if self._thread is None and self._write_kept():
            self._start_thread()

    def stop(self) -> None:
        """Give the reader END_S_MAX for what is kept. A place that fails gets a last attempt."""
        self.acquire()
        try:
            thread, pause_s = self._thread, self._write_kept()
        finally:
            self.release()
        if thread is not None and pause_s == RETRY_S:
            thread.join(END_S_MAX)

    def close(self) -> None:
        self.acquire()
        try:
            self._kept.clear()
            self._send.close()
        finally:
            self.release()
        super().close()

    def _encode(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode(errors="backslashreplace") + self._end

    def _write_kept(self) -> float:
        """Write what there is room for. Returns the pause until the rest is tried again; 0: there
        is no rest."""
        while self._kept:
            line = self._kept[0]
            try:
                written = self._send(line)
            except BlockingIOError:
                return RETRY_S
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    return FAILED_RETRY_S
                self._lost += 1  # this one is too long for syslog
                written = len(line)
            if written < len(line):
                self._kept[0] = line[written:]
                continue
            self._kept.popleft()
            if self._lost and not self._kept:
                text = f"{self._lost} lines of this log are lost: they could not be written"
                self._lost = 0
                record = logging.LogRecord("nbdmirror", logging.WARNING, "", 0, text, None, None)
                self._kept.append(self._encode(record))
        return 0.0

    def _start_thread(self) -> None:
        with suppress(RuntimeError):  # no more threads: the next line tries again
            self._thread = start_thread_now(self._write_later, "nbdmirror-log")

    def _write_later(self) -> None:
        pause, pause_s = threading.Event(), RETRY_S
        while pause_s:
            pause.wait(pause_s)
            self.acquire()
            try:
                if not (pause_s := self._write_kept()):
                    self._thread = None
            finally:
                self.release()


def has_room(fd: int) -> bool:
    """Whether a line can be written to `fd` without waiting for a reader, or fails at once."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


class Stream:
    """A copy of a descriptor, as a `Send`. The descriptor itself stays as it is: other processes
    that share it rely on that."""

    def __init__(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        self._fd = -1
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            with suppress(OSError):  # no /proc, or another user's terminal
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._fd = os.open(f"/proc/self/fd/{fd}", flags)
        if self._fd < 0:
            self._fd = os.dup(fd)
        self._socket = None
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=self._fd)

    def __call__(self, line: bytes) -> int:
        if self._socket is not None:
            return self._socket.send(line, socket.MSG_DONTWAIT)
        if not has_room(self._fd):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self._fd, line)

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if self._socket is not None:
            self._socket.close()
        elif fd >= 0:
            os.close(fd)


class Syslog:
    """The syslog socket at `path`, as a `Send`. Connects when there is something to send, and again
    after an error, since the daemon may have been started again."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def __call__(self, line: bytes) -> int:
        if self._socket is not None:
            try:
                return self._socket.send(line)
            except BlockingIOError:
                raise
            except OSError:
                self.close()
        self._socket = self._connected()
        return self._socket.send(line)

    def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _connected(self) -> socket.socket:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            found = socket.socket(socket.AF_UNIX, kind)
            found.setblocking(False)
            try:
                found.connect(self._path)
            except OSError as error:
                found.close()
                if error.errno != errno.EPROTOTYPE:
                    raise
            else:
                return found
        raise OSError(errno.EPROTOTYPE, os.strerror(errno.EPROTOTYPE), self._path)
