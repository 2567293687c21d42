"""A mirror whose points are snapshots of its target: nothing is written to a whole point before it
is acknowledged, and what counts is what was acknowledged. By the rules of docs/qmp.md."""

from __future__ import annotations

from typing import Any

import pytest
from unit.mirror.jobparts import IO_ERROR, MIB
from unit.mirror.snapshotparts import BLOCK, INTERVAL_S, SnapshotsWorld

from nbdmirror.errors import CommandError, Error
from nbdmirror.mirror.acknowledgements import Acknowledgements
from nbdmirror.mirror.options import Policy

LONG_S = 100.0


def points(world: SnapshotsWorld) -> list[dict[str, Any]]:
    return world.told("X_NBDMIRROR_POINT")


@pytest.mark.guarantee("A point that waits for its snapshot is left alone")
def test_nothing_is_written_between_a_point_and_its_acknowledgement() -> None:
    world = SnapshotsWorld()
    world.start()
    assert world.awaits() == 1
    assert world.resources.written_down == [(1, 0)], "before anybody is told"
    (told,) = points(world)
    assert (told["sequence"], told["ack"], told["bytes"]) == (1, True, 0)
    before = len(world.target.requests.started)
    for n in range(20):
        world.write(n * BLOCK)
        world.pass_s(LONG_S)
        world.check_image()
    assert len(world.target.requests.started) == before, "a request to the target"
    assert world.status == "running" and not world.told("BLOCK_JOB_READY")
    world.ack()
    assert world.status == "ready" and len(world.told("BLOCK_JOB_READY")) == 1
    assert world.awaits() == 2
    assert points(world)[1]["bytes"] == 20 * BLOCK, "all that was changed meanwhile"
    world.ack()
    assert world.snapshots[2] == bytes(world.source.data)


def test_a_disk_that_does_not_change_gets_no_points() -> None:
    world = SnapshotsWorld().ready_with_points()
    world.pass_s(LONG_S)
    assert len(points(world)) == 1 and not world.acks.awaited


def test_the_lag_counts_from_the_last_acknowledged_point() -> None:
    world = SnapshotsWorld().ready_with_points()
    world.write()
    world.awaits()
    lag = world.job.lag
    assert lag is not None
    world.pass_s(10.0)
    assert lag.lag_s >= 10.0
    assert [event["kept"] for event in world.told("X_NBDMIRROR_RPO")] == [False]
    cut_s = world.cuts[-1].at_s
    world.ack()
    assert lag.lag_s <= world.loop.now_s - cut_s
    world.pass_s(1.0)
    assert lag.lag_s < 1.0
    assert [event["kept"] for event in world.told("X_NBDMIRROR_RPO")] == [False, True]


def test_an_acknowledgement_that_nobody_waits_for() -> None:
    world = SnapshotsWorld().ready_with_points()
    for number, text in {2: "for none now", 0: "for none now", -1: "for none now"}.items():
        with pytest.raises(CommandError, match=f"of point {number} is awaited.* waits {text}"):
            world.job.acknowledge(number)
    world.write()
    assert world.awaits() == 2
    with pytest.raises(CommandError, match=r"of point 3 is awaited.* waits for that of point 2"):
        world.job.acknowledge(3)
    assert world.acks.awaited == 2
    world.check_image()


def test_a_client_that_has_lost_the_answer_may_ask_again() -> None:
    world = SnapshotsWorld().ready_with_points()
    assert world.job.acknowledge(1) is True
    with pytest.raises(CommandError, match="Point 1 was acknowledged before"):
        world.job.acknowledge(1, "no")
    world.write()
    world.awaits()
    assert world.job.acknowledge(1) is True, "also while the next one waits"
    assert world.job.acknowledge(2, "no space") is False
    assert world.job.acknowledge(2, "no space") is True
    with pytest.raises(CommandError, match="Point 2 was refused before"):
        world.job.acknowledge(2)


def test_a_refused_point_is_broken_and_the_next_one_has_all() -> None:
    world = SnapshotsWorld().ready_with_points()
    world.write(3 * BLOCK)
    assert world.awaits() == 2
    lag = world.job.lag
    assert lag is not None
    before_s = lag.lag_s
    world.job.acknowledge(2, "no space left")
    world.settle()
    (broken,) = world.told("X_NBDMIRROR_POINT_BROKEN")
    assert broken["reason"] == "point 2 was refused: no space left"
    assert lag.lag_s >= before_s and world.status == "ready"
    assert not world.told("BLOCK_JOB_ERROR")
    assert world.awaits() == 3, "no number comes twice"
    assert points(world)[-1]["bytes"] == BLOCK
    world.ack()
    assert world.snapshots[3] == bytes(world.source.data)


