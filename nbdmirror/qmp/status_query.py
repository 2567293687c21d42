"""The result of x-nbdmirror-query-status, which `nbdmirror status --json` prints: everything that
an operator needs to know about disks and jobs. And that of x-nbdmirror-query-job-map, for a picture
of a job's disk.

Sizes are in bytes; other units are at the end of a key. On the event loop's thread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nbdmirror import __version__
from nbdmirror.devices.base import BlockDevice, Passing, raw_device
from nbdmirror.devices.file import FileDevice
from nbdmirror.disk.cells import CELLS_MAX
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.latency import Histogram, Latency
from nbdmirror.disk.target_only import TargetOnly
from nbdmirror.errors import CommandError
from nbdmirror.explanation import explanation
from nbdmirror.mirror.lag import round_up
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import CopyMode
from nbdmirror.mirror.waits import Cause, Shares
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.qmp.command import CommandTable
from nbdmirror.qmp.job_commands import find_job
from nbdmirror.qmp.queries import block_job_info, dirty_bitmap, named_bitmaps
from nbdmirror.qmp.results import JOB_MAP, STATUS
from nbdmirror.qmp.schema import INT, STR, struct
from nbdmirror.server.bitmaps import Place
from nbdmirror.server.course import Course
from nbdmirror.server.server import Server
from nbdmirror.state.job_results import Result

COMMANDS = CommandTable()


@COMMANDS.command("x-nbdmirror-query-status", returns=STATUS)
def query_status(server: Server) -> dict[str, Any]:
    info: dict[str, Any] = {
        "package": f"nbdmirror {__version__}",
        "pid": os.getpid(),
        "started-at-s": server.started_at_s,
        "disks": [_disk(server, disk) for disk in server.disks.values()],
    }
    if problem := server.state_problem:
        info["state-error"] = problem
    return info


@COMMANDS.command(
    "x-nbdmirror-query-job-map", struct("QueryJobMap", id=STR, cells=INT), returns=JOB_MAP
)
def query_job_map(server: Server, id: str, cells: int) -> dict[str, list[int]]:
    job = find_job(server, id)
    if not 1 <= cells <= CELLS_MAX:
        raise CommandError(f"Parameter 'cells' expects a value in range [1, {CELLS_MAX}]")
    if job.is_over:
        raise CommandError(f"Job '{id}' in state '{job.status}' has no map")
    found = job.map(cells)
    return {
        "lengths": found.lengths,
        "dirty": found.dirty,
        "in-flight": found.in_flight,
        "unflushed": found.unflushed,
        "zero": found.zero,
    }


def _disk(server: Server, disk: Disk) -> dict[str, Any]:
    info: dict[str, Any] = {
        "name": disk.name,
        "source": disk.source.description,
        "size": disk.size,
        "read-only": disk.read_only,
        "connected": _is_connected(disk.source),
        "lasting": server.stores[disk].is_lasting,
        "bitmaps": named_bitmaps(server, Place(disk)),
    }
    if reason := _lost_reason(disk.source):
        info["lost-reason"] = reason
    info["requests"], info["held"] = _times(disk.ledger.latency)
    if isinstance(disk.source, TargetOnly):
        info["target-only"] = disk.source.truth
    changed = server.files.changes.get(disk.name, "")
    is_file = isinstance(raw_device(disk.source), FileDevice)
    of_format = server.files.formats.get(disk.name, "") if is_file else ""
    problems = changed, of_format, server.waiting.problem(disk)
    if any(problems):
        info["problem"] = "; ".join(filter(None, problems))
    if doubt := server.doubts.get(disk.name):
        info["state-problem"] = doubt
    if isinstance(disk.source, Passing) and disk.source.gone:
        info["point-gone"] = disk.source.gone
    info["jobs"] = [
        job_status(server, job) for job in server.mirrors.jobs.values() if job.disk is disk
    ]
    if (result := server.chronicle.results.get(disk.name)) is not None:
        info["last-job"] = _result(result)
    return info


def _times(latency: Latency) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of guests' requests, and of their waits for mirrors; what there was none of is left out."""
    requests, held = [], []
    for kind, took in latency.took.items():
        if any((info := _histogram(took))["buckets"]):
            own = _histogram(latency.own[kind])
            info |= {"kind": str(kind), **{f"own-{key}": value for key, value in own.items()}}
            requests.append(info)
    for cause, waits in latency.held.items():
        if any((info := _histogram(waits))["buckets"]):
            held.append({"cause": str(cause), **info})
    return requests, held


def _histogram(times: Histogram) -> dict[str, Any]:
    """Without the empty buckets at the end."""
    times.count()
    buckets = list(times.buckets)
    while buckets and not buckets[-1]:
        buckets.pop()
    return {"seconds": times.sum_ns / 1e9, "buckets": buckets}


def _lost(device: BlockDevice) -> NbdDevice | None:
    """The export, if its connection is lost. A file is always connected."""
    raw = raw_device(device)
    return raw if isinstance(raw, NbdDevice) and raw.is_lost else None


def _is_connected(device: BlockDevice) -> bool:
    return _lost(device) is None


def _lost_reason(device: BlockDevice) -> str:
    """Why the last attempt to reconnect failed, if the device is lost."""
    lost = _lost(device)
    return lost.pool.reconnect_problem if lost is not None else ""


