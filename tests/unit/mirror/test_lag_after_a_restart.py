"""The lag that is told when a server has started again: by the time of the last point, which the
wall clock gave."""

from __future__ import annotations

from unit.mirror.snapshotparts import BLOCK, EPOCH_S, SnapshotsWorld

from nbdmirror.mirror.acknowledgements import Acknowledgements


def test_a_process_that_stands_still_between_its_looks_at_two_clocks() -> None:
    """The lag is never too small."""
    world = SnapshotsWorld(acks=Acknowledgements(newest=7, last=6, last_ns=EPOCH_S * 10**9))
    job, resources = world.job, world.resources
    world.target.data[BLOCK:] = world.source.data[BLOCK:]
    resources.has_begun, world.stands_still_s = True, 5.0
    began_s = world.loop.now_s

    def restore() -> None:
        job.restore(lambda: None, lambda bitmap: bitmap.mark(0, BLOCK))

    job.take_up(restore, is_scanned=True, is_paused=False)
    assert world.loop.now_s > began_s, "it has looked at the wall clock"
    assert job.lag is not None and job.lag.lag_s >= world.loop.now_s
    assert world.awaits() == 8
    world.stands_still_s = 0.0
    assert job.lag.lag_s >= world.loop.now_s, "the far side was looked at, and a point was cut"
    world.ack()
    assert world.status == "ready" and world.snapshots[8] == bytes(world.source.data)
