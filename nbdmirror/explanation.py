"""What a job does and waits for, whether it will end, and what to do about it: as sentences.

All sentences about a job are made here, from the keys of `x-nbdmirror-query-status`, so none says
what those keys do not. The server puts them into that answer. The command line and the page make
them from the keys, and can choose among them. Keys may be missing, since servers may be older.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbdmirror.amounts import duration, size
from nbdmirror.point_sentences import fits, of_points, of_promises
from nbdmirror.rates import EVEN

SILENT_S = 5.0
"""A server that answers nothing for so long is reported."""

RETRIED_S = 10.0
"""Ignored errors are retried more often than this."""

LEAST_SHARE = 0.001
"""A smaller share of guests' time is not told as a number."""

MINUTE_S = 65.0
"""The shares of the last minute are those of so much time at most."""

WIDE = 0.4
"""A range of more than this part of what is likely is told."""

Job = dict[str, Any]

_WAITS = {
    "source-read": "waits for the source to read",
    "target-write": "waits for the target to write",
    "target-flush": "waits for the target to flush",
    "speed-limit": "waits for its speed limit",
    "yielding": "leaves room for guests' requests, and is slower for that",
    "acknowledgement": "waits for the acknowledgement of a point",
    "nothing-to-do": "has nothing to do",
}
"""What a job that copies does now."""

_SAYS_IT_ALL = frozenset(
    {"paused", "pausing", "pending", "waiting", "target", "source", "retry", "error", "failure"}
)
"""Kinds of remarks on a job that does not copy, or not as it should."""


def explanation(job: Job) -> list[str]:
    """All sentences about a job."""
    found = [doing(job), *(remark.text for remark in remarks(job)), cost(job)]
    return [text for text in found if text]


def doing(job: Job) -> str:
    """What the job waits for, and whether it will end; empty where the remarks say it all."""
    kinds = _kinds(remarks(job))
    if "waits" not in job or kinds & _SAYS_IT_ALL or state(job) not in ("running", "ready"):
        return ""
    points = job.get("x-nbdmirror-points", {})
    if awaited := points.get("awaited"):
        text = f"waits for the acknowledgement of point {awaited['sequence']}"
        return f"{text}: nothing is written to the target until there is a snapshot of the point"
    if "sequence" in points and job.get("ready"):
        return of_points(points)
    parts = [_waits_for(job), "" if kinds & {"behind", "ending", "pause"} else _outlook(job)]
    return "; ".join(part for part in parts if part)


def _waits_for(job: Job) -> str:
    """What the job waits for now; empty if not known."""
    waits = job["waits"]
    now = waits["now"]
    if now not in _WAITS:
        return ""
    text = _WAITS[now]
    if now == "speed-limit" and job.get("speed"):
        text += f" of {size(job['speed'])}/s"
    period = "the last minute" if _is_older(waits) else "the time"
    return f"{text} ({_percents(waits['last-minute'])[now]} % of {period})"


def _outlook(job: Job) -> str:
    """Whether the job will end, where nothing is in its way."""
    if job.get("ready"):
        return "the target follows the source, and the job can be completed"
    if job.get("copy-bytes-per-s") is None:
        return "its end cannot be predicted yet"
    if (left_s := job.get("left-s")) is None:
        why, least_s = _why_unknown(job), job.get("left-s-min")
        text = f"{why}, so its end cannot be predicted" if why else "its end cannot be predicted"
        return text if least_s is None else f"{text}: it takes {duration(least_s)} at least"
    has_zeroes = job.get("copied-bytes", 0) > job.get("written-bytes", 0)
    sooner = ", or sooner if more of the disk is zeroes" if has_zeroes else ""
    return f"in sync in about {duration(left_s)}{_range(job, left_s)}{sooner}"


def _range(job: Job, left_s: float) -> str:
    """How sure the prediction is; empty if it is, or if nothing is known of that."""
    least_s, most_s = job.get("left-s-min"), job.get("left-s-max")
    if least_s is None:
        return ""
    if most_s is None:
        return f" ({duration(least_s)} at least)"
    if most_s - least_s <= WIDE * left_s:
        return ""
    return f" ({duration(least_s)} to {duration(most_s)})"


