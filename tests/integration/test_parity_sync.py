"""What the peer cannot be asked: the modes that qemu-storage-daemon refuses, sizes that it rounds,
whole clusters on the first touch, load in write-blocking mode, and endings that are bounded.

Where something can be compared all the same (write-blocking under load), it is.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest
from clients import connected
from fixtures import Identical, Start
from guests import Guest
from images import KiB, MiB, assert_identical, make_image, make_noise, make_qcow2
from parity import assert_alike
from paritydifferences import PROGRESS
from paritysides import Setting, Side
from paritysteps import call, do, ready, status
from paritysteps import start as start_of_job
from processes import free_port, run
from qmpclient import Qmp
from servers import Nbdmirror, QemuNbd
from waiting import wait_until

SIZE = MiB


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def target(start: Start, folder: Path) -> QemuNbd:
    return start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))


@pytest.fixture
def server(start: Start, disk: Path, target: QemuNbd) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, f"src={disk}", bare=True))


@pytest.fixture
def qmp(server: Nbdmirror, target: QemuNbd) -> Qmp:
    server.qmp.add_target("tgt", target)
    return server.qmp


def add_bitmap(qmp: Qmp, name: str = "b", **options: Any) -> None:
    qmp.execute("block-dirty-bitmap-add", node="src", name=name, **options)


def marks(qmp: Qmp, name: str = "b") -> dict[str, Any]:
    """The bitmap as query-named-block-nodes has it."""
    nodes = qmp.execute("query-named-block-nodes")
    (node,) = [node for node in nodes if node["node-name"] == "src"]
    (found,) = [bitmap for bitmap in node["dirty-bitmaps"] if bitmap.get("name") == name]
    return dict(found)


def wait_in_sync(qmp: Qmp) -> None:
    def is_so() -> bool:
        jobs = qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
        return not any(job["dirty-bytes"] + job["in-flight-bytes"] for job in jobs)

    wait_until(is_so, "all is in sync")


def soft_cancel(qmp: Qmp) -> None:
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()


# sync=incremental and sync=bitmap


@pytest.mark.parametrize(
    ("sync", "mode"),
    [("incremental", None), ("incremental", "on-success"), ("bitmap", None), ("bitmap", "never")],
)
def test_only_what_a_bitmap_has_is_copied(
    identical: Identical,
    server: Nbdmirror,
    qmp: Qmp,
    disk: Path,
    target: QemuNbd,
    sync: str,
    mode: str | None,
) -> None:
    """A full copy, a bitmap from then on, and an increment: the target is a copy again."""
    qmp.start_mirror("tgt", device="src")
    qmp.wait_ready()
    add_bitmap(qmp, granularity=4096)
    soft_cancel(qmp)
    before = target.image.read_bytes()
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x11" * 5000, 3000)
        guest.zero(70_000, 300_000)
        guest.pwrite(b"\x22", SIZE - 1)
        assert target.image.read_bytes() == before
        options = {"bitmap_mode": mode} if mode else {}
        qmp.start_mirror("tgt", device="src", sync=sync, bitmap="b", speed=1, **options)
        qmp.refusal("block-dirty-bitmap-clear", node="src", name="b")
        qmp.execute("block-job-set-speed", device="j", speed=0)
        length = qmp.wait_ready()["len"]
        assert length == 8192 + 73728 + 4096, "by the bitmap's granularity"
        guest.pwrite(b"\x33" * 4096, 500_000)  # after READY: the mirror takes it along
        soft_cancel(qmp)
    identical(disk, target.image)
    add_bitmap(qmp, "other")  # the first is idle again
    qmp.execute("block-dirty-bitmap-merge", node="src", target="other", bitmaps=["b"])


@pytest.mark.parametrize("ending", ["soft cancel", "complete", "force cancel", "never", "error"])
def test_the_bitmap_is_cleared_on_success_alone(
    server: Nbdmirror, qmp: Qmp, disk: Path, target: QemuNbd, ending: str
) -> None:
    add_bitmap(qmp)
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x11" * 4096, 70_000)
        mode = {"bitmap_mode": "never"} if ending == "never" else {}
        qmp.start_mirror("tgt", device="src", sync="bitmap", bitmap="b", **mode)
        qmp.wait_ready()
        found = marks(qmp)
        assert (found["count"], found["busy"]) == (65536, True)
        if ending == "error":
            target.process.kill()  # type: ignore[union-attr]
            target.process.wait(5)  # type: ignore[union-attr]
            target.process = None
            guest.pwrite(b"\x12" * 4096, 200_000)
            assert "error" in qmp.wait_for_event("BLOCK_JOB_COMPLETED")
        elif ending == "force cancel":
            qmp.execute("block-job-cancel", device="j", force=True)
            qmp.wait_for_event("BLOCK_JOB_CANCELLED")
        elif ending == "complete":
            qmp.complete()
        else:
            soft_cancel(qmp)
    if ending == "complete":
        return  # the bitmap stays with the old node, as in QEMU: nothing to look at
    found = marks(qmp)
    expected = {"never": 65536, "force cancel": 65536, "error": 131072}.get(ending, 0)
    assert (found["count"], found["busy"], found["recording"]) == (expected, False, True)


def test_what_is_written_after_the_bitmap_job_began_is_in_the_bitmap(
    server: Nbdmirror, qmp: Qmp
) -> None:
    """Cleared is what was copied: a write that came after the last copy is not lost with it."""
    add_bitmap(qmp)
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x11" * 4096, 0)
        qmp.start_mirror("tgt", device="src", sync="bitmap", bitmap="b")
        qmp.wait_ready()
        soft_cancel(qmp)
        guest.pwrite(b"\x22" * 4096, 500_000)
    assert marks(qmp)["count"] == 65536


BITMAP_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"sync": "incremental"}, "must provide a valid bitmap name for 'incremental' sync mode"),
    ({"sync": "bitmap"}, "must provide a valid bitmap name for 'bitmap' sync mode"),
    ({"sync": "bitmap", "bitmap": "nob"}, "Bitmap 'nob' could not be found"),
    (
        {"sync": "incremental", "bitmap": "b", "bitmap_mode": "never"},
        "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
    ),
    (
        {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "always"},
        "Bitmap Sync Mode 'always' is not supported by Mirror",
    ),
    ({"sync": "full", "bitmap": "b"}, "sync mode 'full' is not compatible with bitmaps"),
    ({"sync": "none", "bitmap": "b"}, "sync mode 'none' is not compatible with bitmaps"),
    (
        {"sync": "full", "bitmap_mode": "never"},
        "Cannot specify bitmap sync mode without a bitmap",
    ),
    (
        {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "bogus"},
        "Parameter 'bitmap-mode' does not accept value 'bogus'",
    ),
    ({"sync": "bitmap", "bitmap": 1}, "Invalid parameter type for 'bitmap', expected: string"),
]


def test_errors_of_bitmap_arguments(qmp: Qmp) -> None:
    """blockdev-backup's texts, and those of the bitmap patch for mirror, which Proxmox carries."""
    add_bitmap(qmp)
    for options, text in BITMAP_ERRORS:
        arguments = {"job_id": "j", "device": "src", "target": "tgt", **options}
        assert qmp.refusal("blockdev-mirror", **arguments) == text, options
    assert qmp.execute("query-jobs") == []


