"""The ladder: what is done to bring a mirror to its end, of what its user allows.

To wait for a good moment comes first, and costs the guest nothing: a guest that works by turns has
such moments (outlook.NEVER_S), and so does a pivot that is to be short (PIVOT_S). A deadline that
will be missed is a reason to wait no longer.

Then the guest is throttled: what it may make dirty is a part of what the copy takes, so that less
and less is left. How large a part, the deadline says. The throttle ends when the mirror is READY
and nobody wants its end yet, and before guests are held for a pivot.

Last guests' writes wait for the target. First only those to what is hot (disk/hot.py), if that is
most of what is left, and not most of the disk: the copier then brings the rest to its end. If that
is not enough, the copy mode is changed to write-blocking, in which less and less is left to copy,
however slow the target becomes. It stays until the mirror ends, or a user changes it.

Pure: no clock, no I/O.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from nbdmirror.mirror.options import CopyMode, MirrorOptions
from nbdmirror.mirror.outlook import NEVER_S

PIVOT_S = 30.0
"""How long a pivot waits for a moment in which the rest can be copied soon enough."""

LATE_S = 5.0
"""So long a deadline must seem to be missed."""

PATIENCE = 0.25
"""A pivot waits for no more than this part of the time until the deadline, but for LATE_S."""

RESERVE = 0.7
"""The copy is to take this part of the time until the deadline."""

PART, PART_MIN, PART_MAX = 0.5, 0.1, 0.75
"""What guests may make dirty, as part of what the copy takes: without a deadline, and bounds. With
more than the largest part a copy that is a little slower than expected comes no closer."""

HALVED_S = 10.0
"""A throttle that is not enough for a pivot after so much time is halved."""

HOT_LEFT, HOT_DISK = 0.75, 0.5
"""Writes to what is hot wait alone if that is this part of what is left, at least, and this part of
the disk, at most. Otherwise nothing would be gained, or nobody spared."""

HOT_S = 10.0
"""So much time they get at least, and a deadline must leave twice as much."""

CHANGE = 0.25
"""A throttle is changed by this part of itself, or of what the copy gains, or more: each change is
an event."""


class Rung(enum.StrEnum):
    """What a user can allow. The words are those of QMP."""

    THROTTLE = "throttle"
    WRITE_BLOCKING = "write-blocking"


@dataclass(frozen=True, slots=True)
class Situation:
    """A mirror that copies now."""

    is_ready: bool
    never: bool
    """Before READY: it does not get in sync (outlook.Prediction)."""
    pivot_waits_s: float
    """How long a pivot was wanted, and too much was left to copy."""
    is_ending: bool = False
    """Its end was requested."""
    late_s: float = 0.0
    """Before READY: how long its deadline has seemed to be missed."""
    deadline_left_s: float | None = None
    bytes_per_s: float | None = None
    """What the copy takes; None: not known."""
    left_bytes: int = 0
    throttle: float | None = None
    """What guests may make dirty in a second; None: there is no throttle."""
    throttled_s: float = 0.0
    hot_bytes: int = 0
    disk_bytes: int = 0
    blocked_s: float | None = None
    """For how long guests' writes to what is hot have waited for the target; None: they do not."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done, and why."""

    rung: Rung
    reason: str
    bytes_per_s: float | None = None
    """Of a throttle; None: release it."""
    hot_bytes: int | None = None
    """Of write-blocking: only writes to so much wait, which is what is hot; None: all do."""


def next_step(options: MirrorOptions, now: Situation) -> Step | None:
    """None: go on as before."""
    if options.copy_mode is CopyMode.WRITE_BLOCKING:
        return None
    if now.blocked_s is not None:
        return _after_hot(now, now.blocked_s)
    if now.throttle is not None:
        if now.is_ready and not now.is_ending:
            return Step(Rung.THROTTLE, "the mirror is ready, and its end was not requested")
        is_vain = now.never or (now.is_ready and now.pivot_waits_s > 0)
        if Rung.WRITE_BLOCKING in options.may and is_vain and now.throttled_s >= NEVER_S:
            return _blocking(now, f"the throttle was not enough for {now.throttled_s:.0f} s")
        return _changed(now, now.throttle)
    if (reason := _reason(now)) is None:
        return None
    if Rung.THROTTLE in options.may and (wanted := _allowed(now)) is not None:
        return Step(Rung.THROTTLE, reason, wanted)
    if Rung.WRITE_BLOCKING in options.may:
        return _blocking(now, reason)
    return None


def _blocking(now: Situation, reason: str) -> Step:
    is_soon = now.deadline_left_s is not None and now.deadline_left_s < 2 * HOT_S
    least, most = HOT_LEFT * now.left_bytes, HOT_DISK * now.disk_bytes
    is_enough = now.hot_bytes > 0 and least <= now.hot_bytes <= most
    return Step(
        Rung.WRITE_BLOCKING, reason, hot_bytes=now.hot_bytes if is_enough and not is_soon else None
    )


def _after_hot(now: Situation, blocked_s: float) -> Step | None:
    """Writes to what is hot wait: all others wait too, if that was not enough."""
    if (reason := _reason(now)) is None or blocked_s < (NEVER_S if now.never else HOT_S):
        return None
    text = f"that writes to what is hot wait was not enough for {blocked_s:.0f} s: {reason}"
    return Step(Rung.WRITE_BLOCKING, text)


def _reason(now: Situation) -> str | None:
    """Why something must be done; None: nothing must."""
    if not now.is_ready:
        if now.never:
            return f"the copy has not come closer to its end for {NEVER_S:g} s"
        return "the copy would miss its deadline" if now.late_s >= LATE_S else None
    patience_s = PIVOT_S
    if now.deadline_left_s is not None:
        patience_s = min(PIVOT_S, max(LATE_S, now.deadline_left_s * PATIENCE))
    if now.pivot_waits_s < patience_s:
        return None
    return f"too much is left to copy for a pivot, since {now.pivot_waits_s:.0f} s"


def _changed(now: Situation, throttle: float) -> Step | None:
    """The throttle, where it is to be another one."""
    wanted, rate = _allowed(now), now.bytes_per_s
    if wanted is None or rate is None:
        return None
    gained = max(rate - throttle, rate * PART_MIN)
    if abs(wanted - throttle) <= CHANGE * min(throttle, gained):
        return None
    return Step(Rung.THROTTLE, "the copy, or the time that is left, has changed", wanted)


def _allowed(now: Situation) -> float | None:
    """What guests may make dirty in a second; None: not known."""
    if not now.bytes_per_s:
        return None
    part = PART
    if now.is_ready:
        part *= 0.5 ** (now.throttled_s // HALVED_S)
    elif now.deadline_left_s is not None:
        copy_s, time_s = now.left_bytes / now.bytes_per_s, RESERVE * now.deadline_left_s
        part = 1 - copy_s / time_s if time_s else 0.0
    return now.bytes_per_s * min(PART_MAX, max(PART_MIN, part))
