"""What can be recovered of the points of a group when everything is lost, at any time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from unittest.mock import patch

import pytest
from support.seeds import SEED, print_seed
from unit.mirror.groupparts import (
    INTERVAL_S,
    PointsWorld,
    assert_common_again,
    assert_last_points_are_the_disks,
    common,
    take_up,
    taken_up,
    with_points,
)

from nbdmirror.devices.base import BlockDevice, MemoryDevice
from nbdmirror.mirror.window import Journal, Window
from nbdmirror.points.format import JournalError
from nbdmirror.points.group_recovery import recover_group
from nbdmirror.points.requests import Side

WRITES = 120


def far_sides(worlds: Sequence[PointsWorld]) -> list[dict[Side, BlockDevice]]:
    """Copies."""
    return [
        {
            Side.IMAGE: device_of(world.target.data, f"image {world.job.id}"),
            Side.JOURNAL: device_of(world.journal.data, f"journal {world.job.id}"),
        }
        for world in worlds
    ]


def device_of(data: bytearray, description: str) -> BlockDevice:
    device = MemoryDevice(len(data), description=description)
    device.data[:] = data
    return device


def everything_is_lost_at_any_time(seed: str) -> None:
    """Without a history: each image follows its journal."""
    chance, worlds = random.Random(seed), with_points("a", "b", keep_s=0.0, ring_bytes=1 << 20)
    lost = []
    for number in range(1, WRITES):
        for world in worlds:
            export = chance.choice(list(world.exports.values()))
            export.requests.delays_s = {"write": chance.choice((0.0, 0.01, 0.3))}
            while world.is_held:
                world.pass_s(0.001)
            world.count(number)
            world.pass_s(chance.choice((0.0, 0.01, 0.1)))
        if chance.random() < 0.3:
            lost.append((number, far_sides(worlds)))
    assert len(lost) > 10
    for number, pairs in lost:
        recover_group(pairs, wanted=None, now_ns=0)
        numbers = []
        for pair in pairs:
            found = bytearray(8)
            pair[Side.IMAGE].pread(memoryview(found), 0)
            numbers.append(int.from_bytes(found, "little"))
        assert numbers[1] <= numbers[0] <= numbers[1] + 1
        assert numbers[0] <= number
    assert_last_points_are_the_disks(*worlds)
    worlds[0].pass_s(60.0)
    assert not any(world.read().headers for world in worlds), "the images hold everything"


def test_a_moment_of_all_can_be_recovered_at_any_time() -> None:
    print_seed()
    everything_is_lost_at_any_time(f"{SEED}")


def test_an_image_that_follows_too_early_is_noticed() -> None:
    print_seed()
    old = Window.next

    def follows(self: Window, journal: Journal, bytes_wanted: int, until: float) -> int:
        return old(self, journal, bytes_wanted)

    with patch.object(Window, "next", follows), pytest.raises(JournalError, match="no moment is"):
        everything_is_lost_at_any_time(f"{SEED}")


def test_the_last_moment_of_all_stays_while_a_job_is_left_out_and_there_is_room() -> None:
    a, b = with_points("a", "b", keep_s=0.0, ring_bytes=1 << 20)
    a.pass_s(5.0)
    (group,) = common(a, b)[-1:]
    b.job.pause()
    a.settle()
    for number in range(10):
        a.count(number)
        a.pass_s(INTERVAL_S + 0.1)
    assert common(a, b)[-1] == group and len(a.points) == 11
    for number in range(100):
        a.count(number)
        a.pass_s(INTERVAL_S + 0.1)
    assert not common(a, b), "the room was wanted"
    b.job.resume()
    a.pass_s(INTERVAL_S)
    assert_common_again(a, b)


def test_an_idle_disk_makes_room_for_the_moments_of_the_others() -> None:
    """Its points are empty, and fill its journal."""
    a, b = with_points("a", "b", ring_bytes=1 << 20)
    for number in range(200):
        a.count(number)
        a.pass_s(INTERVAL_S + 0.1)
    assert a.points[0].sequence > 1 and b.points[0].sequence > 1
    assert a.last.group == b.last.group != 0
    assert_last_points_are_the_disks(a, b)


def test_after_a_restart_the_moment_stays_until_the_next_one() -> None:
    worlds = with_points("a", "b", keep_s=0.0)
    worlds[0].pass_s(5.0)
    (group,) = common(*worlds)
    assert not any(world.read().headers for world in worlds)
    key = worlds[0].job.point_group.key
    assert key
    a, b = taken_up(worlds, key)
    b.resources.holds = {"reconnect"}
    for world in (a, b):
        take_up(world)
    for number in range(5):
        a.count(number)
        a.pass_s(INTERVAL_S + 0.1)
    assert (a.status, b.status) == ("ready", "running")
    assert common(a, b) == [group] and len(a.points) >= 6
    b.resources.holds = set()
    b.resources.answer()
    a.pass_s(5.0)
    assert group not in common(a, b)
    assert len(a.points) == 1, "the image follows again"
    assert_common_again(a, b)
