"""Processes that a benchmark starts, and ends by their ids; and a blocking QMP client for two of
them. Everything waits with a bound."""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_S_MAX = 20.0
STOP_S_MAX = 20.0
REPLY_S_MAX = 30.0
JOB_S_MAX = 120.0
POLL_S = 0.01

_CPUCLOCK_SCHED = 2
"""linux/posix-timers.h: the clock of what a process runs, exact to nanoseconds."""

_numbers = itertools.count(1)


class BenchError(Exception):
    """A measurement could not be made; the text says why, and what the server said."""


class Process:
    """A server that is started by `with` and serves by then."""

    name = "process"

    def __init__(self, folder: Path) -> None:
        number = next(_numbers)
        self.folder = folder
        self.socket = folder / f"{self.name}{number}.sock"
        self._log = folder / f"{self.name}{number}.log"
        self._popen: subprocess.Popen[bytes] | None = None

    def argv(self) -> Sequence[str | Path]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def address(self) -> str | tuple[str, int]:
        """Where it listens, for `socket.connect`."""
        return str(self.socket)

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [str(word) for word in self.argv()],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self.wait_until_it_serves()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_until_it_serves(self) -> None:
        wait_for_socket(self.address(), self)

    def is_alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def said(self) -> str:
        """The end of its output."""
        return self._log.read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """End it, in order if it lets us; nothing of it is left behind."""
        process, self._popen = self._popen, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_S_MAX)
        self.socket.unlink(missing_ok=True)

    def peak_rss_bytes(self) -> int:
        return _status_bytes(self.pid, "VmHWM")

    def processor_s(self) -> float:
        """Processor time so far."""
        return processor_s(self.pid)


def wait_for_socket(address: str | tuple[str, int], process: Process) -> None:
    deadline_s = time.monotonic() + START_S_MAX
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    while True:
        with socket.socket(family) as probe:
            probe.settimeout(1)
            try:
                probe.connect(address)
                return
            except OSError as error:
                if not process.is_alive() or time.monotonic() > deadline_s:
                    text = f"{process.name} does not serve ({error}): {process.said()}"
                    raise BenchError(text) from error
        time.sleep(POLL_S)


def processor_s(pid: int) -> float:
    """The processor time of all threads of a process so far, also of those that have ended."""
    return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)  # as clock_getcpuclockid(3)


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise BenchError(f"no {field} of process {pid}")


class Qmp:
    """A blocking QMP client. Events are kept until they are asked for."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._received = b""
        self._events: list[tuple[float, dict[str, Any]]] = []
        self._read(time.monotonic() + REPLY_S_MAX)  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        message = {"execute": command, "arguments": arguments or {}}
        self._socket.sendall(json.dumps(message).encode())
        deadline_s = time.monotonic() + REPLY_S_MAX
        while True:
            answer = self._read(deadline_s)
            if "error" in answer:
                raise BenchError(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def wait_for(self, name: str, job: str, timeout_s: float = JOB_S_MAX) -> float:
        """Wait for that event of that job; returns when it was heard (time.monotonic). An end of
        the job that was not asked for is an error."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            for index, (heard_s, event) in enumerate(self._events):
                data = event.get("data", {})
                if data.get("device") != job:
                    continue
                if event["event"] == "BLOCK_JOB_COMPLETED" and data.get("error"):
                    raise BenchError(f"job {job} failed: {data['error']}")
                if event["event"] == name:
                    del self._events[index]
                    return heard_s
            self._read(deadline_s)

    def has(self, name: str, job: str) -> bool:
        """Whether that event has been heard; it stays."""
        return any(
            event["event"] == name and event.get("data", {}).get("device") == job
            for _, event in self._events
        )

    def heard(self, name: str) -> list[dict[str, Any]]:
        """All events of that name, until now."""
        self.execute("query-block-jobs")  # the events before its answer are heard with that
        return [event for _, event in self._events if event["event"] == name]

    def forget(self) -> None:
        self._events.clear()

    def close(self) -> None:
        self._socket.close()

    def _read(self, deadline_s: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._socket], [], [], left_s)[0]:
                raise BenchError("no word from the QMP server in time")
            part = self._socket.recv(1 << 16)
            if not part:
                raise BenchError("the QMP server closed the connection")
            self._received += part
        line, self._received = self._received.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append((time.monotonic(), message))
        return message
