"""Sources, and disks after a pivot, whose server does what no real one does.

Each costs its job, or its blockdev-add, one clear error, and never the server: the disk's guest
goes on, other jobs go on, memory and descriptors stay flat, and a forced cancel takes less than a
second.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbd
import pytest
from faults.hostile_target.hostileparts import NO_WAY_OUT, SIZE, add, is_one_line, mirror
from faults.hostile_target.test_hostile_target import ERRORS, GARBAGE, IS_STRICT, STRAY, check_log
from support import tricks
from support.clients import connected, nbd_errno
from support.fixtures import Start
from support.guests import Guest
from support.hostile import (
    FLAGS,
    FLUSH,
    MULTI_CONN,
    READ,
    STATUS,
    TRIM,
    WRITE,
    ZERO,
    Hostile,
    Trick,
)
from support.images import KiB, assert_identical, make_empty, make_image, make_noise
from support.seeds import SEED
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

BAD_READS: list[Trick] = [
    tricks.data_too_long, tricks.data_beyond, tricks.data_before, tricks.hole_beyond,
    tricks.hole_of_a_wrong_length, tricks.short_data,
]  # fmt: skip
MALFORMED: list[Trick] = [tricks.no_extents, tricks.extents_of_a_wrong_length]
NONSENSE: list[Trick] = [
    tricks.extent_of_nothing, tricks.extents_beyond, tricks.unasked_context, tricks.no_status,
    tricks.strange_flags, tricks.unknown_error, tricks.error_with_a_text,
    *([] if IS_STRICT else MALFORMED),
]  # fmt: skip
"""About extents: taken for data."""
LIES: list[Trick] = [tricks.extents_by_thousands, tricks.extent_too_long]
"""Well-formed, and so believed: of a lie about zeroes zeroes come."""
BREAKING: list[Trick] = [
    *([*MALFORMED, *STRAY] if IS_STRICT else []),
    tricks.wrong_magic, tricks.half_an_answer, tricks.hang_up,
]  # fmt: skip


@pytest.fixture(params=["links", "one connection"])
def source(
    folder: Path,
    disk: Path,
    hostiles: Callable[[Path, bytes], Hostile],
    request: pytest.FixtureRequest,
) -> Hostile:
    """What a disk is served from: with connections for each guest's thread, or one for all."""
    source = hostiles(folder, disk.read_bytes())
    source.right_flags = FLAGS if request.param == "links" else FLAGS & ~MULTI_CONN
    source.behave()
    return source


def is_served(server: Nbdmirror, content: bytes) -> bool:
    """A guest that comes now finds its disk."""
    with connected(server.uri("disk0")) as guest:
        return bytes(guest.pread(64 * KiB, 0)) == content[: 64 * KiB]


def test_a_hostile_source(start: Start, folder: Path, source: Hostile) -> None:
    """The guest gets an error each time, and its connection goes on; another disk's guest notices
    nothing."""
    other = make_image(folder / "other.img", SIZE, SEED + 1)
    server = start(Nbdmirror(folder, source.uri, other, bare=True))
    server.allowed = [NO_WAY_OUT, "error"]
    with (
        Guest(server.uri("disk1"), other, seed=SEED) as bystander,
        connected(server.uri("disk0")) as guest,
    ):
        for trick in [*GARBAGE[:-2], *ERRORS, *BAD_READS]:
            assert not nbd_errno(guest.pread, 4096, 0), trick
            source.on_request[READ] = source.on_request[WRITE] = trick
            assert nbd_errno(guest.pread, 64 * KiB, 0), trick
            assert nbd_errno(guest.pwrite, b"x" * 4096, 0) or trick not in GARBAGE, trick
            source.behave()
            wait_until(lambda: not nbd_errno(guest.pread, 4096, 0), f"{trick}: it is back")
            guest.pwrite(b"y" * 4096, 0)
            assert bytes(source.image[:4096]) == b"y" * 4096
        bystander.wait_for_requests(50)
        assert bystander.longest_s < 5.0
    assert_identical(bystander.model, other)
    assert "Traceback" not in server.stderr


@pytest.mark.parametrize("trick", [tricks.no_data, tricks.empty_data, tricks.data_for_nothing])
def test_data_that_was_left_out_is_an_error_or_zeroes(
    start: Start, folder: Path, source: Hostile, trick: Trick
) -> None:
    """And not as what was in our memory: another disk's data, say."""
    server = start(Nbdmirror(folder, source.uri, bare=True))
    server.allowed = [NO_WAY_OUT, "error", "lacks some data"]
    with connected(server.uri()) as guest:
        for at in range(0, SIZE, 128 * KiB):
            guest.pread(128 * KiB, at)
        source.on_request[READ] = trick
        for at in range(0, SIZE, 128 * KiB):
            try:
                found = bytes(guest.pread(128 * KiB, at))
            except nbd.Error:
                continue
            assert not found.strip(b"\0")
    source.behave()


