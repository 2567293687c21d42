"""Sentences about the points of a job, for explanation.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbdmirror.amounts import duration, size

MUCH = 1 / 2
"""A point that takes more than this part of the journal is reported."""

APPLIER_SILENT_S = 6.0
"""An applier that has given no sign of life for so long is reported. It gives one each second."""

APPLIER_AGAIN = "the image follows the points again"
"""An applier that was taken to be gone is not any more, or none is needed."""

Job = dict[str, Any]


def of_points(points: Mapping[str, Any]) -> str:
    """What the far side has, and for how long there is room for more."""
    if "journal-bytes" not in points:
        return f"point {points['sequence']} is safe: it was acknowledged"
    text = f"the far side has point {points['sequence']}, whatever is lost"
    if (used_bytes := points.get("journal-used-bytes")) is not None:
        text += f"; {size(used_bytes)} of {size(points['journal-bytes'])} of its journal are used"
    return "; ".join([text, *([found] if (found := outage(points)) else [])])


def outage(points: Mapping[str, Any]) -> str:
    """How long an outage of the far side the journal survives; empty if not known."""
    rate, room = points.get("change-bytes-per-s"), points.get("journal-point-bytes")
    if rate is not None and (lasts_s := points.get("journal-lasts-s")) is not None:
        long = duration(int(lasts_s))  # rounded down: it is for sure
        return f"it has room for an outage of {long} while guests change {size(rate)}/s"
    if rate == 0 and room is not None:
        many = size(room)
        return f"it has room for an outage in which guests change {many}; now they change nothing"
    return ""


def of_applier(silent_s: float | None) -> str:
    """That the applier of a job is taken to be gone, and what to do; empty if it is not.
    `silent_s`: for how long it has said nothing; None: it has nothing to do."""
    if silent_s is None or silent_s < APPLIER_SILENT_S:
        return ""
    text = f"`nbdmirror apply` beside the image has said nothing for {duration(silent_s)}"
    return f"{text}: run it again there, or give up with: nbdmirror cancel --force"


def of_promises(job: Job) -> list[tuple[str, str]]:
    """Remarks, each with its kind: on the lag, the journal, and how far back points reach."""
    found: list[tuple[str, str]] = []
    points = job.get("x-nbdmirror-points", {})
    rpo_s, lag_s = points.get("rpo-s"), job.get("lag-s", 0)
    if rpo_s is not None and lag_s > rpo_s:
        text = f"the lag is larger than the {rpo_s:g} s of --rpo"
        help_ = "check the far side, and the link to it"
        if "awaited" in points:
            help_ = "snapshots are made by: nbdmirror points --exec"
        found.append(("rpo", f"{text}; {help_}"))
    if "in-place-since-s" in points:
        text = "the far side has no point until the next one is made: what was changed did not fit"
        found.append(("in-place", f"{text} into the journal, and is copied in place"))
    if text := of_applier(points.get("applier-silent-s")):
        found.append(("applier", text))
    most = points.get("journal-point-bytes") if "sequence" in points else None
    if most is not None and _left_bytes(job) > MUCH * most:
        found.append(("journal", _small_journal(job, points)))
    reaches_s, keep_s = points.get("reaches-s"), points.get("keep-s")
    # Without a point there is none to reach back to.
    if points.get("kept") is False and None not in (reaches_s, keep_s):
        text = f"the points reach back {duration(reaches_s)}, and --keep asks for"
        text = f"{text} {duration(keep_s)}: the journal is too small for that"
        found.append(("keep", text))
    return found


def _small_journal(job: Job, points: Mapping[str, Any]) -> str:
    text = f"the next point takes {size(_left_bytes(job))}, and the journal has room for"
    text += f" {size(points['journal-point-bytes'])}"
    if not fits(job):
        return f"{text}: it does not fit"
    if lasts_s := points.get("journal-lasts-s"):
        text += f": in {duration(int(lasts_s))} it will not fit any more"
    return f"{text}; check the far side, and the link to it"


def fits(job: Job) -> bool:
    """The next point of a job with a journal does; also true of a job that makes none."""
    points = job.get("x-nbdmirror-points", {})
    most = points.get("journal-point-bytes") if "sequence" in points else None
    return most is None or _left_bytes(job) <= most


def _left_bytes(job: Job) -> int:
    return max(0, int(job.get("len", 0)) - int(job.get("offset", 0)))
