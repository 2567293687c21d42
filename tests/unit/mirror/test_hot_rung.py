"""Guests' writes to what is hot wait for the target, and no others, if that is allowed and enough:
by the rules alone, on a disk, and with a job whose guest changes a few places all the time."""

from __future__ import annotations

from typing import Any

import pytest
from unit.mirror.jobparts import GRANULARITY, KIB, MIB, JobWorld
from unit.mirror.watched import STEP_S, Watched

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.disk.disk import Disk, SynchronousWrites
from nbdmirror.disk.hot import HotGranules
from nbdmirror.disk.latency import Held
from nbdmirror.disk.tracker import Tracker
from nbdmirror.mirror.ladder import HOT_S, LATE_S, PIVOT_S, Rung, Situation, Step, next_step
from nbdmirror.mirror.options import CopyMode, MirrorOptions
from nbdmirror.mirror.outlook import NEVER_S

ALLOWED = ("write-blocking",)
HOT, GRANULES = 8, 64


# The rules.


def asked(may: tuple[str, ...] = ALLOWED, **more: Any) -> Step | None:
    known: dict[str, Any] = {"is_ready": False, "never": True, "pivot_waits_s": 0.0}
    known |= {"hot_bytes": 8 * MIB, "left_bytes": 9 * MIB, "disk_bytes": 100 * MIB}
    return next_step(MirrorOptions("j", may=may), Situation(**known | more))


def test_what_is_hot_comes_first() -> None:
    step = asked()
    assert step is not None and step.rung is Rung.WRITE_BLOCKING and step.reason
    assert step.hot_bytes == 8 * MIB
    assert asked(never=False) is None and asked(may=()) is None
    waits = asked(is_ready=True, never=False, pivot_waits_s=PIVOT_S)
    assert waits is not None and waits.hot_bytes == 8 * MIB


@pytest.mark.parametrize(
    "more",
    [
        {"hot_bytes": 0},
        {"left_bytes": 20 * MIB},  # most of what is left is not hot
        {"disk_bytes": 12 * MIB},  # most of the disk is
        {"deadline_left_s": HOT_S},
    ],
)
def test_all_wait_at_once_where_that_is_not_enough_or_spares_nobody(more: dict[str, Any]) -> None:
    step = asked(**more)
    assert step is not None and step.rung is Rung.WRITE_BLOCKING and step.hot_bytes is None


def test_a_throttle_comes_before_that() -> None:
    both = ("throttle", *ALLOWED)
    step = asked(both, bytes_per_s=MIB)
    assert step is not None and step.rung is Rung.THROTTLE
    more = {"throttle": 0.5 * MIB, "bytes_per_s": MIB, "throttled_s": NEVER_S}
    step = asked(both, **more)
    assert step is not None and step.hot_bytes == 8 * MIB
    assert asked(both, bytes_per_s=MIB, blocked_s=1.0) is None, "not a throttle once more"


@pytest.mark.parametrize(
    ("more", "after_s"),
    [
        ({"never": True}, NEVER_S),
        ({"never": False, "late_s": LATE_S}, HOT_S),
        ({"never": False, "is_ready": True, "pivot_waits_s": PIVOT_S}, HOT_S),
    ],
)
def test_then_all_wait(more: dict[str, Any], after_s: float) -> None:
    assert asked(blocked_s=after_s - 1, **more) is None
    step = asked(blocked_s=after_s, **more)
    assert step is not None and step.rung is Rung.WRITE_BLOCKING and step.hot_bytes is None
    assert "was not enough" in step.reason
    assert asked(blocked_s=10 * NEVER_S, never=False) is None, "it is enough"


# A disk.


class Target(MemoryDevice):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


def test_only_writes_to_what_is_hot_go_to_the_target() -> None:
    source, target = MemoryDevice(8 * GRANULARITY), Target(8 * GRANULARITY)
    disk, tracker = Disk("vda", source), Tracker(8 * GRANULARITY, GRANULARITY)
    tracker.dirty.mark(2 * GRANULARITY, 1)
    hot = HotGranules(tracker.dirty)
    hot.look(0, 8 * GRANULARITY)
    tracker.dirty.clear_all()
    latency = disk.ledger.latency
    disk.synchronous = SynchronousWrites(
        tracker=tracker, target=target, whole_granules=False, on_error=print, latency=latency
    )
    disk.synchronous.only = hot
    disk.ledger.attach(tracker.dirty)
    disk.pwrite(b"h" * 512, 2 * GRANULARITY, False)
    disk.zero(2 * GRANULARITY + 512, 512, may_trim=True, fua=False, fast=False)
    assert (
        tracker.dirty.is_empty and target.data[: 3 * GRANULARITY] == source.data[: 3 * GRANULARITY]
    )
    disk.pwrite(b"c" * 512, 0, True)
    disk.zero(GRANULARITY, 512, may_trim=True, fua=False, fast=False)
    assert tracker.dirty.dirty_bytes == 2 * GRANULARITY and target.data[:512] == bytes(512)
    disk.pwrite(b"b" * 1024, 3 * GRANULARITY - 512, False)  # a part of it is hot
    assert target.data[3 * GRANULARITY :][:512] == b"b" * 512
    disk.flush()
    assert target.flushes == 0, "what else was written is not there anyway"
    latency.held[Held.TARGET].count()
    assert sum(latency.held[Held.TARGET].buckets) == 3


