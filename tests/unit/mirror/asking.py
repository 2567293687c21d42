"""What users ask of a job in each state that it gets into: its status, with its sentences, and its
map."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from unit.mirror.jobdevices import StillLoop

from nbdmirror.cli.status import job_parts
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.qmp.results import JOB_STATUS
from nbdmirror.qmp.status_query import job_status
from nbdmirror.server.course import Course

CELLS = 16


class Asking:
    """Asks after each step of the loop that changes the job's state, from now on."""

    def __init__(self, loop: StillLoop, job: MirrorJob) -> None:
        self._job = job
        courses = {job.id: Course(job, loop.clock, loop.clock, tuple)}
        chronicle = SimpleNamespace(courses=courses, results={})
        self._server: Any = SimpleNamespace(loop=loop, chronicle=chronicle)
        self._state: tuple[object, ...] = ()
        loop.after_step.append(self._look)

    def _look(self) -> None:
        job = self._job
        state: tuple[object, ...] = job.status, job.activity, job.ending
        if isinstance(job, PointsJob):
            run = job.run
            state += job.plan is None, run is None, run and (run.is_running, run.is_idle)
        if state != self._state:
            self._state = state
            self.ask()

    def ask(self) -> dict[str, Any]:
        found = job_status(self._server, self._job)
        JOB_STATUS.check(found)
        assert (found["device"], found["status"]) == (self._job.id, str(self._job.status))
        assert job_parts(found)
        if not self._job.is_over:
            self._job.map(CELLS)
        return found
