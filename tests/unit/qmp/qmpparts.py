"""A QMP server whose commands are made for these tests, and a client that sends what it likes."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from typing import Any

from nbdmirror import unix_sockets as sockets
from nbdmirror.errors import CommandNotFound, DeviceNotActive
from nbdmirror.events import EventRing, Reply
from nbdmirror.qmp import server as qmp

WAIT_S_MAX = 10.0
VERSION = {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": "nbdmirror"}
NOT_OBJECT = "QMP input must be a JSON object"


class Server:
    """A QmpServer whose commands are made for these tests."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.ring = EventRing(lambda: 1.000002)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.running = 0
        self.qmp = qmp.QmpServer(
            sockets.bind_unix_socket(path),
            dispatch=self.dispatch,
            events=self.ring,
            version=VERSION,
        )

    async def dispatch(self, name: str, arguments: dict[str, Any]) -> Any:
        assert self.running == 0 or arguments.get("shared")
        self.running += 1
        try:
            method = getattr(self, f"do_{name.replace('-', '_')}", self.missing)
            value = await method(name, arguments)
            return Reply(value, self.ring.next_number)
        finally:
            self.running -= 1

    async def missing(self, name: str, arguments: dict[str, Any]) -> Any:
        raise CommandNotFound(f"The command {name} has not been found")

    async def do_echo(self, name: str, arguments: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return arguments

    async def do_emit(self, name: str, arguments: dict[str, Any]) -> Any:
        for number in range(arguments.get("count", 1)):
            self.ring.append("E", {"number": number, "pad": "x" * arguments.get("pad", 0)})
        return {}

    async def do_refuse(self, name: str, arguments: dict[str, Any]) -> Any:
        raise DeviceNotActive("Block job 'j' not found")

    async def do_crash(self, name: str, arguments: dict[str, Any]) -> Any:
        raise ZeroDivisionError("secret")

    async def do_unencodable(self, name: str, arguments: dict[str, Any]) -> Any:
        return {"x": object()}

    async def do_wait(self, name: str, arguments: dict[str, Any]) -> Any:
        self.entered.set()
        opened = await asyncio.to_thread(self.gate.wait, WAIT_S_MAX)
        return {"opened": opened}


class Raw:
    """A client that sends what it likes and reads lines."""

    def __init__(self, path: str, *, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.reader = self.socket.makefile("rb")
        try:
            self.socket.settimeout(WAIT_S_MAX)
            self.socket.connect(path)
            if negotiate:
                assert "QMP" in self.read()
                assert self.ask({"execute": "qmp_capabilities"}) == {"return": {}}
        except BaseException:
            self.close()
            raise

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> dict[str, Any]:
        line = self.reader.readline()
        assert line.endswith(b"\r\n"), line
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def ask(self, request: Any) -> dict[str, Any]:
        self.send(json.dumps(request).encode())
        return self.read()

    def answers(self, data: bytes) -> list[dict[str, Any]]:
        """Everything that the server says until the answer to a last, good command."""
        self.send(data + b'\n{"execute": "echo", "id": "last"}')
        found: list[dict[str, Any]] = []
        while (message := self.read()).get("id") != "last":
            found.append(message)
        return found

    def errors(self, data: bytes) -> list[str]:
        return [answer["error"]["desc"] for answer in self.answers(data)]

    def at_end(self) -> bool:
        return self.reader.readline() == b""

    def close(self) -> None:
        self.reader.close()
        self.socket.close()


def first_client(path: str) -> Raw | None:
    """None if nobody listens there yet; the file is there a moment earlier. It must be the first:
    QEMU 7.2 may fail an assertion (char-socket.c) where one that goes at once comes before."""
    try:
        return Raw(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
