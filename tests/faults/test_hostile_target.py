"""Targets, sources and disks after a pivot whose server does what no real one does.

Each costs its job, or its blockdev-add, one clear error, and never the server: the disk's guest
goes on, other jobs go on, memory and descriptors stay flat, and a forced cancel takes less than a
second."""

from __future__ import annotations

import contextlib
import random
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest
import tricks
from clients import connected, nbd_errno
from fixtures import Identical, Start
from guests import Guest
from hostile import (
    ACK,
    FLAGS,
    FLUSH,
    GO,
    MAGIC,
    MULTI_CONN,
    READ,
    REP_INFO,
    REP_META,
    SET_META,
    SIMPLE_MAGIC,
    STATUS,
    TRIM,
    WRITE,
    ZERO,
    Hostile,
    OptionTrick,
    Talk,
    Trick,
    option_reply,
)
from images import KiB, MiB, assert_identical, make_empty, make_image, make_noise
from processes import nbdmirror, run
from qmpclient import Qmp, Refused
from servers import Nbdmirror, QemuNbd
from waiting import wait_until

SEED = random.SystemRandom().randrange(1000)
SIZE = 2 * MiB
OPEN_S = 2
"""open-timeout: a handshake that does not end is given up then."""

SLACK_S = 6.0
FORCE_S_MAX = 3.0
"""Of a forced cancel, which takes 0.3 s: this machine may be busy."""

NO_WAY_OUT = r"connection broken|not flushed|lost: |connection lost|does not answer|write error"


@pytest.fixture
def disk(folder: Path) -> Path:
    sys.stdout.write(f"seed {SEED}\n")
    return make_image(folder / "disk.img", SIZE, SEED)


@pytest.fixture(autouse=True)
def hostiles() -> Iterator[Callable[[Path, bytes], Hostile]]:
    """Makes them. They end after the servers under test, since this fixture comes first."""
    with contextlib.ExitStack() as stack:
        yield lambda folder, image: stack.enter_context(Hostile(folder, image))


@pytest.fixture
def target(folder: Path, hostiles: Callable[[Path, bytes], Hostile]) -> Hostile:
    return hostiles(folder, random.Random(SEED).randbytes(SIZE))


@pytest.fixture
def server(start: Start, folder: Path, disk: Path) -> Iterator[Nbdmirror]:
    """With a guest that notices nothing, and a mirror of another disk to a good target, which ends
    well after all."""
    other = make_image(folder / "other.img", SIZE, SEED + 1)
    image = make_noise(folder / "good.img", SIZE, SEED + 2)
    good = start(QemuNbd(folder, image))
    server = start(Nbdmirror(folder, disk, other, bare=True))
    server.allowed = ["the source has"]
    server.qmp.start_mirror(good.uri(), device="disk1", job_id="bystander")
    server.qmp.wait_ready("bystander")
    with Guest(server.uri("disk0"), disk, seed=SEED) as guest:
        guest.wait_for_requests(20)
        yield server
        guest.wait_for_requests(50)
        assert guest.longest_s < 5.0
    assert_identical(guest.model, disk)
    if server.process is not None:
        with Qmp(server.qmp_path) as qmp:
            qmp.complete("bystander")
        assert_identical(other, image)


def add(qmp: Qmp, target: Hostile, **options: object) -> None:
    address = {"type": "unix", "path": str(target.socket)}
    qmp.execute(
        "blockdev-add", driver="nbd", node_name="evil", server=address, open_timeout=OPEN_S,
        **options,
    )  # fmt: skip


def mirror(qmp: Qmp, **options: object) -> None:
    qmp.start_mirror("evil", **({"auto_dismiss": False} | options))


def refusal(qmp: Qmp, command: str, **arguments: object) -> str:
    """The error's text, or "" if there is none."""
    try:
        qmp.execute(command, **arguments)
    except Refused as error:
        return str(error)
    return ""


def is_one_line(text: str) -> bool:
    return bool(text) and text.isprintable() and len(text) < 1000


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


# The handshake


def replies(*answers: bytes) -> OptionTrick:
    return lambda talk, option: b"".join(answers)


def flood(data: bytes) -> OptionTrick:
    def trick(talk: Talk, option: int) -> bytes:
        talk.flood(data)
        raise AssertionError

    return trick


def dripping(talk: Talk, option: int) -> bytes:
    talk.drip(option_reply(option, ACK) * 100)
    raise AssertionError


def silent(talk: Talk, option: int) -> bytes:
    talk.silence()
    raise AssertionError