def test_a_busy_bitmap_is_left_alone(qmp: Qmp, start: Start, folder: Path) -> None:
    add_bitmap(qmp)
    add_bitmap(qmp, "c")
    qmp.start_mirror("tgt", device="src", sync="bitmap", bitmap="b")
    busy = "Bitmap 'b' is currently in use by another operation and cannot be used"
    for verb in ("remove", "clear", "enable", "disable"):
        assert qmp.refusal(f"block-dirty-bitmap-{verb}", node="src", name="b") == busy
    for into, source in (("b", "c"), ("c", "b")):
        assert (
            qmp.refusal("block-dirty-bitmap-merge", node="src", target=into, bitmaps=[source])
            == busy
        )
    action = {"type": "block-dirty-bitmap-clear", "data": {"node": "src", "name": "b"}}
    assert qmp.refusal("transaction", actions=[action]) == busy
    qmp.execute("job-cancel", id="j")
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    qmp.execute("block-dirty-bitmap-remove", node="src", name="b")


def test_an_increment_while_a_guest_writes(
    identical: Identical, server: Nbdmirror, qmp: Qmp, disk: Path, target: QemuNbd
) -> None:
    """full, then increments under load: each soft cancel leaves a copy of one moment, and the last
    one of the end."""
    with Guest(server.uri("src"), disk, connections=2, pause_s=0.002, length_max=9000) as guest:
        qmp.start_mirror("tgt", device="src")
        qmp.wait_ready()
        add_bitmap(qmp, granularity=4096)
        soft_cancel(qmp)
        for _ in range(3):
            guest.wait_for_requests(20)
            qmp.start_mirror("tgt", device="src", sync="incremental", bitmap="b")
            qmp.wait_ready()
            guest.wait_for_requests(10)
            soft_cancel(qmp)
    qmp.start_mirror("tgt", device="src", sync="incremental", bitmap="b")
    qmp.wait_ready()
    soft_cancel(qmp)
    identical(guest, target.image)


