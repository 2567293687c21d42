"""QMP's commands for dirty bitmaps: block-dirty-bitmap-...

Each is also an action of a transaction. On the event loop's thread.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nbdmirror.errors import CommandError
from nbdmirror.qmp.command import CommandTable
from nbdmirror.qmp.saving import bitmaps_saved
from nbdmirror.qmp.schema import BOOL, STR, UINT32, Array, StringOr, optional, struct
from nbdmirror.server.bitmaps import Change, Place
from nbdmirror.server.server import Server
from nbdmirror.server.target_checks import check_is_disk

COMMANDS = CommandTable()

_BITMAP = struct("BlockDirtyBitmap", node=STR, name=STR)
_ADD = struct(
    "BlockDirtyBitmapAdd",
    node=STR,
    name=STR,
    granularity=optional(UINT32),
    persistent=optional(BOOL),
    disabled=optional(BOOL),
)
_MERGE = struct(
    "BlockDirtyBitmapMerge",
    node=STR,
    target=STR,
    bitmaps=Array(StringOr(_BITMAP, "BlockDirtyBitmapOrStr")),
)


@COMMANDS.action("block-dirty-bitmap-add", _ADD, then=bitmaps_saved)
def add(
    server: Server,
    node: str,
    name: str,
    granularity: int | None = None,
    persistent: bool = False,
    disabled: bool = False,
) -> Change:
    job = server.nodes.mirror_to(node)
    disk = job.disk if job is not None else server.nodes.find_disk(node)
    check_is_disk(disk)
    place = Place(disk, node if job is not None else "")
    change = server.bitmaps.add(place, name, granularity, persistent=persistent, disabled=disabled)
    if job is not None:
        job.when_ended(partial(_target_released, server, place))
        _mark_what_comes(server, node, name)
    return change


@COMMANDS.action("block-dirty-bitmap-remove", _BITMAP, then=bitmaps_saved)
def remove(server: Server, node: str, name: str) -> Change:
    return server.bitmaps.remove(_place(server, node), name)


@COMMANDS.action("block-dirty-bitmap-clear", _BITMAP, then=bitmaps_saved)
def clear(server: Server, node: str, name: str) -> Change:
    change = server.bitmaps.clear(_place(server, node), name)
    return _and_what_comes(server, node, name, change)


@COMMANDS.action("block-dirty-bitmap-enable", _BITMAP, then=bitmaps_saved)
def enable(server: Server, node: str, name: str) -> Change:
    change = server.bitmaps.record(_place(server, node), name, recording=True)
    return _and_what_comes(server, node, name, change)


@COMMANDS.action("block-dirty-bitmap-disable", _BITMAP, then=bitmaps_saved)
def disable(server: Server, node: str, name: str) -> Change:
    return server.bitmaps.record(_place(server, node), name, recording=False)


@COMMANDS.action("block-dirty-bitmap-merge", _MERGE, then=bitmaps_saved)
def merge(server: Server, node: str, target: str, bitmaps: list[Any]) -> Change:
    place = _place(server, node)
    sources = [
        (place, source)
        if isinstance(source, str)
        else (_place(server, source["node"]), source["name"])
        for source in bitmaps
    ]
    return server.bitmaps.merge(place, target, sources)


def _place(server: Server, node: str) -> Place:
    if (job := server.nodes.mirror_to(node)) is not None:
        return Place(job.disk, node)
    try:
        return Place(server.nodes.find_disk(node))
    except CommandError as error:
        raise CommandError(f"Node '{node}' not found") from error


def _and_what_comes(server: Server, node: str, name: str, change: Change) -> Change:
    def commit() -> None:
        change.commit()
        _mark_what_comes(server, node, name)

    return Change(change.undo, commit)


def _mark_what_comes(server: Server, node: str, name: str) -> None:
    """Mark, in a bitmap that begins to record on a mirror's target, what the mirror has yet to
    copy. Before READY that may be everything."""
    job = server.nodes.mirror_to(node)
    if job is None:
        return
    bitmap = server.bitmaps.find(Place(job.disk, node), name)
    if bitmap.is_recording and not job.is_ready:
        bitmap.bitmap.mark_all()
    elif bitmap.is_recording and not job.tracker.in_sync:
        bitmap.bitmap.merge(job.tracker.may_differ())


def _target_released(server: Server, place: Place) -> None:
    root = server.nodes.root_of(place.disk)
    is_pivoted = root is not None and root.name == place.target
    server.bitmaps.target_released(place, is_pivoted=is_pivoted)
