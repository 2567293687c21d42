"""A disk, its server, and a target that forgets what it has not flushed. Files with other ones have
their own fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fixtures import Start
from support.images import make_image, make_noise
from support.losing import SIZE, Lossy
from support.seeds import SEED
from support.servers import Nbdmirror


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE, SEED)


@pytest.fixture
def target(start: Start, folder: Path) -> Lossy:
    return start(Lossy(folder, make_noise(folder / "target.img", SIZE, SEED + 1)))


@pytest.fixture
def server(start: Start, target: Lossy, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, f"src={disk}", bare=True))
