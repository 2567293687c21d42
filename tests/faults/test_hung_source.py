"""Ends are bounded whichever side hangs: here it is the source, an NBD server that is stopped and
goes on again. (Targets that hang: test_target_gone.py.)"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support.clients import connected, requested
from support.fixtures import Identical, Start
from support.images import make_image, make_noise
from support.losing import GRANULE, SIZE, Lossy, end
from support.qmpclient import Qmp
from support.seeds import SEED
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

COMPLETE, CANCEL = "block-job-complete", "block-job-cancel"
FORCE_S_MAX = 3.0
"""Of a forced cancel; it takes 0.3 s."""
END_S_MAX = 15.0
"""Of a server that is to end, whatever hangs."""
DATA = b"\x5a" * GRANULE


@pytest.fixture(params=[True, False], ids=["multi-conn", "one connection"])
def source(start: Start, folder: Path, request: pytest.FixtureRequest) -> Lossy:
    disk = make_image(folder / "disk.img", SIZE, SEED)
    return start(Lossy(folder, disk, multi_conn=request.param))


@pytest.fixture
def target(start: Start, folder: Path) -> QemuNbd:
    return start(QemuNbd(folder, make_noise(folder / "target.img", SIZE, SEED + 1)))


@pytest.fixture
def server(start: Start, folder: Path, source: Lossy) -> Nbdmirror:
    server = start(Nbdmirror(folder, f"src={source.uri()}", bare=True))
    server.allowed.append("does not answer|flush at the end failed|connection lost|no answer")
    return server


def begin(server: Nbdmirror, target: QemuNbd, **options: object) -> Qmp:
    qmp = server.qmp
    qmp.add_target("tgt", target)
    qmp.start_mirror("tgt", device="src", granularity=GRANULE, **options)
    return qmp


def stall_while_it_copies(qmp: Qmp, source: Lossy) -> None:
    wait_until(lambda: qmp.job()["offset"], "it copies")
    source.stall()
    qmp.execute("block-job-set-speed", device="j", speed=0)
    wait_until(lambda: qmp.job()["busy"], "it waits for the source")


def go_on(source: Lossy) -> None:
    os.kill(source.pid, signal.SIGCONT)


@pytest.mark.guarantee("It does not wait for a source that hangs")
def test_a_forced_cancel_and_another_mirror(
    start: Start,
    folder: Path,
    source: Lossy,
    server: Nbdmirror,
    target: QemuNbd,
    identical: Identical,
) -> None:
    """What the first one had asked for is answered when the second one runs, and is nobody's."""
    qmp = begin(server, target, speed=SIZE // 8)
    stall_while_it_copies(qmp, source)
    began_s = time.monotonic()
    qmp.execute(CANCEL, device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    assert time.monotonic() - began_s < FORCE_S_MAX
    left = target.image.read_bytes()
    other = start(QemuNbd(folder, make_noise(folder / "other.img", SIZE, SEED + 2)))
    qmp.add_target("other", other)
    qmp.start_mirror("other", device="src", granularity=GRANULE)
    go_on(source)
    qmp.wait_ready()
    end(qmp, CANCEL)
    assert target.image.read_bytes() == left, "the first target is left alone"
    identical(source.uri(), other.image)


@pytest.mark.guarantee("It does not wait for a source that hangs")
def test_a_pause_and_what_follows(
    source: Lossy, server: Nbdmirror, target: QemuNbd, identical: Identical
) -> None:
    """Paused, and resumed, while the source hangs; then it goes on."""
    qmp = begin(server, target, speed=SIZE // 8)
    stall_while_it_copies(qmp, source)
    qmp.execute("block-job-pause", device="j")
    qmp.wait_status("paused")
    before = target.image.read_bytes()
    qmp.execute("block-job-resume", device="j")
    qmp.execute("block-job-pause", device="j")
    qmp.wait_status("paused")
    assert target.image.read_bytes() == before
    go_on(source)
    with connected(server.uri("src")) as guest:
        guest.pwrite(DATA, 3 * GRANULE)
        guest.flush()
    assert target.image.read_bytes() == before, "what comes late is nobody's"
    qmp.execute("block-job-resume", device="j")
    qmp.wait_ready()
    end(qmp, CANCEL)
    identical(source.uri(), target.image)


def test_a_guest_that_waits_is_told(source: Lossy, server: Nbdmirror) -> None:
    """No mirror reads the disk, so nothing else shows it."""
    source.stall()
    read = requested(server.uri("src"), lambda guest: guest.pread(GRANULE, 0))

    def problem() -> str:
        return str(server.qmp.disk().get("problem", ""))

    wait_until(problem, "the status says so")
    assert f"a guest's request has waited for {source.uri()} for 0:0" in problem()
    go_on(source)
    read.result()
    assert not problem()


@pytest.mark.parametrize("ending", ["pause", "cancel"])
def test_a_guests_synchronous_write(
    source: Lossy, server: Nbdmirror, target: QemuNbd, identical: Identical, ending: str
) -> None:
    """It hangs at the source. The target does not get it behind the back of a job that is paused,
    or has ended; the guest is answered when the source is."""
    qmp = begin(server, target, copy_mode="write-blocking")
    qmp.wait_ready()
    with connected(server.uri("src")) as guest:
        guest.pread(512, 0)  # all connections are there
    before = target.image.read_bytes()
    source.stall()
    write = requested(server.uri("src"), lambda guest: guest.pwrite(DATA, 3 * GRANULE))
    wait_until(
        lambda: qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"][0]["in-flight-bytes"],
        "the write is under way",
    )
    if ending == "pause":
        qmp.execute("block-job-pause", device="j")
        qmp.wait_status("standby")
    else:
        qmp.execute(CANCEL, device="j", force=True)
        qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    go_on(source)
    write.result()
    assert target.image.read_bytes() == before
    if ending == "pause":
        qmp.execute("block-job-resume", device="j")
        qmp.wait_status("ready")
        end(qmp, CANCEL)
        identical(source.uri(), target.image)
    else:
        identical(before, target.image)


@pytest.mark.guarantee("It does not wait for a source that hangs")
def test_the_server_ends(
    source: Lossy, server: Nbdmirror, target: QemuNbd, identical: Identical
) -> None:
    """In the middle of a copy. What the source has is as it was."""
    before = source.image.read_bytes()
    qmp = begin(server, target, speed=SIZE // 8)
    wait_until(lambda: qmp.job()["offset"], "it copies")
    source.stall()
    process = server.process
    assert process is not None
    process.terminate()
    process.wait(END_S_MAX)
    go_on(source)
    server.stop()
    identical(before, source.image)
