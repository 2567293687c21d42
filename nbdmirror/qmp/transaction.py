"""Commands that may stand in a transaction: all of it happens, or none.

On the event loop's thread, with arguments that the schema has checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nbdmirror.disk.bitmap import check_granularity
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import CommandError, ConfigError, DeviceNotActive
from nbdmirror.mirror.copier import BUFFER_BYTES_DEFAULT
from nbdmirror.mirror.group import Group
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import CopyMode, MirrorOptions, Policy
from nbdmirror.names import default_job_id, is_job_id
from nbdmirror.server.bitmaps import Change, NamedBitmap, Place
from nbdmirror.server.server import Server
from nbdmirror.server.target_checks import check_is_disk

Arguments = dict[str, Any]
Action = Callable[[Server, Arguments], Change]

ACTIONS_MAX = 1024
"""Of one transaction: some for each of many disks. All are done in one step of the event loop."""

BUFFER_BYTES_MAX = 1 << 30
"""Of one mirror. QEMU takes what it can get when the job starts; here it fills as the target is
slow, beside the guests."""

JOB_ID_LENGTH_MAX = 255
"""It is in every event, and up to JOBS_MAX jobs are kept."""

_BITMAP_SYNCS = ("incremental", "bitmap")


def find_job(server: Server, command: str, arguments: Arguments) -> MirrorJob:
    """The job that a command names; block-job-... and job-... answer differently when there is
    none."""
    job_id = arguments.get("device", arguments.get("id"))
    job = server.mirrors.jobs.get(str(job_id))
    if job is None and command.startswith("block-job-"):
        raise DeviceNotActive(f"Block job '{job_id}' not found")
    if job is None:
        raise CommandError("Job not found")
    return job


def create_mirror(server: Server, arguments: Arguments) -> MirrorJob:
    """The job of a blockdev-mirror, created and not yet begun. Raises CommandError; then there is
    none."""
    disk = server.nodes.find_disk(arguments["device"])
    node = server.nodes.find_target(disk, arguments["target"])
    # From here on in QEMU's order: of two errors the same is told.
    _check_size("granularity", arguments)
    _check_size("x-nbdmirror-target-cluster-size", arguments)
    if "replaces" in arguments:
        server.nodes.check_replaces(disk, arguments["replaces"])
    bitmap = _sync_bitmap(server, disk, arguments)
    if arguments.get("buf-size", 0) < 0:
        raise CommandError("Invalid parameter 'buf-size'")
    if arguments.get("buf-size", 0) > BUFFER_BYTES_MAX:
        raise CommandError(f"Parameter 'buf-size' expects at most {BUFFER_BYTES_MAX}")
    if node is None:
        raise CommandError("Can't mirror node into itself")
    if "filter-node-name" in arguments:
        server.nodes.check_name(arguments["filter-node-name"])
    delay_s = node.options.reconnect_delay_s
    job_id = arguments.get("job-id", default_job_id(disk.name, server.disks))
    options = _options(arguments, job_id, reconnect_delay_s=delay_s)
    return server.mirrors.create(disk, node, options, bitmap)


def transact(server: Server, arguments: Arguments) -> None:
    """Carry out a transaction's actions in order; if one cannot be done, those before it are taken
    back and its error is raised."""
    if len(arguments["actions"]) > ACTIONS_MAX:
        raise CommandError(f"Parameter 'actions' expects at most {ACTIONS_MAX} actions")
    mode = arguments.get("properties", {}).get("completion-mode", "individual")
    do = _ACTIONS if mode == "individual" else _grouped_actions(arguments["actions"])
    done: list[Change] = []
    try:
        for action in arguments["actions"]:
            name, data = action["type"], action["data"]
            done.append(do[name](server, data))
    except CommandError:
        for change in reversed(done):
            change.undo()
        raise
    for change in done:
        change.commit()


def _grouped_actions(actions: list[Arguments]) -> Mapping[str, Action]:
    """What the actions of one group do. Raises CommandError, with QEMU's text, if one of `actions`
    starts no job: only jobs can end together."""
    group = Group()
    grouped: dict[str, Action] = {"blockdev-mirror": partial(_mirror, group=group)}
    for action in actions:
        if (name := action["type"]) not in grouped:
            raise CommandError(
                f"Action '{name}' does not support transaction property completion-mode = grouped"
            )
    return grouped


def _abort(server: Server, data: Arguments) -> Change:
    raise CommandError("Transaction aborted using Abort action")


def _mirror(server: Server, data: Arguments, group: Group | None = None) -> Change:
    job = create_mirror(server, data)
    if group is not None:
        group.add(job)
    return Change(job.discard, partial(server.mirrors.begin, job))


def _complete(command: str, server: Server, data: Arguments) -> Change:
    job = find_job(server, command, data)
    job.check_complete()
    return Change(_nothing, job.complete)


def _cancel(server: Server, data: Arguments) -> Change:
    job = find_job(server, "block-job-cancel", data)
    force = data.get("force", False)
    job.check_cancel(force=force)
    return Change(_nothing, partial(job.cancel, force=force))


def _nothing() -> None:
    pass


# Bitmaps.


def _place(server: Server, name: str) -> Place:
    if (job := server.nodes.mirror_to(name)) is not None:
        return Place(job.disk, name)
    try:
        return Place(server.nodes.find_disk(name))
    except CommandError as error:
        raise CommandError(f"Node '{name}' not found") from error


def _add(server: Server, data: Arguments) -> Change:
    job = server.nodes.mirror_to(data["node"])
    disk = job.disk if job is not None else server.nodes.find_disk(data["node"])
    check_is_disk(disk)
    place = Place(disk, data["node"] if job is not None else "")
    change = server.bitmaps.add(
        place,
        data["name"],
        data.get("granularity"),
        persistent=data.get("persistent", False),
        disabled=data.get("disabled", False),
    )
    if job is not None:
        job.when_ended(partial(_target_released, server, place))
        _mark_what_comes(server, data)
    return change


def _mark_what_comes(server: Server, data: Arguments) -> None:
    """A bitmap that begins to record on a mirror's target has what the mirror has yet to bring
    there, as well as what guests change from now on. Before READY that may be anything."""
    job = server.nodes.mirror_to(data["node"])
    if job is None:
        return
    named = server.bitmaps.find(Place(job.disk, data["node"]), data["name"])
    if named.is_recording and not job.is_ready:
        named.bitmap.mark_all()
    elif named.is_recording and not job.tracker.in_sync:
        named.bitmap.merge(job.tracker.may_differ())


def _target_released(server: Server, place: Place) -> None:
    root = server.nodes.root_of(place.disk)
    is_pivoted = root is not None and root.name == place.target
    server.bitmaps.target_released(place, is_pivoted=is_pivoted)


def _remove(server: Server, data: Arguments) -> Change:
    return server.bitmaps.remove(_place(server, data["node"]), data["name"])


def _clear(server: Server, data: Arguments) -> Change:
    change = server.bitmaps.clear(_place(server, data["node"]), data["name"])
    _mark_what_comes(server, data)
    return change


def _record(recording: bool, server: Server, data: Arguments) -> Change:
    change = server.bitmaps.record(_place(server, data["node"]), data["name"], recording)
    _mark_what_comes(server, data)
    return change


def _merge(server: Server, data: Arguments) -> Change:
    place = _place(server, data["node"])
    sources = [
        (place, source)
        if isinstance(source, str)
        else (_place(server, source["node"]), source["name"])
        for source in data["bitmaps"]
    ]
    return server.bitmaps.merge(place, data["target"], sources)


BITMAP_ACTIONS: dict[str, Action] = {
    "block-dirty-bitmap-add": _add,
    "block-dirty-bitmap-remove": _remove,
    "block-dirty-bitmap-clear": _clear,
    "block-dirty-bitmap-enable": partial(_record, True),
    "block-dirty-bitmap-disable": partial(_record, False),
    "block-dirty-bitmap-merge": _merge,
}

_ACTIONS: dict[str, Action] = {
    **BITMAP_ACTIONS,
    "abort": _abort,
    "blockdev-mirror": _mirror,
    "job-complete": partial(_complete, "job-complete"),
    "block-job-complete": partial(_complete, "block-job-complete"),
    "block-job-cancel": _cancel,
}


def _sync_bitmap(server: Server, disk: Disk, arguments: Arguments) -> NamedBitmap | None:
    """The bitmap of sync=incremental and sync=bitmap, with the texts of QEMU's blockdev-backup."""
    sync, name = arguments["sync"], arguments.get("bitmap")
    mode = arguments.get("bitmap-mode", "on-success")
    if sync not in _BITMAP_SYNCS:
        if name is not None:
            raise CommandError(f"sync mode '{sync}' is not compatible with bitmaps")
        if "bitmap-mode" in arguments:
            raise CommandError("Cannot specify bitmap sync mode without a bitmap")
        return None
    if name is None:
        raise CommandError(f"must provide a valid bitmap name for '{sync}' sync mode")
    if sync == "incremental" and mode != "on-success":
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


