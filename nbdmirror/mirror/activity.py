"""What a mirror job is doing: one value, and the table of what may follow it.

QEMU's tools see a job's status (job_states). The activity is what the job really does, and is
finer: a RUNNING job copies, or waits for its target, or drains before it is PAUSED. The words for
endings are those of QEMU's JobDriver: prepare, commit, abort, clean."""

from __future__ import annotations

import enum


class Activity(enum.Enum):
    """What a job is doing now."""

    NOT_STARTED = "not started"
    RECONNECTING = "reconnecting"
    """Source and target are reconnected, if they are lost."""
    SCANNING = "scanning"
    """The source's extents are queried."""
    COPYING = "copying"
    FLUSHING = "flushing"
    """In sync for the first time: READY follows (rule 14)."""
    PREPARING = "preparing"
    """Before an end: slow work is done while guests continue to write."""
    QUIESCING = "quiescing"
    """The target becomes level; guests' writes are held for the last part."""
    HELD = "held"
    """Level, with guests' writes held, until all jobs of the group are level."""
    COMMITTING = "committing"
    """The same, while the end is recorded. Nothing can come between any more."""
    POSTPONED = "postponed"
    """Copying; the end could not be recorded, and the job tries again after a while."""
    BACKING_OFF = "backing off"
    """After an ignored error, until the next attempt."""
    PAUSING = "pausing"
    """Nothing new begins; requests in flight end."""
    PAUSED = "paused"
    ABORTING = "aborting"
    """A bad end: nothing new begins; requests in flight end, or are given up."""
    CLEANING = "cleaning"
    """The bad end is recorded."""
    ENDED = "ended"

    @property
    def copies(self) -> bool:
        """The copier runs, and guests' writes are synchronous in write-blocking mode."""
        return self in _COPIES

    @property
    def may_hold_guests(self) -> bool:
        """Guests' writes may be held; in no other activity they are."""
        return self in _HOLDS_GUESTS

    @property
    def hears_errors(self) -> bool:
        """The error policy decides about an error. In the other activities an error is part of an
        earlier one, or comes too late."""
        return self in _HEARS_ERRORS

    @property
    def waits_to_try_again(self) -> bool:
        """A timer will begin the next attempt."""
        return self in (Activity.POSTPONED, Activity.BACKING_OFF)

    @property
    def is_pause(self) -> bool:
        """The job is paused, or is about to be."""
        return self in (Activity.PAUSING, Activity.PAUSED)

    @property
    def is_bad_end(self) -> bool:
        """A bad end, or the end itself: only the end can follow."""
        return self in (Activity.ABORTING, Activity.CLEANING, Activity.ENDED)


A = Activity

_HOLDS_GUESTS = frozenset({A.QUIESCING, A.HELD, A.COMMITTING})
_COPIES = _HOLDS_GUESTS | {A.COPYING, A.FLUSHING, A.PREPARING, A.POSTPONED}
_HEARS_ERRORS = _COPIES - {A.COMMITTING} | {A.RECONNECTING, A.SCANNING}
_TROUBLE = frozenset({A.RECONNECTING, A.BACKING_OFF, A.PAUSING, A.ABORTING})
"""Activities that an error or the user may cause at almost any time."""

MAY_FOLLOW: dict[Activity, frozenset[Activity]] = {
    A.NOT_STARTED: frozenset({A.RECONNECTING, A.PAUSING, A.ABORTING, A.ENDED}),
    A.RECONNECTING: _TROUBLE | {A.SCANNING, A.COPYING},
    A.SCANNING: _TROUBLE,
    A.COPYING: _TROUBLE | {A.FLUSHING, A.PREPARING},
    A.FLUSHING: _TROUBLE | {A.COPYING},
    A.PREPARING: _TROUBLE | {A.QUIESCING, A.POSTPONED},
    A.QUIESCING: _TROUBLE | {A.HELD, A.COPYING},
    A.HELD: _TROUBLE | {A.COMMITTING, A.COPYING},
    A.COMMITTING: frozenset({A.POSTPONED, A.ENDED}),
    A.POSTPONED: _TROUBLE | {A.COPYING},
    A.BACKING_OFF: frozenset({A.RECONNECTING, A.PAUSING, A.ABORTING}),
    A.PAUSING: frozenset({A.RECONNECTING, A.PAUSED, A.ABORTING}),
    A.PAUSED: frozenset({A.RECONNECTING, A.ABORTING}),
    A.ABORTING: frozenset({A.CLEANING}),
    A.CLEANING: frozenset({A.ENDED}),
    A.ENDED: frozenset(),
}


def check_follows(old: Activity, new: Activity) -> None:
    """Assert that the table allows `new` after `old`."""
    assert new in MAY_FOLLOW[old], f"no way from {old.value} to {new.value}"
