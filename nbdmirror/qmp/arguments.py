"""The commands' arguments as data: one table, from which they are checked and documented.

Names, types and defaults are QEMU's (qapi/block-core.json, job.json); what QEMU has no name for
begins with `x-nbdmirror-`.
"""

from __future__ import annotations

from nbdmirror.qmp.schema import (
    BOOL,
    INT,
    NOTHING,
    STR,
    UINT32,
    Array,
    Enum,
    Member,
    StringOr,
    Struct,
    named,
    optional,
    struct,
)

ON_ERROR = Enum("BlockdevOnError", ("report", "ignore", "enospc", "stop", "auto"))
SYNC = Enum("MirrorSyncMode", ("top", "full", "none", "incremental", "bitmap"))
COPY_MODE = Enum("MirrorCopyMode", ("background", "write-blocking"))
BITMAP_MODE = Enum("BitmapSyncMode", ("on-success", "never", "always"))
DETECT_ZEROES = Enum("BlockdevDetectZeroesOptions", ("off", "on", "unmap"))
JOB_TYPE = Enum("JobType", ("mirror",))
NEW_IMAGE_MODE = Enum("NewImageMode", ("existing", "absolute-paths"))

ADDRESS = Struct(
    "SocketAddress",
    named(type=Enum("SocketAddressType", ("inet", "unix"))),
    tag="type",
    branches={
        "inet": struct("InetSocketAddress", host=STR, port=STR),
        "unix": struct("UnixSocketAddress", path=STR),
    },
)

# What every node has in QEMU. A target is written to and zeroed as the job's own arguments say, so
# that of these only read-only means something.
_NODE = named(
    node_name=optional(STR),
    active=optional(BOOL),
    discard=optional(Enum("BlockdevDiscardOptions", ("ignore", "unmap"))),
    cache=optional(struct("BlockdevCacheOptions", direct=optional(BOOL), no_flush=optional(BOOL))),
    read_only=optional(BOOL),
    auto_read_only=optional(BOOL),
    force_share=optional(BOOL),
    detect_zeroes=optional(DETECT_ZEROES),
)

_NBD = struct(
    "BlockdevOptionsNbd",
    server=ADDRESS,
    export=optional(STR),
    tls_creds=optional(STR),
    x_nbdmirror_tls_username=optional(STR),
    open_timeout=optional(UINT32),
    reconnect_delay=optional(UINT32),
)

_FILE = Struct(
    "BlockdevOptions",
    {**named(driver=Enum("BlockdevDriver", ("nbd",))), **_NODE},
    tag="driver",
    branches={"nbd": _NBD},
)

NODE = Struct(
    "BlockdevOptions",
    {**named(driver=Enum("BlockdevDriver", ("nbd", "raw"))), **_NODE},
    tag="driver",
    branches={
        "nbd": _NBD,
        "raw": struct("BlockdevOptionsRaw", file=StringOr(_FILE, "BlockdevRef")),
    },
)

_MIRROR: dict[str, Member] = named(
    job_id=optional(STR),
    device=STR,
    target=STR,
    sync=SYNC,
    speed=optional(INT),
    granularity=optional(UINT32),
    buf_size=optional(INT),
    on_source_error=optional(ON_ERROR),
    on_target_error=optional(ON_ERROR),
    unmap=optional(BOOL),
    copy_mode=optional(COPY_MODE),
    bitmap=optional(STR),
    bitmap_mode=optional(BITMAP_MODE),
    target_is_zero=optional(BOOL),
    replaces=optional(STR),
    auto_finalize=optional(BOOL),
    auto_dismiss=optional(BOOL),
    x_nbdmirror_allow_larger_target=optional(BOOL),
    x_nbdmirror_target_cluster_size=optional(UINT32),
)

_DEVICE = struct("BlockJob", device=STR)
_ID = struct("Job", id=STR)
_FLAT = struct("Flat", flat=optional(BOOL))

