"""A mirror job in one process and one thread: the real job, copier, ledger and disk, between a
source and a target in memory, on a loop whose clock stands still until a test lets time pass."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Any

from unit.mirror.asking import Asking
from unit.mirror.jobdevices import MemoryTarget, Source, StillLoop

from nbdmirror.devices.base import Done
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.tracker import Tracker
from nbdmirror.errors import DeviceError
from nbdmirror.events import EventRing
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.group import Group
from nbdmirror.mirror.in_flight import CopierLoad
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import Ending, MirrorOptions
from nbdmirror.mirror.resources import JobState
from nbdmirror.mirror.waits import Shares

KIB, MIB = 1 << 10, 1 << 20
GRANULARITY = 64 * KIB
SIZE = 16 * GRANULARITY


class FakeResources:
    """What a job is made of, and what is kept of it. A step in `holds` waits in `held`; one in
    `errors` ends with that; the others end well at once. That an end which is reported as a good
    one leaves two identical disks is checked here, in each test."""

    def __init__(self, world: JobWorld) -> None:
        self.world = world
        self.calls: list[str] = []
        self.holds: set[str] = set()
        self.held: list[Callable[[], None]] = []
        self.errors: dict[str, BaseException] = {}

    def answer(self) -> None:
        self.held.pop(0)()
        self.world.loop.settle()

    def _step(self, name: str, done: Done) -> None:
        self.calls.append(name)
        if name in self.holds:
            self.held.append(lambda: done(self.errors.get(name)))
        else:
            done(self.errors.get(name))

    def changed(self, state: JobState) -> None:
        pass

    def check_end(self, ending: Ending, done: Done) -> None:
        if "check_end" in self.holds | self.errors.keys():
            self._step("check_end", done)
        else:
            done(None)

    def prepare(self, ending: Ending, done: Done) -> None:
        self._step("prepare", done)

    def commit(self, done: Done) -> None:
        assert self.world.is_held, "the end is written down while guests write"
        self.world.assert_identical()
        self._step("commit", done)

    def uncommit(self, done: Done) -> None:
        assert self.world.is_held, "guests write while the record says that the job has ended"
        self._step("uncommit", done)

    def forget(self, done: Done) -> None:
        self._step("forget", done)

    def pivot(self) -> None:
        self.calls.append("pivot")
        self.world.assert_identical()
        self.world.disk.swap(self.world.target)

    def released(self) -> None:
        job = self.world.job
        self.calls.append("released")
        job.tracker.close()
        if job.failure is None and job.error is None and job.ending is not Ending.NONE:
            self.world.assert_identical()

    def dismissed(self) -> None:
        self.calls.append("dismissed")

    def scan(self, done: Done) -> None:
        self.world.job.tracker.dirty.mark_all()
        self._step("scan", done)

    def reconnect_source(self, done: Done) -> None:
        if self.world.source.requests.is_lost:
            self._step("reconnect_source", partial(self._source_is_back, done))
        else:
            done(None)

    def _source_is_back(self, done: Done, error: BaseException | None) -> None:
        self.world.source.requests.is_lost = error is not None
        done(error)

    def reconnect(self, has_copied: bool, done: Done) -> None:
        if self.world.target.requests.is_lost:
            self._step("reconnect", partial(self._target_is_back, done))
        else:
            done(None)

    def _target_is_back(self, done: Done, error: BaseException | None) -> None:
        if error is None:
            self.world.target.requests.is_lost = False
            self.world.job.tracker.target_came_back()
        done(error)


class JobWorld:
    """One job. `start` starts it; several of them on one loop may be made a group."""

    def __init__(
        self,
        *,
        loop: StillLoop | None = None,
        events: EventRing | None = None,
        size: int = SIZE,
        buffer_bytes: int = SIZE,
        load: CopierLoad | None = None,
        **options: Any,
    ) -> None:
        self.loop = loop or StillLoop()
        self.events = events or EventRing(lambda: 0.0)
        options.setdefault("job_id", "j")
        self.source = self.new_source(size)
        self.target = self.new_target(size)
        self.disk = Disk(options["job_id"], self.source)
        self.resources = self.new_resources()
        tracker = Tracker(size, GRANULARITY)
        loop_: Any = self.loop
        self.job = self.new_job(
            options=MirrorOptions(**options),
            disk=self.disk,
            target=self.target,
            tracker=tracker,
            copier=lambda job: Copier(
                source=self.source,
                target=self.target,
                tracker=tracker,
                observer=job,
                clock=self.loop.clock,
                call_later=self.loop.call_later,
                buffer_bytes=buffer_bytes,
                request_bytes_max=GRANULARITY,
                load=load,
                waits=job.waits,
            ),
            loop=loop_,
            events=self.events,
            resources=self.resources,
        )
        self.job.create()
        self.asking = Asking(self.loop, self.job)

    def new_source(self, size: int) -> Source:
        return Source(self.loop, size)

    def new_target(self, size: int) -> MemoryTarget:
        return MemoryTarget(self.loop, size)

    def new_resources(self) -> FakeResources:
        return FakeResources(self)

    def new_job(self, **parts: Any) -> MirrorJob:
        return MirrorJob(**parts)

    def start(self) -> JobWorld:
        self.job.start()
        self.loop.settle()
        return self

    def ready(self) -> JobWorld:
        """Start it and let it get READY."""
        return self.ready_after(1.0)

    def ready_after(self, seconds: float) -> JobWorld:
        self.start()
        self.pass_s(seconds)
        assert self.status == "ready"
        return self

    def pass_s(self, seconds: float) -> None:
        self.loop.pass_s(seconds)

    def settle(self) -> None:
        self.loop.settle()

    @property
    def status(self) -> str:
        return str(self.job.status)

    @property
    def is_held(self) -> bool:
        """Guests' writes are."""
        return self.disk.ledger.gate is not None

    def shares(self) -> Shares:
        """What the job's time was spent on, as a user asks for it."""
        return self.job.waits.shares

    def assert_identical(self) -> None:
        assert self.source.data == self.target.data, "the target differs from the source"

    # Guests. `write` is one whole request; `begin` and `end` are those of one that takes its time.

    def write(self, offset: int = 0, byte: bytes = b"g") -> None:
        assert not self.is_held, "this thread would wait at the gate for ever"
        self.disk.pwrite(byte * 512, offset, False)

    def begin(self) -> int:
        return self.disk.ledger.enter()

    def end(self, token: int, offset: int = 0) -> None:
        """It has changed the source, just now."""
        self.source.pwrite(b"late" * 128, offset)
        self.disk.ledger.leave(token, offset, 512)
        self.loop.settle()

    # What was reported.

    def told(self, *names: str) -> list[dict[str, Any]]:
        """The data of the job's events of these names."""
        return [
            event.data
            for event in self.events.pull(0)
            if event.name in names
            and self.job.id in (event.data.get("id"), event.data.get("device"))
        ]

    @property
    def states(self) -> list[str]:
        return [data["status"] for data in self.told("JOB_STATUS_CHANGE")]


