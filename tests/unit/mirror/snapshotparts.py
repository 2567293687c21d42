"""A job whose points are snapshots of its target, as jobparts.py has other jobs. Whoever makes the
snapshots is the test: `ack`, `refuse`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unit.mirror.jobparts import GRANULARITY, FakeResources, JobWorld

from nbdmirror.devices.base import Done
from nbdmirror.disk.changes import Changes, Freeze
from nbdmirror.disk.frozen import Frozen
from nbdmirror.mirror.acknowledgements import Acknowledgements
from nbdmirror.mirror.options import CopyMode, Ending
from nbdmirror.mirror.point_plan import PointPlan
from nbdmirror.mirror.point_source import StoreOptions
from nbdmirror.mirror.resources import JobState
from nbdmirror.mirror.snapshots_job import SnapshotsJob
from nbdmirror.mirror.watched import WatchedExport
from nbdmirror.server.snapshot_side import SnapshotSide

BLOCK = 4096
INTERVAL_S = 1.0
EPOCH_S = 1_700_000_000


@dataclass(frozen=True)
class Moment:
    """A cut: when it was, and what the disk held."""

    at_s: float
    content: bytes


class RecordedChanges(Changes):
    """`cuts`: all cuts, broken or not."""

    world: SnapshotsWorld

    def cut(self, freeze: Freeze) -> Frozen:
        self.world.cuts.append(Moment(self.world.loop.now_s, bytes(self.world.source.data)))
        return super().cut(freeze)


class FakeSnapshotsResources(FakeResources):
    """`written_down`: the numbers of the last point that was announced and of the last one that was
    acknowledged, each time that they were kept."""

    world: SnapshotsWorld

    def __init__(self, world: SnapshotsWorld) -> None:
        super().__init__(world)
        self.far_side: SnapshotSide | None = None
        self.has_begun = False
        self.known_point = 0, 0
        self.written_down: list[tuple[int, int]] = []

    @property
    def is_idle(self) -> bool:
        return self.far_side is None or self.far_side.is_idle

    @property
    def lost_exports(self) -> list[str]:
        return ["target"] if self.world.target.requests.is_lost else []

    def give_up(self) -> None:
        self.world.target.give_up()

    def begin_points(self, state: JobState, done: Done) -> None:
        self.has_begun = True
        self._step("begin_points", done)

    def begin_in_place(self, state: JobState, done: Done) -> None:
        raise AssertionError("there is no journal that could be full")

    def reconnect(self, has_copied: bool, done: Done) -> None:
        def is_back(error: BaseException | None) -> None:
            if error is None and not self.is_idle:
                self.world.loop.call_later(0.02, lambda: is_back(None))
                return
            if error is None:
                job = self.world.job
                target: Any = self.world.target
                image = WatchedExport(target, job.waits, job.point_traffic, job.tracker.zeroes)
                self.far_side = SnapshotSide(image, self.world.acks, may_trim=True)
            done(error)

        super().reconnect(has_copied, is_back)

    def write_down(self, done: Done) -> None:
        self.written_down.append((self.world.acks.newest, self.world.acks.last))
        self._step("write_down", done)

    def commit(self, done: Done) -> None:
        if self.world.job.ending is Ending.COMPLETE:
            super().commit(done)
        else:
            self.world.check_image()
            self._step("commit", done)

    def released(self) -> None:
        job = self.world.job
        self.calls.append("released")
        job.tracker.close()
        if job.failure is None and job.error is None and job.ending is Ending.CANCEL:
            self.world.check_image()


class SnapshotsWorld(JobWorld):
    """`cuts`: what the disk held at each cut. `snapshots`: what the image held when its snapshot
    was made, by the number of the point."""

    job: SnapshotsJob
    resources: FakeSnapshotsResources

    def __init__(self, *, acks: Acknowledgements | None = None, **options: Any) -> None:
        self.acks = acks or Acknowledgements()
        self.stands_still_s = 0.0
        """For so long, after each look at the wall clock."""
        self.cuts: list[Moment] = []
        self.snapshots: dict[int, bytes] = {}
        self.acked: Moment | None = None
        """The last cut that was acknowledged."""
        options.setdefault("copy_mode", CopyMode.POINTS)
        super().__init__(**options)
        self.acks.write_down = self.resources.write_down

    def new_resources(self) -> FakeResources:
        return FakeSnapshotsResources(self)

    def new_job(self, **parts: Any) -> SnapshotsJob:
        self.changes = RecordedChanges(self.disk, BLOCK)
        self.changes.world = self
        return SnapshotsJob(
            acks=self.acks,
            plan=PointPlan(
                changes=self.changes,
                interval_s=INTERVAL_S,
                keep_s=0.0,
                rpo_s=3.0,
                store=StoreOptions(),
                in_place=False,
            ),
            source=self.source,
            wall_time_ns=self._look,
            new_group=lambda: 7,
            **parts,
        )

    def _look(self) -> int:
        now_s = EPOCH_S + self.loop.now_s
        self.loop.now_s += self.stands_still_s
        return round(now_s * 1e9)

    def awaits(self) -> int:
        """Let time pass until a point waits. Its number."""
        self.pass_s(2 * INTERVAL_S)
        assert self.acks.awaited, "no point waits"
        self.check_image()
        return self.acks.awaited

    def ack(self) -> int:
        """Make the snapshot of the point that waits."""
        number = self.acks.awaited
        self.check_image()
        self.snapshots[number] = bytes(self.target.data)
        self.acked = self.cuts[-1]
        assert self.job.acknowledge(number) is False
        self.settle()
        return number

    def ready_with_points(self) -> SnapshotsWorld:
        """The first point is acknowledged."""
        self.start()
        self.awaits()
        assert self.ack() == 1
        assert self.status == "ready"
        return self

    @property
    def is_writing(self) -> bool:
        """A point is on its way."""
        return self.changes.frozen is not None and not self.acks.awaited

    def check_image(self) -> None:
        """The image is the disk at the last cut."""
        assert bytes(self.target.data) == self.cuts[-1].content, "the image is no point"

    def check_invariant(self) -> None:
        """Image and disk are equal wherever nothing is known to differ."""
        may_differ = self.changes.may_differ()
        if self.job.run is None or not self.cuts:
            return
        for offset in range(0, len(self.source.data), BLOCK):
            if not may_differ.is_dirty(offset, BLOCK):
                end = offset + BLOCK
                assert self.source.data[offset:end] == self.target.data[offset:end], offset


__all__ = ["BLOCK", "GRANULARITY", "INTERVAL_S", "Moment", "SnapshotsWorld"]
