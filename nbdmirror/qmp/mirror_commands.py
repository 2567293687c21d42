"""QMP's commands that start a mirror: blockdev-mirror and drive-mirror."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nbdmirror.disk.bitmap import check_granularity
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import CommandError, ConfigError
from nbdmirror.identity import socket_file
from nbdmirror.mirror.group import Group
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import BUFFER_BYTES_DEFAULT, CopyMode, MirrorOptions, Policy
from nbdmirror.names import default_job_id, is_wellformed_id
from nbdmirror.qmp.addresses import target_uri
from nbdmirror.qmp.arguments import (
    BITMAP_MODE,
    COPY_MODE,
    MAY,
    NEW_IMAGE_MODE,
    ON_DEADLINE,
    ON_ERROR,
    SYNC,
    deadline_at_s,
    max_pause_s,
    on_deadline,
)
from nbdmirror.qmp.command import CommandTable, ask_loop
from nbdmirror.qmp.journals import journal_node, open_journal
from nbdmirror.qmp.opening import check_uri, in_thread, open_device, open_timeout_s
from nbdmirror.qmp.points_arguments import POINTS_MEMBERS, PointsArguments, points_options
from nbdmirror.qmp.saving import mirrors_saved
from nbdmirror.qmp.schema import BOOL, INT, NUMBER, STR, UINT32, Member, Struct, named, optional
from nbdmirror.server.bitmaps import Change, NamedBitmap, Place
from nbdmirror.server.nodes import Node, NodeOptions
from nbdmirror.server.points_checks import check_new_journal
from nbdmirror.server.server import Server

COMMANDS = CommandTable()

BUFFER_BYTES_MAX = 1 << 30
"""Most buffers of one mirror. QEMU allocates them when the job starts; nbdmirror allocates them
when a slow target needs them, beside the guests."""

JOB_ID_LENGTH_MAX = 255
"""The ID is in every event, and up to JOBS_MAX jobs are kept."""

_BITMAP_SYNCS = ("incremental", "bitmap")

_MIRROR: dict[str, Member] = (
    named(
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
    | POINTS_MEMBERS
    | named(
        x_nbdmirror_max_pause=optional(UINT32),
        x_nbdmirror_may=optional(MAY),
        x_nbdmirror_deadline=optional(NUMBER),
        x_nbdmirror_on_deadline=optional(ON_DEADLINE),
    )
)

_BLOCKDEV_MIRROR = Struct("BlockdevMirror", {**_MIRROR, **named(filter_node_name=optional(STR))})

_DRIVE_MIRROR = Struct(
    "DriveMirror",
    {
        **_MIRROR,
        **named(
            mode=optional(NEW_IMAGE_MODE),
            format=optional(STR),
            node_name=optional(STR),
            x_nbdmirror_open_timeout=optional(UINT32),
            x_nbdmirror_reconnect_delay=optional(UINT32),
        ),
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorArguments(PointsArguments):
    """The arguments of both commands, with their defaults. None: not given."""

    device: str
    target: str
    job_id: str | None = None
    speed: int = 0
    granularity: int = 0
    buf_size: int = 0
    on_source_error: str = "report"
    on_target_error: str = "report"
    unmap: bool = True
    bitmap: str | None = None
    bitmap_mode: str | None = None
    target_is_zero: bool = False
    replaces: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True
    x_nbdmirror_allow_larger_target: bool = False
    x_nbdmirror_target_cluster_size: int = 0
    x_nbdmirror_may: Sequence[str] = ()
    filter_node_name: str | None = None
    """Only of blockdev-mirror. The following are only of drive-mirror."""
    mode: str = "absolute-paths"
    format: str = "raw"
    node_name: str | None = None
    x_nbdmirror_open_timeout: int = 0
    x_nbdmirror_reconnect_delay: int = 0


async def _open_again(server: Server, undo: ExitStack, /, **arguments: Any) -> tuple[()]:
    """Connect the closed node of a target that was the source before a pivot, or that an earlier
    job has lost."""
    mirror, nodes = MirrorArguments(**arguments), server.nodes

    def closed_target() -> Node | None:
        node = nodes.find_target(nodes.find_disk(mirror.device), mirror.target)
        return node if node is not None and nodes.is_closed(node) else None

    node: Node | None = await ask_loop(server, closed_target)
    if node is not None:
        uri = node.device.uri
        file = await in_thread(partial(socket_file, uri))
        await ask_loop(server, partial(nodes.check_left, uri, file=file))
        device = await open_device(lambda: uri, node.device.pool.timeout_s)
        if not await ask_loop(server, partial(nodes.reopen, node, device)):
            device.close()
    if mirror.x_nbdmirror_journal is not None:
        find = partial(journal_node, server, mirror.x_nbdmirror_journal, mirror.device)
        journal: Node = await ask_loop(server, find)
        await in_thread(partial(check_new_journal, journal.device))
    return ()


@COMMANDS.action(
    "blockdev-mirror", _BLOCKDEV_MIRROR, prepare=_open_again, starts_job=True, then=mirrors_saved
)
def blockdev_mirror(server: Server, /, group: Group | None = None, **arguments: Any) -> Change:
    job = create_mirror(server, MirrorArguments(**arguments), group)
    return Change(job.discard, partial(server.mirrors.begin, job))


async def _open_new(server: Server, undo: ExitStack, /, **arguments: Any) -> tuple[list[Node]]:
    """Connect to the target, and to the journal if there is one."""
    mirror, nodes = MirrorArguments(**arguments), server.nodes
    if mirror.mode != "existing":
        raise CommandError("drive-mirror needs mode 'existing': the target is an NBD export")
    if (form := mirror.format) not in ("raw", "nbd"):
        raise CommandError(
            f"drive-mirror writes the format 'raw' only: for '{form}' serve the image with "
            f"qemu-nbd --format={form}"
        )
    await ask_loop(server, partial(nodes.find_disk, mirror.device))
    if mirror.node_name is not None:
        await ask_loop(server, partial(nodes.check_name, mirror.node_name))
    elif mirror.replaces is not None:
        raise CommandError("a node-name must be provided when replacing a named node of the graph")
    uri = target_uri(mirror.target)
    await check_uri(server, uri, mirror.device)
    options = NodeOptions(reconnect_delay_s=mirror.x_nbdmirror_reconnect_delay)
    timeout_s = open_timeout_s("x-nbdmirror-open-timeout", mirror.x_nbdmirror_open_timeout)
    device = await open_device(lambda: uri, timeout_s)
    undo.callback(device.close)
    opened = [Node(mirror.node_name or "", device, options, is_owned=True)]
    if mirror.x_nbdmirror_journal is not None:
        name = mirror.x_nbdmirror_journal
        journal = await open_journal(server, name, mirror.device, timeout_s)
        undo.callback(journal.close)
        opened.append(Node("", journal, options, is_owned=True))
        await in_thread(partial(check_new_journal, journal))
    return (opened,)


@COMMANDS.action(
    "drive-mirror", _DRIVE_MIRROR, prepare=_open_new, starts_job=True, then=mirrors_saved
)
def drive_mirror(
    server: Server, opened: list[Node], /, group: Group | None = None, **arguments: Any
) -> Change:
    """`opened`: the new nodes, of the target and perhaps of the journal."""
    mirror, nodes = MirrorArguments(**arguments), server.nodes
    for what, node in zip(("Target", "Journal"), opened, strict=False):
        if node.device.read_only:
            raise CommandError(f"{what} '{node.device.uri}' is read-only")
    try:
        for node in opened:
            nodes.add(node)
        names = [node.name for node in opened]
        mirror = replace(mirror, target=names[0])
        if len(names) > 1:
            mirror = replace(mirror, x_nbdmirror_journal=names[1])
        job = create_mirror(server, mirror, group)
    except CommandError:
        for node in opened:
            nodes.forget(node)
        raise
    return Change(job.discard, partial(server.mirrors.begin, job))


def create_mirror(server: Server, mirror: MirrorArguments, group: Group | None = None) -> MirrorJob:
    """Create a job, of `group`, without starting it. Raises CommandError; then no job exists. On
    the event loop's thread."""
    disk = server.nodes.find_disk(mirror.device)
    node = server.nodes.find_target(disk, mirror.target)
    # From here on in QEMU's order, so that of two errors the same one is reported.
    _check_size("granularity", mirror.granularity)
    _check_size("x-nbdmirror-target-cluster-size", mirror.x_nbdmirror_target_cluster_size)
    if mirror.replaces is not None:
        server.nodes.check_replaces(disk, mirror.replaces)
    bitmap = _sync_bitmap(server, disk, mirror)
    if mirror.buf_size < 0:
        raise CommandError("Invalid parameter 'buf-size'")
    if mirror.buf_size > BUFFER_BYTES_MAX:
        raise CommandError(f"Parameter 'buf-size' expects at most {BUFFER_BYTES_MAX}")
    if node is None:
        raise CommandError("Can't mirror node into itself")
    if mirror.filter_node_name is not None:
        server.nodes.check_name(mirror.filter_node_name)
    job_id = mirror.job_id
    if job_id is None:
        job_id = default_job_id(disk.name, server.disks)
    options = _options(mirror, job_id, reconnect_delay_s=node.options.reconnect_delay_s)
    points = points_options(server.nodes, disk, mirror)
    if group is not None and points is not None:
        group.points.check_interval(points.interval_s)
    job = server.mirrors.create(disk, node, options, bitmap, points)
    if group is not None:
        group.add(job)
    return job


