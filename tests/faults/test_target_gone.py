"""Other ways in which a target is lost, each with its demanded outcome. The guest notices none."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_noise
from support.losing import SIZE, Lossy, end, ready, start_mirror
from support.processes import free_port
from support.proxy import Proxy
from support.qmpclient import Qmp
from support.seeds import SEED
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import wait_until

from nbdmirror.errors import DeviceLost
from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient import exclusive_set as linkset
from nbdmirror.nbdclient import pool
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.shared_connection import SharedConnection
from nbdmirror.nbdclient.tcp_watch import PEER_LOST_S

COMPLETE, CANCEL = "block-job-complete", "block-job-cancel"
SHORT_S = 1
"""A reconnect-delay that is to run out."""
FORCE_S_MAX = 3.0
"""Of a forced cancel; it takes 0.3 s."""


@pytest.fixture
def guest(server: Nbdmirror, disk: Path, identical: Identical) -> Iterator[Guest]:
    """It writes all through the test, and each of its requests succeeds. In the end the source, or
    after a pivot the target, holds what it wrote."""
    with Guest(server.uri("src"), disk, seed=SEED) as guest:
        identical(guest, server.uri("src"))
        yield guest


@pytest.fixture
def proxy(target: Lossy) -> Iterator[Proxy]:
    with Proxy(target.socket) as proxy:
        yield proxy


def force_cancel(qmp: Qmp) -> None:
    began_s = time.monotonic()
    qmp.execute(CANCEL, device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    assert time.monotonic() - began_s < FORCE_S_MAX


def copy_is_good(qmp: Qmp, guest: Guest, disk: Path, target: Lossy, identical: Identical) -> None:
    """Ended softly with the guest at rest, the target is the source."""
    guest.wait_for_requests(20)
    guest.stop()
    end(qmp, CANCEL)
    identical(disk, target.image)


def errors(qmp: Qmp) -> list[str]:
    return [e["data"]["action"] for e in qmp.events if e["event"] == "BLOCK_JOB_ERROR"]


# Away for too long


def test_report(server: Nbdmirror, target: Lossy, guest: Guest) -> None:
    qmp = ready(server, target.uri(), reconnect_delay_s=SHORT_S, policy="report")
    target.kill()
    ended = qmp.wait_for_event("BLOCK_JOB_COMPLETED")
    assert ended["error"] == "Input/output error"
    assert errors(qmp) == ["report"]
    guest.wait_for_requests(20)


def test_stop(
    server: Nbdmirror, target: Lossy, guest: Guest, disk: Path, identical: Identical
) -> None:
    """Resumed too early it stops again; after the return it finishes."""
    qmp = ready(server, target.uri(), reconnect_delay_s=SHORT_S)
    target.kill()
    qmp.wait_status("standby")
    guest.wait_for_requests(20)
    qmp.execute("block-job-resume", device="j")
    qmp.wait_status("standby")
    target.come_back()
    qmp.execute("block-job-resume", device="j")
    copy_is_good(qmp, guest, disk, target, identical)
    assert errors(qmp) == ["stop", "stop"]


def test_a_forced_cancel_while_it_is_waited_for(
    server: Nbdmirror, target: Lossy, guest: Guest
) -> None:
    qmp = ready(server, target.uri())
    target.kill()
    guest.wait_for_requests(20)
    force_cancel(qmp)
    guest.wait_for_requests(20)


# Back as another one


def other_size(target: Lossy) -> dict[str, int]:
    make_noise(target.image, SIZE + MiB, SEED + 7)
    return {}


def smaller(target: Lossy) -> dict[str, int]:
    make_noise(target.image, SIZE - 512, SEED + 7)
    return {}


def read_only(target: Lossy) -> dict[str, int]:
    return {"read_only": 1}


@pytest.mark.parametrize("change", [other_size, smaller, read_only])
def test_what_came_back_changed_is_refused_and_not_written_to(
    server: Nbdmirror, target: Lossy, guest: Guest, change: object
) -> None:
    assert callable(change)
    qmp = ready(server, target.uri(), reconnect_delay_s=SHORT_S)
    target.kill()
    settings = change(target)
    before, content = target.mark(), target.image.read_bytes()
    target.come_back(**settings)
    qmp.wait_status("standby")  # it may have been back too late
    qmp.forget()
    qmp.execute("block-job-resume", device="j")
    qmp.wait_status("standby")
    wait_until(lambda: "came back changed" in server.stderr, "the log says why")
    guest.wait_for_requests(20)
    force_cancel(qmp)
    assert not target.requests(before)
    assert target.image.read_bytes() == content


def test_a_changed_target_that_is_put_right_is_used_again(
    server: Nbdmirror, target: Lossy, guest: Guest, disk: Path, identical: Identical
) -> None:
    qmp = ready(server, target.uri(), reconnect_delay_s=SHORT_S)
    target.kill()
    target.come_back(read_only=1)
    qmp.wait_status("standby")
    target.kill()
    target.come_back(read_only=0)
    qmp.execute("block-job-resume", device="j")
    copy_is_good(qmp, guest, disk, target, identical)


# Hung


@pytest.mark.parametrize("moment", ["first copy", "READY"])
def test_a_stopped_target(server: Nbdmirror, target: Lossy, guest: Guest, moment: str) -> None:
    if moment == "READY":
        qmp = ready(server, target.uri())
        target.stall()
    else:
        qmp = start_mirror(server, target.uri(), speed=SIZE // 8)
        wait_until(target.changed, "a copy")
        target.stall()
    try:
        guest.wait_for_requests(50)
        force_cancel(qmp)
        guest.wait_for_requests(20)
    finally:
        os.kill(target.pid, signal.SIGCONT)


def test_a_black_hole(server: Nbdmirror, proxy: Proxy, guest: Guest) -> None:
    """A connection on which nothing moves is not lost; the job waits, the guest does not."""
    qmp = ready(server, proxy.uri)
    proxy.stall()
    guest.wait_for_requests(100)
    assert qmp.job()["status"] == "ready" and not errors(qmp)
    force_cancel(qmp)
    guest.wait_for_requests(20)


def test_a_black_hole_that_ends(
    server: Nbdmirror,
    proxy: Proxy,
    target: Lossy,
    guest: Guest,
    disk: Path,
    identical: Identical,
) -> None:
    qmp = ready(server, proxy.uri)
    proxy.stall()
    guest.wait_for_requests(50)
    proxy.forward()
    copy_is_good(qmp, guest, disk, target, identical)
    assert proxy.connections == 1


# Cut


@pytest.mark.parametrize("cut", ["reset", "half_close"])
def test_a_cut_connection(
    server: Nbdmirror,
    proxy: Proxy,
    target: Lossy,
    guest: Guest,
    disk: Path,
    identical: Identical,
    cut: str,
) -> None:
    qmp = ready(server, proxy.uri)
    guest.wait_for_requests(20)
    getattr(proxy, cut)()
    wait_until(lambda: proxy.connections >= 2, "connected again")
    copy_is_good(qmp, guest, disk, target, identical)
    assert not errors(qmp)


@pytest.mark.parametrize("moment", ["first copy", "READY"])
def test_a_reset_in_the_middle_of_a_write(
    server: Nbdmirror,
    proxy: Proxy,
    target: Lossy,
    guest: Guest,
    disk: Path,
    identical: Identical,
    moment: str,
) -> None:
    if moment == "first copy":
        proxy.reset_after(700_001)
        qmp = start_mirror(server, proxy.uri)
        qmp.wait_ready()
    else:
        qmp = ready(server, proxy.uri)
        proxy.reset_after(100_001)
    wait_until(lambda: proxy.connections >= 2, "connected again")
    copy_is_good(qmp, guest, disk, target, identical)
    assert not errors(qmp)


def test_a_black_hole_that_is_cut_and_a_job_that_is_paused_meanwhile(
    server: Nbdmirror,
    proxy: Proxy,
    target: Lossy,
    guest: Guest,
    disk: Path,
    identical: Identical,
) -> None:
    """The attempt from before the pause and the one from after it end at the same time, and the job
    goes on with the first."""
    qmp = ready(server, proxy.uri)
    proxy.stall()
    proxy.reset()
    wait_until(lambda: proxy.connections >= 2, "a first attempt")
    qmp.execute("block-job-pause", device="j")
    qmp.wait_status("standby")
    qmp.execute("block-job-resume", device="j")
    wait_until(lambda: proxy.connections >= 3, "a second one")
    proxy.forward()
    copy_is_good(qmp, guest, disk, target, identical)


# The connection itself


def test_the_loop_knows_of_a_loss_before_it_hears_of_its_errors(
    target: Lossy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest's thread finds out, in write-blocking mode, and tells the job by `call_soon`. The job
    connects again only if the connection says by then that it is lost."""
    posted: list[Callable[[], None]] = []
    loop = Loop(time.monotonic)
    monkeypatch.setattr(loop, "call_soon", posted.append)
    connection = SharedConnection.open(target.uri(), 5)
    connection.attach(loop)
    target.kill()
    with pytest.raises(DeviceLost):
        connection.call(connection.handle.aio_pwrite, bytes(4096), 0)
    while posted:
        posted.pop(0)()
    assert connection.is_lost
    connection.close()
    target.come_back()


