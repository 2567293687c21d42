"""A command that runs for weeks keeps nothing of what it has shown."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.processes import nbdmirror_environment, resources

EVENTS = 100_000
WARM = 10_000
BATCH = 1000
GROWTH_BYTES_MAX = 4 * 1024 * 1024  # the library's own listener keeps about 100 MiB of them
GREETING = {
    "QMP": {
        "version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": "nbdmirror 0.1.0"},
        "capabilities": [],
    }
}
EVENT = {
    "event": "BLOCK_JOB_READY",
    "data": {"device": "vda", "type": "mirror", "len": 1, "offset": 1, "speed": 0},
    "timestamp": {"seconds": 1_700_000_000, "microseconds": 5},
}


def line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


class Talkative:
    """A server whose one client hears a batch of events for each that it asked for by `more`, and
    is answered what it asks: its one disk grows with each question, so that a status is new."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._lock = threading.Lock()
        self._client: socket.socket
        self._size = 0
        self.is_connected = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the client, or the test, has ended
            self._converse()

    def _converse(self) -> None:
        self._client, _ = self._listener.accept()
        self._client.sendall(line(GREETING))
        while received := self._client.recv(65536):  # one command: each waits for its answer
            command = json.loads(received)
            self._size += 1
            disk = {"name": "vda", "source": "vda.img", "size": self._size, "jobs": []}
            answer = {"disks": [disk]} if "query" in command["execute"] else {}
            number = {"id": command["id"]} if "id" in command else {}
            with self._lock:
                self._client.sendall(line({"return": answer, **number}))
            if command["execute"] == "qmp_capabilities":
                self.is_connected.set()

    def more(self) -> None:
        with self._lock:
            self._client.sendall(line(EVENT) * BATCH)

    def close(self) -> None:
        for end in (self._client, self._listener):
            with contextlib.suppress(OSError):  # not connected any more
                end.shutdown(socket.SHUT_RDWR)  # the thread may be waiting there
        self._thread.join(10)
        self._client.close()
        self._listener.close()


@pytest.fixture
def talkative(tmp_path: Path) -> Iterator[Talkative]:
    server = Talkative(tmp_path / "qmp")
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", ["events", "events --json", "status --watch"])
def test_a_hundred_thousand_events(tmp_path: Path, talkative: Talkative, command: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "nbdmirror", *command.split(), "--qmp", str(tmp_path / "qmp")],
        env=nbdmirror_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert talkative.is_connected.wait(30)

            def show(events: int) -> None:
                """Until they were read: each is a line, or some status came after them."""
                for _ in range(events // BATCH):
                    talkative.more()
                    for _ in range(BATCH if command.startswith("events") else 0):
                        assert process.stdout is not None and process.stdout.readline()
                if command.startswith("status"):
                    assert (
                        process.stdout and process.stdout.readline() and process.stdout.readline()
                    )

            show(WARM)
            before, _, _ = resources(process.pid)
            show(EVENTS)
            after, _, _ = resources(process.pid)
        finally:
            process.kill()
    assert after - before < GROWTH_BYTES_MAX, f"{(after - before) / EVENTS:.0f} bytes an event"
