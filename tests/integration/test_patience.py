"""To connect again takes as long as to connect, and each address of a name is tried."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nbd
import pytest
from support.fixtures import Start
from support.images import KiB, MiB, make_image
from support.processes import free_port
from support.servers import NbdkitTarget, QemuNbd
from support.waiting import InThread, wait_until

from nbdmirror import identity
from nbdmirror.cli import places
from nbdmirror.errors import ConfigError, DeviceError
from nbdmirror.nbdclient import pool, tls
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.handshake import connect

HANDSHAKE_S = 3
"""Longer than guests' requests wait, and than an attempt to connect again once took."""


def slow_server(folder: Path) -> NbdkitTarget:
    image = make_image(folder / "image.img", MiB)
    delay = f"delay-open={HANDSHAKE_S}"
    return NbdkitTarget(folder, "file", str(image), delay, filters=("delay",))


def reads(device: NbdDevice) -> bool:
    try:
        device.pread(memoryview(bytearray(4 * KiB)), 0)
    except DeviceError:
        return False
    return True


def test_a_server_with_a_slow_handshake_is_had_again(start: Start, folder: Path) -> None:
    """Requests fail after the time that they wait, and the attempt that is under way goes on."""
    server = slow_server(folder)
    start(server)
    device = NbdDevice.open(server.uri())
    assert reads(device)
    server.kill()
    server.socket.unlink()
    device.pool.reconnect_timeout_s = 0.2
    began_s = time.monotonic()
    assert not reads(device)
    assert time.monotonic() - began_s < HANDSHAKE_S
    server.start()
    wait_until(lambda: reads(device), "the server is used again")
    device.close()


def test_requests_that_wait_long_enough_see_nothing_of_it(start: Start, folder: Path) -> None:
    server = slow_server(folder)
    start(server)
    device = NbdDevice.open(server.uri())
    device.pool.reconnect_timeout_s = 60.0
    server.kill()
    server.socket.unlink()
    server.spawn()
    assert reads(device)
    device.close()


