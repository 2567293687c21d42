"""Group: jobs that end together, all well or none: QEMU's JobTxn (job.c).

Every job is in one; alone, unless a grouped transaction started it. Its ending is held up in two
places: in WAITING until all have done their work, and, once they are to be finalized, level with
guests held until all are. Meanwhile each goes on as a mirror. Then that they have ended is written
down, where such things are kept (`commit`), and from that moment on nothing can fail: all end in
one step of the loop.

On the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from nbdmirror.devices.base import Done
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.options import Ending, MirrorOptions

HOLD_S = 1.0
"""How long a job's guest writes are held for the other jobs of its group to get level."""


class GroupMember(Protocol):
    """What a group asks of each of its jobs."""

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
        """All of the group have done their work."""

    def advance_soon(self) -> None: ...

    def commit(self, done: Done) -> None:
        """Level: write down that the job has ended, as `ending` says, where that is kept."""

    def commit_failed(self, *, was_committed: bool) -> None:
        """That of this job, or of another one of its group, could not be written down: go on.
        `was_committed`: this one's was, and has to be taken back."""

    def finish(self) -> None:
        """End well, now, as `ending` says. Cannot fail."""

    def cancel(self, *, force: bool, because: str = ...) -> None: ...

    def when_ended(self, call: Callable[[], None]) -> None: ...


class Group:
    """`jobs`: newest first, the order in which QEMU ends them."""

    def __init__(self, *jobs: GroupMember) -> None:
        self.jobs: list[GroupMember] = []
        self.is_finalizing = False
        """All are PENDING, and are to end; `finish` follows when all are level."""
        self._held_in_vain: set[GroupMember] = set()
        for job in jobs:
            self.add(job)

    def add(self, job: GroupMember) -> None:
        self.jobs.insert(0, job)
        job.group = self

    def arrived(self) -> None:
        """A job is WAITING. With the last one all are PENDING, and end unless one of them wants
        `finalize` for that."""
        is_breaking = len(self.jobs) > 1 and any(job.ending is Ending.CANCEL for job in self.jobs)
        if not is_breaking and all(job.status is JobStatus.WAITING for job in self.jobs):
            for job in self.jobs:
                job.pend()
            if all(job.options.auto_finalize for job in self.jobs):
                self.finalize()

    def finalize(self) -> None:
        self.is_finalizing = True
        for job in self.jobs:
            job.advance_soon()

    @property
    def is_level(self) -> bool:
        """All targets equal their sources, durably, and all guests' writes are held."""
        return all(job.is_level for job in self.jobs)

    def may_hold(self, job: GroupMember) -> bool:
        """A job whose guest was held in vain does not hold it again before another one has got
        level: a target that hangs must not stop the others' guests time after time."""
        return job not in self._held_in_vain

    def got_level(self) -> None:
        """A job holds its guest. If that was the last one all end, else the others come along."""
        if self.is_level:
            self._commit()
            return
        self._held_in_vain.clear()
        for job in self.jobs:
            job.advance_soon()

    def _commit(self) -> None:
        """Guests are held until the last one is told of, well or not: nothing comes between."""
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
        self._held_in_vain.add(job)
        if len(self._held_in_vain) == len(self.jobs):
            self._held_in_vain.clear()

    def break_up(self, cause: GroupMember) -> None:
        """`cause` has failed or was cancelled: no result counts any more. The others are cancelled
        by force, except those that were cancelled softly in the same step. Each is alone then; a
        job that was alone has no others."""
        if len(self.jobs) == 1:
            return
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            Group(job)
        for job in jobs:
            if job.ending is Ending.CANCEL:
                job.group.arrived()  # if it has; it was held up by the others
            elif job is not cause and not job.is_over:
                job.cancel(force=True, because=f"job {cause.id} of its group did not complete")
