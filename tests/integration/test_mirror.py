"""The mirror job from end to end, over real QMP and real NBD, with targets that no one here wrote.

Every test names what must be identical at its end; the fixture compares it, byte by byte, after the
test, and fails a test that names nothing. `Guest` writes all the while and verifies what it reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clients import connected
from fixtures import Identical, Start
from guests import Guest
from images import KiB, MiB, allocated_bytes, make_empty, make_image, make_noise, make_qcow2
from processes import nbdmirror
from serverprocess import Server
from servers import NbdkitTarget, Nbdmirror, QemuNbd, QsdTarget
from waiting import wait_until

pytestmark = pytest.mark.usefixtures("identical")

SIZE = 12 * MiB
SLOW: dict[str, Any] = {"speed": 256 * KiB, "buf_size": 64 * KiB}
"""A job that does not get done before the test has seen it run; with a guest that dirties faster
it never would, as in QEMU."""

STARTED = ["created", "running", "return"]
READY = ["ready", "BLOCK_JOB_READY"]
ENDED_WELL = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
ENDED_CANCELLED = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


def qemu_nbd_raw(folder: Path, size: int) -> Server:
    return QemuNbd(folder, make_noise(folder / "target.img", size))


def qemu_nbd_qcow2(folder: Path, size: int) -> Server:
    return QemuNbd(folder, make_qcow2(folder / "target.qcow2", size), "qcow2")


def qemu_nbd_qcow2_2m(folder: Path, size: int) -> Server:
    image = make_qcow2(folder / "target.qcow2", size, "-o", "cluster_size=2M")
    return QemuNbd(folder, image, "qcow2")


def storage_daemon(folder: Path, size: int) -> Server:
    return QsdTarget(folder, make_noise(folder / "target.img", size))


def nbdkit_memory(folder: Path, size: int) -> Server:
    return NbdkitTarget(folder, "memory", str(size))


def nbdkit_file(folder: Path, size: int) -> Server:
    return NbdkitTarget(folder, "file", f"file={make_noise(folder / 'target.img', size)}")


def nbdkit_without_extras(folder: Path, size: int) -> Server:
    """No zero, no extents: what is missing is emulated or done without."""
    image = make_noise(folder / "target.img", size)
    filters = ("nozero", "noextents", "fua")
    return NbdkitTarget(folder, "file", f"file={image}", "fuamode=emulate", filters=filters)


def nbdkit_4096(folder: Path, size: int) -> Server:
    """Refuses whatever is not aligned to 4096."""
    policy = ("blocksize-minimum=4096", "blocksize-error-policy=error", "blocksize-maximum=1M")
    return NbdkitTarget(folder, "memory", str(size), *policy, filters=("blocksize-policy",))


def nbdmirror_itself(folder: Path, size: int) -> Server:
    return Nbdmirror(folder, make_noise(folder / "target.img", size))


TARGETS: dict[str, Callable[[Path, int], Server]] = {
    "qemu-nbd": qemu_nbd_raw,
    "qcow2": qemu_nbd_qcow2,
    "qcow2-2m": qemu_nbd_qcow2_2m,
    "qsd": storage_daemon,
    "memory": nbdkit_memory,
    "file": nbdkit_file,
    "plain": nbdkit_without_extras,
    "4096": nbdkit_4096,
    "nbdmirror": nbdmirror_itself,
}


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def target(start: Start, folder: Path) -> Server:
    """Of old noise, on an independent server."""
    return start(qemu_nbd_raw(folder, SIZE))


@pytest.fixture
def server(start: Start, disk: Path, target: Server) -> Nbdmirror:
    """Started after its target, so ended before it."""
    return start(Nbdmirror(disk.parent, disk, bare=True))


# The main job


@pytest.mark.parametrize("threads", ["1", ""])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_guest_is_moved_to_any_target(
    start: Start, identical: Identical, disk: Path, kind: str, threads: str
) -> None:
    """Three connections: open before the mirror, and used over the pivot and after it."""
    target = start(TARGETS[kind](disk.parent, SIZE))
    nbdkit = ("-t", threads) if threads else ()
    server = start(Nbdmirror(disk.parent, disk, bare=True, nbdkit=nbdkit))
    qmp = server.qmp
    with Guest(server.uri(), disk, connections=3) as guest:
        identical(guest, target.uri())
        guest.wait_for_requests(30)
        qmp.start_mirror(target.uri(), **SLOW)
        guest.wait_for_requests(30)
        qmp.execute("block-job-set-speed", device="j", speed=0)
        qmp.wait_ready()
        guest.wait_for_requests(60)
        qmp.complete()
        before = disk.read_bytes()
        guest.wait_for_requests(150)
    assert before == disk.read_bytes(), "the source was written after the pivot"
    assert guest.longest_s < 1.0, "the pivot is a pause that nobody notices"


def test_a_client_that_connects_after_the_pivot(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    server.qmp.complete()
    with Guest(server.uri(), disk, connections=2) as guest:
        identical(guest, target.uri())
        guest.wait_for_requests(50)
    identical(guest, server.uri())


def test_an_idle_guest_pivots_too(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    with connected(server.uri()) as guest:
        server.qmp.start_mirror(target.uri())
        server.qmp.wait_ready()
        server.qmp.complete()
        identical(disk.read_bytes(), target.uri())
        assert guest.pread(512, 0) == disk.read_bytes()[:512]


def test_heavy_writers_do_not_keep_the_pivot_away(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    """They dirty faster than any target can follow. (READY might never come then, as in QEMU: it is
    there before they begin. The ending must come all the same.)"""
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    with Guest(server.uri(), disk, connections=4, pause_s=0, length_max=300_000) as guest:
        identical(guest, target.uri())
        guest.wait_for_requests(300)
        server.qmp.complete()
        guest.wait_for_requests(100)
    assert guest.longest_s < 3.0


def test_with_the_command_line(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    control = ("--qmp", server.qmp_path)
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        assert nbdmirror("mirror", target.uri(), "--wait", "ready", *control).returncode == 0
        assert '"ready": true' in nbdmirror("status", "--json", *control).stdout
        guest.wait_for_requests(30)
        done = nbdmirror("complete", *control)
        assert done.returncode == 0, done.stderr
        guest.wait_for_requests(30)


def test_mirror_to_starts_by_itself(start: Start, identical: Identical, disk: Path) -> None:
    target = start(qemu_nbd_raw(disk.parent, SIZE))
    server = start(Nbdmirror(disk.parent, disk, options=("--mirror-to", target.uri())))
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        wait_until(
            lambda: [j for j in server.qmp.execute("query-block-jobs") if j["ready"]], "READY"
        )
        guest.wait_for_requests(30)
        server.qmp.complete("disk0")
        guest.wait_for_requests(30)


# The order of events, as QEMU has it


def test_events_of_a_plain_run(identical: Identical, server: Nbdmirror, target: Server) -> None:
    identical(Path(server.disks[0]), target.uri())
    qmp = server.qmp
    qmp.add_target("tgt", target)
    qmp.forget()
    qmp.start_mirror("tgt", **SLOW)
    running = qmp.job()
    assert running["status"] == "running" and running["type"] == "mirror"
    assert running["len"] == SIZE and running["offset"] < SIZE
    assert (running["ready"], running["paused"], running["busy"]) == (False, False, True)
    assert (running["io-status"], running["speed"]) == ("ok", SLOW["speed"])
    assert (running["auto-finalize"], running["auto-dismiss"]) == (True, True)
    qmp.execute("block-job-set-speed", device="j", speed=0)
    told = qmp.wait_ready()
    assert told == {"device": "j", "len": SIZE, "offset": SIZE, "speed": 0, "type": "mirror"}
    ready = qmp.job()
    assert (ready["status"], ready["ready"], ready["busy"]) == ("ready", True, False)
    assert qmp.execute("query-jobs") == [
        {
            "id": "j",
            "type": "mirror",
            "status": "ready",
            "current-progress": SIZE,
            "total-progress": SIZE,
        }
    ]
    assert qmp.complete() == told
    qmp.wait_status("null")
    assert qmp.execute("query-block-jobs") == []
    assert [step for step in qmp.steps("j") if step != "return"] == [
        *["created", "running"],
        *READY,
        *ENDED_WELL,
    ]
    steps = qmp.steps("j")
    assert steps[:3] == STARTED
    assert steps.index("waiting") - 1 == max(
        i for i, step in enumerate(steps[: steps.index("waiting")]) if step == "return"
    ), "the answer to complete goes first, then its events"


def test_events_without_automatic_finalize_and_dismiss(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        qmp.start_mirror(target.uri(), auto_finalize=False, auto_dismiss=False)
        qmp.wait_ready()
        qmp.forget()
        qmp.execute("block-job-complete", device="j")
        qmp.wait_for_event("BLOCK_JOB_PENDING")
        assert qmp.events[-1]["data"] == {"type": "mirror", "id": "j"}
        guest.wait_for_requests(50)  # written after PENDING, and still mirrored
        pending = qmp.job()
        assert (pending["status"], pending["ready"]) == ("pending", False)
        qmp.execute("block-job-finalize", id="j")
        assert qmp.job()["status"] == "concluded"
        assert "error" not in qmp.job()
        qmp.execute("block-job-dismiss", id="j")
        guest.wait_for_requests(50)
    assert qmp.execute("query-jobs") == []
    steps = qmp.steps("j")
    finalized = ["BLOCK_JOB_COMPLETED", "concluded", "return"]
    assert steps == [
        *["return", "waiting", "pending", "BLOCK_JOB_PENDING", "return"],
        *finalized,
        *["return", "return", "null", "return", "return"],
    ]


def test_cancel_in_pending_keeps_the_source(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, disk)
        qmp.start_mirror(target.uri(), auto_finalize=False, auto_dismiss=False)
        qmp.wait_ready()
        qmp.execute("block-job-complete", device="j")
        qmp.wait_for_event("BLOCK_JOB_PENDING")
        qmp.forget()
        qmp.execute("block-job-cancel", device="j")
        assert qmp.steps("j") == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "return"]
        assert qmp.job()["error"] == "Operation canceled"
        qmp.execute("job-dismiss", id="j")
        guest.wait_for_requests(50)


@pytest.mark.parametrize(
    "command", [("block-job-cancel", {}), ("block-job-cancel", {"force": True}), ("job-cancel", {})]
)
def test_cancel_before_ready(
    identical: Identical,
    server: Nbdmirror,
    target: Server,
    disk: Path,
    command: tuple[str, dict[str, Any]],
) -> None:
    """The target is undefined then; the source is what the guest has written."""
    verb, arguments = command
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, disk)
        identical(guest, server.uri())
        qmp.start_mirror(target.uri(), **SLOW)
        wait_until(lambda: qmp.job()["offset"] > 0, "it copies")
        qmp.forget()
        qmp.execute(verb, **{"id" if verb == "job-cancel" else "device": "j"}, **arguments)
        told = qmp.wait_for_event("BLOCK_JOB_CANCELLED")
        qmp.wait_status("null")
        assert set(told) == {"device", "len", "offset", "speed", "type"}
        assert qmp.steps("j") == ["return", *ENDED_CANCELLED]
        guest.wait_for_requests(50)


def test_soft_cancel_after_ready_leaves_a_copy(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    """It is a copy of a moment between the command and COMPLETED: the guest stands still then."""
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        qmp.start_mirror(target.uri())
        qmp.wait_ready()
        guest.wait_for_requests(100)
    identical(guest, target.uri())
    qmp.forget()
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()
    qmp.wait_status("null")
    assert qmp.steps("j") == ["return", *ENDED_WELL]
    with Guest(server.uri(), guest.model, seed=2) as later:
        identical(later, disk)
        later.wait_for_requests(50)


def test_soft_cancel_while_a_guest_writes_is_a_copy_of_one_moment(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    """The guest counts: each request sets one more block of the row to one. At any moment the row
    is a run of ones, and so must the copy be."""
    qmp = server.qmp
    block, rows = 64 * KiB, SIZE // (64 * KiB)
    with connected(server.uri()) as guest:
        guest.zero(SIZE, 0)
        qmp.start_mirror(target.uri())
        qmp.wait_ready()
        for number in range(rows):
            guest.pwrite(b"\1" * block, number * block)
            if number == rows // 2:
                qmp.execute("block-job-cancel", device="j")
        qmp.wait_completed()
    identical(server.uri(), disk)
    with connected(target.uri()) as copy:
        first = [bytes(copy.pread(block, n * block)) for n in range(rows)]
    count = sum(any(data) for data in first)
    assert count >= rows // 2, "what was answered before the command is in the copy"
    identical(b"\1" * block * count + bytes((rows - count) * block), target.uri())


@pytest.mark.parametrize("verb", ["block-job-cancel", "job-cancel"])
def test_force_cancel_after_ready(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path, verb: str
) -> None:
    qmp = server.qmp
    force: dict[str, Any] = {"id": "j"}
    if verb == "block-job-cancel":
        force = {"device": "j", "force": True}
    with Guest(server.uri(), disk) as guest:
        identical(guest, disk)
        qmp.start_mirror(target.uri(), auto_dismiss=False)
        qmp.wait_ready()
        qmp.forget()
        qmp.execute(verb, **force)
        qmp.wait_for_event("BLOCK_JOB_CANCELLED")
        qmp.wait_status("concluded")
        assert qmp.steps("j") == ["return", *ENDED_CANCELLED[:-1]]
        assert qmp.job()["error"] == "Operation canceled"
        qmp.execute("block-job-dismiss", id="j")
        guest.wait_for_requests(50)


def test_pause_and_resume_before_ready(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        qmp.start_mirror(target.uri(), speed=4 * MiB, buf_size=64 * KiB)
        wait_until(lambda: qmp.job()["offset"] > 0, "it copies")
        qmp.execute("block-job-pause", device="j")
        wait_until(lambda: qmp.job()["status"] == "paused", "it is paused")
        assert qmp.refusal("block-job-pause", device="j") == "Job is already paused"
        refused = qmp.refusal("block-job-complete", device="j")
        assert refused == "Job 'j' in state 'paused' cannot accept command verb 'complete'"
        offset = qmp.job()["offset"]
        guest.wait_for_requests(100)
        paused = qmp.job()
        assert paused["offset"] == offset, "a paused job lets nothing fly"
        assert (paused["paused"], paused["busy"]) == (True, False)
        qmp.execute("block-job-set-speed", device="j", speed=0)
        assert qmp.job()["offset"] == offset, "set-speed does not resume"
        qmp.execute("block-job-resume", device="j")
        qmp.wait_ready()
        assert qmp.refusal("block-job-resume", device="j").startswith("Can't resume a job")
        qmp.complete()
        guest.wait_for_requests(50)
    statuses = [step for step in qmp.steps("j") if step in ("running", "paused", "ready")]
    assert statuses == ["running", "paused", "running", "ready"]


def test_pause_after_ready_is_standby(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        qmp.start_mirror(target.uri())
        qmp.wait_ready()
        qmp.execute("job-pause", id="j")
        wait_until(lambda: qmp.job()["status"] == "standby", "it stands by")
        offset = qmp.job()["offset"]
        guest.wait_for_requests(100)
        standby = qmp.job()
        assert standby["offset"] == offset
        assert (standby["ready"], standby["paused"]) == (True, True)
        soft = qmp.refusal("block-job-cancel", device="j")
        assert soft == "The block job for device 'j' is currently paused"
        qmp.execute("job-resume", id="j")
        wait_until(lambda: qmp.job()["status"] == "ready", "it is ready again")
        qmp.complete()
        guest.wait_for_requests(50)
    assert qmp.steps("j").count("BLOCK_JOB_READY") == 1


def test_complete_in_standby_is_done_after_resume(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        qmp.start_mirror(target.uri())
        qmp.wait_ready()
        qmp.execute("block-job-pause", device="j")
        wait_until(lambda: qmp.job()["status"] == "standby", "it stands by")
        qmp.forget()
        qmp.execute("block-job-complete", device="j")
        guest.wait_for_requests(30)
        assert qmp.job()["status"] == "standby"
        qmp.execute("block-job-resume", device="j")
        qmp.wait_status("null")
        guest.wait_for_requests(30)
    assert qmp.steps("j") == ["return", "return", "ready", "return", *ENDED_WELL]


def test_force_cancel_of_a_paused_job(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    identical(server.uri(), disk)
    qmp = server.qmp
    qmp.start_mirror(target.uri(), **SLOW)
    qmp.execute("block-job-pause", device="j")
    wait_until(lambda: qmp.job()["status"] == "paused", "it is paused")
    qmp.forget()
    qmp.execute("job-cancel", id="j")
    qmp.wait_status("null")
    assert qmp.steps("j") == ["running", "return", *ENDED_CANCELLED]


def test_speed_is_kept_and_changed_at_once(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    identical(disk, target.uri())
    qmp = server.qmp
    began_s = time.monotonic()
    qmp.start_mirror(target.uri(), speed=2 * MiB, buf_size=64 * KiB)
    wait_until(lambda: qmp.job()["offset"] >= 1 * MiB, "the first MiB")
    took_s = time.monotonic() - began_s
    assert took_s > 0.25, "a MiB at 2 MiB/s takes half a second"
    offset, now_s = qmp.job()["offset"], time.monotonic() - began_s
    assert offset <= (now_s + 0.3) * 2 * MiB
    began_s = time.monotonic()
    qmp.execute("block-job-set-speed", device="j", speed=0)
    qmp.wait_ready()
    assert time.monotonic() - began_s < 2.5, "the rest of 11 MiB does not wait for the old speed"
    qmp.complete()


def test_complete_before_ready_is_refused_and_changes_nothing(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    identical(disk, target.uri())
    qmp.start_mirror(target.uri(), **SLOW)
    refused = qmp.refusal("block-job-complete", device="j")
    assert refused == "Job 'j' in state 'running' cannot accept command verb 'complete'"
    qmp.execute("block-job-set-speed", device="j", speed=0)
    qmp.wait_ready()
    assert qmp.job()["status"] == "ready", "the refused command is not remembered"
    qmp.complete()


# Again, back, and several


@pytest.mark.parametrize("way", ["blockdev-add", "drive-mirror"])
@pytest.mark.parametrize("connections", [1, 4])
def test_two_rounds_and_back(
    start: Start, identical: Identical, disk: Path, way: str, connections: int
) -> None:
    """A -> B -> C -> the image that B is on again; one guest all the while."""
    folder = disk.parent
    images = [make_noise(folder / name, SIZE, n) for n, name in enumerate(("b.img", "c.img"), 5)]
    targets = [start(QemuNbd(folder, image)) for image in images]
    server = start(Nbdmirror(folder, disk, bare=True))
    qmp = server.qmp
    with Guest(server.uri(), disk, connections=connections) as guest:
        identical(guest, targets[0].uri())
        for number, behind in enumerate((targets[0], targets[1], targets[0])):
            name = f"t{number}"
            if way == "blockdev-add":
                qmp.add_target(name, behind)
            qmp.start_mirror(name if way == "blockdev-add" else behind.uri(), job_id=f"j{number}")
            qmp.wait_ready(f"j{number}")
            guest.wait_for_requests(60)
            qmp.complete(f"j{number}")
            guest.wait_for_requests(60)
    identical(guest, server.uri())


def test_back_to_the_first_node(start: Start, identical: Identical, disk: Path) -> None:
    """The disk is on NBD from the start; A -> B, then B -> A, by the nodes' names."""
    folder = disk.parent
    first = start(QemuNbd(folder, disk))
    second = start(qemu_nbd_raw(folder, SIZE))
    server = start(Nbdmirror(folder, first.uri(), bare=True))
    qmp = server.qmp
    with Guest(server.uri(), disk, connections=2) as guest:
        identical(guest, first.uri())
        qmp.add_target("second", second)
        qmp.start_mirror("second")
        qmp.wait_ready()
        qmp.complete()
        qmp.wait_status("null")
        guest.wait_for_requests(60)
        assert "in use" in qmp.refusal("blockdev-del", node_name="second")
        qmp.add_target("first", first)
        qmp.start_mirror("first")
        qmp.wait_ready()
        guest.wait_for_requests(60)
        qmp.complete()
        qmp.wait_status("null")
        qmp.execute("blockdev-del", node_name="second")
        guest.wait_for_requests(60)


