"""The table of rows: what is measured, against whom, and what the ratio must be.

A ratio is nbdmirror's figure over the peer's, turned so that larger is better for us. A new row is
one entry here and, if need be, one function in measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from bench import idle, measures, points, steady
from bench.lab import GiB, Lab, TiB
from bench.measures import NBDCOPY, Figures
from bench.servers import NbdkitFileTarget, QemuNbd


@dataclass(frozen=True, slots=True)
class Goal:
    """The least ratio that is accepted, and the one that is hoped for."""

    must: float
    aim: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a measurement. `goals` by peer; a peer without a goal is shown all the same."""

    key: str
    unit: str
    goals: Mapping[str, Goal]
    less_is_better: bool = False
    must_be_under: float = 0.0
    """A bound on our own figure, beside the ratio."""


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    title: str
    measure: Callable[[Lab, str], Figures]
    peers: tuple[str, ...]
    figures: tuple[Figure, ...]
    is_slow: bool = False
    """Left out of --quick unless it is named; other rows' images make room for it."""


QSD = "qsd"
_COPY_GOALS = {QSD: Goal(1.0, 1.3), NBDCOPY: Goal(1.0, 1.3)}


def _iops(must: float, aim: float, nbdkit: Goal | None = None) -> tuple[Figure, ...]:
    goals = {QSD: Goal(must, aim)} | ({"nbdkit": nbdkit} if nbdkit else {})
    return (Figure("iops", "IOPS", goals),)


def _seconds(goals: Mapping[str, Goal]) -> tuple[Figure, ...]:
    return (Figure("seconds", "s", goals, less_is_better=True),)


def _mean(must: float, aim: float) -> tuple[Figure, ...]:
    return (Figure("mean", "us", {QSD: Goal(must, aim)}, less_is_better=True),)


def _guest(name: str, title: str, figures: tuple[Figure, ...], **load: object) -> Row:
    measure = partial(measures.guest, **load)  # type: ignore[arg-type]  # names are checked there
    return Row(name, title, measure, (QSD, "nbdkit"), figures)


def _copies() -> list[Row]:
    rows = []
    for size, size_name in ((0, ""), (8 * GiB, "-8g")):
        for kind, kind_name in (("qemu-nbd", ""), ("memory", "-memory")):
            for is_tcp, way in ((False, "unix"), (True, "tcp")):
                name = f"copy{size_name}{kind_name}-{way}"
                title = f"full copy of {'8 GiB' if size else '1 GiB'} over {way} to"
                title += " nbdkit memory" if kind_name else " qemu-nbd"
                measure = partial(measures.copy, size=size, kind=kind, is_tcp=is_tcp)
                figures = _seconds(_COPY_GOALS)
                rows.append(Row(name, title, measure, (QSD, NBDCOPY), figures, is_slow=size > 0))
    return rows


QSD_4K = "qsd-4k"
_RANDOM, _ZIPF, _HOT = (
    (),
    ("--random_distribution=zipf:1.2",),
    ("--random_distribution=zoned:90/1:10/99",),
)


def _sent() -> list[Row]:
    """What is sent for what was changed, which is what a link has to carry."""
    third = {QSD: Goal(3.0, 4.0)}
    places = [
        ("", GiB, _RANDOM, "4k random", {QSD: Goal(10, 14)}, 1.2),
        ("-1t", TiB, _RANDOM, "4k random on 1 TiB", {QSD: Goal(10, 14)}, 1.2),
        ("-16t", 16 * TiB, _RANDOM, "4k random on 16 TiB", {QSD: Goal(10, 14)}, 1.2),
        ("-zipf", GiB, _ZIPF, "Zipf(1.2)", third, 0.0),
        ("-hot-spot", GiB, _HOT, "90 % of writes in 1 % of the disk", third, 0.0),
    ]
    return [
        Row(
            f"sent{name}",
            f"bytes sent over bytes written, {title}, 2,000 IOPS beside a ready mirror",
            partial(steady.sent, size=size, options=options),
            (QSD,) if size > GiB else (QSD, QSD_4K),
            (Figure("ratio", "sent/written", goals, less_is_better=True, must_be_under=bound),),
            is_slow=size > GiB,
        )
        for name, size, options, title, goals, bound in places
    ]


def _felt() -> list[Row]:
    goals = {QSD: Goal(1.0, 1.5)}
    return [
        Row(
            f"felt-{kind.name}",
            "guest 4k write at 1,500 IOPS beside a ready mirror and over its pivot, to "
            f"{kind.name}",
            partial(steady.felt, kind=kind),
            (QSD,),
            (
                Figure("longest", "ms", goals, less_is_better=True),
                Figure("p999", "ms p99.9", goals, less_is_better=True),
                Figure("ending", "ms to COMPLETED", {QSD: Goal(0.5, 1.0)}, less_is_better=True),
            ),
        )
        for kind in (QemuNbd, NbdkitFileTarget)
    ]


def _idle() -> list[Row]:
    figures = (Figure("processor", "% of a processor", {}, less_is_better=True, must_be_under=1.0),)
    title = "100 mirrors of one server that nobody writes to"
    with_state = partial(idle.processor, has_state=True)
    return [
        Row("idle", title, idle.processor, (QSD,), figures, is_slow=True),
        Row(
            "idle-state",
            f"{title}, with a state directory",
            with_state,
            ("without",),
            figures,
            is_slow=True,
        ),
    ]


