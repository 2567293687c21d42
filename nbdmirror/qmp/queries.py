"""QEMU's queries: the server's state in QEMU's types. On the event loop's thread."""

from __future__ import annotations

import mmap
from typing import Any

from nbdmirror.devices.base import BlockDevice, raw_device
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.disk import Disk
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.point_request import CommittedPoint
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.mirror.snapshots_job import SnapshotsJob
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.qmp.command import CommandTable
from nbdmirror.qmp.results import BLOCK_INFO, BLOCK_JOB_INFO, EXPORT_INFO, JOB_INFO, NODE_INFO
from nbdmirror.qmp.schema import BOOL, Array, optional, struct
from nbdmirror.server.bitmaps import Place
from nbdmirror.server.nodes import Node
from nbdmirror.server.server import Server

COMMANDS = CommandTable()

_FLAT = struct("Flat", flat=optional(BOOL))
"""In QEMU this leaves backing nodes out; nbdmirror has none."""


def block_job_info(server: Server, job: MirrorJob) -> dict[str, Any]:
    """QEMU's BlockJobInfo."""
    info = {
        "type": job.type,
        "device": job.id,
        "len": job.length,
        "offset": job.offset,
        "busy": job.is_busy,
        # In QEMU a job that has done its work holds its guest, and counts as busy.
        "paused": job.pause_wanted or job.has_done_its_work,
        "speed": job.options.speed_bytes_per_s,
        "io-status": job.io_status,
        "ready": job.is_ready,
        "status": str(job.status),
        "auto-finalize": job.options.auto_finalize,
        "auto-dismiss": job.options.auto_dismiss,
        "actively-synced": job.is_actively_synced,
    }
    if isinstance(job, PointsJob) and job.plan is not None:
        info["x-nbdmirror-points"] = _points_info(job)
    course = server.chronicle.courses.get(job.id)
    if course is not None and (left_s := course.deadline.left_s) is not None:
        info["x-nbdmirror-deadline"] = {
            "at-s": job.options.deadline_at_s,
            "left-s": round(left_s, 3),
            "on-deadline": str(job.options.on_deadline),
            "outlook": str(course.kept),
        }
    if job.error is not None:
        info["error"] = job.error
    return info


def _points_info(job: PointsJob) -> dict[str, Any]:
    """What the far side has, since the first copy is in sync."""
    info: dict[str, Any] = {"interval-s": job.interval_s}
    info["auto-point"] = not isinstance(job, SnapshotsJob)
    info["begun"] = job.has_begun
    if job.promises.keep_s:
        info["keep-s"] = job.promises.keep_s
        info["kept"] = job.promises.is_window_kept
    if job.promises.rpo_s:
        info["rpo-s"] = job.promises.rpo_s
    if job.in_place_since_ns:
        info["in-place-since-s"] = round(job.in_place_since_ns / 1e9, 3)
    run, room, outage = job.run, job.journal_room, job.promises.outage
    if room is not None:
        info["journal-bytes"], info["journal-used-bytes"] = room.total_bytes, room.used_bytes
        info["journal-point-bytes"] = room.point_bytes
        info["image-point"] = room.image_point
        if room.applier_silent_s is not None:
            info["applier-silent-s"] = round(room.applier_silent_s, 3)
        info["journal-enough"] = job.promises.is_journal_enough
        if (rate := outage.bytes_per_s) is not None:
            info["change-bytes-per-s"] = round(rate)
        if (lasts_s := outage.lasts_s(run, room)) is not None:
            info["journal-lasts-s"] = round(lasts_s, 3)
    if run is None and job.earlier is not None:
        info["sequence"] = job.earlier.sequence
        info["time-s"] = round(job.earlier.time_ns / 1e9, 3)
    if run is None or (room is None and info["auto-point"]):
        return info
    info["late-cuts"] = run.late_cuts
    if room is not None:
        info["points"], info["reaches-s"] = room.points, round(run.reaches_s, 3)
    if run.last is not None:
        info |= _point_info(run.last)
    if isinstance(job, SnapshotsJob) and job.awaited is not None and job.acks.awaited:
        since_s = round(job.awaited_since_ns / 1e9, 3)
        info["awaited"] = {**_point_info(job.awaited), "since-s": since_s}
    return info


def _point_info(point: CommittedPoint) -> dict[str, Any]:
    info: dict[str, Any] = {
        "sequence": point.sequence,
        "time-s": round(point.time_ns / 1e9, 3),
        "bytes": point.changed_bytes,
    }
    if point.name:
        info["name"] = point.name
    if point.group:
        info["group"] = point.group
    return info


def dirty_bitmap(job: MirrorJob) -> DirtyBitmap:
    """What guests have changed and the job has not sent."""
    if isinstance(job, PointsJob) and job.run is not None:
        return job.run.changes.dirty
    return job.tracker.dirty


def job_info(job: MirrorJob) -> dict[str, Any]:
    """QEMU's JobInfo."""
    info = {
        "id": job.id,
        "type": job.type,
        "status": str(job.status),
        "current-progress": job.offset,
        "total-progress": job.length,
    }
    if job.error is not None:
        info["error"] = job.error
    return info


@COMMANDS.command("query-block-jobs", returns=Array(BLOCK_JOB_INFO))
def query_block_jobs(server: Server) -> list[dict[str, Any]]:
    """Newest first."""
    return [block_job_info(server, job) for job in reversed(server.mirrors.jobs.values())]