def test_no_way_back_to_a_file(
    server: Nbdmirror, identical: Identical, target: Server, disk: Path
) -> None:
    """A target is an NBD export (QEMU could mirror to the file); it says so, and nothing happens to
    the file."""
    qmp = server.qmp
    qmp.add_target("tgt", target)
    qmp.start_mirror("tgt")
    qmp.wait_ready()
    qmp.complete()
    before = disk.read_bytes()
    refusal = qmp.refusal("blockdev-mirror", job_id="j", device="tgt", target="disk0", sync="full")
    assert refusal == "Node 'disk0' is a file; a mirror's target is an NBD export"
    qmp.execute("blockdev-del", node_name="disk0")
    with Guest(server.uri(), target.uri()) as guest:
        guest.wait_for_requests(50)
        identical(guest, target.uri())
    assert disk.read_bytes() == before


def test_a_raw_node_stays_while_the_node_below_it_is_used(
    server: Nbdmirror, identical: Identical, target: Server, disk: Path
) -> None:
    """The lower one goes with it, so that neither can be taken away."""
    qmp = server.qmp

    def keeps_both() -> None:
        assert qmp.refusal("blockdev-del", node_name="upper") == "Node upper is in use"
        nodes = {info["node-name"] for info in qmp.execute("query-named-block-nodes")}
        assert nodes >= {"upper", "lower"}

    address = {"type": "unix", "path": str(target.socket)}
    lower = {"driver": "nbd", "node-name": "lower", "server": address}
    qmp.execute("blockdev-add", driver="raw", node_name="upper", file=lower)
    qmp.start_mirror("lower")
    keeps_both()
    qmp.wait_ready()
    qmp.complete()
    keeps_both()
    identical(disk, target.uri())


