"""For how long the far side of points may be away: never longer than the journal does at the rate
that was measured, before there is a point and with points; and when users are warned."""

from __future__ import annotations

from typing import Any

import pytest
from unit.mirror.copierparts import Clock

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.disk.changes import Changes
from nbdmirror.disk.disk import Disk
from nbdmirror.mirror.far_side import JournalRoom
from nbdmirror.mirror.outage import CALM_S, LOOK_S, RATE_S, Outage

GRANULE = 4096
SIZE = 1024 * GRANULE
ROOM = JournalRoom(200 * GRANULE, 0, 1, 100 * GRANULE)


class Run:
    """What is asked of a PointRun."""

    sent_bytes = 0
    left_bytes = 0


class Scene:
    def __init__(self) -> None:
        self.disk = Disk("vda", MemoryDevice(SIZE))
        self.clock = Clock()
        self.outage = Outage(Changes(self.disk, GRANULE), self.clock)
        self.run: Any = None
        self.next = 0

    def pass_s(self, seconds: int, *, granules: int = 0) -> None:
        """A guest changes so many other granules in each second."""
        for _ in range(seconds):
            for _ in range(granules):
                self.disk.pwrite(b"x", self.next % 1024 * GRANULE, False)
                self.next += 1
            if self.run is not None:
                self.run.left_bytes += granules * GRANULE
            self.clock.now_s += LOOK_S
            self.outage.look(self.run, ROOM)

    def commit(self) -> None:
        self.run.sent_bytes += self.run.left_bytes
        self.run.left_bytes = 0

    @property
    def lasts_s(self) -> float | None:
        return self.outage.lasts_s(self.run, ROOM)


def test_before_there_are_points() -> None:
    """Also while all of the disk is dirty anyway, since it is copied for the first time."""
    scene = Scene()
    scene.outage.look(None, None)
    assert scene.lasts_s is None, "nothing is known yet"
    scene.pass_s(1, granules=10)
    assert scene.lasts_s is None
    scene.pass_s(9, granules=10)
    assert scene.outage.bytes_per_s == 10 * GRANULE
    assert scene.lasts_s == 10.0
    scene.outage.end()
    assert not scene.disk.ledger.bitmaps, "guests mark nothing for this any more"


def test_a_guest_that_changes_nothing() -> None:
    scene = Scene()
    scene.outage.look(None, None)
    scene.pass_s(10)
    assert scene.outage.bytes_per_s == 0
    assert scene.lasts_s is None


def test_what_is_changed_while_points_begin_counts_once() -> None:
    scene = Scene()
    scene.outage.look(None, None)
    scene.pass_s(5, granules=10)
    scene.run = Run()
    scene.pass_s(1, granules=10)
    assert not scene.disk.ledger.bitmaps
    for _ in range(5):
        scene.pass_s(1, granules=10)
        scene.commit()
    assert scene.outage.bytes_per_s == 10 * GRANULE


def test_during_an_outage_the_rest_becomes_less() -> None:
    scene = Scene()
    scene.run = Run()
    scene.outage.look(scene.run, ROOM)
    for _ in range(10):
        scene.pass_s(1, granules=10)
        scene.commit()
    assert scene.lasts_s == 10.0
    scene.pass_s(4, granules=10)
    assert scene.lasts_s == 6.0
    scene.pass_s(8, granules=10)
    assert scene.lasts_s == 0.0, "it does not fit any more"


def test_the_rate_is_that_of_the_last_minute() -> None:
    scene = Scene()
    scene.outage.look(None, None)
    scene.pass_s(600, granules=1)
    scene.pass_s(int(RATE_S), granules=10)
    assert scene.outage.bytes_per_s == 10 * GRANULE
    assert len(scene.outage._samples) <= RATE_S / LOOK_S + 1


@pytest.mark.parametrize("most", [51, 99, 300])
def test_users_are_warned_at_half_and_once(most: int) -> None:
    """It is over when the journal was calm for a while, and not between two large points."""
    scene = Scene()
    scene.run = Run()
    scene.pass_s(50, granules=1)
    assert not scene.outage.is_alarmed
    scene.pass_s(most - 50, granules=1)
    assert scene.outage.is_alarmed
    for _ in range(2):
        scene.commit()
        scene.pass_s(int(CALM_S) - 1)
        assert scene.outage.is_alarmed
        scene.pass_s(1, granules=26)
        assert scene.outage.is_alarmed, "it was not calm"
    scene.commit()
    scene.pass_s(int(CALM_S) + 1)
    assert not scene.outage.is_alarmed
