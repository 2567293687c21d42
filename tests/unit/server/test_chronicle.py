"""The jobs of a server are looked at, whatever becomes of one of them: in virtual time."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from unit.mirror.jobdevices import StillLoop
from unit.mirror.jobparts import KIB, JobWorld

from nbdmirror.events import EventRing
from nbdmirror.mirror.deadline import Kept
from nbdmirror.mirror.group import Group
from nbdmirror.mirror.options import CopyMode, OnDeadline
from nbdmirror.qmp.status_query import job_status
from nbdmirror.server.chronicle import Chronicle
from nbdmirror.server.course import Course

WALL_S = 1e9
"""How far the wall clock is ahead of the loop's."""

SLOW_S = 5.0
"""A write of the slow job; it has sixteen."""


class Fault(Exception):
    """Of the product."""


class Server:
    """Several jobs whose histories are kept together."""

    def __init__(self) -> None:
        self.loop, self.events = StillLoop(), EventRing(lambda: 0.0)
        loop: Any = self.loop
        self.chronicle = Chronicle(loop, self.events, self._time_s, lambda *_: None)

    def _time_s(self) -> float:
        return self.loop.now_s + WALL_S

    def job(self, name: str, *, write_s: float = 0.0, **more: Any) -> JobWorld:
        world = JobWorld(
            loop=self.loop, events=self.events, job_id=name, buffer_bytes=64 * KIB, **more
        )
        self.chronicle.begin(world.job)
        if write_s:
            world.target.requests.delays_s["write"] = write_s
        return world

    def deadline(self, world: JobWorld, in_s: float, action: OnDeadline) -> None:
        at_s = self._time_s() + in_s
        world.job.change(CopyMode.BACKGROUND, deadline_at_s=at_s, on_deadline=action)

    def status(self, world: JobWorld) -> dict[str, Any]:
        """What a user is told of the job."""
        asked: Any = SimpleNamespace(loop=self.loop, chronicle=self.chronicle)
        return job_status(asked, world.job)

    def assert_looks(self) -> None:
        """A job that begins now is looked at, as its deadline shows."""
        world = self.job("last").start()
        self.deadline(world, 5.0, OnDeadline.REPORT)
        self.loop.pass_s(10.0)
        assert [data["done"] for data in world.told("X_NBDMIRROR_DEADLINE")] == ["nothing"]
        assert self.chronicle.courses["last"].rates is not None
        world.assert_identical()


@pytest.fixture
def server() -> Server:
    return Server()


def test_a_job_that_waits_for_its_group_does_not_fall_behind(server: Server) -> None:
    """Beside a guest that writes now and then, until the other copy is there, and far longer than
    a copy may take that comes no closer to its end."""
    first, slow = server.job("first", write_s=0.2), server.job("slow", write_s=SLOW_S)
    Group(first.job, slow.job)
    for world in (first, slow):
        world.start()
        server.deadline(world, 3600.0, OnDeadline.REPORT)
    course = server.chronicle.courses["first"]
    server.loop.pass_s(5.0)
    first.job.complete()
    server.loop.pass_s(1.0)
    while slow.status == "running":
        assert (first.status, course.prediction, course.kept) == ("waiting", None, Kept.UNKNOWN)
        found = server.status(first)
        assert not found["falling-behind"] and "left-s" not in found
        first.write(0)
        server.loop.pass_s(0.5)
    slow.job.complete()
    server.loop.pass_s(5.0)
    for world in (first, slow):
        assert world.job.pivoted
        world.assert_identical()


@pytest.mark.parametrize("state", ["waiting", "pending"])
def test_a_deadline_may_end_a_job_that_has_done_its_work(server: Server, state: str) -> None:
    """Such a job ends within the look at it."""
    first = server.job("first", auto_finalize=False)
    slow = server.job("slow", write_s=SLOW_S)
    if state == "waiting":
        Group(first.job, slow.job)
    first.start()
    slow.start()
    server.deadline(first, 30.0, OnDeadline.CANCEL)
    server.loop.pass_s(5.0)
    first.job.complete()
    server.loop.pass_s(5.0)
    assert first.status == state
    server.loop.pass_s(25.0)
    names = ("X_NBDMIRROR_DEADLINE", "BLOCK_JOB_CANCELLED")
    assert [event.name for event in server.events.pull(0) if event.name in names][:2] == [*names]
    assert [data["done"] for data in first.told(names[0])] == ["cancel-by-force"]
    assert first.job.is_over and str(first.job.failure) == "its deadline has passed"
    assert slow.job.is_over == (state == "waiting")
    server.assert_looks()


def test_a_look_that_fails_is_not_the_last_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it another job's."""
    for name in ("broken", "next"):
        server.job(name).start()
    look = Course.look
    looks = {"broken": 0, "next": 0}

    def failing(self: Course) -> None:
        looks[self.disk] += 1
        if self.disk == "broken":
            raise Fault
        look(self)

    monkeypatch.setattr(Course, "look", failing)
    until_s = server.loop.now_s + 10.0
    while server.loop.now_s < until_s:
        with suppress(Fault):  # which the event loop logs, and goes on
            server.loop.pass_s(until_s - server.loop.now_s)
    assert looks["broken"] >= 9 and looks["next"] >= 9


def test_it_looks_again_after_there_was_no_job(server: Server) -> None:
    world = server.job("only").start()
    server.loop.pass_s(5.0)
    world.job.cancel(force=True)
    server.loop.pass_s(5.0)
    assert not server.chronicle.courses
    server.assert_looks()
