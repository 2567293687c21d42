"""A server that runs in a process of ours: how it starts, what it may say, how it ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import nbd
from support.clients import connected
from support.waiting import START_S_MAX, STOP_S_MAX, wait_until

_numbers = itertools.count(1)

ABORTED = re.compile(r"raw_send_socket: Assertion `sock >= 0' failed")
"""The last words of an nbdkit before 1.34 whose client hung up while replies of two threads waited
for it, whatever its plugin (docs/guarantees.md)."""


class Server:
    """A server process of ours. Unstarted until `start` or `with`, which returns when it serves."""

    name = "server"
    unwanted = ""
    """A regular expression: no line of its stderr may match it."""
    inside: tuple[str, ...] = ()
    """A command that runs it somewhere else: in a network namespace, say."""
    may_abort = False
    """A peer on nbdkit that a test may leave with requests under way: see `ABORTED`."""
    layer = 0
    """Of several, those of a higher layer are clients of a lower one's: they are stopped first."""

    def __init__(self, folder: Path) -> None:
        self.number = next(_numbers)
        self.folder = folder
        self.socket = folder / f"{self.name}{self.number}.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.allowed: list[str] = []
        """Regular expressions of stderr lines that this test provokes."""
        self._stderr_path = folder / f"{self.name}{self.number}.stderr"

    def argv(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def uri(self, export: str = "") -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def stderr(self) -> str:
        return self._stderr_path.read_text(errors="replace")

    def wait_to_say(self, text: str) -> None:
        """For lines of nbdkit's own, which come by way of nbdmirror's log, a moment later."""
        wait_until(lambda: text in self.stderr, f"{self.name} says: {text}")

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process; `wait_ready` waits for it."""
        with self._stderr_path.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*self.inside, *self.argv()],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        return self.process

    def start(self) -> Self:
        self.spawn()
        try:
            wait_until(self._look, f"{self.name} is ready", START_S_MAX)
        except BaseException:
            self.kill()
            raise
        return self

    def come_back(self) -> None:
        """Start again on the same socket, after a kill, which leaves the socket's file."""
        assert self.process is None
        self.socket.unlink(missing_ok=True)
        self.start()

    def is_ready(self) -> bool:
        with contextlib.suppress(nbd.Error), connected(self.uri()):
            return True
        return False

    def _look(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} did not start: {self.stderr}"
        return self.is_ready()

    def stop(self) -> None:
        """End it in order; it must have nothing to complain of."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} does not end: {self.stderr}") from None
        self.process = None
        self.check_end(code)

    def check_end(self, code: int) -> None:
        if self.may_abort and code == -signal.SIGABRT and ABORTED.search(self.stderr):
            return
        assert code == 0, f"{self.name} ended with {code}: {self.stderr}"
        if self.unwanted:
            bad = [
                line
                for line in self.stderr.splitlines()
                if re.search(self.unwanted, line)
                and not any(re.search(pattern, line) for pattern in self.allowed)
            ]
            assert not bad, f"{self.name} said: {self.stderr}"

    def kill(self) -> None:
        """End it now, whatever it does; no questions asked."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_S_MAX)
            self.process = None

    def abandon(self) -> None:
        """The test has failed: kill it, and show what it said."""
        self.kill()
        if self._stderr_path.exists():
            sys.stderr.write(f"--- {self.name}{self.number}\n{self.stderr[-5000:]}")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.stop()
        else:
            self.abandon()
