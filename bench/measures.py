"""What is measured, once each: a function gets the Lab and the subject's name, and returns figures
by name. Every load is bounded, and every server ends with the function."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.lab import SUBJECTS, GiB, Lab, MiB, TiB
from bench.load import Load, Result, latencies_s
from bench.processes import BenchError
from bench.servers import GuestServer, NbdkitFileTarget, NbdkitMemory, Nbdmirror, QemuNbd, Target

Figures = dict[str, float]

READY = "BLOCK_JOB_READY"
COMPLETED = "BLOCK_JOB_COMPLETED"
NBDCOPY = "nbdcopy"
COPY_S_MAX = 120.0
PIVOTS = 3
SPARSE_BYTES = 16 * TiB
SPARSE_DATA_BYTES = 64 * MiB


def guest(
    lab: Lab,
    subject: str,
    *,
    rw: str,
    block_bytes: int = 4096,
    depth: int = 16,
    is_direct: bool = False,
) -> Figures:
    """A load on a disk that nothing else is done with."""
    image = lab.image_on_disk() if is_direct else lab.image("source")
    with SUBJECTS[subject](lab.folder, [image], is_direct=is_direct) as server:
        return _figures(_load(lab, server, rw, block_bytes=block_bytes, depth=depth))


def while_mirroring(lab: Lab, subject: str, *, rate: int = 0) -> Figures:
    """Random writes while full mirrors run one after the other, and the speed of those.

    At full rate the guest soils the disk as fast as it is copied, so that one mirror lasts for the
    whole measurement; at a fixed rate a mirror that became ready is cancelled, and the next begins.
    """
    options = (f"--rate_iops={rate}",) if rate else ()
    depth = 4 if rate else 16
    with mirrorable(lab, subject) as (server, _), _mirrors(server) as copied:
        began_s, before = time.monotonic(), copied()
        result = _load(lab, server, "randwrite", depth=depth, options=options)
        speed = (copied() - before) / (time.monotonic() - began_s)
    return {**_figures(result), "speed": speed / MiB}


def write_blocking(lab: Lab, subject: str) -> Figures:
    """Random writes to a mirror that is ready, each answered when the target has it too."""
    with mirrorable(lab, subject) as (server, _):
        job = server.start_mirror(copy_mode="write-blocking")
        server.qmp.wait_for(READY, job)
        return _figures(_load(lab, server, "randwrite"))


def after_pivot(lab: Lab, subject: str) -> Figures:
    """The guest is served from the target."""
    with mirrorable(lab, subject) as (server, _):
        job = server.start_mirror()
        server.qmp.wait_for(READY, job)
        complete(server, job)
        writes = _load(lab, server, "randwrite").iops
        return {"writes": writes, "reads": _load(lab, server, "randread").iops}


def pivot(lab: Lab, subject: str) -> Figures:
    """The longest request from `complete` to its end, and 50 ms more on both sides, at 2,000
    writes a second: the median of PIVOTS pivots, since a single maximum may be the machine's."""
    longest = [_pivot(lab, subject) * 1000 for _ in range(PIVOTS)]
    return {"longest": statistics.median(longest)}


def _pivot(lab: Lab, subject: str) -> float:
    with mirrorable(lab, subject) as (server, _), logged(lab, server, 2000, 6) as (load, log):
        job = server.start_mirror()
        time.sleep(1.5)  # fio's start takes up to 0.5 s, and is none of the pivot's
        server.qmp.wait_for(READY, job)
        began_s = time.time()
        ended_s = pivoted_under(load, server, job)
        return max(latencies_s(log, began_s - 0.05, ended_s + 0.05))


@contextlib.contextmanager
def logged(lab: Lab, server: GuestServer, rate: int, seconds: float) -> Iterator[tuple[Load, Path]]:
    """A guest that writes so many times a second, and fio's log of how long each write took, which
    is whole when the load has ended."""
    log = lab.folder / "latency"
    options = (f"--rate_iops={rate}", f"--write_lat_log={log}", "--log_unix_epoch=1")
    try:
        with Load(
            lab.folder, server.uri(), "randwrite", seconds=seconds, depth=4, options=options
        ) as load:
            yield load, Path(f"{log}_clat.1.log")
    finally:
        for path in lab.folder.glob("latency_*.log"):
            path.unlink()


