"""The source fails: reads with EIO, a full file system, a file that is truncated or replaced
underneath, an NBD server that dies. The guest gets a clear errno, the mirror's policy applies, and
nothing counts as copied that is not."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from conftest import Identical, Start
from losing import GRANULE, SEED, SIZE, Lossy, end, wait_caught_up
from tools import (
    MiB,
    Nbdmirror,
    QemuNbd,
    Qmp,
    connected,
    make_image,
    make_noise,
    nbd_errno,
    wait_until,
)

COMPLETE, CANCEL = "block-job-complete", "block-job-cancel"
BLOCK = 4096
DATA = b"\x5a" * BLOCK
LOST = r"connection lost|not flushed|lost: |Failed to connect|no answer|WARNING"


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE, SEED)


@pytest.fixture
def target(start: Start, folder: Path) -> QemuNbd:
    return start(QemuNbd(folder, make_noise(folder / "target.img", SIZE, SEED + 1)))


def errors(qmp: Qmp) -> list[tuple[str, str]]:
    """(operation, action) of the job's error events."""
    events = [event["data"] for event in qmp.events if event["event"] == "BLOCK_JOB_ERROR"]
    return [(data["operation"], data["action"]) for data in events]


# An NBD server that dies


@pytest.fixture(params=[True, False], ids=["multi-conn", "one connection"])
def source(start: Start, folder: Path, disk: Path, request: pytest.FixtureRequest) -> Lossy:
    return start(Lossy(folder, disk, multi_conn=request.param))


@pytest.fixture
def server(start: Start, folder: Path, source: Lossy) -> Nbdmirror:
    server = start(Nbdmirror(folder, f"src={source.uri()}"))
    server.allowed.append(LOST)
    return server


def begin(server: Nbdmirror, target: QemuNbd, **options: object) -> Qmp:
    qmp = server.qmp
    qmp.add_target("tgt", target)
    qmp.start_mirror("tgt", device="src", granularity=GRANULE, **options)
    return qmp


def test_a_source_that_comes_back_is_read_again(
    source: Lossy, server: Nbdmirror, target: QemuNbd, identical: Identical
) -> None:
    """Guests find their connections lost when they use them; the mirror has its own, and waits as
    they do."""
    qmp = begin(server, target)
    qmp.wait_ready()
    source.kill()
    source.come_back()
    with connected(server.uri("src")) as guest:
        guest.pwrite(DATA, MiB)
        guest.flush()
        wait_caught_up(qmp)
    end(qmp, CANCEL)
    assert errors(qmp) == []
    identical(source.uri(), target.image)


def test_a_source_that_dies_in_the_first_copy(
    source: Lossy, server: Nbdmirror, target: QemuNbd, identical: Identical
) -> None:
    source.order("kill read 3")
    qmp = begin(server, target)
    source.wait_killed()
    source.come_back()
    qmp.wait_ready()
    end(qmp, CANCEL)
    assert errors(qmp) == []
    identical(source.uri(), target.image)


def test_a_mirror_that_begins_after_its_source_was_lost_and_found(
    source: Lossy, server: Nbdmirror, target: QemuNbd, identical: Identical
) -> None:
    """Guests have connected again, by connections of their own."""
    with connected(server.uri("src")) as guest:
        guest.pwrite(DATA, 0)
        guest.flush()
        source.kill()
        source.come_back()
        guest.pwrite(DATA, BLOCK)
    begin(server, target).wait_ready()
    end(server.qmp, CANCEL)
    identical(source.uri(), target.image)


def test_the_disk_itself_is_known_while_its_server_is_away(
    source: Lossy, server: Nbdmirror
) -> None:
    qmp = server.qmp
    qmp.add_target("tgt", source)
    source.kill()
    text = qmp.refusal("blockdev-mirror", device="src", target="tgt", job_id="j", sync="full")
    assert "is the disk itself" in text or "lost its connection" in text


@pytest.mark.parametrize("is_asked", [True, False], ids=["guest asks", "guest at rest"])
def test_what_the_source_has_lost_does_not_stay_on_the_target(
    source: Lossy, server: Nbdmirror, target: QemuNbd, identical: Identical, is_asked: bool
) -> None:
    """The mirror has copied what the source then forgets, since nobody had flushed it: the source
    is the disk. The guest's next flush tells it."""
    qmp = begin(server, target)
    qmp.wait_ready()
    with connected(server.uri("src")) as guest:
        guest.pwrite(DATA, MiB)
        wait_caught_up(qmp)
        source.kill()
        source.come_back()
        if is_asked:
            guest.pread(BLOCK, 0)
            assert nbd_errno(guest.flush) == errno.EIO
        else:
            guest.pwrite(DATA, 2 * MiB)
        assert guest.pread(BLOCK, MiB) != DATA
        wait_caught_up(qmp)
    end(qmp, CANCEL)
    identical(source.uri(), target.image)


@pytest.mark.parametrize("policy", ["report", "stop", "ignore"])
def test_a_source_that_stays_away(
    source: Lossy, server: Nbdmirror, target: QemuNbd, identical: Identical, policy: str
) -> None:
    """The policy for the source is asked when guests' requests fail as well."""
    qmp = begin(server, target, on_source_error=policy, auto_dismiss=False)
    qmp.wait_ready()
    with connected(server.uri("src")) as guest:
        guest.pwrite(DATA, MiB)
        guest.flush()
        wait_caught_up(qmp)
        source.order("kill write 1")
        assert nbd_errno(guest.pwrite, DATA, 2 * MiB) == errno.EIO
        source.wait_killed()
        # The failed write may have changed something, so it is copied again.
        event = qmp.wait_for_event("BLOCK_JOB_ERROR")
        assert (event["operation"], event["action"]) == ("read", policy)
        source.come_back()
        wait_until(lambda: nbd_errno(guest.pread, BLOCK, 0) == 0, "the disk is back")
        if policy == "report":
            assert qmp.wait_for_event("BLOCK_JOB_COMPLETED")["error"] == "Input/output error"
            qmp.execute("job-dismiss", id="j")
            qmp.start_mirror("tgt", device="src", granularity=GRANULE)
            qmp.wait_ready()
        if policy == "stop":
            qmp.wait_status("standby")
            qmp.execute("block-job-resume", device="j")
        wait_caught_up(qmp)
    end(qmp, CANCEL)
    identical(source.uri(), target.image)
