"""A disk, its server, whose guest notices nothing, and hostile servers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.hostile_target.hostileparts import SIZE
from support.fixtures import Start
from support.guests import Guest
from support.hostile import Hostile
from support.images import assert_identical, make_image, make_noise
from support.qmpclient import Qmp
from support.seeds import SEED, print_seed
from support.servers import Nbdmirror, QemuNbd


@pytest.fixture
def disk(folder: Path) -> Path:
    print_seed()
    return make_image(folder / "disk.img", SIZE, SEED)


@pytest.fixture(autouse=True)
def hostiles() -> Iterator[Callable[[Path, bytes], Hostile]]:
    """Makes them. They end after the servers under test, since this fixture comes first."""
    with contextlib.ExitStack() as stack:
        yield lambda folder, image: stack.enter_context(Hostile(folder, image))


@pytest.fixture
def target(folder: Path, hostiles: Callable[[Path, bytes], Hostile]) -> Hostile:
    return hostiles(folder, random.Random(SEED).randbytes(SIZE))


@pytest.fixture
def server(start: Start, folder: Path, disk: Path) -> Iterator[Nbdmirror]:
    """With a guest that notices nothing, and a mirror of another disk to a good target, which ends
    well after all."""
    other = make_image(folder / "other.img", SIZE, SEED + 1)
    image = make_noise(folder / "good.img", SIZE, SEED + 2)
    good = start(QemuNbd(folder, image))
    server = start(Nbdmirror(folder, disk, other, bare=True))
    server.allowed = ["the source has"]
    server.qmp.start_mirror(good.uri(), device="disk1", job_id="bystander")
    server.qmp.wait_ready("bystander")
    with Guest(server.uri("disk0"), disk, seed=SEED) as guest:
        guest.wait_for_requests(20)
        yield server
        guest.wait_for_requests(50)
        assert guest.longest_s < 5.0
    assert_identical(guest.model, disk)
    if server.process is not None:
        with Qmp(server.qmp_path) as qmp:
            qmp.complete("bystander")
        assert_identical(other, image)