def job_status(server: Server, job: MirrorJob) -> dict[str, Any]:
    """Everything about one job, at any moment of its life."""
    info = block_job_info(server, job)
    info["target"] = job.target.description
    info["sync"] = job.options.sync
    info["copy-mode"] = str(job.options.copy_mode)
    info["on-source-error"] = str(job.options.on_source_error)
    info["on-target-error"] = str(job.options.on_target_error)
    info["reconnect-delay-s"] = float(job.options.reconnect_delay_s)
    info["granularity"] = job.tracker.granularity
    info["dirty-bytes"] = 0 if job.is_over else dirty_bitmap(job).dirty_bytes
    info["in-flight-bytes"] = job.in_flight_bytes
    info["unflushed-bytes"] = 0 if job.is_over else job.tracker.unflushed_bytes
    info["copied-bytes"] = job.copier.copied_bytes
    info["written-bytes"] = job.copier.written_bytes
    if job.traffic is not None:
        info["sent-bytes"], info["changed-bytes"] = job.traffic.since_ready
    if job.lag is not None and not job.is_over:
        info["lag-s"] = round_up(job.lag.lag_s)
    info["again-bytes"] = job.tracker.again_bytes
    info["ending"] = "none" if job.is_over else job.ending.value
    info["quiesce-timeouts"] = job.quiesce_timeouts
    info["target-connected"] = _is_connected(job.target)
    info["falling-behind"] = False
    if (allowed_s := job.options.max_pause_s) is not None:
        info["max-pause-ms"] = round(allowed_s * 1000, 3)
    info["may"] = list(job.options.may)
    if (hot_bytes := job.mode.hot_bytes) is not None:
        info["blocking-bytes"] = hot_bytes
    is_tracked = job.is_ready and job.options.copy_mode is not CopyMode.POINTS
    if is_tracked and (pause_s := job.pivot_pause.predicted_s) is not None:
        info["pause-predicted-ms"] = round(pause_s * 1000, 3)
    if job.pause_s is not None:
        info["pause-ms"] = round(job.pause_s * 1000, 3)
    if (error := job.last_error) is not None:
        info["last-error"] = {
            "operation": error.operation,
            "action": error.action,
            "reason": error.reason,
        }
    if (course := server.chronicle.courses.get(job.id)) is not None:
        _add_course(info, course, server.loop.clock())
    info["waits"] = _waits(job.waits.shares)
    info["explanation"] = explanation(info)
    return info


def _waits(shares: Shares) -> dict[str, Any]:
    return {
        "now": str(shares.now),
        "last-minute": _by_cause(shares.recent),
        "since-start": _by_cause(shares.total),
        "seconds": _by_cause(shares.seconds),
    }


def _by_cause(found: Mapping[Cause, float]) -> dict[str, float]:
    return {str(cause): round(value, 4) for cause, value in found.items()}


def _add_far_side(info: dict[str, Any], far_side: Sequence[NbdDevice]) -> None:
    """The target is the first."""
    for journal in far_side[1:]:
        info["journal"], info["journal-connected"] = journal.description, not journal.is_lost
    for device in far_side:
        if reason := _lost_reason(device):
            info.setdefault("target-lost-reason", reason)


def _add_course(info: dict[str, Any], course: Course, now_s: float) -> None:
    _add_far_side(info, course.far_side())
    if info["ending"] != "none":
        info["ending-for-s"] = round(course.ending_for_s, 3)
    if "last-error" in info:
        info["last-error"]["ago-s"] = round(course.error_ago_s, 3)
    if (lost := course.lost) is not None:
        info["target-lost-for-s"] = round(now_s - lost.since_s, 3)
        if math.isfinite(lost.until_s):
            info["target-wait-left-s"] = round(max(0.0, lost.until_s - now_s), 3)
    for side, operation in (("source", "read"), ("target", "write")):
        if silent_s := course.silent_for_s(operation):
            info[f"{side}-silent-for-s"] = round(silent_s, 3)
    if (rates := course.rates) is not None:
        info["copy-bytes-per-s"] = rates.copy_bytes_per_s
        info["zero-bytes-per-s"] = rates.zero_bytes_per_s
        info["dirty-bytes-per-s"] = rates.dirty_bytes_per_s
        info["falling-behind"] = rates.falls_behind
        if rates.left_s is not None and info["status"] in ("running", "ready"):
            info["left-s"] = round(rates.left_s, 3)
    if (share := course.guests_wait_share) is not None:
        info["guests-wait-share"] = round(share, 5) or share  # 0: none has waited
    if (throttle := course.throttle) is not None:
        info["throttle-bytes-per-s"] = round(throttle)
    if (prediction := course.prediction) is not None:
        info["falling-behind"] = prediction.never
        info.pop("left-s", None)
        found = {"": prediction.end_s, "-min": prediction.end_s_min, "-max": prediction.end_s_max}
        info |= {f"left-s{end}": round(at, 3) for end, at in found.items() if at is not None}


def _result(result: Result) -> dict[str, Any]:
    info: dict[str, Any] = {
        "id": result.job,
        "target": result.target,
        "result": result.result,
        "pivoted": result.pivoted,
        "ended-at-s": result.ended_at_s,
    }
    if result.reason:
        info["reason"] = result.reason
    if result.sync:
        info["sync"] = result.sync
    if result.pause_s is not None:
        info["pause-ms"] = round(result.pause_s * 1000, 3)
    return info