_BITMAP = struct("BlockDirtyBitmap", node=STR, name=STR)
_BITMAP_ADD = struct(
    "BlockDirtyBitmapAdd",
    node=STR,
    name=STR,
    granularity=optional(UINT32),
    persistent=optional(BOOL),
    disabled=optional(BOOL),
)
_BITMAP_MERGE = struct(
    "BlockDirtyBitmapMerge",
    node=STR,
    target=STR,
    bitmaps=Array(StringOr(_BITMAP, "BlockDirtyBitmapOrStr")),
)
_BLOCKDEV_MIRROR = Struct("BlockdevMirror", {**_MIRROR, **named(filter_node_name=optional(STR))})

_ACTIONS = {
    "abort": NOTHING,
    "block-dirty-bitmap-add": _BITMAP_ADD,
    "block-dirty-bitmap-remove": _BITMAP,
    "block-dirty-bitmap-clear": _BITMAP,
    "block-dirty-bitmap-enable": _BITMAP,
    "block-dirty-bitmap-disable": _BITMAP,
    "block-dirty-bitmap-merge": _BITMAP_MERGE,
    "blockdev-mirror": _BLOCKDEV_MIRROR,
    "job-complete": _ID,
    "block-job-complete": _DEVICE,
    "block-job-cancel": struct("BlockJobCancel", device=STR, force=optional(BOOL)),
}

_ACTION = Struct(
    "TransactionAction",
    named(type=Enum("TransactionActionKind", tuple(_ACTIONS))),
    tag="type",
    branches={name: struct(name, data=members) for name, members in _ACTIONS.items()},
)

COMMANDS: dict[str, Struct] = {
    "blockdev-add": NODE,
    "blockdev-del": struct("BlockdevDel", node_name=STR),
    "blockdev-set-active": struct("BlockdevSetActive", node_name=optional(STR), active=BOOL),
    "query-named-block-nodes": _FLAT,
    "query-block": _FLAT,
    "query-block-exports": NOTHING,
    "blockdev-mirror": _BLOCKDEV_MIRROR,
    "drive-mirror": Struct(
        "DriveMirror",
        {
            **_MIRROR,
            **named(
                mode=optional(NEW_IMAGE_MODE),
                format=optional(STR),
                node_name=optional(STR),
                x_nbdmirror_reconnect_delay=optional(UINT32),
            ),
        },
    ),
    "query-block-jobs": NOTHING,
    "block-job-complete": _DEVICE,
    "block-job-cancel": struct("BlockJobCancel", device=STR, force=optional(BOOL)),
    "block-job-pause": _DEVICE,
    "block-job-resume": _DEVICE,
    "block-job-set-speed": struct("BlockJobSetSpeed", device=STR, speed=INT),
    "block-job-change": Struct(
        "BlockJobChangeOptions",
        named(id=STR, type=JOB_TYPE),
        tag="type",
        branches={"mirror": struct("BlockJobChangeOptionsMirror", copy_mode=COPY_MODE)},
    ),
    "block-job-finalize": _ID,
    "block-job-dismiss": _ID,
    "query-jobs": NOTHING,
    "job-complete": _ID,
    "job-cancel": _ID,
    "job-pause": _ID,
    "job-resume": _ID,
    "job-finalize": _ID,
    "job-dismiss": _ID,
    "block-dirty-bitmap-add": _BITMAP_ADD,
    "block-dirty-bitmap-remove": _BITMAP,
    "block-dirty-bitmap-clear": _BITMAP,
    "block-dirty-bitmap-enable": _BITMAP,
    "block-dirty-bitmap-disable": _BITMAP,
    "block-dirty-bitmap-merge": _BITMAP_MERGE,
    "transaction": struct(
        "Transaction",
        actions=Array(_ACTION),
        properties=optional(
            struct(
                "TransactionProperties",
                completion_mode=optional(Enum("ActionCompletionMode", ("individual", "grouped"))),
            )
        ),
    ),
    "query-commands": NOTHING,
    "query-qmp-schema": NOTHING,
    "query-version": NOTHING,
    "query-status": NOTHING,
    "quit": NOTHING,
    "x-nbdmirror-query-status": NOTHING,
}

DEPRECATED = {
    f"block-job-{verb}" for verb in ("complete", "pause", "resume", "finalize", "dismiss")
}
"""Commands that QEMU deprecates since 10.1, for job-complete and so on. Both are kept here."""
