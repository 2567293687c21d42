"""How guests on TCP are asked for a sign of life: what listens hands it down to what it accepts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from support.waiting import wait_until

from nbdmirror.limits import KEEPALIVE_S_MAX
from nbdmirror.nbdclient.tcp_watch import tcp_info
from nbdmirror.nbdkit_host import hangup
from nbdmirror.nbdkit_host.keepalive import Timing, Watch

TIMES = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)


def times(sock: socket.socket) -> list[int]:
    return [sock.getsockopt(socket.IPPROTO_TCP, option) for option in TIMES]


def is_asked(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))


@pytest.mark.parametrize("limit_s", [1, 2, 3, 4, 5, 7, 10, 59, 60, 61, 300, 3600, KEEPALIVE_S_MAX])
def test_a_guest_is_given_up_within_the_limit(limit_s: int) -> None:
    timing = Timing.within(limit_s)
    assert min(timing.idle_s, timing.interval_s, timing.probes) >= 1
    assert max(timing.idle_s, timing.interval_s) <= KEEPALIVE_S_MAX
    assert timing.idle_s + timing.interval_s * timing.probes in (limit_s, max(limit_s, 2))


class Doors:
    """In place of hangup.Guests: not all of this process's sockets."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.accepted: list[socket.socket] = []

    def listeners(self) -> Iterator[socket.socket]:
        yield self.listener.dup()

    def connections(self) -> Iterator[socket.socket]:
        yield from (sock.dup() for sock in self.accepted)


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def doors(request: pytest.FixtureRequest) -> Iterator[Doors]:
    with socket.socket(request.param) as listener:
        try:
            listener.bind(("::1" if request.param == socket.AF_INET6 else "127.0.0.1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        listener.listen()
        doors = Doors(listener)
        yield doors
        for sock in doors.accepted:
            sock.close()


def connect(doors: Doors) -> tuple[socket.socket, socket.socket]:
    guest = socket.create_connection(doors.listener.getsockname()[:2])
    accepted, _ = doors.listener.accept()
    doors.accepted.append(accepted)
    return guest, accepted


def test_what_is_accepted_is_asked(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what was accepted before; and the time that was said is the time, though longer."""
    monkeypatch.setattr(Watch, "_run", lambda self: None)
    before, accepted_before = connect(doors)
    watch: Any = Watch(doors, 20000, is_exact=True)  # type: ignore[arg-type]
    watch.start()
    after, accepted_after = connect(doors)
    with before, after:
        wanted = Timing.within(20000)
        assert is_asked(accepted_after)
        assert times(accepted_after) == [wanted.idle_s, wanted.interval_s, wanted.probes]
        assert not is_asked(accepted_before)
        watch._look_at(accepted_before)
        assert is_asked(accepted_before)
        assert times(accepted_before) == times(accepted_after)


def test_shorter_times_of_the_host_count_by_default(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watch, "_run", lambda self: None)
    for option, value in zip(TIMES, (3, 1, 2), strict=True):  # as if sysctls said so
        doors.listener.setsockopt(socket.IPPROTO_TCP, option, value)
    Watch(doors, 300, is_exact=False).start()  # type: ignore[arg-type]
    guest, accepted = connect(doors)
    with guest:
        assert is_asked(accepted)
        assert times(accepted) == [3, 1, 2]


def test_who_is_alive_stays(doors: Doors) -> None:
    """With a limit of nothing: silence alone is no reason, what is sent must be unanswered."""
    watch: Any = Watch(doors, 0, is_exact=True)  # type: ignore[arg-type]
    guest, accepted = connect(doors)
    with guest, contextlib.suppress(BlockingIOError):
        watch._look_at(accepted)
        accepted.setblocking(False)
        while accepted.send(bytes(1 << 16)):  # it takes nothing, and its window closes
            watch._look_at(accepted)
    watch._look_at(accepted)
    assert accepted.fileno() >= 0


def test_the_guests_sockets_are_found() -> None:
    """Among all of a process's, without those that the control socket has accepted."""
    control, door = socket.socket(socket.AF_INET), socket.socket(socket.AF_INET)
    with control, door:
        for listener in (control, door):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        guests = hangup.Guests(except_listener=control)
        with (
            socket.create_connection(control.getsockname()),
            socket.create_connection(door.getsockname()) as guest,
            control.accept()[0],
            door.accept()[0],
        ):
            found = list(guests.connections())
            assert guest.getsockname() in [sock.getpeername() for sock in found]
            assert control.getsockname() not in [sock.getsockname() for sock in found]
            listeners = list(guests.listeners())
            assert door.getsockname() in [sock.getsockname() for sock in listeners]
            assert control.getsockname() not in [sock.getsockname() for sock in listeners]
            for sock in (*found, *listeners):
                sock.close()


def test_how_long_answers_have_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("nbdmirror.nbdkit_host.hangup.time.monotonic", lambda: now_s)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        waiting = hangup._Waiting()
        assert waiting.time_s(ours) == 0
        ours.send(b"answer")
        assert waiting.time_s(ours) == 0  # it is new
        now_s += 3
        assert waiting.time_s(ours) == 3
        ours.send(b"more")
        assert waiting.time_s(ours) == 0  # it moves
        now_s += 3
        theirs.recv(1 << 16)
        wait_until(lambda: waiting.time_s(ours) == 0, "all has been taken")


def test_the_layout_of_tcp_info() -> None:
    """What is read there makes sense."""
    with (
        socket.create_server(("127.0.0.1", 0)) as door,
        socket.create_connection(door.getsockname()) as guest,
        door.accept()[0] as accepted,
    ):
        guest.send(b"x")
        accepted.recv(1)
        info = tcp_info(accepted)
        assert (info.retransmits, info.probes, info.unacknowledged) == (0, 0, 0)
        assert max(info.last_data_ms, info.last_acknowledgement_ms) < 20_000