def _check_size(parameter: str, size: int) -> None:
    """Raise CommandError for a bad size; 0 means not given."""
    try:
        if size:
            check_granularity(size, parameter)
    except ConfigError as error:
        raise CommandError(str(error)) from error


def _sync_bitmap(server: Server, disk: Disk, mirror: MirrorArguments) -> NamedBitmap | None:
    """The bitmap of sync=incremental and sync=bitmap, with the texts of QEMU's blockdev-backup."""
    sync, name, mode = mirror.sync, mirror.bitmap, mirror.bitmap_mode
    if sync not in _BITMAP_SYNCS:
        if name is not None:
            raise CommandError(f"sync mode '{sync}' is not compatible with bitmaps")
        if mode is not None:
            raise CommandError("Cannot specify bitmap sync mode without a bitmap")
        return None
    if name is None:
        raise CommandError(f"must provide a valid bitmap name for '{sync}' sync mode")
    if sync == "incremental" and mode not in (None, "on-success"):
        raise CommandError(
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"
        )
    if mode == "always":
        raise CommandError("Bitmap Sync Mode 'always' is not supported by Mirror")
    try:
        return server.bitmaps.find_idle(Place(disk), name)
    except CommandError as error:
        if "not found" in str(error):
            raise CommandError(f"Bitmap '{name}' could not be found") from error
        raise


