"""The command line's texts for the server's answers: QEMU's refusals, and a job's state, with what
to do about it. Accepts missing keys, since servers may be older."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

SILENT_S = 5.0
"""A server that answers nothing for so long is reported."""

RETRIED_S = 10.0
"""Ignored errors are retried more often than this."""

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
        r"Parameter '(?:x-nbdmirror-)?([a-z-]*-size|granularity|speed|reconnect-delay)' (.*)",
        r"--\1 \2",
    ),
    (
        r"The command (\S+) has not been found",
        r"the server is too old: it does not know the command \1",
    ),
)
"""The server's text, and the command line's text."""


def size(number: float) -> str:
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop()
    digits = 1 if number % 1 and number < 100 else 0
    return f"{number:.{digits}f} {units[-1]}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def lag(job: dict[str, Any]) -> list[str]:
    """Texts: how far the target is behind, if the server reports that, or that there is no copy
    yet."""
    if (lag_s := job.get("lag-s")) is not None:
        tenths = math.ceil(lag_s * 10)  # never too small
        parts = [f"lag {tenths / 10} s" if tenths < 600 else f"lag {duration(-(-tenths // 10))}"]
        if unflushed := job.get("unflushed-bytes"):
            parts.append(f"{size(unflushed)} not flushed")
        return parts
    is_copying = job.get("status") in ("running", "paused") and "unflushed-bytes" in job
    return ["no copy yet"] if is_copying else []


def refusal(text: str) -> str:
    """The server's refusal, as the command line's text."""
    for pattern, ours in _REFUSALS:
        if match := re.fullmatch(pattern, text):
            return match.expand(ours)
    return text


def state(job: dict[str, Any]) -> str:
    """QMP's word for the state, or "pausing"."""
    status = str(job.get("status", "running"))
    if job.get("paused") and status in ("created", "running", "ready"):
        return "pausing"
    return "standby (paused after READY)" if status == "standby" else status


@dataclass(frozen=True, slots=True)
class Remark:
    """A remark on a job beside its state. Remarks of one `kind` mean the same."""

    kind: str
    text: str


def remarks(job: dict[str, Any]) -> list[Remark]:
    found = [*_of_the_end(job), *_of_the_servers(job)]
    is_paused = state(job).split()[0] in ("paused", "standby")
    if is_paused and job.get("io-status", "ok") == "ok" and job.get("ending", "none") == "none":
        found.append(Remark("paused", "continue with: nbdmirror resume"))
    if state(job) == "pausing":
        found.append(Remark("pausing", "will pause when its requests in flight have ended"))
    if job.get("falling-behind") and not any(one.kind in ("target", "source") for one in found):
        found.append(Remark("behind", f"falls behind: the guest writes faster; {_faster(job)}"))
    return found


def disk_troubles(disk: dict[str, Any]) -> list[str]:
    """What is wrong with a disk, beside its jobs."""
    found = []
    if disk.get("connected") is False:
        found.append("its NBD server is lost: requests wait, and fail if it does not return")
    if disk.get("target-only"):
        found.append(f"target only: the disk is served from {disk['target-only']}")
    if disk.get("problem"):
        found.append(str(disk["problem"]))
    return found


def server_troubles(status: dict[str, Any]) -> list[str]:
    """What is wrong with a server, beside its disks."""
    error = status.get("state-error")
    return [f"the state directory cannot be written: {error}"] if error else []


def _faster(job: dict[str, Any]) -> str:
    if job.get("speed"):
        return "raise its limit with: nbdmirror set-speed"
    if job.get("copy-mode") == "write-blocking":
        return "the target is too slow for the guest"
    return "make its writes wait for the target with: nbdmirror copy-mode write-blocking"


def _of_the_end(job: dict[str, Any]) -> list[Remark]:
    status, found = job.get("status"), []
    if status == "pending" and not job.get("auto-finalize"):
        text = "has finished its work; end the job with: nbdmirror finalize"
        found.append(Remark("pending", text))
    elif status == "waiting":
        text = "has finished its work and waits for the other jobs of its group"
        found.append(Remark("waiting", text))
    elif status == "concluded" and not job.get("auto-dismiss"):
        found.append(Remark("concluded", "has ended; remove the job with: nbdmirror dismiss"))
    elif status not in ("pending", "concluded") and job.get("ending", "none") != "none":
        ending = job["ending"]
        since = duration(job.get("ending-for-s", 0))
        what, then = "being cancelled without --force", "end"
        if ending == "complete":
            what, then = "completing", "pivot"
        text = f"{what} for {since}: the job will {then} as soon as possible"
        if status == "standby":
            text = f"will {'complete' if ending == 'complete' else 'end'} after: nbdmirror resume"
        if vain := job.get("quiesce-timeouts"):
            text += f"; guest writes were held {vain} times without success"
        found.append(Remark("ending", text))
    return found


def _of_the_servers(job: dict[str, Any]) -> list[Remark]:
    found = []
    give_up = "or give up with: nbdmirror cancel --force"
    if (lost_s := job.get("target-lost-for-s")) is not None:
        left_s = job.get("target-wait-left-s")
        how_long = "without a limit" if left_s is None else f"for {duration(left_s)} more"
        text = f"the target has been lost for {duration(lost_s)}, reconnecting {how_long}; "
        if reason := job.get("target-lost-reason"):
            text += f"last attempt: {reason}; "
        found.append(Remark("target", f"{text}check its server, {give_up}"))
    for side in ("source", "target"):
        if (silent_s := job.get(f"{side}-silent-for-s", 0)) >= SILENT_S:
            text = f"the {side} has not answered for {duration(silent_s)}; check it, {give_up}"
            found.append(Remark(side, text))
    error = job.get("last-error") or {}
    if error.get("action") == "ignore" and error.get("ago-s", RETRIED_S) < RETRIED_S:
        text = f"{error['operation']} error: {error.get('reason')}; trying again"
        found.append(Remark("retry", text))
    if job.get("io-status", "ok") != "ok":
        text = "I/O error ({}): {}; try again with: nbdmirror resume"
        found.append(Remark("error", text.format(job["io-status"], last_error(job))))
    if job.get("error"):
        found.append(Remark("failure", f"error: {job['error']}"))
    return found


def last_error(job: dict[str, Any]) -> str:
    error = job.get("last-error") or {}
    return error.get("reason") or "see the server's log"


def mode(job: dict[str, Any]) -> str:
    """The copy mode; empty if not known."""
    if job.get("copy-mode") != "write-blocking":
        return str(job.get("copy-mode") or "")
    return f"write-blocking ({'' if job.get('actively-synced') else 'not '}actively synced)"


def limit(job: dict[str, Any]) -> str:
    return f"limit {size(job['speed'])}/s" if job.get("speed") else ""