# The network swallows everything


class OnTcp(NbdkitTarget):
    def start(self) -> Self:
        self.port = free_port()
        return super().start()

    def argv(self) -> list[str]:
        return ["nbdkit", "-f", "-p", str(self.port), "-i", "127.0.0.1", "memory", "1M"]

    def uri(self, export: str = "") -> str:
        return f"nbd://127.0.0.1:{self.port}"


def test_a_peer_that_the_network_has_lost_is_found_out(start: Start, folder: Path) -> None:
    """The kernel is told to; that it then does so is the kernel's affair (and tests/e2e has a link
    that is cut)."""
    target = start(OnTcp(folder, "memory", "1M"))
    connection = SharedConnection.open(target.uri(), 5.0)
    own = connection._socket
    assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == PEER_LOST_S * 1000
    connection.close()


def test_closing_does_not_wait_for_a_handshake(
    target: Lossy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop closes targets: a forced cancel of one that hangs has a second, and all other
    jobs wait meanwhile."""
    monkeypatch.setattr(pool, "LINK_TIMEOUT_S", 60.0)
    with Proxy(target.socket) as proxy:
        device = NbdDevice.open(proxy.uri)
        assert device.announced.can_multi_conn
        proxy.stall()
        device.pool.links.ask()
        wait_until(lambda: proxy.connections >= 2, "a further connection hangs in its handshake")
        began_s = time.monotonic()
        device.close()
        assert time.monotonic() - began_s < 10.0
        proxy.forward()
        linkset.wait_for_handshakes()
