"""The types of queries' results and of events, as data: for query-qmp-schema, and for tests, which
compare real answers with them.

Names and types are QEMU's (qapi/block-core.json, job.json, control.json). Names that QEMU does not
have begin with `x-nbdmirror-` or `X_NBDMIRROR_`.
"""

from __future__ import annotations

from nbdmirror.disk.latency import Held, Kind
from nbdmirror.mirror.deadline import Done, Kept
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.waits import Cause
from nbdmirror.qmp.arguments import (
    COPY_MODE,
    DETECT_ZEROES,
    JOB_TYPE,
    MAY,
    ON_DEADLINE,
    ON_ERROR,
    SYNC,
)
from nbdmirror.qmp.schema import (
    BOOL,
    INT,
    NUMBER,
    STR,
    Array,
    Enum,
    Member,
    Struct,
    named,
    optional,
    struct,
)

_IO_STATUS = Enum("BlockDeviceIoStatus", ("ok", "failed", "nospace"))
_JOB_STATUS = Enum("JobStatus", tuple(map(str, JobStatus)))
_OPERATION = Enum("IoOperationType", ("read", "write"))
_ACTION = Enum("BlockErrorAction", ("ignore", "report", "stop"))

_BLOCK_JOB_INFO_MEMBERS = named(
    type=JOB_TYPE,
    device=STR,
    len=INT,
    offset=INT,
    busy=BOOL,
    paused=BOOL,
    speed=INT,
    io_status=_IO_STATUS,
    ready=BOOL,
    status=_JOB_STATUS,
    auto_finalize=BOOL,
    auto_dismiss=BOOL,
    error=optional(STR),
)

_POINTS = struct(
    "JobPoints",
    interval_s=NUMBER,
    auto_point=BOOL,
    begun=BOOL,
    keep_s=optional(NUMBER),
    kept=optional(BOOL),
    rpo_s=optional(NUMBER),
    in_place_since_s=optional(NUMBER),
    late_cuts=optional(INT),
    journal_bytes=optional(INT),
    journal_used_bytes=optional(INT),
    journal_point_bytes=optional(INT),
    image_point=optional(INT),
    applier_silent_s=optional(NUMBER),
    journal_enough=optional(BOOL),
    journal_lasts_s=optional(NUMBER),
    change_bytes_per_s=optional(INT),
    points=optional(INT),
    reaches_s=optional(NUMBER),
    sequence=optional(INT),
    time_s=optional(NUMBER),
    bytes=optional(INT),
    name=optional(STR),
    group=optional(INT),
    awaited=optional(
        struct(
            "AwaitedPoint",
            sequence=INT,
            time_s=NUMBER,
            bytes=INT,
            name=optional(STR),
            group=optional(INT),
            since_s=NUMBER,
        )
    ),
)

_DEADLINE = struct(
    "JobDeadline",
    at_s=NUMBER,
    left_s=NUMBER,
    on_deadline=ON_DEADLINE,
    outlook=Enum("DeadlineOutlook", tuple(map(str, Kept))),
)

POINT_ACKNOWLEDGED = struct("PointAcknowledged", repeated=BOOL)

POINT_TAKEN = struct("PointTaken", sequence=INT, time_s=NUMBER, group=optional(INT))

_MIRROR_INFO = struct(
    "BlockJobInfoMirror",
    actively_synced=BOOL,
    x_nbdmirror_points=optional(_POINTS),
    x_nbdmirror_deadline=optional(_DEADLINE),
)

BLOCK_JOB_INFO = Struct(
    "BlockJobInfo",
    _BLOCK_JOB_INFO_MEMBERS,
    tag="type",
    branches={"mirror": _MIRROR_INFO},
)

JOB_INFO = struct(
    "JobInfo",
    id=STR,
    type=JOB_TYPE,
    status=_JOB_STATUS,
    current_progress=INT,
    total_progress=INT,
    error=optional(STR),
)

_DIRTY_INFO = struct(
    "BlockDirtyInfo",
    name=optional(STR),
    count=INT,
    granularity=INT,
    recording=BOOL,
    busy=BOOL,
    persistent=BOOL,
)

_IO_LIMITS = struct(
    "BlockLimitsInfo",
    request_alignment=INT,
    opt_transfer=optional(INT),
    max_transfer=optional(INT),
    min_mem_alignment=INT,
    opt_mem_alignment=INT,
    max_iov=INT,
)

_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")

