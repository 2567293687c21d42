"""What `nbdmirror status` and `events` print. Tolerant of missing keys: servers differ in age."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

from nbdmirror.cli_progress import Meter, size

WATCH_TERMINAL_S = 0.5
ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
PIVOTED = "X_NBDMIRROR_PIVOTED"


_ADVICE = {
    r"is currently paused$": "resume it, or give it up with: nbdmirror cancel --force",
    r"is busy: block device is in use by block job": "see: nbdmirror status",
}
"""Refusals of the server's, and what to do about them."""


def advice(refusal: str) -> str:
    """To be put behind `refusal`; empty where none is known."""
    found = (text for pattern, text in _ADVICE.items() if re.search(pattern, refusal))
    return "".join(f"; {text}" for text in found)


def from_query_block(blocks: Any) -> list[dict[str, Any]]:
    """Disks in the form of x-nbdmirror-query-status, from what QEMU's query-block says."""
    disks = []
    for block in blocks or []:
        inserted = block.get("inserted") or {}
        disks.append(
            {
                "name": block.get("device") or inserted.get("node-name") or "?",
                "file": inserted.get("file"),
                "size": (inserted.get("image") or {}).get("virtual-size"),
                "read-only": inserted.get("ro", False),
            }
        )
    return disks


def text(status: dict[str, Any], meters: dict[str, Meter] | None = None) -> str:
    """A line a disk and one a job; `meters`, kept between calls, give rates."""
    meters = {} if meters is None else meters
    lines: list[str] = []
    for disk in status.get("disks", []):
        parts = [str(disk.get("name", "?"))]
        if disk.get("size") is not None:
            parts.append(size(disk["size"]))
        parts.append("read-only" if disk.get("read-only") else "read-write")
        parts.append(str(disk.get("source") or disk.get("file") or ""))
        lines.append("  ".join(part for part in parts if part))
        lines += [f"  {_job_text(job, meters)}" for job in disk.get("jobs") or []]
    return "\n".join(lines) or "no disks"


def _job_text(job: dict[str, Any], meters: dict[str, Meter]) -> str:
    meter = meters.setdefault(str(job.get("device")), Meter(time.monotonic))
    parts = [f"job {meter.update(job)}"]
    if job.get("target"):
        parts.append(f"to {job['target']}")
    if job.get("speed"):
        parts.append(f"limit {size(job['speed'])}/s")
    if job.get("pause-ms") is not None:
        parts.append(f"pivot held the guest for {job['pause-ms']:.1f} ms")
    if job.get("io-status", "ok") != "ok":
        parts.append(f"I/O error ({job['io-status']})")
    if job.get("error"):
        parts.append(f"error: {job['error']}")
    return ", ".join(parts)


def event_text(event: dict[str, Any]) -> str:
    stamp = event.get("timestamp") or {}
    moment = time.strftime("%H:%M:%S", time.localtime(stamp.get("seconds", 0)))
    data = event.get("data") or {}
    pairs = [f"{key}={_plain(value)}" for key, value in data.items()]
    return " ".join([f"{moment}.{stamp.get('microseconds', 0):06}", event["event"], *pairs])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def ended_job(events: Iterable[Any], job: str | None, device: str | None) -> str | None:
    """The job that ended last in `events`, of those that are meant: `job`, that of the disk
    `device`, or any."""
    told = [(event["event"], event.get("data") or {}) for event in events]
    meant = {job or device}
    meant |= {
        data.get("id") for name, data in told if (name, data.get("device")) == (PIVOTED, device)
    }
    for name, data in reversed(told):
        if name in ENDS and (data.get("device") in meant or meant == {None}):
            return str(data["device"])
    return None


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
    """`status --watch` on a terminal: one picture, redrawn. Imports rich."""

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