def _options(mirror: MirrorArguments, job_id: str, *, reconnect_delay_s: float) -> MirrorOptions:
    """The job's options. Raises CommandError, with QEMU's text."""
    if not is_wellformed_id(job_id):
        raise CommandError(f"Invalid job ID '{job_id}'")
    if len(job_id) > JOB_ID_LENGTH_MAX:
        raise CommandError(f"Job ID is longer than {JOB_ID_LENGTH_MAX} characters")
    if mirror.speed < 0:
        raise CommandError("Parameter 'speed' expects a non-negative value")
    at_s = deadline_at_s(mirror.x_nbdmirror_deadline)
    return MirrorOptions(
        job_id=job_id,
        sync=mirror.sync,
        copy_mode=CopyMode(mirror.copy_mode),
        granularity=mirror.granularity,
        buffer_bytes=mirror.buf_size or BUFFER_BYTES_DEFAULT,
        speed_bytes_per_s=mirror.speed,
        on_source_error=Policy(mirror.on_source_error),
        on_target_error=Policy(mirror.on_target_error),
        unmap=mirror.unmap,
        reconnect_delay_s=reconnect_delay_s,
        target_is_zero=mirror.target_is_zero,
        clear_bitmap=mirror.bitmap_mode in (None, "on-success"),
        cluster_bytes=mirror.x_nbdmirror_target_cluster_size,
        allow_larger=mirror.x_nbdmirror_allow_larger_target,
        max_pause_s=max_pause_s(mirror.x_nbdmirror_max_pause),
        may=tuple(sorted(set(mirror.x_nbdmirror_may))),
        deadline_at_s=at_s,
        on_deadline=on_deadline(mirror.x_nbdmirror_on_deadline, at_s),
        auto_finalize=mirror.auto_finalize,
        auto_dismiss=mirror.auto_dismiss,
    )
