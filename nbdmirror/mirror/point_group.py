"""PointGroup: jobs whose points are of the same moments. Every job with points is in one; alone,
unless a grouped transaction started it.

    due -> CommonCut: behind the gates of all disks -> each job sends its own point

A job that cannot take part now (`cut_run` is None) is left out, so that the lag of the others stays
small. Only a cut in which all jobs take part has a group's number: whoever finds the number in one
journal finds the moment in the others, unless a point was broken on its way.

An image becomes no later point than that of the newest moment that all far sides have, as long as
its journal has room. So there is such a moment to be recovered, whatever is lost.

On the event loop's thread.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdmirror.disk.ledger import Ledger
from nbdmirror.errors import CommandError
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.activity import Activity
from nbdmirror.mirror.cut import Cut
from nbdmirror.mirror.job_states import JobStatus, check_verb
from nbdmirror.mirror.options import Ending
from nbdmirror.mirror.point_request import PointRequest, joined


@dataclass(frozen=True, slots=True)
class Moment:
    """What all points of one cut have."""

    time_ns: int
    """Wall time, nanoseconds since 1970."""
    group: int
    """0: not all jobs of the group have this moment, or there is one job."""


class CutRun(Protocol):
    """What is needed of each point_run.PointRun."""

    interval_s: float
    tried_s: float
    """When the last cut began, by the loop's clock; -inf: there was none."""
    is_running: bool
    """Points are made."""
    common_number: float
    """The point of the newest moment that all far sides have: later ones are applied only if there
    is no room. inf: there was no such moment yet; 0: perhaps in an earlier process."""

    @property
    def ledger(self) -> Ledger: ...

    @property
    def has_changes(self) -> bool: ...

    @property
    def is_asked(self) -> bool:
        """A user waits for a point."""

    @property
    def is_held_up(self) -> bool:
        """The last cut was too late, because of guests of this disk, and another one would hold
        them too soon."""

    @property
    def is_free(self) -> bool:
        """A point can be begun."""

    def has_name(self, name: str) -> bool:
        """A point that can be recovered has this name, or one that was asked for."""

    def ask(self, request: PointRequest) -> None:
        """Make a point for `request`, as soon as the one in progress has ended."""

    def cutting(self, cut: CommonCut) -> None:
        """Prepare what `take` needs, before guests are held."""

    def take(self, moment: Moment) -> None:
        """Begin a point behind the closed gate."""

    def taken(self, *, is_common: bool) -> None:
        """The gates are open. `is_common`: all jobs of the group have this moment."""

    def late(self, *, is_cause: bool) -> None:
        """Guests' requests did not end in time. `is_cause`: this disk's."""

    def abandoned(self) -> None:
        """The cut was given up: another one may begin at once."""


class PointMember(Protocol):
    """A job."""

    id: str
    status: JobStatus
    activity: Activity
    ending: Ending

    @property
    def interval_s(self) -> float: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def pause_wanted(self) -> bool: ...

    @property
    def run(self) -> CutRun | None:
        """Since the first copy is in sync."""

    @property
    def cut_run(self) -> CutRun | None:
        """None: it cannot take part in a cut now."""


