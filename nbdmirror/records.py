"""A mirror as it is kept in a state directory, and back."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from nbdmirror.connection import Connection
from nbdmirror.diskstate import MirrorRecord
from nbdmirror.handshake import Announcement
from nbdmirror.nodes import Node, NodeOptions
from nbdmirror.options import CopyMode, MirrorOptions, Policy
from nbdmirror.pool import CONNECT_TIMEOUT_S
from nbdmirror.remote import RemoteDevice
from nbdmirror.statefile import StateError

if TYPE_CHECKING:
    from nbdmirror.mirror import MirrorJob


def mirror_record(job: MirrorJob, node: Node, *, key: str, bitmap: str) -> MirrorRecord:
    """As the job is now. `bitmap`: the name of the one that it is made from, or ""."""
    options = replace(job.options, copy_mode=job.copy_mode, speed_bytes_per_s=job.speed_bytes_per_s)
    return MirrorRecord(
        key=key,
        granularity=job.tracker.granularity,
        is_scanned=job.is_scanned,
        is_paused=job.pause_wanted and job.io_status == "ok",
        bitmap=bitmap,
        job=asdict(options),
        node={
            "name": node.name,
            "uri": node.device.uri,
            "is_owned": node.is_owned,
            "reconnect_delay_s": node.options.reconnect_delay_s,
            "open_timeout_s": node.device.pool.timeout_s,
            "announced": asdict(node.device.announced),
        },
    )


def options_of(record: MirrorRecord) -> MirrorOptions:
    """Raises StateError."""
    try:
        options = MirrorOptions(**record.job)
        return replace(
            options,
            copy_mode=CopyMode(options.copy_mode),
            on_source_error=Policy(options.on_source_error),
            on_target_error=Policy(options.on_target_error),
        )
    except (TypeError, ValueError) as error:
        raise StateError(f"the mirror makes no sense: {error}") from error


def node_of(record: MirrorRecord) -> Node:
    """The target, which is not connected yet. Raises StateError."""
    said = dict(record.node)
    try:
        announced = Announcement(**said.pop("announced"))
        uri = said.pop("uri")
        options = NodeOptions(reconnect_delay_s=said.pop("reconnect_delay_s"))
        timeout_s = said.pop("open_timeout_s", CONNECT_TIMEOUT_S)
        device = RemoteDevice(uri, Connection.absent(uri), announced, timeout_s=timeout_s)
        return Node(device=device, options=options, **said)
    except (TypeError, ValueError, KeyError) as error:
        raise StateError(f"the target makes no sense: {error}") from error
