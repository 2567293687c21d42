"""NAME.json: the disk, its mirror and its persistent bitmaps, as they are kept in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from nbdmirror.state.disk_file import DiskIdentity
from nbdmirror.state.json_record import (
    COUNT,
    FLAG,
    ID,
    INTEGER,
    NUMBER,
    POSITIVE,
    POWER_OF_2,
    TEXT,
    Key,
    ListOf,
    Object,
    OrNull,
    dump,
    load,
    one_of,
)
from nbdmirror.state.sealed_files import seal, unseal

KIND_DEFINITION = "disk"

_POLICY = one_of("report", "ignore", "enospc", "stop", "auto")
_ON_DEADLINE = one_of("report", "cancel", "complete")


@dataclass(frozen=True, slots=True)
class BitmapRecord:
    """A persistent bitmap: QEMU's block-dirty-bitmap-add. `key` names its content in the other
    files, and is never reused."""

    name: Annotated[str, Key("name", TEXT)]
    granularity: Annotated[int, Key("granularity", POWER_OF_2)]
    is_recording: Annotated[bool, Key("is_recording", FLAG)]
    key: Annotated[str, Key("key", TEXT)]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """The options of a mirror: options.MirrorOptions, field by field."""

    job_id: Annotated[str, Key("job_id", TEXT)]
    sync: Annotated[str, Key("sync", one_of("full", "top", "none", "incremental", "bitmap"))]
    copy_mode: Annotated[str, Key("copy_mode", one_of("background", "write-blocking", "points"))]
    granularity: Annotated[int, Key("granularity", COUNT)]
    buffer_bytes: Annotated[int, Key("buffer_bytes", POSITIVE)]
    speed_bytes_per_s: Annotated[int, Key("speed_bytes_per_s", COUNT)]
    on_source_error: Annotated[str, Key("on_source_error", _POLICY)]
    on_target_error: Annotated[str, Key("on_target_error", _POLICY)]
    unmap: Annotated[bool, Key("unmap", FLAG)]
    reconnect_delay_s: Annotated[float, Key("reconnect_delay_s", NUMBER)]
    target_is_zero: Annotated[bool, Key("target_is_zero", FLAG)]
    clear_bitmap: Annotated[bool, Key("clear_bitmap", FLAG)]
    cluster_bytes: Annotated[int, Key("cluster_bytes", COUNT)]
    allow_larger: Annotated[bool, Key("allow_larger", FLAG)]
    auto_finalize: Annotated[bool, Key("auto_finalize", FLAG)]
    auto_dismiss: Annotated[bool, Key("auto_dismiss", FLAG)]
    max_pause_s: Annotated[float | None, Key("max_pause_s", OrNull(NUMBER))] = None
    may: Annotated[tuple[str, ...], Key("may", ListOf(TEXT))] = ()
    deadline_at_s: Annotated[float | None, Key("deadline_at_s", OrNull(NUMBER))] = None
    on_deadline: Annotated[str, Key("on_deadline", _ON_DEADLINE)] = "report"


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """The target's announced export: handshake.ExportInfo, field by field."""

    size: Annotated[int, Key("size", COUNT)]
    read_only: Annotated[bool, Key("read_only", FLAG)]
    can_flush: Annotated[bool, Key("can_flush", FLAG)]
    can_fua: Annotated[bool, Key("can_fua", FLAG)]
    can_zero: Annotated[bool, Key("can_zero", FLAG)]
    can_fast_zero: Annotated[bool, Key("can_fast_zero", FLAG)]
    can_trim: Annotated[bool, Key("can_trim", FLAG)]
    can_cache: Annotated[bool, Key("can_cache", FLAG)]
    can_multi_conn: Annotated[bool, Key("can_multi_conn", FLAG)]
    can_extents: Annotated[bool, Key("can_extents", FLAG)]
    can_depth: Annotated[bool, Key("can_depth", FLAG)]
    minimum: Annotated[int, Key("minimum", POSITIVE)]
    preferred: Annotated[int, Key("preferred", COUNT)]
    maximum: Annotated[int, Key("maximum", POSITIVE)]


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """A mirror's target: nodes.Node."""

    name: Annotated[str, Key("name", TEXT)]
    uri: Annotated[str, Key("uri", TEXT)]
    is_owned: Annotated[bool, Key("is_owned", FLAG)]
    reconnect_delay_s: Annotated[float, Key("reconnect_delay_s", NUMBER)]
    announced: Annotated[ExportRecord, Key("announced", Object(ExportRecord))]
    open_timeout_s: Annotated[float | None, Key("open_timeout_s", OrNull(NUMBER))] = None
    """None: the default."""


