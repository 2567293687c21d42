"""The first copy of a job with points ends beside each guest, also one that changes again whatever
is copied: the first point takes the rest."""

from __future__ import annotations

from typing import Any

import pytest
from unit.mirror.groupparts import SIZE, worlds_of
from unit.mirror.snapshotparts import SnapshotsWorld

from nbdmirror.devices.base import Done
from nbdmirror.mirror.far_side import JournalRoom
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.points.format import BLOCK_BYTES

SLOW_S = 0.01
"""Of a request to the image."""


class Restless:
    """A guest that changes the first `size` bytes again as soon as any of them are sent."""

    def __init__(self, world: Any, size: int) -> None:
        self.count = 0
        self._world, self._size = world, size
        self._send = world.target.start_write
        world.target.start_write = self._start_write

    def _start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        if offset < self._size and not self._world.is_held:
            self.count += 1
            stamp = self.count.to_bytes(8, "little") * (len(buf) // 8)
            self._world.disk.pwrite(stamp, offset, False)
        content = memoryview(bytes(buf))
        self._world.loop.call_later(SLOW_S, lambda: self._send(content, offset, done))

    def end(self) -> None:
        self._size = 0


@pytest.mark.parametrize("size", [BLOCK_BYTES, SIZE // 2, SIZE])
def test_there_is_a_point_beside_a_guest_that_is_faster(size: int) -> None:
    (world,) = worlds_of("j")
    guest = Restless(world, size)
    world.job.start()
    world.pass_s(8.0)
    assert guest.count and world.points and world.status == "ready"
    guest.end()
    world.count(7)
    world.pass_s(2.0)
    assert world.number(world.content(world.last)) == 7
    assert world.content(world.last) == world.source.data


def test_what_no_point_has_room_for_is_copied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    (world,) = worlds_of("j")
    guest = Restless(world, SIZE)
    room = JournalRoom(total_bytes=SIZE, used_bytes=0, points=0, point_bytes=SIZE - 1)
    monkeypatch.setattr(PointsJob, "journal_room", room)
    world.job.start()
    world.pass_s(8.0)
    assert guest.count and not world.points and world.status == "running"
    guest.end()
    world.pass_s(8.0)
    assert world.points and world.content(world.last) == world.source.data


def test_a_snapshot_has_room_for_all() -> None:
    world = SnapshotsWorld()
    guest = Restless(world, SIZE)
    world.job.start()
    world.pass_s(8.0)
    assert guest.count and world.acks.awaited


def test_a_ready_mirror_changes_to_points_beside_such_a_guest() -> None:
    (world,) = worlds_of("j", has_points=False)
    world.job.start()
    world.pass_s(1.0)
    assert world.status == "ready"
    guest = Restless(world, SIZE // 2)
    world.count(1)
    world.job.check_settled()
    world.job.make_points(world.plan)
    world.pass_s(8.0)
    assert guest.count and world.points
    guest.end()
    world.count(2)
    world.pass_s(2.0)
    assert world.content(world.last) == world.source.data