def test_the_time_for_a_handshake_counts_everywhere(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = QemuNbd(folder, make_image(folder / "image.img", MiB))
    start(server)
    device = NbdDevice.open(server.uri(), timeout_s=77.0)
    asked: list[float] = []

    def connected(uri: str, timeout_s: float, **options: Any) -> nbd.NBD:
        asked.append(timeout_s)
        return connect(uri, timeout_s, **options)

    monkeypatch.setattr(pool, "connect", connected)
    device.pool.replace(device.pool.reopen())  # as a job does
    device.pool.shared.kill()
    assert reads(device)  # as guests do
    device.pool.shared.handshake_s = 20.0
    device.pool._connect_link().close()
    assert asked == [77.0, 77.0, 60.0]
    device.close()


def test_a_server_that_is_gone_fails_at_once(folder: Path) -> None:
    began_s = time.monotonic()
    with pytest.raises(ConfigError, match="No such file"):
        connect(f"nbd+unix:///?socket={folder}/nobody", 60.0)
    with pytest.raises(ConfigError, match="Connection refused"):
        connect(f"nbd://127.0.0.1:{free_port()}", 60.0)
    assert time.monotonic() - began_s < 30.0


def test_a_look_at_a_certificate_has_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def connect_to(address: object, timeout_s: float) -> socket.socket:
        asked.append(timeout_s)
        raise OSError

    monkeypatch.setattr(tls, "_connect", connect_to)
    keys = tls.ClientKeys(("host", 1))
    tls.explain(keys, "gnutls_handshake: certificate verification", 33.0)
    assert asked == [33.0]


# Several addresses of a name.

FIRST, SECOND = "127.0.0.2", "127.0.0.1"
Trouble = Callable[[ExitStack, int], object]


def refuses(stack: ExitStack, port: int) -> None:
    """Nobody listens there."""


def hangs(stack: ExitStack, port: int) -> None:
    """It accepts, and says nothing."""
    stack.enter_context(socket.create_server((FIRST, port)))


def swallows(stack: ExitStack, port: int) -> None:
    """It drops what comes: its queue is full."""
    listener = stack.enter_context(socket.create_server((FIRST, port), backlog=0))
    for _ in range(3):
        client = stack.enter_context(socket.socket())
        client.setblocking(False)
        client.connect_ex((FIRST, port))
    assert listener.fileno() >= 0


def hangs_up(stack: ExitStack, port: int) -> None:
    """It is no NBD server: here, one that ends each connection in the middle."""
    listener = stack.enter_context(socket.create_server((FIRST, port)))
    listener.shutdown(socket.SHUT_RD)


@contextmanager
def names(monkeypatch: pytest.MonkeyPatch, port: int, *hosts: str) -> Iterator[None]:
    """Every name has these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in hosts]
    with monkeypatch.context() as patch:
        patch.setattr("nbdmirror.nbdclient.handshake.socket.getaddrinfo", lambda *_, **__: found)
        yield


@pytest.mark.parametrize("trouble", [refuses, hangs, swallows, hangs_up])
@pytest.mark.parametrize("is_last", [False, True], ids=["first", "last"])
def test_each_address_is_tried(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, trouble: Trouble, is_last: bool
) -> None:
    port = free_port()
    server = NbdkitTarget(folder, "memory", "1M")
    server.argv = lambda: ["nbdkit", "-f", "-i", SECOND, "-p", str(port), "memory", "1M"]  # type: ignore[method-assign]
    server.uri = lambda export="": f"nbd://{SECOND}:{port}/{export}"  # type: ignore[method-assign]
    start(server)
    hosts = (SECOND, FIRST) if is_last else (FIRST, SECOND)
    with ExitStack() as stack, names(monkeypatch, port, *hosts):
        trouble(stack, port)
        handle = connect(f"nbd://a-name:{port}", 30.0)
        assert handle.get_size() == MiB
        handle.shutdown()


def test_all_addresses_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with names(monkeypatch, port, FIRST, SECOND):
        began_s = time.monotonic()
        with pytest.raises(ConfigError, match="Connection refused"):
            connect(f"nbd://a-name:{port}", 60.0)
        assert time.monotonic() - began_s < 30.0


# A resolver that does not answer.


@contextmanager
def silent_resolver(monkeypatch: pytest.MonkeyPatch, port: int) -> Iterator[threading.Event]:
    """No name is answered before the event; then it is that of SECOND."""
    answers = threading.Event()

    def resolve(host: str, *_: Any, flags: int = 0, **__: Any) -> list[Any]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror("not an address")
        assert answers.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (SECOND, port))]

    with monkeypatch.context() as patch:
        patch.setattr("nbdmirror.resolver.socket.getaddrinfo", resolve)
        try:
            yield answers
        finally:
            answers.set()
            name = "nbdmirror-resolver"
            wait_until(lambda: not threads_named(name), "the resolver's thread ends")


def threads_named(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


@pytest.mark.parametrize("has_keys", [False, True], ids=["plain", "certificates"])
def test_a_resolver_that_does_not_answer_takes_no_longer_than_a_server(
    monkeypatch: pytest.MonkeyPatch, folder: Path, has_keys: bool
) -> None:
    port = free_port()
    keys = f"?tls-certificates={folder}" if has_keys else ""
    monkeypatch.setattr(tls, "client_keys", lambda *_: None)
    with silent_resolver(monkeypatch, port):
        for _ in range(3):
            with pytest.raises(ConfigError, match=r"'a-name' has no address after 0.1 s"):
                connect(f"nbd{'s' if keys else ''}://a-name:{port}{keys}", 0.1)
            assert threads_named("nbdmirror-resolver") == 1, "they wait for one answer"


def test_nobody_waits_longer_for_a_resolver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To compare names, to warn of a target, to ask why a certificate is not accepted."""
    port = free_port()
    monkeypatch.setattr(identity, "ADDRESSES_S_MAX", 0.1)
    monkeypatch.setattr(places, "TARGET_S_MAX", 0.1)
    named, address = f"nbd://a-name:{port}/", f"nbd://127.0.0.1:{port}/"
    with silent_resolver(monkeypatch, port):
        assert identity.same_place(named, address, resolves=True) is identity.Same.UNKNOWN
        places.warn_of_target(named)
        assert "'a-name' has no address after 0.1 s" in capsys.readouterr().err
        assert tls._look(tls.ClientKeys(("a-name", port)), 0.1)


def test_a_resolver_that_answers_late(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    server = NbdkitTarget(folder, "memory", "1M")
    server.argv = lambda: ["nbdkit", "-f", "-i", SECOND, "-p", str(port), "memory", "1M"]  # type: ignore[method-assign]
    server.uri = lambda export="": f"nbd://{SECOND}:{port}/{export}"  # type: ignore[method-assign]
    start(server)
    with silent_resolver(monkeypatch, port) as answers:
        attempt = InThread(lambda: connect(f"nbd://a-name:{port}", 30.0).shutdown())
        wait_until(lambda: threads_named("nbdmirror-resolver") == 1, "the name is asked for")
        answers.set()
        attempt.result()
