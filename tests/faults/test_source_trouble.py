"""The source fails: reads with EIO, a full file system, a file that is truncated or replaced
underneath, an NBD server that dies. The guest gets a clear errno, the mirror's policy applies, and
nothing counts as copied that is not."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
from support.clients import connected, nbd_errno
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_empty, make_noise
from support.losing import GRANULE, SIZE, Lossy, end, wait_caught_up
from support.mounts import loop_device, mounted
from support.qmpclient import Qmp
from support.seeds import SEED
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import wait_until

COMPLETE, CANCEL = "block-job-complete", "block-job-cancel"
BLOCK = 4096
DATA = b"\x5a" * BLOCK
LOST = r"connection lost|not flushed|lost: |Failed to connect|no answer|WARNING"


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
    server = start(Nbdmirror(folder, f"src={source.uri()}", bare=True))
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


# Reads that fail


@pytest.mark.parametrize("policy", ["report", "stop", "ignore"])
def test_reads_that_fail(
    start: Start, folder: Path, disk: Path, target: QemuNbd, identical: Identical, policy: str
) -> None:
    """EIO from below, for as long as a file is there; the guest gets it as well."""
    failing = folder / "fail"
    filters = ("error",)
    parameters = (f"file={disk}", "error-pread=EIO", "error-pread-rate=100%")
    source = NbdkitTarget(
        folder, "file", *parameters, f"error-pread-file={failing}", filters=filters
    )
    server = start(Nbdmirror(folder, f"src={start(source).uri()}", bare=True))
    server.allowed.append("Input/output error|WARNING")
    failing.touch()
    qmp = begin(server, target, on_source_error=policy, auto_dismiss=False)
    with connected(server.uri("src")) as guest:
        assert nbd_errno(guest.pread, BLOCK, 0) == errno.EIO
        event = qmp.wait_for_event("BLOCK_JOB_ERROR")
        assert (event["operation"], event["action"]) == ("read", policy)
        assert "read error" in server.stderr
        failing.unlink()
        guest.pread(BLOCK, 0)
    if policy == "report":
        assert qmp.wait_for_event("BLOCK_JOB_COMPLETED")["error"] == "Input/output error"
        qmp.execute("job-dismiss", id="j")
        qmp.start_mirror("tgt", device="src", granularity=GRANULE)
    elif policy == "stop":
        qmp.wait_status("paused")
        qmp.execute("block-job-resume", device="j")
    qmp.wait_ready()
    end(qmp, CANCEL)
    identical(disk, target.image)


# A file system that is full


def test_writes_that_find_no_room(
    start: Start, folder: Path, target: QemuNbd, identical: Identical
) -> None:
    """A failed write may have changed a part: what the source holds then is what the target gets.
    The job does not mind."""
    with mounted("tmpfs", "size=3m") as place:
        disk = make_empty(place / "disk.img", SIZE)
        server = start(Nbdmirror(folder, f"src={disk}", bare=True))
        server.allowed.append("No space left")
        qmp = begin(server, target)
        qmp.wait_ready()
        data = random.Random(SEED).randbytes(700_001)
        with connected(server.uri("src")) as guest:
            codes = [nbd_errno(guest.pwrite, data, n * MiB + 511) for n in range(7)]
            assert set(codes) == {0, errno.ENOSPC}, codes
            guest.trim(MiB, 0)
            guest.pwrite(data, 7 * MiB)
            assert guest.pread(len(data), 7 * MiB) == data
            wait_caught_up(qmp)
        assert errors(qmp) == []
        end(qmp, CANCEL)
        assert_identical(server.uri("src"), target.image)
        server.stop()
        identical(disk.read_bytes(), target.image)


# A file that changes underneath


@pytest.fixture
def file_server(start: Start, folder: Path, disk: Path) -> Nbdmirror:
    server = start(Nbdmirror(folder, f"src={disk}", bare=True))
    server.allowed.append("truncated|WARNING|SOURCE|another file|deleted")
    return server


def the_change(qmp: Qmp) -> dict[str, Any]:
    """What is said of the file, which is looked at once a second: before or after what a job says
    of its reads."""

    def said() -> list[dict[str, Any]]:
        qmp.execute("query-block-jobs")
        found = [event for event in qmp.events if event["event"] == "X_NBDMIRROR_SOURCE_CHANGED"]
        return [event["data"] for event in found]

    return dict(wait_until(said, "the change is noticed")[0])


@pytest.mark.parametrize("policy", ["report", "stop"])
@pytest.mark.parametrize("phase", ["first copy", "READY"])
def test_a_file_that_is_truncated(
    file_server: Nbdmirror,
    disk: Path,
    target: QemuNbd,
    identical: Identical,
    phase: str,
    policy: str,
) -> None:
    """What is missing is not taken for zeroes, not even where a guest's write makes the file longer
    again and leaves a hole."""
    whole = disk.read_bytes()
    qmp = begin(
        file_server,
        target,
        on_source_error=policy,
        auto_dismiss=False,
        speed=1 if phase == "first copy" else 0,
    )
    if phase == "READY":
        qmp.wait_ready()
    else:
        wait_until(lambda: qmp.job()["offset"], "something is copied")
        qmp.execute("job-pause", id="j")  # it may be about to look at what comes next
        qmp.wait_status("paused")
    os.truncate(disk, 5 * MiB)
    with connected(file_server.uri("src")) as guest:
        assert nbd_errno(guest.pread, BLOCK, 6 * MiB) == errno.EIO
        guest.pwrite(DATA, 7 * MiB + 8192)
        if phase == "first copy":
            qmp.execute("block-job-set-speed", device="j", speed=0)
            qmp.execute("job-resume", id="j")
        event = qmp.wait_for_event("BLOCK_JOB_ERROR")
        assert (event["operation"], event["action"]) == ("read", policy)
    if policy == "report":
        assert qmp.wait_for_event("BLOCK_JOB_COMPLETED")["error"] == "Input/output error"
    else:
        qmp.wait_status("standby" if phase == "READY" else "paused")
    changed = the_change(qmp)
    assert "was truncated while in use" in changed["reason"]
    assert changed["reason"] in file_server.stderr
    if phase == "READY":
        assert_identical(whole, target.image)
    if policy == "report":
        identical(whole[: 5 * MiB], disk.read_bytes()[: 5 * MiB])
        return
    with disk.open("r+b") as file:  # the user has a backup
        file.write(whole)
    with connected(file_server.uri("src")) as guest:
        guest.pwrite(DATA, 7 * MiB + 8192)
    qmp.execute("block-job-resume", device="j")
    qmp.wait_ready() if phase == "first copy" else wait_caught_up(qmp)
    end(qmp, CANCEL)
    identical(disk, target.image)


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved"])
def test_a_file_that_is_not_there_any_more(
    file_server: Nbdmirror, disk: Path, target: QemuNbd, identical: Identical, how: str
) -> None:
    """The server and its guests go on with the file that they have; it is told that nobody else can
    see it. A mirror takes its content to where it is safe."""
    initial = disk.read_bytes()
    with Guest(file_server.uri("src"), initial, seed=SEED) as guest:
        qmp = begin(file_server, target)
        qmp.wait_ready()
        other = disk.with_name("other.img")
        if how == "deleted":
            disk.unlink()
        elif how == "replaced":
            make_noise(other, SIZE)
            other.replace(disk)
        else:
            disk.rename(other)
        changed = qmp.wait_for_event("X_NBDMIRROR_SOURCE_CHANGED")
        assert changed["device"] == "src"
        expected = {"deleted": "was deleted", "replaced": "another file", "moved": "was moved"}
        assert expected[how] in changed["reason"], changed
        assert changed["reason"] in file_server.stderr
        guest.wait_for_requests(20)
        end(qmp, COMPLETE)
        guest.wait_for_requests(20)
        identical(guest, target.image)


def test_a_block_device_that_fails(
    start: Start, folder: Path, disk: Path, target: QemuNbd, identical: Identical
) -> None:
    """A loop device whose file is cut short answers EIO from there on. (dm-error and dm-flakey
    would do, where there is a device mapper.)"""
    whole = disk.read_bytes()
    with loop_device(disk) as device:
        os.truncate(disk, 5 * MiB)
        server = start(Nbdmirror(folder, f"src={device}", bare=True))
        server.allowed.append("Input/output error|WARNING")
        qmp = begin(server, target, on_source_error="stop")
        event = qmp.wait_for_event("BLOCK_JOB_ERROR")
        assert (event["operation"], event["action"]) == ("read", "stop")
        qmp.wait_status("paused")
        with connected(server.uri("src")) as guest:
            assert nbd_errno(guest.pread, BLOCK, 6 * MiB) == errno.EIO
            with disk.open("r+b") as file:
                file.write(whole)
            guest.pwrite(DATA, 0)
        qmp.execute("block-job-resume", device="j")
        qmp.wait_ready()
        end(qmp, CANCEL)
        server.stop()
        assert_identical(Path(device), target.image)
    identical(disk, target.image)