# Transactions of jobs: an extension


def test_jobs_in_a_transaction(start: Start, folder: Path) -> None:
    """All begin, or none; all complete, or none."""
    disks = [make_image(folder / f"d{n}", SIZE, n) for n in range(2)]
    targets = [start(QemuNbd(folder, make_noise(folder / f"t{n}", SIZE))) for n in range(2)]
    names = [f"d{n}={disk}" for n, disk in enumerate(disks)]
    qmp = start(Nbdmirror(folder, *names, bare=True)).qmp
    for n, target in enumerate(targets):
        qmp.add_target(f"t{n}", target)

    def begin(*pairs: tuple[int, int]) -> list[dict[str, Any]]:
        return [
            {
                "type": "blockdev-mirror",
                "data": {"job-id": f"j{d}", "device": f"d{d}", "target": f"t{t}", "sync": "full"},
            }
            for d, t in pairs
        ]

    def complete(*ids: str) -> list[dict[str, Any]]:
        return [{"type": "block-job-complete", "data": {"device": name}} for name in ids]

    qmp.forget()
    assert "t9" in qmp.refusal("transaction", actions=begin((0, 0), (1, 9)))
    qmp.refusal("transaction", actions=begin((0, 0), (1, 0)))  # a target for one only
    assert qmp.steps("j0") == ["created", "aborting", "concluded", "null"]
    qmp.forget()
    qmp.execute("transaction", actions=begin((0, 0), (1, 1)))
    statuses = [(e["data"]["id"], e["data"]["status"]) for e in qmp.events if "id" in e["data"]]
    assert statuses[:4] == [
        ("j0", "created"), ("j1", "created"), ("j0", "running"), ("j1", "running")
    ]  # fmt: skip
    for job in ("j0", "j1"):
        wait_until(lambda job=job: qmp.job(job)["ready"], "READY")
    assert qmp.refusal("transaction", actions=complete("j0", "nope"))
    assert qmp.job("j0")["ready"]
    qmp.execute("transaction", actions=complete("j0", "j1"))
    wait_until(lambda: not qmp.execute("query-jobs"), "both have ended")
    for disk, target in zip(disks, targets, strict=True):
        assert_identical(disk, target.image)


# Sizes that the peer rounds


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("size", [1, 511, 513, MiB + 1, 1025 * KiB + 1])
def test_one_odd_byte_over(
    start: Start, identical: Identical, folder: Path, size: int, copy_mode: str
) -> None:
    """QEMU would round up to sectors and grow the target; here sizes are bytes. (The target is
    nbdmirror itself, since qemu-nbd rounds too.)"""
    disk = make_image(folder / "disk.img", size)
    target = start(Nbdmirror(folder, make_noise(folder / "target.img", size), bare=True))
    target.allowed = ["Connection reset by peer"]  # its client ends first, perhaps half-connected
    server = start(Nbdmirror(folder, f"src={disk}", bare=True))
    qmp = server.qmp
    qmp.start_mirror(target.uri(), device="src", copy_mode=copy_mode)
    assert qmp.wait_ready()["len"] == size
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x66", size - 1)
        if size > 1000:
            guest.zero(600, size - 600)
            guest.pwrite(b"\x67" * 3, size - 3)
        before = qmp.complete()
        assert before["offset"] == before["len"]
        identical(disk.read_bytes(), folder / "target.img")
        assert bytes(guest.pread(1, size - 1)) == (b"\x67" if size > 1000 else b"\x66")
    assert (folder / "target.img").stat().st_size == size


# Whole clusters on the first touch (rule 24)

CLUSTER = 64 * KiB


@pytest.fixture
def overlay(folder: Path) -> tuple[Path, Path]:
    """A base of noise, and an overlay with parts of clusters written."""
    base = make_noise(folder / "base.img", SIZE, 5)
    overlay = make_qcow2(folder / "overlay.qcow2", SIZE, "-b", str(base), "-F", "raw")
    for offset, length in ((1000, 600), (200_000, 100), (400_000, 70_000), (SIZE - 512, 512)):
        pattern = f"write -P {offset % 250 + 1} {offset} {length}"
        run("qemu-io", "-f", "qcow2", "-c", pattern, overlay)
    return base, overlay


