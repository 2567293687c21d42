"""A terminal of our own, with a process on it: what is on its screen, as an eye would see it."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
import threading
from typing import Self

import pyte
from support.waiting import WAIT_S_MAX, wait_until


class Terminal:
    """Runs `command` on a terminal of that size until the end of a `with`."""

    def __init__(
        self, command: list[str], *, env: dict[str, str], rows: int = 24, columns: int = 80
    ) -> None:
        self.written = b""
        """All that the process has written."""
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self._ours, theirs = pty.openpty()
        self._set_size(rows, columns)
        self.process = subprocess.Popen(
            command, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(WAIT_S_MAX)
        os.close(self._ours)

    @property
    def lines(self) -> list[str]:
        """What is on the screen, without the blanks at the ends of lines and below the last one."""
        with self._lock:
            lines = [line.rstrip() for line in self._screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def has_cursor(self) -> bool:
        return not self._screen.cursor.hidden

    @property
    def colors(self) -> set[str]:
        """Of all characters on the screen."""
        with self._lock:
            return {
                one.fg for row in self._screen.buffer.values() for one in row.values() if one.data
            }

    def resize(self, rows: int, columns: int) -> None:
        with self._lock:
            self._screen.resize(rows, columns)
        self._set_size(rows, columns)

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.text, f"{text!r} is on the screen:\n{self.text}")

    def end(self, number: int = signal.SIGINT) -> int:
        """Send the signal, and return the exit status, once all is on the screen."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        status = self.process.wait(WAIT_S_MAX)
        self._reader.join(WAIT_S_MAX)
        return status

    def _set_size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 1 << 16)
            except OSError:  # how Linux tells the end of a terminal
                return
            with self._lock:
                self.written += data
                self._stream.feed(data)