@COMMANDS.command("query-jobs", returns=Array(JOB_INFO))
def query_jobs(server: Server) -> list[dict[str, Any]]:
    """Newest first."""
    return [job_info(job) for job in reversed(server.mirrors.jobs.values())]


@COMMANDS.command("query-named-block-nodes", _FLAT, returns=Array(NODE_INFO))
def query_named_block_nodes(server: Server, flat: bool = False) -> list[dict[str, Any]]:
    """Newest first. A disk is a node with its name, and its old source remains a node after a
    pivot."""
    nodes = [
        _disk_info(server, node.disk) if node.disk else _node_info(server, node)
        for node in reversed(list(server.nodes))
    ]
    for disk in reversed(server.disks.values()):
        if server.nodes.root_of(disk) is None:
            nodes.append(_disk_info(server, disk))
        elif (file := server.nodes.file_of(disk)) is not None:
            nodes.append(_device_info(disk.name, file.device) | {"active": file.is_active})
    return nodes


@COMMANDS.command("query-block", _FLAT, returns=Array(BLOCK_INFO))
def query_block(server: Server, flat: bool = False) -> list[dict[str, Any]]:
    """One entry for each disk."""
    blocks = []
    for disk in server.disks.values():
        job = server.mirrors.of(disk)
        blocks.append(
            {
                "device": disk.name,
                "type": "unknown",
                "removable": False,
                "locked": False,
                "io-status": job.io_status if job else "ok",
                "inserted": _disk_info(server, disk),
            }
        )
    return blocks


@COMMANDS.command("query-block-exports", returns=Array(EXPORT_INFO))
def query_block_exports(server: Server) -> list[dict[str, Any]]:
    """Newest first, as nodes and jobs."""
    return [
        {
            "id": disk.name,
            "type": "nbd",
            "node-name": root.name if (root := server.nodes.root_of(disk)) else disk.name,
            "shutting-down": False,
        }
        for disk in reversed(server.disks.values())
    ]


def _node_info(server: Server, node: Node) -> dict[str, Any]:
    """The information on a node that no disk is served from."""
    info = _target_info(node)
    if node.job is not None and (bitmaps := named_bitmaps(server, Place(node.job.disk, node.name))):
        info["dirty-bitmaps"] = bitmaps
    return info


def _target_info(node: Node) -> dict[str, Any]:
    info = _device_info(node.name, node.device)
    info["ro"] = node.is_read_only
    info["active"] = node.is_active
    if node.file is not None:
        info["drv"] = info["image"]["format"] = "raw"
        info["children"] = [{"child": "file", "node-name": node.file.name}]
    info["detect_zeroes"] = node.options.detect_zeroes
    info["cache"] |= {"direct": node.options.direct, "no-flush": node.options.no_flush}
    return info


def _disk_info(server: Server, disk: Disk) -> dict[str, Any]:
    """The information on the node that `disk` is served from."""
    if (root := server.nodes.root_of(disk)) is not None:
        info = _target_info(root)
    else:
        info = _device_info(disk.name, disk.source)
    info["ro"] = disk.read_only
    info["image"]["virtual-size"] = disk.size  # the device may be larger, if that was allowed
    bitmaps = named_bitmaps(server, Place(disk))
    if (job := server.mirrors.of(disk)) is not None:
        bitmaps.insert(0, _bitmap_info(dirty_bitmap(job), recording=True, busy=False))
    return {**info, "dirty-bitmaps": bitmaps} if bitmaps else info


def named_bitmaps(server: Server, place: Place) -> list[dict[str, Any]]:
    """QEMU's BlockDirtyInfo of each named bitmap there."""
    return [
        _bitmap_info(
            b.bitmap, recording=b.is_recording, busy=b.is_busy, persistent=bool(b.key), name=b.name
        )
        for b in server.bitmaps.of(place)
    ]


def _bitmap_info(
    bitmap: DirtyBitmap, *, recording: bool, busy: bool, persistent: bool = False, name: str = ""
) -> dict[str, Any]:
    """QEMU's BlockDirtyInfo; `count` is bytes. A mirror's own bitmap has no name."""
    info: dict[str, Any] = {"name": name} if name else {}
    info["recording"] = recording
    info["persistent"] = persistent
    info["busy"] = busy
    info["granularity"] = bitmap.granularity
    info["count"] = bitmap.dirty_granules * bitmap.granularity
    return info


def _device_info(name: str, device: BlockDevice) -> dict[str, Any]:
    """QEMU's BlockDeviceInfo, as far as it applies here."""
    is_remote = isinstance(raw_device(device), NbdDevice)
    driver, filename = "nbd" if is_remote else "raw", device.description
    limits = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    return {
        "node-name": name,
        "active": True,
        "children": [],
        "drv": driver,
        "file": filename,
        "ro": device.read_only,
        "encrypted": False,
        "detect_zeroes": "off",
        "backing_file_depth": 0,
        "image": {
            "filename": filename,
            "format": driver,
            "virtual-size": device.size,
            "limits": _io_limits(device),
        },
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        "write_threshold": 0,
        **limits,
    }


def _io_limits(device: BlockDevice) -> dict[str, int]:
    """QEMU's BlockLimitsInfo: an NBD export's block sizes. The other members are about QEMU's
    buffers; page-aligned memory is best."""
    size = device.block_size
    limits = {"request-alignment": size.minimum}
    if isinstance(raw_device(device), NbdDevice):
        limits |= {"opt-transfer": size.preferred, "max-transfer": size.maximum}
    return {**limits, "min-mem-alignment": 1, "opt-mem-alignment": mmap.PAGESIZE, "max-iov": 1024}
