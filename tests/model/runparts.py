"""A job with points whose far side answers when a test lets it, in any order, and loses what was
not flushed: the real job, run, cut, sender, journal and applier, on a loop whose clock stands
still."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from model.pointexports import Disk, DiskDevice, SlowExport
from unit.mirror.jobdevices import MemoryTarget, Source, StillLoop
from unit.mirror.jobparts import FakeResources, JobWorld

from nbdmirror.devices.base import BlockDevice, Done
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import Changes
from nbdmirror.errors import DeviceLost
from nbdmirror.mirror.options import CopyMode, Ending
from nbdmirror.mirror.point_plan import PointPlan
from nbdmirror.mirror.point_source import StoreOptions
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.mirror.resources import JobState
from nbdmirror.points.format import BLOCK_BYTES, RING_START, JournalError, Point, State
from nbdmirror.points.ownership import create, take_over
from nbdmirror.points.reader import read
from nbdmirror.points.requests import Side, run
from nbdmirror.server.far_side import JournalSide, refusal_of

if TYPE_CHECKING:
    from model.runworld import RunWorld

BLOCKS = 24
SIZE = BLOCKS * BLOCK_BYTES
INTERVAL_S = 0.5
AGAIN_S = 0.1
"""Between two looks whether the link is back."""


class FarDevice(MemoryTarget):
    """An export of the far side: what programs, the copier, and guests after a pivot use. `disk`:
    the storage. Requests wait in `export` while `is_slow`, and for one turn of the loop else."""

    def __init__(self, loop: StillLoop, random: Random, description: str, disk: Disk) -> None:
        super().__init__(loop, len(disk.data))
        self.description = description
        self.export = SlowExport(description, disk)
        self.data = disk.data
        self.is_slow = self.is_lost = False
        self._loop = loop
        self._random = random

    def _begin(self, start: Callable[[Done], None], done: Done) -> None:
        if self.is_lost:
            error = DeviceLost(f"{self.description}: connection lost", errno.ENOTCONN)
            self._loop.call_soon(lambda: done(error))
            return
        start(done)
        if not self.is_slow:
            self._loop.call_soon(self.answer)

    def answer(self, *, fails: bool = False) -> None:
        """End any of the requests in flight."""
        if pending := self.export.pending:
            self.export.end(self._random.randrange(len(pending)), fails=fails)

    def answer_all(self) -> None:
        self.is_slow = False
        for _ in self.export.pending:
            self._loop.call_soon(self.answer)

    def lose(self) -> None:
        """The connection, with what is in flight."""
        self.is_lost = True
        self.export.break_off(self._random)

    give_up = lose

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        self._begin(partial(self.export.start_read, buf, offset), done)

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        self._begin(partial(self.export.start_write, buf, offset), done)

    def start_durable_write(self, buf: memoryview, offset: int, done: Done) -> None:
        self._begin(partial(self.export.start_durable_write, buf, offset), done)

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        self._begin(partial(self.export.start_zero, offset, length, may_trim), done)

    def start_trim(self, offset: int, length: int, done: Done) -> None:
        self._begin(partial(self.export.start_trim, offset, length), done)

    def start_flush(self, done: Done) -> None:
        self._begin(self.export.start_flush, done)


class RunResources(FakeResources):
    """A mirror.far_side.PointsResources, whose far side is opened again after each loss."""

    world: Member

    def __init__(self, world: Member) -> None:
        super().__init__(world)
        self.has_begun = False
        self.far_side: JournalSide | None = None
        self.known_point = 0, 0
        self._turn: object = None

    @property
    def is_idle(self) -> bool:
        return self.far_side is None or self.far_side.is_idle

    def begin_points(self, state: JobState, done: Done) -> None:
        self.has_begun = True
        self._step("begin_points", done)

    def keep_changes(self, done: Done) -> None:
        self._step("keep_changes", done)

    def drop_points(self) -> None:
        assert self.is_idle, "lost: something is in flight to a journal that is dropped"
        self.has_begun, self.far_side = False, None
        self.world.plan.changes.end()

    def begin_in_place(self, state: JobState, done: Done) -> None:
        def begun(error: BaseException | None) -> None:
            self.has_begun = self.has_begun and error is not None
            done(error)

        assert self.far_side is not None
        self.far_side.begin_in_place(begun)

    def reconnect(self, has_copied: bool, done: Done) -> None:
        turn, world = object(), self.world
        self._turn = turn

        def attempt() -> None:
            if self._turn is not turn or world.job.is_over:
                return
            if world.is_cut or not self.is_idle:
                world.loop.call_later(AGAIN_S, attempt)
                return
            for device in world.devices:
                device.is_lost = False
            world.job.tracker.target_came_back()
            try:
                if world.job.plan is not None:
                    self._open()
            except JournalError as error:
                done(refusal_of(error))
            else:
                done(None)

        world.loop.call_soon(attempt)

    @property
    def lost_exports(self) -> list[str]:
        return [device.description for device in self.world.devices if device.is_lost]

    def _open(self) -> None:
        world = self.world
        sides: dict[Side, BlockDevice] = {
            Side.IMAGE: DiskDevice(world.image.export.disk),
            Side.JOURNAL: DiskDevice(world.journal.export.disk),
        }
        exports: Any = {Side.IMAGE: world.image, Side.JOURNAL: world.journal}
        before = self.far_side.writer if self.far_side is not None else None
        draw = world.random.randbytes
        program = take_over(exports, disk_id=world.disk_id, before=before, random_bytes=draw)
        writer = run(program, sides)
        there = writer.newest.sequence
        if there < self.known_point[0]:
            raise JournalError(f"journal: has lost points: {there} < {self.known_point[0]}")
        if not there:
            run(writer.seed(world.wall_time_ns()), sides)
        self.far_side = JournalSide(writer, exports, world.wall_time_ns, self._committed)
        self._committed(writer.newest)

    def _committed(self, point: Point) -> None:
        self.known_point = point.sequence, point.time_ns

    def give_up(self) -> None:
        for device in self.world.devices:
            device.lose()

    def commit(self, done: Done) -> None:
        self.world.check_level()
        self._step("commit", done)

    def released(self) -> None:
        """What a job that ends well leaves was checked when it was level."""
        self.world.job.tracker.close()


class Member(JobWorld):
    """A disk, its job and its far side. `kept`: what an earlier process has left."""

    job: PointsJob
    resources: RunResources
    image: FarDevice
    journal: FarDevice
    journal_disk: Disk
    disk_id: bytes

    def __init__(self, owner: RunWorld, name: str, kept: Member | None = None) -> None:
        self.owner = owner
        self.random = owner.random
        self.kept = kept
        self.is_cut = False
        """The link to the far side is cut."""
        self.writes: list[float] = kept.writes if kept else []
        """When guests' writes were answered."""
        self.announced: int = kept.announced if kept else 0
        """The number of the last point that was announced; 0: none, or it was given up."""
        self.numbers: set[int] = kept.numbers if kept else set()
        """The numbers of all points that were announced."""
        was_ending = kept is not None and kept.job.ending is not Ending.NONE
        self.cut_s: dict[int, float] = {} if kept is None or was_ending else kept.cut_s
        """When the points were cut that were announced, by their numbers: those that the window
        keeps. An end keeps none but the last one."""
        self.tokens: list[tuple[int, int]] = []
        """Of guests' requests in progress, and the block that each changes."""
        self.is_leaving = False
        """Another copy mode was asked for: as soon as the journal says so, there are no points."""
        self.is_handed_over = False
        """The journal said so, when this process was killed."""
        self.was_handed_over = kept is not None and kept.is_handed_over
        self.gate: object = None
        """The one that guests were held at, at the last look, since `held_since_s`."""
        self.held_since_s = 0.0
        self.ending_writes = 0
        """How many writes were answered when the end was asked for."""
        journal = self._new_journal() if kept is None else (kept.journal_disk, kept.disk_id)
        self.journal_disk, self.disk_id = journal
        super().__init__(
            loop=owner.loop,
            events=owner.events,
            size=SIZE,
            buffer_bytes=SIZE,
            job_id=name,
            copy_mode=CopyMode.POINTS,
            on_target_error=owner.policy,
            reconnect_delay_s=60.0,
        )

    # What it is made of.

    def _new_journal(self) -> tuple[Disk, bytes]:
        """A journal, and the disk's ID in it."""
        disk, draw = Disk(RING_START + self.owner.ring_bytes), self.random.randbytes
        size = len(disk.data)
        creating = create("journal", size, disk_bytes=SIZE, now_ns=0, random_bytes=draw)
        return disk, run(creating, {Side.JOURNAL: DiskDevice(disk)}).disk_id

    def new_source(self, size: int) -> Source:
        source = Source(self.loop, size)
        if self.kept is not None:
            source.data[:] = self.kept.source.data
        return source

    def new_target(self, size: int) -> FarDevice:
        image = self.kept.image.export.disk if self.kept else Disk(size, 0xEE)
        self.image = FarDevice(self.loop, self.random, "image", image)
        self.journal = FarDevice(self.loop, self.random, "journal", self.journal_disk)
        self.devices = self.image, self.journal
        return self.image

    def new_resources(self) -> RunResources:
        return RunResources(self)

    def new_job(self, **parts: Any) -> PointsJob:
        owner = self.owner
        self.plan = PointPlan(
            changes=Changes(self.disk, BLOCK_BYTES),
            interval_s=INTERVAL_S,
            keep_s=owner.keep_s,
            rpo_s=0.0,
            store=StoreOptions(),
            in_place=owner.is_in_place,
        )
        return PointsJob(
            plan=self.plan,
            source=self.source,
            wall_time_ns=self.wall_time_ns,
            new_group=lambda: next(owner.groups),
            **parts,
        )

    def wall_time_ns(self) -> int:
        return self.owner.moment()

    # What happens.

    def begin_life(self) -> None:
        """Start the job, or continue that of the process before."""
        kept = self.kept
        if kept is None:
            self.job.start()
            return
        self.resources.has_begun = kept.resources.has_begun
        self.resources.known_point = kept.resources.known_point
        copied, changed = kept.job.tracker.may_differ(), kept.plan.changes.may_differ()

        def mark_tracker() -> None:
            self.job.tracker.dirty.merge(copied)

        def mark_changes(dirty: DirtyBitmap) -> None:
            dirty.merge(changed)

        restore = partial(self.job.restore, mark_tracker, mark_changes)
        self.job.take_up(restore, is_scanned=True, is_paused=False)

    def change_mode(self, mode: CopyMode) -> None:
        """Raises CommandError. Points that are made again have another journal."""
        job = self.job
        if mode is not CopyMode.POINTS or job.plan is not None:
            job.change(mode)
            self.is_leaving = mode is not CopyMode.POINTS
            return
        job.check_settled()
        self.journal_disk, self.disk_id = self._new_journal()
        self.journal.export.disk, self.journal.data = self.journal_disk, self.journal_disk.data
        self.resources.known_point = 0, 0
        self.plan = replace(self.plan, changes=Changes(self.disk, BLOCK_BYTES))
        self.announced, self.cut_s, self.is_leaving = 0, {}, False
        job.make_points(self.plan)

    def change(self, block: int, count: int) -> None:
        """A guest's write, which is answered at once."""
        stamp = next(self.owner.stamps).to_bytes(8, "little")
        length = min(count, BLOCKS - block) * BLOCK_BYTES
        self.disk.pwrite(stamp * (length // 8), block * BLOCK_BYTES, False)
        self.writes.append(self.loop.now_s)

    def begin_request(self, block: int) -> None:
        self.tokens.append((self.disk.ledger.enter(), block))

    def end_request(self) -> None:
        """The oldest guest's request has changed the disk, just now."""
        token, block = self.tokens.pop(0)
        offset, frozen = block * BLOCK_BYTES, self.disk.frozen
        if frozen is not None:
            frozen.before_change(self.source, offset, BLOCK_BYTES)
        stamp = next(self.owner.stamps).to_bytes(8, "little")
        self.source.pwrite(stamp * (BLOCK_BYTES // 8), offset)
        self.disk.ledger.leave(token, offset, BLOCK_BYTES)
        self.writes.append(self.loop.now_s)

    def change_by_itself(self, block: int) -> None:
        """The source has lost writes: it reads as something else."""
        at = block * BLOCK_BYTES
        self.source.data[at : at + BLOCK_BYTES] = self.random.randbytes(BLOCK_BYTES)
        self.job.source_lost_writes()

    def lose_link(self, *, with_power: bool) -> None:
        self.is_cut = True
        for device in self.devices:
            device.lose()
            if with_power:
                disk = device.export.disk
                disk.data[:] = disk.lose(self.random.choice).data
                disk.unflushed.clear()
        if not self.job.is_over:
            self.job.target_lost()
            self.job.journal_lost("journal")

    def check_level(self) -> None:
        """The job is about to end well: what it leaves is durable, whoever loses power now."""
        old, new = self.image.export.left(lambda kept: kept[0]), self.image.export.disk
        if self.job.plan is None:
            assert self.is_held, "lost: guests write while their mirror ends"
            assert old.data == new.data == self.source.data, (
                "lost: the target is not what the disk is"
            )
        elif self.job.ending is Ending.COMPLETE:
            assert self.is_held, "lost: guests write while their disk is handed over"
            is_level = old.data == new.data == self.source.data
            assert is_level, "lost: the image that guests get is not what the disk is"
            assert self.state() is State.PROMOTED, "lost: somebody else may have the image too"
        else:
            contents = self.owner.contents_of(self, at_least=self.ending_writes)
            assert bytes(old.data) in contents, "lost: the image is not the last point"
            pending = [one for device in self.devices for one in device.export.pending]
            assert not pending, "lost: something is still written when the job has ended"

    def state(self, *, is_lost: bool = True) -> State:
        """What the journal says. `is_lost`: after a power cut."""
        left = self.journal.export.left(lambda kept: kept[0 if is_lost else -1])
        program = read("journal", len(left.data))
        return run(program, {Side.JOURNAL: DiskDevice(left)}).superblock.state