NODE_INFO = Struct(
    "BlockDeviceInfo",
    {
        **named(
            node_name=STR,
            active=BOOL,
            children=Array(struct("BlockdevChild", child=STR, node_name=STR)),
            drv=STR,
            file=STR,
            ro=BOOL,
            encrypted=BOOL,
            image=struct(
                "ImageInfo", filename=STR, format=STR, virtual_size=INT, limits=optional(_IO_LIMITS)
            ),
            cache=struct("BlockdevCacheInfo", writeback=BOOL, direct=BOOL, no_flush=BOOL),
            dirty_bitmaps=optional(Array(_DIRTY_INFO)),
        ),
        # QEMU's names with `_`, from before QEMU used `-`.
        "detect_zeroes": Member(DETECT_ZEROES),
        "backing_file_depth": Member(INT),
        "write_threshold": Member(INT),
        **dict.fromkeys(_LIMITS, Member(INT)),
    },
)

BLOCK_INFO = struct(
    "BlockInfo",
    device=STR,
    type=STR,
    removable=BOOL,
    locked=BOOL,
    io_status=_IO_STATUS,
    inserted=NODE_INFO,
)

EXPORT_INFO = struct(
    "BlockExportInfo",
    id=STR,
    type=Enum("BlockExportType", ("nbd",)),
    node_name=STR,
    shutting_down=BOOL,
)

_BY_CAUSE = Struct("TimeByCause", {cause: Member(NUMBER) for cause in map(str, Cause)})

_WAITS = struct(
    "JobWaits",
    now=Enum("WaitCause", tuple(map(str, Cause))),
    last_minute=_BY_CAUSE,
    since_start=_BY_CAUSE,
    seconds=_BY_CAUSE,
)

JOB_STATUS = Struct(
    "JobStatusInfo",
    {
        **_BLOCK_JOB_INFO_MEMBERS,
        **_MIRROR_INFO.members,
        **named(target=STR, sync=SYNC, copy_mode=COPY_MODE, granularity=INT),
        **named(on_source_error=ON_ERROR, on_target_error=ON_ERROR, reconnect_delay_s=NUMBER),
        **named(dirty_bytes=INT, in_flight_bytes=INT, unflushed_bytes=INT),
        **named(copied_bytes=INT, written_bytes=INT),
        **named(sent_bytes=optional(INT), changed_bytes=optional(INT)),
        **named(again_bytes=INT, pause_ms=optional(NUMBER), quiesce_timeouts=INT),
        **named(max_pause_ms=optional(NUMBER), pause_predicted_ms=optional(NUMBER), may=MAY),
        **named(throttle_bytes_per_s=optional(INT), blocking_bytes=optional(INT)),
        **named(guests_wait_share=optional(NUMBER)),
        **named(
            ending=Enum("JobEnding", ("none", "complete", "cancel")),
            ending_for_s=optional(NUMBER),
            last_error=optional(
                struct(
                    "JobError",
                    operation=_OPERATION,
                    action=_ACTION,
                    reason=STR,
                    ago_s=optional(NUMBER),
                ),
            ),
            target_connected=BOOL,
            journal=optional(STR),
            journal_connected=optional(BOOL),
            target_lost_for_s=optional(NUMBER),
            target_lost_reason=optional(STR),
            target_wait_left_s=optional(NUMBER),
            target_silent_for_s=optional(NUMBER),
            source_silent_for_s=optional(NUMBER),
            copy_bytes_per_s=optional(INT),
            zero_bytes_per_s=optional(INT),
            dirty_bytes_per_s=optional(INT),
            left_s=optional(NUMBER),
            left_s_min=optional(NUMBER),
            left_s_max=optional(NUMBER),
            lag_s=optional(NUMBER),
            falling_behind=BOOL,
            waits=_WAITS,
            explanation=Array(STR),
        ),
    },
)

_LAST_JOB = struct(
    "LastJobInfo",
    id=STR,
    target=STR,
    result=Enum("JobResult", ("completed", "cancelled", "failed")),
    reason=optional(STR),
    pivoted=BOOL,
    sync=optional(STR),
    pause_ms=optional(NUMBER),
    ended_at_s=NUMBER,
)

_BUCKETS = _CELLS = Array(INT)

_REQUEST_TIMES = struct(
    "RequestTimes",
    kind=Enum("RequestKind", tuple(map(str, Kind))),
    seconds=NUMBER,
    buckets=_BUCKETS,
    own_seconds=NUMBER,
    own_buckets=_BUCKETS,
)

_HELD_TIMES = struct(
    "HeldTimes",
    cause=Enum("HeldCause", tuple(map(str, Held))),
    seconds=NUMBER,
    buckets=_BUCKETS,
)

