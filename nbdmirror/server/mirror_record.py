"""A mirror as it is kept in a state directory, and back."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from nbdmirror.mirror.options import CopyMode, MirrorOptions, Policy
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.handshake import ExportInfo
from nbdmirror.nbdclient.pool import CONNECT_TIMEOUT_S
from nbdmirror.nbdclient.shared_connection import SharedConnection
from nbdmirror.server.nodes import Node, NodeOptions
from nbdmirror.state.disk_record import ExportRecord, JobRecord, MirrorRecord, TargetRecord

if TYPE_CHECKING:
    from nbdmirror.mirror.mirror_job import MirrorJob


def mirror_record(job: MirrorJob, node: Node, *, key: str, bitmap: str) -> MirrorRecord:
    """As the job is now. `bitmap`: the name of the one that it is made from, or ""."""
    options = replace(job.options, copy_mode=job.copy_mode, speed_bytes_per_s=job.speed_bytes_per_s)
    return MirrorRecord(
        key=key,
        granularity=job.tracker.granularity,
        is_scanned=job.is_scanned,
        is_paused=job.pause_wanted and job.io_status == "ok",
        bitmap=bitmap,
        job=JobRecord(**asdict(options)),
        node=TargetRecord(
            name=node.name,
            uri=node.device.uri,
            is_owned=node.is_owned,
            reconnect_delay_s=node.options.reconnect_delay_s,
            announced=ExportRecord(**asdict(node.device.announced)),
            open_timeout_s=node.device.pool.timeout_s,
        ),
    )


def options_of(record: MirrorRecord) -> MirrorOptions:
    options = MirrorOptions(**asdict(record.job))
    return replace(
        options,
        copy_mode=CopyMode(options.copy_mode),
        on_source_error=Policy(options.on_source_error),
        on_target_error=Policy(options.on_target_error),
    )


def node_of(record: MirrorRecord) -> Node:
    """The target, which is not connected yet."""
    kept = record.node
    device = NbdDevice(
        kept.uri,
        SharedConnection.absent(kept.uri),
        ExportInfo(**asdict(kept.announced)),
        timeout_s=CONNECT_TIMEOUT_S if kept.open_timeout_s is None else kept.open_timeout_s,
    )
    device.pool.to_mirror = True
    options = NodeOptions(reconnect_delay_s=kept.reconnect_delay_s)
    return Node(kept.name, device, options, is_owned=kept.is_owned)