def backed_target(folder: Path, base: Path) -> tuple[Path, Path]:
    """A qcow2 file that believes in another backing file: of the same size, full of other data."""
    wrong = make_noise(folder / "wrong.img", SIZE, 77)
    target = make_qcow2(folder / "target.qcow2", SIZE, "-b", str(base), "-F", "raw")
    run("qemu-img", "rebase", "-u", "-b", wrong, "-F", "raw", target)
    return target, wrong


def rebased(folder: Path, target: Path, base: Path) -> bytes:
    run("qemu-img", "rebase", "-u", "-b", base, "-F", "raw", target)
    flat = folder / "flat.img"
    run("qemu-img", "convert", "-O", "raw", target, flat)
    return flat.read_bytes()


SMALL: dict[str, Any] = {"granularity": 512, "x_nbdmirror_target_cluster_size": CLUSTER}


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("buf_size", [0, 512])
@pytest.mark.parametrize("sync", ["top", "none"])
def test_the_first_touch_carries_a_whole_cluster(
    folder: Path, overlay: tuple[Path, Path], sync: str, copy_mode: str, buf_size: int
) -> None:
    """Rebased to the right backing file, the target is the source: nothing of the wrong one was
    pulled in. With sync=none, what was written before is laid under it afterwards."""
    base, source_image = overlay
    image, _ = backed_target(folder, base)
    source = QemuNbd(folder, source_image, "qcow2", options=("-A",))
    target = QemuNbd(folder, image, "qcow2")
    if sync == "none":  # then the target's right backing is what the source was
        run("qemu-img", "convert", "-O", "raw", source_image, folder / "was.img")
        base = folder / "was.img"
    with source, target, Nbdmirror(folder, f"src={source.uri()}", bare=True) as server:
        qmp = server.qmp
        options = {"copy_mode": copy_mode, "buf_size": buf_size, **SMALL}
        qmp.start_mirror(target.uri(), device="src", sync=sync, **options)
        qmp.wait_ready()
        with connected(server.uri("src")) as guest:
            noise = random.Random(3)
            for _ in range(30):
                length = noise.choice((1, 100, 512, 5000, 65536, 70_000))
                offset = noise.randrange(SIZE - length)
                if noise.random() < 0.8:
                    guest.pwrite(noise.randbytes(length), offset)
                else:
                    guest.zero(length, offset)
            if sync == "top":
                wait_in_sync(qmp)
            soft_cancel(qmp)
            held = bytes(guest.pread(SIZE, 0))
    assert rebased(folder, image, base) == held