@pytest.mark.parametrize("trick", [tricks.no_data, tricks.empty_data, tricks.data_for_nothing])
def test_data_that_was_left_out_is_not_copied_as_zeroes(
    start: Start, folder: Path, disk: Path, source: Hostile, trick: Trick
) -> None:
    image = folder / "target.img"
    good = start(QemuNbd(folder, make_noise(image, SIZE, SEED + 4)))
    server = start(Nbdmirror(folder, source.uri, bare=True))
    server.allowed = [NO_WAY_OUT, "error", "lacks some data"]
    source.on_request[READ] = trick
    server.qmp.start_mirror(good.uri())
    told = server.qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")
    assert is_one_line(told["error"])
    source.behave()
    server.qmp.forget()
    server.qmp.start_mirror(good.uri())
    server.qmp.wait_ready()
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    assert_identical(disk, image)


def test_a_hostile_source_about_its_extents(
    start: Start, folder: Path, disk: Path, source: Hostile
) -> None:
    """What it says of holes is worth no more than its word. A guest gets an answer or an error; a
    mirror copies the disk, or ends with one error."""
    image = folder / "target.img"
    good = start(QemuNbd(folder, make_noise(image, SIZE, SEED + 3)))
    server = start(Nbdmirror(folder, source.uri, bare=True))
    server.allowed = [NO_WAY_OUT, "error"]
    qmp = server.qmp
    for trick in NONSENSE + LIES + BREAKING:
        source.on_request[STATUS] = trick
        found: list[int] = []
        with connected(server.uri()) as guest:
            nbd_errno(guest.block_status, SIZE, 0, lambda _m, _o, pairs, _e: found.extend(pairs))  # noqa: B023
        assert sum(found[::2]) <= SIZE, trick
        qmp.start_mirror(good.uri(), auto_dismiss=False)
        if trick in BREAKING:
            told = qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")
            assert is_one_line(told["error"]), trick
            source.behave()
            qmp.execute("job-dismiss", id="j")
            qmp.start_mirror(good.uri(), auto_dismiss=False)
        qmp.wait_ready()
        qmp.execute("block-job-cancel", device="j")
        qmp.wait_completed()
        if trick not in LIES:
            assert_identical(disk, image)
        qmp.wait_status("concluded")
        qmp.execute("job-dismiss", id="j")
        qmp.forget()
    check_log(server)


@pytest.mark.parametrize("trick", [tricks.silence, tricks.endless_chunks])
def test_the_server_ends_though_its_source_does_not_answer(
    start: Start, folder: Path, source: Hostile, trick: Trick
) -> None:
    server = start(Nbdmirror(folder, source.uri, bare=True))
    server.allowed = [NO_WAY_OUT, "error"]
    guest = nbd.NBD()  # which is let alone in the end
    guest.connect_uri(server.uri())
    guest.pread(512, 0)
    source.on_request[READ] = trick
    before = len(source.requests)
    guest.aio_pread(nbd.Buffer(512), 0)
    wait_until(lambda: any(r.kind == READ for r in source.requests[before:]), "it is asked")
    assert server.process is not None
    server.process.terminate()
    assert server.process.wait(30) == 0


def test_after_a_pivot(start: Start, folder: Path, disk: Path, target: Hostile) -> None:
    """The target turns out hostile once it is the disk: its guest gets errors, the server stays,
    and the disk can be moved away from it."""
    server = start(Nbdmirror(folder, disk, bare=True))
    server.allowed = [NO_WAY_OUT, "error"]
    qmp = server.qmp
    add(qmp, target)
    mirror(qmp, auto_dismiss=True)
    qmp.wait_ready()
    qmp.complete()
    with connected(server.uri()) as guest:
        guest.pread(4096, 0)
        for trick in (*GARBAGE, *ERRORS, *BAD_READS):
            target.on_request = dict.fromkeys((READ, WRITE, ZERO, TRIM, FLUSH), trick)
            assert nbd_errno(guest.pread, 4096, 0), trick
            assert qmp.execute("query-status")["running"]
            target.behave()
            wait_until(lambda: not nbd_errno(guest.pread, 4096, 0), "it is back")
        assert bytes(guest.pread(SIZE, 0)) == bytes(target.image)
    image = make_empty(folder / "refuge.img", SIZE)
    refuge = start(QemuNbd(folder, image))
    qmp.start_mirror(refuge.uri(), job_id="away")
    qmp.wait_ready("away")
    qmp.complete("away")
    assert_identical(bytes(target.image), image)
    assert "Traceback" not in server.stderr
