"""Records of a state directory, of any content: strategies for Hypothesis, and samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from nbdmirror.state.bitmap_snapshot import SnapshotHead
from nbdmirror.state.disk_file import DiskIdentity
from nbdmirror.state.disk_record import (
    BitmapRecord,
    DiskRecord,
    ExportRecord,
    JobRecord,
    MirrorRecord,
    PointsRecord,
    TargetRecord,
)
from nbdmirror.state.job_results import Result
from nbdmirror.state.json_record import (
    COUNT,
    FLAG,
    ID,
    INTEGER,
    NUMBER,
    POSITIVE,
    POWER_OF_2,
    TEXT,
    Kind,
    ListOf,
    MapOf,
    Member,
    Object,
    OrNull,
    members,
)
from nbdmirror.state.recovery import PivotRecord

FILES: dict[str, type[Any]] = {
    "NAME.json": DiskRecord,
    "NAME.bitmaps": SnapshotHead,
    "NAME.pivoted": PivotRecord,
    "NAME.last": Result,
}
"""The files that hold JSON, and the record of each."""

HUGE = 2**64 - 1
"""The number of an inode, or of a device, may be as large."""

_PLAIN: dict[Kind, st.SearchStrategy[Any]] = {
    TEXT: st.text(),  # not of surrogates alone: paths are any bytes, below
    ID: st.text("0123456789abcdef", min_size=32, max_size=32),
    FLAG: st.booleans(),
    COUNT: st.integers(0, HUGE),
    POSITIVE: st.integers(1, HUGE),
    INTEGER: st.integers(-HUGE, HUGE),
    POWER_OF_2: st.integers(0, 62).map(lambda shift: 1 << shift),
    NUMBER: st.floats(0, allow_infinity=False, allow_nan=False) | st.integers(0, HUGE),
}
_PLAIN[TEXT] |= st.binary().map(lambda path: path.decode(errors="surrogateescape"))


def values(kind: Kind) -> st.SearchStrategy[Any]:
    """What a field of this kind may hold."""
    if isinstance(kind, OrNull):
        return st.none() | values(kind.kind)
    if isinstance(kind, Object):
        return records(kind.type)
    if isinstance(kind, ListOf):
        return st.lists(values(kind.kind), max_size=3).map(tuple)
    if isinstance(kind, MapOf):
        return st.dictionaries(st.text(), values(kind.kind), max_size=3)
    if kind in _PLAIN:
        return _PLAIN[kind]
    return st.sampled_from(kind.expected.removeprefix("one of ").split(", "))


def records(type_: Any) -> st.SearchStrategy[Any]:
    return st.builds(type_, **{one.field: values(one.key.kind) for one in members(type_)})


JOB = JobRecord(
    job_id="j", sync="full", copy_mode="background", granularity=0, buffer_bytes=1 << 24,
    speed_bytes_per_s=0, on_source_error="report", on_target_error="stop", unmap=True,
    reconnect_delay_s=0.5, target_is_zero=False, clear_bitmap=True, cluster_bytes=0,
    allow_larger=False, auto_finalize=True, auto_dismiss=True,
)  # fmt: skip
EXPORT = ExportRecord(
    size=4096, read_only=False, can_flush=True, can_fua=True, can_zero=True, can_fast_zero=True,
    can_trim=True, can_cache=True, can_multi_conn=True, can_extents=True, can_depth=False,
    minimum=1, preferred=4096, maximum=1 << 25,
)  # fmt: skip
TARGET = TargetRecord("t", "nbd://b/vda", False, 0.5, EXPORT, 60.0)
MIRROR = MirrorRecord("mirror-1", 512, True, False, "", JOB, TARGET)
POINTS = PointsRecord(
    "points-1", 4096, TARGET, "0" * 32, True, 1.0, 60.0, 5.0, 1 << 26, 0, True, False
)
IDENTITY = DiskIdentity("/srv/disk.img", 4096, 5, 9, "b", "f", 7, 3)
SAMPLES: dict[str, Any] = {
    "NAME.json": DiskRecord(
        "0" * 32,
        IDENTITY,
        replace(MIRROR, points=POINTS),
        (BitmapRecord("b", 512, True, "bitmap-1"),),
        "/dev/shm/x",
        7,
    ),
    "NAME.bitmaps": SnapshotHead("0" * 32, 1.5, {"bitmap-1": 3}, 7, 5),
    "NAME.pivoted": PivotRecord("nbd://b/vda", (IDENTITY,), 1.5, 4096),
    "NAME.last": Result("j", "nbd://b/vda", "completed", True, "", 1.5, 0.25, "none"),
}
"""One of each, with something in each field."""


# All keys of all files.

Steps = tuple[str | int, ...]
Place = tuple[Steps, Member]
"""How to get from a file's object to one of its keys, and what that is."""


def places(type_: type, steps: Steps = ()) -> Iterator[Place]:
    """All keys of a record, and of those in it. Of lists the first element."""
    for member in members(type_):
        here = (*steps, member.key.name)
        yield here, member
        kind = member.key.kind
        if isinstance(kind, OrNull):
            kind = kind.kind
        if isinstance(kind, ListOf):
            here, kind = (*here, 0), kind.kind
        if isinstance(kind, Object):
            yield from places(kind.type, here)


PLACES = [(file, *place) for file, type_ in FILES.items() for place in places(type_)]


def path_of(steps: Steps) -> str:
    """As errors name it."""
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in steps)[1:]
