"""TcpWatch: the kernel's bound on a silent peer, and peers that are slow to take what they are
sent. With real TCP connections, and bounds of a second."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator

import pytest
from support.waiting import wait_until

from nbdmirror.nbdclient import tcp_watch as tcpwatch
from nbdmirror.nbdclient.tcp_watch import TcpWatch

LOST_S = 1


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours, and the peer's, which takes little at once."""
    monkeypatch.setattr(tcpwatch, "PEER_LOST_S", LOST_S)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ours = socket.create_connection(listener.getsockname())
        peers, _ = listener.accept()
        with ours, peers:
            ours.setblocking(False)
            yield ours, peers


def fill(ours: socket.socket) -> int:
    """Until the kernel takes no more; returns how much it took."""
    sent = 0
    while select.select([], [ours], [], 0.2)[1]:
        sent += ours.send(bytes(1 << 16))
    return sent


def is_broken(ours: socket.socket) -> bool:
    return ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def test_a_peer_that_is_slow_to_take_what_it_is_sent_is_not_lost(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, peers = ends
    watch = TcpWatch(ours)
    watch.begin()
    sent = fill(ours)
    until_s = time.monotonic() + 4 * LOST_S
    watch.look(time.monotonic())
    while (now_s := time.monotonic()) < until_s:  # its window is full all the while
        select.select([], [], [], 0.05)
        watch.look(now_s)
        assert not is_broken(ours)
    received = 0
    peers.settimeout(10.0)
    while received < sent:
        received += len(peers.recv(1 << 20))
    watch.look(time.monotonic())
    bound_ms = ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert bound_ms == LOST_S * 1000, "from here on silence counts again"


def test_without_the_watch_the_kernel_would_give_it_up(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """So the test above is able to fail."""
    ours, _ = ends
    TcpWatch(ours).begin()
    fill(ours)
    wait_until(lambda: is_broken(ours), "the kernel gives it up")


def test_a_peer_that_says_nothing_more_while_its_window_is_full_is_lost(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's questions are not answered: here, by a made-up tcp_info."""
    ours, _ = ends
    watch = TcpWatch(ours)
    watch.begin()
    fill(ours)
    watch.look(100.0)

    class Silent(socket.socket):
        heard_s = 100.0
        now_s = 100.0

        def getsockopt(self, *arguments: int) -> object:  # type: ignore[override]
            ago_ms = int((self.now_s - self.heard_s) * 1000)
            return tcpwatch._INFO.pack(0, 1, 0, ago_ms, ago_ms)

    silent = Silent(fileno=socket.dup(ours.fileno()))
    monkeypatch.setattr(watch, "_own", silent)
    for tenth in range(8):
        silent.now_s = 100.0 + tenth / 10
        watch.look(silent.now_s)
    silent.heard_s = silent.now_s  # one answer after all
    for tenth in range(9):
        watch.look(silent.now_s + tenth / 10)
        silent.now_s += 0.1
    assert select.select([ours], [], [], 0)[0] == [], "not yet"
    silent.now_s += 2 * LOST_S
    watch.look(silent.now_s)
    assert select.select([ours], [], [], 5.0)[0] == [ours] and ours.recv(1) == b""
    silent.close()


def test_a_unix_socket_is_left_alone() -> None:
    one, other = socket.socketpair()
    with one, other:
        watch = TcpWatch(one)
        watch.begin()
        watch.look(0.0)
