"""Source, far side and both are killed while a guest writes: what is recovered each time was the
disk of one moment, and is no older than was told. `./run stress` does the same for longer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from integration.mirror.points.applierparts import AppliedRounds
from integration.mirror.points.killrounds import Rounds
from integration.mirror.points.pointsparts import RING_BYTES, SIZE, FarSide
from support.fixtures import Identical, Start
from support.images import make_image
from support.kept import Kept
from support.seeds import SEED, print_seed

ROUNDS = 6
APPLIED_ROUNDS = 4
WHICH = ("source", "far side", "both")


@pytest.mark.guarantee("A point is the disk of one moment")
@pytest.mark.parametrize("keep_s", [0, 3600], ids=["last point", "history"])
def test_whatever_is_killed(start: Start, folder: Path, identical: Identical, keep_s: int) -> None:
    whatever_is_killed(start, folder, identical, keep_s, ROUNDS)


@pytest.mark.guarantee("A point is the disk of one moment")
def test_whatever_is_killed_beside_an_applier(
    start: Start, folder: Path, identical: Identical
) -> None:
    """The applier, too."""
    whatever_is_killed_beside_an_applier(start, folder, identical, APPLIED_ROUNDS)


def whatever_is_killed_beside_an_applier(
    start: Start, folder: Path, identical: Identical, count: int
) -> None:
    new = partial(AppliedRounds, start=start, folder=folder)
    whatever_is_killed(start, folder, identical, 0, count, new)


def whatever_is_killed(
    start: Start,
    folder: Path,
    identical: Identical,
    keep_s: int,
    count: int,
    new: Callable[..., Rounds] = Rounds,
) -> None:
    print_seed()
    disk = make_image(folder / "disk.img", SIZE)
    far = FarSide(start, folder, ring=4 * RING_BYTES)
    server = start(Kept(folder, disk))
    server.allowed.append(".*")  # nbdkit complains of guests that it ends on
    options = {"x_nbdmirror_keep": keep_s, "x_nbdmirror_reconnect_delay": 60}
    far.start_mirror(server, device="vda", **options)
    server.qmp.wait_ready()
    rounds = new(server, far, disk, SEED)
    for number in range(count):
        rounds.round(WHICH[number % len(WHICH)])
    rounds.end()
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    rounds.ended()
    server.stop()
    far.stop()
    identical(disk, far.image)
