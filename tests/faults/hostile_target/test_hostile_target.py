"""Targets whose server does what no real one does, in its answers to a mirror's requests.

Each costs its job, or its blockdev-add, one clear error, and never the server: the disk's guest
goes on, other jobs go on, memory and descriptors stay flat, and a forced cancel takes less than a
second.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.hostile_target.hostileparts import (
    FORCE_S_MAX,
    HANDSHAKES,
    KINDS,
    NO_WAY_OUT,
    SIZE,
    add,
    is_one_line,
    mirror,
)
from support import tricks
from support.fixtures import Identical, Start
from support.guests import Guest
from support.hostile import SIMPLE_MAGIC, WRITE, ZERO, Hostile, Trick
from support.images import MiB, assert_identical, make_noise
from support.processes import libnbd_version, resources, run
from support.qmpclient import Qmp
from support.seeds import SEED
from support.servers import Nbdmirror
from support.waiting import wait_until

# A fair one


def test_without_tricks_it_is_a_good_server(folder: Path, disk: Path) -> None:
    """As its clients find it: else what follows says nothing about us."""
    content = disk.read_bytes()
    for structured in (True, False):
        place = folder / f"structured{structured}"
        place.mkdir()
        with Hostile(place, content) as server:
            server.structured = structured
            assert f"export-size: {SIZE}" in run("nbdinfo", server.uri).stdout
            run("nbdcopy", server.uri, folder / "copy")
            assert_identical(disk, folder / "copy")
            other = make_noise(folder / "noise.img", SIZE)
            run("nbdcopy", other, server.uri)
            assert_identical(other, bytes(server.image))
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", other, server.uri)


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_without_tricks_a_whole_mirror(
    start: Start, folder: Path, disk: Path, target: Hostile, identical: Identical, copy_mode: str
) -> None:
    server = start(Nbdmirror(folder, disk, bare=True))
    with Guest(server.uri(), disk, seed=SEED, connections=2) as guest:
        add(server.qmp, target)
        mirror(server.qmp, copy_mode=copy_mode)
        server.qmp.wait_ready()
        guest.wait_for_requests(50)
        server.qmp.complete()
        guest.wait_for_requests(50)
    assert_identical(guest.model, bytes(target.image))
    identical(guest.model, server.uri())


IS_STRICT = libnbd_version() < (1, 16)
"""Such a libnbd ends the connection at whatever a server does wrong. Later ones, where they use
structured replies, go on behind a chunk that makes no sense, with an error for its request, and
pass over an answer to nothing: that is as good as silence."""
STRAY: list[Trick] = [tricks.wrong_handle]

GARBAGE: list[Trick] = [
    *(STRAY if IS_STRICT else []), tricks.wrong_magic, tricks.half_an_answer, tricks.hang_up,
    tricks.error_with_a_wrong_length, tricks.error_elsewhere, tricks.unknown_chunk,
    tricks.huge_chunk, tricks.none_with_data, tricks.data_for_nothing,
    tricks.extents_for_nothing,
]  # fmt: skip
"""That end the connection."""

ERRORS: list[Trick] = [tricks.unknown_error, tricks.error_zero, tricks.error_with_a_text]
HANGING: list[Trick] = [
    tricks.silence, tricks.drip, tricks.endless_chunks, *([] if IS_STRICT else STRAY),
]  # fmt: skip
LATE: list[Trick] = [tricks.twice, tricks.longer]
"""Right, and followed by what ends the connection."""


def each(tricks: list[Trick], kinds: list[str]) -> Callable[..., None]:
    pairs = [(trick, kind) for trick in tricks for kind in kinds]
    names = [f"{trick.__name__}-{kind}" for trick, kind in pairs]
    return pytest.mark.parametrize(("trick", "kind"), pairs, ids=names)


@pytest.mark.guarantee("A hostile target costs its own mirror")
@pytest.mark.parametrize(
    ("kind", "moment"),
    [("write", "first copy"), ("write", "READY"), ("flush", "first copy"), ("zero", "first copy")],
)
def test_answers_to_a_mirror(server: Nbdmirror, target: Hostile, kind: str, moment: str) -> None:
    """The job ends with one error each time, and the log says what it was."""
    qmp = server.qmp
    server.allowed += [NO_WAY_OUT]
    for trick in GARBAGE + ERRORS:
        add(qmp, target)
        if moment == "READY":
            mirror(qmp)
            qmp.wait_ready()
        target.on_request[KINDS[kind]] = trick
        if moment != "READY":
            mirror(qmp)
        told = qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")
        assert is_one_line(told["error"]), trick
        qmp.wait_status("concluded")
        qmp.execute("job-dismiss", id="j")
        qmp.execute("blockdev-del", node_name="evil")
        errors = [e for e in qmp.events if e["event"] == "BLOCK_JOB_ERROR"]
        assert len(errors) == 1, trick
        target.behave()
        qmp.forget()
    check_log(server)


def check_log(server: Nbdmirror) -> None:
    """Of each loss the log has the reason, in lines that a terminal can be shown."""
    assert "Traceback" not in server.stderr and "error in the event loop" not in server.stderr
    for line in server.stderr.splitlines():
        assert is_one_line(line), line
    assert re.search(r"job j: (read|write) error \(report\)", server.stderr)


@each(HANGING, ["write", "flush", "zero"])
def test_an_answer_that_does_not_come(
    server: Nbdmirror, target: Hostile, trick: Trick, kind: str
) -> None:
    """Nothing tells it from one that is slow. A forced cancel gets through; the server is at other
    people's service all the while."""
    qmp = server.qmp
    server.allowed += [NO_WAY_OUT]
    add(qmp, target)
    mirror(qmp, speed=0)
    qmp.wait_ready()
    target.on_request[KINDS[kind]] = trick
    before = len(target.requests)
    if kind == "flush":
        qmp.execute("block-job-complete", device="j")
    wait_until(
        lambda: any(r.kind == KINDS[kind] for r in target.requests[before:]), f"a {kind}", 60
    )
    with Qmp(server.qmp_path) as other:
        for _ in range(5):
            began_s = time.monotonic()
            assert other.execute("query-block")
            assert time.monotonic() - began_s < 2.0
    began_s = time.monotonic()
    qmp.execute("block-job-cancel", device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")
    assert time.monotonic() - began_s < FORCE_S_MAX
    qmp.wait_status("concluded")


@each(LATE, ["write", "flush"])
def test_more_than_an_answer(
    server: Nbdmirror, target: Hostile, disk: Path, trick: Trick, kind: str
) -> None:
    """It is an error once it is seen; the mirror goes on over a new connection, where it may."""
    qmp = server.qmp
    server.allowed += [NO_WAY_OUT]
    target.after = 5
    target.on_request[KINDS[kind]] = trick
    add(qmp, target, reconnect_delay=20)
    mirror(qmp, on_target_error="ignore")
    if kind == "write" and (IS_STRICT or trick is not tricks.twice):
        wait_until(lambda: target.connections > 1, "a second connection")
    target.behave()
    qmp.wait_ready()
    qmp.execute("job-cancel", id="j")
    qmp.wait_status("concluded")


def end_after_a_reply_before_the_request(server: Nbdmirror, target: Hostile, cookie: int) -> bool:
    """Says whether the mirror has ended well."""
    target.at_start = struct.pack(">IIQ", SIMPLE_MAGIC, 0, cookie)
    server.allowed += [NO_WAY_OUT]
    add(server.qmp, target)
    mirror(server.qmp)
    if IS_STRICT:
        assert server.qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")["error"]
    else:
        server.qmp.wait_ready()
        server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_status("concluded")
    return not IS_STRICT


def test_a_reply_before_the_first_request(server: Nbdmirror, target: Hostile) -> None:
    """It may be taken for the answer before the target has all the data."""
    end_after_a_reply_before_the_request(server, target, 1)


def test_a_reply_to_nobody(start: Start, folder: Path, disk: Path, target: Hostile) -> None:
    server = start(Nbdmirror(folder, disk, bare=True))
    if end_after_a_reply_before_the_request(server, target, 1 << 40):
        assert_identical(disk, bytes(target.image))


def test_a_close_after_each_number_of_requests(
    server: Nbdmirror, target: Hostile, disk: Path
) -> None:
    """With a reconnect-delay the mirror gets through all the same."""
    server.allowed += [NO_WAY_OUT]
    add(server.qmp, target, reconnect_delay=60)
    target.on_request[WRITE] = target.on_request[ZERO] = tricks.hang_up
    target.after = 3  # of each connection
    mirror(server.qmp, on_target_error="ignore")
    wait_until(lambda: target.connections > 3, "some connections", 60)
    target.behave()
    server.qmp.wait_ready()
    server.qmp.execute("job-cancel", id="j")
    server.qmp.wait_status("concluded")


@pytest.mark.guarantee("A hostile target costs its own mirror")
def test_no_trick_leaves_anything_behind(server: Nbdmirror, target: Hostile) -> None:
    """Neither memory nor descriptors nor threads, however often."""
    qmp = server.qmp
    server.allowed += [NO_WAY_OUT]

    def round_() -> None:
        for trick in GARBAGE:
            target.on_request[WRITE] = trick
            qmp.start_mirror(target.uri)
            assert qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")["error"]
            qmp.wait_status("null")
            target.behave()
        for case in ("wrong magic", "-1 bytes", "nothing is told", "to another option"):
            for name, value in HANDSHAKES[case].items():
                setattr(target, name, value)
            target.on_option = dict(target.on_option)
            refused = {"device": "disk0", "target": target.uri, "mode": "existing", "sync": "full"}
            qmp.refusal("drive-mirror", **refused)
            target.behave()
        qmp.forget()

    for _ in range(3):
        round_()
    memory, threads, files = resources(server.pid)
    for _ in range(6):
        round_()
    assert resources(server.pid)[0] - memory < 8 * MiB
    # Python's collector closes some in its own time; 90 connections that leak would be 270.
    wait_until(lambda: resources(server.pid)[2] < files + 60, "descriptors are closed")
    wait_until(lambda: resources(server.pid)[1] <= threads + 2, "threads have ended")