INFO_REPLY = option_reply(GO, REP_INFO, struct.pack(">HQH", 0, SIZE, FLAGS))
META_REPLY = option_reply(SET_META, REP_META, struct.pack(">I", 1) + b"base:allocation")
EVIL_TEXT = b"evil \x1b[31m\r\n\n" + b"x" * 4000

HANDSHAKES: dict[str, dict[str, object]] = {
    "wrong magic": {"greeting": b"X" * 18},
    "wrong option magic": {"greeting": struct.pack(">QQH", MAGIC, 1, 3)},
    "megabytes": {"greeting": bytes(18) + b"Z" * (16 << 20)},
    "endless replies": {"on_option": {GO: flood(INFO_REPLY)}},
    "endless contexts": {"on_option": {SET_META: flood(META_REPLY)}},
    "a byte now and then": {"on_option": {GO: dripping}},
    "silence": {"on_option": {GO: silent}},
    "4 GiB are to follow": {
        "on_option": {GO: replies(option_reply(GO, REP_INFO, length=2**32 - 1))}
    },
    "to another option": {"on_option": {GO: replies(option_reply(99, ACK))}},
    "of an unknown type": {"on_option": {GO: replies(option_reply(GO, 77))}},
    "an error with a text": {"on_option": {GO: replies(option_reply(GO, 0x80000006, EVIL_TEXT))}},
    "an unknown error": {"on_option": {GO: replies(option_reply(GO, 0x80000FFF, EVIL_TEXT))}},
    "nothing is told": {"on_option": {GO: replies(option_reply(GO, ACK))}},
    "no flags": {"flags": 0},
    "2**63 bytes": {"size": 1 << 63},
    "2**63 + 1 bytes": {"size": (1 << 63) + 1},
    "-1 bytes": {"size": (1 << 64) - 1},
}


def test_handshakes_that_go_wrong(server: Nbdmirror, target: Hostile) -> None:
    """One error each, in time. Nothing is left behind, and it goes as it should when that is
    over."""
    qmp, address = server.qmp, {"type": "unix", "path": str(target.socket)}
    for case, settings in HANDSHAKES.items():
        for name, value in settings.items():
            setattr(target, name, value)
        began_s = time.monotonic()
        text = refusal(
            qmp, "blockdev-add", driver="nbd", node_name="evil", server=address, open_timeout=OPEN_S
        )
        assert time.monotonic() - began_s < OPEN_S + SLACK_S, case
        assert is_one_line(text) and target.uri in text, (case, text)
        nodes = [node["node-name"] for node in qmp.execute("query-named-block-nodes")]
        assert "evil" not in nodes, case
        target.behave()
        add(qmp, target)
        qmp.execute("blockdev-del", node_name="evil")


@pytest.mark.parametrize(
    "case",
    {
        "2**63 - 1 bytes": {"size": (1 << 63) - 1},
        "no bytes": {"size": 0},
        "one byte less": {"size": SIZE - 1},
        "read-only": {"flags": FLAGS | 2},
        "no flush": {"flags": 1},
    }.items(),
    ids=lambda case: case[0],
)
def test_an_announcement_that_a_mirror_cannot_use(
    server: Nbdmirror, target: Hostile, case: tuple[str, dict[str, int]]
) -> None:
    for name, value in case[1].items():
        setattr(target, name, value)
    done = nbdmirror("mirror", target.uri, "--device", "disk0", "--qmp", server.qmp_path)
    said = done.stderr.strip()
    assert done.returncode == 1 and is_one_line(said), said
    assert [job["id"] for job in server.qmp.execute("query-jobs")] == ["bystander"]


@pytest.mark.parametrize(
    "sizes",
    [(4096, 4096, 512), (1000, 4096, 1 << 20), (0, 0, 0), (1 << 31, 1 << 31, 1 << 31),
     (1, 3000, 1 << 20), (1, (1 << 32) - 1, (1 << 32) - 1), (1, 1, 1)],
)  # fmt: skip
def test_block_sizes_that_make_no_sense(
    server: Nbdmirror, target: Hostile, sizes: tuple[int, int, int]
) -> None:
    """libnbd takes none of them for true; the mirror works, or is refused."""
    target.block_sizes = sizes
    add(server.qmp, target)
    mirror(server.qmp)
    server.qmp.wait_ready()
    server.qmp.execute("job-cancel", id="j")
    server.qmp.wait_status("concluded")
    server.qmp.execute("job-dismiss", id="j")


