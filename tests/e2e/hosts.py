"""Two hosts: network namespaces, joined by one link that can be cut.

They share files with each other and with the tests, so what is on "host B" is a matter of who
opens it; Unix sockets are reached from everywhere, TCP only from within.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from support.processes import run
from support.serverprocess import Server
from support.servers import Nbdmirror, QemuNbd

NBD_PORT = 10809
LINK = "link0"

AnyServer = TypeVar("AnyServer", bound=Server)
_numbers = itertools.count(1)


class Host:
    """A namespace. `start(host.place(server))` starts a server there."""

    def __init__(self, letter: str, address: str) -> None:
        self.address = address
        self.namespace = f"nbdmirror-{os.getpid()}-{next(_numbers)}{letter}"
        self.inside = ("nsenter", f"--net=/run/netns/{self.namespace}")

    def place(self, server: AnyServer) -> AnyServer:
        server.inside = self.inside
        return server

    def run(self, *command: str) -> str:
        return run(*self.inside, *command).stdout

    def set_link(self, state: str) -> None:
        """`down` cuts the link for both: packets vanish, connections are not told."""
        self.run("ip", "link", "set", LINK, state)


Hosts = tuple[Host, Host]


def two_hosts() -> Iterator[Hosts]:
    """For a fixture; before `start` among a test's arguments, so that it ends after that."""
    if os.geteuid():
        pytest.skip("network namespaces are root's")
    hosts = Host("a", "192.0.2.1"), Host("b", "192.0.2.2")
    try:
        for host in hosts:
            run("ip", "netns", "add", host.namespace)
        ends = [["name", LINK, "netns", host.namespace] for host in hosts]
        run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", LINK)
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "link", "set", LINK, "up")
        yield hosts
    finally:
        for host in hosts:
            run("ip", "netns", "delete", host.namespace, check=False)


# Servers that listen on a host's address


class QemuNbdAt(QemuNbd):
    def __init__(self, folder: Path, image: Path, host: Host, *, port: int = NBD_PORT) -> None:
        super().__init__(folder, image)
        self.host = host
        self.port = port
        self.inside = host.inside

    def argv(self) -> list[str]:
        listen = [f"--bind={self.host.address}", f"--port={self.port}"]
        return [*(word for word in super().argv() if "--socket=" not in word), *listen]

    def uri(self, export: str | None = None) -> str:
        return f"nbd://{self.host.address}:{self.port}/{export or ''}"

    def is_ready(self) -> bool:
        return answers(self.host, self.uri())


class NbdmirrorAt(Nbdmirror):
    def __init__(self, folder: Path, image: Path, host: Host, *, port: int = NBD_PORT) -> None:
        listen = ("--address", host.address, "--port", str(port))
        super().__init__(folder, image, options=listen)
        self.host = host
        self.port = port
        self.inside = host.inside

    def argv(self) -> list[str]:
        words = super().argv()
        at = words.index("--port")  # where it would listen, were this no other host
        return words[:at] + words[at + 2 :]

    def uri(self, export: str = "") -> str:
        return f"nbd://{self.host.address}:{self.port}/{export}"

    def is_ready(self) -> bool:
        return self.qmp_path.exists() and answers(self.host, self.uri())


def answers(host: Host, uri: str) -> bool:
    return run(*host.inside, "nbdinfo", "--size", uri, check=False).returncode == 0