DISK_STATUS = struct(
    "DiskStatus",
    name=STR,
    source=STR,
    size=INT,
    read_only=BOOL,
    connected=BOOL,
    lost_reason=optional(STR),
    lasting=BOOL,
    target_only=optional(STR),
    problem=optional(STR),
    state_problem=optional(STR),
    point_gone=optional(STR),
    bitmaps=Array(_DIRTY_INFO),
    requests=Array(_REQUEST_TIMES),
    held=Array(_HELD_TIMES),
    jobs=Array(JOB_STATUS),
    last_job=optional(_LAST_JOB),
)

STATUS = struct(
    "Status",
    package=STR,
    pid=INT,
    started_at_s=NUMBER,
    disks=Array(DISK_STATUS),
    state_error=optional(STR),
)

JOB_MAP = struct(
    "JobMap", lengths=_CELLS, dirty=_CELLS, in_flight=_CELLS, unflushed=_CELLS, zero=_CELLS
)

_ENDED = named(type=JOB_TYPE, device=STR, len=INT, offset=INT, speed=INT)

_SINCE_READY = {
    **{f"x-nbdmirror-{what}-bytes": Member(INT, optional=True) for what in ("sent", "changed")},
    "x-nbdmirror-lag-s": Member(NUMBER, optional=True),
}

EVENTS: dict[str, Struct] = {
    "BLOCK_JOB_CANCELLED": Struct("BlockJobCancelled", {**_ENDED, **_SINCE_READY}),
    "BLOCK_JOB_COMPLETED": Struct(
        "BlockJobCompleted", {**_ENDED, **_SINCE_READY, **named(error=optional(STR))}
    ),
    "BLOCK_JOB_ERROR": struct(
        "BlockJobError",
        device=STR,
        operation=_OPERATION,
        action=_ACTION,
    ),
    "BLOCK_JOB_PENDING": struct("BlockJobPending", type=JOB_TYPE, id=STR),
    "BLOCK_JOB_READY": Struct("BlockJobReady", _ENDED),
    "JOB_STATUS_CHANGE": struct("JobStatusChange", id=STR, status=_JOB_STATUS),
    "X_NBDMIRROR_APPLIER": struct("PointsApplier", device=STR, id=STR, silent_s=NUMBER, works=BOOL),
    "X_NBDMIRROR_CONVERGENCE": struct(
        "Convergence",
        device=STR,
        id=STR,
        rung=MAY.of,
        reason=STR,
        bytes_per_s=optional(INT),
        hot_bytes=optional(INT),
    ),
    "X_NBDMIRROR_DEADLINE": struct(
        "DeadlinePassed",
        device=STR,
        id=STR,
        action=ON_DEADLINE,
        done=Enum("DeadlineDone", tuple(map(str, Done))),
        reason=STR,
    ),
    "X_NBDMIRROR_IN_PLACE": struct("PointsInPlace", device=STR, id=STR, since_s=NUMBER, bytes=INT),
    "X_NBDMIRROR_JOURNAL": struct(
        "JournalEnough",
        device=STR,
        id=STR,
        left_bytes=INT,
        point_bytes=INT,
        lasts_s=optional(NUMBER),
        enough=BOOL,
    ),
    "X_NBDMIRROR_KEEP": struct(
        "PointsKept", device=STR, id=STR, keep_s=NUMBER, reaches_s=NUMBER, kept=BOOL
    ),
    "X_NBDMIRROR_PIVOTED": struct("Pivoted", device=STR, id=STR, pause_ms=NUMBER),
    "X_NBDMIRROR_POINT": struct(
        "PointCommitted",
        device=STR,
        id=STR,
        sequence=INT,
        time_s=NUMBER,
        bytes=INT,
        lag_s=NUMBER,
        group=optional(INT),
        name=optional(STR),
        ack=optional(BOOL),
    ),
    "X_NBDMIRROR_POINT_BROKEN": struct(
        "PointBroken", device=STR, id=STR, reason=STR, name=optional(STR)
    ),
    "X_NBDMIRROR_QUIESCE_TIMEOUT": Struct("QuiesceTimeout", _ENDED),
    "X_NBDMIRROR_RPO": struct(
        "RecoveryPointObjective", device=STR, id=STR, rpo_s=NUMBER, lag_s=NUMBER, kept=BOOL
    ),
    "X_NBDMIRROR_SOURCE_CHANGED": struct("SourceChanged", device=STR, reason=STR),
    "X_NBDMIRROR_STATE_ERROR": struct("StateError", reason=STR),
    "X_NBDMIRROR_SIZES_DIFFER": struct(
        "SizesDiffer", device=STR, id=STR, size=INT, target_size=INT
    ),
    "X_NBDMIRROR_TARGET_BACK": struct("TargetBack", device=STR, id=STR, lost_for_s=NUMBER),
    "X_NBDMIRROR_TARGET_LOST": struct(
        "TargetLost", device=STR, id=STR, target=STR, wait_s=optional(NUMBER)
    ),
}
