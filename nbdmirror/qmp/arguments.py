"""Types of arguments that several commands have, or that are long: enums, addresses, nodes.

Names, types and defaults are QEMU's (qapi/block-core.json, job.json). Names that QEMU does not have
begin with `x-nbdmirror-`.
"""

from __future__ import annotations

from nbdmirror.qmp.schema import (
    BOOL,
    STR,
    UINT32,
    Enum,
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

# The options of every node in QEMU. The job's own arguments decide how a target is written to and
# zeroed, so only read-only has an effect.
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