def test_the_smallest_largest_request(server: Nbdmirror, target: Hostile, disk: Path) -> None:
    target.block_sizes = (512, 512, 512)
    add(server.qmp, target)
    mirror(server.qmp, copy_mode="write-blocking")
    # As much as there is: the guest may write more than goes over in such requests, and then the
    # job is never ready.
    wait_until(lambda: server.qmp.job()["offset"] >= SIZE, "the disk's size was copied")
    server.qmp.execute("job-cancel", id="j")
    server.qmp.wait_status("concluded")


def test_a_close_at_each_moment_of_the_handshake(server: Nbdmirror, target: Hostile) -> None:
    """After each byte that a good server sends: an error each, and nothing is left."""
    address = {"type": "unix", "path": str(target.socket)}
    options = {"driver": "nbd", "node_name": "evil", "server": address, "open_timeout": OPEN_S}
    length, is_through = 0, False
    while not is_through:
        target.close_after = length
        text = refusal(server.qmp, "blockdev-add", **options)
        is_through = not text
        assert is_through or (is_one_line(text) and target.uri in text)
        length += 1
    assert length > 60
    assert descriptors(server) < 200


# Requests of a mirror

GARBAGE: list[Trick] = [
    tricks.wrong_handle, tricks.wrong_magic, tricks.half_an_answer, tricks.hang_up,
    tricks.error_with_a_wrong_length, tricks.error_elsewhere, tricks.unknown_chunk,
    tricks.huge_chunk, tricks.none_with_data, tricks.data_for_nothing,
    tricks.extents_for_nothing,
]  # fmt: skip
"""That end the connection."""

ERRORS: list[Trick] = [tricks.unknown_error, tricks.error_zero, tricks.error_with_a_text]
HANGING: list[Trick] = [tricks.silence, tricks.drip, tricks.endless_chunks]
LATE: list[Trick] = [tricks.twice, tricks.longer]
"""Right, and followed by what ends the connection."""

KINDS = {"write": WRITE, "zero": ZERO, "flush": FLUSH}


def each(tricks: list[Trick], kinds: list[str]) -> Callable[..., None]:
    pairs = [(trick, kind) for trick in tricks for kind in kinds]
    names = [f"{trick.__name__}-{kind}" for trick, kind in pairs]
    return pytest.mark.parametrize(("trick", "kind"), pairs, ids=names)


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
    wait_until(lambda: target.connections > 1 or kind == "flush", "a second connection")
    target.behave()
    qmp.wait_ready()
    qmp.execute("job-cancel", id="j")
    qmp.wait_status("concluded")


def test_a_reply_before_the_request(server: Nbdmirror, target: Hostile) -> None:
    target.at_start = struct.pack(">IIQ", SIMPLE_MAGIC, 0, 1)
    server.allowed += [NO_WAY_OUT]
    add(server.qmp, target)
    mirror(server.qmp)
    assert server.qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")["error"]
    server.qmp.wait_status("concluded")


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
    memory, files, threads = resident(server), descriptors(server), thread_count(server)
    for _ in range(6):
        round_()
    assert resident(server) - memory < 8 * MiB
    # Python's collector closes some in its own time; 90 connections that leak would be 270.
    wait_until(lambda: descriptors(server) < files + 60, "descriptors are closed")
    wait_until(lambda: thread_count(server) <= threads + 2, "threads have ended")


def resident(server: Nbdmirror) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * KiB


def descriptors(server: Nbdmirror) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


def thread_count(server: Nbdmirror) -> int:
    return len(list(Path(f"/proc/{server.pid}/task").iterdir()))


# A disk that is served from such a server

BAD_READS: list[Trick] = [
    tricks.data_too_long, tricks.data_beyond, tricks.data_before, tricks.hole_beyond,
    tricks.hole_of_a_wrong_length, tricks.short_data,
]  # fmt: skip
NONSENSE: list[Trick] = [
    tricks.extent_of_nothing, tricks.extents_beyond, tricks.unasked_context, tricks.no_status,
    tricks.strange_flags, tricks.unknown_error, tricks.error_with_a_text,
]  # fmt: skip
"""About extents: taken for data."""
LIES: list[Trick] = [tricks.extents_by_thousands, tricks.extent_too_long]
"""Well-formed, and so believed: of a lie about zeroes zeroes come."""
BREAKING: list[Trick] = [
    tricks.no_extents, tricks.extents_of_a_wrong_length, tricks.wrong_handle,
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
        for trick in [*GARBAGE[:9], *ERRORS, *BAD_READS]:
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
def test_data_that_was_left_out_reads_as_zeroes(
    start: Start, folder: Path, source: Hostile, trick: Trick
) -> None:
    """And not as what was in our memory: another disk's data, say."""
    server = start(Nbdmirror(folder, source.uri, bare=True))
    server.allowed = [NO_WAY_OUT, "error"]
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