def test_top_copies_what_the_top_layer_has(folder: Path, overlay: tuple[Path, Path]) -> None:
    """And no more: the target's other clusters stay unallocated."""
    base, source_image = overlay
    image, _ = backed_target(folder, base)
    source = QemuNbd(folder, source_image, "qcow2", options=("-A",))
    target = QemuNbd(folder, image, "qcow2")
    with source, target, Nbdmirror(folder, f"src={source.uri()}", bare=True) as server:
        server.qmp.start_mirror(target.uri(), device="src", sync="top", **SMALL)
        server.qmp.wait_ready()
        server.qmp.complete()
    clusters = {0, 200_000 // CLUSTER, *range(400_000 // CLUSTER, 470_000 // CLUSTER + 1), 15}
    mapped = run("qemu-img", "map", "-f", "qcow2", image).stdout.splitlines()[1:]
    own = [line.split() for line in mapped if "target.qcow2" in line]
    found = {
        (int(start, 16) + at) // CLUSTER
        for start, length, *_ in own
        for at in range(0, int(length, 16), CLUSTER)
    }
    assert found == clusters
    run("qemu-img", "convert", "-O", "raw", source_image, folder / "was.img")
    assert rebased(folder, image, base) == (folder / "was.img").read_bytes()


# Write-blocking under load


def scribble(uri: str, seed: int, stopping: threading.Event, errors: list[BaseException]) -> None:
    """Random writes over a quarter of the disk, the same quarter for all: they overlap."""
    noise = random.Random(seed)
    try:
        with connected(uri) as guest:
            while not stopping.is_set():
                length = noise.choice((512, 4096, 65536, 100_000))
                offset = noise.randrange(0, SIZE // 4)
                if noise.random() < 0.15:
                    guest.zero(length, offset)
                else:
                    guest.pwrite(bytes([noise.randrange(256)]) * length, offset)
    except BaseException as error:  # noqa: BLE001 - the test looks at it
        errors.append(error)


@contextlib.contextmanager
def scribblers(uri: str, number: int = 4) -> Iterator[None]:
    stopping, errors = threading.Event(), list[BaseException]()
    threads = [
        threading.Thread(target=scribble, args=(uri, n, stopping, errors), daemon=True)
        for n in range(number)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "a writer waits for ever"
    assert not errors, errors


@pytest.mark.parametrize("granularity", [512, 64 * KiB])
def test_overlapping_writers_in_write_blocking_mode(folder: Path, granularity: int) -> None:
    """Four connections, overlapping writes: no deadlock, and the images are equal (iotest 151's
    testIntersectingActiveIO)."""

    def load(side: Side) -> None:
        with scribblers(side.uri):
            time.sleep(0.6)

    ended = [do("block-job-cancel", device="j"), status("concluded")]

    def equal(side: Side) -> None:
        assert_identical(side.source_image, side.targets["tgt"][1])

    script: list[Any] = [
        start_of_job(copy_mode="write-blocking", granularity=granularity),
        [ready(), call("four writers for a while", load), ended],
        [call("equal", equal)],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


@pytest.mark.parametrize("first", ["background", "write-blocking"])
def test_the_copy_mode_changes_under_load(
    identical: Identical, server: Nbdmirror, qmp: Qmp, target: QemuNbd, disk: Path, first: str
) -> None:
    """Both ways, again and again; back to background is an extension. Then the pivot, with the
    writers at work."""
    second = {"background": "write-blocking", "write-blocking": "background"}[first]
    qmp.start_mirror("tgt", device="src", copy_mode=first)
    qmp.wait_ready()
    with scribblers(server.uri("src")):
        for _ in range(5):
            for mode in (second, first):
                qmp.execute("block-job-change", id="j", type="mirror", copy_mode=mode)
                time.sleep(0.04)
        qmp.execute("block-job-change", id="j", type="mirror", copy_mode="write-blocking")
        wait_until(lambda: qmp.job()["actively-synced"], "actively synced", 10)
        qmp.complete()
        before = disk.read_bytes()
        time.sleep(0.1)
    assert disk.read_bytes() == before
    with connected(server.uri("src")) as guest:
        identical(bytes(guest.pread(SIZE, 0)), target.image)


def test_block_job_change_errors(qmp: Qmp) -> None:
    """8.2's texts."""
    change: dict[str, Any] = {"id": "j", "type": "mirror", "copy_mode": "write-blocking"}
    assert qmp.refusal("block-job-change", **change) == "Block job 'j' not found"
    for missing in change:
        rest = {key: value for key, value in change.items() if key != missing}
        name = missing.replace("_", "-")
        assert qmp.refusal("block-job-change", **rest) == f"Parameter '{name}' is missing"
    bogus = {**change, "copy_mode": "bogus"}
    text = "Parameter 'copy-mode' does not accept value 'bogus'"
    assert qmp.refusal("block-job-change", **bogus) == text
    qmp.start_mirror("tgt", device="src", auto_finalize=False, auto_dismiss=False)
    qmp.wait_ready()
    for mode in ("background", "write-blocking", "write-blocking", "background"):
        qmp.execute("block-job-change", **{**change, "copy_mode": mode})
    qmp.execute("block-job-complete", device="j")
    qmp.wait_for_event("BLOCK_JOB_PENDING", id="j")
    for state in ("pending", "concluded"):
        text = f"Job 'j' in state '{state}' cannot accept command verb 'change'"
        assert qmp.refusal("block-job-change", **change) == text
        if state == "pending":
            qmp.execute("job-finalize", id="j")


# Bounded endings (rule 42)

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
            os.kill(self.target.pid, signal.SIGSTOP)

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


class Asynchronous:
    """A guest's request in a thread, which may hang."""

    def __init__(self, uri: str, request: Callable[[nbd.NBD], Any]) -> None:
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(uri, request), daemon=True)
        self._thread.start()

    def _run(self, uri: str, request: Callable[[nbd.NBD], Any]) -> None:
        try:
            with connected(uri) as guest:
                request(guest)
        except BaseException as error:  # noqa: BLE001 - told by `join`
            self.failure = error

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the guest's request hangs"
        assert self.failure is None, self.failure


def write_4k(guest: nbd.NBD) -> None:
    guest.pwrite(b"\x44" * 4096, 8192)


PHASES = ["first copy", "ready", "completing", "soft cancelling", "paused", "write-blocking"]


def enter(phase: str, server: Nbdmirror, hang: Hang) -> Asynchronous:
    """The target hangs while the job is in `phase`, with a guest's write under way."""
    qmp = server.qmp
    if phase == "first copy":
        qmp.start_mirror(hang.uri, device="src", speed=SIZE // 4, buf_size=64 * KiB)
        hang.begin()
        guest = Asynchronous(server.uri("src"), write_4k)
        wait_until(lambda: qmp.job()["busy"], "a copy hangs")
        return guest
    mode = "write-blocking" if phase == "write-blocking" else "background"
    qmp.start_mirror(hang.uri, device="src", copy_mode=mode)
    qmp.wait_ready()
    if phase == "write-blocking":
        wait_until(lambda: qmp.job()["actively-synced"], "actively synced")
    hang.begin()
    guest = Asynchronous(server.uri("src"), write_4k)

    def dirty() -> bool:
        (job,) = qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
        return bool(job["in-flight-bytes"])

    wait_until(dirty, "a copy hangs")
    verbs = {"completing": "block-job-complete", "soft cancelling": "block-job-cancel"}
    verbs["paused"] = "block-job-pause"
    if phase in verbs:
        qmp.execute(verbs[phase], device="j")
    return guest


@pytest.mark.parametrize("phase", PHASES)
def test_force_cancel_of_a_hanging_target(
    folder: Path, server: Nbdmirror, hang: Hang, phase: str, disk: Path
) -> None:
    """Within a second, whatever waits; the guest's write is on the source."""
    qmp = server.qmp
    guest = enter(phase, server, hang)
    if phase != "write-blocking":
        guest.join(10.0)  # while the target hangs: the guest never pays for it (rule 41)
    began_s = time.monotonic()
    qmp.execute("block-job-cancel", device="j", force=True)
    told = [event["event"] for event in qmp.events]
    assert "BLOCK_JOB_CANCELLED" not in told, "the command itself does not wait"
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    seconds = time.monotonic() - began_s
    guest.join(10.0)
    assert seconds < FORCE_S_MAX
    assert disk.read_bytes()[8192:12288] == b"\x44" * 4096
    with connected(server.uri("src")) as other:
        other.pwrite(b"\x45" * 512, 0)


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_the_same_node_again_after_it_hung(
    identical: Identical,
    server: Nbdmirror,
    qmp: Qmp,
    disk: Path,
    target: QemuNbd,
    copy_mode: str,
) -> None:
    """What the forced cancel cut is connected again by the next job."""
    hang = Hang("stopped", target)
    qmp.start_mirror("tgt", device="src", copy_mode=copy_mode)
    qmp.wait_ready()
    hang.begin()
    guest = Asynchronous(server.uri("src"), write_4k)
    wait_until(lambda: qmp.job()["len"] > SIZE, "the write counts")
    qmp.execute("block-job-cancel", device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    guest.join(10.0)
    hang.end()
    qmp.start_mirror("tgt", device="src", copy_mode=copy_mode)
    qmp.wait_ready()
    soft_cancel(qmp)
    identical(disk, target.image)


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
    time.sleep(0.5)
    assert processor_s() - before_s < 0.2, "it spins"
    assert qmp.wait_for_event("BLOCK_JOB_ERROR", 3)["action"] == policy


@pytest.mark.parametrize("phase", PHASES)
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


@pytest.mark.parametrize("stop", ["SIGTERM", "SIGINT", "quit"])
@pytest.mark.parametrize("state", ["running", "paused", "ready", "standby", "pending", "concluded"])
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


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("ending", ["block-job-complete", "block-job-cancel"])
def test_endings_under_heavy_load(
    server: Nbdmirror, qmp: Qmp, target: QemuNbd, disk: Path, ending: str, copy_mode: str
) -> None:
    """They come, and the guest is held for a moment at most."""
    qmp.start_mirror("tgt", device="src", copy_mode=copy_mode)
    qmp.wait_ready()
    with Guest(server.uri("src"), disk, connections=4, pause_s=0, length_max=200_000) as guest:
        guest.wait_for_requests(100)
        began_s = time.monotonic()
        qmp.execute(ending, device="j")
        assert "error" not in qmp.wait_for_event("BLOCK_JOB_COMPLETED", 15)
        assert time.monotonic() - began_s < 10
        guest.wait_for_requests(50)
    assert guest.longest_s < 3.0
    if ending == "block-job-complete":
        assert_identical(guest.model, target.image)
    assert_identical(guest.model, server.uri("src"))
