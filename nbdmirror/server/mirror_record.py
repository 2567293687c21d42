"""A mirror as a record for the state directory, and back."""

from __future__ import annotations

from dataclasses import asdict, replace

from nbdmirror.mirror.options import CopyMode, MirrorOptions, OnDeadline, Policy
from nbdmirror.mirror.resources import JobState
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.handshake import ExportInfo
from nbdmirror.nbdclient.pool import CONNECT_TIMEOUT_S
from nbdmirror.nbdclient.shared_connection import SharedConnection
from nbdmirror.server.nodes import Node, NodeOptions
from nbdmirror.server.points_checks import PointsOptions
from nbdmirror.state.disk_record import (
    ExportRecord,
    JobRecord,
    MirrorRecord,
    PointsRecord,
    TargetRecord,
)


def mirror_record(
    state: JobState,
    node: Node,
    *,
    granularity: int,
    key: str,
    bitmap: str,
    points: PointsRecord | None = None,
) -> MirrorRecord:
    """The record of a mirror. `bitmap`: the name of the bitmap that the mirror started from, or
    ""."""
    return MirrorRecord(
        key=key,
        granularity=granularity,
        is_scanned=state.is_scanned,
        is_paused=state.is_paused,
        bitmap=bitmap,
        job=JobRecord(**asdict(state.options)),
        node=_target_record(node),
        points=points,
    )


def points_record(
    points: PointsOptions, granularity: int, *, has_begun: bool, group: str
) -> PointsRecord:
    """What a mirror's record has of its points. `granularity`: of what is in no point. `group`: the
    key of the group whose jobs make their points together; "": there is none."""
    return PointsRecord(
        key=points.key,
        granularity=granularity,
        journal=_target_record(points.journal) if points.journal is not None else None,
        disk_id=points.disk_id.hex(),
        has_begun=has_begun,
        interval_s=points.interval_s,
        keep_s=points.keep_s,
        rpo_s=points.rpo_s,
        store_bytes=points.store_bytes,
        spill_bytes=points.spill_bytes,
        breaks_guest_writes=points.breaks_guest_writes,
        in_place=points.in_place,
        group=group,
    )


def points_of(record: MirrorRecord) -> PointsOptions | None:
    """The points in a record, with a journal that is not connected yet; None: there are none."""
    kept = record.points
    if kept is None:
        return None
    return PointsOptions(
        journal=_target_of(kept.journal) if kept.journal is not None else None,
        interval_s=kept.interval_s,
        keep_s=kept.keep_s,
        rpo_s=kept.rpo_s,
        store_bytes=kept.store_bytes,
        spill_bytes=kept.spill_bytes,
        breaks_guest_writes=kept.breaks_guest_writes,
        in_place=kept.in_place,
        key=kept.key,
        disk_id=bytes.fromhex(kept.disk_id),
        group=kept.group,
    )


def _target_record(node: Node) -> TargetRecord:
    return TargetRecord(
        name=node.name,
        uri=node.device.uri,
        is_owned=node.is_owned,
        reconnect_delay_s=node.options.reconnect_delay_s,
        announced=ExportRecord(**asdict(node.device.announced)),
        open_timeout_s=node.device.pool.timeout_s,
    )


def options_of(record: MirrorRecord) -> MirrorOptions:
    """The job's options in a record."""
    options = MirrorOptions(**asdict(record.job))
    return replace(
        options,
        copy_mode=CopyMode(options.copy_mode),
        on_source_error=Policy(options.on_source_error),
        on_target_error=Policy(options.on_target_error),
        on_deadline=OnDeadline(options.on_deadline),
    )


def node_of(record: MirrorRecord) -> Node:
    """The target, which is not connected yet."""
    return _target_of(record.node)


def _target_of(kept: TargetRecord) -> Node:
    device = NbdDevice(
        kept.uri,
        SharedConnection.absent(kept.uri),
        ExportInfo(**asdict(kept.announced)),
        timeout_s=CONNECT_TIMEOUT_S if kept.open_timeout_s is None else kept.open_timeout_s,
    )
    device.pool.to_mirror = True
    options = NodeOptions(reconnect_delay_s=kept.reconnect_delay_s)
    return Node(kept.name, device, options, is_owned=kept.is_owned)
