"""Bounded endings (rule 42): a target that hangs or goes away in any phase, and the end of the
server in any state."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest
from integration.sync.syncparts import SIZE, soft_cancel
from support.clients import connected, requested
from support.fixtures import Identical, Start
from support.images import KiB
from support.late import started
from support.processes import free_port, freeze
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd
from support.waiting import InThread, wait_until

FORCE_S_MAX = 1.0
QUIT_S_MAX = 4.0


class Proxy:
    """TCP to a Unix socket; from `swallow` on everything is accepted and nothing delivered."""

    def __init__(self, target: Path) -> None:
        self.port = free_port()
        self._target = str(target)
        self._is_hole = threading.Event()
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def swallow(self) -> None:
        self._is_hole.set()

    def close(self) -> None:
        self._stopping.set()
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        threads = []
        while not self._stopping.is_set():
            if not select.select([self._listener], [], [], 0.05)[0]:
                continue
            try:
                near, _ = self._listener.accept()
            except OSError:
                break
            threads.append(threading.Thread(target=self._carry, args=(near,), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(5)

    def _carry(self, near: socket.socket) -> None:
        with near, socket.socket(socket.AF_UNIX) as far:
            far.connect(self._target)
            while not self._stopping.is_set():
                if self._is_hole.is_set():
                    self._stopping.wait(0.05)
                    continue
                for one in select.select([near, far], [], [], 0.02)[0]:
                    try:
                        data = one.recv(1 << 16)
                        (far if one is near else near).sendall(data)
                    except OSError:
                        return
                    if not data:
                        return


class Hang:
    """A target, and how to make it hang."""

    def __init__(self, kind: str, target: QemuNbd) -> None:
        self.kind = kind
        self.target = target
        self.proxy = Proxy(target.socket) if kind == "black hole" else None
        port = self.proxy.port if self.proxy else 0
        self.uri = f"nbd://127.0.0.1:{port}" if port else target.uri()

    def begin(self) -> None:
        if self.proxy:
            self.proxy.swallow()
        else:
            freeze(self.target.pid)

    def end(self) -> None:
        if self.proxy:
            self.proxy.close()
        elif self.target.process is not None:
            os.kill(self.target.pid, signal.SIGCONT)


@pytest.fixture(params=["stopped", "black hole"])
def hang(request: pytest.FixtureRequest, target: QemuNbd) -> Iterator[Hang]:
    hang = Hang(request.param, target)
    yield hang
    hang.end()


def write_4k(guest: nbd.NBD) -> None:
    guest.pwrite(b"\x44" * 4096, 8192)


PHASES = ["first copy", "ready", "completing", "soft cancelling", "paused", "write-blocking"]


def enter(phase: str, server: Nbdmirror, hang: Hang) -> InThread:
    """The target hangs while the job is in `phase`, with a guest's write under way."""
    qmp = server.qmp
    if phase == "first copy":
        qmp.start_mirror(hang.uri, device="src", speed=SIZE // 4, buf_size=64 * KiB)
        hang.begin()
        guest = requested(server.uri("src"), write_4k)
        wait_until(lambda: qmp.job()["busy"], "a copy hangs")
        return guest
    mode = "write-blocking" if phase == "write-blocking" else "background"
    qmp.start_mirror(hang.uri, device="src", copy_mode=mode)
    qmp.wait_ready()
    if phase == "write-blocking":
        wait_until(lambda: qmp.job()["actively-synced"], "actively synced")
    hang.begin()
    guest = requested(server.uri("src"), write_4k)

    def dirty() -> bool:
        (job,) = qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
        return bool(job["in-flight-bytes"])

    wait_until(dirty, "a copy hangs")
    verbs = {"completing": "block-job-complete", "soft cancelling": "block-job-cancel"}
    verbs["paused"] = "block-job-pause"
    if phase in verbs:
        qmp.execute(verbs[phase], device="j")
    return guest


@pytest.mark.rule(41, 42)
@pytest.mark.guarantee("It does not pay for the target")
@pytest.mark.guarantee("Force cancel takes less than a second")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.alone
def test_force_cancel_of_a_hanging_target(
    folder: Path, server: Nbdmirror, hang: Hang, phase: str, disk: Path
) -> None:
    """Within a second, whatever waits; the guest's write is on the source."""
    qmp = server.qmp
    guest = enter(phase, server, hang)
    if phase != "write-blocking":
        guest.result(10.0)  # while the target hangs: the guest never pays for it (rule 41)
    began_s = time.monotonic()
    qmp.execute("block-job-cancel", device="j", force=True)
    told = [event["event"] for event in qmp.events]
    assert "BLOCK_JOB_CANCELLED" not in told, "the command itself does not wait"
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    seconds = time.monotonic() - began_s
    guest.result(10.0)
    assert seconds < FORCE_S_MAX
    assert disk.read_bytes()[8192:12288] == b"\x44" * 4096
    with connected(server.uri("src")) as other:
        other.pwrite(b"\x45" * 512, 0)


@pytest.mark.rule(19)
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_the_same_node_again_after_it_hung(
    identical: Identical,
    server: Nbdmirror,
    qmp: Qmp,
    disk: Path,
    target: QemuNbd,
    copy_mode: str,
) -> None:
    """What the forced cancel gave up is connected again by the next job, once all that was in
    flight was answered."""
    hang = Hang("stopped", target)
    qmp.start_mirror("tgt", device="src", copy_mode=copy_mode)
    qmp.wait_ready()
    hang.begin()
    guest = requested(server.uri("src"), write_4k)
    wait_until(lambda: qmp.job()["len"] > SIZE, "the write counts")
    qmp.execute("block-job-cancel", device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    guest.result(10.0)
    hang.end()
    started(lambda: qmp.start_mirror("tgt", device="src", copy_mode=copy_mode))
    qmp.wait_ready()
    soft_cancel(qmp)
    identical(disk, target.image)


@pytest.mark.alone
@pytest.mark.parametrize("policy", ["report", "stop"])
def test_an_idle_job_whose_target_goes_away(
    server: Nbdmirror, qmp: Qmp, target: QemuNbd, policy: str
) -> None:
    """It is told without a guest's write, and the server does not spin."""
    qmp.start_mirror("tgt", device="src", on_target_error=policy)
    qmp.wait_ready()
    target.kill()

    def processor_s() -> float:
        fields = Path(f"/proc/{server.pid}/stat").read_text().split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

    before_s = processor_s()
    time.sleep(0.5)  # for so long it is looked at; nothing is waited for
    assert processor_s() - before_s < 0.2, "it spins"
    assert qmp.wait_for_event("BLOCK_JOB_ERROR", 3)["action"] == policy


@pytest.mark.rule(37)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.alone
def test_quit_with_a_hanging_target(
    start: Start, folder: Path, disk: Path, target: QemuNbd, phase: str
) -> None:
    hang = Hang("stopped", target)
    server = Nbdmirror(folder, f"src={disk}", bare=True).start()
    try:
        enter(phase, server, hang)
        assert server.process is not None
        began_s = time.monotonic()
        server.qmp.execute("quit")
        server.process.wait(10)
        assert time.monotonic() - began_s < QUIT_S_MAX
        assert any(event["event"] == "BLOCK_JOB_CANCELLED" for event in server.qmp.events)
    finally:
        hang.end()
        server.kill()


@pytest.mark.rule(37)
@pytest.mark.guarantee("The server ends when asked")
@pytest.mark.parametrize("stop", ["SIGTERM", "SIGINT", "quit"])
@pytest.mark.parametrize("state", ["running", "paused", "ready", "standby", "pending", "concluded"])
@pytest.mark.alone
def test_the_server_ends_in_every_state(
    folder: Path, disk: Path, target: QemuNbd, state: str, stop: str
) -> None:
    """With a guest at work; in order, and quickly. The source has what the guest was told."""
    with Nbdmirror(folder, f"src={disk}", bare=True) as server:
        qmp = server.qmp
        options: dict[str, Any] = {"auto_dismiss": False}
        if state in ("running", "paused"):
            options |= {"speed": 64 * KiB, "buf_size": 64 * KiB}
        qmp.start_mirror(target.uri(), device="src", auto_finalize=state != "pending", **options)
        if state not in ("running", "paused"):
            qmp.wait_ready()
        if state in ("pending", "concluded"):
            qmp.execute("block-job-complete", device="j")
            qmp.wait_status(state)
        if state in ("paused", "standby"):
            qmp.execute("job-pause", id="j")
            qmp.wait_status(state)
        with connected(server.uri("src")) as guest:
            guest.pwrite(b"\x51" * 4096, 4096)
        process = server.process
        assert process is not None
        began_s = time.monotonic()
        if stop == "quit":
            qmp.execute("quit")
        else:
            process.send_signal(getattr(signal, stop))
        assert process.wait(10) == 0
        assert time.monotonic() - began_s < QUIT_S_MAX
        held = target.image if state == "concluded" else disk
        assert held.read_bytes()[4096:8192] == b"\x51" * 4096
