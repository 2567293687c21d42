"""Group: jobs that end together, all well or none: QEMU's JobTxn (job.c).

Every job is in a group; alone, unless a grouped transaction started it. A job's ending waits in two
places: in WAITING until all jobs have done their work, and then, after finalize, level with its
guest held until all jobs are level. Meanwhile each mirror continues. Then the ends are recorded, if
state is kept (`commit`). From that moment on nothing can fail: all jobs end in one step of the
loop.

On the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from nbdmirror.devices.base import Done
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.options import Ending, MirrorOptions
from nbdmirror.mirror.point_group import PointGroup

HOLD_S = 1.0
"""How long a job's guest writes are held until the other jobs of its group are level."""


class GroupMember(Protocol):
    """What a group needs of each of its jobs."""

    id: str
    options: MirrorOptions
    status: JobStatus
    ending: Ending
    group: Group

    @property
    def is_over(self) -> bool: ...

    @property
    def is_level(self) -> bool:
        """Guest writes are held and the target equals the source, durably: `finish` may be
        called."""

    def pend(self) -> None:
        """All jobs of the group have done their work."""

    def advance_soon(self) -> None: ...

    def commit(self, done: Done) -> None:
        """The target is level: record the end that `ending` names, if state is kept."""

    def commit_failed(self, *, was_committed: bool) -> None:
        """The end of this job, or of another job of its group, could not be recorded: continue.
        `was_committed`: this job's end was recorded, and must be revoked."""

    def finish(self) -> None:
        """End well, now, as `ending` says. Never fails."""

    def cancel(self, *, force: bool, because: str = ...) -> None: ...

    def share_points(self, points: PointGroup) -> None:
        """The job makes its points, if there are any, with those of this group from now on."""

    def when_ended(self, call: Callable[[], None]) -> None: ...


class Group:
    """`jobs`: newest first, the order in which QEMU ends them."""

    def __init__(self, *jobs: GroupMember) -> None:
        self.jobs: list[GroupMember] = []
        self.is_finalizing = False
        """All jobs are PENDING and end; `finish` follows when all are level."""
        self.points = PointGroup()
        self._held_in_vain: set[GroupMember] = set()
        for job in jobs:
            self.add(job)

    def add(self, job: GroupMember) -> None:
        """Add the newest job, before it starts."""
        self.jobs.insert(0, job)
        job.group = self
        job.share_points(self.points)

    def arrived(self) -> None:
        """A job is WAITING. After the last one all become PENDING, and end unless a job has
        auto-finalize off."""
        is_breaking = len(self.jobs) > 1 and any(job.ending is Ending.CANCEL for job in self.jobs)
        if not is_breaking and all(job.status is JobStatus.WAITING for job in self.jobs):
            for job in self.jobs:
                job.pend()
            if all(job.options.auto_finalize for job in self.jobs):
                self.finalize()

    def finalize(self) -> None:
        """End all jobs, as soon as all are level."""
        self.is_finalizing = True
        for job in self.jobs:
            job.advance_soon()

    @property
    def is_level(self) -> bool:
        """All targets equal their sources, durably, and all guests' writes are held."""
        return all(job.is_level for job in self.jobs)

    def may_hold(self, job: GroupMember) -> bool:
        """Whether `job` may hold its guest. A job whose guest was held without success must wait
        until another job is level: a target that hangs must not stop other guests repeatedly."""
        return job not in self._held_in_vain

    def got_level(self) -> None:
        """A job is level and holds its guest. If all jobs are level, end; else the others
        follow."""
        if self.is_level:
            self._commit()
            return
        self._held_in_vain.clear()
        for job in self.jobs:
            job.advance_soon()

    def _commit(self) -> None:
        """Record all ends. Guests are held until the last result: nothing comes between."""
        jobs, failures = list(self.jobs), []
        left = set(jobs)

        def committed(job: GroupMember, error: BaseException | None) -> None:
            left.discard(job)
            if error is not None:
                failures.append(job)
            if left:
                return
            for one in jobs:
                if failures:
                    one.commit_failed(was_committed=one not in failures)
                else:
                    one.finish()

        for job in jobs:
            job.commit(partial(committed, job))

    def held_in_vain(self, job: GroupMember) -> None:
        """The guest of `job` was held, and not all jobs became level in time."""
        self._held_in_vain.add(job)
        if len(self._held_in_vain) == len(self.jobs):
            self._held_in_vain.clear()

    def break_up(self, cause: GroupMember) -> None:
        """`cause` has failed or was cancelled: the group cannot end well any more. The other jobs
        are cancelled by force, except those that were cancelled softly in the same step. Then each
        job is a group of one. Has no effect on a group of one."""
        if len(self.jobs) == 1:
            return
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            Group(job)
        for job in jobs:
            if job.ending is Ending.CANCEL:
                job.group.arrived()  # if it is WAITING, it no longer waits for the others
            elif job is not cause and not job.is_over:
                job.cancel(force=True, because=f"job {cause.id} of its group did not complete")