def test_a_raw_node_outlives_the_drive_mirror_whose_node_it_is_on(
    server: Nbdmirror, identical: Identical, target: Server, disk: Path
) -> None:
    qmp = server.qmp

    def descriptors() -> int:
        return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))

    before = descriptors()
    qmp.execute(
        "drive-mirror", device="disk0", target=target.uri(), sync="full", mode="existing",
        job_id="j", node_name="lower",
    )  # fmt: skip
    qmp.execute("blockdev-add", driver="raw", node_name="upper", file="lower")
    qmp.execute("block-job-cancel", device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")
    for _ in range(2):
        qmp.start_mirror("upper")
        qmp.wait_ready()
        qmp.execute("block-job-cancel", device="j")
        qmp.wait_completed()
    identical(disk, target.uri())
    qmp.execute("blockdev-del", node_name="upper")
    wait_until(lambda: descriptors() <= before, "its connections are closed")


def test_a_cancelled_mirror_can_be_done_again(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    qmp = server.qmp
    qmp.add_target("tgt", target)
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        for force in (True, True, False):
            qmp.start_mirror("tgt")
            qmp.wait_ready()
            guest.wait_for_requests(20)
            qmp.execute("block-job-cancel", device="j", force=force)
            qmp.wait_status("null")
        qmp.start_mirror("tgt")
        qmp.wait_ready()
        qmp.complete()
        guest.wait_for_requests(50)


def test_several_disks_at_once(start: Start, identical: Identical, folder: Path) -> None:
    sizes = (4 * MiB, 3 * MiB + 512, 1025 * KiB)
    disks = [make_image(folder / f"d{n}.img", size, n) for n, size in enumerate(sizes)]
    targets = [
        start(QemuNbd(folder, make_noise(folder / f"t{n}.img", size)))
        for n, size in enumerate(sizes)
    ]
    server = start(Nbdmirror(folder, *disks, bare=True))
    qmp = server.qmp
    guests = [Guest(server.uri(f"disk{n}"), disk, seed=n).start() for n, disk in enumerate(disks)]
    for guest, target in zip(guests, targets, strict=True):
        identical(guest, target.uri())
    for n, target in enumerate(targets):
        qmp.start_mirror(target.uri(), device=f"disk{n}", job_id=f"j{n}", **SLOW)
    assert [job["device"] for job in qmp.execute("query-block-jobs")] == ["j2", "j1", "j0"]
    for n in range(3):
        qmp.execute("block-job-set-speed", device=f"j{n}", speed=0)
    wait_until(lambda: all(job["ready"] for job in qmp.execute("query-block-jobs")), "all READY")
    for n in range(3):
        qmp.execute("block-job-complete", device=f"j{n}")
    wait_until(lambda: not qmp.execute("query-block-jobs"), "all are done")
    for guest in guests:
        guest.wait_for_requests(30)
    for guest in guests:
        guest.stop()


# Sizes, holes, granularity


@pytest.mark.parametrize("size", [0, 1, 512, 65535, MiB + 1, 1025 * KiB])
@pytest.mark.parametrize("kind", ["memory", "file", "plain"])
def test_odd_sizes(start: Start, identical: Identical, folder: Path, kind: str, size: int) -> None:
    disk = make_noise(folder / "disk.img", size, 4)
    target = start(TARGETS[kind](folder, size))
    server = start(Nbdmirror(folder, disk, bare=True))
    qmp = server.qmp
    expected = bytearray(disk.read_bytes())
    identical(expected, target.uri())
    qmp.start_mirror(target.uri())
    told = qmp.wait_ready()
    assert (told["len"], told["offset"]) == (size, size)
    with connected(server.uri()) as guest:
        for letter in (b"!", b"?"):  # the last byte, before the pivot and after it
            if size:
                expected[-1:] = letter
                guest.pwrite(letter, size - 1)
            guest.flush()
            if letter == b"!":
                qmp.complete()


@pytest.mark.parametrize("kind", ["qcow2", "qemu-nbd", "qsd"])
def test_sizes_of_whole_sectors(
    start: Start, identical: Identical, folder: Path, kind: str
) -> None:
    size = 1025 * KiB
    disk = make_image(folder / "disk.img", size, 4)
    target = start(TARGETS[kind](folder, size))
    server = start(Nbdmirror(folder, disk, bare=True))
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        server.qmp.start_mirror(target.uri())
        server.qmp.wait_ready()
        guest.wait_for_requests(50)
        server.qmp.complete()
        guest.wait_for_requests(50)


def test_an_empty_disk_is_ready_before_the_answer(
    start: Start, identical: Identical, folder: Path
) -> None:
    target = start(nbdkit_memory(folder, 0))
    server = start(Nbdmirror(folder, make_empty(folder / "disk.img", 0), bare=True))
    qmp = server.qmp
    identical(server.uri(), target.uri())
    qmp.add_target("tgt", target)
    qmp.forget()
    qmp.start_mirror("tgt")
    assert qmp.steps("j") == ["created", "running", *READY, "return"]
    assert qmp.complete()["len"] == 0


@pytest.mark.parametrize("kind", ["qemu-nbd", "file", "plain", "nbdmirror"])
@pytest.mark.parametrize("unmap", [True, False])
def test_old_data_does_not_shine_through_holes(
    start: Start, identical: Identical, folder: Path, kind: str, unmap: bool
) -> None:
    disk = make_empty(folder / "disk.img", SIZE)
    with disk.open("r+b") as file:
        for offset in (0, 3 * MiB + 7, SIZE - 700):
            file.seek(offset)
            file.write(b"data" * 175)
    target = start(TARGETS[kind](folder, SIZE))
    server = start(Nbdmirror(folder, disk, bare=True))
    identical(disk.read_bytes(), target.uri())
    server.qmp.start_mirror(target.uri(), unmap=unmap)
    server.qmp.wait_ready()
    server.qmp.complete()
    used = allocated_bytes(folder / "target.img")
    if not unmap:
        assert used >= SIZE, "without unmap the target keeps its space"
    elif kind != "plain":
        assert used < MiB, "holes are punched into the old data"


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_the_target_stays_sparse(
    start: Start, identical: Identical, folder: Path, kind: str
) -> None:
    """Holes in the source, and zeroes that are written out in it: neither is stored."""
    size = 64 * MiB
    disk = make_empty(folder / "disk.img", size)
    with disk.open("r+b") as file:
        file.seek(10 * MiB)
        file.write(b"d" * MiB)
        file.seek(20 * MiB)
        file.write(bytes(8 * MiB))
    image = folder / "target"
    make = make_empty if kind == "raw" else make_qcow2
    target = start(QemuNbd(folder, make(image, size), kind))
    server = start(Nbdmirror(folder, disk, bare=True))
    identical(disk, target.uri())
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    server.qmp.complete()
    assert allocated_bytes(image) < 2 * MiB


@pytest.mark.parametrize("granularity", [512, 4 * KiB, MiB, 64 * MiB])
def test_any_granularity(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path, granularity: int
) -> None:
    # Slow enough that there are moments without dirt, however much a write makes dirty.
    pause_s = 0.03 if granularity >= MiB else 0.001
    with Guest(server.uri(), disk, connections=2, pause_s=pause_s) as guest:
        identical(guest, target.uri())
        server.qmp.start_mirror(target.uri(), granularity=granularity)
        server.qmp.wait_ready()
        guest.wait_for_requests(30)
        server.qmp.complete()
        guest.wait_for_requests(30)


def test_a_small_buffer(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.uri())
        server.qmp.start_mirror(target.uri(), buf_size=1)
        server.qmp.wait_ready()
        server.qmp.complete()
        guest.wait_for_requests(60)


def test_sync_none_copies_only_what_is_written(
    identical: Identical, server: Nbdmirror, target: Server, disk: Path
) -> None:
    expected = bytearray((disk.parent / "target.img").read_bytes())
    identical(expected, target.uri())
    qmp = server.qmp
    qmp.add_target("tgt", target)
    qmp.forget()
    qmp.start_mirror("tgt", sync="none", granularity=4096)
    qmp.wait_ready()
    assert qmp.steps("j") == ["created", "running", "return", *READY]
    assert qmp.job()["len"] == 0
    data = b"new!" * 1024
    with connected(server.uri()) as guest:
        guest.pwrite(data, 5 * 4096)
    expected[5 * 4096 : 6 * 4096] = data
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()


def test_write_blocking_to_a_target_of_large_blocks(
    start: Start, folder: Path, identical: Identical
) -> None:
    """Guests write at odd places, and the target refuses all but whole blocks of 4 KiB."""
    disk = make_image(folder / "disk.img", SIZE)
    image = make_noise(folder / "target.img", SIZE)
    policy = ("blocksize-minimum=4096", "blocksize-error-policy=error")
    target = start(
        NbdkitTarget(folder, "file", f"file={image}", *policy, filters=("blocksize-policy",))
    )
    server = start(Nbdmirror(folder, disk, bare=True))
    with Guest(server.uri(), disk, connections=2) as guest:
        identical(guest, server.uri())
        server.qmp.start_mirror(target.uri(), copy_mode="write-blocking")
        server.qmp.wait_ready()
        guest.wait_for_requests(100)
        server.qmp.complete()
        guest.wait_for_requests(100)
    assert not [e for e in server.qmp.events if e["event"] == "BLOCK_JOB_ERROR"]


def test_an_export_that_another_disk_is_mirrored_to_is_no_target(
    start: Start, folder: Path, identical: Identical
) -> None:
    """Neither while that goes on nor after its pivot, by whatever name."""
    disks = [make_image(folder / f"disk{n}.img", SIZE, n) for n in range(2)]
    target = start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))
    server = start(Nbdmirror(folder, *disks, bare=True))
    qmp = server.qmp
    identical(disks[0], server.uri("disk0"))
    qmp.add_target("t", target)
    qmp.add_target("again", target)
    second = {"device": "disk1", "sync": "full"}
    qmp.start_mirror("t")
    qmp.wait_ready()
    for _ in range(2):
        text = qmp.refusal("drive-mirror", target=target.uri(), mode="existing", **second)
        assert "is in use" in text
        assert "is the same export" in qmp.refusal("blockdev-mirror", target="again", **second)
        if qmp.execute("query-jobs"):
            qmp.complete()
