"""Copy mode points; its guests beside those of a background mirror of the same server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.lab import GiB, Lab
from bench.load import Load, Result
from bench.measures import READY, Figures
from bench.processes import Process
from bench.servers import (
    GuestServer,
    NbdkitMemory,
    Nbdmirror,
    QemuNbd,
    Target,
    nbdmirror_environment,
)

BACKGROUND = "background"
INTERVAL_S = 1.0
JOURNAL_DISKS = 4
"""A journal is so many times as large as the disk."""


@contextlib.contextmanager
def _ready(lab: Lab, image: Target, journal: Target | None) -> Iterator[GuestServer]:
    """A server whose disk0 has a job that is READY: with points, or in background."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(image)
        if journal is not None:
            stack.enter_context(journal)
        server = stack.enter_context(Nbdmirror(lab.folder, [lab.image("source")]))
        server.add_target(image)
        options: dict[str, Any] = {}
        if journal is not None:
            server.add_target(journal, 1)
            options = {"copy_mode": "points", "x_nbdmirror_journal": "target1"}
            options["x_nbdmirror_interval"] = INTERVAL_S
        server.qmp.wait_for(READY, server.start_mirror(**options))
        yield server


@contextlib.contextmanager
def _guest(lab: Lab, subject: str, *options: str) -> Iterator[tuple[GuestServer, Result]]:
    """The server and its guest's load of some points, after that."""
    path = lab.sparse("journal", JOURNAL_DISKS * lab.disk_bytes)
    journal = QemuNbd(lab.folder, path) if subject != BACKGROUND else None
    seconds = INTERVAL_S * (4 if lab.is_quick else 10)
    try:
        with _ready(lab, QemuNbd(lab.folder, lab.image("target")), journal) as server:
            with Load(
                lab.folder, server.uri(), "randwrite", seconds=seconds, options=options
            ) as load:
                result = load.result()
            yield server, result
    finally:
        path.unlink()


def writes(lab: Lab, subject: str) -> Figures:
    """Random writes at full rate."""
    with _guest(lab, subject) as (_, result):
        return {"iops": result.iops}


def held(lab: Lab, subject: str) -> Figures:
    """How long guests' writes at full rate are held at the cuts: the 99th percentile of those that
    are held."""
    with _guest(lab, subject) as (server, _):
        disk = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]
        found = [wait["buckets"] for wait in disk["held"] if wait["cause"] == "cut"]
        # Nobody may have been held; a ratio needs a figure.
        return {"p99": _percentile_s(found[0] if found else [1], 0.99) * 1000}


def _percentile_s(buckets: list[int], part: float) -> float:
    """Of a histogram whose bounds are 1, 2, 4 ... microseconds: within a bucket a straight line."""
    left = part * sum(buckets)
    for number, count in enumerate(buckets):
        if left <= count:
            start = 2.0 ** (number - 1) if number else 0.0
            end = 2.0**number
            return (start + (end - start) * left / count) / 1e6
        left -= count
    raise AssertionError("more than all")


def age(lab: Lab, subject: str) -> Figures:
    """How old the last point gets, in intervals, until the next one is committed, at 2,000 writes a
    second: the oldest of all, as the server's events have it."""
    with _guest(lab, subject, "--rate_iops=2000") as (server, _):
        events = server.qmp.heard("X_NBDMIRROR_POINT")
    cuts = [event["data"]["time-s"] for event in events]
    commits = [
        event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6 for event in events
    ]
    return {"age": max(commit - cut for cut, commit in zip(cuts, commits[1:], strict=False))}


class Applier(Process):
    """`nbdmirror apply` beside image and journal. It serves nobody."""

    name = "applier"

    def __init__(self, folder: Path, image: Target, journal: Target) -> None:
        super().__init__(folder)
        self._places = ("--image", image.uri(), "--journal", journal.uri())

    def argv(self) -> list[str | Path]:
        return [sys.executable, "-m", "nbdmirror", "apply", *self._places]

    def environment(self) -> dict[str, str]:
        return nbdmirror_environment()

    def wait_until_it_serves(self) -> None:
        pass  # the source sees when it does


def sent(lab: Lab, subject: str) -> Figures:
    """Bytes that the source sends to image and journal over bytes that the guest writes, 2,000
    times 4 KiB a second at random places, with an applier beside the image."""
    image, journal = NbdkitMemory(lab.folder, lab.disk_bytes), NbdkitMemory(lab.folder, GiB)
    with _ready(lab, image, journal) as server, Applier(lab.folder, image, journal):
        figures = []
        for seconds in (5.0, 5.0):  # the first ones until the applier is asked
            before = _sent_bytes(server)
            options = ("--rate_iops=2000",)
            with Load(
                lab.folder, server.uri(), "randwrite", seconds=seconds, options=options
            ) as load:
                changed = load.result().bytes
            server.qmp.execute("x-nbdmirror-point", {"id": "job0", "wait": True})
            figures.append((_sent_bytes(server) - before) / changed)
        return {"ratio": figures[-1]}


def _sent_bytes(server: GuestServer) -> int:
    (job,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
    return int(job["sent-bytes"])
