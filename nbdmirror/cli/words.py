"""The command line's texts for the server's answers: QEMU's refusals, disks and jobs, beside the
sentences of explanation.py. Accepts missing keys, since servers may be older."""

from __future__ import annotations

import math
import re
from typing import Any

from nbdmirror.amounts import duration, size
from nbdmirror.explanation import (
    SILENT_S,
    Remark,
    cost,
    doing,
    explanation,
    last_error,
    remarks,
    shares,
    state,
)

__all__ = [
    "SILENT_S",
    "Remark",
    "age",
    "cost",
    "deadline",
    "disk_troubles",
    "doing",
    "duration",
    "explanation",
    "lag",
    "last_error",
    "limit",
    "mode",
    "refusal",
    "remarks",
    "server_troubles",
    "shares",
    "size",
    "state",
]

_REFUSALS = (
    (
        r"Job '(.*)' in state '(?:created|running|paused)' cannot accept command verb 'complete'",
        r"job \1 is not ready yet; wait for it with: nbdmirror wait --ready",
    ),
    (
        r"Job '(.*)' in state 'concluded' cannot accept command verb '.*'",
        r"job \1 has already ended; remove it with: nbdmirror dismiss",
    ),
    (
        r"Job '(.*)' in state 'pending' cannot accept command verb '.*'",
        r"job \1 has finished its work and cannot do this now; end it with: nbdmirror finalize",
    ),
    (
        r"Job '(.*)' in state '(.*)' cannot accept command verb '(.*)'",
        r"job \1 is \2 and cannot accept '\3' in this state; see: nbdmirror status",
    ),
    (
        r"Job ID '(.*)' already in use",
        r"a job \1 exists already; if it has ended, remove it with: nbdmirror dismiss --job \1",
    ),
    (
        r"Node '(.*)' is busy: block device is in use by block job: mirror",
        r"disk \1 is being mirrored already; see: nbdmirror status",
    ),
    (
        r"The block job for device '(.*)' is currently paused",
        r"job \1 is paused; resume the job, or end it with: nbdmirror cancel --force",
    ),
    (
        r"The active block job '(.*)' cannot be completed",
        r"job \1 is already being cancelled and can no longer be completed",
    ),
    (r"Job is already paused", "the job is already paused; continue with: nbdmirror resume"),
    (r"Can't resume a job that was not paused", "the job is not paused; see: nbdmirror status"),
    (r"(?:Block job '.*'|Job) not found", "the job has ended meanwhile; see: nbdmirror status"),
    (
        r"Cannot find device='(.*)' nor node-name='.*'",
        r"there is no disk \1; see: nbdmirror status",
    ),
    (
        r"Node '(.*)' is read-only: it does not change",
        r"disk \1 is read-only and does not change: copy it with nbdcopy",
    ),
    (
        r"(?:Dirty bitmap|Bitmap) '(.*)' (?:could )?not (?:be )?found",
        r"there is no bitmap \1; see: nbdmirror bitmap list",
    ),
    (r"Bitmap already exists: (.*)", r"a bitmap \1 exists already"),
    (
        r"Bitmap '(.*)' is currently in use by another operation and cannot be used",
        r"bitmap \1 is used by a job; see: nbdmirror status",
    ),
    (
        r"Can't store persistent bitmaps to .*: Operation not supported",
        "the server has no state directory: start it with --state-dir for persistent bitmaps",
    ),
    (
        r"Parameter 'x-nbdmirror-on-deadline' needs 'x-nbdmirror-deadline'",
        "--on-deadline needs --deadline: the job has no deadline",
    ),
    (
        r"Parameter 'x-nbdmirror-(?:interval|rpo)' needs copy-mode 'points'",
        "--every and --rpo need --journal or --snapshots",
    ),
    (
        r"Parameter 'x-nbdmirror-(.*)' needs copy-mode 'points'",
        r"--\1 needs --journal",
    ),
    (r"Copy mode 'points' needs sync 'full'", "points need --sync full"),
    (r"Journal: (.*)", r"--journal: \1"),
    (
        r"The command (\S+) has not been found",
        r"the server is too old: it does not know the command \1",
    ),
)
"""The server's text, and the command line's text."""

