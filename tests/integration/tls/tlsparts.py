"""What the tests of TLS are made of: a site's keys, right and wrong ones, and servers that use
them."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import nbd
import pytest
from support.clients import connected
from support.images import MiB, make_noise
from support.keys import HERE, PAST, Authority, psk
from support.processes import free_port
from support.qmpclient import Qmp
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd

SIZE = 4 * MiB


class Site:
    """Keys of a small site, as docs/tls.md makes them, and wrong ones."""

    def __init__(self, folder: Path) -> None:
        self.authority = ours = Authority(folder)
        other = Authority(folder, "other")
        self.server = ours.keys(folder / "server", "server", *HERE)
        self.client = ours.keys(folder / "client", "client")
        self.authority_alone = ours.directory(folder / "authority-alone")
        self.expired_server = ours.keys(folder / "expired-server", "server", *HERE, *PAST)
        self.expired_client = ours.keys(folder / "expired-client", "client", *PAST)
        self.elsewhere = ours.keys(folder / "elsewhere", "server", "dns_name = elsewhere.example")
        self.stranger = other.keys(folder / "stranger", "client")
        # Keys of a client of ours who believes another authority.
        self.misled = ours.keys(folder / "misled", "client")
        other.directory(self.misled)
        (folder / "psk").mkdir()
        self.psk = psk(folder / "psk" / "keys.psk", "alice")  # QEMU's name for it
        self.wrong_psk = psk(folder / "wrong.psk", "alice")
        self.unknown_psk = psk(folder / "unknown.psk", "bob")


def with_keys(uri: str, keys: Path | None, user: str = "") -> str:
    """`uri` with TLS by these keys: a directory of certificates or a file of pre-shared keys."""
    uri = uri.replace("nbd", "nbds", 1)
    if user:
        uri = uri.replace("://", f"://{user}@", 1)
    if keys is None:
        return uri
    what = "tls-psk-file" if keys.suffix == ".psk" else "tls-certificates"
    return f"{uri}{'&' if '?' in uri else '?'}{what}={keys}"


class Overt(Server):
    """A server that we test with, on TCP, which says itself by which keys it is asked whether it is
    there."""

    port: int
    ask_with: Path | None = None

    def plain_uri(self, export: str = "") -> str:
        return f"nbd://127.0.0.1:{self.port}/{export}"

    def is_ready(self) -> bool:
        uri = self.plain_uri()
        try:
            with connected(with_keys(uri, self.ask_with) if self.ask_with else uri):
                return True
        except nbd.Error:
            return False


class TlsNbdkit(Overt, NbdkitTarget):
    """nbdkit of an image, on TCP, with TLS options."""

    def __init__(
        self, folder: Path, image: Path, *options: str, ask_with: Path | None = None
    ) -> None:
        super().__init__(folder, "file", f"file={image}")
        self.port = free_port()
        self.tls, self.ask_with = options, ask_with

    def argv(self) -> list[str]:
        listen = ["-i", "127.0.0.1", "-p", str(self.port)]
        return ["nbdkit", "-f", *listen, *self.tls, self.plugin, *self.parameters]

    def is_ready(self) -> bool:
        """It may have keys that nobody accepts: then it is there when it listens."""
        try:
            with connected(self.plain_uri()):
                return True
        except nbd.Error as error:
            return "requires TLS" in str(error)


class TlsQemuNbd(Overt, QemuNbd):
    """qemu-nbd of an image, on TCP, with a tls-creds object."""

    def __init__(
        self, folder: Path, image: Path, credentials: str, ask_with: Path | None = None
    ) -> None:
        super().__init__(folder, image)
        self.port = free_port()
        self.credentials, self.ask_with = credentials, ask_with

    def argv(self) -> list[str]:
        listen = ["--bind=127.0.0.1", f"--port={self.port}", "--persistent", "--shared=16"]
        creds = [f"--object={self.credentials},id=t,endpoint=server", "--tls-creds=t"]
        return ["qemu-nbd", *listen, *creds, "--discard=unmap", "--format=raw", str(self.image)]

    is_ready = TlsNbdkit.is_ready


class TlsNbdmirror(Overt, Nbdmirror):
    """nbdmirror that serves with TLS."""

    def __init__(self, folder: Path, disk: Path, *options: str, ask_with: Path | None) -> None:
        super().__init__(folder, disk, tcp=True, options=options)
        self.ask_with = ask_with
        # What nbdkit says of clients that it turns away.
        self.allowed = [r"nbdkit: .*error: (gnutls|read|write|failed to|client|handshake|tls)"]

    def is_ready(self) -> bool:
        return super().is_ready() and self.control_answers()

    def control_answers(self) -> bool:
        """It serves. Its control socket alone is there before nbdkit takes signals."""
        with contextlib.suppress(OSError), Qmp(self.qmp_path):
            return True
        return False


class Unasked(TlsNbdmirror):
    """One that no guest asks whether it is ready."""

    def is_ready(self) -> bool:
        return self.control_answers()


def refusal(uri: str) -> str:
    with pytest.raises(nbd.Error) as caught, connected(uri):
        pass
    return str(caught.value)


KINDS = ("nbdkit", "qemu-nbd")


def target_of(kind: str, folder: Path, *, keys: Path | None, verify: bool = True) -> Overt:
    """A target with these keys of a server; without TLS if there are none."""
    image = make_noise(folder / f"target{time.monotonic_ns()}.img", SIZE)
    if kind == "nbdkit":
        options: tuple[str, ...] = ()
        if keys is not None and keys.suffix == ".psk":
            options = ("--tls=require", f"--tls-psk={keys}")
        elif keys is not None:
            peer = ("--tls-verify-peer",) if verify else ()
            options = ("--tls=require", f"--tls-certificates={keys}", *peer)
        return TlsNbdkit(folder, image, *options)
    if keys is None:
        return TlsNbdkit(folder, image)
    if keys.suffix == ".psk":
        return TlsQemuNbd(folder, image, f"tls-creds-psk,dir={keys.parent}")
    verified = "on" if verify else "off"
    return TlsQemuNbd(folder, image, f"tls-creds-x509,dir={keys},verify-peer={verified}")
