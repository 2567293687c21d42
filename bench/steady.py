"""A mirror that is ready, beside a guest that writes on: what travels, and what the guest feels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.lab import Lab
from bench.load import Load, latencies_s
from bench.measures import COMPLETED, READY, Figures, served, written_bytes
from bench.processes import BenchError
from bench.servers import GuestServer, NbdkitFileTarget, NbdkitMemory, QemuNbd, Target

PIVOTS = 3
FIO_START_S = 0.7
"""Its own start is not the mirror's affair."""


def sent(lab: Lab, subject: str, *, size: int, options: tuple[str, ...]) -> Figures:
    """Bytes that reach the target over bytes that the guest writes, 2,000 times 4 KiB a second to a
    disk of holes, from READY to COMPLETED. nbdkit's stats filter counts."""
    counted = lab.folder / "target.stats"
    target = NbdkitMemory(
        lab.folder, size, filters=("--filter=stats",), parameters=(f"statsfile={counted}",)
    )
    source = lab.sparse("sent", size)
    seconds = 3.0 if lab.is_quick else 8.0
    try:
        with target, served(lab, subject, [source]) as server:
            server.add_target(target)
            job = server.start_mirror()
            server.qmp.wait_for(READY, job)
            load = ("--rate_iops=2000", "--rate_process=poisson", *options)
            with Load(
                lab.folder, server.uri(), "randwrite", seconds=seconds, depth=4, options=load
            ) as guest:
                changed = guest.result().bytes
            server.qmp.execute("block-job-complete", {"device": job})
            server.qmp.wait_for(COMPLETED, job)
        return {"ratio": written_bytes(counted.read_text()) / changed}
    finally:
        counted.unlink(missing_ok=True)
        source.unlink()


def felt(lab: Lab, subject: str, *, kind: str) -> Figures:
    """Of 1,500 writes a second beside a ready mirror and over its pivot: the longest and the 99.9th
    percentile, and the time from `complete` to its end; medians of PIVOTS pivots."""
    found = [_felt(lab, subject, kind) for _ in range(PIVOTS)]
    return {key: sorted(each[key] for each in found)[PIVOTS // 2] for key in found[0]}


def _felt(lab: Lab, subject: str, kind: str) -> Figures:
    seconds = 3.0 if lab.is_quick else 6.0
    log = lab.folder / "felt"
    options = ("--rate_iops=1500", f"--write_lat_log={log}", "--log_unix_epoch=1")
    try:
        with _mirrorable(lab, subject, kind) as server:
            job = server.start_mirror()
            server.qmp.wait_for(READY, job)
            load = Load(
                lab.folder, server.uri(), "randwrite", seconds=seconds, depth=4, options=options
            )
            with load:
                time.sleep(FIO_START_S)
                began_s = time.time()
                time.sleep(seconds / 2)
                asked_s = time.time()
                server.qmp.execute("block-job-complete", {"device": job})
                server.qmp.wait_for(COMPLETED, job)
                ended_s = time.time()
                if not load.is_running():
                    raise BenchError("the pivot took longer than the load")
                load.result()
        latencies = sorted(latencies_s(Path(f"{log}_clat.1.log"), began_s, ended_s + 0.05))
    finally:
        for path in lab.folder.glob("felt_*.log"):
            path.unlink()
    if not latencies:
        raise BenchError("no request beside the mirror")
    return {
        "longest": latencies[-1] * 1000,
        "p999": latencies[int(len(latencies) * 0.999)] * 1000,
        "ending": (ended_s - asked_s) * 1000,
    }


@contextmanager
def _mirrorable(lab: Lab, subject: str, kind: str) -> Iterator[GuestServer]:
    image = lab.image("target")
    target: Target
    if kind == "nbdkit-file":
        target = NbdkitFileTarget(lab.folder, image)
    else:
        target = QemuNbd(lab.folder, image)
    with target, served(lab, subject, [lab.image("source")]) as server:
        server.add_target(target)
        yield server
