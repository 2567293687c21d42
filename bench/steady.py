"""A mirror that is ready, beside a guest that writes on: what travels, and what the guest feels."""

from __future__ import annotations

import statistics
import time

from bench.lab import Lab
from bench.load import Load, latencies_s
from bench.measures import (
    PIVOTS,
    READY,
    Figures,
    complete,
    counting,
    logged,
    mirrorable,
    pivoted_under,
    served,
    written_bytes,
)
from bench.servers import NbdkitFileTarget, QemuNbd

FIO_START_S = 0.7
"""Its own start is not the mirror's affair."""


def sent(lab: Lab, subject: str, *, size: int, options: tuple[str, ...]) -> Figures:
    """Bytes that reach the target over bytes that the guest writes, 2,000 times 4 KiB a second to a
    disk of holes, from READY to COMPLETED."""
    target, counted = counting(lab, size)
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
            complete(server, job)
        return {"ratio": written_bytes(counted) / changed}
    finally:
        source.unlink()


def felt(lab: Lab, subject: str, *, kind: type[QemuNbd | NbdkitFileTarget]) -> Figures:
    """Of 1,500 writes a second beside a ready mirror and over its pivot: the longest and the 99.9th
    percentile, and the time from `complete` to its end; medians of PIVOTS pivots."""
    found = [_felt(lab, subject, kind) for _ in range(PIVOTS)]
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def _felt(lab: Lab, subject: str, kind: type[QemuNbd | NbdkitFileTarget]) -> Figures:
    seconds = 3.0 if lab.is_quick else 6.0
    with mirrorable(lab, subject, kind) as (server, _):
        job = server.start_mirror()
        server.qmp.wait_for(READY, job)
        with logged(lab, server, 1500, seconds) as (load, log):
            time.sleep(FIO_START_S)
            began_s = time.time()
            time.sleep(seconds / 2)
            asked_s = time.time()
            ended_s = pivoted_under(load, server, job)
            latencies = sorted(latencies_s(log, began_s, ended_s + 0.05))
    return {
        "longest": latencies[-1] * 1000,
        "p999": latencies[int(len(latencies) * 0.999)] * 1000,
        "ending": (ended_s - asked_s) * 1000,
    }
