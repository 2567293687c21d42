"""A server that ends in the middle of a conversation, after each of its messages: one line says
so, and a list names the others."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support.fakes import VERSION
from unit.cli.cliparts import Main, one_line

from nbdmirror.cli import common

GREETING = {"QMP": {"version": VERSION, "capabilities": []}}
TIMES = 20
"""Who of server and client is first is a matter of luck."""

ENDS = ["", "{", "[]\n", "\0"]
"""What is sent last: nothing, a part of a message, no message, no JSON."""


class Ending:
    """Takes clients, one at a time, says `messages` to each, and the end; and closes."""

    def __init__(self, path: str, messages: int, end: str) -> None:
        self.path = path
        self._messages, self._end = messages, end.encode()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            with client, suppress(OSError):
                self._talk(client)

    def _talk(self, client: socket.socket) -> None:
        found = json.dumps(GREETING).encode() + b"\n" if self._messages else b""
        for _ in range(1, self._messages):
            client.sendall(found)
            asked = json.loads(client.recv(1 << 16) or "{}")
            found = json.dumps({"return": {}, "id": asked.get("id")}).encode() + b"\n"
        client.sendall(found + self._end)

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join(10)
            self._listener.close()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("messages", [0, 1, 2])
def test_a_server_that_ends_in_a_conversation(
    tmp_path: Path, run: Main, monkeypatch: pytest.MonkeyPatch, messages: int, end: str
) -> None:
    ending = Ending(str(tmp_path / "control"), messages, end)
    monkeypatch.setenv("NBDMIRROR_QMP", ending.path)
    with ending.running():
        for _ in range(TIMES):
            status, out, err = run("status")
            assert (status, out) == (common.NO_SERVER, ""), err
            assert one_line(err)
        for _ in range(TIMES):
            status, out, err = run("list")
            assert (status, err) == (common.DONE, "")
            assert ending.path in out
