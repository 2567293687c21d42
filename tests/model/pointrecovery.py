"""What must hold of a world of points at any moment: the power of the far side fails, a point is
recovered from what is left, and it is what the disk was at one of the cuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from model.pointexports import Disk, DiskDevice, content

from nbdmirror.errors import DeviceLost
from nbdmirror.points import reader, recovery
from nbdmirror.points.format import SLOTS, JournalError, Point, State
from nbdmirror.points.requests import Side, run

if TYPE_CHECKING:
    from model.pointworld import PointWorld

CUT_RECOVERIES = 0.3
"""After how many steps a recovery is tried whose far side loses its power."""

Pick = Callable[[list[bytes]], bytes]
"""Which of a sector's contents a power cut leaves."""


def check_power_cuts(world: PointWorld) -> None:
    """The two extremes, and random ones; or one, where nothing can be lost."""
    picks: list[Pick] = [lambda kept: kept[0], lambda kept: kept[-1]]
    picks += [world.random.choice] * world.losses
    exports = world.exports.values()
    if not any(export.pending or export.disk.unflushed for export in exports):
        picks = picks[:1]
    for pick in picks:
        check_left(world, world.image.left(pick), world.journal.left(pick))
    is_forgotten = any(export.disk.forgotten for export in exports)
    if is_forgotten or (len(picks) > 1 and world.random.random() < CUT_RECOVERIES):
        check_cut_recovery(world, world.image.live(), world.journal.live())


def check_cut_recovery(world: PointWorld, image: Disk, journal: Disk) -> None:
    """The source is lost, and a user recovers the newest point that is to be seen, of which not all
    need be durable. Meanwhile the power of the far side fails. The point that is recovered then may
    be another one."""
    points = _read(world, journal).points
    if not points:
        return
    _recover(world, image, journal, points[-1].sequence, dies_at=world.random.randrange(2, 10))
    oldest: Pick = lambda kept: kept[0]  # noqa: E731
    pick = world.random.choice((oldest, world.random.choice))
    image, journal = image.lose(pick), journal.lose(pick)
    points = _read(world, journal).points
    if world.announced:
        assert points, "lost: all points, in a recovery"
        newest = points[-1].time_ns
        assert newest >= world.announced, f"lost: {newest} is older than {world.announced}"
    for point in points[-1:]:
        _check_recovery(world, image, journal, point.sequence, point.time_ns)


def _read(world: PointWorld, journal: Disk) -> reader.Journal:
    return run(reader.read("journal", world.journal.size), {Side.JOURNAL: DiskDevice(journal)})


def check_left(world: PointWorld, image: Disk, journal: Disk) -> None:
    found = _read(world, journal)
    if not world.announced and found.superblock.state is not State.OK:
        return
    offered = {point.time_ns: point.sequence for point in found.points}
    for time_ns, sequence in world.sequences.items():
        is_kept = sequence >= max(world.applied, found.superblock.applying)
        assert time_ns in offered or not is_kept, f"lost: point {sequence} of {time_ns}"
    assert not found.is_cut_short, f"lost: {found.damage}"
    _check_some(world, found.points, image, journal)
    newest = found.points[-1].time_ns
    assert newest >= world.announced, f"lost: {newest} is older than {world.announced}"
    _check_damaged(world, image, journal)


def _check_damaged(world: PointWorld, image: Disk, journal: Disk) -> None:
    """A superblock is damaged: what is still on offer is right."""
    slot = world.random.choice(SLOTS)
    journal.data[slot : slot + 512] = world.random.randbytes(512)
    try:
        found = _read(world, journal)
    except JournalError:
        return  # the other one was being written
    assert any("superblock" in line for line in found.damage), "lost: damage is not noticed"
    _check_some(world, found.points, image, journal)


def _check_some(world: PointWorld, points: list[Point], image: Disk, journal: Disk) -> None:
    for point in {points[-1], world.random.choice(points)} if points else ():
        _check_recovery(world, image.copy(), journal.copy(), point.sequence, point.time_ns)


def _check_recovery(
    world: PointWorld, image: Disk, journal: Disk, sequence: int, time_ns: int
) -> None:
    pick = world.random.choice
    for _ in range(world.random.randrange(2)):
        _recover(world, image, journal, sequence, dies_at=world.random.randrange(1, 12))
        image, journal = image.lose(pick), journal.lose(pick)
    _recover(world, image, journal, sequence)
    expected = b"".join(map(content, world.cuts[time_ns]))
    is_right = image.data == expected  # pytest would take minutes to show the difference
    assert is_right, f"lost: point {sequence} is not what the disk was"


def _recover(
    world: PointWorld, image: Disk, journal: Disk, sequence: int, *, dies_at: int = -1
) -> None:
    on = DiskDevice(image, dies_at=dies_at), DiskDevice(journal, dies_at=dies_at)
    program = recovery.recover(
        "journal",
        world.journal.size,
        world.image.size,
        wanted=str(sequence),
        now_ns=0,
        random_bytes=world.random.randbytes,
    )
    try:
        run(program, {Side.IMAGE: on[0], Side.JOURNAL: on[1]})
    except DeviceLost:
        assert dies_at >= 0
    except JournalError as error:
        raise AssertionError(f"lost: {error}") from error
