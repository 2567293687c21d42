"""The output of `nbdmirror status` and `events`. Accepts missing keys, since servers may be
older."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from nbdmirror.cli.progress import Meter
from nbdmirror.cli.words import disk_troubles, lag, limit, mode, remarks, server_troubles, size

WATCH_TERMINAL_S = 0.5
ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
PIVOTED = "X_NBDMIRROR_PIVOTED"


def text(status: dict[str, Any], meters: dict[str, Meter] | None = None) -> str:
    """Lines for each disk, and below it for each job. `meters`, kept between calls, give rates if
    the server does not."""
    meters = {} if meters is None else meters
    lines: list[str] = []
    for disk in status.get("disks", []):
        parts = [str(disk.get("name", "?"))]
        if disk.get("size") is not None:
            parts.append(size(disk["size"]))
        parts.append("read-only" if disk.get("read-only") else "read-write")
        parts.append(str(disk.get("source") or disk.get("file") or ""))
        lines.append("  ".join(part for part in parts if part))
        lines += [f"  {trouble}" for trouble in disk_troubles(disk)]
        for job in disk.get("jobs") or []:
            lines.append(f"  {_job_text(job, meters)}")
            lines += [f"    {remark.text}" for remark in remarks(job)]
        last, jobs = disk.get("last-job") or {}, disk.get("jobs") or []
        is_kept = any(
            job.get("status") == "concluded" and job.get("device") == last.get("id") for job in jobs
        )
        if last and (is_kept or not jobs):
            lines.append(f"  last job {result_text(disk['last-job'])}")
    lines += server_troubles(status)
    return "\n".join(lines) or "no disks"


def _job_text(job: dict[str, Any], meters: dict[str, Meter]) -> str:
    meter = meters.setdefault(str(job.get("device")), Meter(time.monotonic))
    parts = [f"job {meter.update(job)}"]
    if job.get("target"):
        parts.append(f"to {job['target']}")
    sync = f"sync {job['sync']}" if job.get("sync", "full") != "full" else ""
    parts += [part for part in (sync, mode(job), limit(job)) if part]
    parts += lag(job)
    if changed := job.get("changed-bytes"):
        sent = job.get("sent-bytes", 0)
        parts.append(f"sent {size(sent)} for {size(changed)} changed ({sent / changed:.2f})")
    if job.get("pause-ms") is not None:
        parts.append(f"guest writes were held for {job['pause-ms']:.1f} ms")
    return ", ".join(parts)


def result_text(last: dict[str, Any]) -> str:
    """How a job ended, and when."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last.get("ended-at-s", 0)))
    text = f"{last.get('id')}: {last.get('result')} {moment}"
    if last.get("reason"):
        return f"{text}: {last['reason']}"
    if last.get("pivoted"):
        return f"{text}, pivoted to {last.get('target')}{held_text(last)}"
    return f"{text}, {last.get('target')} was left as a copy"


def held_text(last: dict[str, Any]) -> str:
    pause_ms = last.get("pause-ms")
    return "" if pause_ms is None else f"; the pivot held the guest for {pause_ms:.1f} ms"


def event_text(event: dict[str, Any]) -> str:
    stamp = event.get("timestamp") or {}
    moment = time.strftime("%H:%M:%S", time.localtime(stamp.get("seconds", 0)))
    data = event.get("data") or {}
    pairs = [f"{key}={_plain(value)}" for key, value in data.items()]
    return " ".join([f"{moment}.{stamp.get('microseconds', 0):06}", event["event"], *pairs])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class _Lines:
    """`status --watch` for pipes and logs, or as JSON lines."""

    interval_s: float | None = None

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._meters: dict[str, Meter] = {}

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, status: dict[str, Any]) -> None:
        print(json.dumps(status) if self._as_json else text(status, self._meters), flush=True)


class _Screen(_Lines):
    """`status --watch` on a terminal, redrawn in place. Imports rich."""

    interval_s = WATCH_TERMINAL_S

    def __init__(self) -> None:
        from rich.live import Live

        super().__init__(as_json=False)
        self._live = Live(auto_refresh=False)

    def __enter__(self) -> _Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, status: dict[str, Any]) -> None:
        from rich.text import Text

        self._live.update(Text(text(status, self._meters)), refresh=True)


def open_watcher(as_json: bool) -> _Lines:
    return _Screen() if sys.stdout.isatty() and not as_json else _Lines(as_json)
