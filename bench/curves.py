"""How cost grows: the same measurement at several sizes of one thing, for nbdmirror and its peers.

`./run bench --curve size`, or `--curve all`. The curves and what they show are in
docs/measurements/2026-11-28.md.
"""

from __future__ import annotations

import importlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbd

from bench import measures
from bench.lab import GiB, KiB, Lab, MiB, TiB
from bench.load import Load
from bench.measures import READY, Figures
from bench.processes import BenchError
from bench.results import short
from bench.servers import GuestServer, QemuNbd

ROUNDS = 3
GRANULE = 64 * KiB
RESYNC_WRITES = 4000
RESYNC_S_MAX = 120.0


@dataclass(frozen=True, slots=True)
class Curve:
    name: str
    title: str
    measure: Callable[[Lab, str, float], Figures]
    points: tuple[float, ...]
    figures: tuple[tuple[str, str], ...]
    """Keys of what is measured, and what they are."""
    subjects: tuple[str, ...] = ("nbdmirror", "qsd")
    is_in_bytes: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    curve: str
    figure: str
    x: float
    subject: str
    value: float
    """The median of the rounds."""


def _sparse(lab: Lab, subject: str, size: float) -> Figures:
    return measures.sparse(lab, subject, int(size))


def _granularity(lab: Lab, subject: str, granularity: float) -> Figures:
    """A full copy, and then the copy of what random 4k writes to a mirror at rest made dirty."""
    size = lab.disk_bytes // 4
    with (
        QemuNbd(lab.folder, lab.image("target", size)) as target,
        measures.served(lab, subject, [lab.image("source", size)]) as server,
    ):
        server.add_target(target)
        began_s = time.monotonic()
        job = server.start_mirror(granularity=int(granularity))
        copy_s = server.qmp.wait_for(READY, job) - began_s
        places = random.Random(1).sample(range(0, size, 4 * KiB), min(RESYNC_WRITES, size >> 13))
        return {"copy": copy_s, "resync": _resync_s(server, job, places)}


def _fraction(lab: Lab, subject: str, percent: float) -> Figures:
    """The copy of so many granules, at random places."""
    with measures.mirrorable(lab, subject) as (server, _):
        job = server.start_mirror(granularity=GRANULE)
        server.qmp.wait_for(READY, job)
        granules = lab.disk_bytes // GRANULE
        chosen = random.Random(1).sample(range(granules), max(1, round(granules * percent / 100)))
        return {"resync": _resync_s(server, job, [number * GRANULE for number in chosen])}


def _resync_s(server: GuestServer, job: str, places: Sequence[int]) -> float:
    """From resuming to being in sync, after a 4k write to each of the places while paused."""
    server.qmp.execute("block-job-pause", {"device": job})
    deadline_s = time.monotonic() + RESYNC_S_MAX
    while server.job(job)["status"] != "standby" or server.job(job)["busy"]:
        _wait(deadline_s, "pause")
    guest = nbd.NBD()
    guest.connect_uri(server.uri())
    noise = random.Random(2).randbytes(4 * KiB)
    for place in places:
        guest.pwrite(noise, place)
    guest.shutdown()
    began_s = time.monotonic()
    server.qmp.execute("block-job-resume", {"device": job})
    while (now := server.job(job))["offset"] != now["len"] or now["status"] != "ready":
        _wait(deadline_s, "resync")
    return time.monotonic() - began_s


def _wait(deadline_s: float, what: str) -> None:
    if time.monotonic() > deadline_s:
        raise BenchError(f"no {what} in time")
    time.sleep(0.002)


def _connections(lab: Lab, subject: str, number: float) -> Figures:
    """16 requests in flight, over so many connections."""
    options = (f"--numjobs={int(number)}", "--group_reporting", "--thread")
    with measures.served(lab, subject, [lab.image("source")]) as server:
        depth = 16 // int(number)
        load = Load(
            lab.folder,
            server.uri(),
            "randwrite",
            seconds=lab.seconds,
            depth=depth,
            options=options,
        )
        with load:
            return {"iops": load.result().iops}