class PointGroup:
    """`key` names the group where it is kept; "": there was never more than one job."""

    def __init__(self, key: str = "") -> None:
        self.key = key
        self.members: list[PointMember] = []
        self._is_waiting = False
        """It is time, and not every run was free."""
        self._moment = 0
        self._numbers: dict[CutRun, int] = {}
        """The points of that moment that are committed."""

    @property
    def is_common(self) -> bool:
        """There is more than one job."""
        return len(self.members) > 1

    def add(self, member: PointMember) -> None:
        self.members.append(member)
        if self.is_common and not self.key:
            self.key = uuid.uuid4().hex

    def leave(self, member: PointMember) -> None:
        """Has no effect on one that has left."""
        if member in self.members:
            self.members.remove(member)

    def check_interval(self, interval_s: float) -> None:
        """Raise CommandError if a job of this interval cannot make its points with the others."""
        for member in self.members:
            if member.interval_s != interval_s:
                text = f"expects {member.interval_s:g}, as job '{member.id}' of its group has"
                raise CommandError(f"Parameter 'x-nbdmirror-interval' {text}")

    def due(self, asking: CutRun, now_s: float) -> list[CutRun]:
        """The runs that are to make a point now, at one moment; none: it is not time yet. The
        interval counts from the last cut of any of them; a job that begins with points has its
        first one at once. `asking`: asks twenty times a second, and looks at the others only if it
        has something itself, or another one waits for it."""
        is_near = asking.has_changes and now_s >= asking.tried_s + asking.interval_s
        if not (is_near or asking.is_asked or self._is_waiting):
            return []
        due = self._due(now_s)
        self._is_waiting = bool(due)
        return due

    def _due(self, now_s: float) -> list[CutRun]:
        runs = [run for member in self.members if (run := member.cut_run) is not None]
        free = [run for run in runs if not run.is_held_up]
        if any(run.is_asked for run in runs):  # all of them are
            return free if len(free) == len(runs) else []
        tries_s = [run.tried_s for run in free]
        is_first = -math.inf in tries_s
        is_time = is_first or (bool(free) and now_s >= max(tries_s) + free[0].interval_s)
        return free if is_time and any(run.has_changes for run in free) else []

    def committed(self, run: CutRun, group: int, number: int) -> None:
        """The far side of `run` has the point `number`, of the moment `group`."""
        if group and group != self._moment:
            self._moment, self._numbers = group, {}
        if group:
            self._numbers[run] = number
            if all(member.run in self._numbers for member in self.members):
                for one, its_number in self._numbers.items():
                    one.common_number = its_number

    def cutting(self, runs: Sequence[CutRun]) -> bool:
        """`runs` are cut now. Whether these are all, and several."""
        self._is_waiting = False
        return self.is_common and len(runs) == len(self.members)

    def ask(self, first: PointMember, name: str) -> PointRequest:
        """Ask `first`, and with it all others, for points of one moment with this name. Raises
        CommandError; then nothing has changed."""
        runs: dict[str, CutRun] = {}
        for member in (first, *(one for one in self.members if one is not first)):
            try:
                runs[member.id] = run_for_point(member, name)
            except CommandError as error:
                if member is first:
                    raise
                text = f"{error}; job '{first.id}' makes its points together with this one"
                raise CommandError(text) from error
        parts = {job_id: PointRequest(name) for job_id in runs}
        request = joined(parts)
        for job_id, run in runs.items():
            run.ask(parts[job_id])
        return request


def run_for_point(job: PointMember, name: str) -> CutRun:
    """The run of the job that makes a point of this name, if it is asked. Raises CommandError if
    there can be none now."""
    if job.pause_wanted and job.is_ready:
        raise CommandError(f"The block job for device '{job.id}' is currently paused")
    if job.status in (JobStatus.CREATED, JobStatus.RUNNING, JobStatus.PAUSED):
        text = f"Job '{job.id}' makes no points yet: the image is being copied for the first"
        raise CommandError(f"{text} time")
    check_verb(job.id, job.status, "point")
    if job.ending is not Ending.NONE:
        raise CommandError(f"Job '{job.id}' is ending: it makes its last point by itself")
    if job.run is None or not job.run.is_running:
        raise CommandError(f"Job '{job.id}' makes no points now: it is {job.activity.value}")
    if name and job.run.has_name(name):
        raise CommandError(f"The journal of job '{job.id}' has a point '{name}' already")
    return job.run


class CommonCut:
    """One cut of the disks of `runs`, of which none has a point in progress."""

    def __init__(self, runs: Sequence[CutRun], *, loop: Loop, moment: Callable[[], Moment]) -> None:
        """`moment` is called once, behind the closed gates."""
        self._runs = tuple(runs)
        self._moment = moment
        self._is_common = False
        self._cut = Cut(
            [run.ledger for run in self._runs],
            loop=loop,
            take=self._take,
            on_taken=lambda held_s: self._taken(),
            on_late=lambda held_s: self._late(),
        )

    def start(self) -> None:
        for run in self._runs:
            run.cutting(self)
        self._cut.start()

    def abandon(self) -> None:
        """One of the runs has to stop."""
        self._cut.abandon()
        for run in self._runs:
            run.abandoned()

    def _take(self) -> None:
        moment = self._moment()
        self._is_common = bool(moment.group)
        for run in self._runs:
            run.take(moment)

    def _taken(self) -> None:
        for run in self._runs:
            run.taken(is_common=self._is_common)

    def _late(self) -> None:
        for run in self._runs:
            run.late(is_cause=run.ledger in self._cut.late)