def _why_unknown(job: Job) -> str:
    """Why what is left does not become less, or not by data; empty if it does."""
    copied, dirtied = job.get("copy-bytes-per-s", 0), job.get("dirty-bytes-per-s", 0)
    if copied:
        return "the guest changes as much as is copied" if dirtied >= EVEN * copied else ""
    if job.get("zero-bytes-per-s"):
        return "the last seconds copied holes and no data"
    return "nothing was copied in the last seconds"


def shares(job: Job) -> dict[str, str]:
    """The shares of the time, the largest first: since the start, and of the last minute if that is
    not the same."""
    waits = job.get("waits")
    if not waits:
        return {}
    found = {"in the last minute": waits["last-minute"]} if _is_older(waits) else {}
    found["since the start"] = waits["since-start"]
    return {period: _shares(parts) for period, parts in found.items()}


def _is_older(waits: Mapping[str, Any]) -> bool:
    """The last minute is not all of the job's time."""
    age_s: float = sum(waits["seconds"].values())
    return age_s > MINUTE_S


def _shares(parts: Mapping[str, float]) -> str:
    ordered = sorted(_percents(parts).items(), key=lambda item: -item[1])
    return ", ".join(f"{cause.replace('-', ' ')} {part} %" for cause, part in ordered if part)


def _percents(parts: Mapping[str, float]) -> dict[str, int]:
    """Whole per cents that add up to 100: the largest fractions are rounded up."""
    percents = {cause: int(100 * part) for cause, part in parts.items()}
    fractions = sorted(parts, key=lambda cause: percents[cause] - 100 * parts[cause])
    for cause in fractions[: 100 - sum(percents.values())]:
        percents[cause] += 1
    return percents


def state(job: Job) -> str:
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
    is_trouble: bool = True
    """Not what a user has asked for, or what comes by itself."""


def remarks(job: Job) -> list[Remark]:
    found = [*_of_the_end(job), *_of_the_pause(job), *_of_the_servers(job)]
    found += [*_of_the_time(job), *_of_the_throttle(job)]
    is_paused = state(job).split()[0] in ("paused", "standby")
    if is_paused and job.get("io-status", "ok") == "ok" and job.get("ending", "none") == "none":
        text = "copies nothing while it is paused; continue with: nbdmirror resume"
        found.append(Remark("paused", text, is_trouble=False))
    if state(job) == "pausing":
        text = "will pause when its requests in flight have ended"
        found.append(Remark("pausing", text, is_trouble=False))
    found += [Remark(kind, text) for kind, text in of_promises(job)]
    is_copying = state(job) in ("running", "ready")
    if job.get("falling-behind") and is_copying and not _kinds(found) & _SAYS_IT_ALL:
        found.append(Remark("behind", _behind(job)))
    return found


def _kinds(noted: list[Remark]) -> set[str]:
    return {remark.kind for remark in noted}


def _behind(job: Job) -> str:
    """That the job will not end, why, and what would end it: by what it waits for."""
    now = (job.get("waits") or {}).get("now")
    is_limited = bool(job.get("speed")) and now in ("speed-limit", None)
    who = "the source gives" if now == "source-read" else "the target takes"
    if now == "yielding":
        who = "a copy that leaves room for guests takes"
    if is_limited:
        who = "the speed limit allows"
    rates = "the guest writes faster"
    copied, dirtied = job.get("copy-bytes-per-s"), job.get("dirty-bytes-per-s")
    if copied is not None and dirtied is not None:
        rates = f"the guest changes {size(dirtied)}/s of different data, {who} {size(copied)}/s"
        if EVEN * dirtied <= copied:  # what is copied is changed again, in turns or all the time
            rates = f"{who} {size(copied)}/s, and the guest changes as much of that again"
    end = "the mirror does not catch up" if job.get("ready") else "the mirror does not finish"
    help_ = "raise the limit with: nbdmirror set-speed" if is_limited else _help_behind(job)
    return f"falls behind: {rates}: at these rates {end}; {help_}"