# A job.


def busy(**more: Any) -> Watched:
    """Its guest changes a few places all the time."""
    return Watched(may=ALLOWED, size=GRANULES * GRANULARITY, buffer_bytes=64 * KIB, **more)


def write_to_hot(found: Watched, until: Any, most_s: float = 4 * NEVER_S) -> None:
    world, until_s = found.world, found.world.loop.now_s + most_s
    while not until():
        assert world.loop.now_s < until_s, "not within the time"
        for number in range(HOT):
            if not world.is_held and not until():
                world.write((20 + number) * GRANULARITY)
        world.pass_s(STEP_S)


def told(world: JobWorld) -> list[dict[str, Any]]:
    events = world.told("X_NBDMIRROR_CONVERGENCE")
    assert all(data["rung"] == "write-blocking" and data["reason"] for data in events)
    return events


def blocked() -> Watched:
    found = busy()
    write_to_hot(found, lambda: found.world.disk.synchronous is not None)
    return found


def test_a_few_places_that_are_changed_all_the_time_do_not_keep_a_mirror_from_its_end() -> None:
    found = blocked()
    world = found.world
    assert [data["hot-bytes"] for data in told(world)] == [HOT * GRANULARITY]
    assert world.job.options.copy_mode is CopyMode.BACKGROUND
    world.pass_s(10.0)
    assert world.status == "ready" and not world.job.is_actively_synced
    world.write(20 * GRANULARITY, b"x")
    assert world.job.tracker.in_sync and world.target.data[20 * GRANULARITY] == ord("x")
    world.write(0, b"y")
    assert not world.job.tracker.in_sync and world.target.data[0] != ord("y")
    world.pass_s(2.0)
    world.job.complete()
    world.pass_s(5.0)
    assert world.job.pivoted and len(told(world)) == 2 and told(world)[1]["hot-bytes"] == 0
    world.assert_identical()


def test_all_wait_if_that_was_not_enough() -> None:
    """The guest goes on to change everything."""
    found = blocked()
    world = found.world
    world.job.mode.turn(synchronous=True, hot=HotGranules(world.job.tracker.dirty))
    write_to_hot(found, lambda: world.job.options.copy_mode is CopyMode.WRITE_BLOCKING)
    assert ["hot-bytes" in data for data in told(world)] == [True, False]
    world.pass_s(10.0)
    assert world.status == "ready" and world.job.is_actively_synced
    world.job.complete()
    world.pass_s(5.0)
    assert world.job.pivoted
    world.assert_identical()


@pytest.mark.parametrize("how", ["pause", "change", "cancel"])
def test_it_ends_with_what_it_is_for(how: str) -> None:
    found = blocked()
    world = found.world
    match how:
        case "pause":
            world.job.pause()
        case "change":
            world.job.change(CopyMode.BACKGROUND, may=())
        case "cancel":
            world.job.cancel(force=True)
    world.settle()
    assert world.disk.synchronous is None
    world.pass_s(1.5)
    assert [data["hot-bytes"] for data in told(world)] == [HOT * GRANULARITY, 0]


def test_a_user_who_asks_for_all_gets_all() -> None:
    found = blocked()
    world = found.world
    world.job.change(CopyMode.WRITE_BLOCKING)
    world.pass_s(10.0)
    assert len(told(world)) == 1 and world.job.is_actively_synced and world.status == "ready"
    world.job.complete()
    world.pass_s(5.0)
    world.assert_identical()


def test_nobody_waits_who_did_not_allow_it() -> None:
    found = Watched(size=GRANULES * GRANULARITY, buffer_bytes=64 * KIB)
    since_s = found.world.loop.now_s
    write_to_hot(found, lambda: found.world.loop.now_s >= since_s + 2 * NEVER_S)
    assert found.world.disk.synchronous is None and not told(found.world)
    found.world.pass_s(30.0)
    assert found.world.status == "ready"
    found.world.job.complete()
    found.world.pass_s(5.0)
    found.world.assert_identical()