def _options(arguments: Arguments, job_id: str, *, reconnect_delay_s: float) -> MirrorOptions:
    """The job's options; raises CommandError with QEMU's text."""
    if not is_job_id(job_id):
        raise CommandError(f"Invalid job ID '{job_id}'")
    if len(job_id) > JOB_ID_LENGTH_MAX:
        raise CommandError(f"Job ID is longer than {JOB_ID_LENGTH_MAX} characters")
    if arguments.get("speed", 0) < 0:
        raise CommandError("Parameter 'speed' expects a non-negative value")
    return MirrorOptions(
        job_id=job_id,
        sync=arguments["sync"],
        copy_mode=CopyMode(arguments.get("copy-mode", "background")),
        granularity=arguments.get("granularity", 0),
        buffer_bytes=arguments.get("buf-size", 0) or BUFFER_BYTES_DEFAULT,
        speed_bytes_per_s=arguments.get("speed", 0),
        on_source_error=Policy(arguments.get("on-source-error", "report")),
        on_target_error=Policy(arguments.get("on-target-error", "report")),
        unmap=arguments.get("unmap", True),
        reconnect_delay_s=reconnect_delay_s,
        target_is_zero=arguments.get("target-is-zero", False),
        clear_bitmap=arguments.get("bitmap-mode", "on-success") == "on-success",
        cluster_bytes=arguments.get("x-nbdmirror-target-cluster-size", 0),
        allow_larger=arguments.get("x-nbdmirror-allow-larger-target", False),
        auto_finalize=arguments.get("auto-finalize", True),
        auto_dismiss=arguments.get("auto-dismiss", True),
    )


def _check_size(parameter: str, arguments: Arguments) -> None:
    """0 is as good as none."""
    try:
        if size := arguments.get(parameter, 0):
            check_granularity(size, parameter)
    except ConfigError as error:
        raise CommandError(str(error)) from error