def _help_behind(job: Job) -> str:
    """What would end that it falls behind. What `--may` allows already is no advice, and is done to
    a READY job only after its end was requested (mirror/ladder.py)."""
    if job.get("copy-mode") in ("write-blocking", "points"):
        return "a faster target, or a throttle of the guest, would end this"
    may: list[str] = job.get("may", [])
    follows = bool(job.get("ready")) and job.get("ending", "none") == "none"
    advised = []
    if not follows and "throttle" not in may:
        advised.append(f"nbdmirror change --may {','.join(['throttle', *may])}")
    if follows or "write-blocking" not in may:
        advised.append("nbdmirror copy-mode write-blocking")
    if follows and may:
        advised.append("nbdmirror complete")
    if not advised:
        return "what --may allows will end this"
    return f"this would end it: {', or: '.join(advised)}"


def _of_the_end(job: Job) -> list[Remark]:
    status, found = job.get("status"), []
    if status == "pending" and not job.get("auto-finalize"):
        text = "has finished its work; end the job with: nbdmirror finalize"
        found.append(Remark("pending", text, is_trouble=False))
    elif status == "waiting":
        text = "has finished its work and waits for the other jobs of its group"
        found.append(Remark("waiting", text, is_trouble=False))
    elif status == "concluded" and not job.get("auto-dismiss"):
        text = "has ended; remove the job with: nbdmirror dismiss"
        found.append(Remark("concluded", text, is_trouble=False))
    elif status not in ("pending", "concluded") and job.get("ending", "none") != "none":
        ending = job["ending"]
        since = duration(job.get("ending-for-s", 0))
        what, then = "being cancelled without --force", "end"
        if ending == "complete":
            what, then = "completing", "pivot"
        text = f"{what} for {since}: the job will {then} as soon as possible"
        if status == "standby":
            text = f"will {'complete' if ending == 'complete' else 'end'} after: nbdmirror resume"
        if vain := job.get("quiesce-timeouts", 0):
            text += f"; guest writes were held {vain} times without success"
        found.append(Remark("ending", text, is_trouble=bool(vain)))
    return found


def cost(job: Job) -> str:
    """What guests have paid for the job; empty if not known."""
    if (share := job.get("guests-wait-share")) is None:
        return ""
    if not share:
        return "no write, trim or flush of a guest has waited for the mirror"
    part = f"{share:.1%}".replace("%", " %") if share >= LEAST_SHARE else "less than 0.1 %"
    return f"guests' writes, trims and flushes spent {part} of their time waiting for the mirror"


def _of_the_throttle(job: Job) -> list[Remark]:
    if (hot_bytes := job.get("blocking-bytes")) is not None:
        text = f"guests' writes to the {size(hot_bytes)} that they change again and again wait for"
        text += (
            " the target, so that the mirror ends; end that with: nbdmirror change --may nothing"
        )
        return [Remark("blocking", text)]
    if (allowed := job.get("throttle-bytes-per-s")) is None:
        return []
    text = f"the guest is throttled, so that the mirror ends: it may make {size(allowed)}/s dirty"
    return [Remark("throttle", f"{text}; end that with: nbdmirror change --may nothing")]


def _of_the_pause(job: Job) -> list[Remark]:
    allowed_ms, pause_ms = job.get("max-pause-ms"), job.get("pause-predicted-ms")
    if allowed_ms is None or pause_ms is None or pause_ms <= allowed_ms:
        return []
    then = "the pivot waits" if job.get("ending") == "complete" else "a pivot would wait"
    text = f"a pivot would hold guests' writes for {pause_ms:.0f} ms now, and {allowed_ms:g} ms are"
    text += f" allowed: {then} for a better moment; allow more with: nbdmirror change --max-pause"
    return [Remark("pause", text)]


_AT_THE_DEADLINE = {
    "report": "nothing is done then; end it before with: nbdmirror complete",
    "cancel": "it is cancelled then",
    "complete": "it is completed then",
}
_NOT_READY = "it is not ready; give it up with: nbdmirror cancel"
_AFTER_THE_DEADLINE = {
    "report": "end it with: nbdmirror complete, or with: nbdmirror cancel",
    "cancel": "it is cancelled",
    "complete": "it is completed as soon as it is ready",
}