_OPTIONS = {
    "buf-size": "--buf-size",
    "granularity": "--granularity",
    "job-id": "--job",
    "name": "--name",
    "speed": "--speed",
    "x-nbdmirror-allow-larger-target": "--allow-larger-target",
    "x-nbdmirror-auto-point": "--snapshots",
    "x-nbdmirror-deadline": "--deadline",
    "x-nbdmirror-interval": "--every",
    "x-nbdmirror-journal": "--journal",
    "x-nbdmirror-keep": "--keep",
    "x-nbdmirror-max-pause": "--max-pause",
    "x-nbdmirror-may": "--may",
    "x-nbdmirror-on-deadline": "--on-deadline",
    "x-nbdmirror-on-journal-full": "--on-journal-full",
    "x-nbdmirror-open-timeout": "--open-timeout",
    "x-nbdmirror-reconnect-delay": "--reconnect-delay",
    "x-nbdmirror-rpo": "--rpo",
    "x-nbdmirror-target-cluster-size": "--target-cluster-size",
}
"""What users type for the arguments that the server names in any other text."""


def lag(job: dict[str, Any]) -> list[str]:
    """Texts: how far the target is behind, if the server reports that, or that there is no copy
    yet."""
    if sequence := (job.get("x-nbdmirror-points") or {}).get("sequence"):
        return [f"point {sequence}", *_lag(job)]
    return _lag(job)


def _lag(job: dict[str, Any]) -> list[str]:
    if (lag_s := job.get("lag-s")) is not None:
        parts = [f"lag {age(lag_s)}"]
        if unflushed := job.get("unflushed-bytes"):
            parts.append(f"{size(unflushed)} not flushed")
        return parts
    if (job.get("x-nbdmirror-points") or {}).get("begun"):
        return ["lag not known yet"]
    is_copying = job.get("status") in ("running", "paused") and "unflushed-bytes" in job
    return ["no copy yet"] if is_copying else []


def age(seconds: float) -> str:
    """Rounded up: never too small."""
    tenths = math.ceil(seconds * 10)
    return f"{tenths / 10} s" if tenths < 600 else duration(-(-tenths // 10))


def deadline(job: dict[str, Any]) -> list[str]:
    """Whether the job's deadline can be kept, if it has one."""
    return [remark.text for remark in remarks(job) if remark.kind == "deadline"]


def refusal(text: str) -> str:
    """The server's refusal, as the command line's text."""
    for pattern, ours in _REFUSALS:
        if match := re.fullmatch(pattern, text):
            return match.expand(ours)
    return re.sub(r"(?:Parameter )?'([a-z-]+)'", _option, text)


def _option(named: re.Match[str]) -> str:
    """Other words in quotation marks stay: a job may be called `name`."""
    name = named[1]
    is_argument = named[0].startswith("Parameter ") or name.startswith("x-nbdmirror-")
    return _OPTIONS.get(name, named[0]) if is_argument else named[0]


def not_understood(error: Exception) -> str:
    """A server's answer has something that no server is known to answer. The others of the host
    are shown nevertheless."""
    return f"the server's answer cannot be understood: {error!r}"


def disk_troubles(disk: dict[str, Any]) -> list[str]:
    """What is wrong with a disk, beside its jobs."""
    found = []
    if disk.get("connected") is False:
        reason = f" (last attempt: {disk['lost-reason']})" if disk.get("lost-reason") else ""
        text = f"its NBD server is lost{reason}: requests wait, and fail if it does not return"
        found.append(text)
    if disk.get("target-only"):
        found.append(f"target only: the disk is served from {disk['target-only']}")
    if disk.get("problem"):
        found.append(str(disk["problem"]))
    if disk.get("state-problem"):
        told = f"its saved state was not used at the start: {disk['state-problem']}"
        found.append(f"{told}; all of its bitmaps count as dirty")
    if disk.get("point-gone"):
        found.append(f"all reads fail: {disk['point-gone']}")
    return found


def server_troubles(status: dict[str, Any]) -> list[str]:
    """What is wrong with a server, beside its disks."""
    error = status.get("state-error")
    return [f"the state directory cannot be written: {error}"] if error else []


def mode(job: dict[str, Any]) -> str:
    """The copy mode; empty if not known."""
    if job.get("copy-mode") != "write-blocking":
        return str(job.get("copy-mode") or "")
    return f"write-blocking ({'' if job.get('actively-synced') else 'not '}actively synced)"


def limit(job: dict[str, Any]) -> str:
    return f"limit {size(job['speed'])}/s" if job.get("speed") else ""