def _disks(lab: Lab, subject: str, number: float) -> Figures:
    figures = measures.several_disks(lab, subject, int(number))
    return {**figures, "per_disk": figures["seconds"] / number}


CURVES = (
    Curve(
        "size",
        "a disk's size; 64 MiB of it are data",
        _sparse,
        (64 * MiB, GiB, 16 * GiB, 256 * GiB, 4 * TiB, 16 * TiB),
        (("seconds", "s to READY"), ("memory", "MiB peak RSS")),
        is_in_bytes=True,
    ),
    Curve(
        "granularity",
        "granularity",
        _granularity,
        (512, 4 * KiB, 64 * KiB, MiB, 16 * MiB, 64 * MiB),
        (("copy", "s, full copy"), ("resync", "s, after random 4k writes")),
        is_in_bytes=True,
    ),
    Curve(
        "fraction",
        "per cent of granules that are dirty",
        _fraction,
        (0.1, 1, 10, 30, 100),
        (("resync", "s until in sync"),),
    ),
    Curve(
        "connections",
        "connections of a guest, 16 requests in flight",
        _connections,
        (1, 2, 4, 8, 16),
        (("iops", "IOPS, 4k random write"),),
        ("nbdmirror", "qsd", "nbdkit"),
    ),
    Curve(
        "disks",
        "disks mirrored at once by one server",
        _disks,
        (1, 2, 4, 8),
        (("seconds", "s until all are READY"), ("per_disk", "s a disk")),
    ),
)


def measure(lab: Lab, curve: Curve, rounds: int = ROUNDS) -> Iterator[Point]:
    """Subjects take turns at each point."""
    for x in curve.points:
        found: dict[str, list[Figures]] = {subject: [] for subject in curve.subjects}
        for _ in range(rounds):
            for subject in curve.subjects:
                found[subject].append(curve.measure(lab, subject, x))
        for key, _ in curve.figures:
            for subject in curve.subjects:
                median = statistics.median(figures[key] for figures in found[subject])
                yield Point(curve.name, key, x, subject, median)


def as_markdown(points: Sequence[Point]) -> str:
    """A table for each curve."""
    lines = []
    for curve in _measured(points):
        heads = [f"{subject}: {what}" for _, what in curve.figures for subject in curve.subjects]
        lines += [f"| {curve.title} | " + " | ".join(heads) + " |"]
        lines += ["|---" * (len(heads) + 1) + "|"]
        for x in curve.points:
            values = [
                next(
                    short(p.value)
                    for p in points
                    if (p.curve, p.figure, p.subject, p.x) == (curve.name, key, subject, x)
                )
                for key, _ in curve.figures
                for subject in curve.subjects
            ]
            lines.append(f"| {label(curve, x)} | " + " | ".join(values) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(path: Path, points: Sequence[Point]) -> None:
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    shown = [(curve, *figure) for curve in _measured(points) for figure in curve.figures]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(7, 2.6 * len(shown)), layout="constrained", squeeze=False
    )
    for (curve, key, what), (axis,) in zip(shown, axes, strict=True):
        for subject in curve.subjects:
            mine = [
                p for p in points if (p.curve, p.figure, p.subject) == (curve.name, key, subject)
            ]
            axis.plot([p.x for p in mine], [p.value for p in mine], marker="o", label=subject)
        axis.set(xscale="log", yscale="log", xlabel=curve.title, ylabel=what)
        axis.set_xticks(curve.points, [label(curve, x) for x in curve.points])
        axis.minorticks_off()
        axis.legend()
    figure.savefig(path)


def label(curve: Curve, x: float) -> str:
    if not curve.is_in_bytes:
        return f"{x:g}"
    for unit, name in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if x >= unit:
            return f"{x / unit:g} {name}"
    return f"{x:g} B"


def _measured(points: Sequence[Point]) -> list[Curve]:
    names = {point.curve for point in points}
    return [curve for curve in CURVES if curve.name in names]