def pivoted_under(load: Load, server: GuestServer, job: str) -> float:
    """Complete a job that is ready, and wait for the end of the load. Returns when the job had
    ended, by time.time()."""
    complete(server, job)
    ended_s = time.time()
    if not load.is_running():
        raise BenchError("the pivot took longer than the load")
    load.result()
    return ended_s


def complete(server: GuestServer, job: str) -> None:
    """End a job that is ready, with its pivot."""
    server.qmp.execute("block-job-complete", {"device": job})
    server.qmp.wait_for(COMPLETED, job)


def copy(
    lab: Lab, subject: str, *, size: int = 0, kind: str = "qemu-nbd", is_tcp: bool = False
) -> Figures:
    """The time of a full copy of a disk without holes: to READY, which is flushed; nbdcopy with
    --flush."""
    size = size or lab.disk_bytes
    source = lab.image("source", size)
    target: Target
    if kind == "memory":
        lab.touch(size)
        target = NbdkitMemory(lab.folder, size, is_tcp=is_tcp)
    else:
        target = QemuNbd(lab.folder, lab.image("target", size), is_tcp=is_tcp)
    return _copy(lab, subject, source, target)


def delayed_copy(lab: Lab, subject: str) -> Figures:
    """The same over a link of 20 ms round trip: nbdkit's delay filter before the target. Requests
    wait side by side in it, so -t gives it more threads than anyone has requests."""
    filters = ("-t", "64", "--filter=delay")
    parameters = ("rdelay=20ms", "wdelay=20ms")
    size = lab.disk_bytes
    source = lab.image("source")
    lab.touch(size)
    target = NbdkitMemory(lab.folder, size, filters=filters, parameters=parameters)
    return _copy(lab, subject, source, target)


def sparse(lab: Lab, subject: str, size: int = SPARSE_BYTES) -> Figures:
    """A disk with 64 MiB of data: the time to READY and the peak memory by then."""
    number = SPARSE_DATA_BYTES // MiB
    pieces = [index * (size // number) for index in range(number)]
    source = lab.sparse("source", size, pieces)
    image = lab.sparse("target", size)
    with QemuNbd(lab.folder, image) as target, served(lab, subject, [source]) as server:
        server.add_target(target)
        began_s = time.monotonic()
        job = server.start_mirror(granularity=64 << 10)
        took_s = server.qmp.wait_for(READY, job) - began_s
        return {"seconds": took_s, "memory": server.peak_rss_bytes() / MiB}


def amplification(lab: Lab, subject: str, *, distribution: str) -> Figures:
    """Bytes that reach the target while a guest writes 4,000 times a second, always mostly to the
    same places, until the mirror is in sync again and completed. nbdkit's stats filter counts."""
    size, seconds = lab.disk_bytes, 4.0 if lab.is_quick else 8.0
    lab.need(size)
    target, counted = counting(lab, size)
    options = ("--rate_iops=4000", f"--random_distribution={distribution}")
    with target, served(lab, subject, [lab.image("source")]) as server:
        server.add_target(target)
        load = Load(lab.folder, server.uri(), "randwrite", seconds=seconds, options=options)
        with load:
            job = server.start_mirror()
            load.result()
            server.qmp.wait_for(READY, job)
        complete(server, job)
    return {"written": written_bytes(counted) / MiB}


def counting(lab: Lab, size: int, name: str = "target") -> tuple[NbdkitMemory, Path]:
    """A target, and the file that says at its end how much was written: see `written_bytes`."""
    counted = lab.folder / f"{name}.stats"
    words = (f"statsfile={counted}",)
    return NbdkitMemory(lab.folder, size, filters=("--filter=stats",), parameters=words), counted


def several_disks(lab: Lab, subject: str, disks: int = 4, *, servers: int = 1) -> Figures:
    """That many disks, mirrored at once by one server or by one each: the time until all are
    ready."""
    size = lab.disk_bytes // 4
    names = range(disks)
    images = [lab.image(f"source{name}", size) for name in names]
    with contextlib.ExitStack() as stack:
        targets = [
            stack.enter_context(QemuNbd(lab.folder, lab.image(f"target{name}", size)))
            for name in names
        ]
        groups = [images] if servers == 1 else [[image] for image in images]
        running = [stack.enter_context(served(lab, subject, group)) for group in groups]
        places = [(server, number) for server in running for number in range(len(server.disks))]
        for (server, number), target in zip(places, targets, strict=True):
            server.add_target(target, number)
        began_s = time.monotonic()
        jobs = [(server, server.start_mirror(number)) for server, number in places]
        return {"seconds": max(server.qmp.wait_for(READY, job) for server, job in jobs) - began_s}


def with_state(lab: Lab, subject: str) -> Figures:
    """Random writes to a mirror that is ready, over the whole disk and in one place of it; with a
    state directory, and so a log of intents, on a real file system; or `without`."""
    with contextlib.ExitStack() as stack:
        options: tuple[str, ...] = ()
        if subject != "without":
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=lab.disk_folder))
            options = ("--state-dir", folder)
        target = stack.enter_context(QemuNbd(lab.folder, lab.image("target")))
        server = Nbdmirror(lab.folder, [lab.image("source")], options=options)
        stack.enter_context(server).add_target(target)
        server.qmp.wait_for(READY, server.start_mirror())
        spread = _load(lab, server, "randwrite").iops
        place = _load(lab, server, "randwrite", options=(f"--size={8 * MiB}",)).iops
        return {"spread": spread, "place": place}