def _points() -> list[Row]:
    """Copy mode points, each second."""
    guest = "guest 4k random write, depth 16, with points each second"
    less = partial(Figure, goals={}, less_is_better=True)
    iops = (Figure("iops", "IOPS", {points.BACKGROUND: Goal(0.9, 1.0)}),)
    title = "bytes sent over bytes written, 4k random, 2,000 IOPS, points applied at the far side"
    return [
        Row("points", guest, points.writes, (points.BACKGROUND,), iops),
        Row(
            "points-held",
            f"{guest}: held at a cut",
            points.held,
            (),
            (less("p99", "ms p99", must_be_under=2.0),),
        ),
        Row(
            "points-age",
            "age of the last point before the next one, in intervals, 2,000 IOPS",
            points.age,
            (),
            (less("age", "intervals", must_be_under=2.5),),
        ),
        Row(
            "points-sent",
            title,
            points.sent,
            (),
            (less("ratio", "sent/written", must_be_under=1.3),),
        ),
    ]


_C = Goal(0.75, 0.9)

ROWS: tuple[Row, ...] = (
    _guest("randwrite", "guest 4k random write, depth 16", _iops(2.0, 3.0, _C), rw="randwrite"),
    _guest("randread", "guest 4k random read, depth 16", _iops(1.5, 2.5, _C), rw="randread"),
    _guest(
        "latency-write", "guest 4k write, depth 1, mean", _mean(1.2, 1.5), rw="randwrite", depth=1
    ),
    _guest("latency-read", "guest 4k read, depth 1, mean", _mean(1.2, 1.5), rw="randread", depth=1),
    _guest(
        "seq-write",
        "guest 256k sequential write, depth 8",
        (Figure("mib_per_s", "MiB/s", {QSD: Goal(1.2, 1.5)}),),
        rw="write",
        block_bytes=256 << 10,
        depth=8,
    ),
    _guest(
        "seq-read",
        "guest 256k sequential read, depth 8",
        (Figure("mib_per_s", "MiB/s", {QSD: Goal(1.2, 1.5)}),),
        rw="read",
        block_bytes=256 << 10,
        depth=8,
    ),
    Row(
        "mirroring",
        "guest 4k random write, depth 16, while a full mirror runs",
        measures.while_mirroring,
        (QSD,),
        (
            Figure("iops", "IOPS", {QSD: Goal(2.5, 4.0)}),
            Figure("speed", "MiB/s of the mirror", {QSD: Goal(1.0, 1.0)}),
        ),
    ),
    Row(
        "mirroring-p99",
        "guest 4k random write at 2,000 IOPS while full mirrors run",
        partial(measures.while_mirroring, rate=2000),
        (QSD,),
        (Figure("p99", "us p99", {QSD: Goal(1.0, 1.5)}, less_is_better=True),),
    ),
    Row(
        "write-blocking",
        "guest 4k random write, depth 16, write-blocking mirror",
        measures.write_blocking,
        (QSD,),
        _iops(1.0, 1.5),
    ),
    Row(
        "after-pivot",
        "guest 4k random, depth 16, after the pivot",
        measures.after_pivot,
        (QSD,),
        (
            Figure("writes", "write IOPS", {QSD: Goal(1.0, 1.5)}),
            Figure("reads", "read IOPS", {QSD: Goal(1.0, 1.5)}),
        ),
    ),
    Row(
        "state-dir",
        "guest 4k random write, depth 16, mirrored, with a state directory",
        measures.with_state,
        ("without",),
        (
            Figure("spread", "IOPS, whole disk", {}),
            Figure("place", "IOPS, in 8 MiB", {}),
        ),
    ),
    *_copies(),
    Row(
        "sparse",
        "16 TiB sparse disk with 64 MiB of data",
        measures.sparse,
        (QSD,),
        (
            Figure("seconds", "s to READY", {QSD: Goal(10, 50)}, less_is_better=True),
            Figure("memory", "MiB peak RSS", {}, less_is_better=True, must_be_under=400),
        ),
    ),
    Row(
        "pivot",
        "longest guest write over a pivot, at 2,000 IOPS",
        measures.pivot,
        (QSD,),
        (Figure("longest", "ms", {QSD: Goal(1.0, 2.0)}, less_is_better=True),),
    ),
    *_sent(),
    *_felt(),
    *_idle(),
    *_points(),
    *(
        Row(
            name,
            f"bytes written to the target, {title}, 4,000 IOPS",
            partial(measures.amplification, distribution=distribution),
            (QSD,),
            (Figure("written", "MiB", {QSD: Goal(1.0, 2.0)}, less_is_better=True),),
        )
        for name, title, distribution in (
            ("zipf", "Zipf(1.2)", "zipf:1.2"),
            ("hot-spot", "90 % of writes in 1 % of the disk", "zoned:90/1:10/99"),
        )
    ),
    *(
        Row(
            f"disks-{count}",
            f"4 disks mirrored at once, {count} server{'s' * (count > 1)}",
            partial(measures.several_disks, servers=count),
            (QSD,),
            _seconds({QSD: Goal(1.0, 2.0)}),
        )
        for count in (1, 4)
    ),
    Row(
        "direct",
        "O_DIRECT, 4k random read, depth 16",
        partial(measures.guest, rw="randread", is_direct=True),
        (QSD,),
        _iops(0.8, 1.0),
    ),
    Row(
        "delayed",
        "full copy over 20 ms round trip",
        measures.delayed_copy,
        (QSD, NBDCOPY),
        _seconds({QSD: Goal(1.0, 2.0)}),
    ),
)
