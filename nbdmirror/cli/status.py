"""The output of `nbdmirror status` and `events`. Accepts missing keys, since servers may be
older."""

from __future__ import annotations

import json
import time
from typing import Any

from nbdmirror.cli.progress import Meter
from nbdmirror.cli.words import disk_troubles, explanation, lag, limit, mode, server_troubles, size
from nbdmirror.partial_target import is_partial, target_text

ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
PIVOTED = "X_NBDMIRROR_PIVOTED"


def text(status: dict[str, Any], meters: dict[str, Meter] | None = None) -> str:
    """Lines for each disk, and below it for each job. `meters`, kept between calls, give rates if
    the server does not."""
    meters = {} if meters is None else meters
    lines: list[str] = []
    for disk in status.get("disks", []):
        lines.append(disk_text(disk))
        lines += [f"  {trouble}" for trouble in disk_troubles(disk)]
        for job in disk.get("jobs") or []:
            meter = meters.setdefault(str(job.get("device")), Meter(time.monotonic))
            lines.append(f"  {', '.join([f'job {meter.update(job)}', *job_parts(job)])}")
            lines += [f"    {sentence}" for sentence in explanation(job)]
        if last := last_text(disk):
            lines.append(f"  {last}")
    lines += server_troubles(status)
    forget_meters(meters, status)
    return "\n".join(lines) or "no disks"


def forget_meters(meters: dict[str, Meter], status: dict[str, Any]) -> None:
    """Keep the meters of the jobs that exist."""
    names = {
        job.get("device") for disk in status.get("disks", []) for job in disk.get("jobs") or []
    }
    for name in meters.keys() - set(map(str, names)):
        del meters[name]


def disk_text(disk: dict[str, Any]) -> str:
    """A disk, without its jobs."""
    parts = [str(disk.get("name", "?"))]
    if disk.get("size") is not None:
        parts.append(size(disk["size"]))
    parts.append("read-only" if disk.get("read-only") else "read-write")
    parts.append(str(disk.get("source") or disk.get("file") or ""))
    return "  ".join(part for part in parts if part)


def job_parts(job: dict[str, Any]) -> list[str]:
    """Texts: what a job is, beside its progress."""
    parts = [f"to {job['target']}"] if job.get("target") else []
    sync = f"sync {job['sync']}" if job.get("sync", "full") != "full" else ""
    parts += [part for part in (sync, mode(job), limit(job)) if part]
    parts += lag(job)
    if changed := job.get("changed-bytes"):
        sent = job.get("sent-bytes", 0)
        parts.append(f"sent {size(sent)} for {size(changed)} changed ({sent / changed:.2f})")
    if job.get("pause-ms") is not None:
        parts.append(f"guest writes were held for {job['pause-ms']:.1f} ms")
    return parts


def last_text(disk: dict[str, Any]) -> str:
    """How a disk's last job ended; empty if there was none, or a job is there."""
    last, jobs = disk.get("last-job") or {}, disk.get("jobs") or []
    is_kept = any(
        job.get("status") == "concluded" and job.get("device") == last.get("id") for job in jobs
    )
    return f"last job {result_text(last)}" if last and (is_kept or not jobs) else ""


def result_text(last: dict[str, Any]) -> str:
    """How a job ended, and when."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last.get("ended-at-s", 0)))
    text = f"{last.get('id')}: {last.get('result')} {moment}"
    sync = last.get("sync", "full")
    if last.get("reason"):
        return f"{text}: {last['reason']}"
    if last.get("pivoted"):
        text += f", pivoted to {last.get('target')}{held_text(last)}"
        return f"{text}; the target {target_text(sync)}" if is_partial(sync) else text
    left = target_text(sync) if is_partial(sync) else "was left as a copy"
    return f"{text}, {last.get('target')} {left}"


def held_text(last: dict[str, Any]) -> str:
    pause_ms = last.get("pause-ms")
    return "" if pause_ms is None else f"; the pivot held the guest for {pause_ms:.1f} ms"


def event_text(event: dict[str, Any]) -> str:
    stamp = event.get("timestamp") or {}
    moment = time.strftime("%H:%M:%S", time.localtime(stamp.get("seconds", 0)))
    data = event.get("data") or {}
    pairs = [f"{key}={_plain(value)}" for key, value in data.items()]
    return " ".join([f"{moment}.{stamp.get('microseconds', 0):06}", event["event"], *pairs])


def is_routine(event: dict[str, Any]) -> bool:
    """A point that was made in time, without a name, and with nobody who has to do anything: the
    status has its number, and there may be one each second."""
    data = event.get("data") or {}
    is_point = event.get("event") == "X_NBDMIRROR_POINT"
    return is_point and not data.get("name") and not data.get("ack")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
