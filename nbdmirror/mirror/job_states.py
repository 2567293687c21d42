"""The states of a job and the verbs that each accepts: QEMU's tables (job.c), as data.

created -> running <-> paused
              |
              v
            ready <-> standby          (READY: the target was in sync once)
              |
              v
           waiting -> pending -> concluded -> null
              any state but the last three -> aborting -> concluded
"""

from __future__ import annotations

import enum

from nbdmirror.errors import CommandError


class JobStatus(enum.StrEnum):
    """QEMU's JobStatus; the values are those of QMP."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


S = JobStatus

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    S.UNDEFINED: frozenset({S.CREATED}),
    S.CREATED: frozenset({S.RUNNING, S.ABORTING, S.NULL}),
    S.RUNNING: frozenset({S.PAUSED, S.READY, S.ABORTING}),
    S.PAUSED: frozenset({S.RUNNING}),
    S.READY: frozenset({S.STANDBY, S.WAITING, S.ABORTING}),
    S.STANDBY: frozenset({S.READY}),
    S.WAITING: frozenset({S.PENDING, S.ABORTING}),
    S.PENDING: frozenset({S.ABORTING, S.CONCLUDED}),
    S.ABORTING: frozenset({S.CONCLUDED}),
    S.CONCLUDED: frozenset({S.NULL}),
    S.NULL: frozenset(),
}

_ACTIVE = frozenset({S.CREATED, S.RUNNING, S.PAUSED, S.READY, S.STANDBY})

VERBS: dict[str, frozenset[JobStatus]] = {
    "cancel": _ACTIVE | {S.WAITING, S.PENDING},
    "pause": _ACTIVE,
    "resume": _ACTIVE,
    "set-speed": _ACTIVE,
    "complete": frozenset({S.READY, S.STANDBY}),
    "finalize": frozenset({S.PENDING}),
    "dismiss": frozenset({S.CONCLUDED}),
    "change": _ACTIVE,
    "point": frozenset({S.READY}),
}
"""`complete` in standby is remembered until the job is resumed, as QEMU (6.1 and later) has it."""


def check_transition(old: JobStatus, new: JobStatus) -> None:
    """Assert that the table allows this transition."""
    assert new in TRANSITIONS[old], f"no way from job state {old} to {new}"


def check_verb(job_id: str, status: JobStatus, verb: str) -> None:
    """Raise CommandError, with QEMU's text, unless a job in `status` takes `verb`."""
    if status not in VERBS[verb]:
        raise CommandError(
            f"Job '{job_id}' in state '{status}' cannot accept command verb '{verb}'"
        )
