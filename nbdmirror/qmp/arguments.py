"""Types of arguments that several commands have, or that are long: enums, addresses, nodes.

Names, types and defaults are QEMU's (qapi/block-core.json, job.json). Names that QEMU does not have
begin with `x-nbdmirror-`.
"""

from __future__ import annotations

import time

from nbdmirror.errors import CommandError
from nbdmirror.limits import DEADLINE_S_MAX, MAX_PAUSE_MS_MAX
from nbdmirror.mirror.ladder import Rung
from nbdmirror.mirror.options import OnDeadline
from nbdmirror.qmp.schema import (
    BOOL,
    STR,
    UINT32,
    Array,
    Enum,
    StringOr,
    Struct,
    named,
    optional,
    struct,
)

ON_ERROR = Enum("BlockdevOnError", ("report", "ignore", "enospc", "stop", "auto"))
SYNC = Enum("MirrorSyncMode", ("top", "full", "none", "incremental", "bitmap"))
COPY_MODE = Enum("MirrorCopyMode", ("background", "write-blocking", "points"))
MAY = Array(Enum("MirrorMay", tuple(map(str, Rung))))
ON_DEADLINE = Enum("MirrorOnDeadline", tuple(map(str, OnDeadline)))
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


def max_pause_s(max_pause_ms: int) -> float | None:
    """x-nbdmirror-max-pause in seconds; None for 0, the default. Raises CommandError."""
    if max_pause_ms > MAX_PAUSE_MS_MAX:
        raise CommandError(
            f"Parameter 'x-nbdmirror-max-pause' expects a value in range [0, {MAX_PAUSE_MS_MAX}]"
        )
    return max_pause_ms / 1000 or None


def deadline_at_s(deadline_s: float) -> float | None:
    """x-nbdmirror-deadline, which begins now, in seconds since 1970; None for 0, the default.
    Raises CommandError."""
    if not 0 <= deadline_s <= DEADLINE_S_MAX:
        raise CommandError(
            f"Parameter 'x-nbdmirror-deadline' expects a value in range [0, {DEADLINE_S_MAX}]"
        )
    return round(time.time() + deadline_s, 3) if deadline_s else None


def on_deadline(given: str | None, at_s: float | None) -> OnDeadline:
    """x-nbdmirror-on-deadline of a job with this deadline. Raises CommandError."""
    if given is not None and at_s is None:
        raise CommandError("Parameter 'x-nbdmirror-on-deadline' needs 'x-nbdmirror-deadline'")
    return OnDeadline.REPORT if given is None else OnDeadline(given)