@dataclass(frozen=True, slots=True)
class PointsRecord:
    """What a mirror with points has beside other mirrors: points_checks.PointsOptions."""

    key: Annotated[str, Key("key", TEXT)]
    """Names what is in no committed point, in the other files."""
    granularity: Annotated[int, Key("granularity", POWER_OF_2)]
    journal: Annotated[TargetRecord | None, Key("journal", OrNull(Object(TargetRecord)))]
    """None: points are snapshots of the target, which somebody else makes."""
    disk_id: Annotated[str, Key("disk_id", ID)]
    """The disk's ID in the journal, in hexadecimal digits."""
    has_begun: Annotated[bool, Key("has_begun", FLAG)]
    """The first copy has ended: from now on the journal says what the image is."""
    interval_s: Annotated[float, Key("interval_s", NUMBER)]
    keep_s: Annotated[float, Key("keep_s", NUMBER)]
    rpo_s: Annotated[float, Key("rpo_s", NUMBER)]
    store_bytes: Annotated[int, Key("store_bytes", COUNT)]
    spill_bytes: Annotated[int, Key("spill_bytes", COUNT)]
    breaks_guest_writes: Annotated[bool, Key("breaks_guest_writes", FLAG)]
    in_place: Annotated[bool, Key("in_place", FLAG)]
    group: Annotated[str, Key("group", TEXT)] = ""
    """The jobs with the same text make their points together; "": this job alone."""
    announced: Annotated[int, Key("announced", COUNT)] = 0
    """Without a journal: the number of the last point that was announced; 0: none was."""
    acknowledged: Annotated[int, Key("acknowledged", COUNT)] = 0
    """The same of the last one that was acknowledged."""
    acknowledged_ns: Annotated[int, Key("acknowledged_ns", COUNT)] = 0
    """The wall time of that point's cut, in nanoseconds since 1970."""


@dataclass(frozen=True, slots=True)
class MirrorRecord:
    """A mirror that continues at the next start."""

    key: Annotated[str, Key("key", TEXT)]
    granularity: Annotated[int, Key("granularity", POWER_OF_2)]
    is_scanned: Annotated[bool, Key("is_scanned", FLAG)]
    """The dirty bitmap is complete. If not, the source's extents must be queried first."""
    is_paused: Annotated[bool, Key("is_paused", FLAG)]
    """Paused by the user."""
    bitmap: Annotated[str, Key("bitmap", TEXT)]
    """The bitmap that the mirror started from, or ""."""
    job: Annotated[JobRecord, Key("job", Object(JobRecord))]
    node: Annotated[TargetRecord, Key("node", Object(TargetRecord))]
    points: Annotated[PointsRecord | None, Key("points", OrNull(Object(PointsRecord)))] = None


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """NAME.json."""

    disk_id: Annotated[str, Key("disk_id", ID)]
    identity: Annotated[DiskIdentity, Key("identity", Object(DiskIdentity))]
    mirror: Annotated[MirrorRecord | None, Key("mirror", OrNull(Object(MirrorRecord)))]
    bitmaps: Annotated[tuple[BitmapRecord, ...], Key("bitmaps", ListOf(Object(BitmapRecord)))]
    memory: Annotated[str, Key("memory", TEXT)] = ""
    """The folder of shared_memory.ShmDirectory, while a server runs."""
    clean_mtime_ns: Annotated[int | None, Key("clean_mtime_ns", OrNull(INTEGER))] = None
    """After an orderly end: the time of change of the disk's file; 0 without a file. None while a
    server runs."""

    def to_bytes(self) -> bytes:
        return seal(KIND_DEFINITION, dump(self))

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises StateError."""
        return load(cls, unseal(KIND_DEFINITION, content))