def test_a_point_that_is_asked_for_is_made_when_it_is_acknowledged() -> None:
    world = SnapshotsWorld().ready_with_points()
    request = world.job.ask_for_point("nightly")
    with pytest.raises(CommandError, match="Job 'j' is making a point 'nightly' already"):
        world.job.ask_for_point("nightly")
    assert world.awaits() == 2
    assert points(world)[-1]["name"] == "nightly"
    assert request.taken.done() and not request.committed.done()
    world.ack()
    assert request.committed.result().sequence == 2
    refused = world.job.ask_for_point("nightly")
    world.awaits()
    world.job.acknowledge(3, "no")
    world.settle()
    with pytest.raises(Error, match="point 3 was refused: no"):
        refused.committed.result()
    assert world.told("X_NBDMIRROR_POINT_BROKEN")[-1]["name"] == "nightly"


@pytest.mark.parametrize("is_paused", [False, True])
def test_an_acknowledgement_is_written_down_before_it_counts(is_paused: bool) -> None:
    """So a process that is killed never counts on a point of which the next one knows nothing."""
    world = SnapshotsWorld().ready_with_points()
    world.write()
    assert world.awaits() == 2
    world.resources.holds = {"write_down"}
    assert world.job.acknowledge(2) is False
    world.settle()
    assert world.resources.written_down[-1] == (2, 2)
    assert world.changes.may_differ().dirty_bytes == BLOCK and not world.acks.awaited
    assert world.job.acknowledge(2) is True
    if is_paused:
        world.job.pause()
        world.settle()
        assert world.status == "standby"
    world.resources.holds.clear()
    world.resources.answer()
    assert world.changes.may_differ().is_empty is not is_paused
    if is_paused:
        world.job.resume()
        assert world.awaits() == 3
        world.ack()
    assert world.status == "ready" and world.changes.may_differ().is_empty


def test_a_first_point_that_is_refused_is_made_again() -> None:
    """Though it has nothing that the next one could have."""
    world = SnapshotsWorld()
    world.start()
    for number in (1, 2):
        assert world.awaits() == number
        world.job.acknowledge(number, "not yet")
    assert world.awaits() == 3 and world.status == "running"
    world.ack()
    assert world.status == "ready"