def written_bytes(counted: Path) -> float:
    """Of nbdkit's stats filter: `write: 10 ops, 0.1 s, 1.25 GiB, ...`. Takes the file away."""
    text = counted.read_text()
    counted.unlink()
    units = {"bytes": 1, "KiB": 1 << 10, "MiB": MiB, "GiB": GiB}
    for line in text.splitlines():
        if line.startswith("write:"):
            number, unit = line.split(", ")[2].split()[:2]
            return float(number) * units[unit]
    raise BenchError(f"no writes in: {text}")


def _copy(lab: Lab, subject: str, source: Path, target: Target) -> Figures:
    with target:
        if subject == NBDCOPY:
            began_s = time.monotonic()
            command = ["nbdcopy", "--flush", str(source), target.uri()]
            subprocess.run(command, check=True, timeout=COPY_S_MAX, capture_output=True)
            return {"seconds": time.monotonic() - began_s}
        with served(lab, subject, [source]) as server:
            server.add_target(target)
            began_s = time.monotonic()
            job = server.start_mirror()
            return {"seconds": server.qmp.wait_for(READY, job) - began_s}


def _load(
    lab: Lab,
    server: GuestServer,
    rw: str,
    *,
    block_bytes: int = 4096,
    depth: int = 16,
    options: tuple[str, ...] = (),
) -> Result:
    load = Load(
        lab.folder,
        server.uri(),
        rw,
        seconds=lab.seconds,
        block_bytes=block_bytes,
        depth=depth,
        options=options,
    )
    with load:
        return load.result()


def _figures(result: Result) -> Figures:
    return {
        "iops": result.iops,
        "mib_per_s": result.bytes_per_s / MiB,
        "mean": result.mean_s * 1e6,
        "p99": result.p99_s * 1e6,
    }


def served(lab: Lab, subject: str, disks: Sequence[Path]) -> GuestServer:
    return SUBJECTS[subject](lab.folder, disks)


@contextlib.contextmanager
def mirrorable(
    lab: Lab, subject: str, kind: type[QemuNbd | NbdkitFileTarget] = QemuNbd
) -> Iterator[tuple[GuestServer, Target]]:
    """A server whose disk0 has a target0."""
    target = kind(lab.folder, lab.image("target"))
    with target, served(lab, subject, [lab.image("source")]) as server:
        server.add_target(target)
        yield server, target


class _Mirrors:
    """Full mirrors, one after the other, on a thread; called, it tells the bytes copied so far."""

    def __init__(self, server: GuestServer) -> None:
        self.error: BaseException | None = None
        self._server = server
        self._before = 0
        self._now = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self) -> int:
        return self._before + self._now

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(COPY_S_MAX)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._mirror()
        except BaseException as error:  # noqa: BLE001 - raised again by `stop`
            self.error = error

    def _mirror(self) -> None:
        server = self._server
        job = server.start_mirror()
        while not self._stopping.wait(0.02):
            self._now = server.copied_bytes(job)
            if server.qmp.has(READY, job):
                break
        # By force: without, QEMU would first wait until nothing is dirty.
        server.qmp.execute("block-job-cancel", {"device": job, "force": True})
        server.qmp.wait_for("BLOCK_JOB_CANCELLED", job)
        server.qmp.forget()
        self._before, self._now = self._before + self._now, 0


@contextlib.contextmanager
def _mirrors(server: GuestServer) -> Iterator[_Mirrors]:
    mirrors = _Mirrors(server)
    try:
        yield mirrors
    finally:
        mirrors.stop()