def _of_the_time(job: Job) -> list[Remark]:
    """Whether the deadline can be kept, and why not."""
    if (deadline := job.get("x-nbdmirror-deadline")) is None or job.get("status") == "concluded":
        return []
    outlook, action = deadline["outlook"], deadline["on-deadline"]
    name = f"its deadline in {duration(deadline['left-s'])}"
    if outlook == "passed":
        text = "its deadline has passed"
        if job.get("ending", "none") == "none":
            is_left = action == "report" and not job.get("ready")
            text += f"; {_NOT_READY if is_left else _AFTER_THE_DEADLINE[action]}"
    elif outlook == "not-known":
        is_copying = job.get("copy-bytes-per-s") is not None
        text = f"whether {name} can be kept is not known {'yet' if is_copying else 'now'}"
    elif outlook == "can-be-kept":
        text = f"{name} can be kept"
        if job.get("ready") and job.get("ending", "none") == "none":
            text += f"; {_AT_THE_DEADLINE[action]}"
    else:
        text = f"{name} {'may be missed' if outlook == 'may-be-missed' else 'cannot be kept'}"
        text += f": {_why_late(job)}"
    is_kept = outlook in ("not-known", "can-be-kept")
    return [Remark("deadline", text, is_trouble=not is_kept)]


def _why_late(job: Job) -> str:
    if job.get("ready"):
        return "a pivot would hold guests' writes for too long now"
    if (least_s := job.get("left-s-min")) is None:
        return "the guest changes as much as is copied"
    if (most_s := job.get("left-s-max")) is None:
        return f"the copy takes {duration(least_s)} at least"
    return f"the copy takes {duration(least_s)} to {duration(most_s)}"


def _of_the_servers(job: Job) -> list[Remark]:
    found = []
    give_up = "or give up with: nbdmirror cancel --force"
    if (lost_s := job.get("target-lost-for-s")) is not None:
        left_s = job.get("target-wait-left-s")
        how_long = "without a limit" if left_s is None else f"for {duration(left_s)} more"
        who, servers = _lost(job)
        text = f"{who} been lost for {duration(lost_s)}, reconnecting {how_long}; "
        if reason := job.get("target-lost-reason"):
            text += f"last attempt: {reason}; "
        found.append(Remark("target", f"{text}check {servers}, {give_up}"))
    for side in ("source", "target"):
        if (silent_s := job.get(f"{side}-silent-for-s", 0)) >= SILENT_S:
            who = f"the {side}"
            points = job.get("x-nbdmirror-points", {})
            if side == "target" and "sequence" in points and "journal-bytes" in points:
                who = "the target, or its journal,"
            text = f"{who} has not answered for {duration(silent_s)}; check it, {give_up}"
            found.append(Remark(side, text))
    error = job.get("last-error") or {}
    if error.get("action") == "ignore" and error.get("ago-s", RETRIED_S) < RETRIED_S:
        text = f"{error['operation']} error: {error.get('reason')}; trying again"
        found.append(Remark("retry", text))
    if job.get("io-status", "ok") != "ok":
        text = f"I/O error ({job['io-status']}): {last_error(job)}"
        help_ = "try again with: nbdmirror resume"
        if job["io-status"] == "nospace" and not fits(job):
            help_ = "the points before it stay; cancel the job with --force,"
            help_ += " and begin anew with a larger journal"
        found.append(Remark("error", f"{text}; {help_}"))
    if job.get("error"):
        found.append(Remark("failure", f"error: {job['error']}"))
    return found


def _lost(job: Job) -> tuple[str, str]:
    """What of the far side is lost, and where to look."""
    if job.get("journal-connected", True):
        return "the target has", "its server"
    if job.get("target-connected", True):
        return f"the journal {job.get('journal', 'of the points')} has", "its server"
    return "the target and its journal have", "their servers"


def last_error(job: Job) -> str:
    error = job.get("last-error") or {}
    return error.get("reason") or "see the server's log"