def test_a_broken_point_is_written_again_though_nothing_changes() -> None:
    """What was written of it is not known to be what the image has: it is written again."""
    world = SnapshotsWorld(on_target_error=Policy.STOP).ready_with_points()
    world.write(0)
    world.write(MIB // 2)
    world.target.requests.holds = {"write"}
    world.pass_s(INTERVAL_S)
    assert len(world.target.requests.held) == 2
    world.target.requests.answer("write")
    world.check_invariant()
    world.target.requests.errors["write"] = IO_ERROR
    world.target.requests.answer_all()
    world.pass_s(1.0)
    assert world.status == "standby" and not world.acks.awaited
    assert len(points(world)) == 1
    world.check_invariant()
    world.target.requests.errors.clear()
    sent = world.target.requests.started.count("write")
    world.job.resume()
    assert world.awaits() == 2
    assert world.target.requests.started.count("write") == sent + 2
    world.ack()


def test_content_that_went_back_is_written_again() -> None:
    """Written for a point that is broken, and then changed back by the guest."""
    world = SnapshotsWorld(on_target_error=Policy.IGNORE).ready_with_points()
    old = bytes(world.source.data[:512])
    world.write(0)
    world.target.requests.errors["flush"] = IO_ERROR
    world.pass_s(INTERVAL_S)
    assert world.target.data[:512] == b"g" * 512
    world.disk.pwrite(old, 0, False)
    world.target.requests.errors.clear()
    world.pass_s(30.0)
    assert world.acks.awaited
    world.ack()
    assert world.snapshots[world.acks.last][:512] == old


@pytest.mark.parametrize("end", ["pause", "lost"])
def test_a_point_that_waits_is_given_up(end: str) -> None:
    """It is not acknowledged any more, since the image may be overwritten soon."""
    world = SnapshotsWorld(reconnect_delay_s=60).ready_with_points()
    world.write()
    number = world.awaits()
    if end == "pause":
        world.job.pause()
        world.settle()
        assert world.status == "standby"
        world.pass_s(LONG_S)
        world.check_image()
    else:
        world.target.requests.is_lost = True
        world.job.target_lost()
        world.settle()
    assert world.told("X_NBDMIRROR_POINT_BROKEN")
    with pytest.raises(CommandError, match=f"of point {number} is awaited"):
        world.job.acknowledge(number)
    if end == "pause":
        world.job.resume()
    assert world.awaits() == number + 1
    world.ack()
    assert world.snapshots[number + 1] == bytes(world.source.data)


@pytest.mark.parametrize("step", ["flush", "write_down"])
def test_a_point_that_is_given_up_before_it_waits(step: str) -> None:
    """It never waits: nobody is told of it."""
    world = SnapshotsWorld().ready_with_points()
    world.write()
    if step == "flush":
        world.target.requests.holds = {"flush"}
    else:
        world.resources.holds = {"write_down"}
    world.pass_s(INTERVAL_S)
    world.job.pause()
    world.settle()
    if step == "flush":
        world.target.requests.answer_all()
    else:
        world.resources.holds.clear()
        world.resources.answer()
    world.pass_s(1.0)
    assert world.status == "standby" and not world.acks.awaited
    assert len(points(world)) == 1
    world.job.resume()
    assert world.awaits() > 1
    world.ack()


def test_a_cancel_by_force_while_a_point_waits() -> None:
    world = SnapshotsWorld().ready_with_points()
    world.write()
    world.awaits()
    world.job.cancel(force=True)
    world.pass_s(1.0)
    assert world.told("BLOCK_JOB_CANCELLED")
    world.check_image()


def test_an_end_without_a_pivot_makes_one_last_point() -> None:
    """It needs no acknowledgement: nothing is written to the image any more."""
    world = SnapshotsWorld().ready_with_points()
    world.write()
    world.job.cancel(force=False)
    world.pass_s(LONG_S)
    assert world.told("BLOCK_JOB_COMPLETED")
    last = points(world)[-1]
    assert (last["sequence"], last["ack"]) == (2, False)
    world.assert_identical()


def test_an_end_without_a_pivot_while_a_point_waits() -> None:
    """Somebody may be making the snapshot: that point is the last one."""
    world = SnapshotsWorld().ready_with_points()
    world.write()
    world.awaits()
    world.write(MIB // 2)
    before = len(world.target.requests.started)
    world.job.cancel(force=False)
    world.pass_s(LONG_S)
    assert world.told("BLOCK_JOB_COMPLETED")
    assert len(world.target.requests.started) == before
    assert len(points(world)) == 2
    world.check_image()


def test_a_pivot_waits_for_the_acknowledgement_and_needs_no_other() -> None:
    world = SnapshotsWorld().ready_with_points()
    world.write()
    world.awaits()
    world.write(MIB // 2)
    world.job.complete()
    before = len(world.target.requests.started)
    world.pass_s(LONG_S)
    assert not world.job.is_over and not world.is_held
    assert len(world.target.requests.started) == before
    world.check_image()
    world.ack()
    world.pass_s(INTERVAL_S)
    assert world.job.is_over and "pivot" in world.resources.calls
    assert not any(point["ack"] for point in points(world)[2:])
    assert world.disk.source is world.target


def test_guests_are_not_held_as_soon_as_a_pivot_was_waited_for_long() -> None:
    """What they have changed meanwhile is sent first, as far as that is quick."""
    world = SnapshotsWorld().ready_with_points()
    world.write()
    world.awaits()
    world.job.complete()
    world.pass_s(LONG_S)
    for offset in range(0, MIB // 2, BLOCK):
        world.disk.pwrite(b"m" * BLOCK, offset, False)
    world.target.requests.holds = {"write"}
    world.ack()
    world.pass_s(0.5)
    assert world.target.requests.held and not world.is_held
    world.target.requests.answer_all()
    world.pass_s(INTERVAL_S)
    assert "pivot" in world.resources.calls


def test_the_lag_of_points_that_nobody_acknowledges() -> None:
    """Those of an end are in the image alone: while the next one is written, they are lost."""
    world = SnapshotsWorld().ready_with_points()
    world.pass_s(5.0)
    lag = world.job.lag
    assert lag is not None
    world.write()
    acked_s = world.loop.now_s
    world.job.complete()
    world.target.requests.holds = {"write"}
    world.pass_s(0.5)
    world.write(MIB // 2)
    world.target.requests.answer("write")
    world.pass_s(0.5)
    assert points(world)[-1]["ack"] is False and world.is_writing
    assert lag.lag_s >= world.loop.now_s - acked_s - 0.1
    world.target.requests.answer_all()
    world.pass_s(LONG_S)
    assert "pivot" in world.resources.calls


def test_points_of_an_earlier_process_go_on() -> None:
    """The numbers and the lag do, and the first point has what no acknowledged one has."""
    acks = Acknowledgements(newest=7, last=6, last_ns=round((1_700_000_000 + 900.0) * 1e9))
    world = SnapshotsWorld(acks=acks)
    world.resources.has_begun = True
    world.target.data[:] = world.source.data
    world.target.data[BLOCK : 2 * BLOCK] = b"?" * BLOCK

    def restore() -> None:
        world.job.restore(lambda: None, lambda bitmap: bitmap.mark(BLOCK, BLOCK))

    world.job.take_up(restore, is_scanned=True, is_paused=False)
    world.settle()
    assert world.status == "running"
    assert world.awaits() == 8
    assert world.job.lag is not None and world.job.lag.lag_s >= 100.0
    assert points(world)[-1]["bytes"] == BLOCK
    world.ack()
    assert world.status == "ready" and world.snapshots[8] == bytes(world.source.data)


def test_a_first_point_that_an_earlier_process_did_not_bring_to_its_end() -> None:
    world = SnapshotsWorld(acks=Acknowledgements(newest=1))
    world.resources.has_begun = True
    world.target.data[:] = world.source.data
    world.target.data[BLOCK : 2 * BLOCK] = b"?" * BLOCK

    def restore() -> None:
        world.job.restore(lambda: None, lambda bitmap: bitmap.mark(BLOCK, BLOCK))

    world.job.take_up(restore, is_scanned=True, is_paused=False)
    assert world.awaits() == 2
    world.ack()
    assert world.status == "ready" and world.snapshots[2] == bytes(world.source.data)