def a_group(*names: str, **options: Any) -> list[JobWorld]:
    """READY, and to end together. The first name's job is the first of the transaction."""
    loop, events = StillLoop(), EventRing(lambda: 0.0)
    worlds = [JobWorld(loop=loop, events=events, job_id=name, **options) for name in names]
    Group(*(world.job for world in worlds))
    for world in worlds:
        world.job.start()
    loop.pass_s(1.0)
    assert [world.status for world in worlds] == ["ready"] * len(names)
    return worlds


IO_ERROR = DeviceError("target: fails", errno.EIO)
NO_SPACE = DeviceError("target: is full", errno.ENOSPC)


def several_writes(world: JobWorld) -> None:
    """Start the job, and have several of its writes in flight."""
    world.target.requests.holds = {"write"}
    world.start()
    while len(world.target.requests.held) < 3:
        world.target.requests.answer("write")


def end(world: JobWorld, ending: Ending) -> None:
    if ending is Ending.COMPLETE:
        world.job.complete()
    elif ending is Ending.CANCEL:
        world.job.cancel(force=False)


# Jobs in a state.


def created() -> JobWorld:
    return JobWorld()


def ready() -> JobWorld:
    return JobWorld().ready()


def aborting() -> JobWorld:
    world = ready()
    world.resources.holds = {"forget"}
    world.job.cancel(force=True)
    world.settle()
    return world
