"""Jobs with points in one process and one thread: the real job, disk and journal, and a far side in
memory, on a loop whose clock stands still until a test lets time pass."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from unit.mirror.jobdevices import Requests, Source, StillLoop
from unit.mirror.jobparts import GRANULARITY, FakeResources, JobWorld

from nbdmirror.devices.base import BlockDevice, Done, ExtentsDone, MemoryDevice
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import Changes
from nbdmirror.events import EventRing
from nbdmirror.mirror.group import Group
from nbdmirror.mirror.options import CopyMode, Ending
from nbdmirror.mirror.point_group import PointGroup
from nbdmirror.mirror.point_plan import PointPlan
from nbdmirror.mirror.point_run import LATE_PAUSE_S
from nbdmirror.mirror.point_source import StoreOptions
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.mirror.resources import JobState
from nbdmirror.points.format import BLOCK_BYTES, RING_START, Point
from nbdmirror.points.ownership import create, take_over
from nbdmirror.points.reader import Journal, read
from nbdmirror.points.recovery import recover
from nbdmirror.points.requests import Side, run
from nbdmirror.server.far_side import JournalSide

SIZE = 4 * GRANULARITY
RING_BYTES = 8 << 20
INTERVAL_S = 0.5
SECOND_NS = 10**9
NUMBERS = itertools.count(1)
"""Of groups."""


class Busy(Source):
    """A source whose guest's requests take their time: `during` is called in each of them, before
    and after the change."""

    during: Callable[[], None] = staticmethod(lambda: None)

    def pwrite(self, buf: Any, offset: int, fua: bool = False) -> None:
        self.during()
        super().pwrite(buf, offset, fua)
        self.during()


class Export:
    """An AsyncExport whose requests a test may hold back, fail or give up."""

    def __init__(self, device: MemoryDevice, loop: StillLoop) -> None:
        self.device = device
        self.description = device.description
        self.size = device.size
        self.requests = Requests(loop)

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        self.requests.start("read", lambda: self.device.pread(buf, offset), done)

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        done(self.device.extents(offset, length), None)

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        content = bytes(buf)
        self.requests.start(
            "write", lambda: MemoryDevice.pwrite(self.device, content, offset), done
        )

    def start_durable_write(self, buf: memoryview, offset: int, done: Done) -> None:
        self.start_write(buf, offset, done)

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        effect = partial(self.device.zero, offset, length, may_trim=may_trim)
        self.requests.start("zero", effect, done)

    def start_trim(self, offset: int, length: int, done: Done) -> None:
        done(None)

    def start_flush(self, done: Done) -> None:
        self.requests.start("flush", lambda: None, done)


class PointResources(FakeResources):
    """A mirror.far_side.PointsResources."""

    world: PointsWorld

    def __init__(self, world: PointsWorld) -> None:
        super().__init__(world)
        self.has_begun = False
        self.known_point = 0, 0
        self.far_side: JournalSide | None = None
        self.lost_exports: Sequence[str] = ()
        self.kept: DirtyBitmap | None = None
        """What was dirty when that was kept."""

    @property
    def is_idle(self) -> bool:
        return self.far_side is None or self.far_side.is_idle

    def commit(self, done: Done) -> None:
        if self.world.job.ending is Ending.COMPLETE:
            super().commit(done)
        else:  # nobody is held: the image is the last point
            self._step("commit", done)

    def begin_points(self, state: JobState, done: Done) -> None:
        self.has_begun = True
        self._step("begin_points", done)

    def begin_in_place(self, state: JobState, done: Done) -> None:
        self.has_begun = False
        assert self.far_side is not None
        self.far_side.begin_in_place(done)

    def keep_changes(self, done: Done) -> None:
        self.kept = self.world.job.tracker.may_differ()
        self._step("keep_changes", done)

    def drop_points(self) -> None:
        self.has_begun = False
        self.calls.append("drop_points")
        self.world.plan.changes.end()
        self.far_side = None

    def give_up(self) -> None:
        for export in self.world.exports.values():
            export.requests.give_up()

    def reconnect(self, has_copied: bool, done: Done) -> None:
        for export in self.world.exports.values():
            export.requests.is_lost = False
        self._step("reconnect", partial(self._opened, done))

    def _opened(self, done: Done, error: BaseException | None) -> None:
        job = self.world.job
        if error is None and job.plan and (self.far_side is None or job.run is None):
            self._open()
        done(error)

    def _open(self) -> None:
        world = self.world
        sides: dict[Side, BlockDevice] = {Side.IMAGE: world.target, Side.JOURNAL: world.journal}
        program = take_over(world.exports, disk_id=world.disk_id)
        writer = run(program, sides)
        if not writer.newest.sequence:
            run(writer.seed(world.wall_time_ns()), sides)
        self.far_side = JournalSide(writer, world.exports, world.wall_time_ns, self._committed)
        self._committed(writer.newest)

    def _committed(self, point: Point) -> None:
        self.known_point = point.sequence, point.time_ns


class PointsWorld(JobWorld):
    """One job with points. `start` starts it."""

    job: PointsJob
    resources: PointResources

    def __init__(
        self,
        *,
        ring_bytes: int = RING_BYTES,
        interval_s: float = INTERVAL_S,
        keep_s: float = 3600.0,
        in_place: bool = False,
        has_points: bool = True,
        new_group: Callable[[], int] = NUMBERS.__next__,
        **options: Any,
    ) -> None:
        self.journal = MemoryDevice(RING_START + ring_bytes, description="journal")
        created = create("journal", self.journal.size, disk_bytes=SIZE, now_ns=0)
        self.disk_id = run(created, {Side.JOURNAL: self.journal}).disk_id
        self._has_points = has_points
        self._new_group = new_group
        self._points: dict[str, Any] = {
            "interval_s": interval_s,
            "keep_s": keep_s,
            "in_place": in_place,
        }
        mode = CopyMode.POINTS if has_points else CopyMode.BACKGROUND
        super().__init__(size=SIZE, buffer_bytes=SIZE, copy_mode=mode, **options)

    def new_source(self, size: int) -> Source:
        self.busy = Busy(self.loop, size)
        self.busy.data[:512] = bytes(512)
        return self.busy

    def new_resources(self) -> PointResources:
        self.exports = {
            Side.IMAGE: Export(self.target, self.loop),
            Side.JOURNAL: Export(self.journal, self.loop),
        }
        return PointResources(self)

    def new_job(self, **parts: Any) -> PointsJob:
        self.plan = PointPlan(
            changes=Changes(self.disk, BLOCK_BYTES),
            rpo_s=0.0,
            store=StoreOptions(),
            **self._points,
        )
        return PointsJob(
            plan=self.plan if self._has_points else None,
            source=self.source,
            wall_time_ns=self.wall_time_ns,
            new_group=self._new_group,
            **parts,
        )

    def renew(self) -> None:
        """Another journal, for a job that makes no points any more."""
        self.journal.data[:] = bytes(len(self.journal.data))
        created = create("journal", self.journal.size, disk_bytes=SIZE, now_ns=0)
        self.disk_id = run(created, {Side.JOURNAL: self.journal}).disk_id
        self.plan = replace(self.plan, changes=Changes(self.disk, BLOCK_BYTES))

    def wall_time_ns(self) -> int:
        return int(self.loop.now_s * SECOND_NS)

    @property
    def journal_requests(self) -> Requests:
        return self.exports[Side.JOURNAL].requests

    # What the far side has.

    def read(self) -> Journal:
        return run(read("journal", self.journal.size), {Side.JOURNAL: self.journal})

    @property
    def points(self) -> list[Point]:
        return [point for point in self.read().points if point.sequence]

    @property
    def last(self) -> Point:
        return self.points[-1]

    def groups(self) -> list[int]:
        return [point.group for point in self.points]

    def content(self, point: Point) -> bytes:
        """What a user gets who recovers this point, from copies."""
        image, journal = copy.deepcopy(self.target.data), copy.deepcopy(self.journal.data)
        sides: dict[Side, BlockDevice] = {}
        for side, data in ((Side.IMAGE, image), (Side.JOURNAL, journal)):
            device = MemoryDevice(len(data), description=side.value)
            device.data[:] = data
            sides[side] = device
        program = recover(
            "journal", len(journal), len(image), wanted=str(point.sequence), now_ns=SECOND_NS
        )
        run(program, sides)
        found = bytearray(SIZE)
        sides[Side.IMAGE].pread(memoryview(found), 0)
        return bytes(found)

    def number(self, content: bytes) -> int:
        """The counter that a guest has written to the begin of the disk."""
        return int.from_bytes(content[:8], "little")

    def count(self, number: int) -> None:
        """A guest writes a number."""
        self.settle()
        assert not self.is_held, "this thread would wait at the gate for ever"
        self.disk.pwrite(number.to_bytes(8, "little") * 64, 0, False)


def worlds_of(*names: str, **options: Any) -> list[PointsWorld]:
    loop, events = StillLoop(), EventRing(lambda: 0.0)
    return [PointsWorld(loop=loop, events=events, job_id=name, **options) for name in names]


def taken_up(worlds: Sequence[PointsWorld], key: str) -> list[PointsWorld]:
    """What another process makes of these, which does not know what the last points have."""
    group, found = PointGroup(key), worlds_of(*(world.job.id for world in worlds), keep_s=0.0)
    for old, new in zip(worlds, found, strict=True):
        new.loop.now_s = max(old.loop.now_s, new.loop.now_s)
        new.source.data[:] = old.source.data
        new.target.data[:] = old.target.data
        new.journal.data[:] = old.journal.data
        new.disk_id, new.resources.has_begun = old.disk_id, True
        new.resources.known_point = old.resources.known_point
        new.job.share_points(group)
    return found


def take_up(world: PointsWorld) -> None:
    restore = partial(world.job.restore, lambda: None, lambda dirty: dirty.mark_all())
    world.job.take_up(restore, is_scanned=True, is_paused=False)
    world.settle()


def not_started(*names: str, **options: Any) -> list[PointsWorld]:
    """A group, of which no job was started."""
    worlds = worlds_of(*names, **options)
    group = Group()
    for world in worlds:
        group.add(world.job)
    return worlds


def with_points(*names: str, **options: Any) -> list[PointsWorld]:
    """A group of jobs that have made their first points."""
    return started(not_started(*names, **options))


def while_one_sends() -> list[PointsWorld]:
    """Two jobs, of which the second one has begun a point and cannot write it to its journal."""
    a, b = with_points("a", "b")
    a.pass_s(5.0)
    b.journal_requests.holds = {"write"}
    b.count(1)
    a.pass_s(INTERVAL_S)
    return [a, b]


def kept(*names: str, **options: Any) -> list[PointsWorld]:
    """As after a restart: the points belong together, and not the ends."""
    worlds, group = worlds_of(*names, **options), PointGroup("key")
    for world in worlds:
        world.job.share_points(group)
    return started(worlds)


def started(worlds: list[PointsWorld]) -> list[PointsWorld]:
    for world in worlds:
        world.job.start()
    worlds[0].pass_s(1.0)
    assert {world.status for world in worlds} == {"ready"}
    return worlds


# What the far sides have.


def common(*worlds: PointsWorld) -> list[int]:
    """The numbers that all journals have, in order."""
    first, *others = worlds
    return [group for group in first.groups() if group and all(group in w.groups() for w in others)]


def at(world: PointsWorld, group: int) -> bytes:
    """The disk at the point of that number."""
    (point,) = [point for point in world.points if point.group == group]
    return world.content(point)


def assert_last_points_are_the_disks(*worlds: PointsWorld) -> None:
    """Let everything be sent, and compare."""
    for world in worlds:
        world.write(4096, b"%d" % (len(world.points) % 10))
    worlds[0].pass_s(3 * INTERVAL_S + LATE_PAUSE_S)
    for world in worlds:
        assert world.content(world.last) == bytes(world.source.data)


def assert_common_again(a: PointsWorld, b: PointsWorld) -> None:
    before = common(a, b)[-1:]
    a.count(77)
    a.pass_s(2 * INTERVAL_S)
    assert common(a, b)[-1:] != before
    assert a.number(at(a, common(a, b)[-1])) == 77
    assert_last_points_are_the_disks(a, b)
